"""The image tokenizer VQ-16 of LlamaGen ("Autoregressive Model Beats Diffusion", arXiv 2406.06525) as diffusers' `VQModel`.

It makes 16384 kinds of tokens, one per 16 x 16 pixels, of images in [-1, 1]. Its file `vq_ds16_c2i.pt` has the tensors under the
key "model".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import VQModel

from .source import ModelSource
from .stock import probe_vqvae
from .weights import Checkpoint

WEIGHT_NAME = "vq_ds16_c2i.pt"

CODEBOOK = "quantize.embedding.weight"
_LEVEL = r"{}\.conv_blocks\.(\d+)\."
_RENAMED = [
    (_LEVEL.format("encoder"), r"encoder.down_blocks.\1."),
    (_LEVEL.format("decoder"), r"decoder.up_blocks.\1."),
    (r"\.res\.", ".resnets."),
    (r"\.attn\.", ".attentions."),
    (r"\.mid\.0\.", ".mid_block.resnets.0."),
    (r"\.mid\.1\.", ".mid_block.attentions.0."),
    (r"\.mid\.2\.", ".mid_block.resnets.1."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.(down|up)sample\.conv\.", r".\1samplers.0.conv."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
]


def llamagen_vq_config() -> dict[str, Any]:
    """The arguments of `VQModel` for the published VQ-16."""
    return _config((128, 128, 256, 256, 512), (False,) * 4 + (True,), (True,) + (False,) * 4, 2, 256, 8, 16384, 32)


def _config(
    channels: tuple[int, ...],
    down_attention: tuple[bool, ...],
    up_attention: tuple[bool, ...],
    layers: int,
    latent_channels: int,
    vq_embed_dim: int,
    codebook_size: int,
    norm_num_groups: int,
) -> dict[str, Any]:
    return {
        "block_out_channels": channels,
        "down_block_types": tuple("AttnDownEncoderBlock2D" if attn else "DownEncoderBlock2D" for attn in down_attention),
        "up_block_types": tuple("AttnUpDecoderBlock2D" if attn else "UpDecoderBlock2D" for attn in up_attention),
        "layers_per_block": layers,
        "latent_channels": latent_channels,
        "vq_embed_dim": vq_embed_dim,
        "num_vq_embeddings": codebook_size,
        "norm_num_groups": norm_num_groups,
        "sample_size": 256,
        "mid_block_add_attention": True,
        "lookup_from_codebook": True,
        # Published for float32 only.
        "force_upcast": True,
    }


def convert_key(key: str) -> str | None:
    """`VQModel`'s name of a tensor in the checkpoint; None for the training's record of used codes."""
    if key == "quantize.codebook_used":
        return None
    for pattern, replacement in _RENAMED:
        key = re.sub(pattern, replacement, key)
    return key


def convert_tensor(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The checkpoint's tensor as `VQModel` wants it under its own `name`.

    The tokenizer compares directions: with codes of length 1 `VQModel`'s nearest code is the same one. Its attention has linear
    layers in place of 1 x 1 convolutions.
    """
    if name == CODEBOOK:
        return F.normalize(tensor, dim=-1)
    if ".attentions." in name and tensor.ndim == 4:
        return tensor[:, :, 0, 0]
    return tensor


def config_from_state_dict(shapes: Mapping[str, tuple[int, ...]], norm_num_groups: int = 32) -> dict[str, Any]:
    """The arguments of `VQModel` for a checkpoint of this format whose tensors have these names and shapes.

    Args:
        norm_num_groups: Groups of the norms, which shapes do not tell.

    Raises:
        ValueError: If a tensor is missing.
    """
    needed = (CODEBOOK, "encoder.conv_out.weight", "encoder.conv_blocks.0.res.0.conv2.weight")
    if missing := [key for key in needed if key not in shapes]:
        raise ValueError(f"`shapes` must be those of a LlamaGen VQ checkpoint, but there is no {', '.join(missing)}.")

    def count(prefix: str) -> int:
        return len({key.removeprefix(prefix).split(".")[0] for key in shapes if key.startswith(prefix)})

    codebook_size, vq_embed_dim = shapes[CODEBOOK]
    levels = range(count("encoder.conv_blocks."))
    return _config(
        channels=tuple(shapes[f"encoder.conv_blocks.{i}.res.0.conv2.weight"][0] for i in levels),
        down_attention=tuple(f"encoder.conv_blocks.{i}.attn.0.q.weight" in shapes for i in levels),
        up_attention=tuple(f"decoder.conv_blocks.{i}.attn.0.q.weight" in shapes for i in levels),
        layers=count("encoder.conv_blocks.0.res."),
        latent_channels=shapes["encoder.conv_out.weight"][0],
        vq_embed_dim=vq_embed_dim,
        codebook_size=codebook_size,
        norm_num_groups=norm_num_groups,
    )


def open_llamagen_vq(file: Path) -> ModelSource:
    """The tokenizer in a published file.

    Raises:
        ValueError: If the file is of another family.
    """
    checkpoint = Checkpoint([file], ("model",))
    try:
        config = config_from_state_dict(checkpoint.shapes)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return ModelSource(checkpoint, lambda: VQModel(**config), probe_vqvae, convert_key, convert_tensor)
