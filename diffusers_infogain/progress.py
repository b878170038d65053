"""Progress of long work: bars on terminals and in notebooks, an occasional line in logs."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

import diffusers
import huggingface_hub
import torch
import transformers
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm
from tqdm.notebook import tqdm_notebook

SECONDS_BETWEEN_LINES = 60.0
"""Shortest time between two lines in a log."""


def watched() -> bool:
    """Whether stderr is a terminal, or this is a notebook, where bars can move."""
    return issubclass(tqdm, tqdm_notebook) or sys.stderr.isatty()


def quiet_libraries(main: bool = True) -> None:
    """Disables the loading bars of diffusers, transformers and huggingface_hub in logs, and in all processes but the main one."""
    if not (main and watched()):
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        huggingface_hub.utils.disable_progress_bars()


class Progress(tqdm):
    """tqdm's bar where it is `watched`; elsewhere a line on stderr, at most one per `SECONDS_BETWEEN_LINES`."""

    def __init__(self, *arguments: Any, **options: Any):
        disabled = bool(options.get("disable"))
        self._writes_lines = not disabled and not watched()
        self._begun = self._written = time.monotonic()
        self._done = 0.0
        self._name = options.get("desc", "")
        self._unit = options.get("unit", "it")
        super().__init__(*arguments, **{**options, "disable": disabled or self._writes_lines})

    def __iter__(self) -> Iterator[Any]:
        if not self._writes_lines:
            yield from super().__iter__()
            return
        for item in self.iterable:
            yield item
            self.update()

    def update(self, n: float | None = 1) -> bool | None:
        """Advances by `n` items."""
        if self._writes_lines:
            self._done += n or 0
            self._write_line()
        return super().update(n)

    def _write_line(self) -> None:
        now = time.monotonic()
        if now - self._written >= SECONDS_BETWEEN_LINES:
            self._written = now
            total = len(self.iterable) if self.total is None and hasattr(self.iterable, "__len__") else self.total
            share = f"{self._done:g}" if total is None else f"{self._done:g} of {total}"
            elapsed = tqdm.format_interval(now - self._begun)
            print(f"{self._name}: {share} {self._unit}s after {elapsed}", file=sys.stderr, flush=True)


class ProgressPipeline(DiffusionPipeline):
    """A pipeline that shows its bar only where it is `watched`, unless `set_progress_bar_config(disable=...)` was called."""

    @property
    def _execution_device(self) -> torch.device:
        # diffusers looks for hooks in all modules, which takes as long as several steps of a small model.
        return super()._execution_device if torch.accelerator.is_available() else torch.device("cpu")

    def progress_bar(self, iterable: Any = None, total: int | None = None) -> Any:
        """As in diffusers, but with a copy of the configuration, which calls in other threads read too."""
        config = dict(getattr(self, "_progress_bar_config", {}))
        if "disable" in config or watched():
            return super().progress_bar(iterable, total)
        return tqdm(iterable, total=total, **config, disable=True)
