"""Where texts end, by a token or before a string, and what of them is thinking."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from .checks import check_list
from .printing import shown


@dataclass(frozen=True)
class Reading:
    """What new tokens say.

    Attributes:
        text: The text without what ends it; behind the thinking, if there is any.
        thinking: What stands before the end of the thinking; None without one.
        end: Number of the token that ends the text; None if it goes on.
        stopped: Whether that token completes a stop string.
    """

    text: str
    thinking: str | None = None
    end: int | None = None
    stopped: bool = False


class TextEnds:
    """How the texts of a call end.

    A text ends with the first token among `eos_token_ids`, or with the token that completes a stop string. It is then cut where
    the first of the strings that are complete begins. Stop strings count behind the thinking. Where it never ends, the whole
    text counts once it is complete.

    Args:
        tokenizer: Decodes ids. Strings that are tokens added to its vocabulary, special ones too, are recognised by their ids.
        eos_token_ids: Tokens that end a text.
        stop_strings: A string or several, none of them empty.
        think_end_token: What ends the thinking, such as "</think>".

    Raises:
        ValueError: For strings that are none, or empty.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        eos_token_ids: Collection[int],
        stop_strings: Any = None,
        think_end_token: Any = None,
    ):
        self.tokenizer = tokenizer
        self.eos_token_ids = frozenset(eos_token_ids)
        self.stop_strings = _stop_strings(stop_strings)
        if think_end_token is not None and not (isinstance(think_end_token, str) and think_end_token):
            raise ValueError(f"`think_end_token` must be a non-empty string or None, got {shown(think_end_token)}.")
        self.think_end_token = str(think_end_token or "")
        added = tokenizer.get_added_vocab() if self.stop_strings or think_end_token else {}
        self._stop_ids = {added[stop] for stop in self.stop_strings if stop in added}
        self._think_end_id = added.get(think_end_token)

    def read(self, ids: Sequence[int], complete: bool = False) -> Reading:
        """Reads the new tokens of a text.

        Args:
            ids: From the first one on, as many as are decoded without a gap.
            complete: Whether none will follow. Otherwise what later tokens may change is left out of the text.
        """
        eos = next((number for number, token in enumerate(ids) if token in self.eos_token_ids), None)
        ids = list(ids if eos is None else ids[:eos])
        complete = complete or eos is not None
        answer_from = self._answer_from(ids)
        if answer_from is None and not complete:
            return Reading("")
        count = len(ids)
        if self._stops_in(ids, answer_from or 0, count):
            counts = range(answer_from or 0, count)
            count = counts.start + bisect_left(counts, True, key=lambda n: self._stops_in(ids, answer_from or 0, n))
            thinking, text = self._parts(ids[:count], answer_from)
            starts = [text.find(stop) for stop in self.stop_strings if stop in text]
            return Reading(text[: min(starts, default=len(text))], thinking, count - 1, stopped=True)
        thinking, text = self._parts(ids, answer_from)
        return Reading(text if complete else self._settled(text), thinking, eos)

    def _answer_from(self, ids: list[int]) -> int | None:
        """The number of tokens up to the end of the thinking; None if there is no end, 0 if there is no thinking."""
        if not self.think_end_token:
            return 0
        if self._think_end_id in ids:
            return ids.index(self._think_end_id) + 1
        if self.think_end_token not in self.decode(ids):
            return None
        return bisect_left(range(len(ids)), True, key=lambda count: self.think_end_token in self.decode(ids[:count]))

    def _parts(self, ids: list[int], answer_from: int | None) -> tuple[str | None, str]:
        """The thinking and the answer of some tokens."""
        if not answer_from:
            return None, self.decode(ids)
        if self._think_end_id in ids:
            return self.decode(ids[: answer_from - 1]), self.decode(ids[answer_from:]).lstrip()
        thinking, _, text = self.decode(ids).partition(self.think_end_token)
        return thinking, text.lstrip()

    def _stops_in(self, ids: list[int], answer_from: int, count: int) -> bool:
        """Whether a stop string is complete in the answer that the first `count` tokens make."""
        if not self._stop_ids.isdisjoint(ids[answer_from:count]):
            return True
        text = self._parts(ids[:count], answer_from)[1] if self.stop_strings else ""
        return any(stop in text for stop in self.stop_strings)

    def _settled(self, text: str) -> str:
        """The text without the begin of a stop string, or of a character of which some bytes are missing, at its end."""
        text = text.rstrip("\ufffd")
        open_from = len(text)
        for stop in self.stop_strings:
            for length in range(1, len(stop)):
                if text.endswith(stop[:length]):
                    open_from = min(open_from, len(text) - length)
        return text[:open_from]

    def decode(self, ids: Sequence[int]) -> str:
        """Ids as a string, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def _stop_strings(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    described = "a non-empty string, a list of them, or None"
    strings = [value] if isinstance(value, str) else check_list("stop_strings", value, str, described)
    if not all(strings):
        raise ValueError(f"`stop_strings` must be {described}, got {shown(value)}.")
    return tuple(strings)
