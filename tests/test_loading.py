"""Loading, converting, saving; half precision, offloading, compilation and LoRA."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AmusedPipeline, AmusedScheduler, DDIMScheduler, DiffusionPipeline, UVit2DModel
from helpers.amused import CODEBOOK_SIZE, GRID, make_components
from helpers.sampling import frequencies_file, generators

import diffusers_infogain
from diffusers_infogain import InfoGainPipeline, InfoGainScheduler
from diffusers_infogain.rules import SAMPLERS

MASK = CODEBOOK_SIZE + 1
MODELS = ("vqvae", "text_encoder", "transformer")
SETTINGS = {
    "num_candidates": 5,
    "position_temperature": (1.5, 0.25),
    "gain_reduction": "mean",
    "certainty": "margin",
    "token_temperature": 0.75,
    "confidence_threshold": 0.9,
    "masking_schedule": "linear",
}


def tokens_of(pipe: DiffusionPipeline, **kwargs) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 5, "generator": generators(0), "output_type": "latent"}
    return pipe("dogs", **(arguments | kwargs)).images


def same_weights(pipe: DiffusionPipeline, other: DiffusionPipeline) -> bool:
    pairs = ((getattr(pipe, name).state_dict(), getattr(other, name).state_dict()) for name in MODELS)
    return all(one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one) for one, two in pairs)


def run_python(code: str, folder: Path, *arguments: str, path: str = "") -> dict:
    """Runs the code in a new process with its own caches; it prints its result as JSON in the last line."""
    environment = {
        **os.environ,
        "HF_HOME": str(folder / "hf_home"),
        "HF_MODULES_CACHE": str(folder / "hf_modules"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": path,
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# Loading and converting


def test_a_stock_folder_loads_and_its_scheduler_is_converted(stock_repository):
    pipe = InfoGainPipeline.from_pretrained(stock_repository)
    assert type(pipe) is InfoGainPipeline
    assert pipe.scheduler.config.mask_token_id == MASK
    for name, value in InfoGainScheduler(mask_token_id=MASK).config.items():
        assert name.startswith("_") or pipe.scheduler.config[name] == value
    assert same_weights(pipe, AmusedPipeline.from_pretrained(stock_repository))
    assert (tokens_of(pipe) < CODEBOOK_SIZE).all()


def test_conversion_keeps_the_masking_schedule(components):
    components["scheduler"] = AmusedScheduler(mask_token_id=MASK, masking_schedule="linear")
    assert InfoGainPipeline(**components).scheduler.config.masking_schedule == "linear"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_components_of_a_stock_pipeline_are_shared(components, dtype):
    stock = AmusedPipeline(**components).to(dtype)
    pipe = InfoGainPipeline(**stock.components)
    for name in MODELS:
        assert getattr(pipe, name) is getattr(stock, name)
        assert getattr(pipe, name).dtype == dtype
    assert isinstance(stock.scheduler, AmusedScheduler)


def test_from_pipe_works_in_both_directions(components):
    stock = AmusedPipeline(**components).to(torch.bfloat16)
    pipe = InfoGainPipeline.from_pipe(stock, dtype=torch.bfloat16)
    back = AmusedPipeline.from_pipe(pipe, dtype=torch.bfloat16)
    assert type(pipe) is InfoGainPipeline
    assert isinstance(pipe.scheduler, InfoGainScheduler)
    assert back.scheduler is pipe.scheduler
    for name in MODELS:
        assert getattr(pipe, name) is getattr(stock, name) is getattr(back, name)
        assert getattr(pipe, name).dtype == torch.bfloat16


def test_a_scheduler_can_be_given_while_loading(stock_repository):
    scheduler = InfoGainScheduler(mask_token_id=MASK, sampler="margin")
    pipe = InfoGainPipeline.from_pretrained(stock_repository, scheduler=scheduler)
    assert pipe.scheduler is scheduler


def test_the_scheduler_loads_from_a_stock_folder(stock_repository):
    scheduler = InfoGainScheduler.from_pretrained(stock_repository, subfolder="scheduler", num_candidates=3)
    assert scheduler.config.mask_token_id == MASK
    assert scheduler.config.num_candidates == 3


@pytest.mark.parametrize("sampler", [name for name, sampler in SAMPLERS.items() if not sampler.looks_ahead])
def test_greedy_samplers_run_in_the_stock_pipeline(components, sampler):
    stock = AmusedPipeline(**components)
    settings = {"sampler": sampler, "pc_frequencies": frequencies_file()}
    stock.scheduler = InfoGainScheduler.from_config(stock.scheduler.config, **settings)
    tokens = tokens_of(stock, generator=torch.Generator().manual_seed(0), width=12)
    assert tokens.shape == (1, GRID, 6)
    assert (tokens < CODEBOOK_SIZE).all()


@pytest.mark.parametrize("sampler", [name for name, sampler in SAMPLERS.items() if sampler.looks_ahead])
def test_lookahead_samplers_say_what_to_use_instead_of_the_stock_pipeline(components, sampler):
    stock = AmusedPipeline(**components)
    stock.scheduler = InfoGainScheduler.from_config(stock.scheduler.config, sampler=sampler)
    with pytest.raises(ValueError, match=r"cannot look ahead.*use `InfoGainPipeline`") as error:
        tokens_of(stock, generator=None)
    assert str(error.value).count(". ") == 0  # one sentence


def test_other_schedulers_are_refused(components, pipe):
    text = "`scheduler` must be an InfoGainScheduler or an AmusedScheduler, got DDIMScheduler"
    with pytest.raises(ValueError, match=text):
        InfoGainPipeline(**(components | {"scheduler": DDIMScheduler()}))
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match=text):
        pipe("a cat")


@pytest.mark.parametrize("missing", ["transformer/diffusion_pytorch_model.safetensors", "model_index.json", "vqvae/config.json"])
def test_an_incomplete_folder_is_named_with_what_it_lacks(stock_repository, tmp_path, missing):
    folder = shutil.copytree(stock_repository, tmp_path / "model")
    (folder / missing).unlink()
    with pytest.raises(OSError, match=Path(missing).stem) as error:
        InfoGainPipeline.from_pretrained(folder)
    assert str((folder / missing).parent) in str(error.value)


# custom_pipeline


def test_custom_pipeline_needs_consent(stock_repository):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(stock_repository, custom_pipeline=diffusers_infogain.CUSTOM_PIPELINE)


def test_custom_pipeline_loads_the_installed_class(stock_repository, tmp_path):
    code = """
