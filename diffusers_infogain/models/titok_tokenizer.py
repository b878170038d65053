"""TiTok, the one-dimensional image tokenizer of arXiv 2406.07550: an image is a line of 32 to 256 codes, none of which has a
place in it; and TA-TiTok (arXiv 2501.07730), whose decoder also reads a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

# Keep the name `ModelMixin` in this module: diffusers looks for it here to find out how to load a component.
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from .titok_blocks import PixelDecoder, TiTokBlock


class TiTokVision(nn.Module):
    """What encoder and decoder have in common: a transformer over [class, one position per patch, one per code].

    Args:
        num_patches, num_tokens: Patches of an image, and its codes.
        width, num_layers, num_heads: Of the transformer.
    """

    def __init__(self, num_patches: int, num_tokens: int, width: int, num_layers: int, num_heads: int):
        super().__init__()
        scale = width**-0.5
        self.class_embedding = nn.Parameter(scale * torch.randn(1, width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(num_patches + 1, width))
        self.latent_token_positional_embedding = nn.Parameter(scale * torch.randn(num_tokens, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.ModuleList(TiTokBlock(width, num_heads, 4 * width) for _ in range(num_layers))
        self.ln_post = nn.LayerNorm(width)

    def run(
        self,
        patches: torch.Tensor,
        tokens: torch.Tensor,
        text: torch.Tensor | None = None,
        seen: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The transformer's outputs (B, 1 + P + N + S, D), before `ln_post`.

        Args:
            patches: (B, P, D).
            tokens: (B, N, D).
            text: (B, S, D), if there is one.
            seen: (B, N) bool, the tokens that are not hidden; by default all.
        """
        first = self.class_embedding.expand(len(patches), 1, -1)
        x = torch.cat([first, patches], dim=1) + self.positional_embedding
        x = torch.cat([x, tokens + self.latent_token_positional_embedding, *([] if text is None else [text])], dim=1)
        if seen is not None:
            rest = x.shape[1] - patches.shape[1] - 1 - tokens.shape[1]
            seen = F.pad(seen, (patches.shape[1] + 1, rest), value=True)
        x = self.ln_pre(x)
        for block in self.transformer:
            x = block(x, seen=seen)
        return x


class TiTokEncoder(TiTokVision):
    """From an image to a vector for each code.

    Args:
        legacy: Whether vectors are read off as the first models do: transposed by a reshape.
        size: (num_patches, num_tokens, width, num_layers, num_heads), as in `TiTokVision`.
    """

    def __init__(self, patch_size: int, token_size: int, legacy: bool, *size: int):
        super().__init__(*size)
        width = size[2]
        self.legacy = legacy
        self.patch_embed = nn.Conv2d(3, width, patch_size, stride=patch_size)
        self.conv_out = nn.Conv2d(width, token_size, 1)
        self.latent_tokens = nn.Parameter(width**-0.5 * torch.randn(size[1], width))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Vectors (B, N, token_size) of pixels (B, 3, H, W) in [0, 1]."""
        patches = self.patch_embed(pixels).flatten(2).transpose(1, 2)
        x = self.run(patches, self.latent_tokens.expand(len(pixels), -1, -1))
        x = self.ln_post(x[:, 1 + patches.shape[1] :])  # (B, N, D)
        x = x.reshape(len(x), x.shape[2], x.shape[1]) if self.legacy else x.transpose(1, 2)
        return self.conv_out(x[..., None])[..., 0].transpose(1, 2)


class TiTokDecoder(TiTokVision):
    """From a vector for each code to what is at each patch: scores of the pixel decoder's codes, or pixels.

    Args:
        out_size: Number of the pixel decoder's codes, or None for pixels.
        text_size: (width, length) of the text that it reads, or None.
        size: (num_patches, num_tokens, width, num_layers, num_heads), as in `TiTokVision`.
    """

    def __init__(self, patch_size: int, token_size: int, out_size: int | None, text_size: tuple[int, int] | None, *size: int):
        super().__init__(*size)
        num_patches, width = size[0], size[2]
        scale = width**-0.5
        self.num_patches, self.patch_size, self.legacy = num_patches, patch_size, out_size is not None
        self.decoder_embed = nn.Linear(token_size, width)
        self.mask_token = nn.Parameter(scale * torch.randn(1, 1, width))
        if text_size is not None:
            self.text_guidance_proj = nn.Linear(text_size[0], width)
            self.text_guidance_positional_embedding = nn.Parameter(scale * torch.randn(text_size[1], width))
        if out_size is not None:
            self.ffn = nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.Tanh(), nn.Conv2d(2 * width, out_size, 1))
        else:
            self.ffn = nn.Sequential(nn.Conv2d(width, 3 * patch_size**2, 1))
            self.conv_out = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, vectors: torch.Tensor, text: torch.Tensor | None = None, seen: torch.Tensor | None = None) -> torch.Tensor:
        """(B, out_size, h, w) scores or (B, 3, H, W) pixels, from vectors (B, N, token_size) and text (B, S, text_width)."""
        if text is not None:
            text = self.text_guidance_proj(text) + self.text_guidance_positional_embedding
        patches = self.mask_token.expand(len(vectors), self.num_patches, -1)
        x = self.run(patches, self.decoder_embed(vectors), text, seen)
        x = self.ln_post(x[:, 1 : 1 + self.num_patches])
        side = round(self.num_patches**0.5)
        x = self.ffn(x.transpose(1, 2).unflatten(2, (side, side)))
        if self.legacy:
            return x
        # Of the channels of a patch, color is the fastest.
        x = x.unflatten(1, (self.patch_size, self.patch_size, 3)).permute(0, 3, 4, 1, 5, 2)
        return self.conv_out(x.flatten(4, 5).flatten(2, 3))


class CodeEmbedding(nn.Embedding):
    """Codes and their vectors in both directions, in one module, so that offloading hooks work for both."""

    def __init__(self, codebook_size: int, token_size: int, use_l2_norm: bool):
        super().__init__(codebook_size, token_size)
        self.use_l2_norm = use_l2_norm

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Codes (B, N) to vectors (B, N, token_size), and vectors to the nearest codes, by direction with `use_l2_norm`."""
        if not input.is_floating_point():
            found = super().forward(input)
            return F.normalize(found, dim=-1) if self.use_l2_norm else found
        vectors, codebook = input.float(), self.weight.float()
        if self.use_l2_norm:
            vectors, codebook = F.normalize(vectors, dim=-1), F.normalize(codebook, dim=-1)
        return (codebook.square().sum(-1) - 2 * vectors @ codebook.T).argmin(-1)


