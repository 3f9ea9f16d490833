"""The Triton kernels against the definition, run by Triton's interpreter on a CPU: `test_kernels.py` starts this file with TRITON_INTERPRET=1."""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from apportion.methods import find, kernels
from apportion.methods.ffn import acm
from tests.conftest import shake


class Case(NamedTuple):
    dim: int
    unit: int
    learners: int
    tokens: tuple[int, int]
    act: str
    gated: bool
    bias: bool
    deal: str  # which counts the tokens get

    def __str__(self) -> str:
        return "-".join(map(str, (self.dim, self.unit, self.learners, *self.tokens, self.act, self.deal, *["gated"] * self.gated, *["bare"] * (not self.bias))))


CASES = [
    Case(32, 16, 4, (3, 9), "gelu", False, True, "any"),
    Case(33, 7, 3, (2, 41), "gelu", False, True, "any"),  # odd sizes, more than a tile of rows
    Case(70, 65, 2, (2, 71), "gelu_tanh", False, True, "any"),  # more than a tile of units and of channels
    Case(5, 3, 8, (1, 140), "silu", True, True, "any"),
    Case(24, 8, 4, (2, 9), "silu", True, False, "any"),
    Case(24, 8, 4, (2, 9), "relu", False, False, "any"),
    Case(24, 8, 4, (2, 9), "gelu", False, True, "none"),
    Case(24, 8, 4, (2, 9), "gelu", False, False, "none"),
    Case(24, 8, 4, (2, 9), "gelu", False, True, "all"),
    Case(24, 8, 4, (2, 75), "gelu", False, True, "ends"),  # empty groups between
    Case(24, 8, 4, (1, 1), "gelu", False, True, "any"),
]


def ffn(dim: int, hidden: int, act: nn.Module, *, gated: bool = False, bias: bool = True) -> nn.Module:
    """A plain FFN without a gradient."""
    dense = find("weight", "dense")
    up, down, gate = dense(dim, hidden, bias=bias), dense(hidden, dim, bias=bias), dense(dim, hidden, bias=bias) if gated else None
    return find("ffn", "dense")(up=up, down=down, gate=gate, act=act, hidden=hidden).eval().requires_grad_(False)


def groups(case: Case) -> tuple[nn.Module, Tensor, Tensor]:
    """FFN, tokens, and how many learners each of them gets."""
    act = {"gelu": nn.GELU(), "gelu_tanh": nn.GELU(approximate="tanh"), "silu": nn.SiLU(), "relu": nn.ReLU()}[case.act]
    torch.manual_seed(0)
    part, n = shake(ffn(case.dim, case.unit * case.learners, act, gated=case.gated, bias=case.bias)), case.learners
    dealt = {
        "any": torch.randint(0, n + 1, case.tokens, generator=torch.Generator().manual_seed(1)),
        "none": torch.zeros(case.tokens, dtype=torch.int64),
        "all": torch.full(case.tokens, n),
        "ends": torch.arange(case.tokens[0] * case.tokens[1]).view(case.tokens) % 2 * n,
    }
    return part, torch.randn(*case.tokens, case.dim, generator=torch.Generator().manual_seed(2)), dealt[case.deal]


def naive(part, x: Tensor, counts: Tensor, unit: int) -> Tensor:
    """All hidden units of every token, those past its own set to zero."""
    hidden = part.act(F.linear(x, part.up.weight, part.up.bias))
    if part.gate is not None:
        hidden = hidden * F.linear(x, part.gate.weight, part.gate.bias)
    return F.linear(hidden * (torch.arange(part.choices[-1]) < unit * counts[..., None]), part.down.weight, part.down.bias)


def check(case: Case, *, dtype: torch.dtype = torch.float32, far: float = 1e-5) -> None:
    part, x, counts = groups(case)
    wanted = naive(part, x, counts, case.unit)
    part, x, flat = part.to(dtype), x.to(dtype), counts.flatten()
    rows, sizes = flat.argsort(stable=True), flat.bincount(minlength=case.learners + 1).tolist()
    assert kernels.plain_because(part, x).startswith("the tokens are on cpu")  # hence what follows is held against plain products too
    found = kernels.grouped(part, x, rows, sizes)
    assert found.dtype == dtype and found.shape == x.shape
    for other in (wanted, acm.grouped(part, x, rows, sizes).float()):
        assert_close(found.float(), other, rtol=far, atol=far * float(wanted.abs().max()))


@pytest.fixture(autouse=True)
def _interpreted() -> None:
    assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_kernels.py"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernels_are_the_definition(case):
    check(case)


@pytest.mark.parametrize("case", [CASES[1], CASES[3]], ids=str)
def test_the_kernels_are_the_definition_in_half_precision(case):
    check(case, dtype=torch.float16, far=3e-3)  # not in bfloat16, whose bit patterns this interpreter would multiply as integers


def test_tokens_that_do_not_lie_in_a_row_and_none_at_all():
    part, x, counts = groups(CASES[0])
    rows, sizes = counts.flatten().argsort(stable=True), counts.flatten().bincount(minlength=5).tolist()
    apart = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert not apart.is_contiguous()
    assert_close(kernels.grouped(part, apart, rows, sizes), kernels.grouped(part, x, rows, sizes), rtol=0, atol=0)
    assert kernels.grouped(part, x[:0], rows[:0], [0] * 5).shape == (0, 9, 32)


def test_the_operator_keeps_to_what_it_declares():
    from apportion.methods.triton_kernels import grouped_ffn

    part, x, counts = groups(CASES[3])
    rows, sizes = counts.flatten().argsort(stable=True), counts.flatten().bincount(minlength=9).tolist()
    layers = (part.up.weight, part.up.bias, part.gate.weight, part.gate.bias, part.down.weight, part.down.bias)
    torch.library.opcheck(grouped_ffn, (x.flatten(0, 1), rows, sizes, *layers, "silu"), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("fault", ["a learner too few", "a row left where it was", "no bias"])
def test_the_definition_catches(fault, monkeypatch):
    real = kernels.grouped

    def wrong(part, x, rows, counts):
        if fault == "a learner too few":
            return real(part, x, rows, [counts[0] + counts[1], *counts[2:], 0])
        if fault == "a row left where it was":
            return real(part, x, rows, counts).flatten(0, 1).index_select(0, rows).view_as(x)
        part.down.bias = None
        return real(part, x, rows, counts)

    monkeypatch.setattr(kernels, "grouped", wrong)
    with pytest.raises(AssertionError):
        check(CASES[0])
