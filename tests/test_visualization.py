from __future__ import annotations

import pytest
from PIL import Image, ImageFont

from diffusers_infogain.visualization import GridCell, GridRow, _wrapped, labelled_grid


def test_grid_shows_every_image_enlarged_and_framed():
    colors = [(200, 0, 0), (0, 0, 200)]
    cells = [GridCell(Image.new("RGB", (8, 8), color), "note", right) for color, right in zip(colors, (True, False), strict=True)]
    picture = labelled_grid(
        ["one", "a much longer prompt that needs several lines"], [GridRow("row", ["line"], cells)], "title", 64
    )
    counts = {color: count for count, color in picture.getcolors(100_000)}
    for color in colors:
        assert counts[color] == 64 * 64
    assert counts[(0, 158, 115)] >= 72 * 72 - 64 * 64
    assert counts[(213, 94, 0)] >= 72 * 72 - 64 * 64


def test_rows_must_fit_the_columns():
    with pytest.raises(ValueError, match="`rows` must have 2 cells each, got 1 in 'row'"):
        labelled_grid(["one", "two"], [GridRow("row", [], [GridCell(Image.new("RGB", (8, 8)))])])


def test_lines_break_at_spaces_that_may_be_broken():
    font = ImageFont.load_default(14)
    assert _wrapped("one two three", font, int(font.getlength("one two")) + 1) == ["one two", "three"]
    assert _wrapped("one two\u00a0three", font, int(font.getlength("two three")) + 1) == ["one", "two three"]
    assert _wrapped("", font, 10) == []
