"""Show-o: its logits and the decisions of its own loop, its layout, its published format, and images that grow."""

from __future__ import annotations

import json
import logging
import math
import shutil
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
import torch
from helpers.checkpoints import (
    PHI_CONFIG,
    SHOWO_CONFIG,
    make_showo_pipeline,
    make_small_magvit,
    make_word_tokenizer,
    write_magvit_repository,
    write_phi_repository,
    write_showo_repository,
)
from helpers.sampling import generators
from safetensors.torch import load_file, save_file
from transformers import PhiConfig

from diffusers_infogain import PRESETS, InfoGainScheduler, InfoGainShowoPipeline, candidates, load
from diffusers_infogain.checkpoints.convert import convert
from diffusers_infogain.model_sizes import MODEL_SIZES
from diffusers_infogain.models.omni_phi import OmniPhi, omni_phi_config
from diffusers_infogain.schedules import annealed, decode_counts

GOLDEN = Path(__file__).parent / "golden" / "showo_tiny.safetensors"
CODES, MASK, PAD = 32, 32, 50
PROMPTS = ["a red cat on the mat", "two dogs", "fog " * 20]


@pytest.fixture
def pipe() -> InfoGainShowoPipeline:
    return make_showo_pipeline()


@pytest.fixture(scope="module")
def stored() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN)


