"""Writes the table of docs/memory.md from the shapes of published models: `python docs/write_memory.py`."""

from __future__ import annotations

import re
from pathlib import Path

from diffusers_infogain.memory import memory_needs, published_sizes

PAGE = Path(__file__).with_name("memory.md")


def gigabytes(num_bytes: int) -> str:
    """With two digits after the point."""
    return f"{num_bytes / 1e9:.2f}"


def table() -> str:
    """A row for every published model: its weights, and the peak of its settings, in GB."""
    settings = [(None, 1, None), (None, 4, None), ("int8", 4, None), ("nf4", 4, None), ("int8", 4, 1)]
    rows = [
        "| model | weights: bfloat16 | int8 | nf4 | 1 candidate | 4 candidates | 4, int8 | 4, nf4 | 4, int8, one by one |",
        "|---" * 9 + "|",
    ]
    for name in published_sizes():
        cells = [name, *(gigabytes(memory_needs(name, quantization=kind).weights) for kind in (None, "int8", "nf4"))]
        for kind, candidates, states in settings:
            needs = memory_needs(name, quantization=kind, num_candidates=candidates, lookahead_batch_size=states)
            cells.append(gigabytes(needs.peak))
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def page() -> str:
    """The page with its table as it should be."""
    text, count = re.subn(r"(?<=<!-- memory -->\n\n)(?:\|.*\n)*", table() + "\n", PAGE.read_text(encoding="utf-8"))
    if count != 1:
        raise ValueError(f"{PAGE} must have one table under <!-- memory -->, got {count}.")
    return text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
