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
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from diffusers_infogain import InfoGainLuminaPipeline, InfoGainScheduler, decode, load
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


@torch.no_grad()
def full_logits(pipe: InfoGainLuminaPipeline, tokens: torch.Tensor, prompt: str, width: int = 4) -> torch.Tensor:
    """Code logits (L, 32) of one state (L,), from transformers' own Llama over the whole vocabulary, unpadded."""
    stock = LlamaForCausalLM(pipe.transformer.config).eval()
    stock.load_state_dict(pipe.transformer.state_dict())
    words = pipe.tokenizer(prompt).input_ids
    image = []
    for start in range(0, len(tokens), width):
        row = tokens[start : start + width].tolist()
        image += [*(47 if token == MASK else token + OFFSET for token in row), NEWLINE]
    ids = torch.tensor([[*SYSTEM, USER, *words, END, 43, 41, *image, 42, 44]])
    every = torch.zeros(1, 1, ids.shape[1], ids.shape[1])
    logits = stock(ids, attention_mask=every).logits[0, -(len(image) + 2) : -2, OFFSET : OFFSET + CODES]
    return logits.view(-1, width + 1, CODES)[:, :width].flatten(0, 1)


@torch.no_grad()
def test_padded_prompts_and_single_ones_give_the_same_logits(pipe):
    tokens = torch.full((3, 16), MASK)
    tokens[:, ::3] = torch.arange(6) * 5
    image = tokens.view(3, 4, 4)
    ids, mask = pipe.encode_prompt(PROMPTS)
    together = pipe.predict(image, ids, mask).view(3, -1, CODES)
    for row, prompt in enumerate(PROMPTS):
        alone = pipe.predict(image[:1], *pipe.encode_prompt([prompt]))
        expected = full_logits(pipe, tokens[0], prompt)[tokens[0] == MASK]
        torch.testing.assert_close(alone, expected, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(together[row], expected, atol=2e-5, rtol=1e-5)
    where = torch.zeros(3, 4, 4, dtype=torch.bool)
    where[1, 2, 3] = where[0, 0, 0] = True
    asked = pipe.predict(image, ids, mask, where)
    torch.testing.assert_close(asked[0], full_logits(pipe, tokens[0], PROMPTS[0])[0], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(asked[1], full_logits(pipe, tokens[1], PROMPTS[1])[11], atol=2e-5, rtol=1e-5)


# Decoding


@pytest.mark.parametrize("sampler", ["info_gain", "confidence"])
@pytest.mark.parametrize("guidance_scale", [0.0, 4.0])
@pytest.mark.parametrize("chunk", [None, 3])
def test_guidance_batches_prompts_and_chunks_give_what_each_image_gives_alone(sampler, guidance_scale, chunk):
    pipe = make_lumina_pipeline(sampler=sampler, token_temperature=0.7)
    call = {"guidance_scale": guidance_scale, "num_inference_steps": 4, "output_type": "latent", "return_dict": False}
    tokens, trace = pipe(
        PROMPTS,
        num_images_per_prompt=2,
        generator=generators(*range(6)),
        lookahead_batch_size=chunk,
        negative_prompt=["mud", "", "two cat"],
        **call,
    )
    assert (tokens < CODES).all()
    pairs = zip(PROMPTS, ["mud", "<uncondition>", "two cat"], strict=True)
    for row, (prompt, other) in enumerate(pair for pair in pairs for _ in range(2)):

        def denoise(states: torch.Tensor, rows: torch.Tensor, prompt: str = prompt, other: str = other) -> torch.Tensor:
            cond = torch.stack([full_logits(pipe, state, prompt) for state in states])
            if guidance_scale == 0:
                return cond
            uncond = torch.stack([full_logits(pipe, state, other) for state in states])
            return (1 + guidance_scale) * cond - guidance_scale * uncond

        scheduler = InfoGainScheduler.from_config(pipe.scheduler.config)
        scheduler.set_timesteps(4)
        plain = decode(denoise, scheduler, torch.full((1, 16), MASK), generator=generators(row), grid=(4, 4))
        assert tokens[row].flatten().tolist() == plain.tokens[0].tolist()
        torch.testing.assert_close(trace.cost[: len(plain.trace.cost), row], plain.trace.cost[:, 0], atol=1e-3, rtol=1e-3)


def test_without_a_negative_prompt_the_unconditional_one_stands(pipe):
    call = {"num_inference_steps": 3, "output_type": "latent"}
    expected = pipe("two dogs", generator=generators(0), negative_prompt="<uncondition>", **call).images
    for negative_prompt in (None, "", [""]):
        assert torch.equal(pipe("two dogs", generator=generators(0), negative_prompt=negative_prompt, **call).images, expected)


def test_images_of_every_kind_and_shape(pipe):
    call = {"num_inference_steps": 2, "height": 8, "width": 12}
    output = pipe("fog", output_type="pt", generator=generators(0), **call)
    assert output.images.shape == (1, 3, 8, 12)
    assert 0 <= output.images.min() <= output.images.max() <= 1
    assert pipe("fog", generator=generators(0), **call).images[0].size == (12, 8)
    assert pipe("fog", output_type="latent", generator=generators(0), **call).images.shape == (1, 4, 6)
    assert pipe("fog", output_type="latent", num_inference_steps=1).images.shape == (1, 4, 4)


def test_known_tokens_stay_and_callbacks_see_logits(pipe):
    latents = torch.full((1, 4, 4), MASK)
    latents[0, 1] = 7
    seen = []
    pipe.scheduler = InfoGainScheduler.from_config(pipe.scheduler.config, sampler="margin", entropy_bound=0)
    tokens = pipe(
        "a cat",
        latents=latents,
        num_inference_steps=3,
        output_type="latent",
        callback_on_step_end=lambda pipe, i, t, kwargs: seen.append(kwargs["logits"]) or {},
        callback_on_step_end_tensor_inputs=["logits"],
    ).images
    assert (tokens[0, 1] == 7).all()
    assert len(seen) == 3
    assert seen[0].shape == (1, 16, CODES)
    assert (seen[0][0, 4:8] == 0).all()


def test_offloading_and_half_precision_give_images(pipe):
    expected = pipe("a cat", generator=generators(0), num_inference_steps=2, output_type="latent").images
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(pipe("a cat", generator=generators(0), num_inference_steps=2, output_type="latent").images, expected)
    half = make_lumina_pipeline().to(torch.bfloat16)
    decoded = []
    half.vqvae.decoder.register_forward_hook(lambda module, args, output: decoded.append(output.dtype))
    image = half(PROMPTS[:2], generator=generators(0, 1), num_inference_steps=2, output_type="pt").images
    assert image.isfinite().all()
    assert decoded == [torch.float32]  # as the public implementation, which keeps this model in float32
    assert half.vqvae.dtype == torch.bfloat16


class LastDimensions(TorchDispatchMode):
    """The sizes of the last dimensions of all tensors that operations make, views of weights apart."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.sizes: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.ndim and value.untyped_storage().data_ptr() not in self.weights:
                self.sizes.add(value.shape[-1])
        return result


def test_no_tensor_has_a_column_for_every_word(pipe):
    with LastDimensions(pipe.transformer) as made:
        pipe("a cat", num_inference_steps=2, output_type="latent", generator=generators(0))
    assert CODES in made.sizes
    assert pipe.transformer.config.vocab_size not in made.sizes


# Errors


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"prompt": []}, "`prompt` must be a string or a non-empty list of strings, got []"),
        ({"negative_prompt": ["a", "b"]}, "`negative_prompt` must have one entry, or one for each of the 1 prompts, got 2"),
        ({"height": 7}, "`height` and `width` must be positive multiples of 2, got 7 and 8"),
        ({"height": 32, "width": 16}, "need 128 image tokens, which make a sequence of 162 with the prompt; the model takes 100"),
        ({"prompt": "cat " * 65}, "need 16 image tokens, which make a sequence of 101 with the prompt; the model takes 100"),
        ({"negative_prompt": "mud " * 65}, "which make a sequence of 101 with the prompt; the model takes 100"),
        ({"latents": torch.full((1, 4, 4), 33)}, "`latents` must hold ids from 0 to 31 or the mask id 32, got ids from 33 to 33"),
        ({"guidance_scale": float("inf")}, "`guidance_scale` must be a number in [-1e+06, 1e+06], got inf"),
    ],
)
def test_arguments_that_do_not_fit_are_named(pipe, arguments, text):
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


def test_a_foreign_mask_id_is_refused(pipe):
    pipe.scheduler = InfoGainScheduler(mask_token_id=5)
    with pytest.raises(ValueError, match="`mask_token_id` of the scheduler must be at least the codebook's size 32"):
        pipe("a cat")


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
        path for path in (tmp_path / "converted").rglob("*") if path.suffix not in ("", ".json", ".safetensors", ".jinja")
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
