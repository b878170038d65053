"""Openers for models of diffusers and transformers, in repositories that publish them beside a model of their own."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import VQModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from ..files import read_json
from .configs import check_fields, check_sizes, stock_config, stock_settings
from .source import ModelSource
from .weights import find_weights, weight_names


def decode_vqvae(model: VQModel, tokens: torch.Tensor) -> torch.Tensor:
    """Decodes tokens (B, h, w) to pixels (B, 3, H, W), in the value range that the model was trained with."""
    width = model.config.vq_embed_dim or model.config.latent_channels
    return model.decode(tokens, force_not_quantize=True, shape=(*tokens.shape, width)).sample


def encode_vqvae(model: VQModel, pixels: torch.Tensor) -> torch.Tensor:
    """Encodes pixels (B, 3, H, W), in the value range that the model was trained with, to tokens (B, h, w)."""
    latents = model.encode(pixels.to(model.dtype)).latents
    return model.quantize(latents)[2][2].view(len(latents), *latents.shape[2:])


def open_vqvae(folder: Path, variant: str | None = None) -> ModelSource:
    """Opens a `VQModel` in a folder in diffusers' format.

    Raises:
        ValueError: If the configuration or the weights are missing.
    """
    file = folder / "config.json"
    config = read_json(file)
    check_fields(VQModel, config, file)
    weights = find_weights(folder, weight_names("diffusion_pytorch_model", variant))
    return ModelSource(weights, lambda: VQModel.from_config(config), probe_vqvae)


@torch.no_grad()
def probe_vqvae(model: VQModel) -> torch.Tensor:
    """The pixels of four fixed tokens, for `ModelSource.probe`."""
    return decode_vqvae(model, torch.arange(4).view(1, 2, 2) * 5 % model.config.num_vq_embeddings)


def open_clip_text_encoder(folder: Path, variant: str | None = None) -> ModelSource:
    """Opens a text encoder, or the text half of a CLIP, in a folder in transformers' format.

    Raises:
        ValueError: If the configuration or the weights are missing.
    """
    file = folder / "config.json"
    settings = stock_settings(read_json(file))
    weights = find_weights(folder, weight_names("model", variant))
    check_sizes(settings, weights, file)
    config = stock_config(CLIPTextConfig, settings, file)

    # The image half of a CLIP, and ids that older versions of transformers stored.
    unused = r"vision_model\.|visual_projection\.|logit_scale|.*embeddings\.position_ids$"
    return ModelSource(weights, lambda: CLIPTextModelWithProjection(config), _probe_text_encoder, unused_keys=unused)


@torch.no_grad()
def _probe_text_encoder(model: CLIPTextModelWithProjection) -> torch.Tensor:
    return model(torch.arange(6)[None] % model.config.vocab_size).text_embeds
