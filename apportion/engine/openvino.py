"""OpenVINO on a CPU: the exported program read by its PyTorch front end, kept as IR, run in float32."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path as File
from typing import final

import torch
from torch import Tensor
from torch.export import ExportedProgram

from apportion.engine.exported import AGREEMENT, Run, missing


def _wanted(record: logging.LogRecord) -> bool:
    """Not the front end's tracebacks about operators that it would have left whole and that this torch does not have."""
    return "not found in decomp table" not in record.getMessage()


@final
class OpenVINO:
    """Raises EngineError where the package is missing."""

    suffix, agreement = ".xml", AGREEMENT

    def __init__(self) -> None:
        try:
            import openvino
        except ModuleNotFoundError as error:
            raise missing("openvino") from error
        self.version: str = openvino.__version__

    def convert(self, program: ExportedProgram, file: File) -> None:
        import openvino
        from openvino.frontend import FrontEndManager
        from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder

        # The front end itself, because openvino.convert_model reports its use to the vendor unless the user opted out.
        reader = FrontEndManager().load_by_framework("pytorch")
        logging.getLogger().addFilter(_wanted)
        try:
            source = TorchFXPythonDecoder.from_exported_program(program)  # the reader does not keep it alive
        finally:
            logging.getLogger().removeFilter(_wanted)
        openvino.save_model(reader.convert(reader.load(source)), file, compress_to_fp16=False)

    def load(self, file: File, *, threads: int) -> Run:
        import openvino

        exact = {"INFERENCE_PRECISION_HINT": "f32", "EXECUTION_MODE_HINT": "ACCURACY"}
        core = openvino.Core()
        graph = core.compile_model(core.read_model(file), "CPU", {**exact, "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1})
        idle = [graph.create_infer_request()]

        def run(tensors: Sequence[Tensor]) -> list[Tensor]:
            try:
                request = idle.pop()
            except IndexError:  # every request is busy in another thread
                request = graph.create_infer_request()
            found = request.infer([tensor.numpy() for tensor in tensors], share_inputs=True)
            answers = [torch.from_numpy(found[place]) for place in range(len(graph.outputs))]
            idle.append(request)
            return answers

        return run
