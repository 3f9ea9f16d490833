"""The loop: it learns, it can be killed anywhere, it stops at what is not finite, and it averages as defined."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path as File

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from apportion.errors import TrainError
from apportion.methods import find
from apportion.train import Fitted, Images, Recipe, checkpoint, fit
from apportion.train import loop as loop_module
from apportion.train.progress import Reporter

torch.set_num_threads(1)
RECIPE = Recipe(epochs=2.5, batch=16, learning_rate=0.02, ema=0.9, crop_padding=1, flip=True, checkpoint_every_s=0.0)
SAMPLES, STEPS = 56, 9


class Killed(Exception):
    """Stands for a power cut: nothing in the library catches it."""


def toy() -> nn.Module:
    """With dropout, whose draws have to be the same after a resume."""
    torch.manual_seed(7)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16, 8), nn.LayerNorm(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


def data() -> Images:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 3, (SAMPLES,), generator=generator)
    images = torch.randn(SAMPLES, 3, 4, 4, generator=generator) * 0.3
    images[torch.arange(SAMPLES), labels] += 1.0
    return Images(images, labels)


def loss(network: nn.Module, inputs: Tensor, labels: Tensor | None, rng: random.Random) -> Tensor:
    assert labels is not None
    return F.cross_entropy(network(inputs), labels) * rng.uniform(0.5, 1.5)


def score(network: nn.Module) -> float:
    inputs, labels = data().batch(torch.arange(SAMPLES))
    assert labels is not None and not network.training
    with torch.no_grad():
        return (network(inputs).argmax(-1) == labels).float().mean().item()


def train(network: nn.Module, folder: File | None = None, *, objective: Callable[..., Tensor] = loss, recipe: Recipe = RECIPE, identity: str = "") -> Fitted:
    return fit(network, data(), objective, recipe=recipe, folder=folder, validate=score, progress=False, identity=identity)


def killed_after(calls: int, error: type[BaseException] = Killed) -> Callable[..., Tensor]:
    """The same objective, which raises in call number `calls`."""
    count = iter(range(calls + 1))

    def objective(network: nn.Module, inputs: Tensor, labels: Tensor | None, rng: random.Random) -> Tensor:
        value = loss(network, inputs, labels, rng)
        if next(count) == calls:
            raise error
        return value

    return objective


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.fixture(scope="module")
def uninterrupted() -> tuple[nn.Module, Fitted]:
    network = toy()
    return network, train(network)


def test_it_learns_and_says_so(uninterrupted: tuple[nn.Module, Fitted]):
    network, fitted = uninterrupted
    assert (fitted.steps, fitted.images) == (STEPS, STEPS * 16) and not network.training
    assert [mark.step for mark in fitted.history] == [4, 7, 9]  # the first steps at or past 56 and 112 samples, and the end
    assert fitted.history[-1].loss < fitted.history[0].loss
    long = toy()
    assert train(long, recipe=replace(RECIPE, epochs=20)).history[-1].score == score(long) > 0.9


@pytest.mark.parametrize("every_s", [0.0, 1e9])  # a checkpoint after each step; only the one that an interrupt writes
@pytest.mark.parametrize("step", [0, 1, 4, 6, 8])
def test_killed_and_resumed_equals_never_stopped(uninterrupted: tuple[nn.Module, Fitted], tmp_path: File, step: int, every_s: float):
    recipe, error = replace(RECIPE, checkpoint_every_s=every_s), KeyboardInterrupt if every_s else Killed
    with pytest.raises(error):
        train(toy(), tmp_path, objective=killed_after(step, error), recipe=recipe)
    torch.manual_seed(step + 99)  # whatever the global generator holds in the new process
    found = checkpoint.load(tmp_path)
    assert (found.step if found else 0) == step
    network = toy()
    fitted = train(network, tmp_path, recipe=recipe)
    assert same(network, uninterrupted[0])
    assert fitted.history == uninterrupted[1].history


def test_killed_twice_and_inside_a_save(uninterrupted: tuple[nn.Module, Fitted], tmp_path: File, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(Killed):
        train(toy(), tmp_path, objective=killed_after(3))
    for _ in range(2):  # the tensors are written, the manifest is not

        def cut(*args: object) -> None:
            raise Killed

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(checkpoint, "write_json", cut)
            train(toy(), tmp_path)
        assert (tmp_path / "step-00000004.safetensors").exists()
    found = checkpoint.load(tmp_path)
    assert found is not None and found.step == 3
    network = toy()
    train(network, tmp_path)
    assert same(network, uninterrupted[0])


def test_interrupted_while_validating_the_mark_is_made_after_all(uninterrupted: tuple[nn.Module, Fitted], tmp_path: File):
    def interrupted(network: nn.Module) -> float:
        raise KeyboardInterrupt

    recipe = replace(RECIPE, checkpoint_every_s=1e9)
    with pytest.raises(KeyboardInterrupt, match="goes on from"):
        fit(toy(), data(), loss, recipe=recipe, folder=tmp_path, validate=interrupted, progress=False)
    network = toy()
    assert train(network, tmp_path, recipe=recipe).history == uninterrupted[1].history
    assert same(network, uninterrupted[0])


def test_an_interrupt_between_weights_and_averages_writes_nothing(uninterrupted: tuple[nn.Module, Fitted], tmp_path: File, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*args: object) -> float:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Recipe, "decay", interrupted)
        train(toy(), tmp_path)
    assert checkpoint.load(tmp_path) is None
    network = toy()
    train(network, tmp_path)
    assert same(network, uninterrupted[0])


def test_a_finished_run_is_not_run_again(uninterrupted: tuple[nn.Module, Fitted], tmp_path: File):
    train(toy(), tmp_path)
    network = toy()
    fitted = train(network, tmp_path, objective=killed_after(0))
    assert fitted.history == uninterrupted[1].history and same(network, uninterrupted[0])


def test_validation_and_the_global_generator_change_nothing(uninterrupted: tuple[nn.Module, Fitted]):
    network = toy()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    fit(network, data(), loss, recipe=RECIPE, progress=False)
    assert same(network, uninterrupted[0]) and torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_what_is_not_finite_stops_with_the_last_good_state(tmp_path: File, poison: str):
    good: list[Tensor] = []

    def objective(network: nn.Module, inputs: Tensor, labels: Tensor | None, rng: random.Random) -> Tensor:
        value = loss(network, inputs, labels, rng)
        good.append(network.get_parameter("1.weight").detach().clone())
        if len(good) < 6:
            return value
        zero = value * 0
        return value / zero if poison == "loss" else value + zero.sqrt()  # the root's slope at 0 is infinite

    network, recipe = toy(), replace(RECIPE, checkpoint_every_s=1e9)
    with pytest.raises(TrainError, match=r"in step 5.*step-00000005\.safetensors"):
        train(network, tmp_path, objective=objective, recipe=recipe)
    found = checkpoint.load(tmp_path)
    assert found is not None and found.step == 5
    assert torch.equal(found.tensors["weight/1.weight"], good[5]) and torch.equal(network.get_parameter("1.weight"), good[5])
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_checkpoint_of_another_run_is_refused(tmp_path: File):
    train(toy(), tmp_path, identity="one")
    for network, recipe, identity in (
        (toy(), replace(RECIPE, learning_rate=0.01), "one"),
        (toy(), RECIPE, "two"),
        (nn.Sequential(nn.Flatten(), nn.Linear(48, 3)), RECIPE, "one"),
    ):
        with pytest.raises(TrainError, match="another run"):
            train(network, tmp_path, recipe=recipe, identity=identity)
    train(toy(), tmp_path, recipe=replace(RECIPE, checkpoint_every_s=5.0), identity="one")  # this changes no outcome


def test_updates_and_averages_are_those_of_the_definition():
    """Against a loop of ten lines with torch's own AdamW, on the whole data in each step."""
    recipe = Recipe(epochs=6, batch=SAMPLES, learning_rate=0.05, ema=0.5, crop_padding=0, clip=0.1, weight_decay=0.3)

    def plain(network: nn.Module, inputs: Tensor, labels: Tensor | None, rng: random.Random) -> Tensor:
        return network(inputs).square().mean()

    def small() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Flatten(), nn.Linear(48, 4), nn.LayerNorm(4), nn.Linear(4, 2))

    network, naive = small(), small()
    fitted = fit(network, data(), plain, recipe=recipe, progress=False)
    weights = dict(naive.named_parameters())
    decayed = {"1.weight", "3.weight"}
    groups = [
        {"params": [weights[n] for n in decayed], "weight_decay": 0.3},
        {"params": [w for n, w in weights.items() if n not in decayed], "weight_decay": 0.0},
    ]
    optimiser, averages = torch.optim.AdamW(groups), {name: weight.detach().clone() for name, weight in weights.items()}
    for step in range(6):
        optimiser.zero_grad()
        naive(data().batch(torch.arange(SAMPLES))[0]).square().mean().backward()
        nn.utils.clip_grad_norm_(naive.parameters(), 0.1)
        for group in optimiser.param_groups:
            group["lr"] = recipe.rate(step, 6)
        optimiser.step()
        decay = min(0.5, (1 + step) / (10 + step))
        averages = {name: decay * averages[name] + (1 - decay) * weights[name].detach() for name in weights}
    for name, average in averages.items():
        torch.testing.assert_close(network.get_parameter(name).detach(), average, rtol=1e-4, atol=1e-5)
        assert torch.equal(fitted.ema_state[name], network.get_parameter(name))
    assert not torch.allclose(averages["1.weight"], weights["1.weight"], atol=1e-3)  # the average is not the last weights


