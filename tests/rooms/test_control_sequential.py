"""Decisions in sequence: on random tables against their definitions, on planted ones against the known optimum."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from apportion.control.complexity import fit_complexity
from apportion.control.labels import task_reward
from apportion.control.policy import choose, fit_policy, prices
from apportion.control.reward import LEAVE, Episodes, Graph, Reward, best, follow, segments
from apportion.control.sequential import SequentialPolicy, States, advantages, behaviour_clone, clipped_loss, fit_ppo, fit_sequential, improve, walk
from apportion.errors import ControlError
from apportion.vocab import Outcomes
from tests.rooms.test_control_learning import planted

RUN = torch.tensor([0.11, 0.23, 0.17, 0.29])
SKIPPING, RAN = segments(RUN, torch.full((5,), 0.013), glance=0.07, skips=1)


def random_episodes(rows: int, *, seed: int, graph: Graph = SKIPPING, features: int = 4) -> Episodes:
    generator, nodes = torch.Generator().manual_seed(seed), len(graph.after)
    signal = torch.randn(rows, nodes, features, generator=generator)
    return Episodes(signal, torch.rand(rows, nodes, generator=generator) < 0.6, torch.rand(rows, nodes, generator=generator).log())


def random_policy(seed: int, *, graph: Graph = SKIPPING, features: int = 4) -> SequentialPolicy:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = SequentialPolicy(graph, features=features)
        nn.init.normal_(policy.outer.weight, std=3.0)
    return policy.requires_grad_(False)


def ways(graph: Graph) -> list[list[tuple[int, int]]]:
    """Every way from the first node to an answer, by plain recursion."""

    def onward(node: int) -> list[list[tuple[int, int]]]:
        legal = [action for action in range(graph.after.shape[1]) if graph.after[node, action] >= 0]
        return [[(node, action), *rest] for action in legal for rest in ([[]] if action == LEAVE else onward(int(graph.after[node, action])))]

    return onward(0)


def test_segments_cost_what_has_run() -> None:
    assert len(set(RAN)) == len(RAN) and RAN[0] == () and RAN[-1] == (0, 1, 2, 3)
    for way in ways(SKIPPING):
        end = way[-1][0]
        spent = sum(SKIPPING.cost[node, action].item() for node, action in way)
        assert spent == pytest.approx(0.07 + 0.013 + RUN[list(RAN[end])].sum().item(), abs=1e-6)
        gaps = [later - earlier for earlier, later in zip((-1, *RAN[end]), RAN[end], strict=False)]
        assert all(gap <= 2 for gap in gaps) and sum(gap == 2 for gap in gaps) <= 1
    assert {way[-1][0] for way in ways(SKIPPING)} == set(range(len(RAN)))
    chain, ran = segments(RUN, torch.zeros(5))
    assert ran == tuple(tuple(range(end)) for end in range(5)) and chain.depth == 5 and SKIPPING.depth == max(map(len, ways(SKIPPING)))
    assert chain.dearest == pytest.approx(0.8, abs=1e-6) and chain.least[0].tolist() == [0.0, chain.cost[0, 1].item()]


def test_bad_tables_are_named() -> None:
    after, cost = SKIPPING.after, SKIPPING.cost
    for node, action, to in ((3, 1, 1), (2, 0, 5), (4, 1, 99), (0, 1, -2)):
        broken = after.clone()
        broken[node, action] = to
        with pytest.raises(ControlError, match=rf"nodes \[{node}\]"):
            Graph(broken, cost)
    with pytest.raises(ControlError, match="none negative"):
        Graph(after, -cost)
    good = random_episodes(50, seed=0)
    with pytest.raises(ControlError, match="one column for each node"):
        Episodes(good.signal, good.correct[:, 1:], good.log_p)
    signal = good.signal.clone()
    signal[7, 2] = torch.nan
    with pytest.raises(ControlError, match="row 7 at node 2"):
        Episodes(signal, good.correct, good.log_p)
    with pytest.raises(ControlError, match="log_softmax"):
        Episodes(good.signal, good.correct, good.correct.float().log())
    with pytest.raises(ControlError, match="30 samples"):
        fit_sequential(SKIPPING, good.rows(torch.arange(30)), seed=0)
    with pytest.raises(ControlError, match="the graph's 5 nodes"):
        fit_sequential(segments(RUN, torch.zeros(5))[0], good, seed=0)


def test_backward_induction_finds_the_best_of_all_ways() -> None:
    episodes = random_episodes(40, seed=1)
    table = Reward(shaping=0.0).table(SKIPPING, episodes, price=0.7)
    every = torch.stack([sum((table[:, node, action] for node, action in way), torch.zeros(40)) for way in ways(SKIPPING)])
    value, action, _ = best(SKIPPING, table)
    torch.testing.assert_close(value[:, 0], every.amax(0))
    end, spent = follow(SKIPPING, action)
    paid = task_reward(episodes.correct, penalty=1.0).gather(1, end[:, None])[:, 0] - 0.7 * spent.float()
    torch.testing.assert_close(paid, value[:, 0])


def test_the_potential_moves_no_optimum() -> None:
    episodes = random_episodes(200, seed=2)
    # Costs in other proportions than the multiply-adds: a table of latencies serves as well.
    for graph in (SKIPPING, Graph(SKIPPING.after, torch.rand(SKIPPING.cost.shape, generator=torch.Generator().manual_seed(3)))):
        plain, shaped = (best(graph, Reward(shaping=shaping).table(graph, episodes, price=0.3)) for shaping in (0.0, 0.8))
        assert torch.equal(plain[1], shaped[1])
        torch.testing.assert_close(shaped[0], plain[0] - 0.8 * episodes.log_p)
    table = Reward(shaping=0.8).table(SKIPPING, episodes)
    for way in ways(SKIPPING):
        total = sum((table[:, node, action] for node, action in way), torch.zeros(200))
        torch.testing.assert_close(total, task_reward(episodes.correct, penalty=1.0)[:, way[-1][0]] - 0.8 * episodes.log_p[:, 0])


def test_advantage_and_loss_are_their_definitions() -> None:
    generator = torch.Generator().manual_seed(4)
    steps, rows, decay = 5, 7, 0.9
    reward, value = torch.randn(2, steps, rows, generator=generator)
    length = torch.randint(1, steps + 1, (rows,), generator=generator)
    alive = torch.arange(steps)[:, None] < length
    expected = torch.zeros(steps, rows)
    for row, start in product(range(rows), range(steps)):
        for step in range(start, int(length[row])):
            following = value[step + 1, row] if step + 1 < length[row] else 0.0
            expected[start, row] += decay ** (step - start) * (reward[step, row] + following - value[step, row])
    torch.testing.assert_close(advantages(reward, value, alive, decay=decay), expected)

    moved, gain = 0.5 * torch.randn(60, generator=generator), torch.randn(60, generator=generator)
    surrogate = [min(r * g, min(max(r, 0.8), 1.2) * g) for r, g in zip(moved.exp().tolist(), gain.tolist(), strict=True)]
    assert clipped_loss(moved, gain).item() == pytest.approx(-sum(surrogate) / 60, abs=1e-6)


def test_improvement_raises_what_paid_and_stops_when_far() -> None:
    episodes = random_episodes(64, seed=5)
    states = States(episodes.signal[:, 0], torch.zeros(64, dtype=torch.int64), torch.zeros(64, dtype=torch.float64), torch.zeros(64))
    action, zero = torch.arange(64) % 3, torch.zeros(64)
    for rate, far in ((1e-3, 0.5), (10.0, torch.inf)):
        torch.manual_seed(0)
        policy = SequentialPolicy(SKIPPING, features=4)
        before = policy(*states)[0].log_softmax(1)[torch.arange(64), action].detach()
        optimiser = torch.optim.SGD(policy.parameters(), lr=rate)
        counted: list[int] = []
        optimiser.register_step_post_hook(lambda *_, seen=counted: seen.append(1))
        improve(policy, optimiser, states, (action, before, torch.where(action == 1, 1.0, -0.5), zero), entropy=0.0)
        gone_up = policy(*states)[0].softmax(1).mean(0)
        assert gone_up[1] > gone_up[0] and gone_up[1] > gone_up[2]
        assert len(counted) == 16 if far == 0.5 else len(counted) < 16


def test_cap_holds_and_illegal_actions_are_never_taken() -> None:
    generator = torch.Generator().manual_seed(6)
    for seed in range(30):
        cost = torch.rand(SKIPPING.cost.shape, generator=generator)
        graph = Graph(SKIPPING.after, cost)
        policy, episodes = random_policy(seed, graph=graph), random_episodes(100, seed=seed)
        totals = [sum(graph.cost[node, action].item() for node, action in way) for way in ways(graph)]
        for cap in (min(totals), sorted(totals)[3], max(totals), min(totals) + torch.rand((), generator=generator).item()):
            for sample in (False, True):
                seen = walk(policy, episodes.signal, torch.tensor(0.3), cap=cap, sample=sample)
                assert bool((seen.total <= cap).all()) and set(seen.total.tolist()) <= set(totals)
                assert bool((graph.after[seen.node, seen.action][seen.alive] >= 0).all())
                assert bool((seen.alive.sum(0) <= graph.depth).all()) and seen.log_p[seen.alive].isfinite().all()
        with pytest.raises(ControlError, match="cheapest"):
            walk(policy, episodes.signal, torch.tensor(0.3), cap=min(totals) - 1e-6)


def test_a_decision_depends_on_that_sample_alone() -> None:
    policy, episodes = random_policy(7), random_episodes(120, seed=7)
    signal, price = episodes.signal, torch.tensor(0.4)
    together = walk(policy, signal, price, cap=0.7)
    alone = torch.cat([walk(policy, row, price, cap=0.7).end for row in signal.split(1)])
    beside = walk(policy, torch.cat([1e3 * signal[:40], signal.flip(0)]), price, cap=0.7).end[40:].flip(0)
    assert together.end.unique().numel() > 3
    assert torch.equal(together.end, alone) and torch.equal(together.end, beside)
    again = SequentialPolicy(SKIPPING, features=4)
    again.load_state_dict(policy.state_dict())
    for step in range(2):
        rows = together.alive[step]
        node, spent = together.node[step, rows], together.spent[step, rows]
        assert torch.equal(again.act(signal[rows, node], node, spent, price, 0.7), together.action[step, rows])


def test_budgets_hold_on_the_rows_they_were_set_on() -> None:
    policy, episodes = random_policy(8), random_episodes(300, seed=8)
    policy.set_prices(episodes)
    spends = policy.spends.unique()
    assert len(spends) > 10
    for budget in (spends[0].item(), 0.5 * (spends[0] + spends[-1]).item(), spends[-1].item(), 9.0):
        spent = walk(policy, episodes.signal, policy.price(budget)).total.mean()
        assert spent == spends[spends <= budget].max()
    with pytest.raises(ControlError, match="cheapest"):
        policy.price(spends[0].item() - 1e-6)


def test_cloning_and_training_are_repeatable() -> None:
    def trained() -> Tensor:
        torch.manual_seed(0)
        policy, episodes = SequentialPolicy(SKIPPING, features=4), random_episodes(80, seed=9)
        behaviour_clone(policy, SKIPPING, episodes, reward=Reward(), grid=3, rounds=2)
        fit_ppo(policy, SKIPPING, episodes, episodes, reward=Reward(), iterations=5, walks=64)
        return torch.cat([weight.detach().flatten() for weight in policy.parameters()])

    first = trained()
    assert first.isfinite().all() and torch.equal(first, trained())


def markov(rows: int, *, seed: int) -> tuple[Episodes, Tensor, Tensor, Tensor, Tensor]:
    """Five levels of difficulty that drift from checkpoint to checkpoint; each is seen through a noisy code, and its chances are known."""
    drift = torch.softmax(torch.randn(5, 5, 5, generator=torch.Generator().manual_seed(99)) + 3.5 * torch.eye(5), -1)
    known = 0.1 + 0.85 * torch.sigmoid(1.6 * (torch.arange(6)[:, None] - 1.3 * torch.arange(5) + 0.5))
    code = torch.randn(5, 32, generator=torch.Generator().manual_seed(98))
    generator = torch.Generator().manual_seed(seed)
    level = [torch.randint(5, (rows,), generator=generator)]
    for step in drift:
        level.append(torch.multinomial(step[level[-1]], 1, generator=generator)[:, 0])
    levels = torch.stack(level, 1)
    chance = known[torch.arange(6), levels]
    signal = code[levels] + 0.3 * torch.randn(rows, 6, 32, generator=generator)
    return Episodes(signal, torch.rand(rows, 6, generator=generator) < chance, chance.log()), chance, levels, drift, known


@pytest.mark.slow
def test_chain_comes_within_two_percent_of_the_optimum() -> None:
    graph, _ = segments(torch.full((5,), 0.18), torch.full((6,), 0.005), glance=0.07)
    state = torch.random.get_rng_state()
    policy = fit_sequential(graph, markov(5000, seed=0)[0], seed=0, reward=Reward(penalty=0.0))
    assert torch.equal(state, torch.random.get_rng_state())
    fresh, chance, levels, drift, known = markov(20000, seed=7)
    rows = torch.arange(20000)
    shares = []
    for price in (0.3, 0.5, 0.8):
        value, action = known[5] - price * graph.cost[5, LEAVE], torch.zeros(6, 5, dtype=torch.int64)
        for node in reversed(range(5)):
            leave, onward = known[node] - price * graph.cost[node, LEAVE], drift[node] @ value.float() - price * graph.cost[node, 1]
            action[node], value = (onward > leave).long(), torch.maximum(onward, leave)
        end, spent = follow(graph, action[torch.arange(6), levels])
        optimum = (chance[rows, end] - price * spent).mean().item()
        assert optimum == pytest.approx(value.mean().item(), rel=0.01)
        seen = walk(policy, fresh.signal, torch.tensor(price))
        reached = (chance[rows, seen.end] - price * seen.total).mean().item()
        static = max((chance[:, node].mean() - price * follow(graph, (torch.arange(6) < node).long().expand(1, -1))[1].mean()).item() for node in range(6))
        assert static < 0.9 * optimum
        shares.append(reached / optimum)
    assert min(shares) >= 0.97 and sum(shares) / len(shares) >= 0.98


@pytest.mark.slow
def test_a_useless_segment_is_skipped() -> None:
    """Segment 1 adds nothing, and the level, which never changes, is seen: the optimum is one backward induction for each level."""
    graph, ran = segments(torch.full((4,), 0.22), torch.full((5,), 0.01), glance=0.07, skips=1)
    useful = torch.tensor([sum(segment != 1 for segment in done) for done in ran])
    chance = 0.05 + 0.9 * torch.sigmoid(3.0 * (useful - torch.arange(4)[:, None] + 0.5))
    generator = torch.Generator().manual_seed(1)
    level = torch.randint(4, (8000,), generator=generator)
    signal = (torch.eye(4)[level] + 0.2 * torch.randn(8000, 4, generator=generator))[:, None].expand(-1, len(ran), -1)
    luck = torch.rand(8000, 1, generator=generator)
    policy = fit_sequential(graph, Episodes(signal, luck < chance[level], chance[level].log()), seed=0, reward=Reward(penalty=0.0))
    for price in (0.3, 0.6):
        expected = (-price * graph.cost.float()).expand(4, -1, -1).masked_fill(graph.after < 0, -torch.inf).clone()
        expected[:, :, LEAVE] += chance
        optimum = best(graph, expected)[0][level, 0].mean().item()
        seen = walk(policy, signal, torch.tensor(price))
        reached = (chance[level, seen.end] - price * seen.total).mean().item()
        went = torch.tensor([1 in done for done in ran])[seen.end]
        assert reached >= 0.97 * optimum
        assert went.float().mean() < 0.05


def arms(outcomes: Outcomes) -> tuple[Graph, Episodes]:
    """The one-shot problem as a graph: one decision, then an answer."""
    rows, rungs = outcomes.correct.shape
    after, cost = torch.full((rungs + 1, rungs + 1), -1), torch.zeros(rungs + 1, rungs + 1, dtype=torch.float64)
    after[0, 1:], cost[0, 1:] = torch.arange(1, rungs + 1), outcomes.cost.double()
    after[torch.arange(1, rungs + 1), LEAVE] = torch.arange(1, rungs + 1)
    before = torch.zeros(rows, 1)
    correct, log_p = torch.cat([before.bool(), outcomes.correct], 1), torch.cat([before, -outcomes.loss], 1)
    return Graph(after, cost), Episodes(outcomes.signal[:, None].expand(-1, rungs + 1, -1), correct, log_p)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_one_decision_comes_within_two_percent_of_the_exact_expectation(seed: int) -> None:
    outcomes, fresh = (planted(rows, seed=10 * seed + part, noise=1.0, lucky=0.02, features=32) for part, rows in enumerate((3000, 8000)))
    complexity = fit_complexity(outcomes, seed=seed)
    exact = fit_policy(outcomes, complexity, seed=seed, penalty=0.0)
    graph, episodes = arms(outcomes)
    policy = fit_sequential(graph, episodes, seed=seed, reward=Reward(penalty=0.0))
    budgets = torch.tensor([0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    with torch.no_grad():
        worth = exact(complexity.standardise(fresh.signal), complexity(fresh.signal), budgets)
    rung = choose(worth, prices(worth, fresh.cost, budgets), fresh.cost)
    wanted = fresh.correct.float().gather(1, rung).mean(0)
    signal = arms(fresh)[1]
    policy.set_prices(signal)  # both keep their budgets on these very rows, so that accuracies are compared at equal cost
    ends = torch.stack([walk(policy, signal.signal, policy.price(budget)).end for budget in budgets.tolist()], 1)
    reached = fresh.correct.float().gather(1, ends - 1).mean(0)
    assert (reached / wanted).mean() >= 0.98
