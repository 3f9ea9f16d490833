"""Deciding at every checkpoint: go on, skip or leave, by a policy that clones foresight and is then trained by PPO on plain tables."""

from __future__ import annotations

import math
from copy import deepcopy
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer

from apportion.control.collapse import Watch, collapse
from apportion.control.complexity import HIDDEN, REACH
from apportion.control.labels import FEWEST_ROWS, folds, task_reward
from apportion.control.reward import LEAVE, Episodes, Graph, Reward, best, follow
from apportion.control.rules import envelope, out_of_reach
from apportion.errors import ControlError

CLIP, LAMBDA, TARGET_KL, GRAD_NORM = 0.2, 0.95, 0.02, 0.5
PASSES, PARTS = 4, 4  # over one set of walks, and the minibatches of each
ENTROPY = (0.01, 0.001)  # weight at the start and at the end
CRITICAL = 0.5  # share of the self-critical advantage
KNOTS = 129
BELOW = -0.05  # the first price, as a share of the last


class States(NamedTuple):
    """What the policy is asked, one row for each decision."""

    signal: Tensor  # (m, f)
    node: Tensor  # (m,) int64
    spent: Tensor  # (m,) float64, exact
    price: Tensor  # (m,)

    def take(self, index: Tensor) -> States:
        return States(*(column[index] for column in self))


class Walk(NamedTuple):
    """What happened to each sample, one row for each step; nothing counts once it has left (`alive` is False)."""

    node: Tensor  # (t, n) int64
    action: Tensor  # (t, n) int64
    spent: Tensor  # (t, n) float64, before the action
    alive: Tensor  # (t, n) bool
    log_p: Tensor  # (t, n) of the action taken
    value: Tensor  # (t, n)
    end: Tensor  # (n,) the node it left at
    total: Tensor  # (n,) float64, all that it spent


class SequentialPolicy(nn.Module):
    """What to do at a checkpoint, from what is seen there, what was spent and the price on compute; one policy serves every budget.

    A budget is asked for through its price: `price` looks up the one that `set_prices` found to hold it. An action is illegal where even the
    cheapest way to an answer after it passes the cap, so no sample ever passes it. Policy and value share all layers but the last.
    Shapes: signal (b, f), node (b,) int64, spent (b,) float64, price (b,) or () -> logits (b, actions), -inf where illegal, value (b,).
    Cost: `macs` for each checkpoint that a sample reaches. When not to use it: where one decision is taken, `fit_policy` sums over all
    outcomes and is better and faster.
    """

    after: Tensor
    cost: Tensor
    least: Tensor
    mean: Tensor
    std: Tensor
    dearest_price: Tensor
    prices: Tensor
    spends: Tensor

    def __init__(self, graph: Graph, *, features: int, hidden: int = HIDDEN) -> None:
        super().__init__()
        nodes, actions = graph.after.shape
        self.depth = graph.depth
        self.seen = nn.Linear(features, hidden)
        self.place = nn.Embedding(nodes, hidden)
        self.purse = nn.Linear(2, hidden, bias=False)
        self.inner = nn.Linear(hidden, hidden)
        self.outer = nn.Linear(hidden, actions + 1)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)
        tables = {"after": graph.after, "cost": graph.cost, "least": graph.least, "mean": torch.zeros(features), "std": torch.ones(features)}
        knots = {"dearest_price": torch.ones(()), "prices": torch.zeros(KNOTS), "spends": torch.zeros(KNOTS, dtype=torch.float64)}
        for name, table in (tables | knots).items():
            self.register_buffer(name, table.clone())

    @property
    def macs(self) -> int:
        """Multiply-adds per sample and checkpoint, closed form."""
        return sum(layer.weight.numel() for layer in (self.seen, self.purse, self.inner, self.outer))

    def forward(self, signal: Tensor, node: Tensor, spent: Tensor, price: Tensor, cap: float = math.inf) -> tuple[Tensor, Tensor]:
        standard = ((signal.float() - self.mean) / self.std).clamp(-REACH, REACH)
        purse = torch.stack([spent.float(), price.expand(len(node))], 1)
        hidden = F.gelu(self.inner(F.gelu(self.seen(standard) + self.place(node) + self.purse(purse))))
        logits, value = self.outer(hidden).split([self.after.shape[1], 1], 1)
        within = (self.after[node] >= 0) & (spent[:, None] + self.least[node] <= cap)
        return logits.masked_fill(~within, -torch.inf), value[:, 0]

    def act(self, signal: Tensor, node: Tensor, spent: Tensor, price: Tensor, cap: float = math.inf) -> Tensor:
        """The deployed decision: the likeliest legal action, (b,) int64. It depends on that sample alone."""
        return self(signal, node, spent, price, cap)[0].argmax(1)

    def price(self, budget: float) -> Tensor:
        """The price, (), that came nearest to this mean cost without passing it. Raises ControlError where every price passes it."""
        if not budget >= self.spends.amin():
            raise out_of_reach(budget, self.spends.amin()[None])
        return self.prices[self.spends.masked_fill(self.spends > budget, -1.0).argmax()]

    def set_prices(self, episodes: Episodes) -> None:
        """Fill the table of budgets from these rows, which nothing was fitted on. Cost: 129 walks."""
        prices, walks = tariff(self, episodes.signal, knots=KNOTS)
        self.prices.copy_(prices)
        self.spends.copy_(torch.stack([seen.total.mean() for seen in walks]))


