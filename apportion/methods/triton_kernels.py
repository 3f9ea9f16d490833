"""Tokens in groups of different width through one FFN, in two kernels: the one file that knows Triton, imported where it is installed and wanted.

Wójcik et al. 2023, "Adaptive Computation Modules", arXiv 2312.10193, section 3 and appendix. `up` gathers the tokens of a tile and gives act(x W1 + b1) for
as many hidden units as their group has; `down` adds up those units alone, and writes each token where it came from. A program computes one tile of one group,
which it finds in the `kernels.schedule`. Nothing waits for the device, so that a CUDA graph can hold both launches. Sums are in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from apportion.methods.kernels import COLUMNS, DEEP, ROWS, schedule


def jit(kernel: Any) -> Any:
    """`triton.jit`, of which a type checker needs to know nothing: it may not be installed."""
    return triton.jit(kernel)


@jit
def _tile(schedule, GROUPS: tl.constexpr):
    """This program's group: its number in there, the group's first row, end and hidden units."""
    program = tl.program_id(0)
    first, begin, end, units = program * 0, program * 0, program * 0, program * 0
    for group in tl.static_range(GROUPS):  # pyright: ignore[reportGeneralTypeIssues]  # Triton unrolls it
        ours = program >= (schedule[4 * group] - 3) // 2  # the last one that has begun
        first = tl.where(ours, (schedule[4 * group] - 3) // 2, first)
        begin = tl.where(ours, (schedule[4 * group + 1] - 3) // 2, begin)
        end = tl.where(ours, (schedule[4 * group + 2] - 3) // 2, end)
        units = tl.where(ours, (schedule[4 * group + 3] - 3) // 2, units)
    return program - first, begin, end, units


@jit
def _act(x, ACT: tl.constexpr):
    if ACT == "gelu":
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # (1 + tanh y) / 2 = sigmoid(2 y)
    elif ACT == "silu":
        return x * tl.sigmoid(x)
    else:
        return tl.where(x < 0, 0.0, x)  # relu, which keeps what is not a number


@jit
def _up(x, rows, weight, bias, gate, gate_bias, hidden, dim, hidden_step, schedule, GROUPS: tl.constexpr, ACT: tl.constexpr, BIAS: tl.constexpr,
        GATE: tl.constexpr, GATE_BIAS: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):  # fmt: skip
    place, begin, end, units = _tile(schedule, GROUPS)
    across = tl.cdiv(end - begin, M)
    row, unit = begin + place % across * M + tl.arange(0, M), place // across * N + tl.arange(0, N)
    source = tl.load(rows + row, mask=row < end, other=0).to(tl.int64)
    total, other = tl.zeros((M, N), tl.float32), tl.zeros((M, N), tl.float32)
    for start in range(0, dim, K):
        channel = start + tl.arange(0, K)
        here = (channel[:, None] < dim) & (unit[None, :] < units)
        left = tl.load(x + source[:, None] * dim + channel[None, :], mask=(row[:, None] < end) & (channel[None, :] < dim), other=0.0)
        right = tl.load(weight + unit[None, :].to(tl.int64) * dim + channel[:, None], mask=here, other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
        if GATE:
            right = tl.load(gate + unit[None, :].to(tl.int64) * dim + channel[:, None], mask=here, other=0.0)
            other = tl.dot(left, right, other, input_precision=PRECISION)
    if BIAS:
        total += tl.load(bias + unit, mask=unit < units, other=0.0).to(tl.float32)[None, :]
    total = _act(total, ACT)
    if GATE:
        if GATE_BIAS:
            other += tl.load(gate_bias + unit, mask=unit < units, other=0.0).to(tl.float32)[None, :]
        total *= other
    where = hidden + row[:, None].to(tl.int64) * hidden_step + unit[None, :]
    tl.store(where, total.to(hidden.dtype.element_ty), mask=(row[:, None] < end) & (unit[None, :] < units))


@jit
def _down(hidden, rows, weight, bias, out, dim, weight_step, hidden_step, schedule, GROUPS: tl.constexpr, BIAS: tl.constexpr,
          PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):  # fmt: skip
    place, begin, end, units = _tile(schedule, GROUPS)
    across = tl.cdiv(end - begin, M)
    row, channel = begin + place % across * M + tl.arange(0, M), place // across * N + tl.arange(0, N)
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, units, K):  # none where a token gets no learner: the bias is all
        unit = start + tl.arange(0, K)
        from_hidden = hidden + row[:, None].to(tl.int64) * hidden_step + unit[None, :]
        left = tl.load(from_hidden, mask=(row[:, None] < end) & (unit[None, :] < units), other=0.0)
        from_weight = weight + channel[None, :].to(tl.int64) * weight_step + unit[:, None]
        right = tl.load(from_weight, mask=(unit[:, None] < units) & (channel[None, :] < dim), other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    if BIAS:
        total += tl.load(bias + channel, mask=channel < dim, other=0.0).to(tl.float32)[None, :]
    target = tl.load(rows + row, mask=row < end, other=0).to(tl.int64)
    where = out + target[:, None] * dim + channel[None, :]
    tl.store(where, total.to(out.dtype.element_ty), mask=(row[:, None] < end) & (channel[None, :] < dim))


@torch.library.custom_op("apportion::grouped_ffn", mutates_args=())
def grouped_ffn(
    x: Tensor,
    rows: Tensor,
    counts: Sequence[int],
    up: Tensor,
    up_bias: Tensor | None,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    act: str,
) -> Tensor:
    """Tokens x (m, d) of which `rows` (m,) names the first counts[0] that get no learner, then counts[1] that get one, and so on -> (m, d).

    `up`, `gate` (hidden, d) and `down` (d, hidden) are whole. Products of float32 are as exact as torch is set to make them.
    """
    unit, most, precision = len(up) // (len(counts) - 1), max((k for k, count in enumerate(counts) if count), default=0), torch.get_float32_matmul_precision()
    x, rows, up, gate, down = x.contiguous(), rows.contiguous(), up.contiguous(), None if gate is None else gate.contiguous(), down.contiguous()
    out, hidden, dim = torch.empty_like(x), x.new_empty(len(x), most * unit), x.shape[1]
    # Exact products of float32 hold twice the registers. Fusing a product with its sum is said, because what Triton does unasked changes with its version.
    common = {"PRECISION": "ieee" if precision == "highest" else "tf32", "M": ROWS, "N": COLUMNS, "K": DEEP, "enable_fp_fusion": True}
    common["num_warps"] = 8 if x.dtype == torch.float32 else 4
    with torch.cuda.device_of(x):
        programs, told = schedule(counts, unit, None)
        if programs:
            given = {"BIAS": up_bias is not None, "GATE": gate is not None, "GATE_BIAS": gate_bias is not None, "ACT": act, "GROUPS": len(told) // 4}
            _up[(programs,)](x, rows, up, up_bias, gate, gate_bias, hidden, dim, hidden.shape[1], told, **given, **common)
        programs, told = schedule(counts, unit, dim)
        if programs:
            given = {"BIAS": down_bias is not None, "GROUPS": len(told) // 4}
            _down[(programs,)](hidden, rows, down, down_bias, out, dim, len(up), hidden.shape[1], told, **given, **common)
    return out


@grouped_ffn.register_fake
def _(x: Tensor, rows, counts, up, up_bias, gate, gate_bias, down, down_bias, act) -> Tensor:
    return x.new_empty(x.shape)
