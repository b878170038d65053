"""Components that are None, saved, loaded, moved, cast, wrapped, offloaded, shared."""

from __future__ import annotations

import copy
import pickle

import accelerate
import pytest
import torch
from diffusers import AmusedPipeline, AmusedScheduler
from helpers.dialect import CLASS_FAMILIES, CLIP_FAMILIES, PROMPT, call, family_of, make_pipe

from diffusers_infogain import InfoGainPipeline, InfoGainScheduler, InfoGainTextPipeline
from diffusers_infogain.components import in_float32
from diffusers_infogain.evaluation.identity import pipeline_digest
from diffusers_infogain.image_pipeline_magvit import MagvitImagePipeline

pytestmark = pytest.mark.filterwarnings("ignore")


def without(pipe, *names):
    """A pipeline of the same components but for some, which are None."""
    return type(pipe)(**{**pipe.components, **dict.fromkeys(names)}, **pipe.parameters)


# Components that are None


def test_a_call_names_the_component_that_it_lacks(pipe):
    for name in pipe.components:
        lacking = without(pipe, name)
        output = "pt" if name == "vqvae" else "latent"
        with pytest.raises(ValueError, match=f"^The pipeline's `{name}` must not be None for this call.*set `pipe.{name}`.$"):
            call(lacking, output_type=output)
        setattr(lacking, name, getattr(pipe, name))
        assert torch.equal(call(lacking, output_type=output).images, call(pipe, output_type=output).images)


def test_tokens_need_no_vqvae(pipe, tmp_path):
    expected = call(pipe).images
    pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path, vqvae=None)
    assert loaded.vqvae is None
    assert loaded.vae_scale_factor == pipe.vae_scale_factor == (32 if family_of(pipe) == "titok" else 2)
    assert torch.equal(call(loaded).images, expected)
    pipe.vqvae = None
    assert torch.equal(call(pipe).images, expected)


def test_prompts_are_encoded_alone(family, tmp_path):
    if family in CLASS_FAMILIES:
        pytest.skip("has classes in place of prompts")
    pipe = make_pipe(family)
    pipe.save_pretrained(tmp_path)
    rest = [name for name in pipe.components if "text" not in name and "tokenizer" not in name]
    alone = type(pipe).from_pretrained(tmp_path, **dict.fromkeys(rest))
    assert all(getattr(alone, name) is None for name in rest)
    encoded, expected = alone.encode_prompt([PROMPT[family]]), pipe.encode_prompt([PROMPT[family]])
    assert all(torch.equal(one, other) for one, other in zip(encoded, expected, strict=True))
    if family in CLIP_FAMILIES:
        names = ("prompt_embeds", "encoder_hidden_states", "negative_prompt_embeds", "negative_encoder_hidden_states")
        blind = type(pipe).from_pretrained(tmp_path, text_encoder=None, tokenizer=None)
        images = call(blind, **dict(zip(names, encoded, strict=True))).images
        assert torch.equal(images, call(pipe).images)


def test_nothing_at_all_is_a_pipeline_too(pipe, tmp_path):
    empty = without(pipe, *pipe.components)
    assert empty.components == dict.fromkeys(pipe.components)
    assert (empty.device, empty.dtype) == (torch.device("cpu"), torch.float32)
    empty.to("cpu", torch.bfloat16)
    empty.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path)
    assert again.components == empty.components
    with pytest.raises(ValueError, match="pipeline's `transformer` must not be None"):
        call(again)


def test_saved_without_some(pipe, tmp_path):
    for name in pipe.components:
        folder = tmp_path / name
        without(pipe, name).save_pretrained(folder)
        assert not (folder / name).exists()
        again = type(pipe).from_pretrained(folder)
        assert getattr(again, name) is None
        again = type(pipe).from_pretrained(folder, **{name: getattr(pipe, name)})
        assert torch.equal(call(again).images, call(pipe).images)


def test_text_without_some(tmp_path):
    pipe = InfoGainTextPipeline.from_pretrained("demo-text")
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path)
    words = InfoGainTextPipeline.from_pretrained(tmp_path, model=None, scheduler=None)
    assert words.encode("S12") == pipe.encode("S12")
    assert words.family == pipe.family
    for name in pipe.components:
        lacking = InfoGainTextPipeline(**{**pipe.components, name: None})
        with pytest.raises(ValueError, match=f"^The pipeline's `{name}` must not be None for this call: set `pipe.{name}`"):
            lacking("S12", max_new_tokens=2)
        setattr(lacking, name, getattr(pipe, name))
        lacking.set_progress_bar_config(disable=True)
        seed = torch.Generator().manual_seed(0)
        again = lacking("S12", max_new_tokens=2, generator=seed).texts
        assert again == pipe("S12", max_new_tokens=2, generator=seed.manual_seed(0)).texts


