"""ONNX Runtime on a CPU: the exported program as ONNX, run in float32, or its products in 8 bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path as File
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor
from torch.export import ExportedProgram

from apportion.engine.exported import AGREEMENT, Loaded, index_add, missing, size

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

OPSET = 20  # from 23 on attention is one operator, whose mask onnxruntime 1.31 does not broadcast over queries: merged tokens need that
aten = torch.ops.aten


@final
class OnnxRuntime:
    """Raises EngineError where a package is missing."""

    suffix, agreement, shares = ".onnx", AGREEMENT, False

    def __init__(self) -> None:
        try:
            import onnxruntime
            import onnxscript
        except ModuleNotFoundError as error:
            raise missing(str(error.name)) from error
        self.version: str = f"{onnxruntime.__version__} onnxscript {onnxscript.__version__} opset {OPSET}"

    def convert(self, program: ExportedProgram, file: File) -> None:
        plain = program.run_decompositions({aten.index_add.default: index_add, aten.sort.stable: _sort, aten.argsort.stable: _argsort})
        written = torch.onnx.export(plain, dynamo=True, opset_version=OPSET, verbose=False)
        assert written is not None  # None is the answer of the exporter that dynamo=True replaces
        written.save(file)

    def load(self, files: Sequence[File], *, threads: int, weights: Sequence[Mapping[str, Tensor]]) -> list[Loaded]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        # Each graph has its own threads: those that wait busily would take the cores from the graph that runs next.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        sessions = [onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"]) for file in files]

        def run(session: InferenceSession, names: Sequence[str], tensors: Sequence[Tensor]) -> list[Tensor]:
            found = session.run(None, dict(zip(names, (tensor.numpy() for tensor in tensors), strict=True)))
            return [torch.from_numpy(array) for array in found]

        names = [[entry.name for entry in session.get_inputs()] for session in sessions]
        return [Loaded(partial(run, session, own), size(file)) for session, own, file in zip(sessions, names, files, strict=True)]


@final
class Int8:
    """Weights of products in 8 bits, activations in 8 bits as they come, by onnxruntime's own quantiser. Raises EngineError where a package is missing.

    The scale of an activation is that of the whole batch: an answer would depend on the samples beside it, so batches are of one sample (`ALONE`).
    """

    suffix, agreement, shares = ".onnx", 0.5, False  # agreement: of what is all blank; how good answers are is measured on samples

    def __init__(self) -> None:
        self._plain = OnnxRuntime()
        self.version: str = f"INT8 {self._plain.version}"

    def load(self, files: Sequence[File], *, threads: int, weights: Sequence[Mapping[str, Tensor]]) -> list[Loaded]:
        return self._plain.load(files, threads=threads, weights=weights)

    def convert(self, program: ExportedProgram, file: File) -> None:
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic

        whole = file.with_name("whole.onnx")
        self._plain.convert(program, whole)
        model = onnx.load(whole)
        del model.graph.value_info[:]  # shapes that the exporter noted before it moved axes; the quantiser infers them anew
        quantize_dynamic(model, file, weight_type=QuantType.QInt8, per_channel=True)
        for part in file.parent.glob(f"{whole.name}*"):
            part.unlink()


def _sort(x: Tensor, *, stable: bool, dim: int = -1, descending: bool = False) -> tuple[Tensor, Tensor]:
    """ONNX's TopK puts the lower index first where values are equal: with all of them it is the stable sort that ONNX lacks."""
    return aten.topk(x, x.shape[dim], dim, descending, True)


def _argsort(x: Tensor, *, stable: bool, dim: int = -1, descending: bool = False) -> Tensor:
    return _sort(x, stable=stable, dim=dim, descending=descending)[1]
