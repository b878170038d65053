"""TiTok: its published sampler, its line of tokens, its published repositories."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from helpers.checkpoints_titok import (
    CODES,
    TOKENS,
    make_titok_pipeline,
    make_tokenizer,
    titok_config,
    tokenizer_weights,
    transformer_weights,
    write_folder,
    write_titok_repositories,
)
from helpers.sampling import generators
from models.test_titok import generator as golden_generator
from models.test_titok import golden  # noqa: F401

from diffusers_infogain import PRESETS, InfoGainScheduler, InfoGainTiTokPipeline, candidates, load, step
from diffusers_infogain.cli import main
from diffusers_infogain.image_files import read_png_metadata
from diffusers_infogain.models import titok_published


@pytest.fixture
def pipe() -> InfoGainTiTokPipeline:
    pipe = make_titok_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


# The published sampler

RUNS = {
    "bert_linear": ("bert", 9.5, 1.0, {"guidance_scale": 4.5}),
    "uvit_power_cosine": ("uvit", 2.8, 1.0, {"guidance_scale": 5.9, "guidance_schedule": "titok_power_cosine"}),
    "bert_constant": ("bert", 1.0, None, {"guidance_scale": 4.5, "guidance_schedule": "constant"}),
}


@pytest.mark.parametrize("name", RUNS)
def test_every_decision_is_that_of_the_published_sampler_with_the_same_noise(golden, name, monkeypatch):  # noqa: F811
    kind, factor, annealing, guidance = RUNS[name]
    states, token_noise, position_noise = (golden[f"{name}.{what}"] for what in ("states", "token_noise", "position_noise"))
    steps: list[int] = []

    def draw_uniforms(generator, batch_size, num_candidates, length):
        steps.append(len(steps))
        noise = position_noise[steps[-1]]
        return torch.stack([torch.zeros_like(noise), noise], dim=1)[:, None]

    def sample_tokens(logits, uniform, temperature, top_k=None, top_p=None):
        noise = token_noise[steps[-1]][states[steps[-1]] == 32]
        assert len(noise) == len(logits)
        return (logits + temperature * candidates.gumbel(noise)).argmax(-1, keepdim=True)

    monkeypatch.setattr(candidates, "draw_uniforms", draw_uniforms)
    monkeypatch.setattr(step, "sample_tokens", sample_tokens)
    softmax = (1.3, 0.5) if annealing else 1.0
    settings = {**PRESETS["titok_l32"], "randomize_temperature": (factor, 0.0), "softmax_temperature": softmax}
    pipe = InfoGainTiTokPipeline(None, golden_generator(golden, kind), InfoGainScheduler(mask_token_id=32, **settings))
    pipe.set_progress_bar_config(disable=True)
    output = pipe([1, 7, 3], num_inference_steps=5, output_type="latent", generator=generators(0, 1, 2), **guidance)
    assert torch.equal(output.trace.tokens, states[1:])
    assert torch.equal(output.images[:, 0], states[-1])
    assert len(steps) == 5


def test_the_presets_are_the_published_settings():
    published = {name: config["model"]["generator"] for name, config in titok_published.VARIANTS.items()}
    assert set(published) == {"l32", "b64", "s128"}
    for name, generator in published.items():
        assert PRESETS[f"titok_{name}"]["randomize_temperature"] == (generator["randomize_temperature"], 0.0)


def test_both_temperatures_fall_with_the_share_of_the_steps_that_a_step_ends_at():
    scheduler = InfoGainScheduler(mask_token_id=CODES, **PRESETS["titok_l32"])
    scheduler.set_timesteps(8)
    expected = [9.5 * (1 - q) * (0.5 + 0.8 * (1 - q)) for q in ((i + 1) / 8 for i in range(8))]
    assert scheduler.position_temperatures.tolist() == pytest.approx(expected, rel=1e-6)
    assert scheduler.position_temperatures[-1] == 0


# A line of tokens


def test_images_have_the_models_size_and_their_tokens_are_a_line(pipe):
    output = pipe("goldfish", generator=generators(0), output_type="pt")
    assert output.images.shape == (1, 3, 32, 32)
    assert 0 <= output.images.min() < output.images.max() <= 1
    tokens = pipe("goldfish", generator=generators(0), output_type="latent").images
    assert tokens.shape == (1, 1, TOKENS)
    assert ((tokens >= 0) & (tokens < CODES)).all()
    torch.testing.assert_close(output.images, pipe.vqvae.decode(tokens[:, 0]).clamp(0, 1))
    assert pipe.encode_image(pipe(1).images[0]).shape == (1, 1, TOKENS)


def test_image_to_image_keeps_a_share_of_the_tokens(pipe):
    picture = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    tokens = pipe.encode_image(picture)
    output = pipe("goldfish", image=picture, strength=0.25, generator=generators(0), output_type="latent")
    assert int((output.images != tokens).sum()) <= TOKENS // 4
    assert int(output.trace.num_decoded.sum()) == TOKENS // 4
    latents = tokens.clone()
    latents[..., 2:] = CODES
    assert torch.equal(pipe("goldfish", latents=latents, output_type="latent").images[..., :2], tokens[..., :2])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"image": torch.zeros(3, 32, 32), "mask_image": torch.ones(32, 32)},
            "`mask_image` must be None for InfoGainTiTokPipeline, whose tokens have no place in the image, got Tensor of "
            "torch.float32 (32, 32): `image` with `strength` decodes a share of them anew.",
        ),
        ({"image": torch.zeros(3, 32, 32), "outpaint": {"left": 32}}, "`outpaint` must be None for InfoGainTiTokPipeline"),
        ({"height": 64}, "`height` and `width` must be 32, the only size of this model, got 64 and 32."),
        ({"latents": torch.full((1, 2, 4), CODES)}, "`latents` must be a long tensor of token ids of shape (1, 1, 8)"),
        ({"guidance_schedule": "titok"}, "`guidance_schedule` must be one of constant, linear, cosine, titok_linear, "),
        ({"approximate_cache": "context"}, "`approximate_cache` must be None for InfoGainTiTokPipeline"),
        ({"class_labels": "goldfsh"}, "'goldfsh' is not the name of an ImageNet class: did you mean 'goldfish'"),
    ],
)
def test_arguments_that_do_not_fit_are_named(pipe, arguments, text):
    with pytest.raises(ValueError) as error:
        pipe(**{"class_labels": "goldfish", **arguments})
    assert text in str(error.value)


@pytest.mark.parametrize("name", ["default", "maskgit_halton", "paper", "titok_l32", "fast"])
def test_samplers_for_grids_work_on_a_line(pipe, name):
    pipe.scheduler = InfoGainScheduler.from_config(pipe.scheduler.config, **PRESETS[name])
    together = pipe(["goldfish", 207], generator=generators(1, 2), output_type="latent").images
    alone = pipe(207, generator=generators(2), output_type="latent").images
    assert torch.equal(together[1], alone[0])


def test_frames_are_what_the_decoded_tokens_say(pipe):
    trace = pipe("goldfish", num_inference_steps=3, generator=generators(0)).trace
    frames = trace.frames(size=32)
    states = torch.cat([torch.full((1, TOKENS), CODES), trace.tokens[:, 0].long()])
    assert len(frames) == len(states)
    for frame, state in zip(frames, states, strict=True):
        pixels = pipe.vqvae.decode(state.clamp(max=CODES - 1)[None], seen=(state != CODES)[None]).clamp(0, 1)
        assert np.abs(np.asarray(frame) / 255 - pixels[0].permute(1, 2, 0).numpy()).max() <= 0.51 / 255
    assert len({frame.tobytes() for frame in frames}) == len(frames)


def test_hidden_codes_do_not_matter(pipe):
    tokens = torch.arange(TOKENS)[None]
    seen = tokens < 5
    other = torch.where(seen, tokens, 31)
    assert torch.equal(pipe.vqvae.decode(tokens, seen=seen), pipe.vqvae.decode(other, seen=seen))
    assert not torch.allclose(pipe.vqvae.decode(tokens, seen=seen), pipe.vqvae.decode(tokens), atol=1e-4)


def test_defaults_are_saved_with_the_model(pipe, tmp_path):
    assert (pipe.default_num_inference_steps, pipe.default_guidance_schedule) == (8, "titok_linear")
    own = {"default_guidance_scale": 2.0, "default_guidance_schedule": "constant", "default_num_inference_steps": 3}
    InfoGainTiTokPipeline(**pipe.components, **own).save_pretrained(tmp_path)
    again = load(tmp_path)
    assert {name: getattr(again, name) for name in own} == own
    assert len(again(1, output_type="latent").trace.winner) <= 3
    with pytest.raises(ValueError, match="`default_guidance_schedule` must be one of constant"):
        InfoGainTiTokPipeline(**pipe.components, default_guidance_schedule="steep")


def test_a_tokenizer_of_other_codes_is_refused(pipe):
    with pytest.raises(ValueError, match="`vqvae` must have the `num_tokens` 8 of `transformer`, got 4"):
        InfoGainTiTokPipeline(make_tokenizer(num_tokens=4), pipe.transformer, pipe.scheduler)


# The published repositories


def tokens_of(pipe) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe("goldfish", generator=generators(0), num_inference_steps=2, output_type="latent").images


@pytest.mark.parametrize(("uvit", "pickled"), [(False, False), (True, True)])
def test_as_published_and_as_converted_and_as_saved_again(tmp_path, capsys, uvit, pickled):
    generator, tokenizer = write_titok_repositories(tmp_path, uvit, pickled)
    pipe = load(generator, vqvae=tokenizer)
    assert type(pipe) is InfoGainTiTokPipeline
    defaults = pipe.default_guidance_scale, pipe.default_guidance_schedule, pipe.default_num_inference_steps
    assert defaults == ((5.9, "titok_power_cosine", 6) if uvit else (4.5, "titok_linear", 4))
    assert pipe.vqvae.config.decoder_heads == 2
    for name, value in tokenizer_weights().items():
        found = pipe.vqvae.state_dict()
        assert any(torch.equal(value, other) for other in found.values() if other.shape == value.shape), name
    expected = tokens_of(pipe)
    assert main(["convert", str(generator), str(tmp_path / "out"), "--vqvae", str(tokenizer)]) == 0, capsys.readouterr().err
    again = load(tmp_path / "out")
    assert torch.equal(tokens_of(again), expected)
    assert (again.default_guidance_scale, again.default_num_inference_steps) == (defaults[0], defaults[2])
    again.save_pretrained(tmp_path / "saved")
    saved = load(tmp_path / "saved", dtype=torch.bfloat16)
    assert saved.transformer.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in saved.vqvae.parameters()} == {torch.float32}
    assert len(saved("goldfish", num_inference_steps=2).images) == 1


def test_pickles_have_the_published_names_and_no_config(tmp_path, monkeypatch):
    config = titok_config()
    monkeypatch.setitem(titok_published.VARIANTS, "l32", config)
    torch.save(transformer_weights(), tmp_path / "generator_titok_l32.bin")
    torch.save(tokenizer_weights(), tmp_path / "tokenizer_titok_l32.bin")
    expected = tokens_of(load(tmp_path))
    assert torch.equal(tokens_of(load(tmp_path, variant="l32")), expected)
    assert torch.equal(tokens_of(load(tmp_path / "generator_titok_l32.bin")), expected)
    with pytest.raises(ValueError, match=r"`variant` 'b64': .* has no generator_titok_b64.bin, but generator_titok_l32.bin"):
        load(tmp_path, variant="b64")
    with pytest.raises(ValueError, match=r"`variant` must be of a published generator, one of l32, b64, s128, got 'xl'"):
        load(tmp_path, variant="xl")
    with pytest.raises(ValueError, match=r"holds an image tokenizer of TiTok: give the repository of the generator"):
        load(tmp_path / "tokenizer_titok_l32.bin")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"quantize_mode": "vae"}, "config.json: `quantize_mode` must be 'vq', got 'vae': continuous tokens cannot be masked."),
        ({"is_legacy": False}, "`finetune_decoder` must be False where `is_legacy` is, got True: such a model makes no pixels."),
        ({"vit_dec_patch_size": 8}, "`vit_dec_patch_size` must be `vit_enc_patch_size` = 16, got 8."),
        ({"num_latent_tokens": 0}, "`num_latent_tokens` must be an integer >= 1, got 0."),
        (
            {"num_latent_tokens": 9},
            "_positional_embedding must have the shape (9, 64) for this TiTokTokenizer, got (8, 64).",
        ),
    ],
)
def test_other_configurations_are_refused(tmp_path, change, text):
    generator = write_folder(tmp_path / "generator", titok_config(), transformer_weights())
    tokenizer = write_folder(tmp_path / "tokenizer", titok_config(**change), tokenizer_weights())
    with pytest.raises(ValueError) as error:
        load(generator, vqvae=tokenizer)
    assert text in str(error.value)


def test_missing_and_unexpected_tensors_are_named(tmp_path):
    weights = transformer_weights()
    del weights["model.lm_head.bias"]
    generator = write_folder(tmp_path / "generator", titok_config(), weights)
    with pytest.raises(ValueError, match=r"1 tensors of the TiTokBertTransformer are missing: lm_head\.bias"):
        load(generator, vqvae=None)
    more = write_folder(tmp_path / "more", titok_config(), {**transformer_weights(), "model.pooler.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"has 1 keys that a TiTokBertTransformer does not have: model.pooler.weight"):
        load(more, vqvae=None)
    config = titok_config()
    (generator / "config.json").write_text(
        json.dumps({**config, "model": {**config["model"], "generator": {"model_type": "RAR"}}})
    )
    with pytest.raises(ValueError, match="Cannot tell the model family"):
        load(generator)


def test_the_tokenizer_of_a_generator_is_found_by_its_size():
    for name, config in titok_published.VARIANTS.items():
        vq = config["model"]["vq_model"]
        assert titok_published.TOKENIZERS[vq["vit_enc_model_size"], vq["num_latent_tokens"]] == name


def test_generate_takes_classes(tmp_path, capsys):
    generator, tokenizer = write_titok_repositories(tmp_path)
    flags = ["--model", str(generator), "--vqvae", str(tokenizer), "--device", "cpu", "--output", str(tmp_path / "images")]
    assert main(["generate", "goldfish", *flags]) == 0, capsys.readouterr().err
    (image,) = Path(tmp_path / "images").glob("*.png")
    settings = read_png_metadata(image)
    assert settings["guidance_schedule"] == "titok_linear"