# Saving, sharing, copying


def test_what_is_saved_is_loaded_without_a_warning(pipe, tmp_path, caplog):
    pipe.scheduler = InfoGainScheduler.from_config(pipe.scheduler.config, num_candidates=3, token_temperature=0.5)
    pipe.save_pretrained(tmp_path)
    caplog.clear()
    again = type(pipe).from_pretrained(tmp_path)
    assert not [record.getMessage() for record in caplog.records]
    assert again.scheduler.config.num_candidates == 3
    assert torch.equal(call(again).images, call(pipe).images)


def test_from_pipe_shares_the_components(pipe):
    again = type(pipe).from_pipe(pipe, dtype=pipe.dtype)
    assert all(getattr(again, name) is value for name, value in pipe.components.items())
    assert torch.equal(call(again).images, call(pipe).images)
    blind = type(pipe).from_pipe(pipe, vqvae=None)
    assert blind.vqvae is None
    assert pipe.vqvae is not None


def test_a_call_leaves_the_tokenizer_as_it_was(pipe, tmp_path):
    """So a pipeline that was called is the same one for records, and saves the same files, also if those say how to pad."""
    if "tokenizer" in pipe.components:
        pipe.tokenizer.backend_tokenizer.enable_padding(length=7, pad_id=1, pad_token="a")
        pipe.tokenizer.backend_tokenizer.enable_truncation(7)
    pipe.save_pretrained(tmp_path / "before")
    before = pipeline_digest(pipe)
    call(pipe)
    pipe.save_pretrained(tmp_path / "after")
    assert pipeline_digest(pipe) == before
    files = [path.relative_to(tmp_path / "before") for path in (tmp_path / "before").glob("tokenizer/*.json")]
    assert bool(files) == ("tokenizer" in pipe.components)
    for file in files:
        assert (tmp_path / "before" / file).read_bytes() == (tmp_path / "after" / file).read_bytes(), file


@pytest.mark.parametrize("copies", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_copies_of_a_pipeline_are_pipelines(pipe, copies):
    again = copies(pipe)  # before a call: transformers' text models cannot be pickled afterwards
    expected = call(pipe).images
    assert again.transformer is not pipe.transformer
    assert torch.equal(call(again).images, expected)


def test_stock_pipelines_and_ours_exchange_components():
    pipe = make_pipe("amused")
    stock = AmusedPipeline(**pipe.components)
    again = InfoGainPipeline.from_pipe(stock)
    assert torch.equal(call(again).images, call(pipe).images)
    assert isinstance(AmusedPipeline.from_pipe(pipe).scheduler, InfoGainScheduler)


def test_an_amused_scheduler_set_later_is_converted(pipe):
    mask = pipe.scheduler.config.mask_token_id
    pipe.scheduler = AmusedScheduler(mask_token_id=mask, masking_schedule="linear")
    images = call(pipe).images
    pipe.scheduler = InfoGainScheduler(mask_token_id=mask, masking_schedule="linear")
    assert torch.equal(images, call(pipe).images)


# Placement and precision


def test_moved_and_cast(pipe):
    assert pipe.to("cpu") is pipe
    pipe.to(torch.bfloat16)
    assert pipe.transformer.dtype == torch.bfloat16
    images = call(pipe, output_type="pt").images
    assert images.dtype == torch.float32
    assert images.isfinite().all()
    pipe.to("meta")
    assert pipe.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_saved_and_loaded(pipe, dtype, tmp_path):
    pipe.to(dtype)
    expected = call(pipe).images
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path, dtype=dtype)
    assert again.transformer.dtype == dtype
    for name in ("transformer", "vqvae"):
        saved, loaded = getattr(pipe, name).state_dict(), getattr(again, name).state_dict()
        assert all(torch.equal(saved[key].float(), loaded[key].float()) for key in saved)
    assert call(again).images.shape == expected.shape


def test_the_vqvae_in_half_precision_is_not_touched(pipe):
    expected = call(pipe, output_type="pt").images
    pipe.vqvae.to(torch.bfloat16)
    weights = {name: weight.clone() for name, weight in pipe.vqvae.state_dict().items()}
    seen = []
    pipe.vqvae.decoder.register_forward_pre_hook(lambda module, args: seen.append((args[0].dtype, pipe.vqvae.dtype)))
    images = call(pipe, output_type="pt").images
    assert seen == [(torch.float32, torch.bfloat16)]
    assert all(torch.equal(weights[name], weight) for name, weight in pipe.vqvae.state_dict().items())
    assert images.dtype == torch.float32
    assert torch.allclose(images, expected, atol=0.05)


# Wrapped and offloaded