def golden_pipe(stored: dict[str, torch.Tensor]) -> InfoGainShowoPipeline:
    config = {"vocab_size": 93, "llm_vocab_size": 50, "codebook_size": CODES, "num_vq_tokens": 16, "w_clip_vit": False}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    phi = {"model_type": "phi", "max_position_embeddings": 100, **sizes}
    transformer = OmniPhi(omni_phi_config(config, phi, Path("config.json"))).eval()
    prefix = "model.showo."
    weights = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
    transformer.load_state_dict(weights, strict=True)
    pipe = InfoGainShowoPipeline(
        make_small_magvit(),
        make_word_tokenizer(50, 41, 42),
        transformer,
        InfoGainScheduler(MASK, **PRESETS["showo"]),
        image_token_offset=60,
        task_token_id=55,
        image_start_token_id=51,
        image_end_token_id=52,
        pad_token_id=PAD,
        max_prompt_length=12,
        sample_size=4,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


# Against the figures of Show-o's own implementation


@torch.no_grad()
def test_attention_and_logits_are_those_of_the_public_implementation(stored):
    transformer = golden_pipe(stored).transformer
    ids, expected = stored["plain.input_ids"], stored["plain.logits"]
    real = ids != PAD
    assert torch.equal(transformer.visible(ids, real)[real], stored["plain.visible"][real])
    assert transformer.visible(ids, real).diagonal(dim1=1, dim2=2).all()  # of padding, too
    scale = expected.abs().max()
    torch.testing.assert_close(transformer(ids, real)[real], expected[real], atol=1e-5 * scale, rtol=0)
    where = real & (ids % 2 == 0)
    some = transformer(ids, real, where=where, token_range=(60, 92))
    torch.testing.assert_close(some, expected[where][:, 60:92], atol=1e-5 * scale, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(("name", "guidance_scale"), [("guided", 5.0), ("unguided", 0.0), ("extrapolated", 1.75)])
def test_the_inputs_of_its_loop_give_its_guided_logits(stored, name, guidance_scale):
    pipe = golden_pipe(stored)
    prompt, nothing = pipe.encode_prompt(PROMPTS), pipe.encode_prompt([""] * 3)
    steps = [key.removesuffix(".tokens") for key in stored if key.startswith(name) and key.endswith(".tokens")]
    for step in steps:
        tokens, expected = stored[f"{step}.tokens"].view(3, 4, 4), stored[f"{step}.logits"]
        everywhere = torch.ones_like(tokens, dtype=torch.bool)
        logits = (1 + guidance_scale) * pipe.predict(tokens, *prompt, everywhere)
        if guidance_scale:
            logits = logits - guidance_scale * pipe.predict(tokens, *nothing, everywhere)
        error = 1e-5 * (1 + 2 * guidance_scale) * expected.abs().max()
        torch.testing.assert_close(logits.view(expected.shape), expected, atol=error.item(), rtol=0)
    assert len(steps) == {"guided": 6, "unguided": 9, "extrapolated": 4}[name]


def draws_of(stored: dict[str, torch.Tensor], name: str):
    """Uniform numbers that draw the tokens and the noise of the stored loop, step by step."""
    steps = iter(sorted(key.removesuffix(".gumbel") for key in stored if key.startswith(name) and key.endswith(".gumbel")))

    def draw_uniforms(generator, batch_size, num_candidates, length):
        step = next(steps)
        cdf = stored[f"{step}.logits"].double().softmax(-1).cumsum(-1)
        sampled = stored[f"{step}.sampled"][..., None]
        upper = cdf.gather(-1, sampled)
        lower = torch.where(sampled > 0, cdf.gather(-1, (sampled - 1).clamp(min=0)), 0.0)
        position = torch.exp(-torch.exp(-stored[f"{step}.gumbel"].double()))
        return torch.stack([((lower + upper) / 2)[..., 0], position], dim=1)[:, None].float()

    return draw_uniforms


@pytest.mark.parametrize(
    ("name", "guidance_scale", "steps"), [("guided", 5.0, 6), ("unguided", 0.0, 9), ("extrapolated", 1.75, 4)]
)
def test_the_preset_decides_as_the_published_loop(stored, name, guidance_scale, steps, monkeypatch):
    monkeypatch.setattr(candidates, "draw_uniforms", draws_of(stored, name))
    states = []
    images = golden_pipe(stored)(
        PROMPTS,
        guidance_scale=guidance_scale,
        num_inference_steps=steps,
        output_type="latent",
        generator=generators(0, 1, 2),
        latents=stored[f"{name}.step00.tokens"].view(3, 4, 4),
        callback_on_step_end=lambda pipe, i, t, kwargs: states.append(kwargs["latents"].flatten(1)) or {},
    ).images
    for i in range(1, steps):
        assert torch.equal(states[i - 1], stored[f"{name}.step{i:02}.tokens"])
    assert torch.equal(images.flatten(1), stored[f"{name}.result"])


def test_counts_and_temperatures_are_those_of_the_published_loop():
    for length, steps in [(256, 18), (256, 50), (1024, 50), (1024, 16), (16, 9)]:
        left, temperature, temperatures = length, 1.0, annealed((1.0, 0.0), steps, "product")
        for step in range(steps):
            ratio = (step + 1) / steps
            temperature *= 1 - ratio
            masked = max(1, min(left - 1, math.floor(length * torch.cos(torch.tensor(ratio) * math.pi * 0.5))))
            masked = 0 if step == steps - 1 else masked  # it returns what it has drawn for the last one
            count = decode_counts(torch.tensor([left]), step, steps, "cosine", initial_masks=torch.tensor([length]))
            assert (left - count.item(), temperatures[step].item()) == (masked, pytest.approx(temperature, abs=1e-7))
            left = masked


# The network and the layout


@pytest.mark.parametrize("name", ["showo-256", "showo-512"])
def test_the_published_size_has_the_published_tensors(name):
    with torch.device("meta"):
        model = OmniPhi(PhiConfig(**MODEL_SIZES[name].config))
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert len(shapes) == 1 + 24 * 18 + 4
    assert shapes["lm_head.weight"] == shapes["model.embed_tokens.weight"] == (58498, 2048)
    assert shapes["model.layers.23.self_attn.q_layernorm.weight"] == (64,)
    layer = 4 * (2048 + 1) * 2048 + (2048 + 1) * 8192 + (8192 + 1) * 2048 + 2 * 2048 + 4 * 64
    assert sum(value.numel() for value in model.parameters()) == 2 * 58498 * 2048 + 58498 + 24 * layer + 2 * 2048


def test_text_is_causal_and_images_are_not_in_every_attention_implementation(pipe):
    tokens = torch.tensor([[43, 41, 3, 42, 44, 50, 51, 52, 45, 6]])  # an image between two texts
    seen = pipe.transformer.visible(tokens, torch.ones_like(tokens, dtype=torch.bool)).sum(-1)
    assert seen.tolist() == [[1, 2, 3, 4, 10, 10, 10, 10, 10, 10]]
    expected = pipe.transformer(tokens)
    for place, changed in ((2, [*range(2, 10)]), (7, [*range(4, 10)]), (9, [*range(4, 10)])):
        other = tokens.clone()
        other[:, place] += 1
        different = (pipe.transformer(other) - expected).abs().amax(-1)[0] > 1e-5
        assert different.nonzero()[:, 0].tolist() == changed
    pipe.transformer.set_attn_implementation("eager")
    torch.testing.assert_close(pipe.transformer(tokens), expected, atol=1e-4, rtol=1e-4)


def test_a_prompt_is_laid_out_as_published(pipe, caplog):
    logging.getLogger("diffusers").propagate = True
    ids, mask = pipe.encode_prompt(["two dogs", "cat " * 20, ""])
    assert ids.tolist() == [[40] * 7 + [43, 41, 6, 7, 42], [43, 41, *[2] * 9, 42], [40] * 9 + [43, 41, 42]]
    assert mask.tolist() == [[id != 40 for id in row] for row in ids.tolist()]
    assert "A prompt of 23 tokens was cut to the 12 that Show-o takes" in caplog.text


def test_only_the_size_of_its_training_is_made(pipe):
    with pytest.raises(ValueError, match="`height` and `width` must be 8, the only size of this model, got 8 and 12"):
        pipe("a cat", width=12)


# The published format


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("parts")
    return {"vqvae": write_magvit_repository(root / "magvit"), "language_model": write_phi_repository(root / "phi-1_5")}


def tokens_of(pipe: InfoGainShowoPipeline) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe("a red cat", generator=generators(0), num_inference_steps=2, output_type="latent").images


def test_as_published_and_as_converted_and_as_saved_again(parts, tmp_path):
    published = write_showo_repository(tmp_path / "show-o")
    pipe = load(published, **parts)
    assert type(pipe) is InfoGainShowoPipeline
    layout = ("image_token_offset", "task_token_id", "image_start_token_id", "image_end_token_id", "pad_token_id", "sample_size")
    assert [pipe.config[name] for name in layout] == [50305, 50300, 50296, 50297, 50295, 16]
    assert (pipe.transformer.config.mask_token_id, pipe.scheduler.config.mask_token_id) == (58497, 8192)
    assert (pipe.default_guidance_scale, pipe.vae_scale_factor) == (1.75, 16)
    expected = tokens_of(pipe)
    sizes = convert(InfoGainShowoPipeline, published, tmp_path / "converted", **parts)
    assert sizes["transformer"].num_tensors == 1 + 2 * 18 + 4
    again = load(tmp_path / "converted")
    for name, value in pipe.transformer.state_dict().items():
        assert torch.equal(again.transformer.state_dict()[name], value)
    assert torch.equal(tokens_of(again), expected)
    again.save_pretrained(tmp_path / "saved")
    assert torch.equal(tokens_of(load(tmp_path / "saved")), expected)
    assert load(tmp_path / "saved").default_guidance_scale == 1.75


def test_by_its_name_on_the_hub_it_finds_its_parts_and_no_weights_of_phi(parts, tmp_path, monkeypatch):
    hub, asked = tmp_path / "hub", []
    write_showo_repository(hub / "showlab" / "show-o")
    shutil.copytree(parts["language_model"], hub / "microsoft" / "phi-1_5")
    (hub / "microsoft" / "phi-1_5" / "model.safetensors").write_text("weights that nobody needs")
    shutil.copytree(parts["vqvae"], hub / "showlab" / "magvitv2")

    def download(name: str, allow_patterns: list[str], revision: str | None, **options: object) -> str:
        target = tmp_path / "cache" / name
        for path in (hub / name).iterdir():
            if any(fnmatch(path.name, pattern) for pattern in allow_patterns):
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
        asked.append((name, revision))
        return str(target)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    pipe = load("showlab/show-o", revision="a", vqvae_revision="b", language_model_revision="c")
    assert {*asked} == {("showlab/show-o", "a"), ("showlab/magvitv2", "b"), ("microsoft/phi-1_5", "c")}
    assert not (tmp_path / "cache" / "microsoft" / "phi-1_5" / "model.safetensors").exists()
    assert torch.equal(tokens_of(pipe), tokens_of(load(hub / "showlab" / "show-o", **parts)))


def test_pickles_the_larger_size_and_models_with_clip_load(parts, tmp_path):
    pickled = write_showo_repository(tmp_path / "pickled", pickled=True, num_vq_tokens=1024, num_new_special_tokens=10)
    larger = load(pickled, **parts)
    assert (larger.config.sample_size, larger.default_guidance_scale) == (32, 5.0)
    with_clip = load(write_showo_repository(tmp_path / "clip", w_clip_vit=True), **parts)
    weights = larger.transformer.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in with_clip.transformer.state_dict().items())


def test_a_projector_that_the_config_does_not_name_is_refused(parts, tmp_path):
    folder = write_showo_repository(tmp_path / "clip", w_clip_vit=True)
    (folder / "config.json").write_text(json.dumps(SHOWO_CONFIG))
    with pytest.raises(ValueError, match=r"clip/pytorch_model.safetensors has 4 keys that a OmniPhi does not have: mm_projector"):
        load(folder, **parts)


@pytest.mark.parametrize(
    ("change", "text"), [("missing", "1 tensors of the OmniPhi are missing"), ("reshaped", "must have the shape")]
)
def test_one_bad_tensor_is_named_with_its_file(parts, tmp_path, change, text):
    folder = write_showo_repository(tmp_path / "show-o")
    file, key = folder / "pytorch_model.safetensors", "showo.model.layers.1.self_attn.q_layernorm.weight"
    tensors = load_file(file)
    value = tensors.pop(key)
    save_file(tensors if change == "missing" else {**tensors, key: value.repeat(2)}, file)
    with pytest.raises(ValueError, match=text) as error:
        load(folder, **parts)
    assert "q_layernorm.weight" in str(error.value)
    assert "show-o/pytorch_model.safetensors" in str(error.value)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"vocab_size": 58499}, "`mask_token_id` must be 58498, got 58497."),
        ({"vocab_size": 58499, "mask_token_id": 58498}, "`vocab_size` must be 58498: `llm_vocab_size` 50295, 10 special tokens"),
        ({"num_new_special_tokens": 9}, "`num_new_special_tokens` must be 10, got 9."),
        ({"codebook_size": "8192"}, "`codebook_size` must be a positive integer, got '8192'."),
        ({"num_vq_tokens": 250}, "`num_vq_tokens` must be a square number, got 250."),
        ({"w_clip_vit": None}, "`w_clip_vit` must be true or false, got None."),
    ],
)
def test_configurations_that_do_not_fit_are_named(parts, tmp_path, config, text):
    folder = write_showo_repository(tmp_path / "show-o")
    (folder / "config.json").write_text(json.dumps({**SHOWO_CONFIG, **config}))
    with pytest.raises(ValueError) as error:
        load(folder, **parts)
    assert f"{folder / 'config.json'}: {text}" in str(error.value)


