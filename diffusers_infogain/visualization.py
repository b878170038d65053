"""Labelled grids of images, for comparisons of samplers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

_INK, _MUTED = (25, 25, 30), (110, 110, 118)
# Okabe and Ito's green and vermilion, which the color-blind can tell apart.
_RIGHT, _WRONG = (0, 158, 115), (213, 94, 0)
_GAP, _BORDER = 12, 4


@dataclass
class GridCell:
    """An image, a note under it, and whether to frame it as right or wrong (None: no frame)."""

    image: PIL.Image.Image
    note: str = ""
    right: bool | None = None


@dataclass
class GridRow:
    """A row of cells, with a title and smaller lines of text to its left."""

    title: str
    lines: Sequence[str]
    cells: Sequence[GridCell]


def _wrapped(text: str, font: PIL.ImageFont.FreeTypeFont | PIL.ImageFont.ImageFont, width: int) -> list[str]:
    """Lines that fit, broken at spaces; a no-break space, which the font does not have, becomes a usual one."""
    lines: list[str] = []
    for word in filter(None, text.split(" ")):
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return [line.replace("\u00a0", " ") for line in lines]


def labelled_grid(columns: Sequence[str], rows: Sequence[GridRow], title: str = "", cell_size: int = 160) -> PIL.Image.Image:
    """Images in rows and columns with their labels, on white.

    Args:
        columns: A heading for each column, such as the prompt.
        rows: The rows, each with as many cells as there are columns.
        title: Heading of the whole picture.
        cell_size: Width and height to which images are enlarged, in pixels.

    Raises:
        ValueError: If a row does not have one cell per column.
    """
    for row in rows:
        if len(row.cells) != len(columns):
            raise ValueError(f"`rows` must have {len(columns)} cells each, got {len(row.cells)} in {row.title!r}.")
    large, medium, small = (PIL.ImageFont.load_default(size) for size in (20, 14, 11))
    headings = [_wrapped(text, medium, cell_size) for text in columns]
    left = 210
    top = _GAP + (34 if title else 0) + 18 * max(len(lines) for lines in headings) + _GAP
    row_height = cell_size + 2 * _BORDER + 32
    width = left + len(columns) * (cell_size + 2 * _BORDER + _GAP) + _GAP
    picture = PIL.Image.new("RGB", (width, top + len(rows) * (row_height + _GAP)), "white")
    draw = PIL.ImageDraw.Draw(picture)
    frames: dict[bool | None, tuple[int, int, int]] = {None: (255, 255, 255), True: _RIGHT, False: _WRONG}
    draw.text((_GAP, _GAP), title, font=large, fill=_INK)
    for c, lines in enumerate(headings):
        x = left + c * (cell_size + 2 * _BORDER + _GAP)
        for i, line in enumerate(lines):
            draw.text((x, top - _GAP - 18 * (len(lines) - i)), line, font=medium, fill=_INK)
    for r, row in enumerate(rows):
        y = top + r * (row_height + _GAP)
        text_y = y
        for line in _wrapped(row.title, large, left - 2 * _GAP):
            draw.text((_GAP, text_y), line, font=large, fill=_INK)
            text_y += 26
        for text in row.lines:
            for line in _wrapped(text, medium, left - 2 * _GAP):
                draw.text((_GAP, text_y), line, font=medium, fill=_MUTED)
                text_y += 18
        for c, cell in enumerate(row.cells):
            x = left + c * (cell_size + 2 * _BORDER + _GAP)
            frame = frames[cell.right]
            draw.rectangle((x, y, x + cell_size + 2 * _BORDER - 1, y + cell_size + 2 * _BORDER - 1), fill=frame)
            enlarged = cell.image.resize((cell_size, cell_size), PIL.Image.Resampling.LANCZOS)
            picture.paste(enlarged, (x + _BORDER, y + _BORDER))
            note = _wrapped(cell.note, small, cell_size)
            if len(note) > 2:
                note = [note[0], note[1] + " …"]
            for i, line in enumerate(note):
                color = _MUTED if cell.right is None else frame
                draw.text((x, y + cell_size + 2 * _BORDER + 3 + 13 * i), line, font=small, fill=color)
    return picture
