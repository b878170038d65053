"""Links between pages, and from pages into the package, lead somewhere: on the forge and on the site."""

from __future__ import annotations

import ast
import importlib
import re
import unicodedata
from pathlib import Path

import pytest

import diffusers_infogain

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "diffusers_infogain/**/*.md", "tests/**/*.md", ".github/**/*.md")
    for path in ROOT.glob(pattern)
)
API = sorted((ROOT / "docs" / "api").glob("*.md"))


def prose(path: Path) -> str:
    """A page without its code."""
    text = re.sub(r"^ *```.*?^ *```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "code", text)


def anchors(path: Path) -> list[set[str]]:
    """Those of a page's headings, as the forge and as the site make them."""
    text = re.sub(r"^ *```.*?^ *```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = [re.sub(r"[`*]", "", heading).strip() for heading in re.findall(r"^#+ (.*)", text, flags=re.MULTILINE)]
    on_the_forge = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    plain = [unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode() for heading in headings]
    on_the_site = {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in plain}
    return [on_the_forge, on_the_site]


@pytest.mark.parametrize("page", PAGES)
def test_links_and_anchors(page):
    path = ROOT / page
    for link in re.findall(r"\]\(((?!https?:|mailto:)[^)\s]+)\)", prose(path)):
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.is_file(), link
        if anchor:
            assert all(anchor in known for known in anchors(target)), link


def test_pages_are_in_the_navigation_of_the_site():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for path in (ROOT / "docs").rglob("*.md"):
        assert re.search(rf"[ :-] {re.escape(path.relative_to(ROOT / 'docs').as_posix())}$", navigation, flags=re.MULTILINE), path


def test_the_reference_has_every_public_name():
    text = "\n".join(path.read_text(encoding="utf-8") for path in API)
    names = re.findall(r"^::: (\S+)", text, flags=re.MULTILINE)
    public = {f"diffusers_infogain.{name}" for name in diffusers_infogain.__all__}
    assert public <= set(names)
    assert len(names) == len(set(names))
    assert public == set(re.findall(r"\]\[(\S+?)\]", (ROOT / "docs" / "api" / "index.md").read_text(encoding="utf-8")))
    for name in set(names) - public:
        module, _, member = name.rpartition(".")
        path = ROOT.joinpath(*name.split(".")).with_suffix(".py")
        assert path.exists() or hasattr(importlib.import_module(module), member), name


def messages() -> list[str]:
    """The texts in the package's source; what varies in them is "...", as in the FAQ."""
    texts = []
    for path in (ROOT / "diffusers_infogain").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def test_the_error_messages_of_the_faq_exist():
    quoted = re.findall(r"^\*\*(`+) ?(.+?) ?\1\*\*$", (ROOT / "docs" / "faq.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(quoted) > 20
    texts = messages()
    gone = [message for _, message in quoted if not any(as_pattern(message).search(text) for text in texts)]
    assert not gone, "docs/faq.md explains messages that no longer exist"


def as_pattern(message: str) -> re.Pattern[str]:
    parts = [part for part in message.split("...") if part.strip()]
    return re.compile(".*".join(map(re.escape, parts)), flags=re.DOTALL)


def test_files_that_pages_name_exist():
    pattern = re.compile(r"(?<![\w/.])(?:tests|examples|docs)/[\w/.]*\w")
    named = {(page, path) for page in PAGES for path in pattern.findall((ROOT / page).read_text(encoding="utf-8"))}
    assert len(named) > 30
    assert not [entry for entry in sorted(named) if not (ROOT / entry[1]).exists()]
