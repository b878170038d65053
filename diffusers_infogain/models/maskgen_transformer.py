"""The text-to-image transformer of MaskGen for discrete tokens (arXiv 2501.07730), over the line of codes of a TA-TiTok."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

# Keep the name `ModelMixin` in this module: diffusers looks for it here to find out how to load a component.
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.normalization import AdaLayerNormContinuous
from torch import nn

from ..checkpoints.source import ModelSource
from ..checkpoints.weights import Checkpoint
from ..checks import shown
from .titok_published import integer, section


class CodesAndHead(nn.Embedding):
    """Input embedding and output head with one weight, in one module, so that offloading hooks work for both."""

    def __init__(self, num_ids: int, hidden_size: int, codebook_size: int):
        super().__init__(num_ids, hidden_size)
        self.codebook_size = codebook_size

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Ids (...) to (..., hidden size); hidden states (..., hidden size) to logits (..., codebook size)."""
        return F.linear(input, self.weight[: self.codebook_size]) if input.is_floating_point() else super().forward(input)


class MaskGenTransformer(ModelMixin, ConfigMixin):
    """Predicts the masked codes of an image, given the embeddings of its prompt and an aesthetic score.

    Args:
        num_tokens: N, the codes of an image.
        hidden_size, num_hidden_layers, num_attention_heads: (1024, 16, 16) for L, (1280, 20, 16) for XL.
        codebook_size: Number of codes, and the id of the mask.
        text_embed_dim: Width of the text encoder's states and of its projected embedding.
        micro_cond_embed_dim: Width of the sinusoids of the aesthetic score; 0 for a model that is not conditioned on it.
        num_unused: Ids behind the mask that no input has.

    Raises:
        ValueError: If the heads do not share the width evenly.
    """

    _no_split_modules = ["JointTransformerBlock"]
    _repeated_blocks = ["JointTransformerBlock"]

    @register_to_config
    def __init__(
        self,
        num_tokens: int = 128,
        hidden_size: int = 1024,
        num_hidden_layers: int = 16,
        num_attention_heads: int = 16,
        codebook_size: int = 8192,
        text_embed_dim: int = 768,
        micro_cond_embed_dim: int = 256,
        num_unused: int = 1001,
    ):
        super().__init__()
        if num_attention_heads < 1 or hidden_size % num_attention_heads:
            raise ValueError(f"`num_attention_heads` must divide `hidden_size` = {hidden_size}, got {num_attention_heads}.")
        self.text_embed_proj = nn.Linear(text_embed_dim, hidden_size)
        self.cond_pooled_proj = nn.Linear(text_embed_dim + micro_cond_embed_dim, hidden_size)
        self.blocks = nn.ModuleList(
            JointTransformerBlock(
                hidden_size,
                num_attention_heads,
                hidden_size // num_attention_heads,
                context_pre_only=index == num_hidden_layers - 1,
            )
            for index in range(num_hidden_layers)
        )
        self.norm = AdaLayerNormContinuous(hidden_size, hidden_size, elementwise_affine=False, eps=1e-6)
        self.embeddings = CodesAndHead(codebook_size + 1 + num_unused, hidden_size, codebook_size)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, num_tokens, hidden_size))

    def forward(
        self,
        tokens: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_text_emb: torch.Tensor,
        aesthetic_scores: torch.Tensor,
        where: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits over the codes, without the mask.

        Args:
            tokens: (B, N) long, codes, and `codebook_size` where a code is masked.
            encoder_hidden_states: (B, S, text_embed_dim).
            pooled_text_emb: (B, text_embed_dim).
            aesthetic_scores: (B,).
            where: (B, N) bool, the positions whose logits to compute; all by default.

        Returns:
            (B, N, codebook size), or with `where` (M, codebook size) for its M positions, in row-major order.

        Raises:
            ValueError: For tokens of another shape, or ids that are none. A compiled model does not check values.
        """
        config = self.config
        if tokens.ndim != 2 or tokens.shape[1] != config.num_tokens:
            raise ValueError(f"`tokens` must have the shape (batch, {config.num_tokens}), got {tuple(tokens.shape)}.")
        if not torch.compiler.is_compiling() and tokens.numel():
            low, high = torch.stack(tokens.aminmax()).tolist()
            if low < 0 or high > config.codebook_size:
                raise ValueError(f"`tokens` must be in [0, {config.codebook_size}], got {low if low < 0 else high}.")
        if config.micro_cond_embed_dim:
            scores = sinusoids(100 * aesthetic_scores, config.micro_cond_embed_dim).to(pooled_text_emb)
            pooled_text_emb = torch.cat([pooled_text_emb, scores], dim=-1)
        pooled, context = self.cond_pooled_proj(pooled_text_emb), self.text_embed_proj(encoder_hidden_states)
        hidden = self.embeddings(tokens) + self.pos_embed
        for block in self.blocks:
            context, hidden = block(hidden, context, pooled)
        hidden = self.norm(hidden, pooled)
        return self.embeddings(hidden if where is None else hidden[where])


def sinusoids(values: torch.Tensor, size: int) -> torch.Tensor:
    """sin(ω_k x) and cos(ω_k x) of numbers x (B,), with ω_k = 1000^(-2k / size): (B, size) float64.

    In float64, because float32 rounds phases of hundreds differently on every processor.
    """
    frequencies = torch.exp(-math.log(1000) * torch.arange(size // 2, dtype=torch.float64, device=values.device) / (size // 2))
    phases = values.double()[:, None] * frequencies
    return torch.cat([phases.sin(), phases.cos()], dim=-1)


def open_maskgen_transformer(checkpoint: Checkpoint, config: Mapping[str, Any], where: Path | str) -> ModelSource:
    """Opens the transformer.

    Raises:
        ValueError: For a configuration or tensors of another model.
    """
    maskgen, vq = (section(config, f"model.{name}", where) for name in ("maskgen", "vq_model"))
    if vq.get("quantize_mode", "vq") != "vq":
        mode = shown(vq["quantize_mode"])
        raise ValueError(f"{where}: `quantize_mode` must be 'vq', got {mode}: continuous tokens cannot be masked.")
    if maskgen.get("weight_tying", True) is not True:
        raise ValueError(f"{where}: `weight_tying` must be true, as published, got {shown(maskgen['weight_tying'])}.")
    shapes = checkpoint.shapes
    both = [checkpoint.tensor(key) for key in ("embeddings.weight", "lm_head.weight") if key in shapes]
    if len(both) == 2 and not torch.equal(*both):
        raise ValueError(f"{checkpoint.described}: lm_head.weight must equal embeddings.weight, but it differs.")
    settings = {
        "num_tokens": integer(vq, "num_latent_tokens", where),
        "hidden_size": integer(maskgen, "decoder_embed_dim", where),
        "num_hidden_layers": integer(maskgen, "decoder_depth", where),
        "num_attention_heads": integer(maskgen, "decoder_num_heads", where),
        "codebook_size": integer(vq, "codebook_size", where),
        "text_embed_dim": integer({"text_embed_dim": 768, **vq}, "text_embed_dim", where),
        "micro_cond_embed_dim": integer(maskgen, "micro_condition_embed_dim", where) if maskgen.get("micro_condition") else 0,
        "num_unused": integer(maskgen, "condition_num_classes", where, 0) + 1,
    }
    # Of the two names of one tensor, safetensors keeps one.
    mapping = {} if "embeddings.weight" in shapes else {r"^lm_head\.weight$": "embeddings.weight"}
    return ModelSource(checkpoint, lambda: MaskGenTransformer(**settings), _probe, mapping, r"lm_head\.weight$")


@torch.no_grad()
def _probe(model: MaskGenTransformer) -> torch.Tensor:
    config = model.config
    tokens = torch.arange(config.num_tokens)[None] * 7 % (config.codebook_size + 1)
    text = torch.linspace(-1, 1, 3 * config.text_embed_dim).view(1, 3, -1).to(model.dtype)
    return model(tokens, text, text[:, 0], torch.tensor([6.5]), torch.arange(tokens.shape[1])[None] < 4)
