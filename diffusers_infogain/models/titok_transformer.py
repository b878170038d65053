"""The class-to-image transformers of TiTok (arXiv 2406.07550), over the line of codes of `TiTokTokenizer`.

Two architectures were published: BERT, for the models of 32 and 64 codes, and a transformer with skips from its first half to its
second (U-ViT, arXiv 2209.12152), for that of 128 codes. In both the class is a token in front of the codes.
"""

from __future__ import annotations

import torch

# Keep the name `ModelMixin` in this module: diffusers looks for it here to find out how to load a component.
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn
from transformers import BertConfig, BertModel

from .class_inputs import check_class_inputs
from .titok_blocks import TiTokBlock


def check_sizes(hidden_size: int, num_attention_heads: int) -> None:
    """Raises a ValueError if the heads do not share the width evenly."""
    if num_attention_heads < 1 or hidden_size % num_attention_heads:
        raise ValueError(f"`num_attention_heads` must divide `hidden_size` = {hidden_size}, got {num_attention_heads}.")


class TiTokTransformer(ModelMixin, ConfigMixin):
    """Predicts the masked codes of an image, given its class. Ids are the codes, the mask, the classes, and "no class"."""

    def hidden_states(self, ids: torch.Tensor) -> torch.Tensor:
        """The states (B, 1 + N, D) that the head reads, of ids (B, 1 + N)."""
        raise NotImplementedError(f"{type(self).__name__} must define `hidden_states`.")

    def forward(self, tokens: torch.Tensor, class_labels: torch.Tensor, where: torch.Tensor | None = None) -> torch.Tensor:
        """Logits over the codes, without the mask.

        Args:
            tokens: (B, N) long, codes, and `codebook_size` where a code is masked.
            class_labels: (B,) long, `num_classes` for no class.
            where: (B, N) bool, the positions whose logits to compute; all by default.

        Returns:
            (B, N, codebook size), or with `where` (M, codebook size) for its M positions, in row-major order.

        Raises:
            ValueError: For shapes, ids or labels that do not fit the model. A compiled model does not check values.
        """
        config = self.config
        sizes = {"length": config.num_tokens, "last_token": config.codebook_size, "num_classes": config.num_classes}
        check_class_inputs(tokens, class_labels, where, **sizes)
        first = class_labels + self.config.codebook_size + 1
        hidden = self.hidden_states(torch.cat([first[:, None], tokens], dim=1))[:, 1:]
        return self.lm_head(hidden if where is None else hidden[where])


class TiTokBertTransformer(TiTokTransformer):
    """BERT: the generators of TiTok-L-32 and TiTok-B-64.

    Args:
        num_tokens: N, the codes of an image.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: Of the transformer.
        codebook_size: Number of codes, and the id of the mask.
        num_classes: Number of classes; the label `num_classes` stands for no class.

    Raises:
        ValueError: If sizes contradict each other.
    """

    _no_split_modules = ["BertLayer"]
    _repeated_blocks = ["BertLayer"]

    @register_to_config
    def __init__(
        self,
        num_tokens: int = 32,
        hidden_size: int = 768,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        intermediate_size: int = 3072,
        codebook_size: int = 4096,
        num_classes: int = 1000,
    ):
        super().__init__()
        check_sizes(hidden_size, num_attention_heads)
        config = BertConfig(
            vocab_size=codebook_size + num_classes + 2,
            hidden_size=hidden_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            intermediate_size=intermediate_size,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            max_position_embeddings=num_tokens + 1,
            pad_token_id=None,
        )
        self.model = BertModel(config, add_pooling_layer=False)
        self.lm_head = nn.Linear(hidden_size, codebook_size)

    def hidden_states(self, ids: torch.Tensor) -> torch.Tensor:
        """As in the base class."""
        return self.model(input_ids=ids).last_hidden_state


class TiTokUViTTransformer(TiTokTransformer):
    """A transformer with skips: the generator of TiTok-S-128.

    Args:
        num_tokens: N, the codes of an image.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: Of the transformer; there is a middle block
            besides its `num_hidden_layers`, which are even in number.
        codebook_size: Number of codes, and the id of the mask.
        num_classes: Number of classes; the label `num_classes` stands for no class.

    Raises:
        ValueError: If sizes contradict each other.
    """

    _no_split_modules = ["TiTokBlock"]
    _repeated_blocks = ["TiTokBlock"]

    @register_to_config
    def __init__(
        self,
        num_tokens: int = 128,
        hidden_size: int = 1024,
        num_hidden_layers: int = 20,
        num_attention_heads: int = 16,
        intermediate_size: int = 4096,
        codebook_size: int = 4096,
        num_classes: int = 1000,
    ):
        super().__init__()
        check_sizes(hidden_size, num_attention_heads)
        if num_hidden_layers % 2:
            raise ValueError(f"`num_hidden_layers` must be even, got {num_hidden_layers}.")

        def block(skip: bool = False) -> TiTokBlock:
            return TiTokBlock(hidden_size, num_attention_heads, intermediate_size, qkv_bias=False, skip=skip)

        self.embeddings = nn.Embedding(codebook_size + num_classes + 2, hidden_size)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, num_tokens + 1, hidden_size))
        self.in_blocks = nn.ModuleList(block() for _ in range(num_hidden_layers // 2))
        self.mid_block = block()
        self.out_blocks = nn.ModuleList(block(skip=True) for _ in range(num_hidden_layers // 2))
        self.norm = nn.LayerNorm(hidden_size)
        self.lm_head = nn.Linear(hidden_size, codebook_size)

    def hidden_states(self, ids: torch.Tensor) -> torch.Tensor:
        """As in the base class."""
        hidden = self.embeddings(ids) + self.pos_embed
        skips = []
        for block in self.in_blocks:
            hidden = block(hidden)
            skips.append(hidden)
        hidden = self.mid_block(hidden)
        for block in self.out_blocks:
            hidden = block(hidden, skips.pop())
        return self.norm(hidden)


KEY_MAPPING = {r"^model\.lm_head\.": "lm_head."}
"""The model's names for the parts of the published keys."""

UNUSED_KEYS = r"model\.embeddings\.(position_ids|token_type_ids)$"
"""Counters that older versions of transformers stored."""


@torch.no_grad()
def probe(model: TiTokTransformer) -> torch.Tensor:
    """Logits of fixed codes, for `ModelSource.probe`."""
    config = model.config
    tokens = torch.arange(config.num_tokens)[None] * 7 % (config.codebook_size + 1)
    return model(tokens, torch.tensor([config.num_classes // 2]), torch.arange(tokens.shape[1])[None] < 4)