@torch.no_grad()
def walk(
    policy: SequentialPolicy, signal: Tensor, price: Tensor, *, cap: float = math.inf, sample: bool = False, start: tuple[Tensor, Tensor] | None = None
) -> Walk:
    """Take all samples to their answers at once, as deployed or by drawing each action, from the first node or from `start` (node, spent).

    Shapes: signal (n, nodes, f), price (n,) or (). Raises ControlError where no answer fits the cap. Cost: `depth` passes of the policy.
    """
    if not cap >= (cheapest := policy.least[0].amin()):
        raise out_of_reach(cap, cheapest[None])
    rows = torch.arange(len(signal))
    node, spent = start or (torch.zeros_like(rows), torch.zeros(len(rows), dtype=torch.float64))
    alive = torch.ones_like(rows, dtype=torch.bool)
    total, steps = spent, list[tuple[Tensor, ...]]()
    for _ in range(policy.depth):
        logits, value = policy(signal[rows, node], node, spent, price, cap)
        action = Categorical(logits=logits, validate_args=False).sample() if sample else logits.argmax(1)
        steps.append((node, action, spent, alive, logits.log_softmax(1)[rows, action], value))
        total = torch.where(alive, spent + policy.cost[node, action], total)
        node, alive = torch.where(alive, policy.after[node, action], node), alive & (action != LEAVE)
        # Whoever left is asked again as before leaving, with no consequence: every step stays one batch, and something stays legal.
        spent = torch.where(alive, total, spent)
    return Walk(*(torch.stack(column) for column in zip(*steps, strict=True)), end=node, total=total)


def tariff(policy: SequentialPolicy, signal: Tensor, *, knots: int) -> tuple[Tensor, list[Walk]]:
    """Ascending prices, dense where the mean cost of these samples changes, and the deployed walks at each.

    Mean cost can change much within little, so each new price halves the step that leaves most open, in price times cost. They begin a
    little below 0: from 0 on, the dearest answers are learned less well; from further below, useless segments are run at low prices too. Cost: `knots` walks.
    """
    ends = [BELOW * policy.dearest_price.item(), policy.dearest_price.item()]
    table = [(price, walk(policy, signal, torch.tensor(price))) for price in ends]
    while len(table) < knots:
        opened = [(high - low) * abs(more.total.mean() - less.total.mean()).item() for (low, more), (high, less) in pairwise(table)]
        at = max(range(len(opened)), key=opened.__getitem__)
        price = (table[at][0] + table[at + 1][0]) / 2
        table.insert(at + 1, (price, walk(policy, signal, torch.tensor(price))))
    prices, walks = zip(*table, strict=True)
    return torch.tensor(prices), list(walks)


def draw(policy: SequentialPolicy, signal: Tensor, price: Tensor) -> tuple[Walk, States, Tensor, Tensor]:
    """Sampled walks; the states in them; and the step and row of each state, (m,)."""
    seen = walk(policy, signal, price, sample=True)
    step, row = seen.alive.nonzero(as_tuple=True)
    node = seen.node[step, row]
    return seen, States(signal[row, node], node, seen.spent[step, row], price[row]), step, row


