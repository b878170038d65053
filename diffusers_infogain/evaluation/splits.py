"""The three parts of an evaluation (`choices.SPLITS`): which one a problem belongs to, and seeds that no two of them share."""

from __future__ import annotations

import hashlib

from ..choices import SPLITS

SEEDS_PER_SPLIT = 1000
"""Of each split; a seed of a split is below this."""


def split_of(key: str) -> str:
    """The split of a problem that is told from others by `key`: one of the three, by the key's SHA-256."""
    return SPLITS[int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % len(SPLITS)]


def seed_of_split(seed: int, split: str | None) -> int:
    """The seed `seed` of a split: splits count from 1000, 2000 and 3000, and without a split a seed is itself.

    Raises:
        ValueError: For a seed that belongs to another split.
    """
    if split is None:
        return seed
    if not 0 <= seed < SEEDS_PER_SPLIT:
        raise ValueError(f"`seeds` must be from 0 to {SEEDS_PER_SPLIT - 1} with the split {split!r}, got {seed}.")
    return seed + SEEDS_PER_SPLIT * (1 + SPLITS.index(split))
