"""What is said where an optional package is missing."""

import re
from pathlib import Path

from diffusers_infogain.extras import missing

ROOT = Path(__file__).parents[1]


def test_the_sentence_says_what_works_from_a_clone():
    error = missing("Plots need", "matplotlib", "eval", "matplotlib")
    assert str(error) == "Plots need matplotlib: in a clone of this package, pip install -e '.[eval]'."
    assert error.name == "matplotlib"


def test_no_page_and_no_message_installs_what_is_not_published():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *(ROOT / "diffusers_infogain").rglob("*.py")]
    for page in pages:
        assert not re.search(r"pip install '?diffusers_infogain", page.read_text(encoding="utf-8")), page


def test_the_extras_that_are_named_exist():
    extras = set(re.findall(r"^([a-z-]+) = \[", (ROOT / "pyproject.toml").read_text(), flags=re.M))
    for path in (ROOT / "diffusers_infogain").rglob("*.py"):
        for extra in re.findall(r'missing\("[^"]*", f?"[^"]*", "([^"]*)"', path.read_text()):
            assert extra in extras