def advantages(reward: Tensor, value: Tensor, alive: Tensor, *, decay: float = LAMBDA) -> Tensor:
    """Generalised advantage estimation without discount (Schulman et al., 2016, arXiv 1506.02438, eq. 16), 0 after the answer; all (t, n)."""
    result, ahead, after = torch.zeros_like(value), torch.zeros_like(value[0]), torch.zeros_like(value[0])
    for step in reversed(range(len(value))):
        ahead = torch.where(alive[step], reward[step] + after - value[step] + decay * ahead, 0.0)
        after = torch.where(alive[step], value[step], 0.0)
        result[step] = ahead
    return result


def clipped_loss(moved: Tensor, advantage: Tensor, *, clip: float = CLIP) -> Tensor:
    """PPO's surrogate, to minimise: nothing is gained by moving an action's log-probability (by `moved`) out of the clip; both (m,)."""
    ratio = moved.exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()


def descend(policy: SequentialPolicy, optimiser: Optimizer, loss: Tensor) -> None:
    """One step of the optimiser, the gradient's norm clipped."""
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(policy.parameters(), GRAD_NORM)
    optimiser.step()


def foresight(graph: Graph, table: Tensor, price: float) -> Tensor:
    """The best actions at this price knowing every outcome, (n, nodes)."""
    return best(graph, table - price * graph.cost.float())[1]


def price_range(graph: Graph, table: Tensor) -> float:
    """The price at which even foresight spends hardly more than the least: beyond it there is nothing to learn. Cost: 20 inductions."""
    least = graph.least[0].amin().item()
    low, high = 0.0, 1024.0
    for _ in range(20):
        price = (low + high) / 2
        spent = follow(graph, foresight(graph, table, price))[1].mean().item()
        low, high = (low, price) if spent - least <= 0.01 * (graph.dearest - least) else (price, high)
    return high


def behaviour_clone(policy: SequentialPolicy, graph: Graph, episodes: Episodes, *, reward: Reward, grid: int = 9, rounds: int = 10) -> None:
    """Teach what foresight would do, in the states that the policy itself walks into (Ross et al., 2011, arXiv 1011.0686).

    Foresight leaves at once where no compute would help, which no signal shows: training starts here and does not end here.
    """
    table, prices = reward.table(graph, episodes), torch.linspace(0, 1, grid).square() * policy.dearest_price
    target = torch.stack([foresight(graph, table, price) for price in prices.tolist()])
    optimiser = AdamW(policy.parameters(), lr=3e-3, weight_decay=0.1)
    for _ in range(rounds):
        which = torch.randint(grid, (len(table),))
        _, states, _, row = draw(policy, episodes.signal, prices[which])
        label = target[which[row], row, states.node]
        for part in torch.randperm(len(row)).chunk(PARTS):
            descend(policy, optimiser, F.cross_entropy(policy(*states.take(part))[0], label[part]))


def improve(policy: SequentialPolicy, optimiser: Optimizer, states: States, taken: tuple[Tensor, ...], *, entropy: float) -> None:
    """Some passes of PPO over these decisions, ended where the policy has moved too far from the one that walked.

    `taken`: action, its log-probability then, advantage and return, (m,) each. The divergence is estimated by E[r - 1 - log r].
    """
    for _ in range(PASSES):
        for part in torch.randperm(len(states.node)).chunk(PARTS):
            action, old, gain, back = (column[part] for column in taken)
            logits, value = policy(*states.take(part))
            choice = Categorical(logits=logits, validate_args=False)
            moved = choice.log_prob(action) - old
            if (moved.exp() - 1 - moved).mean() > TARGET_KL:
                return
            loss = clipped_loss(moved, gain) + 0.5 * (value - back).square().mean() - entropy * choice.entropy().mean()
            descend(policy, optimiser, loss)


def frontier(policy: SequentialPolicy, graph: Graph, episodes: Episodes, *, reward: Reward, knots: int = 13) -> tuple[float, Tensor, float]:
    """Mean over budgets of the task reward that the deployed policy reaches on these rows, mixing prices where that helps; those prices; and the bits

    that answers tell of their inputs at the price where they tell most.
    """
    task, rows = task_reward(episodes.correct, penalty=reward.penalty).double(), torch.arange(len(episodes.correct))
    prices, walks = tariff(policy, episodes.signal, knots=knots)
    ends = [follow(graph, graph.least.argmin(1).expand(len(rows), -1)), *((seen.end, seen.total) for seen in walks)]
    cost, order = torch.stack([spent.mean() for _, spent in ends]).sort()
    earned = torch.stack([task[rows, end].mean() for end, _ in ends])[order]
    budgets = torch.linspace(graph.least[0].amin().item(), graph.dearest, 17, dtype=torch.float64)
    bits = max(collapse(seen.end, rungs=len(graph.after)).entropy_bits for seen in walks)
    return envelope(cost, earned, budgets).mean().item(), prices, bits


