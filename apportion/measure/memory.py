"""Bytes of activations at their peak, exact to the allocation and the same in every run."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
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
