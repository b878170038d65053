"""The trace of a decoding: what every step did, and what it took."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .checks import check_bool, check_choice, check_integer
from .proposal import InfoGainProposal, InfoGainSchedulerOutput
from .trace_view import SampleTrace, TraceView, Word, as_list, square_or_line

if TYPE_CHECKING:
    import PIL.Image
    from matplotlib.figure import Figure

RECORDED = ("num_decoded", "cost", "log_probability", "winner", "num_compared", "num_states", "num_evaluations", "num_passes")
"""What is written beside every image, as lists over its steps."""


@dataclass
class DecodingTrace:
    """What happened, per step and sample: T steps, B samples, N candidates, L positions. Entropies in nats.

    `plot`, `frames`, `film`, `html` and `ansi` show it. It is kept on the CPU and takes 9 bytes per step, sample and position:
    19 MB for 8 images of 4096 tokens in 64 steps.

    Attributes:
        num_decoded: (T, B) long, tokens committed.
        cost: (T, B) float32, C of the committed action.
        gain: (T, B) float32, its information gain; NaN if no lookahead was run.
        objective: (T, B, N) float32, J of every candidate; NaN if no lookahead was run.
        winner: (T, B) long, the committed candidate; 0 is the greedy one.
        selected: (T, B, L) bool, the positions committed.
        log_probability: (T, B) float32, Σ log p_l(v_l) of the tokens committed, at temperature 1.
        num_compared: (T, B) long, distinct candidates that the lookahead scored; 0 without one.
        num_states: (T, B) long, states that went through the model for the sample: the current one, unless the lookahead before
            has its logits, and candidates.
        num_evaluations: (T, B) long, NFE, the rows of the network that this took: with guidance, a state takes two.
        num_passes: (T, B) long, forward passes one after the other, if all candidates that are run together fit on the device.
        entropies: (T, B, L) float32, H_l of the positions that the step could decode, NaN at all others. So the state that a step
            began with is that after the step before, masked where this is a number. (The corrector "verify" masks others, too,
            and leaves them as they were if the model confirms them.)
        tokens: (T, B, L) int32, the state after the step, with the scheduler's mask id where it is masked. A corrector and
            callbacks may change decoded tokens; the last state is the output.
        view: What it is drawn with: the grid of an image and the way to its pixels, or the words of a text.
    """

    num_decoded: torch.Tensor
    cost: torch.Tensor
    gain: torch.Tensor
    objective: torch.Tensor
    winner: torch.Tensor
    selected: torch.Tensor
    log_probability: torch.Tensor
    num_compared: torch.Tensor
    num_states: torch.Tensor
    num_evaluations: torch.Tensor
    num_passes: torch.Tensor
    entropies: torch.Tensor
    tokens: torch.Tensor
    view: TraceView | None = field(default=None, repr=False, compare=False)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name."""
        return {name: value for name, value in vars(self).items() if name != "view"}

    @property
    def cumulative_entropy(self) -> torch.Tensor:
        """H~ = Σ_t C(a_t | z_t) per sample (B,), over every commit, also of tokens that a corrector masked again later."""
        return self.cost.sum(0)

    @property
    def sequential_passes(self) -> torch.Tensor:
        """(B,) long, how many forward passes had to follow each other."""
        return self.num_passes.sum(0)

    @property
    def log_likelihood(self) -> torch.Tensor:
        """Σ_t Σ log p_l(v_l) per sample (B,), over every commit, in nats: how likely the model finds the sample in this order."""
        return self.log_probability.sum(0)

    @property
    def decoded_at(self) -> torch.Tensor:
        """(B, L) long: the (last) step in which a position was decoded, -1 where it was known."""
        number = torch.arange(len(self.selected))[:, None, None].expand(self.selected.shape)
        known = torch.full((1, *self.selected.shape[1:]), -1)
        return torch.cat([known, number.masked_fill(~self.selected, -1)]).amax(0)

    def records(self) -> list[dict[str, list[float] | list[int]]]:
        """Per sample, plain lists over the steps, for JSON: the fields of `RECORDED`."""
        columns = [getattr(self, name).T.tolist() for name in RECORDED]
        return [dict(zip(RECORDED, values, strict=True)) for values in zip(*columns, strict=True)]

    def __repr__(self) -> str:
        steps, batch = self.winner.shape
        per_sample = (("NFE", self.num_evaluations.sum(0)), ("nats of cumulative entropy", self.cumulative_entropy))
        figures = [f"{value.double().mean():.1f} {name}" for name, value in per_sample if batch]
        candidates = f", {self.objective.shape[-1]} candidates" if self.objective.shape[-1] > 1 else ""
        return f"DecodingTrace: {batch} samples in {steps} steps{candidates}; per sample {' and '.join(figures) or 'nothing'}"

    def _took_part(self, sample: int) -> torch.Tensor:
        """(T,) bool, the steps of a sample: those in which it had something to decode."""
        check_integer("sample", sample, 0, self.tokens.shape[1] - 1)
        return ~self.entropies[:, sample].isnan().all(-1)

    @property
    def _view(self) -> TraceView:
        if self.view is None:
            raise ValueError("The trace has no `view`, which says how to draw it: it was put together by hand.")
        return self.view

    def drawn_with(self, **changes: Any) -> DecodingTrace:
        """The same trace with these fields of its `view` changed."""
        return replace(self, view=replace(self._view, **changes))

    def states(self, sample: int = 0) -> torch.Tensor:
        """(T' + 1, L) int32: one sample before the first step and after each of its own T' steps, with the mask id at masks.

        Its own steps are those in which it had something to decode. Others of the batch may have had more, and so have tries that
        were given up.

        Raises:
            ValueError: If there is no such sample.
        """
        own = self._took_part(sample)
        after = self.tokens[own, sample]
        if not len(after):
            raise ValueError(f"Nothing of sample {sample} was decoded: there is nothing to show.")
        masked = self.selected[own, sample].any(0) | ~self.entropies[own, sample][0].isnan()
        before = after[0].masked_fill(masked, self._view.mask_token_id)
        return torch.cat([before[None], after])

    def of_sample(self, sample: int = 0) -> SampleTrace:
        """What there is to draw of one sample, over its own steps, as in `states`.

        Raises:
            ValueError: If there is no such sample.
        """
        own, view = self._took_part(sample), self._view
        decoded_at = self.decoded_at[sample]
        number = own.cumsum(0) - 1
        return SampleTrace(
            grid=view.grid or square_or_line(len(decoded_at)),
            decoded_at=[-1 if step < 0 else int(number[step]) for step in decoded_at.tolist()],
            num_decoded=self.num_decoded[own, sample].tolist(),
            cost=self.cost[own, sample].tolist(),
            gain=as_list(self.gain[own, sample]),
            winner=self.winner[own, sample].tolist(),
            num_compared=self.num_compared[own, sample].tolist(),
            num_evaluations=int(self.num_evaluations[:, sample].sum()),
            num_candidates=self.objective.shape[-1],
            lazy=view.lazy,
            entropies=self.entropies[own, sample],
        )

    def written(self, sample: int = 0) -> list[Word]:
        """A text's tokens from its prompt to its end, in the state after the last step.

        Raises:
            ValueError: If there is no such sample, nothing of it was decoded, or the trace is not that of a text pipeline.
        """
        steps, words = self.of_sample(sample), self._view.words
        if words is None:
            raise ValueError("Only texts of a pipeline have words; `plot` shows any trace.")
        ids, entropies = self.states(sample)[-1].tolist(), self.entropies[self._took_part(sample), sample]
        listed = []
        for column in words.columns[sample]:
            step = steps.decoded_at[column]
            entropy = None if step < 0 else float(entropies[step, column])
            listed.append(Word(words.pieces[ids[column]], step, entropy, column < words.starts[sample]))
        return listed

    def plot(self, sample: int = 0, *, pipe: Any = None) -> Figure:
        """Draws how a sample was decoded: the order as a map, the entropies before some of the steps, cost and gain, candidates.

        Images are shown themselves, too, if their pipeline is still in memory; texts by their words.

        Args:
            sample: Which one of the batch, from 0.
            pipe: The pipeline that made it, if that is gone, for the image.

        Returns:
            A figure that notebooks show, and that `savefig` writes.

        Raises:
            ValueError: If there is no such sample, or nothing of it was decoded.
            ModuleNotFoundError: Without matplotlib.
        """
        from .trace_plot import plot_image, plot_text

        view, states = self._view, self.states(sample)
        if view.words is not None:
            return plot_text(self.of_sample(sample), self.written(sample))
        image = None
        if view.images is not None and (pipe or view.images.pipe) is not None:
            image = view.images(states[-1:].unflatten(1, view.grid), sample, pipe)[0]
        return plot_image(self.of_sample(sample), image)

    def frames(self, sample: int = 0, size: int | None = None, *, pipe: Any = None) -> list[PIL.Image.Image]:
        """The picture filling in: one image before the first step and one after each step that the sample took part in.

        What is masked is hatched in grey, what the step decoded has an orange border. The last frame is the image alone. Since
        the pixels of a token also depend on those around it, masked ones count there as what they become in the end. Where
        tokens have no place in the image (TiTok), a frame is what those say that are decoded.

        Args:
            sample: Which one of the batch, from 0.
            size: The longer side in pixels; by default that of the image, or the smallest multiple of it that is at least 256.
            pipe: The pipeline that made it, if that is gone.

        Raises:
            ValueError: If there is no such sample, it is no image, nothing of it was decoded, or the pipeline is gone.
        """
        from .trace_film import draw_frames, enlarged

        view, states = self._view, self.states(sample)
        if view.images is None or view.grid is None:
            raise ValueError("Only images of a pipeline have frames; `plot`, `html` and `ansi` show a text, `plot` any trace.")
        masked = states == view.mask_token_id
        if not view.images.in_cells:
            return [enlarged(image, size) for image in view.images(states.unflatten(1, view.grid), sample, pipe)]
        return draw_frames(
            view.images(torch.where(masked, states[-1], states).unflatten(1, view.grid), sample, pipe),
            masked.unflatten(1, view.grid),
            self.selected[self._took_part(sample), sample].unflatten(1, view.grid),
            size,
        )

    def film(
        self,
        path: str | os.PathLike[str],
        sample: int = 0,
        *,
        seconds_per_step: float | None = None,
        seconds_at_end: float = 2.0,
        size: int | None = None,
        pipe: Any = None,
    ) -> Path:
        """Writes the `frames` of a sample as a film, which begins anew when it has ended (but .mp4, where the player decides).

        Args:
            path: A file .gif, .webp or .mp4; one that exists is replaced.
            sample, size, pipe: As in `frames`.
            seconds_per_step: By default 0.25, and less if the steps would take more than 8 seconds.
            seconds_at_end: How long the finished image stays.

        Returns:
            The path.

        Raises:
            ValueError: For another kind of file, or as `frames`.
            ModuleNotFoundError: For .mp4 without imageio-ffmpeg.
            OSError: If the file cannot be written.
        """
        from .trace_film import check_film, save_film

        check_film(path, seconds_per_step, seconds_at_end)
        return save_film(self.frames(sample, size, pipe=pipe), path, seconds_per_step, seconds_at_end)

    def html(self, sample: int = 0) -> str:
        """A page that shows a text's tokens in the color of the step that decoded them, or of their entropy before it.

        The page needs nothing else, runs no scripts, and shows every token as it is, whatever it holds.

        Raises:
            ValueError: If there is no such sample, it is no text, or nothing of it was decoded.
        """
        from .trace_text import html_fragment, html_page

        return html_page("How this text was decoded", [html_fragment(self.of_sample(sample), self.written(sample))])

    def ansi(self, sample: int = 0, *, by: str = "step", color: bool = True) -> str:
        """A text for a terminal of 256 colors: its tokens in the color of the step that decoded them.

        Args:
            sample: Which one of the batch, from 0.
            by: "step", or "entropy" for the entropy of a token's position before that step.
            color: False for terminals without colors: the text, and a line for every step.

        Raises:
            ValueError: As `html`, or for another `by`.
        """
        from .trace_text import terminal_text

        check_choice("by", by, ("step", "entropy"))
        check_bool("color", color)
        return terminal_text(self.of_sample(sample), self.written(sample), by, color)

    def decoded_nothing_of(self, sample: int) -> bool:
        """Whether there is nothing to draw of a sample, since all of it was known."""
        return not self._took_part(sample).any()

    def took(self) -> str:
        """A line of what the batch took, per sample."""
        batch = self.tokens.shape[1]
        if not batch:
            return "nothing"
        steps = [int(self._took_part(sample).sum()) for sample in range(batch)]
        span = f"{min(steps)}" if min(steps) == max(steps) else f"{min(steps)} to {max(steps)}"
        seconds = "" if self.view is None or self.view.seconds is None else f"; {self.view.seconds:.3g} s in all"
        rows = self.num_evaluations.sum(0).double().mean()
        return (
            f"{span} step{'s' * (max(steps) != 1)}, {rows:.1f} rows of the network (NFE) and "
            f"{self.cumulative_entropy.mean():.1f} nats of cumulative entropy{' each' * (batch > 1)}{seconds}"
        )

    def _repr_html_(self) -> str | None:
        if self.view is None or self.view.words is None or not self.tokens.shape[1] or self.decoded_nothing_of(0):
            return None
        from .trace_text import html_fragment

        return html_fragment(self.of_sample(0), self.written(0))

    def _repr_png_(self) -> bytes | None:
        if self.view is None or self.view.words is not None or not self.tokens.shape[1] or self.decoded_nothing_of(0):
            return None
        if find_spec("matplotlib") is None:
            return None
        from .trace_plot import as_png

        return as_png(self.plot())

    def take(self, sample_index: torch.Tensor) -> DecodingTrace:
        """The trace of some of the samples."""
        view = self.view and self.view.take(sample_index.tolist())
        return DecodingTrace(**{name: value[:, sample_index] for name, value in self.tensors().items()}, view=view)

    def within(self, tokens: torch.Tensor, sample_index: torch.Tensor) -> DecodingTrace:
        """The trace of a larger batch, of which these samples are `sample_index`; the others decode nothing and take nothing.

        Args:
            tokens: (B, L), the state of the whole batch, in which the others stay.
        """
        columns = {}
        for name, value in self.tensors().items():
            fill = torch.nan if name in ("gain", "objective", "entropies") else 0
            columns[name] = value.new_full((len(value), len(tokens), *value.shape[2:]), fill)
        columns["tokens"][:] = tokens
        for name, value in self.tensors().items():
            columns[name][:, sample_index] = value
        return DecodingTrace(**columns, view=None)

    @classmethod
    def join(cls, traces: Sequence[DecodingTrace]) -> DecodingTrace:
        """The steps of several traces of the same batch, one after the other."""
        every = [trace.tensors() for trace in traces]
        joined = {name: torch.cat([tensors[name] for tensors in every]) for name in every[0]}
        return cls(**joined, view=traces[0].view)


