"""How much compute an input needs, by gradient-boosted trees: grown by LightGBM, deployed as plain tensors without it."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from apportion.control.complexity import REACH
from apportion.control.labels import check_table, folds
from apportion.control.ordinal import cheapest, cumulative, running_maximum
from apportion.errors import ControlError
from apportion.vocab import Outcomes

DEPTH = 3  # comparisons from root to leaf
ROUNDS = 80  # trees for each rung at most
PATIENCE = 10
GROW = {"learning_rate": 0.1, "max_depth": DEPTH, "num_leaves": 2**DEPTH, "min_data_in_leaf": 20, "lambda_l2": 1.0}
SAME = {"deterministic": True, "force_row_wise": True, "num_threads": 1, "boost_from_average": False, "use_missing": False, "verbosity": -1}


class Trees(nn.Module):
    """The chance that each rung answers correctly, from the signal of the glance: for each rung a sum of trees.

    The interface is that of `Complexity`, which it replaces where the signal is a few dozen statistics of different scales and thresholds
    matter more than directions. Every tree is stored as a perfect one: node i has children 2 i + 1 and 2 i + 2, and a node that LightGBM
    did not grow compares with infinity, so that all samples take `depth` steps and the walk is one static graph.
    Source: gradient boosting after Friedman (2001), grown by LightGBM (Ke et al., 2017).

    Shapes: signal (b, f) -> (b, k). Cost: for each tree `depth` comparisons and one addition. A sample's answer depends on that sample alone.
    When not to use: signals of hundreds of features that matter by their direction, where the head is better; NaN, which always goes right.
    """

    mean: Tensor
    std: Tensor
    base: Tensor
    feature: Tensor
    threshold: Tensor
    leaf: Tensor
    temperature: Tensor
    shift: Tensor

    def __init__(self, *, features: int, rungs: int, trees: int = ROUNDS, depth: int = DEPTH) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))
        self.register_buffer("base", torch.zeros(rungs))
        self.register_buffer("feature", torch.zeros(rungs, trees, 2**depth - 1, dtype=torch.int64))
        self.register_buffer("threshold", torch.full((rungs, trees, 2**depth - 1), torch.inf))
        self.register_buffer("leaf", torch.zeros(rungs, trees, 2**depth))
        self.register_buffer("temperature", torch.ones(()))
        self.register_buffer("shift", torch.zeros(rungs))

    @property
    def depth(self) -> int:
        return self.leaf.shape[2].bit_length() - 1

    @property
    def macs(self) -> int:
        """Comparisons and additions per sample, each counted as one multiply-add; no matrix product, so no counter of FLOPs sees them."""
        rungs, trees, _ = self.leaf.shape
        return rungs * trees * (self.depth + 1)

    def config(self) -> dict[str, int]:
        """The sizes that the constructor wants, to load a state into."""
        rungs, trees, _ = self.leaf.shape
        return {"features": len(self.mean), "rungs": rungs, "trees": trees, "depth": self.depth}

    def standardise(self, signal: Tensor) -> Tensor:
        """Zero mean and unit variance on the rows it was fitted on, without outliers."""
        return ((signal.float() - self.mean) / self.std).clamp(-REACH, REACH)

    def logits(self, standard: Tensor) -> Tensor:
        """Before calibration, from a standardised signal."""
        rungs, trees, nodes = self.threshold.shape
        feature, threshold = self.feature.flatten(), self.threshold.flatten()
        tree = torch.arange(rungs * trees, device=standard.device)
        node = torch.zeros(len(standard), rungs * trees, dtype=torch.int64, device=standard.device)
        for _ in range(self.depth):
            at = tree * nodes + node
            node = 2 * node + 1 + (standard.gather(1, feature[at]) > threshold[at]).long()
        value = self.leaf.flatten()[tree * (nodes + 1) + node - nodes]
        # In double precision the order of the sum, which may vary with the size of the batch, is not seen after rounding.
        return self.base + value.unflatten(1, (rungs, trees)).double().sum(2).float()

    def forward(self, signal: Tensor) -> Tensor:
        """Calibrated chance that each rung is right, (b, k)."""
        return torch.sigmoid(self.logits(self.standardise(signal)) / self.temperature + self.shift)

    def sufficient(self, signal: Tensor) -> Tensor:
        """Chance that some rung up to each one is right: the running maximum, non-decreasing along the ladder, (b, k)."""
        return running_maximum(self(signal))

    def rung(self, signal: Tensor, *, share: float = 0.95) -> Tensor:
        """The cheapest rung that reaches this share of the best chance: the complexity class that is reported, (b,)."""
        return cheapest(self.sufficient(signal), share=share)


def fit_trees(outcomes: Outcomes, *, seed: int, under_weight: float = 1.0, ordinal: bool = False) -> Trees:
    """Grow a booster for each rung on these rows, stopping early on a fifth of them; the result is not calibrated yet.

    A rung that fails where the full path is right weighs `under_weight` times: once calibrated, 3 lost up to 0.002 nats and 5
    0.002 to 0.012 on planted tables, and neither won accuracy at equal cost beyond noise, hence 1. With `ordinal` the targets are the cumulative form of the
    stable-correct label (a rung counts only if every dearer one is right too) instead of the rung's own answer; measured no better.
    Raises ControlError on a table nothing can be learned from, and where LightGBM is missing. Cost: 0.5 s for 5000 rows, 30 features and 4 rungs on one core.
    """
    lightgbm = _lightgbm()
    check_table(outcomes)
    held, *rest = folds(len(outcomes.signal), 5, seed=seed)
    train = torch.cat(rest)
    target = cumulative(outcomes.quality).float() if ordinal else outcomes.quality
    weight = 1.0 + (under_weight - 1.0) * (outcomes.quality[:, -1:] - target).clamp_min(0)
    signal = outcomes.signal.float()
    model = Trees(features=signal.shape[1], rungs=target.shape[1], trees=0)
    model.mean.copy_(signal[train].mean(0))
    model.std.copy_(signal[train].std(0).clamp_min(1e-6))
    standard = model.standardise(signal).numpy()
    right = (weight * target)[train].sum(0)
    model.base.copy_(torch.logit((right + 1) / (weight[train].sum(0) + 2)))
    grown = [
        _grow(lightgbm, standard, target[:, k].numpy(), weight[:, k].numpy(), base=model.base[k].item(), train=train.numpy(), held=held.numpy(), seed=seed)
        for k in range(target.shape[1])
    ]
    return _planted(model, grown)


def _lightgbm() -> ModuleType:
    try:
        import lightgbm
    except ImportError as error:
        raise ControlError("no LightGBM", wanted="the extra `trees`", do="Install it with pip install 'apportion[trees]', or use the head.") from error
    return lightgbm


def _grow(
    lightgbm: ModuleType, standard: np.ndarray, target: np.ndarray, weight: np.ndarray, *, base: float, train: np.ndarray, held: np.ndarray, seed: int
) -> list[dict[str, Any]]:
    """The trees of one rung up to the best round, as LightGBM tells them; none where all answers are alike."""
    if target[train].min() == target[train].max():
        return []

    def part(rows: np.ndarray, reference: Any = None) -> Any:
        start = np.full(len(rows), base)
        return lightgbm.Dataset(standard[rows].astype(np.float64), target[rows].astype(np.float64), weight=weight[rows], init_score=start, reference=reference)

    first = part(train)
    stop = lightgbm.early_stopping(PATIENCE, verbose=False)
    objective = "binary" if set(np.unique(target)) <= {0.0, 1.0} else "cross_entropy"
    booster = lightgbm.train({"objective": objective, **GROW, **SAME, "seed": seed}, first, ROUNDS, valid_sets=[part(held, first)], callbacks=[stop])
    return [tree["tree_structure"] for tree in booster.dump_model(num_iteration=booster.best_iteration)["tree_info"]]


def _planted(model: Trees, grown: list[list[dict[str, Any]]]) -> Trees:
    """The same model with these trees; rungs that stopped early are filled up with trees of zeros."""
    planted = Trees(features=len(model.mean), rungs=len(grown), trees=max(map(len, grown)))
    for name in ("mean", "std", "base"):
        planted.get_buffer(name).copy_(model.get_buffer(name))
    for rung, trees in enumerate(grown):
        for number, tree in enumerate(trees):
            _unfold(tree, 0, planted.feature[rung, number], planted.threshold[rung, number], planted.leaf[rung, number])
    return planted.eval()


def _unfold(node: Mapping[str, Any], at: int, feature: Tensor, threshold: Tensor, leaf: Tensor) -> None:
    """Write a subtree to place `at` of a perfect tree; what stopped above the last level says the same on both sides."""
    if at >= len(feature):
        leaf[at - len(feature)] = node["leaf_value"]
        return
    split = "threshold" in node
    if split:
        feature[at], threshold[at] = node["split_feature"], _single(node["threshold"])
    for side, child in enumerate(("left_child", "right_child")):
        _unfold(node[child] if split else node, 2 * at + 1 + side, feature, threshold, leaf)


def _single(threshold: float) -> float:
    """The largest number of single precision that is not above: whatever is compared in single precision falls on the same side."""
    near = np.float32(threshold)
    # As Python floats: numpy would round the threshold before it compares.
    return float(np.nextafter(near, np.float32(-np.inf)) if float(near) > threshold else near)
