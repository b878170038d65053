"""Text models as torch.compile, peft, data-parallel classes and quantisers wrap them, and as threads share them."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import pytest
import torch
from helpers.checkpoints_text import write_bert, write_dream, write_llada, write_mdlm_qwen3, write_sdar
from helpers.text import masked_lm_logits

from diffusers_infogain import InfoGainScheduler, InfoGainTextPipeline
from diffusers_infogain.models.wrapped import underlying

WRITERS = {"llada": write_llada, "dream": write_dream, "sdar": write_sdar, "a2d": write_mdlm_qwen3, "bert": write_bert}
PROMPTS = ["a red cat", "cat", "red red a cat", "a a a", "cat a", "red", "a cat cat a red", "red cat red"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Any]:
    return {name: write(tmp_path_factory.mktemp("wrapped") / name) for name, write in WRITERS.items()}


def load(folder: Any, wrap: Any = None) -> InfoGainTextPipeline:
    pipe = InfoGainTextPipeline.from_pretrained(folder)
    settings = {"num_candidates": 3, "certainty": "margin", "entropy_bound": 0}
    pipe.scheduler = InfoGainScheduler.from_config(pipe.scheduler.config, **settings)
    pipe.set_progress_bar_config(disable=True)
    if wrap is not None:
        pipe.register_modules(model=wrap(pipe.model))
    return pipe


def write(pipe: InfoGainTextPipeline, row: int) -> list[int]:
    generator = [torch.Generator().manual_seed(row)]
    output = pipe(PROMPTS[row], max_new_tokens=4 + row % 3, generator=generator, stop_at_eos=False)
    return output.sequences[output.attention_mask].tolist()


class Counting:
    """A backend of torch.compile that runs a graph as it is, and counts how often."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            self.runs += 1
            return graph.forward(*args)

        return run


def lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    modules = ["query", "value"] if hasattr(model, "bert") else ["q_proj", "v_proj"]
    modules += [] if model.config.tie_word_embeddings else ["lm_head"]
    adapted = get_peft_model(model, LoraConfig(target_modules=modules, r=2, init_lora_weights=False)).eval()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return adapted


class Holding(torch.nn.Module):
    """What a library may put around a model."""

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


@pytest.mark.parametrize("family", ["llada", *(pytest.param(name, marks=pytest.mark.slow) for name in list(WRITERS)[1:])])
def test_a_compiled_model_is_run_compiled_and_writes_the_same(family, folders):
    torch.compiler.reset()
    backend = Counting()
    pipe = load(folders[family], lambda model: torch.compile(model, backend=backend))
    assert write(pipe, 2) == write(load(folders[family]), 2)
    assert backend.runs > 4


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, Holding, lambda model: Holding(torch.nn.DataParallel(model))])
@pytest.mark.parametrize("family", ["llada", "sdar", "bert"])
def test_a_parallel_model_writes_the_same(family, wrap, folders):
    pipe = load(folders[family], wrap)
    assert write(pipe, 2) == write(load(folders[family]), 2)
    again = InfoGainTextPipeline(pipe.model, pipe.tokenizer, pipe.scheduler)
    again.set_progress_bar_config(disable=True)
    assert write(again, 2) == write(pipe, 2)


@pytest.mark.parametrize("outer", [None, pytest.param("compile", marks=pytest.mark.slow), "parallel"])
@pytest.mark.parametrize("family", WRITERS)
def test_an_adapter_counts(family, outer, folders):
    pytest.importorskip("peft")
    torch.compiler.reset()
    wraps = {None: lambda model: model, "compile": lambda model: torch.compile(model, backend="eager"), "parallel": Holding}
    pipe, plain = load(folders[family], lambda model: wraps[outer](lora(model))), load(folders[family])
    ids = torch.arange(5)[None] + 5
    where = torch.ones_like(ids, dtype=torch.bool)
    logits = masked_lm_logits(pipe.model, pipe.family, ids, None, where)
    adapted = load(folders[family]).model
    adapted = lora(adapted).merge_and_unload()
    torch.testing.assert_close(logits, masked_lm_logits(adapted, pipe.family, ids, None, where), atol=1e-3, rtol=1e-4)
    assert not torch.allclose(logits, masked_lm_logits(plain.model, pipe.family, ids, None, where), atol=0.1)
    plain.register_modules(model=adapted)
    assert write(pipe, 2) == write(plain, 2)


@pytest.mark.parametrize("family", ["llada", "sdar", "bert"])
def test_a_quantised_model_writes(family, folders):
    from torch.ao.quantization import quantize_dynamic

    pipe = load(folders[family], lambda model: quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8))
    assert len(write(pipe, 2)) == len(write(load(folders[family]), 2))


def test_wrappers_that_cannot_work_are_named(folders):
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="must keep the text's own positions, got a model of peft with a PromptTuningConfig"):
        underlying(peft.get_peft_model(load(folders["dream"]).model, config))
    with pytest.raises(ValueError, match=r"alone or as torch.compile, peft or DataParallel wrapped it, got Linear"):
        underlying(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("family", ["llada", "dream", "sdar", "bert"])
def test_threads_write_what_each_would_alone(family, folders):
    pipe = load(folders[family])
    expected = [write(pipe, row) for row in range(8)]
    found: list[tuple[int, list[int]]] = []
    barrier, errors = threading.Barrier(8), []

    def work(row: int) -> None:
        try:
            for _ in range(3):
                barrier.wait()
                with torch.no_grad():
                    found.append((row, write(pipe, row)))
        except Exception as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(row,)) for row in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not errors
    assert Counter(row for row, _ in found) == dict.fromkeys(range(8), 3)
    assert all(tokens == expected[row] for row, tokens in found)


@pytest.mark.parametrize("family", WRITERS)
def test_a_model_is_left_as_it_is(family, folders):
    pipe = load(folders[family])
    before = {name: id(module) for name, module in pipe.model.named_modules()}
    write(pipe, 0)
    assert {name: id(module) for name, module in pipe.model.named_modules()} == before
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in pipe.model.modules())
