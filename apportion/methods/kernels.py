"""Tokens in groups of different width through one FFN: whether the kernels of `triton_kernels` run, or plain products, and why. It can be asked.

The kernels are for answers on a CUDA device: they have no gradient. On a CPU, and in whatever is exported or converted, there are plain products alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from apportion.methods.slots import Layers
from apportion.methods.weight.dense import DenseWeight

TRITON = find_spec("triton") is not None
ROWS, COLUMNS, DEEP = 64, 64, 32
"""Of the tile that one program computes, and what it adds up at once. Not tuned: no device was there to tune them on."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = {nn.GELU: "gelu", nn.SiLU: "silu", nn.ReLU: "relu"}


def plain_because(part: Layers, x: Tensor) -> str:
    """Why these tokens go through plain products, group by group; "" where the kernels run. `part`: without a norm over its hidden units."""
    if x.device.type != "cuda":
        return f"the tokens are on {x.device.type}, and the kernels are for cuda"
    if not TRITON:
        return "the package triton is not installed (the extra `gpu`)"
    if torch.is_grad_enabled() and (x.requires_grad or any(weight.requires_grad for weight in _weights(part))):
        return "a gradient is wanted"
    if torch.is_autocast_enabled("cuda"):
        return "autocast chooses the types"
    if any(type(weight) is not DenseWeight for weight in (part.up, part.down, *([] if part.gate is None else [part.gate]))):
        return "a weight is no plain matrix"
    if x.dtype not in DTYPES or any(weight.dtype != x.dtype for weight in _weights(part)):
        return f"tokens are {x.dtype}, weights {_weights(part)[0].dtype}, and the kernels are for one of {', '.join(map(str, DTYPES))}"
    return "" if type(part.act) in ACTIVATIONS else f"the activation is {type(part.act).__name__}"


def grouped(part: Layers, x: Tensor, rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Tokens x (b, n, d), of which `rows` (b * n,) names the first counts[0] that get no share of the hidden units, then counts[1] that get one, and so on.

    For what `plain_because` has nothing against.
    """
    from apportion.methods.triton_kernels import grouped_ffn

    act = ACTIVATIONS[type(part.act)]
    act = f"{act}_tanh" if isinstance(part.act, nn.GELU) and part.act.approximate == "tanh" else act
    gate = (None, None) if part.gate is None else (part.gate.weight, part.gate.bias)
    found = grouped_ffn(x.flatten(0, 1), rows, list(counts), part.up.weight, part.up.bias, *gate, part.down.weight, part.down.bias, act)
    return found.view_as(x)


def schedule(counts: Sequence[int], unit: int, columns: int | None) -> tuple[int, tuple[int, ...]]:
    """How many programs there are, and for each group that has any (first program, first row, end of its rows, hidden units), dearest group first.

    `counts[k]` tokens get k shares of `unit` hidden units; `columns` of the result, None: as many as the group has units. Each integer i is told as 2 i + 3:
    Triton compiles a kernel anew for integers that are 1 or a multiple of 16, and odd ones from 3 on never are, so that all counts share one.
    """
    programs, end, told = 0, sum(counts), list[int]()
    for k, count in reversed(list(enumerate(counts))):
        here = -(-count // ROWS) * -(-(k * unit if columns is None else columns) // COLUMNS)
        if here:
            told += (2 * value + 3 for value in (programs, end - count, end, k * unit))
        programs, end = programs + here, end - count
    return programs, tuple(told)


def _weights(part: Layers) -> list[Tensor]:
    layers = (part.up, part.down) if part.gate is None else (part.up, part.down, part.gate)
    return [tensor for layer in layers for tensor in (layer.weight, layer.bias) if tensor is not None]
