"""A perceiver from data alone: taught, its settings chosen among, served, and whole on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path as File

import pytest
import torch

from apportion import load, verbs
from apportion.control import candidates
from apportion.deliver.bundle import save
from apportion.errors import BundleError, PlanError
from apportion.network import Architecture, Perceiver
from apportion.train import Recipe
from apportion.vocab import Choice, Plan

torch.set_num_threads(1)
SHAPE = Architecture(image_size=16, patch=4, dim=32, depth=3, heads=2, hidden=64, classes=1)
RECIPE = Recipe(epochs=4, batch=32, learning_rate=3e-3, crop_padding=0, flip=False)
PLAN = replace(verbs.with_method(Plan(rungs=4, tolerance=5.0, never_slower=False), "perceiver"), seed=0)


@pytest.fixture(scope="module")
def taught() -> tuple:
    return verbs.scratch("digits", recipe=RECIPE, architecture=SHAPE, perceiver=True)


@pytest.mark.slow
def test_the_whole_way(taught, tmp_path: File) -> None:
    network, feed, parts = taught
    assert isinstance(network, Perceiver) and network.shape.latents == (1, 2, 4, 8)
    every = candidates(network.space, 0)
    assert len(every) == len(set(every)) == 4 * len(network.space.width) * 3 and every[-1] == network.space.full
    assert {path.blocks for path in candidates(network.space, 2)} == {(0, 1), (0, 1, 2)} and {path.tokens[0] for path in candidates(network.space, 2)} == {8}
    before = {name: value.clone() for name, value in network.state_dict().items()}
    weighed = verbs.adapt(network, parts, plan=PLAN, preprocess=feed, out=tmp_path / "bundle", backend="eager", buckets=(1, 8), repeats=2)
    assert all(torch.equal(value, before[name]) for name, value in weighed.adapted.bundle.network.state_dict().items())  # the order of units was taught
    assert weighed.figures["accuracy_dense"] > 0.6 and weighed.figures["drop_points"]["points"] < 8 and weighed.figures["gmacs_saved_share"] > 0.2
    again = load(tmp_path / "bundle", backend="eager", buckets=(1, 8))
    inputs, _ = next(parts.report.batches(20, feed))
    assert isinstance(again.bundle.network, Perceiver) and again.bundle.network.shape == network.shape
    ours, theirs = again(inputs), weighed.adapted(inputs)
    assert torch.equal(ours.path, theirs.path) and torch.allclose(ours.logits, theirs.logits, atol=1e-6)
    assert weighed.figures["served"]["same_path"] == 1


def test_what_does_not_fit_is_refused(taught, tmp_path: File) -> None:
    network, feed, parts = taught
    with pytest.raises(PlanError, match="methods"):
        verbs.prepare(network, parts, feed, Plan(), folder=None, tell=print)
    with pytest.raises(PlanError, match="epochs"):
        verbs.prepare(network, parts, feed, replace(PLAN, epochs=1.0), folder=None, tell=print)
    assert PLAN.choices == () and Choice("depth", "skip") in Plan().choices
    with pytest.raises(PlanError, match="classes of pictures"):
        verbs.perceiver_of(SHAPE, "regression")


@pytest.mark.slow
def test_another_encoder_beside_it_is_an_altered_bundle(taught, tmp_path: File) -> None:
    network, feed, parts = taught
    adapted = verbs.adapt(network, parts, plan=PLAN, preprocess=feed, backend="eager", buckets=(1,), repeats=1).adapted
    bundle = adapted.bundle
    made = Perceiver(replace(network.shape, latents=(1, 2, 4, 9)))
    save(replace(bundle, network=made), tmp_path / "other")
    with pytest.raises(BundleError, match="tokens"):
        load(tmp_path / "other", backend="eager")
