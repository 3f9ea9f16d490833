"""Columns of a table: each token by its definition, what is missing, gradients, and what every tokeniser keeps to."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from apportion.errors import PathError
from apportion.measure.macs import executed_macs
from apportion.methods import find
from apportion.network import Architecture, Network
from tests.conftest import assert_same_state, shake, state_of

DIM, NUMBERS, CATEGORIES = 8, 3, (4, 2)
shapes = pytest.mark.parametrize(("numbers", "categories", "prefix"), [(3, (4, 2), 1), (3, (), 0), (0, (4, 2), 1)])


def tokeniser_of(numbers, categories, prefix):
    torch.manual_seed(0)
    return shake(find("tokeniser", "feature")(numbers=numbers, categories=categories, dim=DIM, prefix=prefix)).requires_grad_(False)


def rows(batch, numbers=NUMBERS, categories=CATEGORIES):
    generator = torch.Generator().manual_seed(1)
    value = torch.randn(batch, numbers, generator=generator)
    entry = [torch.randint(0, entries, (batch, 1), generator=generator).float() for entries in categories]
    return torch.cat((value, *entry), 1)


@shapes
def test_each_token_is_what_its_column_says(numbers, categories, prefix):
    tokeniser, inputs = tokeniser_of(numbers, categories, prefix), rows(4, numbers, categories)
    if numbers:
        inputs[2, 1] = float("nan")
    tokens = tokeniser(inputs, 0)
    a = Architecture(0, 0, DIM, 1, 1, 1, 0, numbers=numbers, categories=categories, class_token=bool(prefix))
    assert tokens.x.shape == (4, a.tokens, DIM) and tokens.prefix == a.prefix == prefix and not tokens.reduced and a.input_shape == inputs.shape[1:]
    assert (tokens.size == 1).all() and torch.equal(tokens.origin, torch.arange(a.tokens).expand(4, a.tokens))
    tables = tokeniser.entry.split(list(categories))
    for row in range(4):
        wanted = list(tokeniser.first)
        for column, value in enumerate(inputs[row].tolist()):
            if column >= numbers:
                body = tables[column - numbers][int(value)]
            else:
                body = tokeniser.missing[column] if value != value else value * tokeniser.weight[column]
            wanted.append(body + tokeniser.bias[column])
        assert_close(tokens.x[row], torch.stack(wanted))


@shapes
def test_company_multiply_adds_and_nothing_written(numbers, categories, prefix):
    tokeniser, inputs = tokeniser_of(numbers, categories, prefix), rows(3, numbers, categories)
    before = state_of(tokeniser)
    assert_close(tokeniser(inputs[1:2], 0).x, tokeniser(inputs, 0).x[1:2])
    assert executed_macs(lambda: tokeniser(inputs[:1], 0)) == tokeniser.macs(0)
    assert_same_state(before, state_of(tokeniser))


def test_a_gap_has_a_gradient_of_its_own_and_spoils_no_other():
    tokeniser, inputs = tokeniser_of(NUMBERS, CATEGORIES, 1).requires_grad_(True), rows(3)
    inputs[:, 0] = float("nan")
    tokeniser(inputs, 0).x.square().sum().backward()
    weight, missing, entry = tokeniser.weight.grad, tokeniser.missing.grad, tokeniser.entry.grad
    assert weight.isfinite().all() and (weight[0] == 0).all() and (weight[1:] != 0).all()
    assert (missing[0] != 0).all() and (missing[1:] == 0).all()
    seen = {int(value) + start for column, start in ((3, 0), (4, 4)) for value in inputs[:, column]}
    assert {row for row in range(6) if (entry[row] != 0).any()} == seen


def test_a_network_of_columns_counts_what_runs():
    shape = Architecture(0, 0, 16, 2, 2, 32, 3, numbers=NUMBERS, categories=CATEGORIES)
    network = Network(shape).eval()
    path = network.space.full
    assert executed_macs(lambda: network(rows(1), path)) == network.macs(path) and network(rows(5), path).shape == (5, 3)


def test_other_inputs_are_refused():
    tokeniser = tokeniser_of(NUMBERS, CATEGORIES, 1)
    for wrong in (rows(2)[:, 1:], rows(2)[:, None], rows(1)[0]):
        with pytest.raises(PathError, match="5"):
            tokeniser(wrong, 0)
    with pytest.raises(PathError, match="patch 4"):
        tokeniser(rows(1), 4)
