"""The rules of the house, read from the source: who imports whom, one door for each third-party package, and what is found nowhere."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path as File

import pytest

import apportion
from apportion.methods import SLOTS, names

ROOT = File(apportion.__file__).parent
ROOMS = frozenset({"intake", "train", "control", "engine", "measure"})
GROUND = frozenset({"vocab", "errors", "files"})
MAY_IMPORT: dict[str, frozenset[str]] = {
    "errors": frozenset(),
    "files": frozenset(),
    "vocab": frozenset({"errors"}),
    "methods": GROUND,
    "network": GROUND | {"methods"},
    **{room: GROUND | {"methods", "network"} for room in ROOMS},
}
MAY_IMPORT["deliver"] = GROUND | ROOMS | {"methods", "network"}
MAY_IMPORT["verbs"] = MAY_IMPORT["deliver"] | {"deliver"}
MAY_IMPORT["demo"] = MAY_IMPORT["verbs"] | {"verbs"}
MAY_IMPORT["cli"] = MAY_IMPORT["demo"] | {"demo"}
MAY_IMPORT["__init__"] = MAY_IMPORT["verbs"] | {"verbs"}
MAY_IMPORT["__main__"] = MAY_IMPORT["cli"] | {"cli"}

DOORS: dict[str, tuple[str, ...]] = {
    "timm": ("intake/",),
    "transformers": ("intake/",),
    "torchvision": ("intake/",),
    "lightgbm": ("control/trees.py",),
    "triton": ("methods/triton_kernels.py",),
    "soundfile": ("intake/audio.py",),
    "pyarrow": ("intake/parquet.py",),
    "openvino": ("engine/",),
    "onnxruntime": ("engine/",),
    "torch._dynamo": ("engine/compile.py",),
    "torch._inductor": ("engine/compile.py", "engine/aotinductor.py"),
    "torch.compile": ("engine/compile.py",),
    "safetensors": ("deliver/bundle.py", "train/checkpoint.py", "intake/"),
    "pickle": (),
    "torch.load": (),
    "os.environ": (),
    "os.getenv": (),
}


def sources(root: File) -> Iterator[tuple[str, ast.Module]]:
    for file in sorted(root.rglob("*.py")):
        yield file.relative_to(root).as_posix(), ast.parse(file.read_text())


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of everything a file imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import hides which room is meant"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def uses(tree: ast.AST) -> Iterator[str]:
    """Dotted names that are read (`torch.compile`), and those that are imported."""
    yield from imports(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def room_of(path: str) -> str:
    return path.split("/")[0].removesuffix(".py")


def check_imports(root: File) -> None:
    for path, tree in sources(root):
        room = room_of(path)
        assert room in MAY_IMPORT, f"{path}: no rule says what {room} may import"
        for name in imports(tree):
            parts = name.split(".")
            if parts[0] == "apportion" and len(parts) > 1:
                assert parts[1] == room or parts[1] in MAY_IMPORT[room], f"{path} imports {name}"


def check_doors(root: File) -> None:
    for path, tree in sources(root):
        for name in uses(tree):
            for package, doors in DOORS.items():
                if name == package or name.startswith(f"{package}."):
                    assert any(path.startswith(door) for door in doors), f"{path} uses {name}, whose door is {doors or 'nowhere'}"


def check_forbidden(root: File) -> None:
    for path, tree in sources(root):
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "hasattr", "__import__"), f"{path}:{node.lineno} calls {node.func.id}"
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                assert node.args.kwarg is None, f"{path}:{node.lineno} takes **{node.args.kwarg.arg}"
            elif isinstance(node, ast.Global):
                raise AssertionError(f"{path}:{node.lineno} writes the global {node.names}")


def check_documented(root: File) -> None:
    """In the methods every public class and function has a docstring, or its file has one."""
    for path, tree in sources(root / "methods"):
        if not tree.body or ast.get_docstring(tree):
            continue
        for node in tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"methods/{path}: {node.name} is not explained"


def check_sizes(root: File) -> None:
    for path in sorted(root.rglob("*.py")):
        name, lines = path.relative_to(root).as_posix(), len(path.read_text().splitlines())
        most = 150 if name.startswith("methods/") else 400
        assert lines <= most, f"{name} has {lines} lines, more than {most}"


CHECKS = [check_imports, check_doors, check_forbidden, check_documented, check_sizes]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_house(check):
    check(ROOT)


FAULTS = {
    "a room imports another": (check_imports, "train/loop.py", "from apportion.engine import Engine"),
    "a method imports the network": (check_imports, "methods/reducer/tome.py", "from apportion.network import Network"),
    "the ground imports a method": (check_imports, "errors.py", "import apportion.methods"),
    "within a function": (check_imports, "control/policy.py", "def late():\n    from apportion.network import Network\n    from apportion.verbs import adapt"),
    "a relative import": (check_imports, "network/model.py", "from . import order"),
    "a new room": (check_imports, "attic.py", "import torch"),
    "timm outside its door": (check_doors, "network/model.py", "import timm.layers"),
    "triton outside its door": (check_doors, "methods/kernels.py", "def f():\n    import triton.language as tl"),
    "the compiler outside its door": (check_doors, "network/model.py", "def f(x):\n    return torch.compile(x)"),
    "safetensors outside its door": (check_doors, "train/loop.py", "from safetensors.torch import save_file"),
    "pickle": (check_doors, "deliver/bundle.py", "import pickle"),
    "torch.load": (check_doors, "train/checkpoint.py", "def f(x):\n    return torch.load(x)"),
    "the environment": (check_doors, "verbs.py", "import os\nSEED = os.environ['SEED']"),
    "eval": (check_forbidden, "vocab.py", "X = eval('1')"),
    "keywords passed through": (check_forbidden, "vocab.py", "def f(**options): ..."),
    "a global": (check_forbidden, "vocab.py", "def f():\n    global X\n    X = 1"),
    "no docstring": (check_documented, "methods/extra.py", "def merge(): ..."),
    "a long file": (check_sizes, "methods/extra.py", "\n" * 151),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_the_house_catches(fault, tmp_path):
    check, path, line = FAULTS[fault]
    file = tmp_path / path
    file.parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "vocab.py").write_text("")
    (tmp_path / "methods").mkdir(exist_ok=True)
    check(tmp_path)
    file.write_text(line)
    with pytest.raises(AssertionError):
        check(tmp_path)


def test_an_attribute_called_eval_is_not_the_builtin(tmp_path):
    (tmp_path / "vocab.py").write_text("def f(network):\n    return network.eval()\n")
    check_forbidden(tmp_path)


@pytest.mark.parametrize("slot", SLOTS)
def test_no_file_lists_the_methods(slot):
    """A slot's folder is a folder: its `__init__` says nothing."""
    assert not (ROOT / "methods" / slot / "__init__.py").read_text().strip() and names(slot)
