"""The presets llada, dream, sdar and trado decode what the published loops of these models did, token for token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.text_pipelines import MASK, make_block_pipe, make_pipe
from safetensors.torch import load_file

from diffusers_infogain import PRESETS, InfoGainScheduler

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "published_loops.json").read_text())


@pytest.fixture(scope="module")
def pipes():
    """A tiny model of each family, with the weights that the published loops ran."""
    weights = load_file(GOLDEN / "published_loops.safetensors")
    pipes = {"llada": make_pipe(), "dream": make_block_pipe(shifted=True), "sdar": make_block_pipe()}
    for family, pipe in pipes.items():
        prefix = "full." if family == "llada" else "qwen."
        pipe.model.load_state_dict({key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)})
    return pipes


def decoded(pipe, case: dict, changes: dict) -> list[int]:
    pipe.scheduler = InfoGainScheduler(MASK, **{**PRESETS[case["preset"]], **changes})
    output = pipe(
        input_ids=[case["prompt"]],
        generator=[torch.Generator().manual_seed(case["seed"])],
        stop_at_eos=False,
        **{name: case[name] for name in ("max_new_tokens", "block_length", "num_inference_steps")},
        **case.get("call", {}),
    )
    return output.sequences[0][output.attention_mask[0]].tolist()


def test_every_family_and_variant_is_there():
    assert {case["preset"] for case in CASES} == {"llada", "dream", "sdar", "trado"}
    assert {case["published"].get("remasking") for case in CASES if case["family"] == "llada"} == {"low_confidence", "random"}
    algorithms = {case["published"]["alg"] for case in CASES if case["family"] == "dream"}
    assert algorithms == {"entropy", "maskgit_plus", "topk_margin", "origin"}
    strategies = {case["published"]["strategy"] for case in CASES if case["family"] == "sdar"}
    assert strategies == {"low_confidence_static", "low_confidence_dynamic", "sequential"}


@pytest.mark.parametrize("family", ["llada", "dream", "sdar"])
def test_the_published_loop_is_decoded_token_for_token(pipes, family):
    cases = [case for case in CASES if case["family"] == family]
    assert len(cases) >= 16
    for case in cases:
        assert decoded(pipes[family], case, case["changes"]) == case["tokens"], case


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("llada", {"choice_temperature": 1.0}),
        ("llada", {"masking_schedule": "cosine"}),
        ("dream", {"masking_schedule": "even"}),
        ("dream", {"certainty_of": "model"}),
        ("dream", {"top_p": 1.0}),
        ("sdar", {"certainty_of": "model"}),
        ("sdar", {"parallel_threshold": 0.6}),
    ],
    ids=str,
)
def test_every_part_of_a_preset_matters(pipes, family, change):
    cases = [case for case in CASES if case["family"] == family and not set(change) & set(case["changes"])]
    assert any(decoded(pipes[family], case, {**case["changes"], **change}) != case["tokens"] for case in cases)
