"""Logits processors of transformers on texts that are decoded in any order."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import LogitsProcessorList

from .printing import shown

_BLOCK = 1 << 23
"""Scores that processors get at once: 32 MB, of which they make copies."""
_COUNTS = "it counts tokens from the left, and here they are decoded in any order"
_GUIDES = "it guides by rows or models of its own; `guidance_scale` does that"
_READS_ON = "it needs all tokens before the one that it decides on, and here they may be masked"
_AUDIO = "it is for models of sound"
REFUSED: dict[str, str] = {
    "MinLengthLogitsProcessor": f"{_COUNTS}; there is `min_new_tokens`",
    "MinNewTokensLengthLogitsProcessor": f"{_COUNTS}; there is `min_new_tokens`",
    "ExponentialDecayLengthPenalty": f"{_COUNTS}; there is `eos_penalty`",
    "ForcedBOSTokenLogitsProcessor": _COUNTS,
    "ForcedEOSTokenLogitsProcessor": _COUNTS,
    "SuppressTokensAtBeginLogitsProcessor": _COUNTS,
    "ClassifierFreeGuidanceLogitsProcessor": _GUIDES,
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": _GUIDES,
    "PrefixConstrainedLogitsProcessor": _READS_ON,
    "WatermarkLogitsProcessor": _READS_ON,
    "SynthIDTextWatermarkLogitsProcessor": _READS_ON,
    "WhisperTimeStampLogitsProcessor": _AUDIO,
    "WhisperNoSpeechDetection": _AUDIO,
    "AlternatingCodebooksLogitsProcessor": _AUDIO,
    "BarkEosPrioritizerLogitsProcessor": _AUDIO,
    "DiaClassifierFreeGuidanceLogitsProcessor": _AUDIO,
    "DiaEOSChannelFilterLogitsProcessor": _AUDIO,
    "DiaEOSDelayPatternLogitsProcessor": _AUDIO,
}
"""Processors of transformers that cannot mean here what they say, and why."""


def check_processors(processors: Any) -> LogitsProcessorList:
    """Processors as a list of their own; empty for None.

    Raises:
        ValueError: If they are none, or one of them has no meaning here.
    """
    found = LogitsProcessorList()
    for processor in [] if processors is None else processors if isinstance(processors, (list, tuple)) else [processors]:
        if isinstance(processor, LogitsProcessorList):
            found += check_processors(processor)
            continue
        if not callable(processor) or _num_required(processor) != 2:
            raise ValueError(
                "`logits_processor` must be functions of (input_ids, scores), such as those of transformers, a list of them, or "
                f"None, got {shown(processor)}."
            )
        for cls in type(processor).__mro__:
            if cls.__name__ in REFUSED and cls.__module__.startswith("transformers."):
                raise ValueError(f"`logits_processor` must be without {cls.__name__}: {REFUSED[cls.__name__]}.")
        if getattr(processor, "prompt_ignore_length", None) is not None:
            raise ValueError(
                f"`logits_processor` must be without `prompt_ignore_length` of {type(processor).__name__}: {_COUNTS}."
            )
        found.append(processor)
    return found


def process(
    processors: LogitsProcessorList,
    logits: torch.Tensor,
    texts: torch.Tensor,
    known: torch.Tensor,
    places: tuple[torch.Tensor, torch.Tensor],
    vocab_size: int,
    mask_token_id: int,
) -> torch.Tensor:
    """Logits (M, V) after the processors, each row by the whole text but its own position.

    A processor gets for each position the tokens behind it, up to the end of the text, and then those before it, (M, L), so that
    the last ones are those that stand directly before it. What is not known has an id of its own, from `vocab_size` on, as has
    the seam between end and begin of the text: such ids are equal to no token and to no other of them.

    Args:
        texts: (R, L) long, states of whole texts.
        known: (R, L) bool, False at masks and padding.
        places: Text and column of each position, (M,) long each.
        vocab_size: Of the model, at least V.
        mask_token_id: Has the score -inf.

    Raises:
        ValueError: If a processor returns no scores (M, V).
    """
    length = texts.shape[1]
    columns = torch.arange(length + 1, device=texts.device)
    # One column more: the seam.
    ids = torch.where(known, texts, vocab_size + columns[:length])
    ids = torch.cat([ids, (vocab_size + columns[length:]).expand(len(ids), 1)], dim=1)
    size = max(_BLOCK // logits.shape[1], 1)
    processed = []
    for text, column, rows in zip(*(part.split(size) for part in (*places, logits)), strict=True):
        around = (column[:, None] + 1 + columns[:length]) % (length + 1)
        scores = rows.float() if rows.dtype != torch.float32 else rows.clone()  # processors may change them in place
        if mask_token_id < scores.shape[1]:
            scores[:, mask_token_id] = -torch.inf
        found = processors(ids[text[:, None], around], scores)
        if not isinstance(found, torch.Tensor) or found.shape != rows.shape:
            raise ValueError(f"`logits_processor` must return scores {tuple(rows.shape)}, got {shown(found)}.")
        processed.append(found.to(logits.dtype))
    return torch.cat(processed) if processed else logits


def _num_required(function: Any) -> int | None:
    """How many arguments a function needs; None where nobody can tell."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    return sum(one.default is one.empty and one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD) for one in parameters)
