"""MaskGen: its published sampler, the prompt that its image tokenizer reads, its published repositories."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.checkpoints_titok import CODES, TOKENS, make_maskgen_pipeline, write_maskgen_repositories
from helpers.sampling import generators
from safetensors.torch import load_file, save_file

from diffusers_infogain import PRESETS, InfoGainMaskGenPipeline, InfoGainScheduler, candidates, load, step
from diffusers_infogain.checkpoints.source import renamed
from diffusers_infogain.cli import main
from diffusers_infogain.models import titok_tokenizer
from diffusers_infogain.models.maskgen_transformer import MaskGenTransformer
from diffusers_infogain.models.titok_tokenizer import TiTokTokenizer

GOLDEN = Path(__file__).parent / "golden" / "maskgen_tiny.safetensors"
SIZES = {"num_tokens": 8, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "codebook_size": 32}


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN)


def weights(golden: dict[str, torch.Tensor], name: str, key_mapping: dict[str, str]) -> dict[str, torch.Tensor]:
    stored = {key.removeprefix(f"{name}."): value for key, value in golden.items() if key.startswith(f"{name}.")}
    return {renamed(key, key_mapping): value.float() for key, value in stored.items()}


@pytest.fixture(scope="module")
def transformer(golden) -> MaskGenTransformer:
    model = MaskGenTransformer(**SIZES, text_embed_dim=16, micro_cond_embed_dim=8, num_unused=11).eval().requires_grad_(False)
    model.load_state_dict(weights(golden, "generator", {}))
    return model


@pytest.fixture
def pipe() -> InfoGainMaskGenPipeline:
    return make_maskgen_pipeline()


def test_logits_are_those_of_the_public_implementation(golden, transformer):
    found = transformer(golden["input"], golden["hidden"], golden["pooled"], torch.full((3,), 6.5))
    torch.testing.assert_close(found, golden["logits"], atol=1e-4, rtol=0)


def test_pixels_are_those_of_the_public_implementation(golden):
    widths = {"width": 16, "layers": 2, "heads": 2}
    sizes = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in widths.items()}
    own = {"num_tokens": 8, "codebook_size": 32, "image_size": 32, "token_size": 6, "use_l2_norm": False}
    reads = {"pixel_codebook_size": None, "text_embed_dim": 16, "text_length": 5}
    model = TiTokTokenizer(**sizes, **own, **reads).eval().requires_grad_(False)
    model.load_state_dict(weights(golden, "tokenizer", titok_tokenizer.KEY_MAPPING))
    torch.testing.assert_close(model.decode(golden["tokens"], golden["text"]), golden["pixels"], atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match=r"`text` must be of shape \(2, 5, 16\), got None"):
        model.decode(golden["tokens"])


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_every_decision_is_that_of_the_published_sampler_with_the_same_noise(golden, transformer, schedule, monkeypatch):
    states, token_noise, position_noise = (golden[f"{schedule}.{what}"] for what in ("states", "token_noise", "position_noise"))
    steps: list[int] = []

    def draw_uniforms(generator, batch_size, num_candidates, length):
        steps.append(len(steps))
        noise = position_noise[steps[-1]]
        return torch.stack([torch.zeros_like(noise), noise], dim=1)[:, None]

    def sample_tokens(logits, uniform, temperature, top_k=None, top_p=None):
        noise = token_noise[steps[-1]][states[steps[-1]] == 32]
        assert len(noise) == len(logits)
        return (logits + temperature * candidates.gumbel(noise)).argmax(-1, keepdim=True)

    def encode_prompt(self, prompts):
        prefix = "negative_" if prompts == [""] else ""
        return golden[f"{prefix}hidden"], golden[f"{prefix}pooled"], golden[f"{prefix}hidden"]

    monkeypatch.setattr(candidates, "draw_uniforms", draw_uniforms)
    monkeypatch.setattr(step, "sample_tokens", sample_tokens)
    monkeypatch.setattr(InfoGainMaskGenPipeline, "encode_prompt", encode_prompt)
    pipe = InfoGainMaskGenPipeline(None, None, None, transformer, InfoGainScheduler(mask_token_id=32, **PRESETS["maskgen"]))
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 5, "output_type": "latent", "generator": generators(0, 1, 2)}
    output = pipe(["a", "b", "c"], guidance_schedule=f"maskgen_{schedule}", **options)
    assert torch.equal(output.trace.tokens, states[1:])
    assert len(steps) == 5


def test_prompts_are_padded_with_the_id_0(pipe):
    hidden, pooled, last = pipe.encode_prompt(["a cat", "dogs"])
    ids = pipe.tokenizer("a cat").input_ids
    limit = pipe.text_encoder.config.max_position_embeddings
    padded = torch.tensor([[*ids, *(limit - len(ids)) * [0]]])
    expected = pipe.text_encoder(padded, output_hidden_states=True)
    torch.testing.assert_close(hidden[:1], expected.hidden_states[-2])
    torch.testing.assert_close(pooled[:1], expected.text_embeds)
    torch.testing.assert_close(last[:1], expected.last_hidden_state)


def test_the_image_tokenizer_reads_the_prompt_of_each_image(pipe):
    output = pipe(["a cat", "dogs"], num_images_per_prompt=2, generator=generators(0, 1, 2, 3), output_type="pt")
    tokens = pipe(["a cat", "dogs"], num_images_per_prompt=2, generator=generators(0, 1, 2, 3), output_type="latent").images
    text = pipe.encode_prompt(["a cat", "dogs"])[2].repeat_interleave(2, 0)
    torch.testing.assert_close(output.images, pipe.vqvae.decode(tokens[:, 0], text).clamp(0, 1))
    other = pipe.vqvae.decode(tokens[:, 0], text.flip(0)).clamp(0, 1)
    assert not torch.allclose(output.images, other, atol=1e-3)
    for index in (0, 3):
        last = np.asarray(output.trace.of_sample(index) and output.trace.frames(index, size=32)[-1]) / 255
        assert np.abs(last - output.images[index].permute(1, 2, 0).numpy()).max() <= 0.51 / 255
    alone = pipe("dogs", generator=generators(3), output_type="pt").images
    torch.testing.assert_close(alone[0], output.images[3])


def test_defaults_and_the_negative_prompt(pipe):
    assert (pipe.default_num_inference_steps, pipe.default_guidance_scale, pipe.default_guidance_schedule) == (
        16,
        12.0,
        "maskgen_cosine",
    )
    plain, steered = (
        pipe("a cat", negative_prompt=text, generator=generators(0), output_type="latent").images for text in (None, "dogs dogs")
    )
    assert not torch.equal(plain, steered)
    pipe.scheduler = InfoGainScheduler(mask_token_id=CODES, sampler="uniform")
    rows = [
        pipe("a cat", guidance_scale=scale, num_inference_steps=4, output_type="latent").trace.num_evaluations.sum().item()
        for scale in (0.0, 12.0)
    ]
    assert rows == [4, 8]
    assert make_maskgen_pipeline(aesthetic_score=2.0).config.aesthetic_score == 2.0
    with pytest.raises(ValueError, match="`mask_image` must be None for InfoGainMaskGenPipeline, whose tokens have no place"):
        pipe("a cat", image=torch.zeros(3, 32, 32), mask_image=torch.ones(32, 32))


# The published repositories


@pytest.mark.parametrize("pickled", [False, True])
def test_as_published_and_as_converted_and_as_saved_again(tmp_path, capsys, pickled):
    generator, tokenizer, clip = write_maskgen_repositories(tmp_path, pickled)

    def tokens_of(pipe):
        pipe.set_progress_bar_config(disable=True)
        return pipe("a cat", generator=generators(0), num_inference_steps=2, output_type="latent").images

    pipe = load(generator, vqvae=tokenizer, text_encoder=clip)
    assert type(pipe) is InfoGainMaskGenPipeline
    assert (pipe.default_guidance_scale, pipe.default_num_inference_steps, pipe.config.aesthetic_score) == (11.0, 7, 6.25)
    expected = tokens_of(pipe)
    flags = ["--vqvae", tokenizer, "--text-encoder", clip]
    assert main(["convert", generator, str(tmp_path / "out"), *flags]) == 0, capsys.readouterr().err
    again = load(tmp_path / "out")
    assert torch.equal(tokens_of(again), expected)
    assert again.config.aesthetic_score == 6.25
    again.save_pretrained(tmp_path / "saved")
    assert torch.equal(tokens_of(load(tmp_path / "saved")), expected)
    assert len(again("a cat", num_inference_steps=2).images) == 1


@pytest.mark.parametrize(
    ("part", "change", "text"),
    [
        (
            "vq_model",
            {"quantize_mode": "vae"},
            "config.json: `quantize_mode` must be 'vq', got 'vae': continuous tokens",
        ),
        ("maskgen", {"weight_tying": False}, "config.json: `weight_tying` must be true, as published, got False."),
        ("maskgen", {"decoder_depth": "two"}, "config.json: `decoder_depth` must be an integer >= 1, got 'two'."),
        ("maskgen", {"decoder_depth": 3}, "tensors of the MaskGenTransformer are missing: blocks."),
    ],
)
def test_other_configurations_are_refused(tmp_path, part, change, text):
    generator, tokenizer, clip = write_maskgen_repositories(tmp_path)
    file = Path(generator) / "config.json"
    config = json.loads(file.read_text())
    config["model"][part] |= change
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError) as error:
        load(generator, vqvae=tokenizer, text_encoder=clip)
    assert text in str(error.value)


def test_a_head_of_its_own_is_refused_and_either_name_of_the_tied_one_will_do(tmp_path):
    generator, tokenizer, clip = write_maskgen_repositories(tmp_path)
    file = Path(generator) / "model.safetensors"
    state = load_file(file)
    save_file({**state, "lm_head.weight": state["embeddings.weight"] + 1}, file)
    with pytest.raises(ValueError, match=r"lm_head\.weight must equal embeddings\.weight, but it differs"):
        load(generator, vqvae=tokenizer, text_encoder=clip)
    state["lm_head.weight"] = state.pop("embeddings.weight")
    save_file(state, file)
    assert load(generator, vqvae=None, text_encoder=clip).transformer.embeddings.weight.shape == (44, 16)


def test_samples_have_the_tokens_of_a_line(pipe):
    assert pipe("a cat", output_type="latent").images.shape == (1, 1, TOKENS)
