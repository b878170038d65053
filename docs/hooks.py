"""Hooks of the documentation site: files that lie outside `docs/`, and links to them."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
OUTSIDE = {
    "README.md": "index.md",
    "LICENSE": "LICENSE",
    "CITATION.cff": "CITATION.cff",
    "CHANGELOG.md": "changelog.md",
    "CODE_OF_CONDUCT.md": "code_of_conduct.md",
    "CONTRIBUTING.md": "contributing.md",
    "RELEASE.md": "release.md",
    "SECURITY.md": "security.md",
    "examples/tour.ipynb": "tour.ipynb",
    "diffusers_infogain/demo/model/README.md": "demo_model.md",
    "diffusers_infogain/demo/text_model/README.md": "demo_text_model.md",
}
"""Files of the site by their path in the repository."""
_LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)#\s]+)")


def on_files(files: Files, config: Any, **kwargs: Any) -> Files:
    """Adds the files that lie outside `docs/`."""
    for path, target in OUTSIDE.items():
        files.append(File.generated(config, target, content=(ROOT / path).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, **kwargs: Any) -> str:
    """Turns links between files of the repository into links between pages of the site."""
    sources = {target: path for path, target in OUTSIDE.items()}
    source = sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def on_the_site(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[1]))
        if path not in OUTSIDE and not path.startswith("docs/"):
            raise PluginError(f"{source} links to {path}, which the site does not have")
        target = OUTSIDE.get(path, path.removeprefix("docs/"))
        return posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or ".")

    return _LINK.sub(on_the_site, markdown)
