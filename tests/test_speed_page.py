"""docs/speed.md has the tables that were measured."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_the_page_is_what_the_script_writes():
    written = runpy.run_path(str(DOCS / "write_speed.py"))["page"]()
    assert written == (DOCS / "speed.md").read_text(encoding="utf-8"), "run: python docs/write_speed.py"


def test_the_records_are_of_one_machine():
    records = [json.loads(path.read_text(encoding="utf-8")) for path in (DOCS / "results" / "speed").glob("*.json")]
    names = re.findall(r"<!-- (?!end )(\w+) -->", (DOCS / "speed.md").read_text(encoding="utf-8"))
    assert len(records) == len(names)
    machines = [{**record["machine"], "threads": None, "compiled": None} for record in records]
    assert all(machine == machines[0] for machine in machines)