def fit_ppo(
    policy: SequentialPolicy, graph: Graph, episodes: Episodes, held: Episodes, *, reward: Reward, iterations: int = 80, walks: int = 2048, rate: float = 2e-3
) -> None:
    """Proximal policy optimisation (Schulman et al., 2017, arXiv 1707.06347) on walks through the tables.

    Each walk is at a price of its own, drawn where the cost on `held` depends on it. Its advantage is half GAE, which compares with the value
    head, and half self-critical: what the walk earned above the greedy one of the same sample (BlockDrop: Wu et al., 2018,
    arXiv 1711.08393), each divided by its spread in the batch. The best state on `held` stays.
    Draws from torch's global generator. Raises ControlError where the policy has collapsed to a static one.
    """
    table, cost = reward.table(graph, episodes), graph.cost.float()
    optimiser = AdamW(policy.parameters(), lr=rate, weight_decay=0.1)

    def earned(way: Walk, rows: Tensor, price: Tensor) -> Tensor:
        return torch.where(way.alive, table[rows, way.node, way.action] - price * cost[way.node, way.action], 0.0)

    kept = deepcopy(policy.state_dict())
    highest, prices, bits = frontier(policy, graph, held, reward=reward)
    watch = Watch()
    watch.see(bits)
    for iteration in range(iterations):
        done = iteration / iterations
        optimiser.param_groups[0]["lr"] = rate * (1 - done)
        rows = torch.randperm(len(table))[:walks]
        between = torch.randint(len(prices) - 1, (len(rows),))
        signal, price = episodes.signal[rows], prices[between].lerp(prices[between + 1], torch.rand(len(rows)))
        seen, states, step, row = draw(policy, signal, price)
        paid = earned(seen, rows, price)
        gain = advantages(paid, seen.value, seen.alive)[step, row]
        else_ = walk(policy, signal[row], price[row], start=(states.node, states.spent))
        above = paid.flip(0).cumsum(0).flip(0)[step, row] - earned(else_, rows[row], price[row]).sum(0)
        mixed = CRITICAL * above / (above.std() + 1e-6) + (1 - CRITICAL) * (gain - gain.mean()) / (gain.std() + 1e-6)
        taken = seen.action[step, row], seen.log_p[step, row], mixed, gain + seen.value[step, row]
        improve(policy, optimiser, states, taken, entropy=ENTROPY[0] * (ENTROPY[1] / ENTROPY[0]) ** done)
        if iteration % 5 == 4:
            now, prices, bits = frontier(policy, graph, held, reward=reward)
            watch.see(bits, updates=5 * PASSES * PARTS)
            if now > highest:
                kept, highest = deepcopy(policy.state_dict()), now
    policy.load_state_dict(kept)


def fit_sequential(graph: Graph, episodes: Episodes, *, seed: int, reward: Reward = Reward()) -> SequentialPolicy:
    """Clone foresight, then improve by PPO, on four fifths of these rows; the last fifth says which state to keep.

    Budgets are set on that fifth too: call `set_prices` with rows that nothing was fitted on before a budget is promised. Raises ControlError
    on tables that are too small or do not fit the graph. Cost: about ten seconds for 5000 rows, 6 nodes and 32 features on one core.
    """
    rows, nodes = episodes.correct.shape
    if nodes != len(graph.after) or rows < FEWEST_ROWS:
        raise ControlError(
            f"a table of {rows} samples and {nodes} nodes",
            wanted=f"at least {FEWEST_ROWS} samples and the graph's {len(graph.after)} nodes",
            do="Measure every node of the graph on more data.",
        )
    first, *rest = folds(rows, 5, seed=seed)
    train, held = episodes.rows(torch.cat(rest)), episodes.rows(first)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = SequentialPolicy(graph, features=episodes.signal.shape[2])
        flat = train.signal.flatten(0, 1).float()
        policy.mean.copy_(flat.mean(0))
        policy.std.copy_(flat.std(0).clamp_min(1e-6))
        policy.dearest_price.fill_(price_range(graph, reward.table(graph, train)))
        behaviour_clone(policy, graph, train, reward=reward)
        fit_ppo(policy, graph, train, held, reward=reward)
    policy.set_prices(held)
    return policy.requires_grad_(False)
