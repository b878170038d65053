"""MaskGIT: classes in, images out; its guidance, its one size, its published sampler."""

from __future__ import annotations

import pytest
import torch
from helpers.checkpoints_maskgit import write_maskgit_checkpoint
from helpers.sampling import generators

from diffusers_infogain import PRESETS, InfoGainMaskGITPipeline, InfoGainScheduler, decode

CODES, MASK, SIDE = 64, 64, 4
LABELS = ["goldfish", 207, "tench, Tinca tinca"]
IDS = [1, 207, 0]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_maskgit_checkpoint(tmp_path_factory.mktemp("maskgit"))


@pytest.fixture
def pipe(file) -> InfoGainMaskGITPipeline:
    pipe = InfoGainMaskGITPipeline.from_pretrained(file)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def plain_logits(pipe, tokens: torch.Tensor, label: int, w: float) -> torch.Tensor:
    """(1, 16, 64) of one state, every position through the head, one branch after the other."""
    cond, uncond = (pipe.transformer(tokens, torch.tensor([one])) for one in (label, 1000))
    return (1 + w) * cond - w * uncond if w > 0 else cond


@pytest.mark.parametrize("settings", [{"token_temperature": 0.7}, PRESETS["maskgit_halton"], {"sampler": "margin"}], ids=str)
@pytest.mark.parametrize("w", [0.0, 1.5])
@pytest.mark.parametrize("chunk", [None, 3])
def test_guidance_batches_classes_and_chunks_give_what_each_image_gives_alone(pipe, settings, w, chunk):
    pipe.scheduler = InfoGainScheduler.from_config(pipe.scheduler.config, **settings)
    tokens, _ = pipe(
        LABELS,
        num_images_per_prompt=2,
        guidance_scale=w,
        num_inference_steps=5,
        generator=generators(*range(6)),
        lookahead_batch_size=chunk,
        output_type="latent",
        return_dict=False,
    )
    assert ((tokens >= 0) & (tokens < CODES)).all()
    for row, label in enumerate(label for label in IDS for _ in range(2)):

        def denoise(states: torch.Tensor, rows: torch.Tensor, label: int = label) -> torch.Tensor:
            return torch.cat([plain_logits(pipe, state[None], label, w) for state in states])

        scheduler = InfoGainScheduler.from_config(pipe.scheduler.config)
        scheduler.set_timesteps(5)
        plain = decode(denoise, scheduler, torch.full((1, SIDE**2), MASK), generator=generators(row))
        assert tokens[row].flatten().tolist() == plain.tokens[0].tolist()


def test_images(pipe):
    output = pipe("goldfish", num_inference_steps=2, generator=generators(0), output_type="pt")
    assert output.images.shape == (1, 3, 16 * SIDE, 16 * SIDE)
    assert 0 <= output.images.min() < output.images.max() <= 1
    assert pipe(207, num_inference_steps=2).images[0].size == (16 * SIDE, 16 * SIDE)
    tokens = pipe("goldfish", num_inference_steps=2, generator=generators(0), output_type="latent").images
    shape = (*tokens.shape, pipe.vqvae.config.vq_embed_dim)
    pixels = pipe.vqvae.decode(tokens, force_not_quantize=True, shape=shape).sample.clamp(-1, 1) / 2 + 0.5
    torch.testing.assert_close(output.images, pixels.detach())


def test_known_tokens_stay(pipe):
    latents = torch.full((1, SIDE, SIDE), MASK)
    latents[0, 2] = 5
    tokens = pipe("goldfish", latents=latents, num_inference_steps=3, output_type="latent").images
    assert (tokens[0, 2] == 5).all()


def test_a_weight_file_has_its_tokenizer_beside_it_or_where_it_is_told(file, tmp_path):
    alone = tmp_path / "ImageNet_256_tiny.pth"
    alone.write_bytes(file.read_bytes())
    expected = InfoGainMaskGITPipeline.from_pretrained(file).vqvae.state_dict()
    for place in (file.parent, file.parent / "vq_ds16_c2i.pt"):
        loaded = InfoGainMaskGITPipeline.from_pretrained(alone, vqvae=place).vqvae.state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in expected.items())
    with pytest.raises(OSError, match="'FoundationVision/LlamaGen' is neither a folder nor a Hub repository"):
        InfoGainMaskGITPipeline.from_pretrained(alone, local_files_only=True)


def test_a_folder_needs_the_name_of_a_variant(file):
    pipe = InfoGainMaskGITPipeline.from_pretrained(file.parent, variant="256_tiny", dtype=torch.bfloat16)
    assert pipe.transformer.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"`variant` '384_large': .* has no ImageNet_384_large.pth, but 256_tiny"):
        InfoGainMaskGITPipeline.from_pretrained(file.parent)
    with pytest.raises(ValueError, match=r"`variant` must not be given with a file, got '256_tiny'"):
        InfoGainMaskGITPipeline.from_pretrained(file, variant="256_tiny")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offloading_and_half_precision(file, dtype):
    pipe = InfoGainMaskGITPipeline.from_pretrained(file, dtype=dtype)
    expected = pipe("goldfish", generator=generators(0), num_inference_steps=2, output_type="np").images
    pipe.enable_model_cpu_offload(device="cpu")
    assert (pipe("goldfish", generator=generators(0), num_inference_steps=2, output_type="np").images == expected).all()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"class_labels": "goldfsh"}, "'goldfsh' is not the name of an ImageNet class: did you mean 'goldfish'"),
        ({"class_labels": 1000}, "`class_labels`: the id of an ImageNet class must be an integer in [0, 999], got 1000."),
        ({"class_labels": []}, "`class_labels` must be a class or a non-empty list of classes, got []"),
        ({"height": 128}, "`height` and `width` must be 64, the only size of this model, got 128 and 64"),
        ({"height": 60}, "`height` and `width` must be positive multiples of 16, got 60 and 64"),
        ({"latents": torch.full((1, 4, 4), 70)}, "`latents` must hold ids from 0 to 63 or the mask id 64"),
    ],
)
def test_arguments_that_do_not_fit_are_named(pipe, arguments, text):
    with pytest.raises(ValueError) as error:
        pipe(**{"class_labels": "goldfish", **arguments})
    assert text in str(error.value)


def test_a_tokenizer_of_another_codebook_is_refused(pipe, tmp_path):
    other = InfoGainMaskGITPipeline.from_pretrained(write_maskgit_checkpoint(tmp_path, codebook_size=32))
    with pytest.raises(ValueError, match="`vqvae` must have the 64 codes of `transformer`, got 32"):
        InfoGainMaskGITPipeline(other.vqvae, pipe.transformer, pipe.scheduler)
