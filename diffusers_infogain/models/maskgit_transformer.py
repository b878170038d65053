"""The class-to-image transformer of Halton-MaskGIT.

"Halton Scheduler for Masked Generative Image Transformer", arXiv 2503.17076. A bidirectional transformer over the
tokens of an image; the embedding of the class modulates its blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F

# Keep the name `ModelMixin` in this module: diffusers looks for it here to find out how to load a component.
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from ..checkpoints.source import ModelSource, renamed
from ..checkpoints.weights import Checkpoint
from .class_inputs import check_class_inputs

NORM_EPS = 1e-5
PUBLISHED_HEADS = {384: 6, 512: 6, 768: 12, 1024: 16, 1152: 16}
"""Attention heads by hidden size: tiny, small, base, large, and one that the training code has but nobody published."""


class TiedEmbedding(nn.Embedding):
    """Input embedding and output head with one weight: long ids give embeddings, float hidden states give logits.

    It is one module, so that offloading hooks, which move the weights of a module when it runs, work for both.
    """

    def __init__(self, vocab_size: int, hidden_size: int, codebook_size: int):
        super().__init__(vocab_size, hidden_size)
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        self.codebook_size = codebook_size

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Ids (...) to (..., hidden size); hidden states (..., hidden size) to logits (..., codebook size)."""
        if input.is_floating_point():
            return F.linear(input, self.weight[: self.codebook_size], self.bias[: self.codebook_size])
        return super().forward(input)


class BiasedRMSNorm(nn.RMSNorm):
    """RMS normalization with a scale and a shift."""

    def __init__(self, hidden_size: int):
        super().__init__(hidden_size, eps=NORM_EPS)
        self.bias = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., hidden size) to the same shape."""
        return super().forward(x) + self.bias


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x · (1 + scale) + shift, with x (B, L, D) and one shift and one scale (B, 1, D) per sample."""
    return x * (1 + scale) + shift


def modulation(hidden_size: int, parts: int) -> nn.Sequential:
    """The layer that computes `parts` vectors of modulation from the condition."""
    return nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, parts * hidden_size))


class MaskGITAttention(nn.Module):
    """Full self-attention. Heads are hidden_size // num_heads wide, so together they may be narrower than the input."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        width = num_heads * (hidden_size // num_heads)
        self.wq = nn.Linear(hidden_size, width, bias=False)
        self.wk = nn.Linear(hidden_size, width, bias=False)
        self.wv = nn.Linear(hidden_size, width, bias=False)
        self.wo = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, D) to (B, L, D)."""
        # Queries and keys are normalised over all heads jointly, without a learned scale.
        q, k = (F.rms_norm(y, y.shape[-1:], eps=NORM_EPS) for y in (self.wq(x), self.wk(x)))
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (q, k, self.wv(x)))
        return self.wo(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MaskGITFeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) · w3 x)."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.w1 = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.w2 = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.w3 = nn.Linear(hidden_size, intermediate_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, D) to (B, L, D)."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class MaskGITBlock(nn.Module):
    """Attention and feed-forward, each with a modulated norm before and a gate after it."""

    def __init__(self, hidden_size: int, num_heads: int, intermediate_size: int):
        super().__init__()
        self.mlp = modulation(hidden_size, 6)
        self.ln1 = nn.RMSNorm(hidden_size, eps=NORM_EPS)
        self.attn = MaskGITAttention(hidden_size, num_heads)
        self.ln2 = nn.RMSNorm(hidden_size, eps=NORM_EPS)
        self.ff = MaskGITFeedForward(hidden_size, intermediate_size)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """(B, L, D) from `x` (B, L, D) and the `condition` (B, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.mlp(condition)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attn(modulate(self.ln1(x), shift1, scale1))
        return x + gate2 * self.ff(modulate(self.ln2(x), shift2, scale2))


class MaskGITLastNorm(nn.Module):
    """The modulated norm before the head."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.norm_final = BiasedRMSNorm(hidden_size)
        self.mlp = modulation(hidden_size, 2)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """(B, L, D) from `x` (B, L, D) and the `condition` (B, D)."""
        shift, scale = self.mlp(condition)[:, None].chunk(2, dim=-1)
        return modulate(self.norm_final(x), shift, scale)