def test_another_language_model_is_refused(parts, tmp_path):
    folder = write_showo_repository(tmp_path / "show-o", llm_model_path="meta-llama/Llama-3")
    with pytest.raises(
        ValueError, match=r"`llm_model_path` must be 'microsoft/phi-1_5', got 'meta-llama/Llama-3': give that model"
    ):
        load(folder, vqvae=parts["vqvae"])
    small = tmp_path / "phi"
    make_word_tokenizer(60, 41, 42).save_pretrained(small)
    (small / "config.json").write_text((parts["language_model"] / "config.json").read_text())
    with pytest.raises(ValueError, match=r"The tokenizer in .*phi must have 50295 tokens \(`llm_vocab_size`\), got 60\."):
        load(folder, vqvae=parts["vqvae"], language_model=small)
    make_word_tokenizer(50295, 41, 42).save_pretrained(small)
    (small / "config.json").write_text(json.dumps({**PHI_CONFIG, "hidden_act": "soft"}))
    with pytest.raises(ValueError, match=r"phi.config.json makes no OmniPhi: KeyError: 'soft'"):
        load(folder, vqvae=parts["vqvae"], language_model=small)
    (small / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"config.json: `model_type` must be 'phi', got 'llama'"):
        load(folder, vqvae=parts["vqvae"], language_model=small)


