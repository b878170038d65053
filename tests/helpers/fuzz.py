"""What the fuzz tests share: hostile values, a clock for hangs, and what a refusal must look like."""

from __future__ import annotations

import random
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

SECONDS = 10
LONGEST = 2500


class HangError(BaseException):
    """A case that took too long; no `except Exception` stops it."""


@contextmanager
def limited(seconds: float = SECONDS) -> Iterator[None]:
    """Raises `HangError` in a block that does not end; for the main thread only."""

    def stop(*_: Any) -> None:
        raise HangError(f"not ended after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def is_sentence(text: str) -> bool:
    return bool(text.strip()) and "\n" not in text and len(text) < LONGEST


def values(rng: random.Random) -> Any:
    """Something that an argument may well not be."""
    kinds: list[Callable[[], Any]] = [
        lambda: rng.choice([None, True, False, ..., NotImplemented, object(), object, int, len]),
        lambda: rng.choice([0, 1, 2, 3, -1, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 10**5000]),
        lambda: rng.choice([0.5, -0.0, 1e-300, 1e308, -1e308, float("nan"), float("inf"), -float("inf"), 1j]),
        lambda: rng.choice(
            ["", " ", "x", "a cat", "\0", "\ud800", "ä" * 50, "x" * 100_000, "cpu", "cuda", "constant", "\n\n", "{}"]
        ),
        lambda: rng.choice([b"x", bytearray(b"x"), range(3), iter([1]), {1, 2}, frozenset(), {}, {"a": 1}, {1: 2}, {"": {}}]),
        lambda: [values(rng) for _ in range(rng.randrange(3))],
        lambda: tuple(values(rng) for _ in range(rng.randrange(4))),
        lambda: tensors(rng),
        lambda: rng.choice(
            [np.int64(1), np.float32(0.5), np.array([1, 2]), np.array("x"), np.bool_(True), torch.float64, torch.device("cpu")]
        ),
        lambda: rng.choice([torch.Generator(), [torch.Generator()] * 2, []]),
    ]
    return rng.choice(kinds)()


def tensors(rng: random.Random) -> torch.Tensor:
    shape = [rng.choice([0, 1, 1, 2, 4, 6, 16]) for _ in range(rng.randrange(5))]
    dtype = rng.choice(
        [torch.long, torch.int32, torch.uint8, torch.bool, torch.float16, torch.float32, torch.float64, torch.cfloat]
    )
    tensor = torch.zeros(shape, dtype=dtype)
    if dtype.is_floating_point and rng.random() < 0.7:
        return tensor + rng.choice([float("nan"), float("inf"), -float("inf"), 1e30, 0.5, -1.0])
    if dtype in (torch.long, torch.int32):
        return tensor + rng.choice([0, 1, -1, 5, 10**6, 2**31 - 1])
    return tensor


def attempt(
    call: Callable[[], Any], refusals: tuple[type[Exception], ...] = (ValueError, TypeError, OSError)
) -> Exception | None:
    """Calls; returns the refusal if there was one. Anything else that is raised goes through."""
    with limited(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            call()
        except refusals as error:
            return error
    return None
