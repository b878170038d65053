"""How many tokens each step decodes."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

from .settings import MASKING_SCHEDULES

DREAM_EPSILON = 1e-3
"""ε of the schedule "dream": its time falls from 1 to ε, and what is then masked is decoded in the last step."""


def mask_ratio(progress: torch.Tensor, masking_schedule: str) -> torch.Tensor:
    """r(u): the share of tokens still masked when the share u in [0, 1] of the steps is done; r(0) = 1, r(1) = 0.

    In float32, as `AmusedScheduler` computes it, so that both round to the same counts.
    """
    u = progress.float()
    if masking_schedule == "cosine":
        return torch.cos(u * math.pi / 2)
    if masking_schedule in ("linear", "even"):
        return 1 - u
    if masking_schedule == "arccos":
        return 2 * torch.arccos(u) / math.pi
    if masking_schedule == "dream":
        return torch.where(u < 1, 1 - (1 - DREAM_EPSILON) * u, 0.0)
    raise ValueError(f"`masking_schedule` must be one of {', '.join(MASKING_SCHEDULES)}, got {masking_schedule!r}.")


def _after_step(num_masked: torch.Tensor, initial_masks: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
    """The number still masked after a step that the schedule ends at the given ratio: at least one token less."""
    return torch.minimum(num_masked - 1, (initial_masks * ratio).floor().long()).clamp(min=0)


def _infer_initial_masks(num_masked: torch.Tensor, ratios: torch.Tensor, max_masks: torch.Tensor) -> torch.Tensor:
    """The largest N0 up to `max_masks` that steps ending at `ratios` would have brought to at most `num_masked`."""
    initial = torch.arange(int(max_masks.max()) + 1, device=num_masked.device)
    masked = initial
    for ratio in ratios:
        masked = _after_step(masked, initial, ratio)
    largest = torch.searchsorted(masked, num_masked, right=True) - 1
    return largest.minimum(max_masks).maximum(num_masked)


@functools.lru_cache(maxsize=16)  # asked for at every forward, always the same within a decoding
def planned_masks(
    length: int, num_steps: int, masking_schedule: str = "cosine", *, tokens_per_step: int | None = None
) -> torch.Tensor:
    """(T,) how many of the `length` masks of an empty canvas are left when each step begins."""
    masks = [torch.tensor([length])]
    for index in range(num_steps - 1):
        count = decode_counts(
            masks[-1], index, num_steps, masking_schedule, tokens_per_step=tokens_per_step, initial_masks=masks[0]
        )
        masks.append(masks[-1] - count)
    return torch.cat(masks)


def decode_counts(
    num_masked: torch.Tensor,
    step_index: int,
    num_steps: int,
    masking_schedule: str = "cosine",
    *,
    tokens_per_step: int | None = None,
    initial_masks: torch.Tensor | None = None,
    max_masks: torch.Tensor | None = None,
) -> torch.Tensor:
    """k_t: the number of tokens that step `step_index` (counted from 0) of `num_steps` decodes, per sample.

    After the step floor(N0 · r((i + 1) / T)) tokens of N0 remain masked. The count follows from what is *left*: at least one
    token a step, everything in the last one. "even" shares what is left out over the steps left, the larger counts first: 12
    masks in 5 steps are decoded as 3, 3, 2, 2, 2, as the published loops of LLaDA and SDAR do. "dream" is the published loop of
    Dream: floor(n · (1 - s / t)) of the n tokens left while the time falls from t to s, which may be none; the last step takes
    more than its share. 12 masks in 5 steps are decoded as 2, 2, 2, 2, 4.

    Args:
        num_masked: (B,) tokens masked now.
        tokens_per_step: A fixed count instead of the schedule.
        initial_masks: (B,) N0, the tokens masked before the first step.
        max_masks: (B,) Without `initial_masks`, N0 is the largest number up to this one that the schedule would have brought to
            `num_masked` by now: exact at the first step and for a canvas that was masked completely.

    Returns:
        (B,) counts between 0 (where nothing is masked) and `num_masked`.
    """
    if step_index == num_steps - 1:
        return num_masked
    if tokens_per_step is not None:
        return num_masked.clamp(max=tokens_per_step)
    if masking_schedule == "even":
        return -(-num_masked // (num_steps - step_index))
    if masking_schedule == "dream":
        # In float32, and rounded down, as there: a product that falls just short of a whole number is one token less.
        return (num_masked.float() * _dream_release(num_steps)[step_index].to(num_masked.device)).long()
    ratios = _ratios(num_steps, masking_schedule).to(num_masked.device)
    if initial_masks is None:
        initial_masks = _infer_initial_masks(num_masked, ratios[:step_index], num_masked if max_masks is None else max_masks)
    return num_masked - _after_step(num_masked, initial_masks, ratios[step_index])


@functools.lru_cache(maxsize=16)  # asked for in every step
def _dream_release(num_steps: int) -> torch.Tensor:
    """(T,) 1 - s / t of every step of the schedule "dream", in float32 as there."""
    times = torch.linspace(1, DREAM_EPSILON, num_steps + 1)
    return 1 - times[1:] / times[:-1]


def release_probability(
    step_index: int, num_steps: int, masking_schedule: str, *, tokens_per_step: int | None, length: int
) -> float:
    """1 - r(after) / r(before): with this probability a token that a step finds masked is decoded in it, if each is for itself.

    Args:
        length: Tokens of the canvas, of which `tokens_per_step` is a share.
    """
    if step_index == num_steps - 1:
        return 1.0
    if masking_schedule == "dream" and tokens_per_step is None:
        return float(_dream_release(num_steps)[step_index])
    before, after = (
        1.0
        if index < 0
        else float(share_masked_after(index, num_steps, masking_schedule, tokens_per_step=tokens_per_step, length=length))
        for index in (step_index - 1, step_index)
    )
    return 1 - after / before if before > 0 else 1.0


@functools.lru_cache(maxsize=16)  # asked for in every step
def _ratios(num_steps: int, masking_schedule: str) -> torch.Tensor:
    """(T,) r after each step."""
    return mask_ratio(torch.arange(1, num_steps + 1, dtype=torch.float32) / num_steps, masking_schedule)


def share_masked_after(
    step_index: int, num_steps: int, masking_schedule: str, *, tokens_per_step: int | None, length: int
) -> torch.Tensor:
    """(), the share of an empty canvas of `length` tokens that is still masked after a step, in float32."""
    if tokens_per_step is None:
        return mask_ratio(torch.tensor((step_index + 1) / num_steps), masking_schedule)
    left = 0 if step_index == num_steps - 1 else max(length - tokens_per_step * (step_index + 1), 0)
    return torch.tensor(left / length, dtype=torch.float32)


def annealed(temperature: tuple[float, float], num_steps: int, annealing: str = "linear") -> torch.Tensor:
    """(T,) float32: a temperature that goes from its start to its end.

    "linear" goes evenly from the start in the first step to the end in the last. "product" goes by the factors
    (1 - 1/T) · (1 - 2/T) · ... of the steps so far, which fall faster, and are 0 in the last step.
    """
    start, end = temperature
    if annealing == "linear":
        return torch.linspace(start, end, num_steps, dtype=torch.float32)
    left = 1 - torch.arange(1, num_steps + 1, dtype=torch.float64) / num_steps
    return (end + (start - end) * left.cumprod(0)).float()


def annealed_after(temperature: tuple[float, float], num_steps: int) -> torch.Tensor:
    """(T,) float32: start + (end - start) · (i + 1) / T, which comes to the end in the last step, but begins below the start."""
    start, end = temperature
    return torch.tensor([start + (end - start) * (index + 1) / num_steps for index in range(num_steps)], dtype=torch.float32)


def temperature_at(temperatures: torch.Tensor, step_index: int, share_left: torch.Tensor | None) -> torch.Tensor:
    """The temperature of a step, (), or (B,) of samples that may run ahead of the steps.

    Args:
        temperatures: (T,), from `annealed`.
        share_left: (B,) the share of its masks that a sample has left. The temperature then goes by it where that is further.
    """
    by_step = temperatures[step_index]
    if share_left is None:
        return by_step
    start, end = temperatures[[0, -1]].tolist()
    by_token = end + (start - end) * share_left
    by_step = by_step.to(share_left.device).expand(share_left.shape)
    return by_token.minimum(by_step) if end <= start else by_token.maximum(by_step)


def annealed_inversely(temperature: float | Sequence[float], step_index: int, num_steps: int) -> float:
    """A temperature whose inverse, the factor on the logits, goes linearly from its start to its end; a number stays."""
    if not isinstance(temperature, Sequence):
        return temperature
    start, end = 1 / temperature[0], 1 / temperature[1]
    return 1 / (start + (end - start) * step_index / max(num_steps - 1, 1))
