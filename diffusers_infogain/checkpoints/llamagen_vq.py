"""The image tokenizer VQ-16 of LlamaGen ("Autoregressive Model Beats Diffusion", arXiv 2406.06525) as diffusers' `VQModel`.

It has a codebook of 16384 tokens, one token per 16 x 16 pixels, for images in [-1, 1]. Its file `vq_ds16_c2i.pt` has the tensors
under the key "model".
"""

from __future__ import annotations

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
KEY_MAPPING = {
    r"encoder\.conv_blocks\.(\d+)\.": r"encoder.down_blocks.\1.",
    r"decoder\.conv_blocks\.(\d+)\.": r"decoder.up_blocks.\1.",
    r"\.res\.": ".resnets.",
    r"\.attn\.": ".attentions.",
    r"\.mid\.0\.": ".mid_block.resnets.0.",
    r"\.mid\.1\.": ".mid_block.attentions.0.",
    r"\.mid\.2\.": ".mid_block.resnets.1.",
    r"\.nin_shortcut\.": ".conv_shortcut.",
    r"\.(down|up)sample\.conv\.": r".\1samplers.0.conv.",
    r"\.norm_out\.": ".conv_norm_out.",
    r"(attentions\.\d+)\.norm\.": r"\1.group_norm.",
    r"(attentions\.\d+)\.([qkv])\.": r"\1.to_\2.",
    r"(attentions\.\d+)\.proj_out\.": r"\1.to_out.0.",
}
"""`VQModel`'s names for the parts of the checkpoint's keys."""

UNUSED_KEYS = r"quantize\.codebook_used$"
"""Training's record of which codes were used."""


def convert_tensor(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The value in `VQModel`, under its `name` there, of a tensor of the checkpoint.

    LlamaGen compares directions; `VQModel` compares distances, which picks the same code once all codes have length 1. The
    attention of `VQModel` has linear layers instead of 1 x 1 convolutions.
    """
    if name == CODEBOOK:
        return F.normalize(tensor, dim=-1)
    if ".attentions." in name and tensor.ndim == 4:
        return tensor[:, :, 0, 0]
    return tensor


def config_from_state_dict(shapes: Mapping[str, tuple[int, ...]], norm_num_groups: int = 32) -> dict[str, Any]:
    """The arguments of `VQModel` for a checkpoint in this format, from the names and shapes of its tensors.

    Args:
        norm_num_groups: Groups of the norms, which shapes do not reveal.

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
    attention = {side: [f"{side}.conv_blocks.{i}.attn.0.q.weight" in shapes for i in levels] for side in ("encoder", "decoder")}
    return {
        "block_out_channels": tuple(shapes[f"encoder.conv_blocks.{i}.res.0.conv2.weight"][0] for i in levels),
        "down_block_types": tuple(f"{'Attn' * has}DownEncoderBlock2D" for has in attention["encoder"]),
        "up_block_types": tuple(f"{'Attn' * has}UpDecoderBlock2D" for has in attention["decoder"]),
        "layers_per_block": count("encoder.conv_blocks.0.res."),
        "latent_channels": shapes["encoder.conv_out.weight"][0],
        "vq_embed_dim": vq_embed_dim,
        "num_vq_embeddings": codebook_size,
        "norm_num_groups": norm_num_groups,
        "sample_size": 256,
        "mid_block_add_attention": True,
        "lookup_from_codebook": True,
        "force_upcast": True,  # published for float32 only
    }


def open_llamagen_vq(file: Path) -> ModelSource:
    """Opens the published file of the tokenizer.

    Raises:
        ValueError: If the file is of another family.
    """
    checkpoint = Checkpoint([file], ("model",))
    try:
        config = config_from_state_dict(checkpoint.shapes)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return ModelSource(checkpoint, lambda: VQModel(**config), probe_vqvae, KEY_MAPPING, UNUSED_KEYS, convert_tensor)
