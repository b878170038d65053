"""Memory by shapes: against the tensors of real runs, and the page that it is on."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffusers_infogain.memory import BITS, LiveTensors, memory_needs, published_sizes, weight_bytes
from diffusers_infogain.model_sizes import MODEL_SIZES
from diffusers_infogain.random_models import random_inputs, random_pipeline
from diffusers_infogain.scheduling_infogain import InfoGainScheduler

# Small models with so many codes that logits take most memory, as in large ones.
SMALL = {
    "amused-nano": {"vocab_size": 8002, "codebook_size": 8000, "sample_size": 16},
    "mmada-nano": {"vocab_size": 8242, "hidden_size": 64, "intermediate_size": 256, "max_position_embeddings": 2048},
}


def test_tensors_are_counted_while_they_live():
    with LiveTensors() as memory:
        first = torch.zeros(1000)
        second = first + 1
        view = second[:10]
        first.add_(1)
        del first, second
        assert memory.live == 4000
        del view
        torch.zeros(100)
    assert memory.live == 0
    assert memory.peak == 8000


@pytest.mark.parametrize(
    ("candidates", "guided", "states"),
    [
        (4, True, None),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, True, None), (4, False, None), (4, True, 1))),
    ],
)
@pytest.mark.parametrize("name", SMALL)
def test_the_peak_of_a_run_is_the_one_of_the_shapes(name, candidates, guided, states):
    pipe = random_pipeline(name, changes=SMALL[name])
    size = replace(MODEL_SIZES[name], config={**MODEL_SIZES[name].config, **SMALL[name]})
    if "sample_size" in size.layout:
        size = replace(size, layout={**size.layout, "sample_size": 16})
        pipe.register_to_config(sample_size=16)
    own = {"num_candidates": candidates, "sampler": "info_gain", "lazy_threshold": None}
    pipe.scheduler = InfoGainScheduler.from_config(pipe.scheduler.config, **own)

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step == 1
        return tensors

    call = {"num_inference_steps": 32, "output_type": "latent", "guidance_scale": 3.0 if guided else -5.0}
    inputs = {**random_inputs(pipe, 1, prompt_length=32), "generator": [torch.Generator().manual_seed(0)]}
    with LiveTensors() as memory:
        pipe(**inputs, **call, lookahead_batch_size=states, callback_on_step_end=stop)
    options = {"num_candidates": candidates, "guided": guided, "lookahead_batch_size": states, "prompt_length": 32}
    needs = memory_needs(size, dtype=torch.float32, on_gpu=False, **options)
    # Candidates that are equal share a row, and each has decoded some tokens.
    assert 0.95 < (needs.peak - needs.weights) / memory.peak < 1.2


def test_weights_in_few_bits():
    network = torch.nn.Sequential(torch.nn.Linear(256, 64), torch.nn.LayerNorm(64))
    plain = 64 + 2 * 64
    assert weight_bytes(network, torch.bfloat16) == 2 * (256 * 64 + plain)
    for kind, scales in (("int8", 64), ("fp8", 64), ("int4", 128), ("nf4", 256)):
        assert weight_bytes(network, torch.bfloat16, kind) == 256 * 64 * BITS[kind] // 8 + 4 * scales + 2 * plain
    with pytest.raises(ValueError, match="`quantization` must be one of int8, fp8, int4, nf4 or None, got 'int2'"):
        weight_bytes(network, torch.bfloat16, "int2")


def test_8_billion_weights_with_candidates_and_guidance_fit_into_24_gb_in_8_bits():
    for name in ("mmada-8b", "lumina-dimoo"):
        assert memory_needs(name, quantization="int8", num_candidates=4).peak < 24e9 < 2.2 * memory_needs(name).weights


def test_every_published_model_is_on_the_page():
    page = (Path(__file__).parents[1] / "docs" / "memory.md").read_text(encoding="utf-8")
    rows = page.partition("<!-- memory -->")[2].partition("## ")[0].splitlines()
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows if row.startswith("| ")][1:] == published_sizes()


@pytest.mark.slow
def test_the_page_is_as_written():
    file = Path(__file__).parents[1] / "docs" / "write_memory.py"
    spec = importlib.util.spec_from_file_location("write_memory", file)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.page() == script.PAGE.read_text(encoding="utf-8")