class MaskGITTransformer2DModel(ModelMixin, ConfigMixin):
    """Predicts the masked tokens of a square image of `sample_size` x `sample_size` tokens, given its class.

    Args:
        sample_size: Tokens per side: 16 for images of 256 x 256 pixels, 24 for 384 x 384.
        hidden_size, num_hidden_layers, num_attention_heads: (384, 6, 6) tiny, (512, 12, 6) small, (768, 12, 12) base,
            (1024, 24, 16) large.
        intermediate_size: Width of the feed-forward layers: 1024, 1536, 2048 and 2816 in those sizes.
        codebook_size: Number of image tokens.
        vocab_size: Number of token ids; the last one is the mask.
        num_classes: Number of classes; the label `num_classes` stands for no class.
        num_registers: Number of learned tokens after those of the image.

    Raises:
        ValueError: If sizes contradict each other.
    """

    _no_split_modules = ["MaskGITBlock"]
    _repeated_blocks = ["MaskGITBlock"]
    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        sample_size: int = 16,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 2048,
        codebook_size: int = 16384,
        vocab_size: int = 16385,
        num_classes: int = 1000,
        num_registers: int = 1,
    ):
        super().__init__()
        self.gradient_checkpointing = False
        if not 0 < num_attention_heads <= hidden_size:
            raise ValueError(f"`num_attention_heads` must be in [1, `hidden_size` = {hidden_size}], got {num_attention_heads}.")
        if vocab_size <= codebook_size:
            raise ValueError(f"`vocab_size` must be above `codebook_size` = {codebook_size}, got {vocab_size}.")
        self.cls_emb = nn.Embedding(num_classes + 1, hidden_size)
        self.tok_emb = TiedEmbedding(vocab_size, hidden_size, codebook_size)
        self.pos_emb = nn.Embedding(sample_size**2, hidden_size)
        self.reg_tokens = nn.Embedding(num_registers, hidden_size)
        self.layers = nn.ModuleList(
            MaskGITBlock(hidden_size, num_attention_heads, intermediate_size) for _ in range(num_hidden_layers)
        )
        self.last_norm = MaskGITLastNorm(hidden_size)

    def forward(self, tokens: torch.Tensor, class_labels: torch.Tensor, where: torch.Tensor | None = None) -> torch.Tensor:
        """Logits over the codebook, without the mask.

        Args:
            tokens: (B, L) long, in raster order, the mask at undecided positions; L = `sample_size`².
            class_labels: (B,) long, `num_classes` for no class.
            where: (B, L) bool, the positions whose logits to compute; all by default.

        Returns:
            (B, L, codebook size), or with `where` (M, codebook size) for its M positions, in row-major order.

        Raises:
            ValueError: For shapes, ids or labels that do not fit the model. A compiled model does not check values.
        """
        config = self.config
        sizes = {"length": config.sample_size**2, "last_token": config.vocab_size - 1, "num_classes": config.num_classes}
        check_class_inputs(tokens, class_labels, where, **sizes)
        batch, length = tokens.shape
        condition = self.cls_emb(class_labels)
        hidden = self.tok_emb(tokens) + self.pos_emb(torch.arange(length, device=tokens.device))
        registers = self.reg_tokens(torch.arange(self.config.num_registers, device=tokens.device))
        hidden = torch.cat([hidden, registers.expand(batch, -1, -1)], dim=1)
        for layer in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden = self._gradient_checkpointing_func(layer, hidden, condition)
            else:
                hidden = layer(hidden, condition)
        hidden = self.last_norm(hidden[:, :length], condition)
        return self.tok_emb(hidden if where is None else hidden[where])


