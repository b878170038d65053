"""The images of a comparison side by side: a row for each prompt, a column for each configuration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import PIL.Image

from ..files import replacing
from ..visualization import GridCell, GridRow, labelled_grid
from .groups import Record
from .image_comparison import ImageCell, image_groups
from .prompts import Prompt, requests
from .samplers import describe_sampler

MAX_COLUMNS = 8
"""Configurations that a sheet shows; more would not fit on a screen."""


def write_sheet(
    path: Path, folder: Path, cells: Sequence[ImageCell], records: Sequence[Record], prompts: Sequence[Prompt], copies: int
) -> int:
    """Writes a JPEG of the first image of each prompt under each configuration, at the first seed of the comparison.

    Args:
        folder: That of the comparison, with its runs; configurations whose images were removed are left out.
        cells: Its runs; the first `MAX_COLUMNS` configurations are shown.
        records: What is known of them (`Results.of`).
        prompts: Those to show, the first ones of the comparison.
        copies: Images per prompt.

    Returns:
        How many configurations are shown; without any, no file is written.
    """
    files = [request.file for request in requests(prompts, copies)[::copies]]
    first = min(cell.seed for cell in cells)
    found = {cell: [folder / "runs" / cell.name / "images" / file for file in files] for cell in cells if cell.seed == first}
    columns = [cell for cell, paths in found.items() if all(path.exists() for path in paths)][:MAX_COLUMNS]
    if not columns:
        return 0
    known = {cell: cell.find(records) or {} for cell in columns}
    rows = []
    for number, prompt in enumerate(prompts):
        shown = []
        for cell in columns:
            with PIL.Image.open(found[cell][number]) as image:
                picture = image.convert("RGB")
            verdicts = known[cell].get("right")
            right = verdicts[number * copies] == "1" if verdicts else None
            shown.append(GridCell(picture, {None: "", True: "right", False: "wrong"}[right], right))
        rows.append(GridRow("", [prompt.text], shown))
    side = max(cell.image.width for cell in rows[0].cells)
    sheet = labelled_grid([_heading(cell, records) for cell in columns], rows, cell_size=min(max(side, 128), 256))
    with replacing(path) as file:
        sheet.save(file, format="JPEG", quality=90)
    return len(columns)


def _heading(cell: ImageCell, records: Sequence[Record]) -> str:
    """The sampler in words, and what an image took: one run's figures."""
    candidates = "" if cell.num_candidates is None else f", N\u00a0=\u00a0{cell.num_candidates}"
    words = f"{describe_sampler(cell.sampler.name)}{candidates}, {cell.steps}\u00a0steps"
    record = cell.find(records)
    if record is None:
        return words
    (group,) = image_groups([record])
    return f"{words}: {group.value('num_evaluations'):.4g}\u00a0NFE, {group.value('seconds_per_image'):.2g}\u00a0s"