import json, sys, torch, diffusers_infogain
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(
    sys.argv[1], custom_pipeline=diffusers_infogain.CUSTOM_PIPELINE, trust_remote_code=True
)
generator = torch.Generator().manual_seed(0)
tokens = pipe("dogs", num_inference_steps=5, generator=[generator], output_type="latent").images.tolist()
print(json.dumps({"installed": type(pipe) is diffusers_infogain.InfoGainPipeline, "tokens": tokens}))
"""
    root = str(Path(diffusers_infogain.__file__).parents[1])
    result = run_python(code, tmp_path, stock_repository, path=root)
    assert result["installed"]
    assert result["tokens"] == tokens_of(InfoGainPipeline.from_pretrained(stock_repository)).tolist()


# Saving


@pytest.fixture
def configured(components) -> InfoGainPipeline:
    components["scheduler"] = InfoGainScheduler(mask_token_id=MASK, **SETTINGS)
    return InfoGainPipeline(**components)


def test_settings_and_images_survive_a_round_trip(configured, tmp_path):
    configured.save_pretrained(tmp_path / "one")
    loaded = InfoGainPipeline.from_pretrained(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two")
    twice = InfoGainPipeline.from_pretrained(tmp_path / "two")
    expected = tokens_of(configured)
    for pipe in (loaded, twice):
        for name, value in SETTINGS.items():
            saved = pipe.scheduler.config[name]
            assert (tuple(saved) if isinstance(saved, list) else saved) == value
        assert same_weights(pipe, configured)
        assert torch.equal(tokens_of(pipe), expected)
    assert not torch.equal(tokens_of(InfoGainPipeline(**make_components())), expected)  # the settings matter


def test_saved_folders_name_only_classes_that_everybody_has(configured, tmp_path):
    configured.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index.pop("_class_name") == "AmusedPipeline"
    assert index.pop("scheduler") == ["diffusers", "AmusedScheduler"]
    assert {name: value[0] for name, value in index.items() if isinstance(value, list)} == {
        "vqvae": "diffusers",
        "tokenizer": "transformers",
        "text_encoder": "transformers",
        "transformer": "diffusers",
    }
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".ckpt", ".py")]
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3


def test_saved_folders_load_where_this_package_is_not_imported(configured, tmp_path):
    configured.save_pretrained(tmp_path / "model")
    code = """
import json, sys, torch
from diffusers import AmusedPipeline, DiffusionPipeline
images = []
for cls in (AmusedPipeline, DiffusionPipeline):
    pipe = cls.from_pretrained(sys.argv[1])
    image = pipe("dogs", num_inference_steps=3, output_type="np").images
    images.append([type(pipe).__name__, type(pipe.scheduler).__name__, image.shape, float(image.std()) > 0])
