"""The notebook in examples runs from top to bottom, and is stored without outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

NOTEBOOK = Path(__file__).parent.parent / "examples" / "tour.ipynb"


def test_the_notebook_is_stored_without_outputs():
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    nbformat.validate(content)
    assert set(content["metadata"]) == {"kernelspec", "language_info"}
    for cell in content["cells"]:
        assert not cell["metadata"]
        if cell["cell_type"] == "code":
            assert cell["execution_count"] is None
            assert cell["outputs"] == []


def test_the_notebook_runs_and_shows_what_it_says(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parent.parent))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in shown if output.output_type == "error"]
    kinds = [set(output.get("data", {})) for output in shown]
    assert sum("image/png" in kind for kind in kinds) == 2, "the figures"
    assert sum("image/gif" in kind for kind in kinds) == 1, "the film"
    pages = ["".join(output.data["text/html"]) for output in shown if "text/html" in output.get("data", {})]
    assert [page.count("<img ") for page in pages] == [3, 2, 2, 1, 0]
    assert pages[-1].count('class="ig-text"') == 2
    assert (tmp_path / "decoding.gif").exists()
