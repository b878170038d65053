"""Masked language models as they were published, on transformers' own classes: LLaDA, Dream, SDAR, BERT and others."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .checkpoint import ModelSource

ATTENTIONS = ("full", "block_causal")


@dataclass(frozen=True)
class TextFamily:
    """Facts on a masked language model that its weights do not tell; `asdict` and `TextFamily(**...)` go through JSON.

    Attributes:
        name: "llada", "mmada", "dream", "sdar", "a2d" or "masked_lm".
        mask_token_id: The token that stands for "not decoded yet".
        shifted: Whether the network's output at position i - 1 predicts token i, as Dream's does.
        attention: "full", or "block_causal": a token sees its own block and those before it.
        block_length: Of a block-causal model: position p lies in block p // block_length, counted from the first real token.
        eos_token_ids: Tokens that end a text.

    Raises:
        ValueError: If the attention is another one, or `block_length` does not go with it.
    """

    name: str
    mask_token_id: int
    shifted: bool = False
    attention: str = "full"
    block_length: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "eos_token_ids", tuple(self.eos_token_ids))
        if self.attention not in ATTENTIONS:
            raise ValueError(f"`attention` must be one of {', '.join(ATTENTIONS)}, got {self.attention!r}.")
        if (self.attention == "block_causal") != (self.block_length is not None) or not (self.block_length or 1) >= 1:
            raise ValueError(
                f"`block_length` must be at least 1 for block-causal and None for full attention, got {self.block_length!r} "
                f"for {self.attention!r}."
            )


@dataclass
class OpenedTextModel:
    """A masked language model whose weights were not read yet."""

    family: TextFamily
    source: ModelSource
    tokenizer: PreTrainedTokenizerBase


def text_family(config: Any, tokenizer: PreTrainedTokenizerBase | None = None, block_length: int | None = None) -> TextFamily:
    """The family of a model, from its public config.json (a mapping) or from the configuration of a loaded model.

    Args:
        config: A mapping, or a transformers configuration.
        tokenizer: Tells the mask token, where the configuration does not, and ends of text.
        block_length: Of a block-causal model, in place of the configuration's.

    Raises:
        ValueError: If the family is not known here, or has no mask token.
    """
    raise NotImplementedError


def open_text_model(repository: str | os.PathLike[str], *, block_length: int | None = None, **hub: Any) -> OpenedTextModel:
    """Opens a published repository, or a folder that `save_pretrained` wrote; no code of it runs.

    Args:
        repository: Folder or Hub id.
        block_length: Of a block-causal model, in place of what the repository says.
        hub: `revision`, `cache_dir`, `token` and `local_files_only`, as in `huggingface_hub.snapshot_download`.

    Raises:
        ValueError: If the model is of no family that is known here, saying what it is.
        OSError: If there is no such repository.
    """
    raise NotImplementedError


def load_text_model(
    repository: str | os.PathLike[str], dtype: torch.dtype | None = None, *, block_length: int | None = None, **hub: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, TextFamily]:
    """Model, tokenizer and family; arguments and errors as `open_text_model`, `dtype` None keeps the stored one."""
    opened = open_text_model(repository, block_length=block_length, **hub)
    return opened.source.load(dtype), opened.tokenizer, opened.family