print(json.dumps({"images": images, "imported": "diffusers_infogain" in sys.modules}))
"""
    result = run_python(code, tmp_path, str(tmp_path / "model"))
    assert result == {"images": [["AmusedPipeline", "AmusedScheduler", [1, 8, 8, 3], True]] * 2, "imported": False}


def test_half_precision_variants_are_saved_and_loaded(pipe, tmp_path):
    pipe.to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "transformer" / "diffusion_pytorch_model.fp16.safetensors").exists()
    loaded = InfoGainPipeline.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16)
    assert {getattr(loaded, name).dtype for name in MODELS} == {torch.float16}
    assert same_weights(loaded, pipe)


# Other layouts of the models


def test_models_that_halve_the_grid_need_sizes_that_can_be_halved(components):
    config = {key: value for key, value in components["transformer"].config.items() if not key.startswith("_")}
    torch.manual_seed(0)
    components["transformer"] = UVit2DModel(**(config | {"downsample": True, "upsample": True})).eval()
    pipe = InfoGainPipeline(**components)
    assert tokens_of(pipe).shape == (1, GRID, GRID)
    assert tokens_of(pipe, height=12, width=4).shape == (1, 6, 2)
    with pytest.raises(ValueError, match="positive multiples of 4, got 8 and 6"):
        pipe("dogs", width=6)


def test_a_codebook_of_another_width_than_the_latents():
    components = make_components(vq_embed_dim=6)
    assert components["vqvae"].config.latent_channels == 4
    pipe = InfoGainPipeline(**components)
    images = tokens_of(pipe, output_type="pt", width=12)
    with torch.no_grad():
        vectors = pipe.vqvae.quantize.embedding(tokens_of(pipe, width=12)).permute(0, 3, 1, 2)
        expected = pipe.vqvae.decoder(pipe.vqvae.post_quant_conv(vectors)).clamp(0, 1)
    torch.testing.assert_close(images, expected)


# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("force_upcast", [True, False])
def test_the_vq_model_decodes_in_the_precision_that_it_asks_for(pipe, dtype, force_upcast):
    pipe.vqvae.register_to_config(force_upcast=force_upcast)
    pipe.to(dtype)
    seen = []
    pipe.vqvae.decoder.register_forward_pre_hook(lambda module, args: seen.append((args[0].dtype, module.conv_in.weight.dtype)))
    images = tokens_of(pipe, output_type="pt", width=12)
    decoded_in = torch.float32 if force_upcast else dtype
    assert seen == [(decoded_in, decoded_in)]
    assert images.isfinite().all()
    assert 0 <= images.min() < images.max() <= 1
    assert {getattr(pipe, name).dtype for name in MODELS} == {dtype}


def test_the_vq_model_returns_to_half_precision_after_a_failure(pipe):
    def fail(module, args):
        raise RuntimeError("no memory")

    pipe.to(torch.bfloat16).vqvae.decoder.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no memory"):
        pipe("dogs", num_inference_steps=2)
    assert {parameter.dtype for parameter in pipe.vqvae.parameters()} == {torch.bfloat16}


# Offloading, compilation, LoRA


@pytest.mark.parametrize("output_type", ["latent", "np"])
def test_offloading_gives_the_same_image_and_frees_the_models(pipe, output_type):
    expected = tokens_of(pipe, output_type=output_type)
    pipe.enable_model_cpu_offload(device="cpu")
    hooks = list(pipe._all_hooks)
    assert len(hooks) == 3
    assert (tokens_of(pipe, output_type=output_type) == expected).all()
    assert not set(map(id, pipe._all_hooks)) & set(map(id, hooks))  # freeing puts new hooks in their place
    assert (tokens_of(pipe, output_type=output_type) == expected).all()


def test_a_compiled_transformer_gives_the_same_tokens_and_is_saved_as_itself(pipe, tmp_path):
    expected = tokens_of(pipe)
    pipe.transformer = torch.compile(pipe.transformer, backend="aot_eager", fullgraph=True)
    assert torch.equal(tokens_of(pipe), expected)
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["transformer"] == ["diffusers", "UVit2DModel"]
    assert torch.equal(tokens_of(InfoGainPipeline.from_pretrained(tmp_path)), expected)


def first_logits(pipe: InfoGainPipeline) -> torch.Tensor:
    seen = []
    tokens_of(
        pipe,
        callback_on_step_end=lambda pipe, index, timestep, kwargs: seen.append(kwargs["logits"]),
        callback_on_step_end_tensor_inputs=["logits"],
    )
    return seen[0]


def test_lora_weights_are_loaded_and_unloaded(pipe, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    trained = InfoGainPipeline(**make_components())
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    trained.transformer.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False))
    layers = peft.get_peft_model_state_dict(trained.transformer)
    InfoGainPipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]

    before = first_logits(pipe)
    pipe.load_lora_weights(tmp_path, adapter_name="style")
    assert pipe.get_active_adapters() == ["style"]
    torch.testing.assert_close(first_logits(pipe), first_logits(trained))
    assert not torch.allclose(first_logits(pipe), before, atol=1e-2)
    pipe.unload_lora_weights()
    assert torch.equal(first_logits(pipe), before)
