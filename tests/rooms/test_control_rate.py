"""Rates from information: the mean that was asked for, exactly; the optimum by brute force; and what it is worth on sources whose information is known."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.testing import assert_close

from apportion.control import rate
from apportion.control.rate import LEAST, allotted, counts, first, followed, hardest, proportional, running, spread
from apportion.errors import ControlError

RATES = pytest.mark.parametrize("mean", [0.0625, 0.1, 0.25, 0.5, 0.75, 1.0])


def losses(rows: int, t: int, *, seed: int = 0, sigma: float = 1.0) -> Tensor:
    return (sigma * torch.randn(rows, t, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).exp()


@RATES
@pytest.mark.parametrize("sigma", [0.1, 1.0, 3.0])
def test_the_mean_is_what_was_asked_for_and_the_order_that_of_the_information(mean, sigma):
    information = losses(8, 30, sigma=sigma)
    for rates, least in ((spread(information, mean), 0.0), (proportional(information, mean), LEAST), (proportional(information, mean, least=0), 0.0)):
        assert_close(rates.mean(1), torch.full((8,), mean, dtype=torch.float64), rtol=0, atol=1e-9)
        assert (rates >= least).all() and (rates <= 1 + 1e-12).all()
        order = information.argsort(1)
        assert (rates.gather(1, order).diff(dim=1) >= -1e-12).all()
    if mean < 1:
        assert all(spearmanr(one, two).statistic == pytest.approx(1) for one, two in zip(information, spread(information, mean), strict=True))


def test_equal_information_gets_equal_rates_and_a_batch_is_its_rows():
    even = torch.full((3, 7), 2.5)
    for rule in (spread, proportional):
        assert_close(rule(even, 0.3), torch.full((3, 7), 0.3))
        information = losses(8, 12)
        assert torch.equal(rule(information, 0.4), torch.cat([rule(one[None], 0.4) for one in information]))
        assert_close(rule(information.float(), 0.4), rule(information, 0.4).float())
        assert (counts(rule(losses(2, 9), 1.0), 64) == 64).all()


def test_it_is_the_published_rule():
    information = losses(1, 16, sigma=0.8)[0]
    for mean in (0.2, 0.6, 0.9):
        apart = [float(one / information.mean() - 1) for one in information]
        scale = min(max(apart), 1 / mean - 1) / max(apart)
        assert_close(spread(information, mean), torch.tensor([mean * (1 + scale * one) for one in apart], dtype=torch.float64))


def test_proportional_rates_are_the_best_of_all_with_that_mean():
    """Of a grid of all rates for three samples none has the mean and a larger sum of information times log(rate)."""
    grid = torch.arange(1, 33) / 32
    every = torch.cartesian_prod(grid, grid, grid).double()
    for seed, mean in itertools.product(range(5), (0.2, 0.5, 0.8)):
        information = losses(1, 3, seed=seed, sigma=1.5)[0]
        allowed = every[(every.mean(1) <= mean + 1e-9) & (every >= LEAST).all(1)]
        score = (information * allowed.log()).sum(1)
        ours = proportional(information, mean)
        assert (information * ours.log()).sum() >= score.max() - 1e-9
        assert_close(ours, allowed[score.argmax()], rtol=0, atol=0.06)


def test_a_stream_keeps_its_mean_and_what_one_gets_does_not_depend_on_the_others():
    information = losses(1, 4000, sigma=0.4)[0]
    mean, given = information[0], []
    for batch in information.split(8):
        given.append(running(batch, mean, 0.4))
        mean = followed(mean, batch)
    slow = information[0]
    for one in information:
        slow = 0.95 * slow + 0.05 * one
    assert_close(mean, slow)
    assert float(torch.cat(given).mean()) == pytest.approx(0.4, rel=0.03)
    alone = torch.cat([running(one[None], mean, 0.4) for one in information[:9]])
    assert torch.equal(alone, running(information[:9], mean, 0.4)) and running(1e9 * information, mean, 0.4).max() == 1


@RATES
def test_whole_tokens_are_as_many_as_the_rates_say(mean):
    for tokens in (1, 16, 197):
        rates = proportional(losses(20, 24, sigma=2.0), mean)
        found = counts(rates, tokens)
        assert torch.equal(found.sum(1), (rates.sum(1) * tokens).round().long()) and ((found - rates * tokens).abs() < 1).all()
        assert (found >= 0).all() and (found <= tokens).all()
    assert counts(torch.full((1, 3), 0.5), 5).tolist() == [[3, 3, 2]]


def test_what_stays_is_the_beginning_or_the_hardest_and_exactly_as_many():
    count, loss = torch.tensor([0, 3, 8]), losses(3, 8)
    assert first(count, 8).sum(1).tolist() == hardest(loss, count).sum(1).tolist() == [0, 3, 8]
    assert first(count, 8)[1].tolist() == [True] * 3 + [False] * 5
    assert set(hardest(loss, count)[1].nonzero().flatten().tolist()) == set(loss[1].topk(3).indices.tolist())
    assert hardest(torch.ones(1, 4), torch.tensor([2])).tolist() == [[True, True, False, False]], "equal losses: the first of them, and no more"


def brute(value: Tensor, tokens: Tensor, budget: float) -> float:
    n, k = value.shape
    return max(
        sum(float(value[row, column]) for row, column in enumerate(chosen))
        for chosen in itertools.product(range(k), repeat=n)
        if sum(float(tokens[column]) for column in chosen) <= n * budget + 1e-9
    )


def total(value: Tensor, choice: Tensor) -> float:
    return float(value.gather(1, choice[:, None]).sum())


@pytest.mark.parametrize("seed", range(6))
def test_where_gains_diminish_it_is_the_optimum(seed):
    gains = losses(5, 4, seed=seed).sort(dim=1, descending=True).values
    value, tokens = torch.cat((torch.zeros(5, 1).double(), gains.cumsum(1)), 1), torch.tensor([4, 8, 12, 16, 20])
    for budget in (4.0, 6.5, 10.0, 13.1, 20.0):
        choice = allotted(value, tokens, budget)
        assert tokens[choice].double().mean() <= budget and total(value, choice) == pytest.approx(brute(value, tokens, budget), abs=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_in_any_table_it_keeps_the_budget_and_lacks_less_than_a_step(seed):
    value, tokens = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed)).double(), torch.tensor([1, 2, 5, 9])
    gain = rate.steps(value, tokens.double())[1]
    for budget in (1.0, 2.3, 4.0, 6.0, 9.0):
        choice, best = allotted(value, tokens, budget), brute(value, tokens, budget)
        assert tokens[choice].double().mean() <= budget and best - float(gain.max()) < total(value, choice) <= best + 1e-9
    assert torch.equal(allotted(value, tokens, 9.0), value.argmax(1))


def test_code_lengths_that_follow_the_information_come_within_a_bit_of_the_entropy():
    """Half of a source says 2 bits, half 14: told apart they need 8 in the mean, and one length for all needs 14 for the same error."""
    chance = torch.cat((torch.full((4,), 0.5 / 4), torch.full((2**14,), 0.5 / 2**14))).double()
    length, entropy = (-chance.log2()).ceil(), float(-(chance * chance.log2()).sum())
    assert entropy <= float((chance * length).sum()) <= entropy + 1
    bits = torch.tensor([2.0, 14.0]).repeat(50)
    found = counts(proportional(bits, 0.5, least=0), 16)
    assert (found >= bits).all() and found.sum() == 800
    assert max(bits) / float(found.double().mean()) >= 1.3


@pytest.mark.parametrize("seed", range(3))
def test_busy_clips_get_more_and_all_of_them_come_out_better(seed):
    """Clips of coefficients that fall off fast (static) or slowly (busy), the first of which are kept. Uniform rate: the same share of all."""
    draw, tokens = torch.Generator().manual_seed(seed), 64
    falloff = torch.tensor([0.5, 0.05]).repeat_interleave(20)
    clips = torch.randn(40, tokens, generator=draw) * (-falloff[:, None] * torch.arange(tokens)).exp()
    proxy = (clips * ~first(torch.tensor(8), tokens)).abs().mean(1)  # what a cheap reconstruction leaves over

    def psnr(count: Tensor) -> float:
        error = (clips * ~first(count, tokens)).square().mean()
        return -10 * math.log10(float(error))

    even, ours = torch.full((40,), 32), counts(proportional(proxy, 0.5), tokens)
    assert ours.sum() == even.sum() and ours[20:].double().mean() / ours[:20].double().mean() >= 1.5
    assert psnr(ours) >= psnr(even) + 0.3


def test_what_makes_no_sense_is_refused():
    good = torch.ones(3)
    for call in (
        lambda: spread(good, 0.0),
        lambda: spread(good, 1.5),
        lambda: proportional(good, 0.01),
        lambda: proportional(torch.tensor([1.0, 0.0]), 0.5),
        lambda: running(torch.tensor([torch.nan]), good[0], 0.5),
        lambda: allotted(torch.ones(2, 3), torch.tensor([1, 2]), 1.5),
        lambda: allotted(torch.ones(2, 2), torch.tensor([2, 1]), 1.5),
        lambda: allotted(torch.ones(2, 2), torch.tensor([1, 2]), 0.5),
        lambda: allotted(torch.full((2, 2), torch.inf), torch.tensor([1, 2]), 1.5),
    ):
        with pytest.raises(ControlError):
            call()


def test_the_checks_catch_a_rule_that_cuts_and_does_not_make_up_for_it(monkeypatch):
    monkeypatch.setitem(globals(), "proportional", lambda x, mean, least=LEAST: (mean * x / x.mean(-1, keepdim=True)).clamp(least, 1))
    with pytest.raises(AssertionError):
        test_the_mean_is_what_was_asked_for_and_the_order_that_of_the_information(0.5, 3.0)
