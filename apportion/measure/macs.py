"""Multiply-adds that really ran, counted at the dispatcher: the second ledger beside the closed form."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from apportion.errors import EngineError

Formula = Callable[[tuple[Any, ...], Any], int]  # arguments and result of one operator -> multiply-adds


def _product(left: int, right: int) -> Formula:
    """(..., n, k) times (..., k, m): n k m for each matrix of the stack; `left` and `right` say where the factors stand."""
    return lambda args, _: args[left].numel() * args[right].shape[-1]


def _times_rows(args: tuple[Any, ...], _: Any) -> int:
    """(..., k) times the rows of an (m, k) weight."""
    return args[0].numel() * args[1].shape[0]


def _convolution(args: tuple[Any, ...], out: Any) -> int:
    """Each output (each input, where transposed) meets one filter of its group; zeros of the padding are multiplied too."""
    inputs, weight, transposed = args[0], args[1], args[6]
    return (inputs if transposed else out).numel() * weight[0].numel()


def _attention(args: tuple[Any, ...], _: Any) -> int:
    """Queries (b, h, n, e) by keys (b, g, m, e), then weights by values (b, g, m, v): the whole rectangle, also under a mask."""
    query, key, value = args[:3]
    return math.prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _distance(args: tuple[Any, ...], _: Any) -> int:
    """All pairs of (..., n, d) and (..., m, d)."""
    return args[0].numel() * args[1].shape[-2]


def _grouped(args: tuple[Any, ...], _: Any) -> int:
    """Each token by the hidden units of its group, up and down, and by those of the gate where there is one."""
    x, _rows, counts, up, _bias, gate = args[:6]
    return sum(k * count for k, count in enumerate(counts)) * len(up) // (len(counts) - 1) * x.shape[1] * (2 if gate is None else 3)


_FORMULAS: dict[str, Formula] = {
    "mm": _product(0, 1),
    "bmm": _product(0, 1),
    "_int_mm": _product(0, 1),
    "_scaled_mm": _product(0, 1),
    "addmm": _product(1, 2),
    "baddbmm": _product(1, 2),
    "addbmm": _product(1, 2),
    "_addmm_activation": _product(1, 2),
    "linear": _times_rows,
    "_weight_int8pack_mm": _times_rows,
    "mv": lambda args, _: args[0].numel(),
    "addmv": lambda args, _: args[1].numel(),
    "dot": lambda args, _: args[0].numel(),
    "vdot": lambda args, _: args[0].numel(),
    "addr": lambda _, out: out.numel(),
    "_euclidean_dist": _distance,
    "_cdist_forward": _distance,
    "convolution": _convolution,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention": _attention,
    "_scaled_dot_product_efficient_attention": _attention,
    "_scaled_dot_product_cudnn_attention": _attention,
    "_scaled_dot_product_fused_attention_overrideable": _attention,
    "grouped_ffn": _grouped,  # methods/triton_kernels.py
}

# Names that promise a product. Without a formula they are refused: a count of zero would look like a saving.
_LOOKS_LIKE_PRODUCT = re.compile(
    r"attention|convolution|matmul|transformer|(^|_)(\w*mm|mv|v?dot|q?linear|trilinear|conv\d?d?|rnn|lstm|gru|fft)(_|$)|(^|_)conv_?(\d|tbc|depthwise|transpose)"
)


def _name(operator: Any) -> tuple[str, str]:
    """Namespace and bare name, so that in-place and out= forms share the formula of the plain one."""
    namespace, name = operator.name().split("::")
    return namespace, name.split(".")[0].removesuffix("_")


class _Counter(TorchDispatchMode):
    """Adds up one formula per operator; composite operators are taken apart first."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        self.operators += 1
        namespace, name = _name(func)
        formula = _FORMULAS.get(name) if namespace in ("aten", "apportion") else None
        if formula is None:
            # In inference mode composites (matmul, einsum, SDPA) arrive whole.
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
            if _LOOKS_LIKE_PRODUCT.search(name):
                self.refuse(f"operator {func}", "an operator with a formula for its multiply-adds")
            return func(*args, **kwargs)
        if any(isinstance(leaf, Tensor) and leaf.layout != torch.strided for leaf in tree_leaves(args)):
            self.refuse(f"a tensor in {func} that is not dense", "strided tensors")
        out = func(*args, **kwargs)
        self.macs += formula(args, out)
        return out

    def refuse(self, found: str, wanted: str) -> None:
        raise EngineError(found, wanted=wanted, do="Count the eager forward pass (no compiled graph, no backward), or add the formula in measure/macs.py.")


def executed_macs(call: Callable[[], Any]) -> int:
    """Multiply-adds executed by `call`, matrix products, convolutions, distances and fused attention; elementwise work is not counted.

    One MAC is one multiplication with its addition; FLOPs are twice that. Attention under a mask counts its whole rectangle, as closed forms do.
    Raises EngineError on an operator that looks like a product and has no formula. Costs one run of `call`, slowed by microseconds per operator.
    What `torch.compile` made runs in its eager form here. Not for graphs of other run times, which bypass the dispatcher: a call from which nothing
    reaches it raises EngineError.
    """
    with torch.no_grad(), _Counter() as counter:
        call()
    if not counter.operators:
        counter.refuse("a call that runs no operator torch can see", "an eager forward pass")
    return counter.macs
