"""Checkpoints with random weights in the very formats in which Halton-MaskGIT and LlamaGen's VQ are published."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

MASKGIT_FILE = "ImageNet_256_tiny.pth"
VQ_FILE = "vq_ds16_c2i.pt"

Shapes = dict[str, tuple[int, ...]]


def maskgit_shapes(
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    intermediate_size: int,
    sample_size: int,
    codebook_size: int = 16384,
    num_classes: int = 1000,
) -> Shapes:
    """Names and shapes of the transformer's published tensors."""
    width = hidden_size // num_heads * num_heads
    shapes: Shapes = {
        "cls_emb.weight": (num_classes + 1, hidden_size),
        "tok_emb.weight": (codebook_size + 1, hidden_size),
        "pos_emb.weight": (sample_size**2, hidden_size),
    }
    for i in range(num_layers):
        block: Shapes = {
            "mlp.1.weight": (6 * hidden_size, hidden_size),
            "mlp.1.bias": (6 * hidden_size,),
            "ln1.weight": (hidden_size,),
            "attn.wq.weight": (width, hidden_size),
            "attn.wk.weight": (width, hidden_size),
            "attn.wv.weight": (width, hidden_size),
            "attn.wo.weight": (hidden_size, width),
            "ln2.weight": (hidden_size,),
            "ff.w1.weight": (intermediate_size, hidden_size),
            "ff.w2.weight": (hidden_size, intermediate_size),
            "ff.w3.weight": (intermediate_size, hidden_size),
        }
        shapes |= {f"transformer.layers.{i}.{name}": shape for name, shape in block.items()}
    return shapes | {
        "last_norm.norm_final.weight": (hidden_size,),
        "last_norm.norm_final.bias": (hidden_size,),
        "last_norm.mlp.1.weight": (2 * hidden_size, hidden_size),
        "last_norm.mlp.1.bias": (2 * hidden_size,),
        "head.weight": (codebook_size + 1, hidden_size),
        "head.bias": (codebook_size + 1,),
        "reg_tokens.weight": (1, hidden_size),
    }


def _conv(name: str, inputs: int, outputs: int, kernel: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs, kernel, kernel), f"{name}.bias": (outputs,)}


def _norm(name: str, channels: int) -> Shapes:
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def _res(name: str, inputs: int, outputs: int) -> Shapes:
    shapes = _norm(f"{name}.norm1", inputs) | _conv(f"{name}.conv1", inputs, outputs, 3)
    shapes |= _norm(f"{name}.norm2", outputs) | _conv(f"{name}.conv2", outputs, outputs, 3)
    return shapes if inputs == outputs else shapes | _conv(f"{name}.nin_shortcut", inputs, outputs, 1)


def _attn(name: str, channels: int) -> Shapes:
    shapes = _norm(f"{name}.norm", channels)
    for layer in ("q", "k", "v", "proj_out"):
        shapes |= _conv(f"{name}.{layer}", channels, channels, 1)
    return shapes


def _levels(name: str, channels: Sequence[int], first: int, num_res: int, deepest: int, resampling: str) -> Shapes:
    shapes, inputs = {}, first
    for i, outputs in enumerate(channels):
        level = f"{name}.conv_blocks.{i}"
        for j in range(num_res):
            shapes |= _res(f"{level}.res.{j}", inputs, outputs)
            inputs = outputs
            if i == deepest:
                shapes |= _attn(f"{level}.attn.{j}", outputs)
        if i != len(channels) - 1:
            shapes |= _conv(f"{level}.{resampling}.conv", outputs, outputs, 3)
    return shapes


def vq_shapes(
    channels: Sequence[int] = (128, 128, 256, 256, 512),
    latent_channels: int = 256,
    codebook_size: int = 16384,
    codebook_dim: int = 8,
) -> Shapes:
    """Names and shapes of the tokenizer's published tensors."""
    deep = channels[-1]
    shapes = _conv("encoder.conv_in", 3, channels[0], 3) | _conv("encoder.conv_out", deep, latent_channels, 3)
    shapes |= _conv("decoder.conv_in", latent_channels, deep, 3) | _conv("decoder.conv_out", channels[0], 3, 3)
    shapes |= _levels("encoder", channels, channels[0], 2, len(channels) - 1, "downsample")
    shapes |= _levels("decoder", channels[::-1], deep, 3, 0, "upsample")
    for name, last in (("encoder", deep), ("decoder", channels[0])):
        shapes |= _res(f"{name}.mid.0", deep, deep) | _attn(f"{name}.mid.1", deep) | _res(f"{name}.mid.2", deep, deep)
        shapes |= _norm(f"{name}.norm_out", last)
    shapes |= _conv("quant_conv", latent_channels, codebook_dim, 1) | _conv("post_quant_conv", codebook_dim, latent_channels, 1)
    return shapes | {"quantize.embedding.weight": (codebook_size, codebook_dim), "quantize.codebook_used": (65536,)}


def random_state_dict(shapes: Shapes, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights that keep the scale of what passes through; norms near 1."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            tensors[name] = noise if "emb" in name or "reg_tokens" in name else noise / noise[0].numel() ** 0.5
        else:
            tensors[name] = 0.2 * noise + name.endswith("weight")
    if "head.weight" in tensors:
        tensors["tok_emb.weight"] *= 0.2
        tensors["head.weight"] = tensors["tok_emb.weight"]
    if "quantize.codebook_used" in tensors:
        tensors["quantize.codebook_used"] = torch.zeros(shapes["quantize.codebook_used"])
    return tensors


def write_maskgit_checkpoint(
    folder: Path,
    *,
    hidden_size: int = 384,
    num_heads: int = 6,
    num_layers: int = 1,
    intermediate_size: int = 64,
    sample_size: int = 4,
    codebook_size: int = 64,
    num_classes: int = 1000,
    vq_channels: Sequence[int] = (32, 32, 32, 32, 32),
    prefix: str = "module._orig_mod.",
    seed: int = 0,
) -> Path:
    """Writes the transformer's file, which is returned, and the tokenizer's beside it.

    Without other settings it is small in all but the hidden size, which tells the number of heads (384 and 512: 6).
    """
    shapes = maskgit_shapes(hidden_size, num_layers, num_heads, intermediate_size, sample_size, codebook_size, num_classes)
    model = {prefix + name: tensor for name, tensor in random_state_dict(shapes, seed).items()}
    moments = {"step": torch.tensor(10.0), "exp_avg": torch.zeros(4), "exp_avg_sq": torch.zeros(4)}
    optimizer = {"state": {0: moments}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999), "params": [0]}]}
    checkpoint = {"iter": 10, "global_epoch": 1, "model_state_dict": model, "optimizer_state_dict": optimizer}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, folder / MASKGIT_FILE)
    torch.save({"model": random_state_dict(vq_shapes(vq_channels, 32, codebook_size), seed + 1)}, folder / VQ_FILE)
    return folder / MASKGIT_FILE
