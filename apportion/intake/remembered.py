"""Which shapes of model have passed the test with shaken weights, in a folder: found again by everything that its outcome hangs on but the weights' values.

A key holds: the classes of all modules, their functions, attributes and configuration; names, shapes and types of parameters, and which are shared; the
contents of buffers; the shape that is read; every source file of the rooms that read and run; names, sizes and times of the library's source files in the
folders that these classes are from; versions of Python and the libraries; instructions of the processor. What cannot be put into words (a hook, a function
that holds values of its own, an attribute of an unknown class) has no key: such a model is tested each time. Names of labels and folders are left out.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import inspect
import json
import os
import platform
import sys
import types
from collections.abc import Iterator
from dataclasses import asdict, dataclass, is_dataclass
from enum import Enum
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor, nn

from apportion.files import write_json
from apportion.intake.verify import Verified

OURS = File(__file__).resolve().parents[1]
ROOMS = ("intake", "network", "methods")
LIBRARIES = ("apportion", "huggingface_hub", "timm", "torch", "transformers")
STANDARD = f"{File(os.__file__).parent}{os.sep}"
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
# What a model brings along and no forward looks at.
IDLE = {"pretrained_cfg", "default_cfg", "feature_info", "generation_config", "_name_or_path", "name_or_path", "id2label", "label2id"}
IDLE |= {"transformers_version", "architectures", "_commit_hash", "warnings_issued"}


class Untold(Exception):
    """What stands in the way of a key."""


@dataclass(frozen=True, slots=True)
class Record:
    """A test that was passed, and on which day."""

    day: str
    figures: Verified

    @classmethod
    def now(cls, figures: Verified) -> Record:
        return cls(datetime.datetime.now(datetime.UTC).date().isoformat(), figures)


def key(source: nn.Module, *facts: object) -> str:
    """SHA-256 over all of it. Raises Untold. Cost: milliseconds; buffers are read."""
    words = _Words(source)
    told = hashlib.sha256()
    for line in (_machine(), *code(OURS), *words.modules(), *words.libraries(), *(words.of(fact) for fact in facts)):
        told.update(line.encode())
        told.update(b"\n")
    return told.hexdigest()


def code(root: File) -> Iterator[str]:
    """The source files that an outcome hangs on, by content."""
    for file in (*sorted(file for room in ROOMS for file in (root / room).rglob("*.py")), root / "vocab.py"):
        yield f"{file.relative_to(root)} {hashlib.sha256(file.read_bytes()).hexdigest()}"


def found(folder: File, name: str) -> Record | None:
    """What was kept under this key; None where nothing was, or nothing whole."""
    try:
        data = json.loads((folder / f"{name}.json").read_text("utf-8"))
        return Record(str(data["day"]), Verified(float(data["max_abs"]), float(data["max_rel"])))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep(folder: File, name: str, record: Record) -> None:
    """Writes it down, in one piece. Raises OSError for a folder that cannot be written to."""
    write_json(folder / f"{name}.json", {"day": record.day, **asdict(record.figures)})


def _machine() -> str:
    versions = (sys.version, torch.__version__, torch.version.git_version, platform.machine(), torch.backends.cpu.get_cpu_capability())
    return " ".join(map(str, (*versions, torch.get_default_dtype())))


class _Words:
    """A model in words: the same for the same model in another process."""

    def __init__(self, source: nn.Module) -> None:
        self.source = source
        self.names: dict[int, str] = {id(module): name for name, module in source.named_modules()}
        self.kinds: dict[type, list[str]] = {}  # and what their functions are
        self.roots = {name: f"{next(iter(sys.modules[name].__path__))}{os.sep}" for name in LIBRARIES if name in sys.modules}

    def modules(self) -> Iterator[str]:
        own = set(vars(nn.Module()))
        for name, module in self.source.named_modules():
            if hook := next((hook for hook in HOOKS if getattr(module, hook)), None):
                raise Untold(f"{hook.strip('_').replace('_', ' ')} on {name or 'the model'}")
            rest = {each: value for each, value in vars(module).items() if each not in own and each not in IDLE}
            yield f"{name} {self.kind(type(module))} {self.of(rest)}"
        first: dict[int, str] = {}
        for name, value in self.source.named_parameters(remove_duplicate=False):
            yield f"{name} {tuple(value.shape)} {value.dtype} {first.setdefault(id(value), name)}"
        for name, value in self.source.named_buffers():
            yield f"{name} {self.of(value)}"

    def libraries(self) -> Iterator[str]:
        """Of each class its functions, and of its folder the source files: what somebody has edited there, or installed anew, is another library."""
        for functions in self.kinds.values():
            yield from functions
        files = {sys.modules[kind.__module__].__file__ for kind in self.kinds}
        for folder in sorted({File(file).parent for file in files if file and not file.startswith(self.roots["torch"])}):
            for file in sorted(folder.glob("*.py")):
                yield f"{file} {_stamp(file)}"
        for name in self.roots:
            yield f"{name} {sys.modules[name].__version__}"

    def kind(self, kind: type) -> str:
        """A class, with all that it inherits from, and what lies beside them in their modules."""
        for each in kind.__mro__:
            if each in self.kinds or each.__module__.partition(".")[0] not in LIBRARIES:
                continue
            space = (*vars(each).items(), *vars(sys.modules[each.__module__]).items())
            self.kinds[each] = [f"{name} {self._function(value)}" for name, value in space if isinstance(value, types.FunctionType)]
        if kind.__module__.partition(".")[0] not in LIBRARIES:
            raise Untold(f"a {kind.__module__}.{kind.__qualname__}")
        return f"{kind.__module__}.{kind.__qualname__}"

    def of(self, value: Any) -> str:
        if isinstance(value, Enum) or isinstance(value, PLAIN):
            return repr(value)
        if isinstance(value, Tensor):
            data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b""
            return f"{tuple(value.shape)} {value.dtype} {hashlib.sha256(data).hexdigest()}"
        if isinstance(value, dict):
            return f"{{{', '.join(f'{self.of(key)}: {self.of(of)}' for key, of in value.items() if key not in IDLE)}}}"
        if isinstance(value, list | tuple):
            return f"[{', '.join(map(self.of, value))}]"
        if isinstance(value, set | frozenset):
            return f"set {sorted(map(self.of, value))}"
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.BuiltinFunctionType):
            return f"{value.__module__}.{value.__qualname__}"
        if isinstance(value, type):
            return value.__qualname__ if value.__module__ == "builtins" else self.kind(value)
        if isinstance(value, functools.partial):
            return f"partial {self.of(value.func)} {self.of(value.args)} {self.of(value.keywords)}"
        return self._object(value)

    def _object(self, value: Any) -> str:
        if (place := self.names.get(id(value))) is not None:
            return f"at {place}"
        if isinstance(value, nn.Module):
            raise Untold(f"a module beside the others, {type(value).__qualname__}")
        self.names[id(value)] = f"#{len(self.names)}"  # seen: what looks into itself ends here
        fields = {each: getattr(value, each) for each in value.__dataclass_fields__} if is_dataclass(value) else {}  # also those in slots
        inside = {**fields, **getattr(value, "__dict__", {})}
        if not inside:
            raise Untold(f"a {type(value).__qualname__}")
        return f"{self.kind(type(value))} {self.of(inside)}"

    def _function(self, value: types.FunctionType) -> str:
        """By its source file, where that is none of the library's. Raises Untold for one without, and for one that holds values of its own."""
        file = value.__code__.co_filename
        told = f"{value.__module__}.{value.__qualname__}"
        if file.startswith((*self.roots.values(), "<frozen ")):
            return told
        if file.startswith(STANDARD) and (inner := inspect.unwrap(value)) is not value:
            return self._function(inner)
        if file == "<string>" and value.__module__.partition(".")[0] in LIBRARIES:  # what dataclasses write themselves
            return f"{told} {value.__code__.co_code.hex()} {value.__code__.co_names}"
        if value.__closure__ or not os.path.isfile(file):
            raise Untold(f"{told}, which is from {file}")
        return f"{told} of {file} {value.__code__.co_firstlineno} {_stamp(file)}"


def _stamp(file: str | File) -> str:
    found = os.stat(file)
    return f"{found.st_size} {found.st_mtime_ns}"
