"""Token merging against the definition, for one sample, with loops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from apportion.methods.reducer.tome import ToMe
from apportion.vocab import Tokens
from tests.conftest import DIM, HEADS, mixed_of, rows, tokens_of


def groups(key: Tensor, n: int, prefix: int, keep: int) -> list[list[int]]:
    """Which tokens stand together: every other token after the prefix joins its most alike among the rest, the most alike pairs first."""
    key = key.mean(0)
    best = {a: max(range(prefix + 1, n, 2), key=lambda b: float(F.cosine_similarity(key[a], key[b], dim=0))) for a in range(prefix, n, 2)}
    alike = sorted(best, key=lambda a: -float(F.cosine_similarity(key[a], key[best[a]], dim=0)))
    gone = alike[: n - keep]
    stay = [*range(prefix), *(a for a in range(prefix, n, 2) if a not in gone), *range(prefix + 1, n, 2)]
    return [[token, *(a for a in sorted(gone) if best[a] == token)] for token in stay]


@pytest.mark.parametrize("prefix", [0, 1, 4])
@pytest.mark.parametrize("remove", [1, 3, 8])
def test_it_is_the_definition(prefix, remove):
    tokens = tokens_of(3, 17 + prefix, prefix=prefix)
    tokens = tokens._replace(size=torch.cat((torch.ones(3, prefix), 1 + torch.arange(17).expand(3, 17) % 3), 1))
    mixed, keep = mixed_of(tokens), 17 + prefix - remove
    out = ToMe(DIM // HEADS)(tokens, keep, mixed)
    for sample in range(3):
        wanted = groups(mixed.key[sample], 17 + prefix, prefix, keep)
        for place, members in enumerate(wanted):
            x, size = tokens.x[sample, members], tokens.size[sample, members]
            assert_close(out.x[sample, place], (x * size[:, None]).sum(0) / size.sum(), rtol=1e-5, atol=1e-6)
            assert out.size[sample, place] == size.sum() and all(out.origin[sample, token] == place for token in members)


def test_equal_tokens_are_merged_first_and_nothing_is_lost():
    keys, which = torch.randn(1, 1, 4, 8, generator=torch.Generator().manual_seed(0)), [0, 0, 1, 1, 2, 2, 3, 3]
    tokens = tokens_of(1, 8, prefix=0)
    tokens = tokens._replace(x=tokens.x[:, which])
    out = ToMe(8)(tokens, 4, mixed_of(tokens)._replace(key=keys[:, :, which]))
    assert (out.size == 2).all() and torch.equal(out.x[torch.zeros_like(out.origin), out.origin], tokens.x)


def test_merging_twice_weighs_by_what_tokens_stand_for():
    tokens, reduce = tokens_of(2, 17), ToMe(DIM // HEADS)
    once = reduce(tokens, 11, mixed_of(tokens))
    twice: Tokens = reduce(once, 7, mixed_of(once, seed=4))
    for sample in range(2):
        for place in range(7):
            assert_close(twice.x[sample, place], tokens.x[sample, twice.origin[sample] == place].mean(0), rtol=1e-5, atol=1e-6)
    assert torch.equal(rows(twice, [1]).size.sum(1), torch.tensor([17.0]))


def test_cost_is_one_product_of_half_by_half():
    assert ToMe(8).macs(17, 12, 1, HEADS) == 8 * 8 * 8 and ToMe(8).macs(18, 12, 1, HEADS) == 9 * 8 * 8 and ToMe(8).macs(17, 17, 1, HEADS) == 0
