"""Figures that pages show are those of the complete tables in docs/results."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
COMPLETE = ("demo", "emoji", "exact", "text")
NUMBER = re.compile(r"-?\d[\d.]*")


def titled_tables(text: str) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Every table with the bold line above it, up to a colon in it: rows as cells by column."""
    title = ""
    for bold, table in re.findall(r"^\*\*(.+?)\*\*|((?:^\|.*\|\n)+)", text, flags=re.MULTILINE):
        if bold:
            title = bold.partition(":")[0]
            continue
        header, _, *rows = [[cell.strip(" *") for cell in line.strip(" |\n").split(" | ")] for line in table.splitlines()]
        yield title, [dict(zip(header, row, strict=True)) for row in rows]


def rounded_alike(shown: str, full: str) -> bool:
    """Whether every number shown is the rounding of the one in its place, but for trailing zeros; errors may be left out."""
    numbers = list(zip(NUMBER.findall(shown), NUMBER.findall(full), strict=False))
    return bool(numbers) and all(
        abs(float(part) - float(whole)) <= 0.5 * 10 ** -len(part.partition(".")[2]) + 1e-9 for part, whole in numbers
    )


def sections(page: str) -> Iterator[tuple[str, str]]:
    """The sections of a page that name a complete table, as (name of the table, text)."""
    for section in re.split(r"^## ", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        for name in re.findall(r"results/(\w+)_table\.md", section)[:1]:
            yield name, section


@pytest.mark.parametrize("page", ["docs/results.md", "docs/editing.md", "README.md"])
def test_tables_show_figures_of_the_complete_ones(page):
    found = list(sections(page))
    for name, section in found:
        complete = list(titled_tables((DOCS / "results" / f"{name}_table.md").read_text(encoding="utf-8")))
        shown = [(title, row) for title, rows in titled_tables(section) for row in rows if "sampler" in row]
        assert shown, f"{page}: the section that names {name}_table.md has no table of samplers"
        for title, row in shown:
            keys = [key for key in ("sampler", "steps", "guidance") if key in row]
            whole = [
                other for head, rows in complete if head in ("", title) for other in rows if all(other[k] == row[k] for k in keys)
            ]
            assert len(whole) == 1, f"{page}: {len(whole)} rows of {name}_table.md are {[row[key] for key in keys]}"
            for column, cell in row.items():
                assert column in keys or rounded_alike(cell, whole[0][column]), f"{page}: {row['sampler']}, {column}: {cell}"
    if page == "docs/results.md":
        assert sorted(name for name, _ in found) == sorted(COMPLETE)


def test_a_figure_that_differs_is_found():
    assert rounded_alike("94.7 ± 1.1", "94.68 ± 1.13")
    assert not rounded_alike("94.7 ± 1.1", "94.68 ± 1.23")
    assert not rounded_alike("94.7", "94.78")
    assert not rounded_alike("none", "94.78")
