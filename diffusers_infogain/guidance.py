"""Classifier-free guidance of image pipelines: how strong it is in a state, and which rows the network has to see."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .checks import check_bool, check_choice, check_number, is_number
from .masked_logits import Logits, MaskedLogits, replace_states, take_states
from .printing import shown


def _linear(u: torch.Tensor) -> torch.Tensor:
    return u


def _cosine(u: torch.Tensor) -> torch.Tensor:
    return (1 - torch.cos(math.pi * u)) / 2


@dataclass(frozen=True)
class GuidanceSchedule:
    """How guidance grows from g_0 to g: g(u) = g_0 + (g - g_0) · r(u).

    Attributes:
        rise: r.
        steps: What u is: None for the share of the canvas that is decoded; else the share of the steps, those done ("done") or
            those done and the coming one ("coming").
        start: g_0, in the form logits = uncond + g · (cond - uncond).
    """

    rise: Callable[[torch.Tensor], torch.Tensor]
    steps: str | None = None
    start: float = 1.0


GUIDANCE_SCHEDULES: dict[str, GuidanceSchedule] = {
    "constant": GuidanceSchedule(torch.ones_like),
    "linear": GuidanceSchedule(_linear),
    "cosine": GuidanceSchedule(_cosine),
    "titok_linear": GuidanceSchedule(_linear, "done"),
    "titok_power_cosine": GuidanceSchedule(lambda u: _cosine(u**3), "done"),
    "maskgen_linear": GuidanceSchedule(_linear, "coming", start=2.0),
    "maskgen_cosine": GuidanceSchedule(_cosine, "coming", start=2.0),
}
"""By name; the last four are those of TiTok (arXiv 2406.07550) and MaskGen (arXiv 2501.07730) as published."""


_STRONGEST = 1e6


def check_scale(name: str, value: Any) -> None:
    """Raises a ValueError if this is no guidance scale."""
    check_number(name, value, -_STRONGEST, _STRONGEST)


def check_guidance(
    guidance_scale: Any = 1,
    guidance_schedule: Any = "constant",
    guidance_interval: Any = (0, 1),
    guided_lookahead: Any = True,
) -> None:
    """Checks arguments of an image pipeline's call.

    Raises:
        ValueError: For the first one that does not fit.
    """
    check_scale("guidance_scale", guidance_scale)
    check_choice("guidance_schedule", guidance_schedule, tuple(GUIDANCE_SCHEDULES))
    check_bool("guided_lookahead", guided_lookahead)
    ends = tuple(guidance_interval) if isinstance(guidance_interval, (tuple, list)) else ()
    if not (len(ends) == 2 and all(map(is_number, ends)) and 0 <= ends[0] < ends[1] <= 1):
        raise ValueError(
            f"`guidance_interval` must be a pair (start, stop) with 0 <= start < stop <= 1, got {shown(guidance_interval)}."
        )


def guidance_weights(
    tokens: torch.Tensor,
    mask_token_id: int,
    guidance_scale: float,
    schedule: str,
    interval: tuple[float, float],
    steps_done: Callable[[torch.Tensor], tuple[torch.Tensor, int]] | None = None,
) -> torch.Tensor:
    """g(u) = 1 + (g - 1) · r(u) if start <= u < stop, else 1, for states (R, L) of which the share u is decoded: (R,) float32.

    The interval is that of arXiv 2404.07724, over u instead of the noise level; a guidance that rises with u is what arXiv
    2507.08965 advises for masked diffusion. Some schedules go by the share of the steps, and have another start than 1
    (`GuidanceSchedule`).

    Args:
        tokens: (R, L) long.
        guidance_scale: g, in the form logits = uncond + g · (cond - uncond).
        schedule: The r of `GUIDANCE_SCHEDULES`.
        interval: (start, stop).
        steps_done: From states to the number of steps (R,) that come before each of them, and the number of all steps. Needed by
            the schedules that go by steps.
    """
    start, stop = interval
    if guidance_scale == 1:  # off, also where a schedule starts above
        return torch.ones(len(tokens), device=tokens.device)
    if schedule == "constant" and (start, stop) == (0, 1):  # the usual case, with fewer operations
        return 1 + (guidance_scale - 1) * (tokens == mask_token_id).any(-1).float()
    masks = (tokens == mask_token_id).sum(-1)
    u = 1 - masks.double() / tokens.shape[1]
    inside = (start <= u) & (u < stop)
    chosen = GUIDANCE_SCHEDULES[schedule]
    if chosen.steps is None:
        strength = torch.where(inside, chosen.rise(u), 0.0)
        return 1 + (guidance_scale - 1) * strength.float()
    if steps_done is None:
        raise ValueError(f"`steps_done` must be given for the guidance schedule {schedule!r}, which goes by steps.")
    done, total = steps_done(tokens)
    strength = chosen.rise((done + (chosen.steps == "coming")).double() / total)
    weights = chosen.start + (guidance_scale - chosen.start) * strength
    return torch.where(inside & (masks > 0), weights, 1.0).float()


def guide(cond: Logits, uncond: Logits, weights: torch.Tensor, guided: Logits | None = None) -> Logits:
    """guided + (g - 1) · (cond - uncond) in float32.

    Args:
        cond, uncond: Logits (R, L, V) of the same states; if those at masks only, in row-major order.
        weights: g (R,) of each state.
        guided: What other negative conditions have made of `cond`; by default `cond`, which gives uncond + g · (cond - uncond).
    """
    if isinstance(cond, MaskedLogits):
        each = weights.repeat_interleave((cond.index >= 0).sum(-1))[:, None]
        return MaskedLogits(_steered(cond, uncond, each, guided), cond.index)
    return _steered(cond, uncond, weights[:, None, None], guided)


def _steered(cond: Logits, uncond: Logits, weights: torch.Tensor, guided: Logits | None) -> torch.Tensor:
    towards, away = _rows_of(cond), _rows_of(uncond)
    return torch.lerp(away, towards, weights) if guided is None else _rows_of(guided) + (weights - 1) * (towards - away)


def _rows_of(logits: Logits) -> torch.Tensor:
    return (logits.rows if isinstance(logits, MaskedLogits) else logits).float()


@dataclass(frozen=True)
class Rows:
    """The rows that the network has to see for some of R states: equal states with equal conditions share one.

    Attributes:
        state: (K,) long, the state that each row is of, the first one of those that share it; ascending.
        number: (R,) long, the row of each state, -1 for those that need none.
    """

    state: torch.Tensor
    number: torch.Tensor

    @classmethod
    def of(cls, tokens: torch.Tensor, condition: torch.Tensor, needed: torch.Tensor | None = None) -> Rows:
        """Those of states (R, L) under the conditions with these numbers (R,), where `needed` (R,); by default everywhere."""
        keys = torch.cat([condition[:, None], tokens], dim=1)
        if needed is None:
            return cls(*first_of_equal(keys))
        places = needed.nonzero()[:, 0]
        first, kind = first_of_equal(keys[places])
        return cls(places[first], torch.full_like(condition, -1).index_copy(0, places, kind))

    @property
    def count(self) -> torch.Tensor:
        """(R,) long, 1 for the states that rows are of, 0 for those that share one or need none."""
        return torch.zeros_like(self.number).index_fill(0, self.state, 1)


@dataclass(frozen=True)
class Negative:
    """The rows of one of the negative conditions that guide R states.

    Attributes:
        scale: The argument that is its guidance scale.
        weights: g (R,) of each state, 1 for those that it does not guide.
        rows: The rows of the states that it guides.
    """

    scale: str
    weights: torch.Tensor
    rows: Rows


def guide_states(cond: Logits, unconds: Iterable[tuple[Logits, torch.Tensor, Rows]]) -> Logits:
    """cond + Σ (g - 1) · (cond - uncond) of R states, over the negative conditions that guide them.

    Args:
        cond: Their logits (R, L, V) under their conditions.
        unconds: For each negative condition the logits (K, L, V) of its rows, g (R,) of each state, and these rows.
    """
    guided = cond
    for uncond, weights, rows in unconds:
        index = (rows.number >= 0).nonzero()[:, 0]
        towards, away = take_states(cond, index), take_states(uncond, rows.number[index])
        so_far = None if guided is cond else take_states(guided, index)
        guided = replace_states(guided, index, guide(towards, away, weights[index], so_far))
    return guided


def first_of_equal(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of the rows (R, ...) are the first of their kind, (K,) ascending, and the number among these of each row, (R,)."""
    if len(rows) == 1:
        zero = torch.zeros(1, dtype=torch.long, device=rows.device)
        return zero, zero
    # Compared as bytes on the CPU, which is several times faster than `torch.unique`, and neither waits for the device twice.
    values = rows[:, None].flatten(1).contiguous().view(torch.uint8).cpu().numpy()
    _, first, kind = np.unique(values.view(f"V{values.shape[1]}")[:, 0], return_index=True, return_inverse=True)
    order = first.argsort()
    return torch.from_numpy(first[order]).to(rows.device), torch.from_numpy(order.argsort()[kind]).to(rows.device)


def number_conditions(condition: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """(B,) long, a number for what each image is conditioned on, equal for images whose tensors are equal."""
    kinds = [first_of_equal(value)[1] for value in condition.values()]
    return first_of_equal(torch.stack(kinds, dim=1))[1]
