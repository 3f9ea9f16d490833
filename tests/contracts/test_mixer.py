"""What every mixer keeps to. One whose card says exact equals softmax attention at full, and with fewer heads the first of them."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from apportion.measure.macs import executed_macs
from apportion.methods import find, names
from apportion.vocab import Tokens
from tests.conftest import DIM, HEADS, assert_same_state, fitted, rows, shake, state_of, tokens_of

every = pytest.mark.parametrize("name", names("mixer"))
exact = pytest.mark.parametrize("name", [name for name in names("mixer") if find("mixer", name).card.exact])


def by_definition(dense, x: torch.Tensor, heads: int) -> torch.Tensor:
    """The first heads of softmax attention, in float64, one head at a time; the others add nothing."""
    w = {key: value.double() for key, value in dense.state_dict().items()}
    c, total = DIM // HEADS, w["proj.bias"]
    for head in range(heads):
        part = slice(head * 3 * c, (head + 1) * 3 * c)
        q, k, v = (x.double() @ w["qkv.weight"][part].T + w["qkv.bias"][part]).split(c, -1)
        scores = q @ k.transpose(1, 2) / c**0.5
        total = total + (scores.exp() / scores.exp().sum(-1, keepdim=True)) @ v @ w["proj.weight"][:, head * c : (head + 1) * c].T
    return total


@exact
def test_heads_are_the_first_heads_of_softmax_attention(name):
    mixer, dense = fitted("mixer", name)
    tokens = tokens_of(2, 9)
    assert mixer.choices == tuple(sorted(mixer.choices)) and mixer.choices[-1] == HEADS
    for heads in mixer.choices:
        assert_close(mixer(tokens, heads).out.double(), by_definition(dense, tokens.x, heads), rtol=1e-4, atol=1e-5)


@every
def test_query_and_key_are_given_for_the_heads_that_ran(name):
    mixer, _ = fitted("mixer", name)
    for heads in mixer.choices:
        out = mixer(tokens_of(2, 9), heads)
        assert out.query.shape == out.key.shape == (2, heads, 9, DIM // HEADS) and out.out.shape == (2, 9, DIM)


@every
def test_a_merged_token_counts_as_the_tokens_it_stands_for(name):
    mixer, _ = fitted("mixer", name)
    tokens = tokens_of(2, 6)
    twice = [0, 1, 1, 1, 2, 3, 3, 4, 5]
    whole = Tokens(tokens.x[:, twice], torch.ones(2, 9), torch.arange(9).expand(2, 9), 1)
    merged = Tokens(tokens.x, torch.tensor([1.0, 3, 1, 2, 1, 1]).expand(2, 6), torch.tensor(twice).expand(2, 9), 1)
    for heads in mixer.choices:
        assert_close(mixer(merged, heads).out[:, twice], mixer(whole, heads).out, rtol=1e-4, atol=1e-5)


@exact
def test_the_order_of_tokens_is_nothing_to_it(name):
    mixer, _ = fitted("mixer", name)
    tokens, order = tokens_of(2, 9), torch.randperm(9, generator=torch.Generator().manual_seed(0))
    for heads in mixer.choices:
        assert_close(mixer(tokens._replace(x=tokens.x[:, order]), heads).out, mixer(tokens, heads).out[:, order], rtol=1e-4, atol=1e-5)


@every
def test_a_sample_does_not_depend_on_its_batch(name):
    mixer, _ = fitted("mixer", name)
    tokens = tokens_of(4, 9)
    for order in ([2, 0, 3], [1]):
        assert_close(mixer(rows(tokens, order), HEADS).out, mixer(tokens, HEADS).out[order], rtol=1e-4, atol=1e-5)


@every
def test_with_and_without_gradient_it_is_one_function(name):
    mixer, _ = fitted("mixer", name)
    tokens = tokens_of(2, 9)
    for heads in mixer.choices:
        wanted = mixer(tokens._replace(x=tokens.x.clone().requires_grad_()), heads)
        assert wanted.out.requires_grad
        assert_close(wanted.out, mixer(tokens, heads).out, rtol=1e-4, atol=1e-5)


@every
def test_heads_in_another_order_give_the_same_output(name):
    mixer, tokens = shake(fitted("mixer", name)[0]).double(), tokens_of(2, 9)
    tokens = tokens._replace(x=tokens.x.double(), size=tokens.size.double())  # what iterates makes more of a difference in rounding
    before, importance = mixer(tokens, HEADS), mixer.contribution()
    assert len(importance.strength) == importance.unit * HEADS
    order = torch.tensor([2, 0, 3, 1])
    mixer.permute(order)
    after = mixer(tokens, HEADS)
    assert_close(after.out, before.out, rtol=1e-4, atol=1e-5)
    assert_close(after.key, before.key[:, order], rtol=1e-4, atol=1e-5)
    assert_close(mixer.contribution().strength, importance.strength.view(HEADS, -1)[order].flatten())


@every
def test_multiply_adds_are_those_that_run(name):
    mixer, _ = fitted("mixer", name)
    for heads in mixer.choices:
        for n in (9, 16):
            assert executed_macs(lambda h=heads, n=n: mixer(tokens_of(1, n), h)) == mixer.macs(n, heads)


@every
def test_it_writes_no_attribute(name):
    mixer, _ = fitted("mixer", name)
    before = state_of(mixer)
    mixer(tokens_of(2, 9), mixer.choices[0])
    assert_same_state(before, state_of(mixer))