def test_parts_of_different_models_are_refused(pipe):
    with pytest.raises(ValueError, match="`image_start_token_id` must be that of `transformer`, 44, got 45"):
        InfoGainShowoPipeline(
            pipe.vqvae, pipe.tokenizer, pipe.transformer, pipe.scheduler, 50, image_start_token_id=45, image_end_token_id=44
        )
    with pytest.raises(
        ValueError, match="`image_token_offset` 60 and the 32 codes of `vqvae` do not fit into the vocabulary of 84"
    ):
        InfoGainShowoPipeline(
            pipe.vqvae, pipe.tokenizer, pipe.transformer, pipe.scheduler, 60, image_start_token_id=44, image_end_token_id=45
        )


# Images that grow


def test_windows_begin_with_the_edge_of_the_image_and_keep_it(pipe, monkeypatch):
    pipe.scheduler = InfoGainScheduler.from_config(pipe.scheduler.config, **PRESETS["showo"])
    image = torch.randint(256, (2, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    tokens = torch.randint(CODES, (2, 4, 4), generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(pipe, "to_tokens", lambda pixels: tokens[: len(pixels)])
    seen = []
    handle = pipe.transformer.register_forward_hook(lambda m, a, output: seen.append(a[0][:, -17:-1].view(-1, 4, 4) - 50))
    prompts, sides = ["fog", "mud", "a cat"], ["left", "left", "right"]
    call = {"num_inference_steps": 1, "guidance_scale": 0}
    wide = pipe.extrapolate(prompts, image, sides, overlap=2, output_type="latent", generator=generators(1, 2), **call)
    handle.remove()
    assert wide.shape == (2, 4, 4 + 3 * 3)
    assert torch.equal(wide[..., 6:10], tokens)
    assert (wide < CODES).all()
    # One window after the other, each with the column at the edge and masks (47 - 50).
    for window, edge, place in zip(seen, (wide[..., 6], wide[..., 3], wide[..., 9]), (3, 3, 0), strict=True):
        assert torch.equal(window[..., place], edge)
        assert (window == -3).sum() == 2 * 12
    again = pipe.extrapolate(prompts, image, sides, overlap=2, output_type="pt", generator=generators(1, 2), **call)
    assert again.shape == (2, 3, 8, 26)
    assert torch.equal((again[..., 12:20] * 255).round().byte(), image)
    assert torch.equal(again[..., :12], (pipe.to_pixels(wide)[..., :12] / 2 + 0.5).clamp(0, 1))
    tall = pipe.extrapolate("fog", image[0], ["top", "bottom"], **call)[0]
    assert tall.size == (8, 16)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"sides": ["up"]}, "`sides` must be one of left, top, right, bottom, got 'up'."),
        ({"sides": ["left", "top"]}, "`sides` must be of left and right, or of top and bottom, got left, top."),
        ({"sides": []}, "`sides` must be a non-empty list of left and right, or of top and bottom, got []."),
        ({"overlap": 3}, "`overlap` must be a multiple of 2, the pixels of a token, got 3."),
        ({"overlap": 8}, "`overlap` must be an integer from 2 to 6 or None, got 8."),
        ({"prompt": ["a", "b", "c"]}, "`prompt` must be one, or one for each of the 2 windows, got 3."),
        ({"mask_blur": -1}, "`mask_blur` must be a number"),
        ({"output_type": "gif"}, "`output_type` must be one of pil, np, pt, latent, got 'gif'."),
    ],
)
def test_growth_that_cannot_be_is_refused(pipe, arguments, text):
    image = torch.zeros(3, 8, 8)
    with pytest.raises(ValueError) as error:
        pipe.extrapolate(**{"prompt": "fog", "image": image, "sides": ["left", "right"], **arguments})
    assert text in str(error.value)
    with pytest.raises(
        TypeError, match=r"extrapolate\(\) got an unexpected keyword argument 'latents': the windows decide on it"
    ):
        pipe.extrapolate("fog", image, ["left"], latents=None)
    with pytest.raises(TypeError, match="unexpected keyword argument 'num_step'"):
        pipe.extrapolate("fog", image, ["left"], num_step=3)
