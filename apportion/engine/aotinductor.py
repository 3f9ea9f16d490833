"""torch's compiler ahead of time: the exported program as a shared library on disk, run on the module's own weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path as File
from typing import final

import torch
from torch import Tensor
from torch._inductor import aoti_compile_and_package, aoti_load_package
from torch._inductor import config as inductor
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch.export import ExportedProgram
from torch.export.pt2_archive._package import AOTICompiledModel

from apportion.engine.exported import AGREEMENT, Loaded


@final
class AOTInductor:
    """No copy of a weight is made, neither in the file nor in a graph, so none is packed: what torch's compiler gains by freezing is left out."""

    suffix, agreement, shares = ".pt2", AGREEMENT, False

    def __init__(self) -> None:
        # Code is made for this processor, and for as many threads as are set when it is made.
        self.version = f"{torch.__version__} {pick_vec_isa()} {torch.get_num_threads()} threads"

    def convert(self, program: ExportedProgram, file: File) -> None:
        with inductor.patch({"aot_inductor.package_constants_in_so": False}):
            aoti_compile_and_package(program, package_path=str(file))

    def load(self, files: Sequence[File], *, threads: int, weights: Sequence[Mapping[str, Tensor]]) -> list[Loaded]:
        return [_loaded(file, own) for file, own in zip(files, weights, strict=True)]


def _loaded(file: File, weights: Mapping[str, Tensor]) -> Loaded:
    model = aoti_load_package(str(file))
    held = {name: weights[name] for name in model.get_constant_fqns()}
    model.load_constants(held, check_full_update=True, user_managed=True)
    return Loaded(partial(_run, model, held), 0)


def _run(model: AOTICompiledModel, held: Mapping[str, Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """`held`: what the library looks into lives for as long as this call may come."""
    return model.loader.boxed_run(list(tensors))
