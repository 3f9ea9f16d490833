"""The notebooks run from first cell to last, and the last checks what they say; on disk they hold no outputs and no place of one machine."""

from __future__ import annotations

import re
from pathlib import Path as File

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

NOTEBOOKS = sorted((File(__file__).parent.parent / "notebooks").glob("*.ipynb"))
ABSOLUTE = re.compile(r"""(?:(?<![\w.:/<])/|~/|\b[A-Za-z]:[\\/]|file://)\w""")
every = pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)


def code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def clean(text: str) -> None:
    """Valid, nothing run, nothing that is true on one machine alone; the last cell checks something."""
    notebook = nbformat.reads(text, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert set(notebook.metadata) == {"kernelspec", "language_info"} and notebook.metadata.language_info == {"name": "python"}
    for cell in notebook.cells:
        assert not cell.metadata and not cell.get("attachments"), f"cell {cell.id} carries metadata"
        assert cell.cell_type == "markdown" or not (cell.outputs or cell.execution_count), f"cell {cell.id} holds outputs: clear them"
        assert not (found := ABSOLUTE.search(cell.source)), f"cell {cell.id} names a place: {cell.source[found.start() :][:40]}"
    assert code(notebook)[-1].source.startswith("assert "), "the last cell has to check what the notebook says"


def execute(notebook: NotebookNode, folder: File, monkeypatch: pytest.MonkeyPatch) -> None:
    """In `folder`, on one thread, with everything that a kernel writes kept there. Raises CellExecutionError."""
    monkeypatch.setenv("TMPDIR", str(folder))
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, str(folder / name.lower()))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # A torchvision that was built for another torch cannot be imported, and transformers imports it unasked.
    ready = nbformat.v4.new_code_cell("from apportion.intake import _torchvision\n_torchvision.ready()")
    notebook.cells.insert(0, ready)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()


def test_there_is_one_for_each_kind_of_input() -> None:
    assert [file.stem for file in NOTEBOOKS] == ["images", "sounds", "texts"]


@every
def test_on_disk_it_is_clean(file: File) -> None:
    clean(file.read_text())


FAULTS = {
    "an output": ('"outputs": []', '"outputs": [{"name": "stdout", "output_type": "stream", "text": "1"}]'),
    "a count": ('"execution_count": null', '"execution_count": 3'),
    "a path": ("import apportion", "import apportion  # as in /home/me/it"),
    "a home": ("import apportion", "import apportion  # as in ~/it"),
    "a drive": ("import apportion", "import apportion  # as in C:/it"),
    "metadata": ('"metadata": {}', '"metadata": {"tags": ["x"]}'),
    "no JSON": ('"cells"', "cells"),
    "no cell id": ('"id": "intro"', '"id": "an intro"'),
    "nothing checked": ('"assert ', '"print '),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_clean_is_seen(fault: str) -> None:
    text, (good, bad) = NOTEBOOKS[0].read_text(), FAULTS[fault]
    assert good in text
    with pytest.raises((AssertionError, nbformat.ValidationError, nbformat.reader.NotJSONError)):
        clean(text.replace(good, bad))


@pytest.mark.slow
@every
def test_it_runs(file: File, tmp_path: File, monkeypatch: pytest.MonkeyPatch) -> None:
    execute(nbformat.read(file, as_version=4), tmp_path, monkeypatch)


@pytest.mark.slow
def test_one_that_says_what_is_not_so_fails(tmp_path: File, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("share = 0.6"), nbformat.v4.new_code_cell("assert share < 0.55")])
    with pytest.raises(CellExecutionError, match="AssertionError"):
        execute(notebook, tmp_path, monkeypatch)
