"""What every back-end makes of a module and one example, and the state in which all of them run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, final, get_args

import torch

from apportion.errors import EngineError

if TYPE_CHECKING:
    from apportion.engine.capture import Recording
    from apportion.engine.exported import Stored

Backend = Literal["inductor", "aotinductor", "cudagraphs", "eager", "openvino", "onnxruntime", "onnxruntime-int8"]
ALONE: tuple[Backend, ...] = ("onnxruntime-int8",)
"""Back-ends in whose batches an answer depends on the samples beside it: they run one sample at a time."""
COARSE: tuple[Backend, ...] = ("onnxruntime-int8",)
"""Back-ends that answer otherwise than the modules do: what they answer is measured through them."""


@dataclass(frozen=True, slots=True)
class Graph:
    """One static graph, sealed: a call of another form than the example's raises EngineError."""

    run: Callable[..., Any]
    weight_bytes: int
    """What it holds of weights beside the module's own and beside graphs that share them, before a run time pads or packs them."""
    stored: Stored | None = None
    """The file that it was loaded from, if it was."""
    recording: Recording | None = None
    """What it was recorded from, if it is a recording of what a device did."""

    def __call__(self, *inputs: Any) -> Any:
        return self.run(*inputs)


def check_backend(backend: str) -> None:
    """Raises EngineError where nothing here goes by that name."""
    if backend not in get_args(Backend):
        raise EngineError(f"backend {backend!r}", wanted=f"one of {get_args(Backend)}", do="Name one of these.")


@final
class serving:
    """The state in which graphs are built and run: no gradients, and no inference mode either, because tensors made in it fit no graph made outside.

    By hand, because a generator around torch's two managers takes a tenth of a millisecond, more than a small graph may cost.
    """

    __slots__ = ("_gradients", "_outside")

    def __enter__(self) -> None:
        self._outside = torch.inference_mode(False) if torch.is_inference_mode_enabled() else None
        if self._outside is not None:
            self._outside.__enter__()
        self._gradients = torch.is_grad_enabled()
        if self._gradients:
            torch.set_grad_enabled(False)

    def __exit__(self, *error: object) -> None:
        if self._gradients:
            torch.set_grad_enabled(True)
        if self._outside is not None:
            self._outside.__exit__(*error)


def unbuilt(name: str) -> EngineError:
    return EngineError(
        f"a call that the graph of {name} was not built for",
        wanted="the shapes, strides and types of the build, under serving(), with the same number of threads, default dtype and autocast",
        do="Build it under the conditions in which it serves.",
    )


def not_whole(name: str, why: str) -> EngineError:
    return EngineError(
        f"{name}, which does not compile ({' '.join(why.split())[:400]})",
        wanted="exactly one whole static graph",
        do="Keep its forward free of Python that depends on values, and check that the backend works on this machine.",
    )
