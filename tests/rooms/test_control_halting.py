"""Halting: chances that add up, oracles against their naive definitions, and classifiers that leave early where that costs nothing."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.testing import assert_close

from apportion.control import rules
from apportion.control.halting import Halting, exit_loss, fit_halting, geometric, halt, oracle, smoothed
from apportion.errors import ControlError
from apportion.measure.macs import executed_macs

caught = pytest.raises(AssertionError)
EXITS = torch.arange(1, 7)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check_geometric() -> None:
    stop = 3 * drawn(50, 5)
    found = geometric(stop)
    assert_close(found.exp().sum(-1), torch.ones(50), rtol=0, atol=1e-6)
    for row, chance in zip(stop.sigmoid().tolist(), found.exp().tolist(), strict=True):
        for exit_, seen in enumerate(chance):
            stays = math.prod(1 - stops for stops in row[:exit_])
            assert seen == pytest.approx(stays * (row[exit_] if exit_ < 5 else 1), abs=1e-6)


def test_chances_of_all_exits_add_up_and_are_the_naive_product():
    check_geometric()
    assert geometric(torch.tensor([300.0, -300.0])).isfinite().all()


def test_chances_catch_a_last_exit_that_has_a_classifier_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "pad", lambda x, pad, value=0.0: torch.cat((x, x[..., :1]), -1) if pad == (0, 1) else x.new_zeros(50, 1))
    with caught:
        check_geometric()


def test_the_first_exit_over_the_threshold_is_taken():
    stop = 2 * drawn(80, 5)
    for threshold in (0.2, 0.5, 0.9):
        for row, found in zip(stop.sigmoid().tolist(), halt(stop, threshold=threshold).tolist(), strict=True):
            assert found == next((exit_ for exit_, chance in enumerate(row) if chance > threshold), 5)


def test_the_oracle_goes_from_the_likeliest_exit_to_the_first_as_compute_grows_dear():
    loss = drawn(200, 6).exp()
    assert torch.equal(oracle(loss, EXITS, price=0.0), loss.argmin(1)) and (oracle(loss, EXITS, price=1e9) == 0).all()
    for price in (0.05, 0.3):
        for row, found in zip(loss.double().tolist(), oracle(loss, EXITS, price=price).tolist(), strict=True):
            scores = [value + price * (exit_ + 1) for exit_, value in enumerate(row)]
            assert found == scores.index(min(scores))
    mean = [oracle(loss, EXITS, price=price).double().mean().item() for price in (0.0, 0.02, 0.1, 0.5, 2.0)]
    assert mean == sorted(mean, reverse=True) and mean[0] > mean[2] > mean[4]


def test_by_correctness_it_is_the_first_exit_that_is_right_while_one_answer_is_worth_the_way():
    right = drawn(100, 6) > 0.5
    for row, found in zip(right.tolist(), oracle(1 - right.float(), EXITS, price=0.1).tolist(), strict=True):
        assert found == (row.index(True) if True in row else 0)


@pytest.mark.parametrize("sigma", [0.5, 2.0, 8.0])
def test_smoothing_is_the_naive_sum_and_padding_has_no_say(sigma):
    loss, real = drawn(3, 7, 6), torch.arange(7) < torch.tensor([7, 4, 1])[:, None]
    found = smoothed(loss, sigma=sigma, real=real)
    assert_close(smoothed(loss, sigma=sigma)[0], found[0])
    for sample, length in enumerate((7, 4, 1)):
        for token in range(length):
            weight = [math.exp(-((token - other) ** 2) / sigma) for other in range(length)]
            wanted = sum(w * loss[sample, other] for other, w in enumerate(weight)) / sum(weight)
            assert_close(found[sample, token], wanted, rtol=1e-4, atol=1e-6)
    assert found.isfinite().all() and torch.equal(smoothed(loss, sigma=0.0), loss)


def test_tokens_that_differ_get_exits_of_their_own_until_smoothing_makes_them_one():
    loss = drawn(4, 9, 6).exp()
    counts = [len({tuple(row) for row in oracle(smoothed(loss, sigma=sigma), EXITS, price=0.05).tolist()}) for sigma in (0.0, 1e6)]
    alike = oracle(smoothed(loss, sigma=1e6), EXITS, price=0.05)
    assert counts[0] == 4 and (alike == alike[:, :1]).all()
    assert torch.equal(alike[:, 0], oracle(loss.mean(1), EXITS, price=0.05))


def test_the_loss_is_the_surprise_of_the_oracle_and_least_at_its_own_shares():
    wanted, real = torch.tensor([[0, 2, 1], [0, 0, 1]]), torch.tensor([[True, True, False], [True, True, True]])
    log = drawn(2, 3, 3).log_softmax(-1)
    picked = [-log[row, place, int(wanted[row, place])].item() for row in range(2) for place in range(3)]
    assert exit_loss(log, wanted).item() == pytest.approx(sum(picked) / 6)
    assert exit_loss(log, wanted, real).item() == pytest.approx((sum(picked) - picked[2]) / 5)
    shares = torch.tensor([3, 2, 1]) / 6  # one multinomial for all is best at the shares of the oracle's exits
    best = exit_loss(shares.log().expand(2, 3, 3), wanted)
    assert all(exit_loss((shares.log() + 0.3 * drawn(3, seed=seed)).log_softmax(-1).expand(2, 3, 3), wanted) > best for seed in range(20))


def population(rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Samples that need 1 to 4 exits and are told so with noise that shrinks as they go: signal, losses, needs."""
    generator = torch.Generator().manual_seed(seed)
    need = torch.randint(4, (rows,), generator=generator)
    exits = torch.arange(4)
    signal = torch.randn(rows, 3, 5, generator=generator)
    signal[..., 0] = (need[:, None] - exits[:3]) + signal[..., 0] * (0.8 - 0.2 * exits[:3])
    signal[..., 1] += 3
    return signal, torch.where(exits >= need[:, None], 0.1, 2.5) + 0.05 * torch.randn(rows, 4, generator=generator).abs(), need


