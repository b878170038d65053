"""docs/settings.md and docs/algorithm.md have what the code has."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

from diffusers_infogain.choices import PRESETS, SAMPLER_DESCRIPTIONS
from diffusers_infogain.rules import RULES

DOCS = Path(__file__).parents[1] / "docs"


def test_the_page_is_what_the_script_writes():
    written = runpy.run_path(str(DOCS / "write_settings.py"))["page"]()
    assert written == (DOCS / "settings.md").read_text(encoding="utf-8"), "run: python docs/write_settings.py"
    assert all(f'"{name}"' in written for name in PRESETS)


def test_every_rule_has_its_line():
    (table,) = re.findall(r"(?<=^## Rules φ\n).*?(?=^## )", (DOCS / "algorithm.md").read_text(encoding="utf-8"), re.S | re.M)
    rows = dict(re.findall(r"^\| (\w+)( \(sampler only\))? \|", table, flags=re.M)) | {}
    rows.pop("name")
    greedy = [name for name in SAMPLER_DESCRIPTIONS if name not in ("info_gain", "lookum")]
    assert list(rows) == greedy
    assert [name for name in rows if not rows[name]] == [name for name in greedy if name in RULES]
