"""What a trace is drawn with, and what is drawn of one sample of it."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from .files import check_fields

if TYPE_CHECKING:
    import PIL.Image

_AT_ONCE = 8
"""States whose pixels are decoded together."""


class StateImages:
    """Turns states of an image pipeline's call into images. The pipeline is held weakly: a kept output keeps no model in memory.

    Args:
        pipe: Has `state_images(tokens, paste)`, images of states (R, h, w) with the scheduler's mask id.
        edit: The `Edit` that the images are the result of; None if they were generated from nothing.
        in_cells: Whether each token has a place in the image.
        decoding: Further arguments of `state_images`, tensors with an entry per image.
    """

    def __init__(self, pipe: Any, edit: Any = None, in_cells: bool = True, decoding: Mapping[str, torch.Tensor] | None = None):
        self._pipe: weakref.ref[Any] | None = weakref.ref(pipe)
        self._edit = edit
        self.in_cells = in_cells
        self._decoding = dict(decoding or {})

    def __call__(self, states: torch.Tensor, sample: int, pipe: Any = None) -> list[PIL.Image.Image]:
        """An image for each state (R, h, w) of a sample.

        Raises:
            ValueError: If the pipeline is gone, and `pipe` is None or no image pipeline.
        """
        pipe = self.pipe if pipe is None else pipe
        if pipe is None:
            raise ValueError("`pipe` must be given: the pipeline that made these images is not in memory any more.")
        if not hasattr(pipe, "state_images"):
            raise ValueError(f"`pipe` must be the image pipeline that made these images, got {type(pipe).__name__}.")
        paste = None if self._edit is None else self._edit.take([sample]).paste
        # Without a corrector all frames show the same tokens, which are decoded once.
        distinct, number = states.unique(dim=0, return_inverse=True)
        images = []
        for part in distinct.split(_AT_ONCE):
            own = {name: value[[sample] * len(part)] for name, value in self._decoding.items()}
            images += pipe.state_images(part, paste, **own)
        return [images[index] for index in number.tolist()]

    def take(self, samples: Sequence[int]) -> StateImages:
        """The same for some of the samples."""
        taken = copy.copy(self)
        taken._pipe, taken._edit = self._pipe, self._edit and self._edit.take(samples)
        taken._decoding = {name: value[list(samples)] for name, value in self._decoding.items()}
        return taken

    @property
    def pipe(self) -> Any:
        """The pipeline, or None if it is gone."""
        return self._pipe and self._pipe()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_pipe": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> StateImages:
        return self


class Words:
    """The words of texts.

    Args:
        tokenizer: Of transformers.
        ids: All token ids that occur, any shape.
        columns: For each text the columns of the canvas that are shown, from its prompt to its end.
        starts: For each text the first column behind its prompt.
    """

    def __init__(self, tokenizer: Any, ids: torch.Tensor, columns: Sequence[Sequence[int]], starts: Sequence[int]):
        self._tokenizer = tokenizer
        self._ids = ids
        self.columns = [list(shown) for shown in columns]
        self.starts = list(starts)

    @cached_property
    def pieces(self) -> dict[int, str]:
        """What every token adds to a text, by its id."""
        return {number: _piece(self._tokenizer, number) for number in self._ids.unique().tolist()}

    def take(self, samples: Sequence[int]) -> Words:
        """Those of some of the texts."""
        taken = Words(self._tokenizer, self._ids, [self.columns[i] for i in samples], [self.starts[i] for i in samples])
        if "pieces" in vars(self):
            taken.pieces = self.pieces
        return taken

    def __getstate__(self) -> dict[str, Any]:
        return {"pieces": self.pieces, "columns": self.columns, "starts": self.starts, "_tokenizer": None, "_ids": None}


def _piece(tokenizer: Any, number: int) -> str:
    """What a token adds to a text before it, with the space that decoding it alone may drop."""
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    once, twice = (tokenizer.decode([number] * count, **options) for count in (1, 2))
    return twice.removeprefix(once)


@dataclass(frozen=True, kw_only=True)
class TraceView:
    """What a trace is drawn with.

    Attributes:
        mask_token_id: The scheduler's.
        grid: (height, width) in tokens; None if there is none.
        lazy: Whether candidates were looked at one after the other, until one was good enough.
        seconds: How long decoding took.
        images: Turns states into images; None for text, and without a pipeline.
        words: Those of texts; None for images, and without a pipeline.
    """

    mask_token_id: int
    grid: tuple[int, int] | None = None
    lazy: bool = False
    seconds: float | None = None
    images: StateImages | None = None
    words: Words | None = None

    def take(self, samples: Sequence[int]) -> TraceView:
        """The view of some of the samples."""
        return replace(self, images=self.images and self.images.take(samples), words=self.words and self.words.take(samples))


@dataclass(frozen=True)
class Word:
    """A token of a text.

    Attributes:
        text: What it adds to the text.
        step: The (last) step that decoded it, from 0; -1 if it was known.
        entropy: H_l in nats of its position before that step; None if it was known.
        in_prompt: Whether it is part of the prompt.
    """

    text: str
    step: int
    entropy: float | None
    in_prompt: bool


_LISTS = ("num_decoded", "cost", "gain", "winner", "num_compared")


@dataclass(frozen=True, kw_only=True)
class SampleTrace:
    """What is drawn of one sample: its own T steps, those in which it had something to decode. L positions.

    Attributes:
        grid: (height, width) of the positions.
        decoded_at: L numbers, the (last) step that decoded a position, from 0; -1 where it was known.
        num_decoded, cost, gain, winner, num_compared: As in the trace, T numbers each; None where the gain is not known.
        num_evaluations: NFE in all, with those of tries that were given up.
        num_candidates: N.
        lazy: As in the view.
        entropies: (T, L) as in the trace, or None if they were not kept.
    """

    grid: tuple[int, int]
    decoded_at: list[int]
    num_decoded: list[int]
    cost: list[float]
    gain: list[float | None]
    winner: list[int]
    num_compared: list[int]
    num_evaluations: int
    num_candidates: int
    lazy: bool
    entropies: torch.Tensor | None = None

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.cost)

    @property
    def took(self) -> str:
        """A line of what it took."""
        steps, rows = self.num_steps, self.num_evaluations
        return (
            f"{steps} step{'s' * (steps != 1)}, {rows} row{'s' * (rows != 1)} of the network (NFE), "
            f"{sum(self.cost):.1f} nats of cumulative entropy"
        )

    def record(self) -> dict[str, Any]:
        """All but the entropies, for JSON. `read` reads it."""
        lists = {name: getattr(self, name) for name in ("num_evaluations", "num_candidates", "lazy", *_LISTS, "decoded_at")}
        rounded = {name: [value if value is None else round(value, 5) for value in lists[name]] for name in ("cost", "gain")}
        return {"grid": list(self.grid), **lists, **rounded}

    @classmethod
    def read(cls, record: Any, where: str) -> SampleTrace:
        """What `record` wrote.

        Args:
            where: What it was read from, for errors.

        Raises:
            ValueError: If it is not such a record.
        """
        kinds: dict[str, Any] = {name: [int] for name in _LISTS} | {"cost": [float], "gain": [(float, type(None))]}
        kinds |= {"grid": [int], "num_evaluations": int, "num_candidates": int, "lazy": bool, "decoded_at": [int]}
        check_fields(record, where, kinds)
        grid, steps = record["grid"], len(record["cost"])
        fits = len(grid) == 2 and min(grid) > 0 and grid[0] * grid[1] == len(record["decoded_at"])
        fits = fits and {len(record[name]) for name in _LISTS} == {steps}
        if not fits or not all(-1 <= step < steps for step in record["decoded_at"]):
            raise ValueError(f"{where} is damaged: its lists do not fit each other.")
        return cls(**{name: record[name] for name in kinds if name != "grid"}, grid=(grid[0], grid[1]))


def square_or_line(length: int) -> tuple[int, int]:
    """The grid of positions that came without one."""
    side = round(length**0.5)
    return (side, side) if side * side == length else (1, length)


def as_list(values: torch.Tensor) -> list[Any]:
    """Numbers (T,) as a list, with None for NaN."""
    return [None if value != value else value for value in values.tolist()]
