"""Progress of long work: a bar where somebody watches, a plain line now and then where a log is written."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

import diffusers
import huggingface_hub
import transformers
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm
from tqdm.notebook import tqdm_notebook

SECONDS_BETWEEN_LINES = 60.0


def watched() -> bool:
    """Whether bars are seen while they move: on a terminal, or in a notebook."""
    return issubclass(tqdm, tqdm_notebook) or sys.stderr.isatty()


def quiet_libraries() -> None:
    """Switches off the bars by which libraries tell that they load a model, where nobody watches them."""
    if not watched():
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        huggingface_hub.utils.disable_progress_bars()


class Progress(tqdm):
    """tqdm's bar where it is `watched`; elsewhere a line on stderr, a minute after the last one at the earliest."""

    def __init__(self, *arguments: Any, **options: Any):
        wanted = not options.get("disable")
        self._writes_lines = wanted and not watched()
        self._begun = self._written = time.monotonic()
        self._done, self._name, self._unit = 0.0, options.get("desc", ""), options.get("unit", "it")
        super().__init__(*arguments, **{**options, "disable": not wanted or self._writes_lines})

    def __iter__(self) -> Iterator[Any]:
        if not self._writes_lines:
            yield from super().__iter__()
            return
        for item in self.iterable:
            yield item
            self.update()

    def update(self, n: float | None = 1) -> bool | None:
        """Counts `n` more."""
        if self._writes_lines:
            self._done += n or 0
            self._write_line()
        return super().update(n)

    def _write_line(self) -> None:
        now = time.monotonic()
        if now - self._written >= SECONDS_BETWEEN_LINES:
            self._written = now
            total = len(self.iterable) if self.total is None and hasattr(self.iterable, "__len__") else self.total
            of = "" if total is None else f" of {total}"
            after = tqdm.format_interval(now - self._begun)
            print(f"{self._name}: {self._done:g}{of} {self._unit}s after {after}", file=sys.stderr, flush=True)


class ProgressPipeline(DiffusionPipeline):
    """A pipeline whose bars are shown where they are watched only, unless `set_progress_bar_config` says `disable`."""

    def progress_bar(self, iterable: Any = None, total: int | None = None) -> Any:
        """As diffusers'; of a copy of the configuration, since calls in other threads read it too."""
        config = dict(getattr(self, "_progress_bar_config", {}))
        if "disable" in config or watched():
            return super().progress_bar(iterable, total)
        return tqdm(iterable, total=total, **config, disable=True)
