"""Where bytes are: weights, copies of them in graphs, activations at their peak (exact to the allocation, the same in every run), and the whole process."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Tracker(TorchDispatchMode):
    """Follows every storage from the operator that made it to its release."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: dict[int, weakref.ref[Any]] = {}

    def _meet(self, value: Any, *, new: bool) -> None:
        for tensor in tree_leaves(value):
            if isinstance(tensor, Tensor) and id(storage := tensor.untyped_storage()) not in self.known:
                self._follow(storage, storage.nbytes() if new else 0)

    def _follow(self, storage: torch.UntypedStorage, size: int) -> None:
        # The key is forgotten with its storage, because Python gives the same id to a later one.
        key = id(storage)

        def release(_: Any) -> None:
            del self.known[key]
            self.live -= size

        self.known[key] = weakref.ref(storage, release)
        self.live += size
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        self._meet((args, kwargs), new=False)  # whatever comes in unseen was there before: weights and inputs
        with self:  # in inference mode composites arrive whole and would hide what they allocate on the way
            out = func.decompose(*args, **kwargs)
        if out is NotImplemented:
            out = func(*args, **kwargs)
        self._meet(out, new=True)
        return out


def peak_bytes(call: Callable[[], Any]) -> int:
    """Largest sum of bytes in tensor storages that `call` made and still held at one time; what existed before (weights, inputs) is left out.

    Runs without gradients. Blind to scratch memory inside kernels, to the allocator's own rounding and to tensors that bypass the dispatcher
    (`torch.from_numpy`, graphs of other run times); what `torch.compile` made runs in its eager form here. Costs one slowed run of `call`.
    """
    with torch.no_grad(), _Tracker() as tracker:
        call()
    return tracker.peak


@dataclass(frozen=True, slots=True)
class Memory:
    """What a served model takes, in bytes; they do not add up to the process, which holds Python, libraries and run times as well."""

    weight_bytes: int
    copy_bytes: int
    activation_bytes: int
    batch: int
    process_peak_bytes: int | None
    device_peak_bytes: int | None

    @property
    def how(self) -> Mapping[str, str]:
        """How each number was come by."""
        return {
            "weight_bytes": "counted: storages of parameters and buffers, each once however many tensors look into it",
            "copy_bytes": "counted: what the graphs report to hold of weights beside those, before a run time pads or packs them",
            "activation_bytes": f"followed: largest sum of tensors alive at once in one call of {self.batch}, operator by operator; a compiler may need less",
            "process_peak_bytes": "asked of the system: largest resident memory of the whole process since it began; null where the system does not say",
            "device_peak_bytes": "asked of torch: most allocated on the GPU at once since the process began; null without one",
        }


def memory(modules: Iterable[nn.Module], copies: Iterable[int], call: Callable[[], Any], *, batch: int) -> Memory:
    """The ledger of a model in `modules` with `copies` in its graphs; `call` answers a batch of `batch`, operator by operator. Costs what `peak_bytes` does.

    The peak of the process is of all that it has done so far: to weigh one model, start a process for it.
    """
    on_device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return Memory(weight_bytes(modules), sum(copies), peak_bytes(call), batch, process_peak_bytes(), on_device)


def weight_bytes(modules: Iterable[nn.Module]) -> int:
    """Bytes of all parameters and buffers, where tied and shared ones count once, and a view for the whole storage that it keeps."""
    tensors = chain.from_iterable(part for module in modules for part in (module.parameters(), module.buffers()))
    return sum({storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}.values())


def process_peak_bytes() -> int | None:
    """Largest resident memory of this process since it began; None on Windows."""
    if sys.platform == "win32":
        return None
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # macOS counts bytes, others KiB
