"""aMUSEd's format and LoRA, whether diffusers still has aMUSEd's classes or not."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AmusedPipeline
from helpers.amused import make_components
from safetensors.torch import load_file, save_file

from diffusers_infogain import InfoGainPipeline

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT_TARGETS = ["q_proj", "v_proj"]

WITHOUT_AMUSED = """
import importlib.abc, sys
GONE = ("AmusedPipeline", "AmusedImg2ImgPipeline", "AmusedInpaintPipeline", "AmusedScheduler", "AmusedLoraLoaderMixin")
MODULES = ("diffusers.pipelines.deprecated.amused", "diffusers.pipelines.amused", "diffusers.schedulers.scheduling_amused")

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.startswith(MODULES):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Finder())
import diffusers, diffusers.loaders.lora_pipeline, diffusers.pipelines, diffusers.schedulers
for module in (diffusers, diffusers.pipelines, diffusers.schedulers, diffusers.loaders):
    for names in (module._import_structure.values() if hasattr(module, "_import_structure") else ()):
        names[:] = [name for name in names if name not in GONE]
    for name in GONE:
        module.__dict__.pop(name, None)
        for table in ("_class_to_module", "_objects"):
            getattr(module, table, {}).pop(name, None)
del diffusers.loaders.lora_pipeline.AmusedLoraLoaderMixin
for name in GONE:
    assert not hasattr(diffusers, name), name
"""
RUN = """
import sys, torch
import diffusers_infogain
from diffusers_infogain import InfoGainPipeline, InfoGainScheduler, load
folder, target = sys.argv[1:]
def tokens(pipe):
    pipe.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(0)
    return pipe("a cat", height=8, width=8, num_inference_steps=3, generator=seed, output_type="latent").images
pipe = load(folder)
first = tokens(pipe)
pipe.scheduler = InfoGainScheduler.from_config(pipe.scheduler.config, num_candidates=3)
expected = tokens(pipe)
pipe.save_pretrained(target)
for again in (
    InfoGainPipeline.from_pretrained(target),
    InfoGainPipeline.from_pretrained(folder, scheduler=InfoGainScheduler(mask_token_id=25, num_candidates=3)),
    InfoGainPipeline.from_pipe(pipe),
):
    assert again.scheduler.config.num_candidates == 3
    assert torch.equal(tokens(again), expected)
assert InfoGainScheduler(mask_token_id=25).compatibles == []
assert InfoGainScheduler.from_pretrained(folder, subfolder="scheduler").config.mask_token_id == 25
print(first.flatten().tolist())
"""


def run(program: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_reading_and_writing_without_the_classes_of_diffusers(stock_repository, tmp_path):
    pipe = InfoGainPipeline.from_pretrained(stock_repository)
    pipe.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(0)
    tokens = pipe("a cat", height=8, width=8, num_inference_steps=3, generator=seed, output_type="latent").images
    target = tmp_path / "again"
    assert json.loads(run(WITHOUT_AMUSED + RUN, stock_repository, str(target))) == tokens.flatten().tolist()
    index = json.loads((target / "model_index.json").read_text())
    assert (index["_class_name"], index["scheduler"]) == ("AmusedPipeline", ["diffusers", "AmusedScheduler"])
    assert InfoGainPipeline.from_pretrained(target).scheduler.config.num_candidates == 3
    assert AmusedPipeline.from_pretrained(target).scheduler.config.mask_token_id == 25


# LoRA


def make_pipe() -> InfoGainPipeline:
    pipe = InfoGainPipeline(**make_components())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def add_layers(model: torch.nn.Module, targets: list[str], seed: int = 0, **config) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **{"lora_alpha": 2, **config}))
    return peft.get_peft_model_state_dict(model, adapter_name="default")


def first_logits(pipe: InfoGainPipeline, **call: Any) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    pipe(
        "a cat",
        height=8,
        width=8,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        callback_on_step_end=lambda pipe, index, timestep, kwargs: seen.append(kwargs["logits"]),
        callback_on_step_end_tensor_inputs=["logits"],
        **call,
    )
    return seen[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with layers of the transformer, and what the model gives with them."""
    pipe, folder = make_pipe(), tmp_path_factory.mktemp("lora")
    layers = add_layers(pipe.transformer, TARGETS)
    InfoGainPipeline.save_lora_weights(folder, transformer_lora_layers=layers)
    return folder, first_logits(pipe)


