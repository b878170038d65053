"""Text models loaded whole, and their logits without anything kept."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diffusers_infogain.checkpoints.text import open_text_model
from diffusers_infogain.models.text_family import TextFamily
from diffusers_infogain.models.text_logits import TextCache


def load_text_model(
    repository: str | os.PathLike[str], dtype: torch.dtype | None = None, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, TextFamily]:
    opened = open_text_model(repository, **options)
    return opened.source.load(dtype), opened.tokenizer, opened.family


def masked_lm_logits(
    model: PreTrainedModel,
    family: TextFamily,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    where: torch.Tensor,
) -> torch.Tensor:
    """(M, V) at the positions `where` (R, L) of whole sequences."""
    cache = TextCache(model, family)
    cache.begin_block(input_ids, attention_mask, 0, input_ids.shape[1])
    return cache.logits(input_ids, torch.arange(len(input_ids)), where)
