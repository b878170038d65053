from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import VQModel
from helpers.checkpoints_maskgit import VQ_FILE, vq_shapes, write_maskgit_checkpoint
from safetensors.torch import load_file

from diffusers_infogain.checkpoints.llamagen_vq import KEY_MAPPING, UNUSED_KEYS, config_from_state_dict, convert_tensor
from diffusers_infogain.checkpoints.source import renamed

GOLDEN = Path(__file__).parents[1] / "golden" / "llamagen_vq_tiny.safetensors"


def convert(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = {key: renamed(key, KEY_MAPPING) for key in state_dict if not re.match(UNUSED_KEYS, key)}
    return {name: convert_tensor(name, state_dict[key]) for key, name in names.items()}


def load(state_dict: dict[str, torch.Tensor], **options) -> VQModel:
    config = config_from_state_dict({key: tuple(tensor.shape) for key, tensor in state_dict.items()}, **options)
    model = VQModel(**config).eval()
    model.load_state_dict(convert(state_dict))
    return model


def encode(model: VQModel, image: torch.Tensor) -> torch.Tensor:
    latents = model.encode(image).latents
    return model.quantize(latents)[2][2].reshape(len(image), *latents.shape[2:])


def decode(model: VQModel, tokens: torch.Tensor) -> torch.Tensor:
    return model.decode(tokens, force_not_quantize=True, shape=(*tokens.shape, model.config.vq_embed_dim)).sample


@torch.no_grad()
def test_tokens_and_pixels_are_those_of_the_public_implementation():
    data = load_file(GOLDEN)
    state_dict = {key.removeprefix("model."): tensor for key, tensor in data.items() if key.startswith("model.")}
    model = load(state_dict, norm_num_groups=2)
    # The stored codes have lengths that matter: without their normalisation, both would fail.
    assert state_dict["quantize.embedding.weight"].norm(dim=-1).std() > 0.1
    assert torch.equal(encode(model, data["image"]), data["indices"])
    torch.testing.assert_close(decode(model, data["tokens"]), data["pixels"], atol=1e-4, rtol=0)


def test_published_size():
    shapes = vq_shapes()
    config = config_from_state_dict(shapes)
    assert config == {
        "block_out_channels": (128, 128, 256, 256, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4 + ("AttnDownEncoderBlock2D",),
        "up_block_types": ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": 256,
        "vq_embed_dim": 8,
        "num_vq_embeddings": 16384,
        "norm_num_groups": 32,
        "sample_size": 256,
        "mid_block_add_attention": True,
        "lookup_from_codebook": True,
        "force_upcast": True,
    }
    with init_empty_weights():
        model = VQModel(**config)
    meta = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    ours = {name: tensor.shape for name, tensor in convert(meta).items()}
    assert ours == {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert sum(parameter.numel() for parameter in model.parameters()) == 71_883_403


def test_the_published_file_loads_safely(tmp_path):
    write_maskgit_checkpoint(tmp_path)
    state_dict = torch.load(tmp_path / VQ_FILE, weights_only=True)["model"]
    assert "quantize.codebook_used" in state_dict
    model = load(state_dict)
    torch.testing.assert_close(model.quantize.embedding.weight.norm(dim=-1), torch.ones(64))
    model.save_pretrained(tmp_path / "vqvae")
    again = VQModel.from_pretrained(tmp_path / "vqvae")
    tokens = torch.arange(6).reshape(1, 2, 3)
    pixels = decode(again, tokens)
    assert pixels.shape == (1, 3, 32, 48)
    assert torch.equal(pixels, decode(model, tokens))


def test_other_checkpoints_are_refused():
    shapes = {key: shape for key, shape in vq_shapes().items() if not key.startswith("quantize")}
    with pytest.raises(ValueError, match=r"LlamaGen VQ checkpoint, but there is no quantize\.embedding\.weight"):
        config_from_state_dict(shapes)