class TraceRecorder:
    """Records a trace step by step. It stays on the device until all steps are done, so that none has to wait for the CPU."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def record(
        self, proposal: InfoGainProposal, output: InfoGainSchedulerOutput, tokens: torch.Tensor, counts: dict[str, torch.Tensor]
    ) -> None:
        """Adds a step that led to `tokens` (B, L), with the fields of `DecodingTrace` that count what it took, (B,) each."""
        taken = torch.arange(len(output.winner), device=output.winner.device), output.winner
        self.add(
            num_decoded=proposal.num_decoded[taken],
            cost=proposal.cost[taken],
            gain=output.gain[taken],
            objective=output.objective,
            winner=output.winner,
            selected=proposal.selected[taken],
            log_probability=proposal.log_probability[taken],
            entropies=proposal.entropies.masked_fill(~proposal.masked, torch.nan),
            tokens=tokens.int(),
            **counts,
        )

    def add(self, **values: torch.Tensor) -> None:
        """Adds a step by the fields of `DecodingTrace`, without their first dimension."""
        self.steps.append(values)

    def trace(self, shape: torch.Size, num_candidates: int, view: TraceView) -> DecodingTrace:
        """The trace of all steps; `shape` (B, L) and N give its shapes if there were none."""
        if self.steps:
            columns = {name: torch.stack([step[name] for step in self.steps]).cpu() for name in self.steps[0]}
            return DecodingTrace(**columns, view=view)
        batch, length = shape
        integers = torch.zeros(0, batch, dtype=torch.long)
        numbers = torch.zeros(0, batch, dtype=torch.float32)
        return DecodingTrace(
            num_decoded=integers,
            cost=numbers,
            gain=numbers,
            objective=numbers[..., None].expand(-1, -1, num_candidates),
            winner=integers,
            selected=torch.zeros(0, batch, length, dtype=torch.bool),
            log_probability=numbers,
            num_compared=integers,
            num_states=integers,
            num_evaluations=integers,
            num_passes=integers,
            entropies=torch.zeros(0, batch, length, dtype=torch.float32),
            tokens=torch.zeros(0, batch, length, dtype=torch.int32),
            view=view,
        )