class TiTokCodebook(nn.Module):
    """The codes of an image."""

    def __init__(self, codebook_size: int, token_size: int, use_l2_norm: bool):
        super().__init__()
        self.embedding = CodeEmbedding(codebook_size, token_size, use_l2_norm)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As `CodeEmbedding`."""
        return self.embedding(input)


class PixelCodebook(nn.Embedding):
    """The codes of the pixel decoder, which are mixed by their probabilities."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(B, width, h, w) of scores (B, codes, h, w)."""
        return torch.einsum("bchw,cd->bdhw", input.softmax(1), self.weight)


class TiTokTokenizer(ModelMixin, ConfigMixin):
    """The tokenizer, with the tensor names of the published models but for those of the attention and feed-forward layers.

    `from_pretrained` keeps the model in float32, as it was published, whatever `dtype` is: rounding changes codes and pixels.

    Args:
        image_size: Side of the images, the only one, in pixels.
        patch_size: Side of a patch.
        num_tokens: N, the codes of an image.
        codebook_size, token_size: Number of codes, and the width of their vectors.
        use_l2_norm: Whether vectors are compared by their directions.
        encoder_width, encoder_layers, encoder_heads, decoder_width, decoder_layers, decoder_heads: Of the two transformers: (512,
            8, 8) small, (768, 12, 12) base, (1024, 24, 16) large.
        pixel_codebook_size: Codes of MaskGIT's VQGAN, whose decoder makes the pixels of the first models; None for models that
            predict pixels themselves.
        pixel_embed_dim, pixel_channels, pixel_blocks, pixel_groups: Width of its codes, channels by resolution from high to low,
            residual blocks at each of them, and groups of the normalizations.
        text_embed_dim, text_length: Width and length of the text that a TA-TiTok reads; None for a TiTok.

    Raises:
        ValueError: If sizes contradict each other.
    """

    _keep_in_fp32_modules = ["encoder", "decoder", "quantize", "pixel_quantize", "pixel_decoder"]
    _no_split_modules = ["TiTokBlock", "PixelBlock"]

    @register_to_config
    def __init__(
        self,
        image_size: int = 256,
        patch_size: int = 16,
        num_tokens: int = 32,
        codebook_size: int = 4096,
        token_size: int = 12,
        use_l2_norm: bool = True,
        encoder_width: int = 1024,
        encoder_layers: int = 24,
        encoder_heads: int = 16,
        decoder_width: int = 1024,
        decoder_layers: int = 24,
        decoder_heads: int = 16,
        pixel_codebook_size: int | None = 1024,
        pixel_embed_dim: int = 256,
        pixel_channels: Sequence[int] = (128, 128, 256, 256, 512),
        pixel_blocks: int = 2,
        pixel_groups: int = 32,
        text_embed_dim: int | None = None,
        text_length: int = 77,
    ):
        super().__init__()
        sizes = {"encoder": (encoder_width, encoder_heads), "decoder": (decoder_width, decoder_heads)}
        for name, (width, heads) in sizes.items():
            if heads < 1 or width % heads:
                raise ValueError(f"`{name}_heads` must divide `{name}_width` = {width}, got {heads}.")
        if patch_size < 1 or image_size % patch_size:
            raise ValueError(f"`patch_size` must divide `image_size` = {image_size}, got {patch_size}.")
        if pixel_codebook_size is not None and 2 ** (len(pixel_channels) - 1) != patch_size:
            raise ValueError(
                f"`pixel_channels` must have an entry for each resolution from a patch of {patch_size} pixels to one, got "
                f"{len(pixel_channels)} entries."
            )
        layout = ((image_size // patch_size) ** 2, num_tokens)
        legacy = pixel_codebook_size is not None
        encoder = (*layout, encoder_width, encoder_layers, encoder_heads)
        self.encoder = TiTokEncoder(patch_size, token_size, legacy, *encoder)
        text_size = None if text_embed_dim is None else (text_embed_dim, text_length)
        decoder = (*layout, decoder_width, decoder_layers, decoder_heads)
        self.decoder = TiTokDecoder(patch_size, token_size, pixel_codebook_size, text_size, *decoder)
        self.quantize = TiTokCodebook(codebook_size, token_size, use_l2_norm)
        if pixel_codebook_size is not None:
            self.pixel_quantize = PixelCodebook(pixel_codebook_size, pixel_embed_dim)
            self.pixel_decoder = PixelDecoder(pixel_embed_dim, pixel_channels, pixel_blocks, pixel_groups)

    @apply_forward_hook
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encodes images to codes.

        Args:
            pixels: (B, 3, H, W) floating point in [0, 1], of the model's only size.

        Returns:
            (B, N) long.

        Raises:
            ValueError: For another shape or dtype.
        """
        side = self.config.image_size
        if not pixels.is_floating_point() or pixels.shape[1:] != (3, side, side):
            raise ValueError(
                f"`pixels` must be floating point of shape (B, 3, {side}, {side}), got {pixels.dtype} {tuple(pixels.shape)}."
            )
        return self.quantize(self.encoder(pixels.to(self.dtype)))

    @apply_forward_hook
    def decode(self, tokens: torch.Tensor, text: torch.Tensor | None = None, seen: torch.Tensor | None = None) -> torch.Tensor:
        """Decodes codes to images.

        Args:
            tokens: (B, N) long.
            text: (B, S, text_embed_dim), the hidden states of the text that a TA-TiTok reads; None for a TiTok.
            seen: (B, N) bool, the codes that are known. The others are left out, which the models were not trained for: a sketch
                of an image that is not finished.

        Returns:
            (B, 3, H, W), roughly in [0, 1] but not clamped.

        Raises:
            ValueError: For shapes or codes that do not fit. A compiled model does not check the codes.
        """
        self._check(tokens, text, seen)
        decoded = self.decoder(self.quantize(tokens), None if text is None else text.to(self.dtype), seen)
        if self.config.pixel_codebook_size is None:
            return decoded
        return self.pixel_decoder(self.pixel_quantize(decoded))

    def _check(self, tokens: torch.Tensor, text: torch.Tensor | None, seen: torch.Tensor | None) -> None:
        config = self.config
        if tokens.ndim != 2 or tokens.shape[1] != config.num_tokens or tokens.dtype != torch.long:
            found = f"{tokens.dtype} {tuple(tokens.shape)}"
            raise ValueError(f"`tokens` must be long of shape (B, {config.num_tokens}), got {found}.")
        shape = None if config.text_embed_dim is None else (len(tokens), config.text_length, config.text_embed_dim)
        if (None if text is None else tuple(text.shape)) != shape:
            wanted = "None: this model reads no text" if shape is None else f"of shape {shape}"
            raise ValueError(f"`text` must be {wanted}, got {None if text is None else tuple(text.shape)}.")
        if seen is not None and (seen.dtype != torch.bool or seen.shape != tokens.shape):
            raise ValueError(f"`seen` must be bool of shape {tuple(tokens.shape)}, got {seen.dtype} {tuple(seen.shape)}.")
        if not torch.compiler.is_compiling() and tokens.numel():
            low, high = tokens.min().item(), tokens.max().item()
            if low < 0 or high >= config.codebook_size:
                raise ValueError(f"`tokens` must be codes from 0 to {config.codebook_size - 1}, got codes from {low} to {high}.")

    def forward(self, pixels: torch.Tensor, text: torch.Tensor | None = None) -> torch.Tensor:
        """Reconstructs images: encodes and decodes them."""
        return self.decode(self.encode(pixels), text)


KEY_MAPPING = {
    r"^latent_tokens$": "encoder.latent_tokens",
    r"(transformer\.\d+)\.ln_([12])\.": r"\1.norm\2.",
    r"\.attn\.in_proj_(weight|bias)$": r".attn.qkv.\1",
    r"\.attn\.out_proj\.": ".attn.proj.",
    r"\.mlp\.c_fc\.": ".mlp.fc1.",
    r"\.mlp\.c_proj\.": ".mlp.fc2.",
    r"^pixel_quantize\.embedding\.": "pixel_quantize.",
}
"""The model's names for the parts of the published keys."""

UNUSED_KEYS = r"quantize\.embed_prob$"
"""Training's record of which codes were used."""


@torch.no_grad()
def probe(model: TiTokTokenizer) -> Any:
    """The pixels of fixed codes, for `ModelSource.probe`."""
    config = model.config
    tokens = torch.arange(config.num_tokens)[None] * 7 % config.codebook_size
    text = None
    if config.text_embed_dim is not None:
        text = torch.linspace(-1, 1, config.text_length * config.text_embed_dim).view(1, config.text_length, -1)
    return model.decode(tokens, text)
