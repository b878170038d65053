"""What a call of the text pipeline returns: strings, whole or streamed, and one trace of all blocks."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from diffusers.utils import BaseOutput

from .printing import summary
from .text_canvas import TextCanvas
from .text_ends import Reading, TextEnds
from .trace import DecodingTrace
from .trace_text import html_fragment, html_outputs, visible
from .trace_view import Words

_SHOWN = 8
"""The most texts that a notebook shows of an output."""


@dataclass
class InfoGainTextOutput(BaseOutput):
    """Texts, and how they were decoded.

    Attributes:
        texts: What was written after each prompt, up to the end of the text, and behind the thinking if `think_end_token` was
            given. A text whose prompt held masks is given whole, with its prompt.
        sequences: (B, L) long, prompts and texts, padded to the longest.
        attention_mask: (B, L) bool, False at padding.
        trace: `DecodingTrace` over the columns of `sequences`.
        seeds: The seed of each text: `generator=torch.Generator(device).manual_seed(seed)` writes it again alone.
        num_evaluations: The rows of the network that each text takes by itself, whatever it shared with others of its batch.
        thinking: With `think_end_token`, what stands before it in each text, None where it does not occur; else None.
    """

    texts: list[str]
    sequences: torch.Tensor
    attention_mask: torch.Tensor
    trace: DecodingTrace
    seeds: list[int]
    num_evaluations: list[int]
    thinking: list[str | None] | None = None

    def __repr__(self) -> str:
        return summary(self)

    def _repr_html_(self) -> str:
        """The first texts with their tokens in color, for notebooks."""
        shown = range(min(len(self.texts), _SHOWN))
        took = [f"<p>{html.escape(self.trace.took())}</p>"] if len(self.texts) > 1 else []
        return html_outputs([*took, *map(self.html_part, shown)], len(self.texts) - len(shown))

    def html_part(self, sample: int) -> str:
        """A text with its tokens in color, as a part of a page; as it is if nothing of it was decoded."""
        if self.trace.decoded_nothing_of(sample):
            return f"<p>{html.escape(visible(self.texts[sample]))}</p>"
        return html_fragment(self.trace.of_sample(sample), self.trace.written(sample))


@dataclass
class TextBlock:
    """A finished block, for streaming.

    Attributes:
        index: Number of the block, from 0.
        texts: What the block adds to each text. The parts of all blocks make up the texts of the output: what a later block may
            change is held back until then, such as bytes of a character, the begin of a stop string, or what may be thinking.
        finished: (B,) bool, texts that are complete.
    """

    index: int
    texts: list[str]
    finished: torch.Tensor


class TextWriter:
    """Strings of the texts on a canvas.

    Args:
        canvas: The layout of the texts.
        ends: How texts end. Decodes their ids, too.
    """

    def __init__(self, canvas: TextCanvas, ends: TextEnds):
        self.canvas = canvas
        self.ends = ends
        self._streamed = [""] * len(canvas.tokens)

    def read(self, sample_index: int, ids: Sequence[int], before: int | None = None) -> Reading:
        """What was written behind a prompt; `end` is the column of the token that ends it.

        Args:
            ids: (L,), the row of the canvas as far as it is decoded.
            before: Only up to this column (exclusive), behind which something is still to be decoded.
        """
        kept = self.canvas.attention_mask[sample_index]
        stop = self.canvas.new_end if before is None else before
        columns = [column for column in range(self.canvas.new_starts[sample_index], stop) if kept[column]]
        reading = self.ends.read([ids[column] for column in columns], complete=before is None)
        return replace(reading, end=None if reading.end is None else columns[reading.end])

    def text(self, sample_index: int, ids: Sequence[int], before: int | None = None) -> str:
        """A text up to its end, or what is certain of it, with the prompt if it was infilled; arguments as of `read`."""
        reading = self.read(sample_index, ids, before)
        if not self.canvas.infilled[sample_index]:
            return reading.text
        kept = self.canvas.attention_mask[sample_index]
        stop = min(self.canvas.new_end if column is None else column for column in (reading.end, before))
        text = self.ends.decode([ids[column] for column in range(stop) if kept[column]])
        return text if before is None else text.rstrip("\ufffd")

    def words(self, tokens: torch.Tensor, occurring: torch.Tensor) -> Words:
        """What texts are shown with: every text from its prompt to the token that ends it.

        Args:
            tokens: (B, L), the canvas in the end.
            occurring: All ids that occurred on the way.
        """
        columns = []
        for sample, (ids, kept) in enumerate(zip(tokens.tolist(), self.canvas.attention_mask, strict=True)):
            end = self.read(sample, ids).end
            stop = self.canvas.new_end if end is None else end + 1
            columns.append([column for column in range(stop) if kept[column]])
        ids = torch.cat([occurring.flatten(), tokens.flatten().to(occurring)])
        return Words(self.ends.tokenizer, ids, columns, self.canvas.new_starts)

    def new_text(self, sample_index: int, ids: Sequence[int], before: int, complete: bool) -> str:
        """What a text has gained since the last call of this method.

        Args:
            ids: (L,), decoded up to the column `before`, or all of it if `complete`.
        """
        text = self.text(sample_index, ids, None if complete else before)
        streamed = self._streamed[sample_index]
        self._streamed[sample_index] = text
        return text[len(streamed) :]


@dataclass
class GroupTrace:
    """The trace of texts `sample_index` (R,) that were decoded together in columns `start` to `end` (exclusive).

    Attributes:
        before: (B, L), the canvas of all texts when that began.
    """

    sample_index: torch.Tensor
    start: int
    end: int
    trace: DecodingTrace
    before: torch.Tensor


def join_traces(parts: Sequence[GroupTrace], tokens: torch.Tensor) -> DecodingTrace:
    """One trace (T, B, ...) of all parts, one after the other, over the L columns of the canvas.

    In the steps of a part other texts have no tokens, no cost and no NFE. The state after the last step of a part is that which
    the next one begins with: what a text that has ended is filled up with is there.

    Args:
        tokens: (B, L), the canvas in the end.
    """
    traces = []
    length = tokens.shape[1]
    for part, after in zip(parts, [*(part.before for part in parts[1:]), tokens], strict=True):
        columns = slice(part.start, part.end)
        own = part.trace.tokens
        wide = part.before[part.sample_index].to(own.dtype).expand(len(own), -1, -1).clone()
        wide[..., columns] = own
        margins = (part.start, length - part.end)
        trace = replace(
            part.trace,
            tokens=wide,
            selected=torch.nn.functional.pad(part.trace.selected, margins),
            entropies=torch.nn.functional.pad(part.trace.entropies, margins, value=torch.nan),
        ).within(part.before, part.sample_index)
        trace.tokens[-1:] = after
        traces.append(trace)
    return replace(DecodingTrace.join(traces), view=parts[0].trace.view)
