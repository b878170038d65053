"""Caches of texts or of likelihoods, with their costs, in files of JSON lines, from which a run that was killed is resumed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import append_json_lines, check_fields, cut_unfinished, read_json_lines

_BEGIN = '{"key": '
_COMMON = {
    "key": str,
    "task": (str, type(None)),
    "doc_id": (int, str, type(None)),
    "repeat": int,
    "seed": int,
    "num_evaluations": int,
    "seconds": float,
}


class RecordCache:
    """Reads the records in a file, and appends new ones to it. Each model with its settings needs a file of its own.

    Args:
        path: A file of JSON lines, which need not exist. A last line that a killed run left incomplete is cut off.

    Attributes:
        records: One for each text or answer: "key", what was found, and the entries of `InfoGainLM.costs`.

    Raises:
        ValueError: For a line that is no such record, naming it.
    """

    _fields: Mapping[str, Any]

    def __init__(self, path: str | os.PathLike[str]):
        self.path = path = Path(path)
        self.records: list[dict[str, Any]] = []
        if path.exists():
            cut_unfinished(path, _BEGIN)
            self.records = read_json_lines(path, begin=_BEGIN)
        for number, record in enumerate(self.records, 1):
            check_fields(record, f"Line {number} of {path}", self._fields)
        self._records: dict[str, dict[str, Any]] = {record["key"]: record for record in self.records}

    @staticmethod
    def key(request: Any) -> str:
        """A key by which a record is stored.

        Args:
            request: What tells it from others of the model, as JSON takes it: prompt, seed, and the request's settings.
        """
        return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()

    def get(self, key: str) -> dict[str, Any] | None:
        """The record with this key, or None."""
        return self._records.get(key)

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        """Stores the records of a batch, and appends them to the file before it returns."""
        append_json_lines(records, self.path)
        self.records += records
        self._records |= {record["key"]: record for record in records}


class TextCache(RecordCache):
    """Texts, in the field "text"."""

    _fields = {**_COMMON, "text": str, "max_new_tokens": int, "cumulative_entropy": float}


class EstimateCache(RecordCache):
    """Likelihoods, in the fields "log_likelihood", "standard_error" (None where it is not known) and "is_greedy"."""

    _fields = {**_COMMON, "log_likelihood": float, "standard_error": (float, type(None)), "is_greedy": bool}
