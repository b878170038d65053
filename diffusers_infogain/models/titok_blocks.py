"""What the networks of TiTok ("An Image is Worth 32 Tokens", arXiv 2406.07550) consist of: transformer blocks, convolutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


class TiTokAttention(nn.Module):
    """Full self-attention."""

    def __init__(self, width: int, num_heads: int, qkv_bias: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, seen: torch.Tensor | None = None) -> torch.Tensor:
        """(B, L, D) to (B, L, D); where `seen` (B, L) is False, a position is hidden from all."""
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        mask = None if seen is None else seen[:, None, None]
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class TiTokFeedForward(nn.Module):
    """fc2(gelu(fc1 x))."""

    def __init__(self, width: int, intermediate_size: int):
        super().__init__()
        self.fc1 = nn.Linear(width, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, D) to (B, L, D)."""
        return self.fc2(F.gelu(self.fc1(x)))


class TiTokBlock(nn.Module):
    """Attention and feed-forward, each with a norm before it; `skip` adds a layer for the output of an earlier block."""

    def __init__(self, width: int, num_heads: int, intermediate_size: int, qkv_bias: bool = True, skip: bool = False):
        super().__init__()
        self.skip_linear = nn.Linear(2 * width, width) if skip else None
        self.norm1 = nn.LayerNorm(width)
        self.attn = TiTokAttention(width, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = TiTokFeedForward(width, intermediate_size)

    def forward(self, x: torch.Tensor, skip: torch.Tensor | None = None, seen: torch.Tensor | None = None) -> torch.Tensor:
        """(B, L, D) from `x` and `skip` (B, L, D); `seen` as in `TiTokAttention`."""
        if self.skip_linear is not None and skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x), seen)
        return x + self.mlp(self.norm2(x))


class PixelBlock(nn.Module):
    """The residual block of MaskGIT's VQGAN: where the number of channels changes, the shortcut starts from the second
    convolution's output, not from the input."""

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.nin_shortcut = nn.Conv2d(out_channels, out_channels, 1, bias=False) if in_channels != out_channels else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, h, w) to (B, out_channels, h, w)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(h))


class PixelLevel(nn.Module):
    """The blocks at one resolution, and what doubles it."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, groups: int, upsample: bool):
        super().__init__()
        self.block = nn.ModuleList(
            PixelBlock(out_channels if i else in_channels, out_channels, groups) for i in range(num_blocks)
        )
        self.upsample_conv = nn.Conv2d(out_channels, out_channels, 3, padding=1) if upsample else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, h, w) to (B, out_channels, h, w), or twice as high and wide."""
        for block in self.block:
            x = block(x)
        return x if self.upsample_conv is None else self.upsample_conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class PixelDecoder(nn.Module):
    """The decoder of MaskGIT's VQGAN (arXiv 2202.04200).

    Args:
        in_channels: Width of a code.
        channels: Of each resolution, from high to low; each is half of the one before.
        num_blocks: Residual blocks at each resolution, and in the middle.
        groups: Of the normalizations.
    """

    def __init__(self, in_channels: int, channels: Sequence[int], num_blocks: int, groups: int):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, channels[-1], 3, padding=1)
        self.mid = nn.ModuleList(PixelBlock(channels[-1], channels[-1], groups) for _ in range(num_blocks))
        inputs = [*channels[1:], channels[-1]]
        self.up = nn.ModuleList(  # names count from the highest resolution
            PixelLevel(inputs[i], channels[i], num_blocks, groups, upsample=i > 0) for i in range(len(channels))
        )
        self.norm_out = nn.GroupNorm(groups, channels[0], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[0], 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, h, w) to pixels (B, 3, H, W), roughly in [0, 1]."""
        x = self.conv_in(x)
        for layer in (*self.mid, *reversed(self.up)):
            x = layer(x)
        return self.conv_out(F.silu(self.norm_out(x)))
