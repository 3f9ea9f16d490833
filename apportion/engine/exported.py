"""Graphs for run times other than torch's: exported whole, converted to a file, loaded from it, held against eager once, and sealed."""

from __future__ import annotations

import hashlib
import re
import shutil
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path as File
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any, NamedTuple, Protocol, final

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.export import ExportedProgram

from apportion.engine.graph import Graph, not_whole, serving, unbuilt
from apportion.errors import EngineError

AGREEMENT = 1e-2
"""Relative distance to eager, at most, for run times in single precision: above rounding (1e-6) and a choice between near equals, below a wrong operator."""

Run = Callable[[Sequence[Tensor]], Sequence[Tensor]]
aten = torch.ops.aten


class Loaded(NamedTuple):
    """A callable from contiguous tensors to fresh ones, safe in any thread, and the bytes of weights that it holds and none before it in the same call."""

    run: Run
    weight_bytes: int


class Runtime(Protocol):
    """What a back-end outside torch has to offer. Weights may lie beside `file`, under the same stem."""

    suffix: str
    version: str
    agreement: float  # relative distance to eager, at most, on the example
    shares: bool  # whether what is loaded in one call holds equal weights once

    def convert(self, program: ExportedProgram, file: File) -> None:
        """Write the program in the run time's own format. Whatever it raises is reported by the operators that it names."""
        ...

    def load(self, files: Sequence[File], *, threads: int, weights: Sequence[Mapping[str, Tensor]]) -> list[Loaded]:
        """A callable for each file, in their order. `weights`: of each the module's own by name, for a run time that can look into them."""
        ...


def leaves(value: Any) -> Iterator[Any]:
    """What lies in nested tuples and lists, in order: tensors and constants."""
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from leaves(part)
    else:
        yield value


def tensors_of(value: Any) -> list[Tensor]:
    return [leaf for leaf in leaves(value) if isinstance(leaf, Tensor)]


def refilled(value: Any, tensors: Iterator[Tensor]) -> Any:
    """The same tuples and lists with the same constants around other tensors."""
    if isinstance(value, (tuple, list)):
        parts = [refilled(part, tensors) for part in value]
        return type(value)(parts) if type(value) in (tuple, list) else type(value)(*parts)  # a named tuple takes them one by one
    return next(tensors) if isinstance(value, Tensor) else value


def missing(package: str) -> EngineError:
    return EngineError(f"no package {package}", wanted="the extra `export`", do="Run `pip install apportion[export]`, or choose another back-end.")


@final
class Flat(nn.Module):
    """A module on tensors alone: what else is in its inputs is a constant, what else is in its answer is known from the example."""

    def __init__(self, module: nn.Module, example: tuple[Any, ...]) -> None:
        super().__init__()
        self.module, self.example = module, example

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensors_of(self.module(*refilled(self.example, iter(tensors)))))


def exported(module: nn.Module, example: tuple[Any, ...], *, runtime: Runtime, name: str, cache: File | None) -> Graph:
    """`build` by a run time outside torch. What is in `cache` is found again by the exported operators, the weights and the versions: nothing goes stale."""
    flat = Flat(module, example)
    tensors = _check(module, example, name)
    with serving(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)  # torch's word to itself, on every copy of a program
        answer = module(*example)
        program = capture(flat, tensors, name)
        folder = File(mkdtemp(prefix="apportion-")) if cache is None else cache
        file = folder / f"{digest(program, runtime)}{runtime.suffix}"
        stored = Stored(runtime, file, name, partial(sealed, example=example, answer=answer, name=name), named(program))
        if cache is None:
            weakref.finalize(stored, shutil.rmtree, folder, ignore_errors=True)
        if not file.exists():
            _convert(program, file, runtime, name)
        (graph,) = load([stored])
        _agree(tensors_of(graph(*example)), tensors_of(answer), name, runtime.agreement)
    return graph


@final
@dataclass(frozen=True, slots=True, weakref_slot=True)
class Stored:
    """A converted graph in a file, to be loaded by itself or with others; the file is there for as long as this is."""

    runtime: Runtime
    file: File
    name: str
    seal: Callable[[Run], Callable[..., Any]]
    weights: Mapping[str, Tensor]


def load(stored: Sequence[Stored]) -> list[Graph]:
    """All in one call of the run time, which is the same for all."""
    files, weights = [each.file for each in stored], [each.weights for each in stored]
    loaded = stored[0].runtime.load(files, threads=torch.get_num_threads(), weights=weights)
    return [Graph(each.seal(run), weight_bytes, each) for each, (run, weight_bytes) in zip(stored, loaded, strict=True)]


def copied_bytes(graphs: Iterable[Graph]) -> int:
    """What graphs of a run time that could share weights hold of them beside the largest graph, while each holds its own."""
    sizes = [size(graph.stored.file) for graph in graphs if graph.stored is not None and graph.stored.runtime.shares]
    return sum(sizes) - max(sizes, default=0)


def resting(graph: Graph) -> Graph:
    """The same, loaded anew for every call: it takes long and holds nothing between calls."""
    stored = graph.stored
    assert stored is not None
    return Graph(lambda *inputs: load([stored])[0](*inputs), graph.weight_bytes, stored)


