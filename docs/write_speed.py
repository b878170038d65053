"""Writes the tables of docs/speed.md that `examples/measure_speed.sh` has measured: `python docs/write_speed.py`."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).with_name("speed.md")
MEASURED = Path(__file__).with_name("results") / "speed"


def page() -> str:
    """The page with its tables as they were measured, each between `<!-- NAME -->` and `<!-- end -->`."""

    def table(found: re.Match[str]) -> str:
        measured = (MEASURED / f"{found[1]}.txt").read_text(encoding="utf-8").strip()
        return f"<!-- {found[1]} -->\n\n{measured}\n\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", table, PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
