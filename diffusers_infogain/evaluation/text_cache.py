"""A cache of texts and their costs in a file of JSON lines, from which a run that was killed is resumed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import append_json_lines, check_fields, cut_unfinished, read_json_lines

_BEGIN = '{"key": '
_FIELDS = {
    "key": str,
    "text": str,
    "task": (str, type(None)),
    "doc_id": (int, str, type(None)),
    "repeat": int,
    "seed": int,
    "max_new_tokens": int,
    "num_evaluations": int,
    "cumulative_entropy": float,
    "seconds": float,
}


class TextCache:
    """Reads the texts in a file, and appends new ones to it. Each model with its settings needs a file of its own.

    Args:
        path: A file of JSON lines, which need not exist. A last line that a killed run left incomplete is cut off.

    Attributes:
        records: One for each text: "key", "text" and the entries of `InfoGainLM.costs`.

    Raises:
        ValueError: For a line that is no such record, naming it.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = path = Path(path)
        self.records: list[dict[str, Any]] = []
        if path.exists():
            cut_unfinished(path, _BEGIN)
            self.records = read_json_lines(path, begin=_BEGIN)
        for number, record in enumerate(self.records, 1):
            check_fields(record, f"Line {number} of {path}", _FIELDS)
        self._texts: dict[str, str] = {record["key"]: record["text"] for record in self.records}

    @staticmethod
    def key(request: Any) -> str:
        """A key by which a text is stored.

        Args:
            request: What tells it from other texts of the model, as JSON takes it: prompt, seed, and the request's settings.
        """
        return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()

    def get(self, key: str) -> str | None:
        """The text with this key, or None."""
        return self._texts.get(key)

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        """Stores the texts of a batch, and appends them to the file before it returns."""
        append_json_lines(records, self.path)
        self.records += records
        self._texts |= {record["key"]: record["text"] for record in records}
