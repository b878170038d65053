"""What a call adds to the logits of a text model: tokens that are forbidden or penalised, and from which place on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .checks import check_bool, check_integer, check_number, is_integer
from .printing import shown


@dataclass(frozen=True)
class TokenConstraints:
    """Changes of logits, the same for states and candidates, so that scores are those of the distribution that is drawn from.

    Attributes:
        eos_token_ids: Tokens that end a text.
        eos_penalty: Subtracted from the logits of these, in nats.
        min_new_tokens: They are forbidden among as many of the first new tokens.
        suppressed: Ids that are forbidden everywhere.
    """

    eos_token_ids: tuple[int, ...]
    eos_penalty: float = 0.0
    min_new_tokens: int = 0
    suppressed: tuple[int, ...] = ()

    @property
    def active(self) -> bool:
        """Whether they change anything."""
        return bool(self.eos_penalty or self.min_new_tokens or self.suppressed)

    def __call__(self, logits: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """Logits (M, V) under these constraints, a copy.

        Args:
            place: (M,) long, the number of the position among the new tokens, from 0; negative within the prompt.
        """
        logits = logits.clone()
        eos = list(self.eos_token_ids)
        if self.eos_penalty:
            logits[:, eos] -= self.eos_penalty * (place >= 0).to(logits.dtype)[:, None]
        if self.min_new_tokens:
            early = (place >= 0) & (place < self.min_new_tokens)
            logits[:, eos] = logits[:, eos].masked_fill(early[:, None], -torch.inf)
        logits[:, list(self.suppressed)] = -torch.inf
        return logits


def check_ends(
    eos_token_ids: tuple[int, ...], *, eos_penalty: Any, min_new_tokens: Any, max_new_tokens: int, postpone_eos: Any
) -> None:
    """Checks what a call says about ends of texts.

    Raises:
        ValueError: For the first argument that does not fit, or would do nothing.
    """
    check_number("eos_penalty", eos_penalty, -1e6, 1e6)
    check_integer("min_new_tokens", min_new_tokens, 0, max_new_tokens)
    check_bool("postpone_eos", postpone_eos)
    for name, value in {"eos_penalty": eos_penalty, "min_new_tokens": min_new_tokens, "postpone_eos": postpone_eos}.items():
        if value and not eos_token_ids:
            off = type(value)()
            raise ValueError(f"`{name}` must be {off} for a model that has no token for the end of a text, got {value}.")


def token_ids(name: str, tokens: Any, vocab: Mapping[str, int], vocab_size: int) -> tuple[int, ...]:
    """Ids below `vocab_size`, and single tokens of a vocabulary as strings, as ids; none for None.

    Raises:
        ValueError: For anything else, naming the argument.
    """
    if tokens is None:
        return ()
    is_list = isinstance(tokens, (list, tuple))
    found: list[Any] = [vocab.get(token) if isinstance(token, str) else token for token in tokens] if is_list else []
    if not found or not all(is_integer(token) and 0 <= token < vocab_size for token in found):
        raise ValueError(
            f"`{name}` must be a non-empty list of ids from 0 to {vocab_size - 1}, or of tokens of the vocabulary, "
            f"or None, got {shown(tokens)}."
        )
    return tuple(dict.fromkeys(found))
