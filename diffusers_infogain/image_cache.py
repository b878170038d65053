"""What image pipelines reuse between rows of their network, where a call asks for it: approximate caches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Protocol

import torch

from .cache_settings import ContextCache, MaxLogitCache
from .denoising import Denoised
from .guidance import Rows, first_of_equal, guide_states, number_conditions
from .image_call import Condition, ImageCall
from .masked_logits import Logits, MaskedLogits, concatenate, take_states
from .models.partial_rows import Features, PartialRows


@dataclass
class Branch:
    """What is kept of the rows with the prompt, or of those with one of the negative conditions, for each of B images.

    Attributes:
        condition: What some images are conditioned on, `ImageCall.condition` or `negative`.
        anchors: (B, L) long, the states whose features are kept; -1 for images without any.
        features: Theirs.
        logits: (B, P, V), the last ones of every position, for caches that reuse them.
    """

    condition: Callable[[torch.Tensor], Condition]
    anchors: torch.Tensor
    features: Features = field(default_factory=dict)
    logits: torch.Tensor | None = None

    @cached_property
    def numbers(self) -> torch.Tensor:
        """(B,) long, equal for images with equal conditions."""
        return number_conditions(self.condition(torch.arange(len(self.anchors), device=self.anchors.device)))

    @property
    def known_logits(self) -> torch.Tensor:
        """`logits` after the first row."""
        if self.logits is None:
            raise ValueError("No row has run yet.")
        return self.logits


class PartialPipeline(Protocol):
    """What a family defines if its network can run at some positions only, P of them."""

    def positions(self, tokens: torch.Tensor, condition: Condition) -> tuple[torch.Tensor, torch.Tensor]:
        """Which positions are none of padding, and which are image tokens, (R, P) each, for states (R, h, w)."""

    def run_rows(self, tokens: torch.Tensor, condition: Condition, where: torch.Tensor, rows: PartialRows) -> torch.Tensor:
        """Logits (M, V) of states (R, h, w) at the M positions of `where` (R, P), by rows that run where `rows` says."""


class CachedRows:
    """`denoise` and `guide` of a call with an approximate cache, and what it keeps. It belongs to the call, and to one thread.

    What a row runs and reuses depends on its own image alone, and on the states that its image has been in: not on the batch,
    its chunks, or the other candidates of a step.

    Args:
        pipe: The pipeline.
        call: The call.
        cache: Its cache.
        tokens: (B, L) long, the states that decoding begins with.
    """

    def __init__(self, pipe: PartialPipeline, call: ImageCall, cache: ContextCache | MaxLogitCache, tokens: torch.Tensor):
        self._pipe = pipe
        self._call = call
        self._rows: Callable[[Branch, torch.Tensor, torch.Tensor], Denoised]
        if isinstance(cache, MaxLogitCache):
            self._rows = partial(self._run_max_logit, cache)
        else:
            self._rows = partial(self._run_context, cache)
        self._conditions = call.conditions() if call.callback_on_step_end else []
        self._step = -1
        self.advance(tokens)
        self._forget()

    def advance(self, tokens: torch.Tensor) -> None:
        """After a step that led to the states `tokens` (B, L), the parents of the next candidates."""
        self._parents = tokens.clone()
        self._step += 1
        conditions = self._call.conditions() if self._conditions else []
        if not all(map(torch.equal, self._conditions, conditions)):  # a callback has changed them
            self._conditions = conditions
            self._forget()

    def _forget(self) -> None:
        nothing = torch.full_like(self._parents, -1)
        self._positive = Branch(self._call.condition, nothing)
        self._negatives = {
            scale: Branch(partial(self._call.negative, scale=scale), nothing.clone()) for scale in self._call.scales
        }

    def denoise(self, states: torch.Tensor, sample_index: torch.Tensor) -> Denoised:
        """Logits of states (R, L) of the images `sample_index` (R,), guided where the call is."""
        rows = Rows.of(states, sample_index)
        cond = self._run(self._positive, rows, states, sample_index)
        cond = Denoised(take_states(cond.logits, rows.number), cond.num_evaluations)
        return self._guided(cond, states, sample_index) if self._call.guided_lookahead else cond

    def guide(self, logits: Logits, states: torch.Tensor, sample_index: torch.Tensor) -> Denoised:
        """Guided logits of states (R, L), given those with their conditions alone (R, L, V)."""
        return self._guided(Denoised(logits, torch.zeros_like(sample_index)), states, sample_index)

    def _guided(self, cond: Denoised, states: torch.Tensor, sample_index: torch.Tensor) -> Denoised:
        logits, num_evaluations = cond
        unconds = []
        for scale, branch in self._negatives.items():
            weights = self._call.guidance_weights(states, scale)
            rows = Rows.of(states, sample_index, weights != 1)
            if len(rows.state):
                uncond = self._run(branch, rows, states, sample_index)
                unconds.append((uncond.logits, weights, rows))
                num_evaluations = num_evaluations + uncond.num_evaluations
        return Denoised(guide_states(logits, unconds), num_evaluations)

    def _run(self, branch: Branch, rows: Rows, states: torch.Tensor, sample_index: torch.Tensor) -> Denoised:
        """Logits (K, L, V) of the rows, and how many rows each of the states (R,) took."""
        logits, num_evaluations = self._rows(branch, states[rows.state], sample_index[rows.state])
        return Denoised(logits, torch.zeros_like(sample_index).index_copy(0, rows.state, num_evaluations))

    def _run_context(self, cache: ContextCache, branch: Branch, states: torch.Tensor, samples: torch.Tensor) -> Denoised:
        """Logits of rows: states (K, L) of the images `samples` (K,)."""
        limit = int(cache.tolerance * states.shape[1])
        parents, anchors = self._parents[samples], branch.anchors[samples]
        near = (states != parents).sum(-1) <= limit
        due = near & ((anchors < 0).any(-1) | ((parents != anchors).sum(-1) > limit))
        itself = due & (states == parents).all(-1)
        full, rest = (~near | itself).nonzero()[:, 0], (near & ~itself).nonzero()[:, 0]
        # Candidates of an image whose parent is due wait for a row of the parent.
        waiting = (due & ~itself).nonzero()[:, 0]
        before = waiting[first_of_equal(samples[waiting])[0]]
        num_evaluations = torch.zeros_like(samples).index_fill(0, rest, 1)
        parts = []
        if len(full) + len(before):
            own, whole = torch.cat([full, before]), torch.cat([states[full], parents[before]])
            kept = torch.cat([itself[full].nonzero()[:, 0], torch.arange(len(full), len(own), device=own.device)])
            # Full rows are alike for images with equal states and conditions, such as the empty canvas.
            rows = Rows.of(whole, branch.numbers[samples[own]])
            run = whole[rows.state]
            wanted = self._call.wanted(run)
            wanted[rows.state >= len(full)] = False
            slots = samples[own]
            branch.anchors[slots[kept]] = whole[kept]
            how = PartialRows(branch.features, len(branch.anchors), slots[rows.state], (rows.number[kept], slots[kept]), None)
            logits = self._image_logits(run, wanted, None, how, branch.condition(slots[rows.state]))
            parts.append(take_states(logits, rows.number[: len(full)]))
            num_evaluations.index_add_(0, own, rows.count)
        if len(rest):
            some, slots = states[rest], samples[rest]
            wanted = self._call.wanted(some)
            nothing = torch.zeros_like(rest[:0])
            how = PartialRows(branch.features, len(branch.anchors), slots, (nothing, nothing), None)
            run = wanted | (some != branch.anchors[slots])
            parts.append(self._image_logits(some, wanted, run, how, branch.condition(slots)))
        return Denoised(take_states(concatenate(parts), torch.cat([full, rest]).argsort()), num_evaluations)

    def _run_max_logit(self, cache: MaxLogitCache, branch: Branch, states: torch.Tensor, samples: torch.Tensor) -> Denoised:
        """The same, with a row per image."""
        tokens = states.unflatten(1, self._call.grid)
        real, image = self._pipe.positions(tokens, branch.condition(samples))
        warmup = int(len(self._call.scheduler.all_timesteps) * cache.warmup)
        refreshed = self._step <= warmup or (self._step - warmup) % cache.interval == 0
        full = (branch.anchors[samples] < 0).any(-1) | refreshed
        if full.any():
            self._run_and_keep(branch, full, states, samples, None)
        if not full.all():
            largest = branch.known_logits[samples].float().amax(-1).masked_fill(~real, torch.nan)
            run = largest <= largest.nanquantile(1 - cache.ratio, dim=-1, keepdim=True)
            self._run_and_keep(branch, ~full, states, samples, run)
        branch.anchors[samples] = states
        wanted = self._call.wanted(states)
        row, position = _spread(wanted, image).nonzero(as_tuple=True)
        return Denoised(MaskedLogits.at(wanted, branch.known_logits[samples[row], position]), torch.ones_like(samples))

    def _run_and_keep(
        self,
        branch: Branch,
        chosen: torch.Tensor,
        states: torch.Tensor,
        samples: torch.Tensor,
        run: torch.Tensor | None,
    ) -> None:
        """Runs the rows `chosen` (K,) at the positions `run` (K, P), or all, and keeps what they say there."""
        tokens, slots = states[chosen].unflatten(1, self._call.grid), samples[chosen]
        condition = branch.condition(slots)
        real, _ = self._pipe.positions(tokens, condition)
        run = None if run is None else run[chosen]
        where = real if run is None else run
        rows = PartialRows(
            branch.features, len(branch.anchors), slots, (torch.arange(len(slots), device=slots.device), slots), run
        )
        logits = self._pipe.run_rows(tokens, condition, where, rows)
        if branch.logits is None:
            branch.logits = logits.new_zeros(len(branch.anchors), where.shape[1], logits.shape[-1])
        row, position = where.nonzero(as_tuple=True)
        branch.logits[slots[row], position] = logits

    def _image_logits(
        self, states: torch.Tensor, wanted: torch.Tensor, run: torch.Tensor | None, rows: PartialRows, condition: Condition
    ) -> MaskedLogits:
        """Logits of states (K, L) where they are `wanted` (K, L), of which the tokens `run` (K, L) run."""
        tokens = states.unflatten(1, self._call.grid)
        _, image = self._pipe.positions(tokens, condition)
        rows = rows if run is None else replace(rows, run=_spread(run, image))
        return MaskedLogits.at(wanted, self._pipe.run_rows(tokens, condition, _spread(wanted, image), rows))


def _spread(tokens: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """A mask of image tokens (K, L) as one of the positions (K, P) of the transformer, of which L are `image` (K, P)."""
    return torch.zeros_like(image).masked_scatter(image, tokens)