def test_fused_and_unfused_without_arguments(trained):
    folder, expected = trained
    pipe = make_pipe()
    before = first_logits(pipe)
    pipe.load_lora_weights(folder, adapter_name="style")
    torch.testing.assert_close(first_logits(pipe), expected)
    pipe.fuse_lora()
    assert pipe.num_fused_loras == 1
    torch.testing.assert_close(first_logits(pipe), expected, atol=1e-4, rtol=1e-4)
    pipe.unfuse_lora()
    assert pipe.num_fused_loras == 0
    torch.testing.assert_close(first_logits(pipe), expected, atol=1e-4, rtol=1e-4)
    pipe.fuse_lora(lora_scale=0.5)
    half = first_logits(pipe)
    pipe.unfuse_lora(components=["transformer"])
    pipe.set_adapters("style", 0.5)
    torch.testing.assert_close(half, first_logits(pipe), atol=1e-4, rtol=1e-4)
    # Unfusing leaves rounding in the weights.
    pipe.disable_lora()
    torch.testing.assert_close(first_logits(pipe), before, atol=1e-3, rtol=1e-3)
    pipe.enable_lora()
    pipe.unload_lora_weights()
    torch.testing.assert_close(first_logits(pipe), before, atol=1e-3, rtol=1e-3)


def test_several_adapters(trained, tmp_path):
    folder, expected = trained
    other = make_pipe()
    InfoGainPipeline.save_lora_weights(tmp_path, transformer_lora_layers=add_layers(other.transformer, TARGETS, seed=1))
    pipe = make_pipe()
    pipe.load_lora_weights(folder, adapter_name="style")
    pipe.load_lora_weights(str(tmp_path / "pytorch_lora_weights.safetensors"), adapter_name="other")
    assert pipe.get_list_adapters() == {"transformer": ["style", "other"]}
    pipe.set_adapters(["style", "other"], [1.0, 0.0])
    assert pipe.get_active_adapters() == ["style", "other"]
    torch.testing.assert_close(first_logits(pipe), expected)
    pipe.set_adapters("other")
    torch.testing.assert_close(first_logits(pipe), first_logits(other))
    pipe.delete_adapters("other")
    pipe.set_adapters("style")
    torch.testing.assert_close(first_logits(pipe), expected)


def test_the_scale_of_a_call(trained):
    folder, expected = trained
    pipe = make_pipe()
    before = first_logits(pipe)
    pipe.load_lora_weights(load_file(folder / "pytorch_lora_weights.safetensors"))
    for scale, logits in ((0.0, before), (1.0, expected)):
        torch.testing.assert_close(first_logits(pipe, cross_attention_kwargs={"scale": scale}), logits)


def test_alpha_is_kept_with_the_metadata(tmp_path):
    pipe = make_pipe()
    layers = add_layers(pipe.transformer, TARGETS, lora_alpha=8)
    settings = pipe.transformer.peft_config["default"].to_dict()
    InfoGainPipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers, transformer_lora_adapter_metadata=settings)
    other = make_pipe()
    other.load_lora_weights(tmp_path)
    torch.testing.assert_close(first_logits(other), first_logits(pipe))


def test_layers_of_the_text_encoder(tmp_path):
    pipe = make_pipe()
    try:
        layers = add_layers(pipe.text_encoder, TEXT_TARGETS)
    except ValueError as error:
        pytest.skip(f"transformers does not take this peft: {error}")
    layers = {key.removeprefix("base_model.model."): value for key, value in layers.items()}
    InfoGainPipeline.save_lora_weights(tmp_path, text_encoder_lora_layers=layers)
    other = make_pipe()
    before = first_logits(other)
    other.load_lora_weights(tmp_path, adapter_name="words")
    assert other.get_list_adapters() == {"text_encoder": ["words"]}
    torch.testing.assert_close(first_logits(other), first_logits(pipe))
    assert not torch.allclose(first_logits(other), before)
    other.fuse_lora()
    torch.testing.assert_close(first_logits(other), first_logits(pipe), atol=1e-4, rtol=1e-4)
    other.unfuse_lora()
    other.unload_lora_weights()
    torch.testing.assert_close(first_logits(other), before, atol=1e-3, rtol=1e-3)


