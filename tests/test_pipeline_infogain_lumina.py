"""Lumina-DiMOO: its logits, its layout, its guidance, and its published repository."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import (
    LUMINA_CONFIG,
    LUMINA_TINY,
    make_lumina_pipeline,
    make_lumina_tokenizer,
    make_vqvae,
    write_lumina_repository,
)
from helpers.sampling import generators
from safetensors.torch import load_file

from diffusers_infogain import InfoGainLuminaPipeline, InfoGainScheduler, load
from diffusers_infogain.checkpoints.source import renamed
from diffusers_infogain.cli import main
from diffusers_infogain.loading import image_pipeline_class
from diffusers_infogain.models.llada import KEY_MAPPING, BidirectionalLlama, llama_config

GOLDEN = Path(__file__).parent / "golden"
CODES, MASK, OFFSET, MODEL_MASK, NEWLINE = 32, 32, 50, 47, 46
SYSTEM = [36, 10, 11, 12, 13, 14, 4, 15, 16, 37]  # <system>Generate an image according to the text prompt.</system>
USER, END = 38, 39
PROMPTS = ["a red cat on the mat", "two dogs", "fog"]


@pytest.fixture
def pipe() -> InfoGainLuminaPipeline:
    return make_lumina_pipeline()


# Against the figures of Lumina-DiMOO's own implementation


@pytest.fixture(scope="module")
def golden() -> tuple[dict[str, torch.Tensor], dict]:
    return load_file(GOLDEN / "lumina_tiny.safetensors"), json.loads((GOLDEN / "lumina_tiny.json").read_text())


@pytest.fixture(scope="module")
def golden_pipe(golden) -> InfoGainLuminaPipeline:
    stored, info = golden
    transformer = BidirectionalLlama(llama_config(info["config"])).eval()
    weights = {renamed(key, KEY_MAPPING): value for key, value in stored.items() if key.startswith("model.")}
    transformer.load_state_dict(weights, strict=True)
    vqvae = make_vqvae(codes=CODES, levels=2)
    vqvae.load_state_dict({key[6:]: value for key, value in stored.items() if key.startswith("vqvae.")}, strict=True)
    scheduler = InfoGainScheduler(mask_token_id=MASK)
    return InfoGainLuminaPipeline(vqvae, make_lumina_tokenizer(), transformer, scheduler, **LUMINA_TINY)


@torch.no_grad()
def test_inputs_and_logits_are_those_of_the_public_implementation(golden, golden_pipe):
    stored, info = golden
    (h, w), g = info["grid"], info["guidance_scale"]
    cond, uncond = golden_pipe.encode_prompt([info["prompt"]]), golden_pipe.encode_prompt(["<uncondition>"])
    seen = []
    handle = golden_pipe.transformer.model.register_forward_pre_hook(
        lambda m, a, k: seen.append(k["input_ids"]), with_kwargs=True
    )
    for step in range(info["timesteps"]):
        ids = stored[f"step{step:02}.cond_ids"]
        rows = ids[0, -(h * (w + 1) + 2) : -2].view(h, w + 1)
        assert (rows[:, -1] == NEWLINE).all()
        tokens = torch.where(rows[:, :-1] == MODEL_MASK, MASK, rows[:, :-1] - OFFSET)[None]
        logits = (1 + g) * golden_pipe.predict(tokens, *cond) - g * golden_pipe.predict(tokens, *uncond)
        torch.testing.assert_close(logits, stored[f"step{step:02}.guided_logits"][0], atol=1e-4, rtol=0)
        assert torch.equal(seen[-2], ids)
        assert torch.equal(seen[-1], stored[f"step{step:02}.uncond_ids"])
    handle.remove()
    assert (tokens != MASK).any()
    ids = stored["step00.cond_ids"]
    torch.testing.assert_close(golden_pipe.transformer(ids), stored["step00.cond_logits"], atol=1e-4, rtol=0)


def test_the_call_guides_as_the_public_implementation(golden, golden_pipe):
    """At the first step: every position is masked, and nothing was drawn yet."""
    stored, info = golden
    h, w = info["grid"]
    seen = []
    golden_pipe.scheduler = InfoGainScheduler(mask_token_id=MASK, sampler="confidence", entropy_bound=0)
    golden_pipe.set_progress_bar_config(disable=True)
    golden_pipe(
        info["prompt"],
        height=2 * h,
        width=2 * w,
        num_inference_steps=1,
        output_type="latent",
        callback_on_step_end=lambda pipe, i, t, kwargs: seen.append(kwargs["logits"]) or {},
        callback_on_step_end_tensor_inputs=["logits"],
    )
    torch.testing.assert_close(seen[0], stored["step00.guided_logits"], atol=1e-4, rtol=0)


def test_pixels_are_those_of_the_public_implementation(golden, golden_pipe):
    stored, _ = golden
    golden_pipe.set_progress_bar_config(disable=True)
    image = golden_pipe("fog", latents=stored["codes"][None], output_type="np").images[0]
    difference = (torch.from_numpy(image) * 255).round() - stored["pixels"]
    assert difference.abs().max() <= 1
    assert (stored["pixels"] == 0).any()
    assert (stored["pixels"] == 255).any()


# The layout


def test_the_published_size_has_the_published_tensors():
    sizes = {"d_model": 4096, "n_heads": 32, "n_kv_heads": 32, "n_layers": 32, "mlp_hidden_size": 12288}
    with torch.device("meta"):
        model = BidirectionalLlama(llama_config({**LUMINA_CONFIG, **sizes}))
    assert model.lm_head.weight.shape == model.model.embed_tokens.weight.shape == (126356 + 8192, 4096)


def test_a_prompt_is_laid_out_as_published(pipe):
    ids, mask = pipe.encode_prompt(["two dogs", "a red cat", "<uncondition>"])
    assert ids.tolist() == [
        [0, *SYSTEM, USER, 6, 7, END],
        [*SYSTEM, USER, 0, 1, 2, END],
        [0, 0, *SYSTEM, USER, 40, END],
    ]
    assert (~mask).sum(1).tolist() == [1, 0, 2]
    assert not mask[0, 0]


def record_inputs(pipe: InfoGainLuminaPipeline) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []
    pipe.transformer.model.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"]), with_kwargs=True)
    return seen


def test_every_row_of_the_image_ends_with_a_newline(pipe):
    seen = record_inputs(pipe)
    tokens = torch.tensor([[[0, MASK, 31], [MASK, MASK, 5]]])
    pipe.predict(tokens, *pipe.encode_prompt(["fog"]))
    image = [50, 47, 81, 46, 47, 47, 55, 46]
    assert seen[0].tolist() == [[*SYSTEM, USER, 8, END, 43, 41, *image, 42, 44]]


def test_newlines_never_change_and_are_not_decoded(pipe):
    seen = record_inputs(pipe)
    call = {"num_inference_steps": 4, "height": 6, "width": 10, "output_type": "latent"}
    tokens = pipe(PROMPTS[:2], generator=generators(0, 1), **call).images
    assert tokens.shape == (2, 3, 5)
    assert (tokens < CODES).all()
    for ids in seen:
        rows = ids[:, -(3 * 6 + 2) : -2].view(-1, 3, 6)
        assert (rows[:, :, -1] == NEWLINE).all()
        assert ((rows[:, :, :-1] == MODEL_MASK) | (rows[:, :, :-1] >= OFFSET)).all()
        assert (ids[:, -2:] == torch.tensor([42, 44])).all()


# Decoding


def test_pixels_are_made_in_single_precision():
    """As the public implementation, which keeps this model in float32."""
    half = make_lumina_pipeline().to(torch.bfloat16)
    decoded = []
    half.vqvae.decoder.register_forward_hook(lambda module, args, output: decoded.append(output.dtype))
    half("a cat", generator=generators(0), num_inference_steps=2, output_type="pt")
    assert decoded == [torch.float32]


def test_without_a_negative_prompt_the_unconditional_one_stands(pipe):
    call = {"num_inference_steps": 3, "output_type": "latent"}
    expected = pipe("two dogs", generator=generators(0), negative_prompt="<uncondition>", **call).images
    for negative_prompt in (None, "", [""]):
        assert torch.equal(pipe("two dogs", generator=generators(0), negative_prompt=negative_prompt, **call).images, expected)


# Errors


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"height": 32, "width": 16}, "need 128 image tokens, which make a sequence of 162 with the prompt; the model takes 100"),
        ({"prompt": "cat " * 65}, "need 16 image tokens, which make a sequence of 101 with the prompt; the model takes 100"),
        ({"negative_prompt": "mud " * 65}, "which make a sequence of 101 with the prompt; the model takes 100"),
    ],
)
def test_sequences_that_are_too_long_are_refused(pipe, arguments, text):
    with pytest.raises(ValueError) as error:
        pipe(**{"prompt": "a cat", **arguments})
    assert text in str(error.value)


def test_a_long_prompt_is_not_cut(pipe):
    seen = record_inputs(pipe)
    pipe("cat " * 64, num_inference_steps=1, guidance_scale=0, output_type="latent")
    assert seen[0].shape == (1, 100)
    assert (seen[0] == 2).sum() == 64


def test_a_vocabulary_that_is_too_small_is_refused(pipe):
    parts = (pipe.vqvae, pipe.tokenizer, pipe.transformer, pipe.scheduler)
    with pytest.raises(
        ValueError, match="`image_token_offset` 126356 and the 32 codes of `vqvae` do not fit into the vocabulary of 82 tokens"
    ):
        InfoGainLuminaPipeline(*parts)


# The published repository


@pytest.fixture(scope="module")
def lumina(tmp_path_factory) -> Path:
    return write_lumina_repository(tmp_path_factory.mktemp("published") / "Lumina-DiMOO")


def tokens_of(pipe: InfoGainLuminaPipeline) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe("a red cat", generator=generators(0), num_inference_steps=2, height=32, width=48, output_type="latent").images


def test_as_published_and_as_converted_and_as_saved_again(lumina, tmp_path):
    assert image_pipeline_class(lumina) is InfoGainLuminaPipeline
    pipe = load(lumina)
    assert type(pipe) is InfoGainLuminaPipeline
    assert pipe.scheduler.config.mask_token_id == 8192
    assert (pipe.vae_scale_factor, pipe.config.sample_size, pipe.config.max_sequence_length) == (16, 64, 5120)
    expected = tokens_of(pipe)
    assert expected.shape == (1, 2, 3)
    assert main(["convert", str(lumina), str(tmp_path / "converted"), "--max-shard-size", "0.005"]) == 0
    assert not [
        path for path in (tmp_path / "converted").rglob("*") if path.suffix not in ("", ".json", ".safetensors", ".jinja", ".md")
    ]
    again = InfoGainLuminaPipeline.from_pretrained(tmp_path / "converted")
    assert torch.equal(tokens_of(again), expected)
    again.save_pretrained(tmp_path / "saved")
    assert image_pipeline_class(tmp_path / "saved") is InfoGainLuminaPipeline
    assert torch.equal(tokens_of(load(tmp_path / "saved")), expected)


def test_the_published_layout_has_the_published_ids(lumina):
    pipe = InfoGainLuminaPipeline.from_pretrained(lumina, dtype=torch.bfloat16)
    assert pipe.transformer.dtype == torch.bfloat16
    ids, _ = pipe.encode_prompt(["fog", "<uncondition>"])
    assert ids[:, -3:].tolist() == [[126342, 8, 126343], [126342, 126351, 126343]]
    seen = record_inputs(pipe)
    pipe.predict(torch.tensor([[[0, 8192], [8191, 8192]]]), ids[:1], torch.ones_like(ids[:1], dtype=torch.bool))
    image = [126356, 126336, 126084, 134547, 126336, 126084]
    assert seen[0][0, len(ids[0]) :].tolist() == [126354, 126349, *image, 126350, 126355]


def test_the_default_size_fits_with_a_long_prompt(lumina):
    """1024 x 1024 pixels are more tokens than the 4096 positions that the configuration speaks of."""
    pipe = InfoGainLuminaPipeline.from_pretrained(lumina)
    latents = torch.zeros((1, 64, 64), dtype=torch.long)
    latents[0, 63, 60:] = 8192
    pipe.set_progress_bar_config(disable=True)
    seen = record_inputs(pipe)
    call = {"latents": latents, "num_inference_steps": 1, "guidance_scale": 0, "output_type": "latent"}
    assert pipe("cat " * 900, **call).images.shape == (1, 64, 64)
    assert seen[0].shape == (1, 12 + 900 + 64 * 65 + 4)
    with pytest.raises(
        ValueError, match="need 4096 image tokens, which make a sequence of 5121 with the prompt; the model takes 5120"
    ):
        pipe("cat " * 945, **call)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model_type": "mmada"}, "config.json: `model_type` must be 'llada', got 'mmada'"),
        ({"weight_tying": True}, "config.json: `weight_tying` must be False, got True"),
        ({"vocab_size": 134000, "embedding_size": 134000}, "model.transformer.*must have the shape"),
    ],
)
def test_configurations_that_do_not_fit_are_named(lumina, tmp_path, change, text):
    folder = tmp_path / "lumina"
    shutil.copytree(lumina, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=text):
        load(folder)


def test_a_language_model_without_an_image_tokenizer_is_refused(lumina, tmp_path):
    folder = tmp_path / "lumina"
    shutil.copytree(lumina, folder)
    shutil.rmtree(folder / "vqvae")
    with pytest.raises(ValueError, match=r"vqvae.config.json is missing"):
        load(folder)
    (folder / "model_index.json").unlink()
    with pytest.raises(ValueError, match="is a text model: use it with `diffusers-infogain text` or `InfoGainTextPipeline`"):
        image_pipeline_class(folder)
