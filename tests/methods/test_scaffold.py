"""A new method's two files: whole, found by nothing but their place, and refused where they would overwrite or mislead."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from apportion.errors import PlanError
from apportion.methods import SLOTS, names, scaffold, slots


@pytest.mark.parametrize("slot", SLOTS)
def test_both_files_are_python_and_name_what_the_slot_asks_for(slot, tmp_path):
    method, test = scaffold.new(slot, "new_thing", "2111.15667", root=tmp_path)
    assert method == tmp_path / "apportion/methods" / slot / "new_thing.py" and test == tmp_path / "tests/methods" / slot / "test_new_thing.py"
    space: dict = {}
    code = method.read_text()
    exec(compile(code, str(method), "exec"), space)
    ast.parse(test.read_text())
    made = space["METHOD"]
    assert made.__name__ == "NewThing" and made.card.arxiv == "2111.15667" and made.from_dense(None).training
    protocol = getattr(slots, {"ffn": "FeedForward"}.get(slot, slot.capitalize()), None)
    asked = (
        {
            "forward" if name == "__call__" else name
            for name in vars(protocol)
            if callable(vars(protocol)[name]) and name not in ("__init__", "__subclasshook__")
        }
        if protocol
        else set()
    )
    assert asked <= set(vars(made)) and (asked or slot == "optimiser")


@pytest.mark.parametrize("slot", SLOTS)
def test_what_it_writes_is_clean(slot, tmp_path):
    method, test = scaffold.new(slot, "new_thing", "2111.15667", root=tmp_path)
    ruff = [sys.executable, "-m", "ruff"]
    settings = ["--config", str(scaffold.ROOT / "pyproject.toml")]
    assert subprocess.run([*ruff, "check", "-q", "--ignore", "I001", *settings, method, test]).returncode == 0
    assert subprocess.run([*ruff, "format", "-q", "--check", *settings, method, test]).returncode == 0


@pytest.mark.parametrize(
    ("slot", "name", "arxiv", "found"),
    [
        ("reducers", "diffrate", "2305.17997", "slot 'reducers'"),
        ("reducer", "tome", "2210.09461", "which exists"),
        ("reducer", "Ats", "2111.15667", "name 'Ats'"),
        ("reducer", "../diffrate", "2305.17997", "name '../diffrate'"),
        ("reducer", "diffrate", "15667", "arXiv number"),
    ],
)
def test_it_refuses(slot, name, arxiv, found, tmp_path):
    with pytest.raises(PlanError, match=found.replace(".", r"\.")):
        scaffold.new(slot, name, arxiv, root=tmp_path)
    assert not list(tmp_path.iterdir())


def test_it_does_not_overwrite(tmp_path):
    method, _ = scaffold.new("reducer", "diffrate", "2305.17997", root=tmp_path)
    method.write_text("mine")
    with pytest.raises(PlanError, match="which exists"):
        scaffold.new("reducer", "diffrate", "2305.17997", root=tmp_path)
    assert method.read_text() == "mine"


def test_the_command_says_how_it_is_used(capsys):
    assert scaffold.main([]) == 2 and "reducer" in capsys.readouterr().err
    assert scaffold.main(["reducer", "tome", "2210.09461"]) == PlanError.exit_code and "which exists" in capsys.readouterr().err
    assert "tome" in names("reducer") and sys.executable