def test_adapters_come_and_go(trained):
    folder, expected = trained
    pipe = make_pipe()
    pipe.load_lora_weights(folder, adapter_name="style", low_cpu_mem_usage=True)
    with pytest.raises(ValueError, match="other"):
        pipe.set_adapters("other")
    with pytest.raises(ValueError, match="style"):
        pipe.load_lora_weights(folder, adapter_name="style")
    pipe.delete_adapters("style")
    assert pipe.get_list_adapters() == {}
    for name in ("style", "again"):
        pipe.load_lora_weights(folder, adapter_name=name)
        torch.testing.assert_close(first_logits(pipe), expected)
        pipe.unload_lora_weights()
    add_layers(pipe.transformer, TARGETS)
    torch.testing.assert_close(first_logits(pipe), expected)


def test_layers_and_offloaded_models(trained):
    folder, expected = trained
    pipe = make_pipe()
    pipe.load_lora_weights(folder)
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        torch.testing.assert_close(first_logits(pipe), expected)
    pipe.set_lora_device(["default_0"], "cpu")
    pipe.unload_lora_weights()


def test_layers_saved_with_the_pipeline_are_fused(trained, tmp_path):
    """`save_pretrained` keeps what is fused; diffusers leaves layers that are not to their own files."""
    folder, expected = trained
    pipe = make_pipe()
    pipe.load_lora_weights(folder)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path)
    torch.testing.assert_close(first_logits(InfoGainPipeline.from_pretrained(tmp_path)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"unet.attn.to_q.lora_A.weight": (2, 16)}, "must hold LoRA layers of `transformer` and `text_encoder` only"),
        ({"transformer.attn.to_q.weight": (2, 16)}, "contain 'lora', got 'transformer.attn.to_q.weight'"),
        ({"transformer.blocks.0.to_q.lora_A.weight": (2, 16)}, "`transformer` has no layer 'blocks.0.to_q'"),
        ({"text_encoder.layers.9.q_proj.lora_A.weight": (2, 16)}, "`text_encoder` has no layer 'layers.9.q_proj'"),
        ({}, "must hold LoRA layers, got no tensor"),
    ],
)
def test_layers_of_another_model_are_refused(changed, message, tmp_path):
    pipe = make_pipe()
    before = first_logits(pipe)
    layers = {key: torch.ones(shape) for key, shape in changed.items()}
    with pytest.raises(ValueError, match=message):
        pipe.load_lora_weights(layers)
    assert torch.equal(first_logits(pipe), before)


def test_layers_of_another_size_are_refused(trained, tmp_path):
    folder, _ = trained
    layers = load_file(folder / "pytorch_lora_weights.safetensors")
    name = next(name for name in layers if name.endswith("lora_A.weight"))
    layers[name] = torch.ones(2, 17)
    save_file(layers, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"must have the size 16 along dimension 1 for this pipeline, got a shape of \(2, 17\)"):
        make_pipe().load_lora_weights(tmp_path, weight_name="other.safetensors")


def test_layers_for_a_component_that_is_none(trained):
    folder, _ = trained
    pipe = make_pipe()
    pipe.transformer = None
    with pytest.raises(ValueError, match="`transformer` must not be None"):
        pipe.load_lora_weights(folder)


def test_weights_are_no_pickles_by_default(tmp_path):
    torch.save({"transformer.x.lora_A.weight": torch.ones(2, 16)}, tmp_path / "pytorch_lora_weights.bin")
    with pytest.raises(OSError, match="safetensors"):
        make_pipe().load_lora_weights(Path(tmp_path))


def test_the_same_layers_as_the_stock_mixin_writes(tmp_path):
    from diffusers.loaders import AmusedLoraLoaderMixin

    layers = add_layers(make_pipe().transformer, TARGETS)
    for kind, name in ((AmusedLoraLoaderMixin, "stock"), (InfoGainPipeline, "ours")):
        kind.save_lora_weights(tmp_path / name, transformer_lora_layers=layers)
    files = [(tmp_path / name / "pytorch_lora_weights.safetensors").read_bytes() for name in ("stock", "ours")]
    assert files[0] == files[1]


def test_nothing_is_said_about_the_other_component(trained, caplog):
    with caplog.at_level(logging.WARNING):
        make_pipe().load_lora_weights(trained[0])
    assert not caplog.records