def together(graphs: Sequence[Graph], seen: Sequence[tuple[tuple[Any, ...], Any]]) -> list[Graph]:
    """The same in one call of the run time, so that equal weights are held once. `seen`: for each an example and its answer by itself, held against it anew."""
    made = load([graph.stored for graph in graphs if graph.stored is not None])
    for graph, (example, answer) in zip(made, seen, strict=True):
        assert graph.stored is not None
        _agree(tensors_of(graph(*example)), tensors_of(answer), graph.stored.name, graph.stored.runtime.agreement)
    return made


def size(file: File) -> int:
    """Bytes of a converted graph with what lies beside it."""
    return sum(part.stat().st_size for part in file.parent.glob(f"{file.stem}.*"))


def capture(flat: Flat, tensors: tuple[Tensor, ...], name: str) -> ExportedProgram:
    """One whole graph in torch's operators. Raises EngineError."""
    try:
        return torch.export.export(flat, tensors, strict=False)
    except Exception as error:  # the exporter raises errors of many unrelated classes
        raise not_whole(name, str(error)) from error


def named(program: ExportedProgram) -> dict[str, Tensor]:
    """All that it holds beside operators; weights and buffers are the module's own."""
    constants = {key: value for key, value in program.constants.items() if isinstance(value, Tensor)}
    return {**program.state_dict, **constants}


def digest(program: ExportedProgram, runtime: Runtime) -> str:
    """What the converted file depends on: operators with their shapes, weights, and who converts."""
    found = hashlib.sha256(f"{type(runtime).__name__} {runtime.version} torch {torch.__version__}\n{program}".encode())
    for key, tensor in sorted(named(program).items()):
        found.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _convert(program: ExportedProgram, file: File, runtime: Runtime, name: str) -> None:
    """Written aside and then renamed, the named file last: a start that was broken off leaves no half of a graph."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=file.parent) as folder:
        try:
            runtime.convert(program, File(folder) / file.name)
        except Exception as error:  # converters raise errors of many unrelated classes
            raise _unconverted(program, str(error), name) from error
        for part in sorted(File(folder).iterdir(), key=lambda part: part.name == file.name):
            part.rename(file.parent / part.name)


def _unconverted(program: ExportedProgram, why: str, name: str) -> EngineError:
    """The error that names the operators, as far as the converter does."""
    spaces = {node.target.namespace for node in program.graph.nodes if isinstance(node.target, OpOverload)}
    named = sorted({found.replace("::", ".") for found in re.findall(rf"\b(?:{'|'.join(map(re.escape, spaces))})(?:\.|::)\w+", why)} if spaces else ())
    return EngineError(
        f"{name}, of which {', '.join(named) or 'a part'} does not convert ({' '.join(why.split())[-300:]})",
        wanted="operators that this back-end reads",
        do="Choose another back-end, or write the method with other operators.",
    )


def _check(module: nn.Module, example: tuple[Any, ...], name: str) -> tuple[Tensor, ...]:
    tensors = tensors_of(example)
    for tensor in chain(tensors, module.parameters(), module.buffers()):
        if tensor.device.type != "cpu" or (tensor.is_floating_point() and tensor.dtype != torch.float32):
            raise EngineError(f"{name} in {tensor.dtype} on {tensor.device}", wanted="float32 on a CPU", do="Convert it, or choose the back-end `inductor`.")
    return tuple(tensor.detach().contiguous() for tensor in tensors)


def _agree(found: Sequence[Tensor], wanted: Sequence[Tensor], name: str, agreement: float) -> None:
    """Raises EngineError where a converted graph is another function than the module."""
    for ours, theirs in zip(found, wanted, strict=True):
        far = (ours.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-6) if ours.shape == theirs.shape else torch.inf
        # Whole numbers are indices: one choice between equals moves many of them.
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype or (theirs.is_floating_point() and not far <= agreement):
            raise EngineError(
                f"{name}, whose converted graph gives {tuple(ours.shape)} {ours.dtype}, {float(far):.3g} away from eager",
                wanted=f"{tuple(theirs.shape)} {theirs.dtype}, within {agreement}",
                do="Choose another back-end, and report the operator.",
            )


def sealed(call: Run, example: tuple[Any, ...], answer: Any, name: str) -> Callable[..., Any]:
    """A call costs a small graph as much as some of its layers, so it does no more than it must."""
    forms, kinds = [_form(leaf) for leaf in leaves(example)], [isinstance(part, tuple) and type(part) for part in example]

    def run(*inputs: Any) -> Any:
        given = list(leaves(inputs))
        known = [isinstance(part, tuple) and type(part) for part in inputs] == kinds
        if not known or [_form(leaf) for leaf in given] != forms or torch.is_grad_enabled():
            raise unbuilt(name)
        return refilled(answer, iter(call([leaf.detach().contiguous() for leaf in given if isinstance(leaf, Tensor)])))

    return run


def _form(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype, leaf.device.type) if isinstance(leaf, Tensor) else leaf


def index_add(x: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: float = 1) -> Tensor:
    """The same sum in an operator that both run times read."""
    return aten.index_put(x, [None] * (dim % x.ndim) + [index], source if alpha == 1 else source * alpha, True)
