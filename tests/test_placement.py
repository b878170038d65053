"""Every family quantised, on devices, with other attention, offloaded, cast: as published and in diffusers' format."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import BitsAndBytesConfig as DiffusersBitsAndBytesConfig
from diffusers import ModelMixin, PipelineQuantizationConfig
from diffusers import __version__ as DIFFUSERS_VERSION
from helpers.families import TEXT, WRITERS, decode, first_logits, load_family, network, write_published
from packaging import version
from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

from diffusers_infogain import InfoGainTextPipeline, load
from diffusers_infogain.checkpoints.placement import balanced
from diffusers_infogain.components import stored_parts
from diffusers_infogain.evaluation.identity import pipeline_digest
from diffusers_infogain.loading import IMAGE_PIPELINES
from diffusers_infogain.models.llada import token_logits

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs the extra 'quantization'")
needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs the extra 'quantization'")
FAST = ("meissonic", "llada", "bert")
every = pytest.mark.parametrize(
    "family", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in WRITERS]
)
formats = pytest.mark.parametrize("kind", ["published", pytest.param("saved", marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Callable[[str, str], Path]:
    root, saved = tmp_path_factory.mktemp("published"), tmp_path_factory.mktemp("saved")
    published: dict[str, Path] = {}

    def find(family: str, kind: str) -> Path:
        if family not in published:
            published[family] = write_published(root, family)
        if kind == "published" or family == "amused":  # which is published in diffusers' format
            return published[family]
        if not (saved / family).exists():
            load_family(family, published[family]).save_pretrained(saved / family)
        return saved / family

    return find


def num_bytes(model: torch.nn.Module) -> int:
    """Of the weights, in the form in which they are kept."""
    return sum(part.nbytes for tensor in model.parameters() for part in stored_parts(tensor))


def quantised_layers(model: torch.nn.Module) -> list[str]:
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return [name for name, module in linear.items() if type(module.weight) is not torch.nn.Parameter]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.slow
def test_every_family_is_tested_here(folder):
    classes = {type(load_family(name, folder(name, "published"))) for name in WRITERS}
    assert classes == {*IMAGE_PIPELINES, InfoGainTextPipeline}


# Quantization


@needs_torchao
@formats
@every
def test_weights_in_8_bits(family, kind, folder):
    plain = load_family(family, folder(family, kind), dtype="bfloat16")
    pipe = load_family(family, folder(family, kind), dtype="bfloat16", quantization_config="int8")
    layers = quantised_layers(network(pipe))
    linear = [name for name, module in network(plain).named_modules() if type(module) is torch.nn.Linear]
    # transformers keeps the layers that make logits.
    head = {"lm_head"} if issubclass(type(network(pipe)), PreTrainedModel) else set()
    head |= {name for name in linear if name.startswith("cls.predictions.decoder")}
    assert set(layers) == set(linear) - head
    saved = sum(network(plain).get_parameter(f"{name}.weight").numel() for name in layers)
    assert num_bytes(network(plain)) - num_bytes(network(pipe)) > 0.7 * saved  # less the scales of rows that are short here
    assert 0 < relative_error(first_logits(pipe), first_logits(plain)) < 0.04
    assert decode(pipe).shape == decode(plain).shape
    others = {name: model for name, model in pipe.components.items() if isinstance(model, torch.nn.Module)}
    others.pop(pipe.compiled_component)
    assert not any(quantised_layers(model) for model in others.values())


@needs_torchao
@pytest.mark.slow
def test_experts_are_quantised_by_their_names(folder, caplog):
    from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig

    def whole(pipe):
        return [key for key, tensor in pipe.model.named_parameters() if tensor.ndim == 3 and type(tensor) is torch.nn.Parameter]

    assert whole(load(folder("llada2", "published"), dtype="bfloat16", quantization_config="int8"))
    assert "leaves the experts of `model` as they are, 29% of its weights, since they are no linear layers" in caplog.text
    caplog.clear()
    each = Int8WeightOnlyConfig(version=2)
    config = TorchAoConfig(FqnToConfig({r"re:.*experts\.(gate_up|down)_proj": each, "_default": each}))
    pipe = load(folder("llada2", "published"), dtype="bfloat16", quantization_config=config)
    assert "experts" not in caplog.text
    assert not whole(pipe)
    pipe.model.set_experts_implementation("eager")
    plain = load(folder("llada2", "published"), dtype="bfloat16")
    assert 0 < relative_error(first_logits(pipe), first_logits(plain)) < 0.05
    assert decode(pipe).shape == decode(plain).shape


@needs_torchao
@pytest.mark.parametrize("family", [name for name in WRITERS if name not in TEXT])
@pytest.mark.slow
def test_all_models_quantised(family, folder):
    plain = load_family(family, folder(family, "published"), dtype="bfloat16")
    models = {name for name, model in plain.components.items() if isinstance(model, torch.nn.Module)}
    config = dict.fromkeys(models, "int8")
    pipe = load_family(family, folder(family, "published"), dtype="bfloat16", quantization_config=config)
    images = decode(pipe, output_type="pt")
    assert images.isfinite().all()
    assert (images - decode(plain, output_type="pt")).abs().mean() < 0.2
    pipe.encode_image(images[:, :, : 4 * pipe.vae_scale_factor, : 4 * pipe.vae_scale_factor])


@needs_torchao
@formats
@pytest.mark.parametrize("family", ["meissonic", "llada"])
def test_configurations_of_either_library(family, kind, folder):
    from diffusers import TorchAoConfig as OfDiffusers
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig as OfTransformers

    expected = first_logits(load_family(family, folder(family, kind), dtype="bfloat16", quantization_config="int8"))
    kind_of = Int8WeightOnlyConfig(version=2)
    name = "model" if family in TEXT else "transformer"
    own = OfDiffusers if family == "meissonic" else OfTransformers
    for config in (
        OfDiffusers(kind_of),
        OfTransformers(kind_of),
        {name: OfDiffusers(kind_of)},
        {name: "int8"},
        PipelineQuantizationConfig(quant_mapping={name: own(kind_of)}),
    ):
        pipe = load_family(family, folder(family, kind), dtype="bfloat16", quantization_config=config)
        assert torch.equal(first_logits(pipe), expected)


@needs_torchao
@formats
@pytest.mark.parametrize("family", [pytest.param("maskgit", marks=pytest.mark.slow), "llada"])
def test_layers_that_are_not_to_be_converted(family, kind, folder):
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    kept = "attn" if family == "maskgit" else "q_proj"
    config = TorchAoConfig(
        Int8WeightOnlyConfig(version=2), modules_to_not_convert=[kept if family == "maskgit" else rf".*{kept}"]
    )
    layers = quantised_layers(network(load_family(family, folder(family, kind), dtype="bfloat16", quantization_config=config)))
    assert layers
    assert not any(kept in name.split(".") for name in layers)


@needs_torchao
@pytest.mark.slow
@pytest.mark.parametrize("family", ["mmada", "lumina"])
def test_a_quantised_head_gives_the_logits_of_the_codebook(family, folder):
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    config = TorchAoConfig(Int8WeightOnlyConfig(version=2), include_input_output_embeddings=True)
    pipe = load_family(family, folder(family, "published"), dtype="bfloat16", quantization_config=config)
    assert "lm_head" in quantised_layers(network(pipe))
    plain = load_family(family, folder(family, "published"), dtype="bfloat16")
    assert relative_error(first_logits(pipe), first_logits(plain)) < 0.06


@needs_torchao
@every
def test_quantised_models_are_saved_and_loaded_again(family, folder, tmp_path):
    pipe = load_family(family, folder(family, "published"), dtype="bfloat16", quantization_config="int8")
    pipe.save_pretrained(tmp_path / "quantised")
    again = load_family(family, tmp_path / "quantised")
    assert quantised_layers(network(again)) == quantised_layers(network(pipe))
    assert torch.equal(first_logits(again), first_logits(pipe))
    plain = load_family(family, folder(family, "published"), dtype="bfloat16")
    assert len({pipeline_digest(pipe), pipeline_digest(plain)}) == 2


@needs_bitsandbytes
@formats
@pytest.mark.parametrize("family", ["llada", "dream", pytest.param("mmada", marks=pytest.mark.slow)])
@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_quantises_language_models_on_the_cpu(family, kind, bits, tmp_path):
    # bitsandbytes packs rows by 32 where the processor multiplies bfloat16.
    sizes = {"hidden_size": 128, "intermediate_size": 256} if family == "dream" else {"d_model": 64, "mlp_hidden_size": 128}
    source = write_published(tmp_path, family, **sizes)
    plain = load_family(family, source, dtype="bfloat16")
    if kind == "saved":
        source = tmp_path / "saved"
        plain.save_pretrained(source)
    options = {"load_in_8bit": True} if bits == 8 else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    if bits == 4:
        options["bnb_4bit_compute_dtype"] = torch.bfloat16
    pipeline_wide = PipelineQuantizationConfig(
        quant_backend=f"bitsandbytes_{bits}bit", quant_kwargs=options, components_to_quantize=plain.compiled_component
    )
    configs = [BitsAndBytesConfig(**options), DiffusersBitsAndBytesConfig(**options), pipeline_wide]
    largest = 0.9 if bits == 4 else 0.2  # of weights without any structure
    found = []
    for config in [*configs, "nf4"] if bits == 4 else configs:
        pipe = load_family(family, source, dtype="bfloat16", quantization_config=config)
        assert quantised_layers(network(pipe))
        assert "lm_head" not in quantised_layers(network(pipe))
        assert decode(pipe).shape == decode(plain).shape
        found.append(first_logits(pipe))
        assert 0 < relative_error(found[-1], first_logits(plain)) < largest
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("int7", r"`quantization_config` must be one of int8, fp8, int4, nf4, or a configuration, got 'int7'."),
        (3, r"`quantization_config` must be one of int8, .* by model, or a PipelineQuantizationConfig, got 3."),
        ({"unet": "int8"}, r"`quantization_config` must be for models that are loaded, \w+.*, got 'unet'."),
    ],
)
@formats
@pytest.mark.parametrize("family", ["meissonic", "llada"])
def test_what_is_no_quantization_is_refused(family, kind, value, text, folder):
    with pytest.raises(ValueError, match=f"^{text}$"):
        load_family(family, folder(family, kind), quantization_config=value)


@pytest.mark.skipif(importlib.util.find_spec("torchao") is not None, reason="torchao is installed")
@formats
def test_the_extra_is_named(kind, folder):
    with pytest.raises(ModuleNotFoundError, match=r"The quantization int8 needs torchao: .*\[quantization\]"):
        load(folder("llada", kind), quantization_config="int8")


# Devices


@pytest.mark.parametrize(
    "device_map",
    [pytest.param(name, marks=pytest.mark.slow) for name in ("cpu", torch.device("cpu"), "sequential", "of the network")]
    + ["auto", "balanced"],
)
@formats
@every
def test_device_maps_on_the_cpu(family, kind, device_map, folder):
    plain = load_family(family, folder(family, kind))
    device_map = {plain.compiled_component: "cpu"} if device_map == "of the network" else device_map
    pipe = load_family(family, folder(family, kind), device_map=device_map)
    assert network(pipe).device == torch.device("cpu")
    assert torch.equal(decode(pipe), decode(plain))
    pipe.reset_device_map()
    assert torch.equal(decode(pipe), decode(plain))


@formats
@every
def test_layers_on_disk(family, kind, folder, tmp_path):
    plain = load_family(family, folder(family, kind))
    if kind == "published" and family == "bert":
        pytest.skip("transformers reads a pickle whole")
    parameters = network(plain).named_parameters(remove_duplicate=False)
    whole = sorted({name.rpartition(".")[0] or name for name, _ in parameters})
    layers = {name: "disk" if name.endswith(("q_proj", "wq", "to_q", "query")) else "cpu" for name in whole}
    assert "disk" in layers.values()
    options = {"device_map": {plain.compiled_component: layers}, "offload_folder": str(tmp_path)}
    pipe = load_family(family, folder(family, kind), **options)
    assert any(parameter.is_meta for parameter in network(pipe).parameters())
    assert torch.equal(decode(pipe), decode(plain))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("gpu", r"`device_map` must be a device that this machine has, balanced, auto, .* by model, got 'gpu': .*"),
        ({"unet": "cpu"}, r"`device_map` must be for the models \w+.*, got 'unet'."),
        ({"transformer": 1.5, "model": 1.5}, r"`device_map` must be .*"),
    ],
)
@formats
@pytest.mark.parametrize("family", ["meissonic", "llada"])
def test_what_is_no_device_map_is_refused(family, kind, value, text, folder):
    with pytest.raises(ValueError, match=f"^{text}$"):
        load_family(family, folder(family, kind), device_map=value)


def test_whole_models_are_balanced():
    sizes = {"small": 2, "large": 9, "medium": 6, "huge": 30}
    assert balanced(sizes, {0: 10, 1: 12}) == {"large": 1, "medium": 0, "small": 0, "huge": "cpu"}
    assert balanced(sizes, {}) == dict.fromkeys(sizes, "cpu")


# Attention


@pytest.mark.parametrize("attention", ["eager", pytest.param("sdpa", marks=pytest.mark.slow)])
@formats
@every
def test_attention_is_the_callers_choice(family, kind, attention, folder, tmp_path):
    plain = load_family(family, folder(family, kind))
    stock = {name: model for name, model in plain.components.items() if isinstance(model, PreTrainedModel)}
    if not stock:
        with pytest.raises(ValueError, match="`attn_implementation` is for models of transformers"):
            load_family(family, folder(family, kind), attn_implementation=attention)
        return
    pipe = load_family(family, folder(family, kind), attn_implementation=attention)
    assert {getattr(pipe, name).config._attn_implementation for name in stock} == {attention}
    assert torch.allclose(first_logits(pipe), first_logits(plain), atol=1e-3, rtol=1e-3)


def test_attention_that_cannot_be_had_is_refused(folder):
    with pytest.raises(ValueError, match="must be one of eager, sdpa, flex_attention for InfoGainTextPipeline"):
        load(folder("llada", "published"), attn_implementation="flash_attention_2")
    with pytest.raises(ValueError, match=r"`attn_implementation` must be one of eager, .*, got 'me/kernel'"):
        load(folder("llada", "published"), attn_implementation="me/kernel")


def test_attention_of_a_checkpoint_is_not_taken(folder, tmp_path):
    copy = shutil.copytree(folder("llada", "published"), tmp_path / "llada")
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(
        json.dumps({**settings, "attn_implementation": "me/kernel", "_attn_implementation": "eager"})
    )
    assert load(copy).model.config._attn_implementation == "sdpa"
    assert load(copy, attn_implementation="eager").model.config._attn_implementation == "eager"


# Offloading and casting


@pytest.mark.parametrize("offload_type", ["block_level", pytest.param("leaf_level", marks=pytest.mark.slow)])
@every
def test_groups_of_layers_are_offloaded(family, offload_type, folder):
    if torch.accelerator.current_accelerator() is None and version.parse(DIFFUSERS_VERSION) < version.parse("0.42.0"):
        pytest.skip("this version of diffusers offloads groups to accelerators only")
    pipe = load_family(family, folder(family, "published"))
    expected = decode(pipe)
    blocks = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    pipe.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type=offload_type, **blocks)
    assert any(hasattr(module, "_diffusers_hook") for module in network(pipe).modules())
    assert torch.equal(decode(pipe), expected)


@every
def test_models_and_layers_are_offloaded(family, folder, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    pipe = load_family(family, folder(family, "published"))
    expected = decode(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(decode(pipe), expected)
    pipe.remove_all_hooks()
    # What `enable_sequential_cpu_offload` does, which accelerate cannot do where the CPU also computes.
    for name, model in pipe.components.items():
        if isinstance(model, torch.nn.Module):
            accelerate.disk_offload(model, tmp_path / name, execution_device="cpu")
    assert torch.equal(decode(pipe), expected)
    assert all(parameter.is_meta for parameter in network(pipe).parameters())


@every
def test_weights_wait_in_few_bits(family, folder):
    from diffusers.hooks import apply_layerwise_casting

    pipe = load_family(family, folder(family, "published"))
    expected = first_logits(pipe)
    options: dict[str, Any] = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}
    if isinstance(network(pipe), ModelMixin):
        network(pipe).enable_layerwise_casting(**options)
    else:
        # Heads, which may be tied to embeddings, are kept.
        apply_layerwise_casting(network(pipe), skip_modules_pattern=("norm", "embed", "lm_head", "cls"), **options)
    assert torch.float8_e4m3fn in {parameter.dtype for parameter in network(pipe).parameters()}
    assert relative_error(first_logits(pipe), expected) < 0.25


def test_a_head_with_hooks_is_run_as_a_whole():
    from diffusers.hooks import apply_layerwise_casting

    head, states = torch.nn.Linear(8, 12), torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(token_logits(head, states, (3, 7)), head(states)[:, 3:7], atol=1e-6)
    apply_layerwise_casting(head, torch.float8_e4m3fn, torch.float32, skip_modules_pattern=())
    assert torch.equal(token_logits(head, states, (3, 7)), head(states)[:, 3:7])
    assert head.weight.dtype == torch.float8_e4m3fn
