"""OpenVINO on a CPU: the exported program read by its PyTorch front end, kept as IR, run in float32."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path as File
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor
from torch.export import ExportedProgram

from apportion.engine.exported import AGREEMENT, Run, missing

if TYPE_CHECKING:
    from openvino import InferRequest

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


@final
class OpenVINO:
    """Raises EngineError where the package is missing."""

    suffix, agreement = ".xml", AGREEMENT

    def __init__(self) -> None:
        try:
            import openvino
        except ModuleNotFoundError as error:
            raise missing("openvino") from error
        self.version = f"{openvino.__version__}, static"

    def convert(self, program: ExportedProgram, file: File) -> None:
        import openvino
        from openvino.frontend import FrontEndManager
        from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder

        # The front end itself, because openvino.convert_model reports its use to the vendor unless the user opted out.
        reader = FrontEndManager().load_by_framework("pytorch")
        logging.getLogger().addFilter(_wanted)
        plain = program.run_decompositions({aten.max.dim: _max})
        try:
            source = TorchFXPythonDecoder.from_exported_program(plain)  # the reader does not keep it alive
        finally:
            logging.getLogger().removeFilter(_wanted)
        model = reader.convert(reader.load(source))
        model.reshape(dict(enumerate(shapes(program))))  # the reader leaves them open, which costs a small graph a twentieth of its time
        openvino.save_model(model, file, compress_to_fp16=False)

    def load(self, file: File, *, threads: int) -> Run:
        import openvino

        exact = {"INFERENCE_PRECISION_HINT": "f32", "EXECUTION_MODE_HINT": "ACCURACY"}
        core = openvino.Core()
        graph = core.compile_model(core.read_model(file), "CPU", {**exact, "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1})
        idle = [Desk(graph.create_infer_request())]

        def run(tensors: Sequence[Tensor]) -> list[Tensor]:
            try:
                desk = idle.pop()
            except IndexError:  # every one is busy in another thread
                desk = Desk(graph.create_infer_request())
            answers = desk(tensors)
            idle.append(desk)
            return answers

        return run


@final
class Desk:
    """One request and the memory that it reads and writes: its shapes are fixed, so nothing is bound or allocated anew from call to call."""

    def __init__(self, request: InferRequest) -> None:
        self._request = request
        self._inputs = [torch.from_numpy(tensor.data) for tensor in request.input_tensors]
        self._outputs = [torch.from_numpy(tensor.data) for tensor in request.output_tensors]

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        for own, tensor in zip(self._inputs, tensors, strict=True):
            own.copy_(tensor)
        self._request.start_async()
        self._request.wait()
        return [own.clone() for own in self._outputs]