KEY_MAPPING = {
    r"module\.|_orig_mod\.": "",  # of DistributedDataParallel and torch.compile
    r"^head\.bias$": "tok_emb.bias",
    r"^transformer\.": "",
}
"""The model's names for the parts of the published keys."""

UNUSED_KEYS = r"head\.weight$"
"""The head's weight, which is that of the token embedding: `check_tied_head`."""


def check_tied_head(state_dict: Mapping[str, torch.Tensor]) -> None:
    """Raises a ValueError if the weight of the head, which is not loaded, differs from that of the token embedding."""
    tensors = {renamed(key, KEY_MAPPING): tensor for key, tensor in state_dict.items()}
    head, tokens = tensors.get("head.weight"), tensors["tok_emb.weight"]
    if head is not None and not torch.equal(head, tokens):
        raise ValueError("`head.weight` must equal `tok_emb.weight`, as in the published checkpoints, but it differs.")


def config_from_state_dict(shapes: Mapping[str, tuple[int, ...]], num_attention_heads: int | None = None) -> dict[str, int]:
    """The arguments of `MaskGITTransformer2DModel` for a published checkpoint, from the names and shapes of its tensors.

    Args:
        num_attention_heads: Required for a hidden size that was not published, because shapes do not reveal it.

    Raises:
        ValueError: If a tensor is missing, or shapes contradict each other.
    """
    known = {renamed(key, KEY_MAPPING): tuple(shape) for key, shape in shapes.items()}
    names = ("cls_emb", "tok_emb", "pos_emb", "reg_tokens", "layers.0.attn.wq", "layers.0.ff.w1")
    if missing := [f"{name}.weight" for name in names if f"{name}.weight" not in known]:
        raise ValueError(f"`shapes` must be those of a Halton-MaskGIT checkpoint, but there is no {', '.join(missing)}.")
    (classes, hidden_size), (vocab_size, _), (length, _), (registers, _), (width, _), (intermediate_size, _) = (
        known[f"{name}.weight"] for name in names
    )
    if math.isqrt(length) ** 2 != length:
        raise ValueError(f"`pos_emb.weight` must have a square number of rows, got {length}.")
    heads = PUBLISHED_HEADS.get(hidden_size) if num_attention_heads is None else num_attention_heads
    if heads is None:
        raise ValueError(
            f"`num_attention_heads` must be given for the hidden size {hidden_size}: it is known only for "
            f"{', '.join(map(str, PUBLISHED_HEADS))}."
        )
    if heads * (hidden_size // heads) != width:
        raise ValueError(
            f"`num_attention_heads` = {heads} makes heads of {hidden_size // heads}, but `attn.wq.weight` has {width} rows."
        )
    return {
        "sample_size": math.isqrt(length),
        "hidden_size": hidden_size,
        "num_hidden_layers": len({name.split(".")[1] for name in known if name.startswith("layers.")}),
        "num_attention_heads": heads,
        "intermediate_size": intermediate_size,
        "codebook_size": vocab_size - 1,
        "vocab_size": vocab_size,
        "num_classes": classes - 1,
        "num_registers": registers,
    }


def open_maskgit(file: Path) -> ModelSource:
    """Opens the transformer in a published file.

    Raises:
        ValueError: If the file is of another family, or of a size that was not published.
    """
    checkpoint = Checkpoint([file], ("model_state_dict",))
    try:
        config = config_from_state_dict(checkpoint.shapes)
        check_tied_head({key: checkpoint.tensor(key) for key in checkpoint.shapes if "head.weight" in key or "tok_emb" in key})
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return ModelSource(checkpoint, lambda: MaskGITTransformer2DModel(**config), _probe, KEY_MAPPING, UNUSED_KEYS)


@torch.no_grad()
def _probe(model: MaskGITTransformer2DModel) -> torch.Tensor:
    tokens = torch.arange(model.config.sample_size**2)[None] * 7 % model.config.vocab_size
    return model(tokens, torch.tensor([model.config.num_classes // 2]), torch.arange(tokens.shape[1])[None] < 4)