def test_compiled_vqvae_in_half_precision(pipe):
    expected = call(pipe, output_type="pt").images
    pipe.vqvae = torch.compile(pipe.vqvae.to(torch.bfloat16), backend="eager")
    assert torch.allclose(call(pipe, output_type="pt").images, expected, atol=0.05)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("meissonic", "mmada", "showo", "lumina")]  # compile for seconds


@pytest.mark.parametrize("family", ["amused", "maskgit", *SLOW])
def test_compiled_transformers(pipe):
    expected = call(pipe).images
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    assert torch.equal(call(pipe).images, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offloaded_models(pipe, dtype):
    pipe.to(dtype)
    expected = call(pipe, output_type="pt").images
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert torch.equal(call(pipe, output_type="pt").images, expected)
    pipe.remove_all_hooks()
    pipe.reset_device_map()
    assert torch.equal(call(pipe, output_type="pt").images, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_are_offloaded_layer_by_layer(pipe, dtype, tmp_path):
    """To the disk: what `enable_sequential_cpu_offload` does, which accelerate cannot do where the CPU also computes."""
    pipe.to(dtype)
    expected = call(pipe, output_type="pt").images
    for name, model in pipe.components.items():
        if isinstance(model, torch.nn.Module):
            accelerate.disk_offload(model, tmp_path / name, execution_device="cpu")
    for _ in range(2):
        assert torch.equal(call(pipe, output_type="pt").images, expected)
    assert all(parameter.is_meta for parameter in pipe.vqvae.parameters())


@pytest.mark.parametrize("group", [{"offload_type": "block_level", "num_blocks_per_group": 1}, {"offload_type": "leaf_level"}])
def test_group_offloaded_transformers(pipe, group):
    if not hasattr(pipe.transformer, "enable_group_offload"):
        pytest.skip("diffusers offloads groups of its own models only")
    expected = call(pipe).images
    pipe.transformer.enable_group_offload(torch.device("cpu"), torch.device("cpu"), **group)
    assert torch.equal(call(pipe).images, expected)


def test_layerwise_cast_models(pipe):
    for model in (pipe.transformer, pipe.vqvae):
        if hasattr(model, "enable_layerwise_casting"):
            model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    for _ in range(2):
        images = call(pipe, output_type="pt").images
        assert images.isfinite().all()
    if hasattr(pipe.transformer, "enable_layerwise_casting"):
        assert torch.float8_e4m3fn in {parameter.dtype for parameter in pipe.transformer.parameters()}


def test_a_float32_twin_is_made_where_it_is_needed():
    model = make_pipe("amused").vqvae
    assert in_float32(model) is model
    model.half()
    assert in_float32(model, needed=False) is model
    twin = in_float32(model)
    assert twin.dtype == torch.float32
    assert all(torch.equal(one, other.float()) for one, other in zip(twin.parameters(), model.parameters(), strict=True))


# What interfaces call


def test_names_that_interfaces_call(pipe):
    expected = call(pipe).images
    pipe.set_progress_bar_config(desc="tokens", leave=False)
    pipe.enable_attention_slicing()
    pipe.disable_attention_slicing()
    pipe.disable_xformers_memory_efficient_attention()
    pipe.maybe_free_model_hooks()
    assert torch.equal(call(pipe).images, expected)


# Variants and dtypes of saved folders


def test_variants(pipe, tmp_path):
    pipe.save_pretrained(tmp_path, variant="fp16")
    expected = call(pipe).images
    assert torch.equal(call(type(pipe).from_pretrained(tmp_path, variant="fp16")).images, expected)
    for name, model in pipe.components.items():
        if isinstance(model, torch.nn.Module):
            assert any(".fp16." in path.name for path in (tmp_path / name).iterdir())


def test_a_variant_that_is_not_there(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="fp16"):
        type(pipe).from_pretrained(tmp_path, variant="fp16")


def test_a_dtype_for_every_component(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    dtypes = {"transformer": torch.bfloat16, "default": torch.float16}
    again = type(pipe).from_pretrained(tmp_path, dtype=dtypes)
    kept = isinstance(pipe, MagvitImagePipeline) or family_of(pipe) == "titok"  # whose image tokenizer stays in float32
    expected = {"transformer": torch.bfloat16, "vqvae": torch.float32 if kept else torch.float16}
    assert {name: getattr(again, name).dtype for name in expected} == expected
    call(again, output_type="pt")


def test_a_device_map(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path, device_map="cpu")
    assert torch.equal(call(again).images, call(pipe).images)
    again.reset_device_map()
    assert torch.equal(call(again).images, call(pipe).images)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_another_default_dtype_changes_nothing(family, default):
    expected = call(make_pipe(family), output_type="pt").images
    pipe = make_pipe(family)
    torch.set_default_dtype(default)
    try:
        images = call(type(pipe)(**pipe.components, **pipe.parameters), output_type="pt").images
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(images, expected)
