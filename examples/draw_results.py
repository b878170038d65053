#!/usr/bin/env python
"""Draws the pictures of docs/results.md from the figures that lie beside them.

    python examples/draw_results.py docs/results

`results.json` is what `diffusers-infogain compare` wrote.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from diffusers_infogain.evaluation import comparison, report
from diffusers_infogain.files import read_json

NAMED = (
    "MaskGIT",
    "MaskGIT, entropy bound",
    "lookahead (default)",
    "lookahead, summed gain, no entropy bound",
    "lookahead, summed gain, entropy bound",
    "lookahead as in the paper",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="with results.json; pictures are written there")
    folder = parser.parse_args().folder
    groups = comparison.summarize(read_json(folder / "results.json")["runs"])
    quality = comparison.choose_quality(groups)
    series = report.choose_series(groups, quality, NAMED)
    report.plot_pareto(groups, quality, folder / "pareto_rows.png", "model_rows", series)
    report.plot_pareto(groups, quality, folder / "pareto_calls.png", "model_calls", series)
    report.plot_quality_entropy(groups, quality, folder / "quality_entropy.png", series)
    report.plot_winners(groups, folder / "winners.png", series)
    report.plot_trajectories(groups, folder / "entropy_8_steps.png", 8, series)
    print(report.correlation_text(comparison.quality_entropy_correlation(groups, quality)))


if __name__ == "__main__":
    main()
