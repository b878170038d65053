"""Figures that pages show are those of the complete tables in docs/results."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
RESULTS = (DOCS / "results.md").read_text(encoding="utf-8")


def tables(text: str) -> list[list[list[str]]]:
    """The rows of every table, its header first."""
    found = re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE)
    rows = [[[cell.strip() for cell in line.strip(" |").split(" | ")] for line in table.splitlines()] for table in found]
    return [[header, *body] for header, _, *body in rows]


def mean(cell: str) -> str:
    return cell.strip("*").split(" ± ")[0]


def rounded_alike(shown: str, full: str) -> bool:
    """Whether a figure is the rounding of another with more decimals, but for trailing zeros."""
    decimals = len(shown.partition(".")[2])
    return abs(float(shown) - float(full)) <= 0.5 * 10**-decimals + 1e-9


def test_the_demo_model():
    (complete,) = tables((DOCS / "results" / "demo_table.md").read_text(encoding="utf-8"))
    known = {tuple(row[:3]): dict(zip(complete[0], row, strict=True)) for row in complete[1:]}
    assert f"All {len(known)} configurations" in RESULTS
    count = 0
    for section in RESULTS.split("\n### ")[1:]:
        guidance = "1" if section.startswith("Without guidance") else "1.2"
        for header, *rows in tables(section):
            if header[:2] != ["sampler", "steps at most"] or "FD" not in header:
                continue
            for sampler, steps, accuracy, nfe, passes, entropy, distance, precision, recall, seconds in rows:
                figures = known[steps, sampler, guidance]
                assert (accuracy, entropy) == (figures["accuracy (%)"].strip("*"), figures["cumulative entropy (nats)"])
                assert rounded_alike(nfe, mean(figures["states"])), (sampler, steps)
                assert rounded_alike(passes, mean(figures["sequential passes"])), (sampler, steps)
                assert rounded_alike(seconds, mean(figures["s per image"])), (sampler, steps)
                assert distance == figures["FD (demo VQ encoder, channel means)"]
                assert rounded_alike(precision, mean(figures["precision"])), (sampler, steps)
                assert rounded_alike(recall, mean(figures["recall"])), (sampler, steps)
                count += 1
    assert count == 49


def test_the_exact_models():
    complete = (DOCS / "results" / "exact_tables.md").read_text(encoding="utf-8")
    count = 0
    for title, body in re.findall(r"^\*\*(.*)\*\*\n\n((?:\|.*\|\n)+)", RESULTS, flags=re.MULTILINE):
        (block,) = re.findall(rf"^\*\*{re.escape(title)}\*\*.*\n\n((?:\|.*\|\n)+)", complete, flags=re.MULTILINE)
        for line in body.splitlines()[2:]:
            assert line in block.splitlines()
            count += 1
    assert count == 36


def test_what_is_recommended_has_the_same_figures_everywhere():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for table in tables(readme):
        for _, settings, accuracy, nfe, _ in table[1:]:
            assert f"{accuracy} %" in RESULTS, settings
            assert re.search(rf"\b{re.escape(nfe.removesuffix('.0'))}(\.0)?\b", RESULTS), settings
