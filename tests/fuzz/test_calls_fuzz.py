"""Every argument of every call and constructor at hostile values: it works, or one sentence names what is wrong."""

from __future__ import annotations

import inspect
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.amused import make_components
from helpers.checkpoints import make_lumina_pipeline, make_mmada_pipeline, make_showo_pipeline
from helpers.checkpoints_maskgit import write_maskgit_checkpoint
from helpers.checkpoints_meissonic import write_meissonic_repository
from helpers.checkpoints_text import write_llada
from helpers.fuzz import attempt, is_sentence, values

from diffusers_infogain import (
    InfoGainMaskGITPipeline,
    InfoGainMeissonicPipeline,
    InfoGainPipeline,
    InfoGainScheduler,
    InfoGainTextPipeline,
    decode,
    decode_beam,
    decode_best_of,
)
from diffusers_infogain.demo import shapes
from diffusers_infogain.evaluation import prompts, text_tasks

MASK = 5


@dataclass
class Target:
    """Something to call, with arguments that work."""

    call: Callable[..., Any]
    base: Callable[[], dict[str, Any]]
    signature: Callable[..., Any]
    more: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        found = inspect.signature(self.signature).parameters.values()
        return [one.name for one in found if one.name != "self" and one.kind not in kinds] + list(self.more)


def scheduler(**settings: Any) -> InfoGainScheduler:
    made = InfoGainScheduler(mask_token_id=MASK, num_candidates=2, **settings)
    made.set_timesteps(3)
    return made


def denoise(tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return torch.zeros(*tokens.shape, MASK + 1) + torch.arange(MASK + 1.0)


def canvas() -> torch.Tensor:
    return torch.full((2, 4), MASK)


def logits() -> torch.Tensor:
    return denoise(canvas(), torch.arange(2))


def prepared() -> dict[str, Any]:
    return {"logits": logits(), "timestep": 2, "tokens": canvas()}


def function(call: Callable[..., Any], *more: str, **base: Any) -> Target:
    return Target(call, lambda: dict(base), call, more)


def method(make: Callable[[], Any], name: str, base: Callable[[], dict[str, Any]]) -> Target:
    return Target(lambda **call: getattr(make(), name)(**call), base, getattr(make(), name))


def searched(call: Callable[..., Any], **more: Any) -> Target:
    return Target(call, lambda: {"denoise": denoise, "scheduler": scheduler(), "tokens": canvas(), **more}, call)


def selected(**call: Any) -> Any:
    one = scheduler(sampler="info_gain")
    proposal = one.propose(logits(), 2, canvas())
    return one.select(**{"lookahead_logits": torch.zeros(2, 2, 4, MASK + 1), "timestep": 2, "proposal": proposal, **call})


SCHEDULER = {
    "scheduler": function(InfoGainScheduler, mask_token_id=MASK),
    "scheduler.from_config": function(
        InfoGainScheduler.from_config, *inspect.signature(InfoGainScheduler.__init__).parameters, config={"mask_token_id": MASK}
    ),
    "set_timesteps": method(scheduler, "set_timesteps", lambda: {"num_inference_steps": 3}),
    "propose": method(scheduler, "propose", prepared),
    "select": Target(selected, dict, InfoGainScheduler.select),
    "step": method(
        lambda: scheduler(sampler="confidence"), "step", lambda: {"model_output": logits(), "timestep": 2, "sample": canvas()}
    ),
    "add_noise": method(scheduler, "add_noise", lambda: {"sample": torch.zeros(2, 4, dtype=torch.long), "timesteps": 1}),
    "decode": searched(decode),
    "decode_beam": searched(decode_beam, num_beams=2),
    "decode_best_of": searched(decode_best_of, num_runs=2),
}

EVALUATION = {
    "read_prompts": function(prompts.read_prompts, path=Path("prompts.txt")),
    "sample_multiplications": function(text_tasks.sample_multiplications, num=1, generator=torch.Generator()),
    "parse_caption": function(shapes.parse_caption, text="a red circle"),
    "sample_captions": function(shapes.sample_captions, num=1, generator=torch.Generator()),
}

MAKERS: dict[str, Callable[[Path], Any]] = {
    "amused": lambda folder: InfoGainPipeline(**make_components()),
    "mmada": lambda folder: make_mmada_pipeline(),
    "showo": lambda folder: make_showo_pipeline(),
    "lumina": lambda folder: make_lumina_pipeline(),
    "maskgit": lambda folder: InfoGainMaskGITPipeline.from_pretrained(write_maskgit_checkpoint(folder)),
    "meissonic": lambda folder: InfoGainMeissonicPipeline.from_pretrained(write_meissonic_repository(folder / "made", True)),
    "text": lambda folder: text_pipeline(folder),
}


def text_pipeline(folder: Path) -> InfoGainTextPipeline:
    write_llada(folder / "llada")
    pipe = InfoGainTextPipeline.from_pretrained(folder / "llada")
    pipe.tokenizer.chat_template = "{% for message in messages %}{{ message.role }}{{ message.content }}{% endfor %}"
    return pipe


def pipeline_targets(name: str, pipe: Any, folder: Path) -> dict[str, Target]:
    pipe.set_progress_bar_config(disable=True)
    found = {"constructor": Target(type(pipe), lambda: dict(pipe.components), type(pipe).__init__)}
    found["from_pretrained"] = Target(
        type(pipe).from_pretrained,
        lambda: {"pretrained_model_name_or_path": folder},
        lambda pretrained_model_name_or_path: None,
        (
            "dtype",
            "torch_dtype",
            "variant",
            "vqvae",
            "scheduler",
            "tokenizer",
            "text_encoder",
            "transformer",
            "model",
            "revision",
        ),
    )
    if name == "text":
        base = {"prompt": "ab", "max_new_tokens": 3}
        found["call"] = Target(pipe, lambda: dict(base), type(pipe).__call__)
        found["stream"] = Target(lambda **call: list(pipe.stream(**call)), lambda: dict(base), type(pipe).__call__)
        found["encode"] = Target(pipe.encode, lambda: {"prompt": "ab"}, pipe.encode)
        return found
    base = {"height": 4 * pipe.vae_scale_factor, "width": 4 * pipe.vae_scale_factor, "num_inference_steps": 2}
    prompt = {"class_labels": [1]} if name == "maskgit" else {"prompt": "a cat"}
    found["call"] = Target(pipe, lambda: {**prompt, **base, "output_type": "latent"}, type(pipe).__call__)
    if hasattr(pipe, "encode_prompt"):
        parameters = inspect.signature(pipe.encode_prompt).parameters
        defaults = {"prompt": "a cat", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        known = {key: value for key, value in defaults.items() if key in parameters}
        found["encode_prompt"] = Target(pipe.encode_prompt, lambda: known, pipe.encode_prompt)
    return found


GREEDY = ("num_inference_steps", "max_new_tokens", "height", "width", "num_beams", "num_runs", "num_candidates", "num")
MOST = 4


def arguments(rng: random.Random, target: Target) -> dict[str, Any]:
    """The base with one to three arguments at hostile values, and none that is merely much to do."""
    call = target.base()
    names = target.names
    for name in rng.sample(names, min(len(names), rng.choice([1, 1, 1, 2, 3]))):
        value = values(rng)
        if isinstance(value, int) and value > MOST and (name in GREEDY or name.startswith("num_")):
            value = rng.choice([2**63, 10**30, 0, -1, 3])
        call[name] = value
    return call


def problem(target: Target, call: dict[str, Any], strict: bool) -> str | None:
    """What is wrong with how the call ended; None if it worked or was refused as it should be."""
    try:
        error = attempt(lambda: target.call(**call))
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:500]}"
    if error is None:
        return None
    if not is_sentence(str(error)):
        return f"{type(error).__name__}: no sentence: {str(error)[:300]!r}"
    if strict and isinstance(error, ValueError) and "`" not in str(error) and not any(name in str(error) for name in call):
        return f"names no argument: {error}"
    return None


