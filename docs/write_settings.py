"""Writes the table of docs/settings.md from `diffusers_infogain.settings`: `python docs/write_settings.py`."""

from __future__ import annotations

import re
from pathlib import Path

from diffusers_infogain.choices import SAMPLER_DESCRIPTIONS
from diffusers_infogain.settings import SETTINGS

PAGE = Path(__file__).with_name("settings.md")


def settings_table() -> str:
    """A row for every setting of the scheduler: name, default, values allowed, and what it does."""
    rows = ["| setting | default | allowed | what it does |", "|---|---|---|---|"]
    for name, setting in SETTINGS.items():
        default = f'"{setting.default}"' if isinstance(setting.default, str) else repr(setting.default)
        rows.append(f"| `{name}` | `{default}` | {setting.allowed} | {setting.help} |")
    return "\n".join(rows)


def samplers_table() -> str:
    """A row for every sampler, with its one line."""
    rows = [f"| {name} | {line} |" for name, line in SAMPLER_DESCRIPTIONS.items()]
    return "\n".join(["| sampler | what it does |", "|---|---|", *rows])


def page() -> str:
    """The page with its tables as they should be."""
    text = PAGE.read_text(encoding="utf-8")
    for title, table in (("Settings", settings_table()), ("Samplers", samplers_table())):
        text, count = re.subn(rf"(?<=^## {title}\n\n)(?:\|.*\n)+", lambda _, table=table: table + "\n", text, flags=re.MULTILINE)
        if count != 1:
            raise ValueError(f"{PAGE} must have one table under the heading {title}, got {count}.")
    return text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
