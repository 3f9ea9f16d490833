"""OpenVINO on a CPU: the exported program read by its PyTorch front end, kept as IR, run in float32."""

from __future__ import annotations

import hashlib
import logging
import mmap as maps
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from mmap import ACCESS_COPY, ALLOCATIONGRANULARITY, mmap
from pathlib import Path as File
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING, Any, NamedTuple, final

import numpy as np
import torch
from torch import Tensor
from torch._ops import OperatorBase
from torch.export import ExportedProgram

from apportion.engine.exported import AGREEMENT, Loaded, index_add, missing, size

if TYPE_CHECKING:
    from openvino import InferRequest, Model

SMALL = 4096  # bytes: constants below are cheaper to hold twice than to look up
aten = torch.ops.aten


def _wanted(record: logging.LogRecord) -> bool:
    """Not the front end's tracebacks about operators that it would have left whole and that this torch does not have."""
    return "not found in decomp table" not in record.getMessage()


def shapes(program: ExportedProgram) -> list[list[int]]:
    """Of the tensors that it takes, in their order."""
    names = set(program.graph_signature.user_inputs)
    return [list(node.meta["val"].shape) for node in program.graph.nodes if node.op == "placeholder" and node.name in names]


def _max(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """The same in two operators: as one, the place of a maximum is any of several equal ones, not the first."""
    return aten.amax(x, [dim], keepdim), aten.argmax(x, dim, keepdim)


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False) -> Any:
    """Written out where tokens are as many as heads: the fused kernel cannot tell then which is which, and takes one for the other."""
    if query.shape[-2] != query.shape[-3] or dropout_p > 0 or is_causal:
        return NotImplemented
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    out = (scores if bias is None else scores + bias).softmax(-1) @ value
    return out.transpose(1, 2).contiguous().transpose(1, 2)  # in memory as the kernel leaves it, because views of it follow


REWRITTEN: dict[OperatorBase, Callable[..., Any]] = {aten.index_add.default: index_add, aten.max.dim: _max, aten.scaled_dot_product_attention.default: _attend}


