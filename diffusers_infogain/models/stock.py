"""Models of diffusers and transformers in published folders, opened to be checked tensor by tensor."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import VQModel
from transformers import CLIPConfig, CLIPTextConfig, CLIPTextModelWithProjection

from ..files import read_json
from .checkpoint import ModelSource, find_weights


def weight_names(stem: str, variant: str | None = None) -> list[str]:
    """File names of weights, the preferred one first: "model.fp16.safetensors", or "model.safetensors" and
    "pytorch_model.bin"."""
    middle, pickle_stem = f".{variant}" if variant else "", "pytorch_model" if stem == "model" else stem
    return [f"{stem}{middle}.safetensors", f"{pickle_stem}{middle}.bin"]


def decode_vqvae(model: VQModel, tokens: torch.Tensor) -> torch.Tensor:
    """Pixels (B, 3, H, W) of tokens (B, h, w), in the range of the model's training."""
    width = model.config.vq_embed_dim or model.config.latent_channels
    return model.decode(tokens, force_not_quantize=True, shape=(*tokens.shape, width)).sample


def open_vqvae(folder: Path, variant: str | None = None) -> ModelSource:
    """A `VQModel` in a folder of diffusers' format.

    Raises:
        ValueError: If the configuration or the weights are missing.
    """
    config = read_json(folder / "config.json")
    return ModelSource(
        find_weights(folder, weight_names("diffusion_pytorch_model", variant)), lambda: VQModel.from_config(config), probe_vqvae
    )


@torch.no_grad()
def probe_vqvae(model: VQModel) -> torch.Tensor:
    """Pixels of some fixed tokens."""
    return decode_vqvae(model, torch.arange(4).view(1, 2, 2) * 5 % model.config.num_vq_embeddings)


def open_clip_text_encoder(folder: Path, variant: str | None = None) -> ModelSource:
    """The text half of a CLIP, or a text encoder alone, in a folder of transformers' format.

    Raises:
        ValueError: If the configuration or the weights are missing.
    """
    settings = read_json(folder / "config.json")
    config = CLIPConfig(**settings).text_config if "text_config" in settings else CLIPTextConfig(**settings)

    def convert_key(key: str) -> str | None:
        other = ("vision_model.", "visual_projection.", "logit_scale")
        return None if key.startswith(other) or key.endswith("embeddings.position_ids") else key

    return ModelSource(
        find_weights(folder, weight_names("model", variant)),
        lambda: CLIPTextModelWithProjection(config),
        _probe_text_encoder,
        convert_key,
    )


@torch.no_grad()
def _probe_text_encoder(model: CLIPTextModelWithProjection) -> torch.Tensor:
    return model(torch.arange(6)[None] % model.config.vocab_size).text_embeds
