#!/usr/bin/env python
"""Draws the plots of docs/results.md and writes its table from `results.json`, which `diffusers-infogain compare` wrote.

python examples/draw_results.py docs/results
"""

from __future__ import annotations

import argparse
from pathlib import Path

from diffusers_infogain.evaluation import groups, image_comparison, plots, tables
from diffusers_infogain.files import read_json, save_text

NAMED = (
    "MaskGIT",
    "fast (greedy)",
    "lookahead (default)",
    "lookahead (default), lazy threshold 3",
    "lookahead (default), all candidates",
    "lookahead as in the paper",
)
HEADING = """# Every configuration on the demo model

Made by `examples/reproduce_results.sh` and `examples/draw_results.py`; [results.md](../results.md) explains it.

"""
DESCRIPTION = "Demo model, 150 held-out captions of the final split, guidance 1.2 unless noted, CPU, float32."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    text = "holds results.json, and rivals.json if there are any to compare with; plots and demo_table.md are written there"
    parser.add_argument("folder", type=Path, help=text)
    folder = parser.parse_args().folder
    content = read_json(folder / "results.json")
    found = image_comparison.image_groups(content["runs"])
    path = folder / "rivals.json"
    rivals = image_comparison.read_rivals(path, content["settings"]) if path.exists() else []
    quality = groups.choose_quality(found)
    series = plots.choose_series(found, quality, NAMED)
    plots.plot_pareto(found, quality, series, folder / "pareto_rows.png", "num_evaluations")
    plots.plot_pareto(found, quality, series, folder / "pareto_calls.png", "sequential_passes")
    plots.plot_quality_entropy(found, quality, series, folder / "quality_entropy.png")
    save_text(HEADING + tables.image_report(found, quality, DESCRIPTION, rivals), folder / "demo_table.md")


if __name__ == "__main__":
    main()
