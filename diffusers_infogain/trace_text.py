"""A text as it was decoded: as HTML, and in a terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

NEWLINE = "↵"
"""What a line break is shown as."""


def visible(text: str) -> str:
    """A token with signs for line breaks, tabs and anything else that prints nothing, so that no text can act on a terminal."""
    signs = {"\n": NEWLINE, "\t": "→", "\r": "␍"}
    shown = (signs.get(c, "�" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c) for c in text)
    return "".join(shown)


def ink_on(color: Sequence[float]) -> str:
    """Black or white, whichever is read better on a color (R, G, B) in [0, 1], by the contrast of WCAG 2."""
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in color]
    luminance = sum(share * value for share, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return "#000000" if luminance > 0.179 else "#ffffff"
