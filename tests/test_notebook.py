"""The notebook, run from its first cell to its last by a kernel of its own; its sockets are files, so no port opens."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from traitlets.config import Config

NOTEBOOK = Path(__file__).parent.parent / "examples" / "quickstart.ipynb"


def read() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Runs a notebook's cells in an empty folder; their outputs are in it then."""
    with tempfile.TemporaryDirectory() as folder:  # a socket's path is short
        for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "TMPDIR"):
            monkeypatch.setenv(name, folder)
        config = Config(KernelManager={"transport": "ipc", "ip": f"{folder}/kernel"})

        def run(notebook: nbformat.NotebookNode) -> None:
            NotebookClient(notebook, timeout=120, config=config, resources={"metadata": {"path": folder}}).execute()

        yield run


def said(notebook: nbformat.NotebookNode) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert {output.output_type for output in outputs} <= {"stream", "execute_result"}
    assert {output.get("name") for output in outputs} <= {"stdout", None}, "a cell warns"
    return "".join(output.get("text", "") for output in outputs)


def test_every_cell_runs_and_says_what_the_text_says(run) -> None:
    notebook = read()
    run(notebook)
    for cell in notebook.cells:
        assert not [output for output in cell.get("outputs", []) if output.output_type == "error"], cell.source
    words = said(notebook)
    same, other = map(float, re.findall(r"the furthest weight is (\S+) away", words))
    assert same < 1e-10 < 1e-3 < other
    assert int(re.search(r"the right patient of 500 in (\d+)%", words)[1]) > 20
    assert float(re.search(r"shuffled: ([\d.]+)%", words)[1]) < 2
    assert "the job ended: done" in words
    assert "the ledger was altered" in words
    exchanges = [int(n.replace(",", "")) for n in re.findall(r"svhc .* ([\d,]+) exchanges", words)]
    assert exchanges[0] > 10 * exchanges[1]


def test_a_planted_error_is_found(run) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        run(notebook)


def test_what_is_stored_has_no_outputs() -> None:
    notebook = read()
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) > 8
    assert not [cell.source for cell in code if cell.outputs or cell.execution_count is not None]
    assert not [cell.metadata for cell in notebook.cells if cell.metadata]
