"""Disentangled attention: its three terms by the definition, its buckets, places after merging, and what it costs."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from apportion.errors import PlanError
from apportion.measure.macs import executed_macs
from apportion.methods import find
from apportion.methods.mixer.disentangled import Disentangled, bucket
from apportion.methods.mixer.head_prefix import HeadPrefix
from apportion.vocab import Tokens
from tests.conftest import DIM, HEADS, shake, tiny, tokens_of

LENGTH, C = 12, DIM // HEADS


def made():
    torch.manual_seed(0)
    mixer = shake(Disentangled.from_dense(tiny().blocks[0].mixer, length=LENGTH, relative=8, relative_range=10)).requires_grad_(False)
    for table in (mixer.position_key, mixer.position_query):
        table.normal_()
    return mixer


def text(n, *, padding=0, batch=2):
    """Tokens of a text, with a source more than tokens, and the last ones padding."""
    tokens = tokens_of(batch, n)
    size = torch.ones(batch, n)
    size[:, n - padding :] = 0
    return tokens._replace(size=size, origin=torch.cat((tokens.origin, torch.full((batch, 1), n - 1)), 1))


def by_definition(mixer, tokens, heads, where):
    """One pair of tokens at a time; `where` (b, n) the places that they stand at."""
    first, out = bucket(torch.tensor(1 - LENGTH), 8, 10).item(), mixer.proj.bias.repeat(*tokens.x.shape[:2], 1)
    qkv = mixer.qkv(tokens.x).unflatten(-1, (HEADS, 3, C))
    for b, n in enumerate(tokens.size.count_nonzero(1).tolist()):
        for head in range(heads):
            q, k, v = qkv[b, :n, head].unbind(1)
            score = q @ k.T / math.sqrt(C) + tokens.size[b, :n].log()
            for i in range(n):
                for j in range(n):
                    row = bucket(where[b, i] - where[b, j], 8, 10).item() - first
                    score[i, j] += q[i] @ mixer.position_key[head, :, row] + k[j] @ mixer.position_query[head, :, row]
            out[b, :n] += score.softmax(-1) @ v @ mixer.proj.weight[:, head * C : (head + 1) * C].T
    return out


@pytest.mark.parametrize(("n", "padding"), [(LENGTH, 0), (9, 4)])
def test_content_and_position_are_scored_apart(n, padding):
    mixer, tokens = made(), text(n, padding=padding)
    mixer.text = True
    for heads in (HEADS, 2):
        wanted = by_definition(mixer, tokens, heads, torch.arange(n).expand(2, n))
        assert_close(mixer(tokens, heads).out[:, : n - padding], wanted[:, : n - padding], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("table", ["position_key", "position_query"])
def test_each_term_counts_and_may_be_left_out(table):
    mixer, tokens = made(), text(9)
    with_both = mixer(tokens, HEADS).out
    getattr(mixer, table).zero_()
    zero = mixer(tokens, HEADS).out
    assert not torch.allclose(zero, with_both, atol=1e-2)
    setattr(mixer, table, None)
    assert_close(mixer(tokens, HEADS).out, zero, rtol=1e-4, atol=1e-5)
    assert executed_macs(lambda: mixer(text(9, batch=1), HEADS)) == mixer.macs(9, HEADS)


@pytest.mark.parametrize("sources", ["a text", "an image"])
def test_a_merged_token_stands_where_its_first_stood(sources):
    mixer, whole = made(), tokens_of(2, 9)
    mixer.text = sources == "a text"
    origin = torch.tensor([[0, 1, 2, 1, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 0, 6, 7]])
    merged = Tokens(whole.x[:, :8], torch.tensor([[1.0, 2, 1, 1, 1, 1, 1, 1], [2, 1, 1, 1, 1, 1, 1, 1]]), origin, 1)
    if mixer.text:
        merged = merged._replace(origin=torch.cat((origin, torch.full((2, 1), 7)), 1))
    where = torch.tensor([[0, 1, 2, 4, 5, 6, 7, 8], [0, 1, 2, 3, 4, 5, 7, 8]])
    got = mixer(merged, HEADS).out
    assert_close(got, by_definition(mixer, merged, HEADS, where), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got, by_definition(mixer, merged, HEADS, torch.arange(8).expand(2, 8)), atol=1e-2), "places in what is left"


def test_padding_changes_nothing():
    mixer, tokens = made(), text(9, padding=4)
    mixer.text = True
    alone = text(5)._replace(x=tokens.x[:, :5])
    assert_close(mixer(tokens, HEADS).out[:, :5], mixer(alone, HEADS).out, rtol=1e-4, atol=1e-5)


def test_buckets_widen_with_the_distance():
    assert bucket(torch.arange(-12, 13), 8, 0).tolist() == [-4] * 9 + [-3, -2, -1, 0, 1, 2] + [3] * 10
    wide = bucket(torch.arange(0, 600), 512, 512)
    assert wide[:129].tolist() == list(range(129)) and wide[511] == wide[599] == 255 and bool((wide.diff() >= 0).all())
    assert torch.equal(bucket(torch.arange(-511, 512), 512, 512), -bucket(torch.arange(511, -512, -1), 512, 512))


def test_tables_follow_the_heads_and_reach_as_far_as_a_text():
    mixer, tokens = made(), text(9)
    before, order = mixer(tokens, HEADS), torch.tensor([2, 0, 3, 1])
    mixer.permute(order)
    assert_close(mixer(tokens, HEADS).out, before.out, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(mixer(tokens, 2).out, before.out, atol=1e-2)
    assert mixer.position_key.shape == (HEADS, C, 8) and Disentangled.from_dense(tiny().blocks[0].mixer, length=3).position_key.shape[-1] == 5
    nested = HeadPrefix(mixer)
    for heads in nested.choices:
        assert executed_macs(lambda heads=heads: nested(text(9, batch=1), heads)) == nested.macs(9, heads)


def test_both_tables_are_taught():
    mixer = made().requires_grad_(True)
    for table in (mixer.position_key, mixer.position_query):
        table.data.zero_()
    mixer(text(LENGTH), HEADS).out.square().sum().backward()
    for table in (mixer.position_key, mixer.position_query):
        assert table.grad is not None and (table.grad.abs().amax((0, 1)) > 0).all()


def test_what_cannot_be_built_is_named():
    part = tiny().blocks[0].mixer
    for options in ({"length": 1}, {"relative": 2}, {"relative": 64, "relative_range": 17}):
        with pytest.raises(PlanError, match="buckets"):
            Disentangled.from_dense(part, **options)
    with pytest.raises(PlanError, match="HeadPrefix"):
        Disentangled.from_dense(HeadPrefix(part))
    part.rotary = 10.0
    with pytest.raises(PlanError, match="plain"):
        Disentangled.from_dense(part)
    assert find("mixer", "disentangled") is Disentangled
