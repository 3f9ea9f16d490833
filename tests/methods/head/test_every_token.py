"""A head for each token: every source is answered for by the token it went into, and nothing is said where there is no token."""

from __future__ import annotations

import torch
from torch import nn
from torch.testing import assert_close

from apportion.methods import find, ops
from apportion.network import Architecture, Network, put
from apportion.vocab import Choice
from tests.conftest import DIM, shake, tokens_of


def made(words: bool = False):
    torch.manual_seed(0)
    return find("head", "every_token")(norm=nn.LayerNorm(DIM), project=nn.Linear(DIM, 5), macs_per_token=5 * DIM, dim=DIM, words=words).requires_grad_(False)


def test_each_patch_has_the_answer_of_its_own_token_and_the_prefix_has_none():
    head, tokens = made(), tokens_of(3, 9, prefix=2)
    assert_close(head(tokens), head.project(head.norm(tokens.x[:, 2:])))
    assert head.macs(9, 2) == 9 * 5 * DIM


def test_merged_patches_share_an_answer():
    head, tokens = made(), tokens_of(2, 6, prefix=1)
    kept, gone = torch.tensor([[0, 1, 3, 5]] * 2), torch.tensor([[2, 4]] * 2)
    less = ops.reduce(tokens, kept, gone, torch.tensor([[1, 3]] * 2))
    answers = head(less)
    assert answers.shape == (2, 5, 5)
    assert torch.equal(answers[:, 0], answers[:, 1]) and torch.equal(answers[:, 3], answers[:, 4]) and not torch.equal(answers[:, 0], answers[:, 2])


def test_words_keep_their_places_and_padding_says_nothing():
    torch.manual_seed(0)
    a = Architecture(0, 0, 16, 2, 2, 32, 4, words=20, length=12, padding=1, positions=12, pool="every_token", task="token_classification", norm_first=False)
    network = Network(a).eval().requires_grad_(False)
    shake(network)
    put(network, Choice("reducer", "tome"))
    text = torch.randint(2, 20, (1, 7))
    padded = torch.cat((text, torch.ones(1, 5, dtype=torch.int64)), 1)
    full, half = network.space.full, network.space.path(tokens=(12, 7))
    alone, company = network(text, full), network(padded, full)
    assert alone.shape == (1, 7, 4) and bool((company[:, 7:] == 0).all())
    assert_close(company[:, :7], alone)
    left = torch.cat((padded[:, 7:], text), 1)  # padding in front is put last, and every word still has its own answer
    assert_close(network(left, full)[:, 5:], alone)
    merged = network(padded, half)
    assert_close(merged[:, :7], network(text, half))
    for words in range(2, 12):  # also where all places that are left hold words
        some = torch.cat((torch.randint(2, 20, (1, words)), torch.ones(1, 12 - words, dtype=torch.int64)), 1)
        assert bool((network(some, half)[:, words:] == 0).all())