@final
class OpenVINO:
    """Raises EngineError where the package is missing."""

    suffix, agreement, shares = ".xml", AGREEMENT, True

    def __init__(self) -> None:
        try:
            import openvino
        except ModuleNotFoundError as error:
            raise missing("openvino") from error
        self.version = f"{openvino.__version__}, static, square attention written out"

    def convert(self, program: ExportedProgram, file: File) -> None:
        import openvino
        from openvino.frontend import FrontEndManager
        from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder

        # The front end itself, because openvino.convert_model reports its use to the vendor unless the user opted out.
        reader = FrontEndManager().load_by_framework("pytorch")
        logging.getLogger().addFilter(_wanted)
        plain = program.run_decompositions(REWRITTEN)
        try:
            source = TorchFXPythonDecoder.from_exported_program(plain)  # the reader does not keep it alive
        finally:
            logging.getLogger().removeFilter(_wanted)
        model = reader.convert(reader.load(source))
        model.reshape(dict(enumerate(shapes(program))))  # the reader leaves them open, which costs a small graph a twentieth of its time
        openvino.save_model(model, file, compress_to_fp16=False)

    def load(self, files: Sequence[File], *, threads: int, weights: Sequence[Mapping[str, Tensor]]) -> list[Loaded]:
        import openvino

        core, packed = openvino.Core(), Weights()
        models = [core.read_model(file) for file in files]
        if len(models) == 1:
            whole, held, parts = models[0], [size(files[0])], [Part(None, range(len(models[0].inputs)), range(len(models[0].outputs)))]
        else:
            with TemporaryFile() as file:  # what is mapped stays when it is closed
                held = [packed.hold(model, file) for model in models]
            whole, parts = joined(models)
        exact = {"INFERENCE_PRECISION_HINT": "f32", "EXECUTION_MODE_HINT": "ACCURACY"}
        graph = core.compile_model(whole, "CPU", {**exact, "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1})
        packed.release()
        idle = [Desk(graph.create_infer_request())]

        def run(part: Part, tensors: Sequence[Tensor]) -> list[Tensor]:
            try:
                desk = idle.pop()
            except IndexError:  # every one is busy in another thread
                desk = Desk(graph.create_infer_request())
            answers = desk(part, tensors)
            idle.append(desk)
            return answers

        return [Loaded(partial(run, part), weight_bytes) for part, weight_bytes in zip(parts, held, strict=True)]


class Part(NamedTuple):
    """One graph of a compiled model: what the model's first input must say for it to run (None where it is all there is), and where it reads and writes."""

    number: int | None
    inputs: Sequence[int]
    outputs: Sequence[int]


@final
class Weights:
    """Constants of several models in one file, equal ones once: the run time packs weights once for each array, however many graphs read it."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, Sequence[int], bytes], tuple[mmap, Any]] = {}

    def hold(self, model: Model, file: IO[bytes]) -> int:
        """Put arrays in `file` in place of the model's own; gives the bytes of what no model before it has brought."""
        from openvino import opset13 as op

        before = file.tell()
        for node in model.get_ops():
            if node.get_type_name() == "Constant":  # a small one is copied, or the whole file that it was read from would stay in memory
                large = node.data.nbytes >= SMALL
                node.output(0).replace(op.constant(self._array(node.data, file) if large else node.data, shared_memory=large).output(0))
        return file.tell() - before

    def release(self) -> None:
        """Out of memory what nobody may read again; whoever does reads the file."""
        if sys.platform == "linux":
            for mapped, _ in self._known.values():
                mapped.madvise(maps.MADV_DONTNEED)  # a name that other systems do not have

    def _array(self, given: Any, file: IO[bytes]) -> Any:
        content = given.tobytes()
        form = (given.dtype.str, given.shape, hashlib.sha256(content).digest())
        if form not in self._known:
            begin = file.tell()
            file.write(content + bytes(-len(content) % ALLOCATIONGRANULARITY))
            file.flush()
            mapped = mmap(file.fileno(), len(content), access=ACCESS_COPY, offset=begin)  # writable, as the run time wants it, though nobody writes
            self._known[form] = mapped, np.ndarray(given.shape, given.dtype, mapped)
        return self._known[form][1]


def joined(models: Sequence[Model]) -> tuple[Model, list[Part]]:
    """One model of which each call runs one: its first input is the number of it. Inputs of one shape and place are the same for all."""
    from openvino import Model
    from openvino import opset13 as op

    which = op.parameter([], np.int64)
    given, answers, parts = dict[tuple[Any, ...], Any](), list[Any](), list[Part]()
    for number, model in enumerate(models):
        blank = [op.constant(np.empty([0] * len(out.shape), out.get_element_type().to_dtype())) for out in model.outputs]
        nothing = Model(blank, [])  # pyright: ignore[reportGeneralTypeIssues]  # it is told of a base class of its own only
        branch = op.if_op(op.equal(which, op.constant(np.int64(number))).output(0))
        branch.set_then_body(model)
        branch.set_else_body(nothing)
        inputs = list[int]()
        for place, own in enumerate(model.get_parameters()):
            form = (place, tuple(own.shape), own.get_element_type().to_string())
            if form not in given:
                given[form] = op.parameter(own.shape, own.get_element_type())
            branch.set_input(given[form].output(0), own, None)  # pyright: ignore[reportArgumentType]  # nothing takes no input
            inputs.append(1 + list(given).index(form))
        parts.append(Part(number, inputs, range(len(answers), len(answers) + len(blank))))
        answers += [op.result(branch.set_output(*both)) for both in zip(model.get_results(), nothing.get_results(), strict=True)]
    return Model(answers, [which, *given.values()]), parts  # pyright: ignore[reportGeneralTypeIssues]


@final
class Desk:
    """One request and the memory that it reads and writes: where shapes are fixed nothing is bound or allocated anew from call to call."""

    def __init__(self, request: InferRequest) -> None:
        self._request = request
        self._inputs = [torch.from_numpy(tensor.data) for tensor in request.input_tensors]
        fixed = [port.partial_shape.is_static for port in request.model_outputs]
        self._outputs = [torch.from_numpy(request.get_output_tensor(k).data) if known else None for k, known in enumerate(fixed)]

    def __call__(self, part: Part, tensors: Sequence[Tensor]) -> list[Tensor]:
        if part.number is not None:
            self._inputs[0].fill_(part.number)
        for place, tensor in zip(part.inputs, tensors, strict=True):
            self._inputs[place].copy_(tensor)
        self._request.start_async()
        self._request.wait()
        return [self._answer(place) for place in part.outputs]

    def _answer(self, place: int) -> Tensor:
        own = self._outputs[place]
        return torch.from_numpy(self._request.get_output_tensor(place).data.copy()) if own is None else own.clone()
