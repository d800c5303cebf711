"""The notebooks of docs/examples run from top to bottom, in a process of their own."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from tests.commands import ROOT, python

NOTEBOOKS = sorted((ROOT / "docs" / "examples").glob("*.ipynb"))


def cells(notebook: Path, kind: str) -> list[str]:
    content = json.loads(notebook.read_text("utf-8"))
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == kind]


def test_there_are_notebooks_without_outputs() -> None:
    assert NOTEBOOKS
    for notebook in NOTEBOOKS:
        content: dict[str, Any] = json.loads(notebook.read_text("utf-8"))
        assert content["nbformat"] == 4 and cells(notebook, "markdown")
        for cell in content["cells"]:
            assert not cell.get("outputs") and cell.get("execution_count") is None
        for code in cells(notebook, "code"):
            ast.parse(code)


@pytest.mark.full
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_twice(notebook: Path, tmp_path: Path) -> None:
    """The second time it goes on in the run directory. A cell's last expression is shown, as
    there."""
    script = tmp_path / "notebook.py"
    shown = []
    for code in cells(notebook, "code"):
        tree = ast.parse(code)
        if isinstance(tree.body[-1], ast.Expr):
            tree.body[-1].value = ast.Call(ast.Name("print"), [tree.body[-1].value], [])
        shown.append(ast.unparse(ast.fix_missing_locations(tree)))
    script.write_text("\n".join(shown))
    for _ in range(2):
        done = python(script, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
    assert (tmp_path / "experiments" / "quickstart" / "report.html").is_file()
