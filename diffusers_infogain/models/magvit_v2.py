"""MAGVIT-v2 (arXiv 2310.05737), the image tokenizer of Show-o and MMaDA: a grid of codes, each of which is 13 signs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch

# Keep the name `ModelMixin` in this module: diffusers looks for it here to find out how to load a component.
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn
from torch.nn import functional as F

from ..checkpoints.configs import own_fields
from ..checkpoints.source import ModelSource
from ..checkpoints.weights import find_weights

WEIGHT_NAMES = ("pytorch_model.safetensors", "model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin")


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """The group normalization before every activation."""
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1 × 1 convolution on x where the number of channels changes."""

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)
        self.changes_channels = in_channels != out_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, h, w) to (B, out_channels, h, w)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if self.changes_channels else x)


class AttentionBlock(nn.Module):
    """x + attention over all positions, with one head."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, channels, h, w) to the same shape."""
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(attended.transpose(1, 2).reshape(x.shape))


class BinaryCodes(nn.Module):
    """Codes and their sign vectors: entry i of a vector is +1 if bit i of the code, counted from the highest, is 1, else -1."""

    power_vals: torch.Tensor
    embedding: torch.Tensor

    def __init__(self, bits: int):
        super().__init__()
        exponents = torch.arange(bits - 1, -1, -1)
        self.register_buffer("power_vals", 2**exponents)
        self.register_buffer("embedding", 2.0 * (torch.arange(2**bits)[:, None] >> exponents & 1) - 1)

    def codes(self, z: torch.Tensor) -> torch.Tensor:
        """Codes (B, h, w) long from the signs of real numbers (B, bits, h, w)."""
        return ((z > 0).movedim(1, -1) * self.power_vals).sum(-1)

    def vectors(self, codes: torch.Tensor) -> torch.Tensor:
        """Sign vectors (B, bits, h, w) of integer codes (B, h, w)."""
        return self.embedding[codes].movedim(-1, 1)


def residual_blocks(in_channels: int, out_channels: int, count: int, groups: int) -> nn.Sequential:
    """The blocks at one resolution; the first of the `count` blocks changes the number of channels."""
    return nn.Sequential(*(ResidualBlock(out_channels if i else in_channels, out_channels, groups) for i in range(count)))


def middle(channels: int, groups: int) -> nn.Sequential:
    """The middle blocks, at the lowest resolution; only here is attention."""
    return nn.Sequential(
        OrderedDict(
            block_1=ResidualBlock(channels, channels, groups),
            attn_1=AttentionBlock(channels, groups),
            block_2=ResidualBlock(channels, channels, groups),
        )
    )


def make_encoder(widths: Sequence[int], blocks: Sequence[int], bits: int, groups: int) -> nn.Sequential:
    """From an image to `bits` numbers per position.

    Args:
        widths: Channels of the first layer, then of each resolution, from high to low.
        blocks: Residual blocks at each resolution, from high to low.
        bits: Bits of a code.
        groups: Groups of the normalizations.
    """
    levels = []
    for index, count in enumerate(blocks):
        width = widths[index + 1]
        level = nn.Sequential(OrderedDict(block=residual_blocks(widths[index], width, count, groups)))
        if index < len(blocks) - 1:
            conv = nn.Conv2d(width, width, 3, stride=2)
            level.add_module("downsample", nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=conv)))
        levels.append(level)
    return nn.Sequential(
        OrderedDict(
            conv_in=nn.Conv2d(3, widths[0], 3, padding=1),
            down=nn.Sequential(*levels),
            mid=middle(widths[-1], groups),
            norm_out=group_norm(widths[-1], groups),
            activation=nn.SiLU(),
            conv_out=nn.Conv2d(widths[-1], bits, 3, padding=1),
            quant_conv=nn.Conv2d(bits, bits, 1),
        )
    )


def make_decoder(widths: Sequence[int], blocks: Sequence[int], bits: int, groups: int) -> nn.Sequential:
    """From `bits` signs per position to an image.

    Levels run from the lowest resolution to the highest, but their names count from the highest.

    Args:
        widths: Channels of each resolution, from high to low.
        blocks: Residual blocks at each resolution, from high to low.
        bits: Bits of a code.
        groups: Groups of the normalizations.
    """
    levels: OrderedDict[str, nn.Module] = OrderedDict()
    previous = widths[-1]
    for index in reversed(range(len(blocks))):
        level = nn.Sequential(OrderedDict(block=residual_blocks(previous, widths[index], blocks[index], groups)))
        previous = widths[index]
        if index > 0:
            conv = nn.Conv2d(previous, previous, 3, padding=1)
            level.add_module("upsample", nn.Sequential(OrderedDict(repeat=nn.Upsample(scale_factor=2.0), conv=conv)))
        levels[str(index)] = level
    return nn.Sequential(
        OrderedDict(
            post_quant_conv=nn.Conv2d(bits, bits, 1),
            conv_in=nn.Conv2d(bits, widths[-1], 3, padding=1),
            mid=middle(widths[-1], groups),
            up=nn.Sequential(levels),
            norm_out=group_norm(widths[0], groups),
            activation=nn.SiLU(),
            conv_out=nn.Conv2d(widths[0], 3, 3, padding=1),
        )
    )