def test_decay_spares_all_but_matrices():
    named = [
        (name, nn.Parameter(torch.ones(shape))) for name, shape in (("a.weight", (2, 2)), ("norm.weight", (2,)), ("bias", (2,)), ("class_token", (1, 1, 2)))
    ]
    optimiser = find("optimiser", "adamw")(named, learning_rate=0.1, weight_decay=0.5)
    for _, parameter in named:
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    assert [bool((parameter == 1).all()) for _, parameter in named] == [False, True, True, True]


def test_bf16_only_when_asked():
    seen = set()

    def objective(network: nn.Module, inputs: Tensor, labels: Tensor | None, rng: random.Random) -> Tensor:
        out = network(inputs)
        seen.add(out.dtype)
        return out.float().square().mean()

    for dtype, wanted in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        seen.clear()
        network = toy()
        train(network, objective=objective, recipe=replace(RECIPE, epochs=0.5, dtype=dtype))
        assert seen == {wanted} and all(parameter.dtype == torch.float32 for parameter in network.parameters())


def test_nothing_to_train_is_an_error():
    with pytest.raises(TrainError, match="0 trainable"):
        train(toy().requires_grad_(False))


def test_frozen_parameters_stay(tmp_path: File):
    network, before = toy(), toy()
    network[1].requires_grad_(False)  # pyright: ignore[reportIndexIssue]
    train(network, tmp_path)
    assert torch.equal(network.get_parameter("1.weight"), before.get_parameter("1.weight"))
    found = checkpoint.load(tmp_path)
    assert found is not None and "weight/1.weight" not in found.tensors and "weight/5.weight" in found.tensors


@pytest.mark.parametrize("terminal", [True, False])
def test_reporter_speaks_where_it_is_wanted(terminal: bool):
    for wanted in (True, False):
        out = io.StringIO()
        with Reporter(steps=3, first=0, batch=4, wanted=wanted, console=Console(file=out, force_terminal=terminal, width=120)) as reporter:
            for step in (1, 2, 3):
                reporter.tell(step, 0.5)
        assert ("0.5000" in out.getvalue()) == wanted
        if wanted and not terminal:
            assert out.getvalue().count("\n") == 1 and "step 3/3" in out.getvalue()


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loop_module.Accelerator, "num_processes", property(lambda self: 2))
    with pytest.raises(TrainError, match="2 processes"):
        train(toy())