def test_classifiers_leave_where_nothing_more_is_gained():
    """On samples of their own: less loss than random mixes of exits at equal cost, later exits for what needs more, and the price is the dial."""
    cost, (signal, loss, _), (seen, held, need) = torch.tensor([0.25, 0.5, 0.75, 1.0]), population(800, 0), population(800, 1)
    spent, gains = [], []
    for price in (0.2, 1.0, 20.0):
        fitted = fit_halting(signal, loss, cost, price=price, steps=150)
        exit_ = halt(fitted(seen))
        spent.append(cost[exit_].mean().item())
        mixed = -rules.envelope(cost, -held.mean(0), torch.tensor(spent[-1] + 1e-6)).item()
        gains.append(mixed - held.gather(1, exit_[:, None]).mean().item())
        if price == 1.0:
            assert spearmanr(need, exit_).statistic > 0.7
            assert torch.equal(exit_, torch.stack([halt(torch.stack([fitted.at(i, one[i, None]) for i in range(3)], 1))[0] for one in seen]))
    assert spent == sorted(spent, reverse=True) and spent[0] > spent[-1] + 0.3 and min(gains[:2]) > 0.3 and spent[0] < 0.8


def test_cost_is_that_which_runs():
    made = Halting(4, 5)
    assert executed_macs(lambda: made.at(1, torch.zeros(1, 5))) == made.macs == 5


@pytest.mark.parametrize("fault", ["shapes", "order", "rows", "finite"])
def test_tables_that_teach_nothing_are_refused(fault):
    signal, loss, _ = population(100, 0)
    cost = torch.tensor([0.25, 0.5, 0.75, 1.0])
    if fault == "shapes":
        signal = signal[:, :2]
    elif fault == "order":
        cost = cost.flip(0)
    elif fault == "rows":
        signal, loss = signal[:10], loss[:10]
    else:
        signal[7, 0, 0] = torch.nan
    with pytest.raises(ControlError, match="row 7" if fault == "finite" else "exits"):
        fit_halting(signal, loss, cost, price=0.1)


def test_nothing_is_drawn():
    signal, loss, _ = population(200, 2)
    one, other = (fit_halting(signal, loss, torch.arange(4), price=0.1, steps=20) for _ in range(2))
    assert torch.equal(one.weight, other.weight) and not one.weight.requires_grad