def cases(name: str, seed: int, targets: dict[str, Target]) -> Iterator[tuple[str, Target, dict[str, Any]]]:
    rng = random.Random(f"{name} {seed}")
    while True:
        for key, target in targets.items():
            yield key, target, arguments(rng, target)


def fuzz(name: str, seed: int, count: int, targets: dict[str, Target], strict: bool = True) -> None:
    for key, target, call in itertools.islice(cases(name, seed, targets), count):
        found = problem(target, call, strict)
        changed = {one: value for one, value in call.items() if target.base().get(one) is not value}
        assert found is None, f"{key}({str(changed)[:600]}) -> {found}"


@pytest.fixture(scope="module", params=MAKERS)
def pipelines(request, tmp_path_factory) -> tuple[str, dict[str, Target]]:
    folder = tmp_path_factory.mktemp(request.param)
    pipe = MAKERS[request.param](folder)
    pipe.save_pretrained(folder / "saved")
    return request.param, pipeline_targets(request.param, pipe, folder / "saved")


@pytest.fixture(autouse=True)
def within(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_hostile_arguments_of_pipelines_are_named(pipelines):
    fuzz(pipelines[0], 0, 20, pipelines[1])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
def test_many_hostile_arguments_of_pipelines_are_named(seed, pipelines):
    fuzz(pipelines[0], seed, 200, pipelines[1])


def test_hostile_arguments_of_the_scheduler_and_its_loops_are_named():
    fuzz("scheduler", 0, 300, SCHEDULER)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
def test_many_hostile_arguments_of_the_scheduler_and_its_loops_are_named(seed):
    fuzz("scheduler", seed, 2000, SCHEDULER)


def test_hostile_arguments_of_evaluation_are_refused():
    fuzz("evaluation", 0, 200, EVALUATION, strict=False)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
def test_many_hostile_arguments_of_evaluation_are_refused(seed):
    fuzz("evaluation", seed, 1000, EVALUATION, strict=False)
