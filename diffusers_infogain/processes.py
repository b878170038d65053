"""Several processes that share the work of one command, as `accelerate launch` and `torchrun` start them.

They meet at the launcher's store, through which only JSON passes. No wait there lasts longer than a fraction of a second before
signals, and the failure of another process, are noticed; and none times out, however long the others take.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

T = TypeVar("T")

_JOINS = itertools.count()  # each with keys of its own, as all processes join equally often
_JOINING = timedelta(minutes=10)
_LONGEST_PAUSE = 0.05
_PART = 2**22  # of a value: the store takes less than 8 MiB at once
_FAILED, _ENDED = "failed", "ended"
_MOMENT = 1.0  # in seconds


class OtherProcessFailedError(Exception):
    """Ends this process because another one, which says why, has failed."""


def launched() -> tuple[int, int]:
    """The index of this process among those that a launcher started, and their number; 0 and 1 without a launcher.

    Raises:
        ValueError: If the launcher's variables are no such numbers.
    """
    index, count = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if index is None or count is None:
        return 0, 1
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ValueError(
            f"RANK and WORLD_SIZE, which a launcher sets, must be an index and a number, got {index!r} and {count!r}."
        )
    return int(index), int(count)


def local_index() -> int | None:
    """The index of this process among those of its machine, if a launcher tells it."""
    text = os.environ.get("LOCAL_RANK", "")
    return int(text) if text.isdecimal() else None


def place() -> str:
    """For the end of a message: the rank of the process that it is of, unless that is the main one."""
    with contextlib.suppress(ValueError):
        index, _ = launched()
        return f" (rank {index})" if index else ""
    return ""


def batches_of(items: Sequence[T], batch_size: int) -> list[list[T]]:
    """The items in order, `batch_size` at a time."""
    return [list(items[first : first + batch_size]) for first in range(0, len(items), batch_size)]


class Processes:
    """This process among those that share the work of a command; by default it is alone.

    All of them call the same methods in the same order.

    Args:
        index: Of this process.
        count: Of all of them.
        store: Where they meet, such as a `torch.distributed.TCPStore`.
    """

    def __init__(self, index: int = 0, count: int = 1, store: Any = None):
        self.index = index
        self.count = count
        self._store = store
        self._stage = 0

    @property
    def is_main(self) -> bool:
        """Whether this is the process that owns what is written once: locks, tables, what is printed."""
        return self.index == 0

    def map(
        self,
        function: Callable[[list[T]], Any],
        batches: Sequence[list[T]],
        description: str,
        unit: str,
        *,
        bar: bool = True,
    ) -> Iterator[Any]:
        """The results of all batches in their order, in the main process; in the others, which work as well, nothing.

        Each batch is taken by the next process that is free, so that all end at about the same time. A result is there as soon
        as it and all before it are made. When the main process is through, all work is done; the others go on without waiting.

        Args:
            function: What to do with a batch. Its results have to be JSON if there are several processes.
            description: Shown beside the progress bar, which is the main process's.
            unit: What batches consist of.
        """
        from .progress import Progress  # here, since the command line asks for `launched` before anything heavy is imported

        name, last = self._next_stage(), len(batches) - 1
        own: dict[int, Any] = {}
        taken, delivered = -1, 0
        with Progress(total=sum(map(len, batches)), desc=description, unit=unit, disable=not (bar and self.is_main)) as progress:
            while delivered <= last if self.is_main else taken <= last:
                if delivered in own or (self.is_main and self._has(f"{name}/{delivered}")):
                    result = own.pop(delivered) if delivered in own else self._get(f"{name}/{delivered}", remove=True)
                    progress.update(len(batches[delivered]))
                    delivered += 1
                    yield result
                elif taken <= last:
                    taken = self._take(name, taken)
                    if taken > last:
                        continue
                    made = function(batches[taken])
                    if self.is_main:
                        own[taken] = made
                    else:
                        self._set(f"{name}/{taken}", made)
                else:
                    self._wait(f"{name}/{delivered}")

    def from_main(self, value: Any = None) -> Any:
        """What the main process calls this with, as JSON: the others wait for it."""
        name = self._next_stage()
        if self._store is None:
            return value
        if self.is_main:
            self._set(name, value)
            return value
        self._wait(name)
        return self._get(name)

    def to_main(self) -> None:
        """The main process waits until all others have come here; they go on at once."""
        name = self._next_stage()
        if not self.is_main:
            self._set(f"{name}/{self.index}", None)
        for index in range(1, self.count) if self.is_main else ():
            self._wait(f"{name}/{index}")

    def _next_stage(self) -> str:
        if self._store is not None:
            self._stage += 1
        return str(self._stage)

    def _take(self, name: str, before: int) -> int:
        """The number of the next batch that no process has taken yet."""
        if self._store is None:
            return before + 1
        self._end_if_another_failed()
        with _connected():
            return self._store.add(f"{name}/next", 1) - 1

    def _has(self, key: str) -> bool:
        if self._store is None:
            return False
        with _connected():
            return self._store.check([key])

    def _wait(self, key: str) -> None:
        pause = 0.001
        while not self._has(key):
            self._end_if_another_failed()
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _set(self, key: str, value: Any) -> None:
        text = json.dumps(value)  # ASCII
        parts = [text[start : start + _PART] for start in range(0, len(text), _PART)]
        with _connected():
            for number, part in enumerate(parts):
                self._store.set(f"{key}/{number}", part)
            self._store.set(key, str(len(parts)))

    def _get(self, key: str, remove: bool = False) -> Any:
        with _connected():
            keys = [f"{key}/{number}" for number in range(int(self._store.get(key)))]
            text = b"".join(map(self._store.get, keys))
            for used in [*keys, key] if remove else ():
                self._store.delete_key(used)
        return json.loads(text)

    def _end_if_another_failed(self) -> None:
        if self._has(_FAILED):
            raise OtherProcessFailedError

    def _fails_first(self) -> bool:
        """Tells the others that this process fails; whether none has said so before."""
        if self._store is None:
            return True
        with contextlib.suppress(OtherProcessFailedError), _connected():
            return self._store.add(_FAILED, 1) == 1
        return True

    def _end(self) -> None:
        """After a failure: the main process, which may hold the store, gives the others a moment to notice."""
        if self._store is None:
            return
        deadline = time.monotonic() + _MOMENT
        with contextlib.suppress(OtherProcessFailedError), _connected():
            self._store.add(_ENDED, 1)
            while self.is_main and self._store.add(_ENDED, 0) < self.count and time.monotonic() < deadline:
                time.sleep(_LONGEST_PAUSE)


ALONE = Processes()
"""A process that shares its work with no other."""


@contextmanager
def _connected() -> Iterator[None]:
    import torch

    try:
        yield
    except torch.distributed.DistError as error:
        raise OtherProcessFailedError("the connection to the main process or its launcher is lost") from error


@contextmanager
def joined() -> Iterator[Processes]:
    """This process among those that a launcher started, which all end if one fails; a process of its own without a launcher.

    Raises:
        OtherProcessFailedError: If another process failed first.
        ValueError: If the launcher's variables are incomplete.
    """
    index, count = launched()
    processes = Processes(index, count, _store(index, count)) if count > 1 else ALONE
    try:
        yield processes
        processes.to_main()  # which may hold the store, and is the last to leave
    except OtherProcessFailedError:
        processes._end()
        raise
    except BaseException as error:
        first = processes._fails_first()
        processes._end()
        if first:
            raise
        raise OtherProcessFailedError from error


def _store(index: int, count: int) -> Any:
    from torch.distributed import PrefixStore, rendezvous

    with _connected():
        store, _, _ = next(rendezvous("env://", rank=index, world_size=count, timeout=_JOINING))
    return PrefixStore(f"diffusers-infogain/{next(_JOINS)}", store)
