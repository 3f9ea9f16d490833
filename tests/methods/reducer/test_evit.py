"""Attentive pruning against the definition, for one sample, with loops."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from apportion.errors import PlanError
from apportion.methods.reducer.evit import EViT
from apportion.network import put
from apportion.vocab import Choice
from tests.conftest import DIM, HEADS, mixed_of, tiny, tokens_of

C = DIM // HEADS


@pytest.mark.parametrize("prefix", [1, 4])
@pytest.mark.parametrize("keep", [16, 13, 12])
def test_it_is_the_definition(prefix, keep):
    n = 17
    tokens = tokens_of(3, n, prefix=prefix)
    mixed = mixed_of(tokens)
    out = EViT(C)(tokens, keep, mixed)
    for sample in range(3):
        attention = torch.stack([(key @ query[0] / C**0.5).softmax(0) for query, key in zip(mixed.query[sample], mixed.key[sample], strict=True)]).mean(0)
        strongest = sorted(range(prefix, n), key=lambda token: -float(attention[token]))
        stay, rest = sorted(strongest[: keep - prefix - 1]), strongest[keep - prefix - 1 :]
        assert torch.equal(out.x[sample, : keep - 1], tokens.x[sample, [*range(prefix), *stay]])
        assert_close(out.x[sample, -1], tokens.x[sample, rest].mean(0), rtol=1e-5, atol=1e-6)
        assert out.size[sample].tolist() == [1.0] * (keep - 1) + [float(len(rest))] and all(out.origin[sample, token] == keep - 1 for token in rest)


def test_a_token_that_stands_for_more_draws_more_attention():
    tokens = tokens_of(1, 5)
    merged = tokens._replace(size=torch.tensor([[1.0, 1, 9, 1, 1]]), origin=torch.tensor([[0, 1, *[2] * 9, 3, 4]]))
    mixed = mixed_of(tokens)._replace(query=torch.zeros(1, HEADS, 5, C))
    assert EViT(C)(merged, 3, mixed).origin[0, 2] == 1 and EViT(C)(tokens, 3, mixed).origin[0, 2] == 2


@pytest.mark.parametrize("flavour", ["mean", "attention_pool"])
def test_without_a_class_token_it_is_refused_when_put(flavour):
    with pytest.raises(PlanError, match="class token"):
        put(tiny(flavour), Choice("reducer", "evit"))


def test_cost_is_one_row_of_attention():
    assert EViT(C).macs(17, 12, 1, HEADS) == 17 * DIM and EViT(C).macs(17, 17, 1, HEADS) == 0
