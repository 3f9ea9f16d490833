"""A map for each run, against the definition; what stands for nothing passes; a mean counts source tokens."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from apportion.errors import NoEffect, PlanError
from apportion.methods import ops
from apportion.methods.bridge.surrogate import Surrogate
from apportion.network import put
from apportion.vocab import Choice, Tokens
from tests.conftest import DIM, shake, tiny, tokens_of


def made(runs: str = "1-3 0-2") -> Surrogate:
    return shake(Surrogate.from_dense(None, DIM, runs).double()).requires_grad_(False)  # pyright: ignore[reportReturnType]


def double(tokens: Tokens) -> Tokens:
    return tokens._replace(x=tokens.x.double(), size=tokens.size.double())


@torch.no_grad()
def test_it_is_the_definition():
    bridge, tokens = made(), double(tokens_of(2, 9, prefix=2))
    tokens.size[:, 2:] = torch.tensor([1.0, 2, 3, 1, 1, 5, 0])  # the last is padding
    part = bridge.maps["1-3"]
    for parameter in part.parameters():
        parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    out = bridge(tokens, 1, 3)
    for row in range(2):
        mean = sum(size * x for size, x in zip(tokens.size[row, 2:], tokens.x[row, 2:], strict=True)) / 13
        for place in range(9):
            x = tokens.x[row, place]
            assert_close(out.x[row, place], x + part.token.weight @ x + part.mean.weight @ mean + part.token.bias)
    assert out.size is tokens.size and out.origin is tokens.origin and out.prefix == 2


def test_before_it_is_fitted_and_for_other_runs_tokens_pass():
    fresh, tokens = Surrogate.from_dense(None, DIM, "1-3"), tokens_of(2, 9)
    assert torch.equal(fresh(tokens, 1, 3).x, tokens.x)
    assert made()(tokens, 1, 2) is tokens and made().macs(9, 1, 2) == 0 and made().macs(9, 1, 3) == 10 * DIM**2
    assert Surrogate.from_dense(None, DIM).runs == () and made().runs == ((0, 2), (1, 3))


@torch.no_grad()
def test_merging_before_it_is_merging_after_it():
    bridge, tokens = made(), double(tokens_of(1, 9))
    for parameter in bridge.maps["1-3"].parameters():
        parameter.normal_(generator=torch.Generator().manual_seed(1))
    into = torch.tensor([[0, 1, 2, 3, 4, 4, 5, 5, 5]])

    def merged(x: torch.Tensor) -> Tokens:
        size = torch.zeros(1, 6, dtype=torch.float64).scatter_add_(1, into, tokens.size)
        return Tokens(ops.add_at(torch.zeros(1, 6, DIM, dtype=torch.float64), into, x) / size[..., None], size, into, 1)

    assert_close(bridge(merged(tokens.x), 1, 3).x, merged(bridge(tokens, 1, 3).x).x)


@pytest.mark.parametrize("runs", ["3", "3-", "a-4", "4-3", "3-3", "-1-2", "1-2,2-3"])
def test_runs_that_are_none_are_refused(runs):
    with pytest.raises(PlanError, match="a run of blocks"):
        put(tiny(), Choice("bridge", "surrogate", options={"runs": runs}))


def test_it_is_put_once_on_the_network():
    network = tiny()
    assert put(network, Choice("bridge", "surrogate"))[0].where == "network.bridge"
    with pytest.raises(NoEffect):
        put(network, Choice("bridge", "surrogate"))
    with pytest.raises(PlanError, match="blocks"):
        put(network, Choice("bridge", "surrogate", blocks=(1,)))