def check_config(integers: dict[str, int], lists: dict[str, Sequence[int]]) -> None:
    """Raises a ValueError for the first size with which no model can be built.

    Args:
        integers: Arguments that are one size, by name.
        lists: Arguments that are one size per resolution, by name.
    """

    def positive(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value > 0

    for name, value in integers.items():
        if not positive(value):
            raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")
    if integers["channels"] % integers["norm_groups"]:
        raise ValueError(f"`norm_groups` must divide `channels` = {integers['channels']}, got {integers['norm_groups']}.")
    num_levels = len(lists["encoder_multipliers"])
    for name, values in lists.items():
        if not values or not all(map(positive, values)):
            raise ValueError(f"`{name}` must be a non-empty list of positive integers, got {values!r}.")
        if len(values) != num_levels:
            raise ValueError(f"`{name}` must have as many entries as `encoder_multipliers`, {num_levels}, got {values!r}.")


class MagvitV2Model(ModelMixin, ConfigMixin):
    """The tokenizer, with the defaults and the tensor names of `showlab/magvitv2`.

    `from_pretrained` keeps the model in float32, as it was published, whatever `torch_dtype` is, also within a pipeline:
    rounding to bfloat16 changes pixels and the signs of numbers near 0. `to(torch.bfloat16)` does convert it.

    Args:
        channels: Channels at the highest resolution, before the multiplier.
        encoder_multipliers: Factor on `channels` at each resolution, the highest first; each resolution is half the previous one.
        encoder_blocks: Number of residual blocks at each resolution, the highest first.
        decoder_multipliers: As `encoder_multipliers`.
        decoder_blocks: As `encoder_blocks`.
        bits: Bits of a code.
        norm_groups: Groups of the normalizations.
    """

    _keep_in_fp32_modules = ["encoder", "decoder", "quantize"]
    _supports_group_offloading = False  # `encode` and `decode` run without `forward`, as in diffusers' VQModel
    _no_split_modules = ["ResidualBlock", "AttentionBlock"]

    @register_to_config
    def __init__(
        self,
        channels: int = 128,
        encoder_multipliers: Sequence[int] = (1, 2, 2, 4, 4),
        encoder_blocks: Sequence[int] = (4, 3, 4, 3, 4),
        decoder_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        decoder_blocks: Sequence[int] = (4, 4, 3, 4, 3),
        bits: int = 13,
        norm_groups: int = 32,
    ):
        super().__init__()
        check_config(
            {"channels": channels, "bits": bits, "norm_groups": norm_groups},
            {
                "encoder_multipliers": encoder_multipliers,
                "encoder_blocks": encoder_blocks,
                "decoder_multipliers": decoder_multipliers,
                "decoder_blocks": decoder_blocks,
            },
        )
        encoder_widths = [channels, *(channels * factor for factor in encoder_multipliers)]
        decoder_widths = [channels * factor for factor in decoder_multipliers]
        self.encoder = make_encoder(encoder_widths, encoder_blocks, bits, norm_groups)
        self.decoder = make_decoder(decoder_widths, decoder_blocks, bits, norm_groups)
        self.quantize = BinaryCodes(bits)

    @property
    def codebook_size(self) -> int:
        """Number of codes, 2 ** bits."""
        return 2**self.config.bits

    @property
    def scale_factor(self) -> int:
        """Pixels per code along each side."""
        return 2 ** (len(self.config.encoder_multipliers) - 1)

    @apply_forward_hook
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Encodes images to codes.

        Args:
            images: (B, 3, H, W) floating point in [-1, 1], with sides that are multiples of `scale_factor`.

        Returns:
            (B, H / scale_factor, W / scale_factor) long.

        Raises:
            ValueError: For another shape or dtype.
        """
        if not images.is_floating_point():
            raise ValueError(f"`images` must be floating point in [-1, 1], got {images.dtype}.")
        factor = self.scale_factor
        if images.ndim != 4 or images.shape[1] != 3 or any(side < factor or side % factor for side in images.shape[2:]):
            raise ValueError(
                f"`images` must be of shape (B, 3, H, W) with H and W positive multiples of {factor}, got {tuple(images.shape)}."
            )
        return self.quantize.codes(self.encoder(images.to(self.dtype)))

    @apply_forward_hook
    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Decodes codes to images.

        Args:
            tokens: (B, h, w) int32 or int64 from 0 to `codebook_size` - 1; h and w may differ.

        Returns:
            (B, 3, h * scale_factor, w * scale_factor), roughly in [-1, 1] but not clamped: `((x + 1) / 2).clamp(0, 1)` is the
            image.

        Raises:
            ValueError: For another shape or dtype, or an invalid code. A compiled model does not check the codes.
        """
        if tokens.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"`tokens` must be int32 or int64, got {tokens.dtype}.")
        if tokens.ndim != 3 or not tokens.numel():
            raise ValueError(f"`tokens` must be of shape (B, h, w) and not empty, got {tuple(tokens.shape)}.")
        if not torch.compiler.is_compiling():
            low, high = tokens.min().item(), tokens.max().item()
            if low < 0 or high >= self.codebook_size:
                raise ValueError(f"`tokens` must be codes from 0 to {self.codebook_size - 1}, got codes from {low} to {high}.")
        return self.decoder(self.quantize.vectors(tokens))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Reconstructs images: encodes and decodes them."""
        return self.decode(self.encode(images))


def open_magvit_v2(folder: Path) -> ModelSource:
    """Opens the tokenizer in a published folder, whose config.json has no sizes, or in one that `save_pretrained` wrote.

    Raises:
        ValueError: If the folder has no config.json or no weights, or its sizes are invalid.
    """
    config = own_fields(MagvitV2Model, folder / "config.json")
    return ModelSource(find_weights(folder, WEIGHT_NAMES), lambda: MagvitV2Model(**config), _probe)


@torch.no_grad()
def _probe(model: MagvitV2Model) -> torch.Tensor:
    return model.decode(torch.arange(4).view(1, 2, 2) * 5 % model.codebook_size)
