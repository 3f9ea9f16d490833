"""The laws of the house on whole networks. Each is a check, held by every network here, and shown to catch a fault that is planted."""

from __future__ import annotations

import ast
import copy
import itertools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path as File

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import apportion.methods
from apportion.errors import ApportionError, NoEffect, PathError, PlanError
from apportion.measure.macs import executed_macs
from apportion.methods import SLOTS, find, names, ops
from apportion.network import Network, put, sort_by_importance
from apportion.network.model import Block
from apportion.vocab import Choice, Path, Space
from tests.conftest import DEPTH, DIM, FLAVOURS, PLAN, assert_same_state, images, naive, random_paths, reducers, shake, state_of, tiny

SHELF, TESTS = File(apportion.methods.__file__).parent, File(__file__).parent / "methods"
flavours = pytest.mark.parametrize("flavour", list(FLAVOURS))
caught = pytest.raises(AssertionError)


def replaced(choice: Choice) -> tuple[Choice, ...]:
    """The plan with the method of one slot exchanged."""
    return tuple(choice if old.slot == choice.slot else old for old in PLAN)


# 1. Exact at full.


def check_exact_at_full(network: Network, choices: Sequence[Choice], inputs: Tensor, definition: Callable[[Network, Tensor], Tensor] = naive) -> None:
    wanted = definition(network, inputs)
    assert_close(network(inputs, network.space.full), wanted, rtol=1e-9, atol=1e-9, msg="the network is not what its weights say")
    for choice in choices:
        put(network, choice)
        assert_close(network(inputs, network.space.full), wanted, rtol=1e-9, atol=1e-9, msg=lambda text, name=choice.name: f"{name} is not exact: {text}")
    sort_by_importance(network, [inputs])
    assert_close(network(inputs, network.space.full), wanted, rtol=1e-9, atol=1e-9, msg=lambda text: f"sorting is not exact: {text}")


def exact_choices(flavour: str) -> list[Choice]:
    """Every method on the shelf that says of itself that it is exact and can be put into a network of this flavour, one after another."""
    found = []
    for slot in ("reducer", "ffn", "mixer", "adapter", "depth", "residual"):
        for name in reducers(flavour) if slot == "reducer" else names(slot):
            method = find(slot, name)
            if method.card.exact and "from_dense" in dir(method) and not (slot == "residual" and FLAVOURS[flavour].get("layer_scale")) and name != "every":
                found.append(Choice(slot, name))
    return found


@flavours
def test_exact_at_full(flavour):
    network = tiny(flavour).double()
    check_exact_at_full(network, exact_choices(flavour), images(3, dtype=torch.float64))


@pytest.mark.parametrize("fault", ["scale", "order", "rescaled"])
def test_exact_at_full_catches(fault, monkeypatch):
    network = tiny("layer_scale").double()
    if fault == "scale":
        monkeypatch.setattr(find("residual", "layerscale"), "forward", lambda self, x, branch: x + branch)
    elif fault == "order":
        monkeypatch.setattr(find("ffn", "dense"), "permute", lambda self, order: self.down.permute(inp=order))
    else:
        monkeypatch.setattr(find("ffn", "matformer"), "forward", lambda self, x, width, notes=None, size=None: 1.001 * self.part(x, width))
    with caught:
        check_exact_at_full(network, PLAN, images(3, dtype=torch.float64))


# 2. A path is an argument.


def check_path_is_an_argument(network: Network, paths: Sequence[Path], inputs: Tensor) -> None:
    alone = [copy.deepcopy(network)(inputs, path) for path in paths]
    before = state_of(network)
    for index in (*range(len(paths)), *reversed(range(len(paths)))):
        assert torch.equal(network(inputs, paths[index]), alone[index]), f"{paths[index].name} depends on the path before it"
    assert_same_state(before, state_of(network))


@flavours
def test_a_path_is_an_argument(flavour):
    network = tiny(flavour, *PLAN)
    check_path_is_an_argument(network, random_paths(network, 4), images(2))


@pytest.mark.parametrize("fault", ["attribute", "memory"])
def test_a_path_is_an_argument_catches(fault, monkeypatch):
    dense, seen = find("ffn", "dense"), []
    plain = dense.forward

    def attribute(self, x, width, notes=None, size=None):
        self.last = width
        return plain(self, x, width)

    def memory(self, x, width, notes=None, size=None):
        seen.append(width)
        return plain(self, x, seen[-2] if len(seen) > 1 else width)

    monkeypatch.setattr(dense, "forward", {"attribute": attribute, "memory": memory}[fault])
    network = tiny("class_token", *PLAN)
    with caught:
        check_path_is_an_argument(network, random_paths(network, 4), images(2))


# 3. One form.


def check_one_form(network: Network, paths: Sequence[Path], inputs: Tensor) -> None:
    """What training runs (written out) is what serving runs (fused), and has the gradient of the fused form."""
    network = copy.deepcopy(network).requires_grad_(True)
    for path in paths:
        with torch.no_grad():
            served = network(inputs, path)
        assert_close(network(inputs, path).detach(), served, rtol=1e-4, atol=1e-5)


def check_one_gradient(bias: Tensor | None) -> None:
    given = [part.requires_grad_() for part in torch.randn(3, 2, 4, 9, 8, generator=torch.Generator().manual_seed(0)).unbind(0)]
    along = torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((ops.attend(*given, bias) * along).sum(), given)
    fused = torch.autograd.grad((F.scaled_dot_product_attention(*given, attn_mask=bias) * along).sum(), given)
    for a, b in zip(ours, fused, strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-5)


@flavours
def test_one_form(flavour):
    network = tiny(flavour, *PLAN)
    check_one_form(network, random_paths(network, 3), images(2))


@pytest.mark.parametrize("bias", [None, torch.tensor([1.0, 2, 1, 3, 1, 1, 5, 1, 1]).log().view(1, 1, 1, 9)])
def test_one_gradient(bias):
    check_one_gradient(bias)


def test_one_form_catches(monkeypatch):
    def unscaled(query, key, value, bias=None):
        if query.requires_grad:
            return (query @ key.transpose(-1, -2)).softmax(-1) @ value
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)

    network = tiny("class_token", *PLAN)
    paths = random_paths(network, 2)
    monkeypatch.setattr(ops, "attend", unscaled)
    with caught:
        check_one_form(network, paths, images(2))
    with caught:
        check_one_gradient(None)


# 4. Alone as in company.


def check_alone_as_in_company(network: Network, paths: Sequence[Path], inputs: Tensor) -> None:
    noise = 30 * images(len(inputs), seed=7)
    for path in paths:
        together = network(inputs, path)
        alone = torch.cat([network(one[None], path) for one in inputs])
        turned = network(inputs.flip(0), path).flip(0)
        padded = network(torch.cat((noise, inputs, torch.zeros_like(inputs))), path)[len(inputs) : 2 * len(inputs)]
        for other in (alone, turned, padded):
            assert_close(other, together, rtol=1e-3, atol=1e-4, msg=lambda text, path=path: f"{path.name}: {text}")


@flavours
def test_alone_as_in_company(flavour):
    for name in reducers(flavour):
        network = tiny(flavour, *replaced(Choice("reducer", name)))
        check_alone_as_in_company(network, random_paths(network, 4), images(3))


@pytest.mark.parametrize("fault", ["merging", "norm"])
def test_alone_as_in_company_catches(fault, monkeypatch):
    tome = find("reducer", "tome")
    plain = tome.forward
    if fault == "merging":
        monkeypatch.setattr(
            tome, "forward", lambda self, tokens, keep, mixed, notes=None: plain(self, tokens, keep, mixed._replace(key=mixed.key - mixed.key.mean(0)))
        )
    else:
        monkeypatch.setattr(find("norm", "layernorm"), "forward", lambda self, x: (x - x.mean()) / x.std())
    network = tiny("class_token", *PLAN)
    with caught:
        check_alone_as_in_company(network, random_paths(network, 4), images(3))


# 5. Nothing silent.


def check_refused(error: type[ApportionError], call: Callable[[], object]) -> None:
    """The call raises this error, and the error says what was found, what was wanted and what to do."""
    try:
        call()
    except error as refusal:
        assert refusal.found and str(refusal).count(". ") >= 1
    else:
        raise AssertionError(f"nothing was raised where {error.__name__} was due")


def wrong_paths(network: Network) -> dict[str, Callable[[], Path]]:
    """Paths that a network cannot take, built by hand past the space's own check."""
    full, n = network.space.full, network.space.tokens

    def changed(**axes):
        return lambda: Path(**{**full.to_dict(), **axes})

    return {
        "patch": changed(patch=full.patch + 1),
        "block": changed(blocks=(0, 1, 2, DEPTH)),
        "heads": changed(heads=(5,) * DEPTH),
        "width": changed(width=(7,) * DEPTH),
        "more tokens": changed(tokens=(n + 1,) * DEPTH),
        "too few tokens": changed(tokens=(2,) * DEPTH),
        "tokens that come back": changed(tokens=(n, n - 2, n, n)),
        "lengths": changed(width=full.width[:-1]),
    }


@pytest.mark.parametrize("which", list(wrong_paths(tiny())))
@pytest.mark.parametrize("choices", [(), PLAN], ids=["dense", "adapted"])
def test_a_path_that_cannot_be_taken_is_refused(which, choices):
    network = tiny("class_token", *choices)
    build = wrong_paths(network)[which]
    check_refused(PathError, lambda: network(images(1), build()))
    check_refused(PathError, lambda: network.at(build()))
    check_refused(PathError, lambda: network.segment(0, 1, build()))


@pytest.mark.parametrize("axis", ["tokens", "heads", "width", "blocks"])
def test_a_dense_network_offers_no_smaller_path(axis):
    smaller = {"tokens": 15, "heads": 2, "width": 32, "blocks": (0, 1)}
    check_refused(PathError, lambda: tiny().space.path(**{axis: smaller[axis]}))
    tiny("class_token", *PLAN).space.path(**{axis: smaller[axis]})


REFUSALS: dict[str, tuple[type[ApportionError], Choice]] = {
    "put twice": (NoEffect, PLAN[1]),
    "put twice on the network": (NoEffect, PLAN[3]),
    "unknown method": (PlanError, Choice("reducer", "tomes")),
    "unknown slot": (PlanError, Choice("reduce", "tome")),
    "unknown option": (PlanError, Choice("reducer", "evit", options={"rate": 2})),
    "an option that is the network's own": (PlanError, Choice("reducer", "evit", options={"channels": 2})),
    "unknown block": (PlanError, Choice("reducer", "evit", blocks=(DEPTH,))),
    "negative block": (PlanError, Choice("residual", "layerscale", blocks=(-1,))),
    "blocks of what the network has once": (PlanError, Choice("depth", "first", blocks=(1,))),
    "a part that a network is built with": (PlanError, Choice("ffn", "dense")),
    "a slot that is fixed": (PlanError, Choice("head", "mean")),
}


@pytest.mark.parametrize("which", list(REFUSALS))
def test_a_choice_that_makes_no_sense_is_refused(which):
    network = tiny("class_token", *PLAN)
    error, choice = REFUSALS[which]
    before = state_of(network)
    check_refused(error, lambda: put(network, choice))
    assert_same_state(before, state_of(network))


@pytest.mark.parametrize("fault", ["check", "reducer", "put"])
def test_nothing_silent_catches(fault, monkeypatch):
    if fault == "check":
        monkeypatch.setattr(Space, "check", lambda self, path: None)
        with caught:
            check_refused(PathError, lambda: tiny().at(wrong_paths(tiny())["width"]()))
    elif fault == "reducer":
        monkeypatch.setattr(Space, "check", lambda self, path: None)
        monkeypatch.setattr(find("reducer", "keep_all"), "forward", lambda self, tokens, keep, mixed, notes=None: tokens)
        with caught:
            check_refused(PathError, lambda: tiny()(images(1), Path(4, (0, 1), (15, 12), (4, 4), (64, 64))))
    else:
        monkeypatch.setattr(find("depth", "skip"), "__new__", lambda cls: find("depth", "first")())
        network = tiny("class_token", PLAN[3])
        with caught:
            check_refused(NoEffect, lambda: put(network, PLAN[3]))


# 6. Graphs are counted.


def check_graphs_counted(network: Network, paths: Sequence[Path], inputs: Tensor) -> None:
    """Every path is one whole graph, built once: a second call, and another path in between, build none."""
    graphs = 0

    def count(graph, example):
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch.compiler.reset()
    compiled = [torch.compile(network.at(path), fullgraph=True, backend=count, dynamic=False, isolate_recompiles=True) for path in paths]
    for _ in range(2):
        for path, call in zip(paths, compiled, strict=True):
            try:
                out = call(inputs)
            except RuntimeError as error:
                raise AssertionError(f"{path.name} is not one graph") from error
            assert_close(out, network(inputs, path), rtol=1e-4, atol=1e-5)
        assert graphs == len(paths), f"{graphs} graphs for {len(paths)} paths"


@pytest.mark.parametrize("count", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_graphs_are_counted(count):
    network = tiny("class_token", *PLAN)
    check_graphs_counted(network, random_paths(network, count), images(2))


@pytest.mark.parametrize("fault", ["break", "branch on data", pytest.param("rebuilt", marks=pytest.mark.slow)])
def test_graphs_are_counted_catches(fault, monkeypatch):
    plain = Block.forward

    def broken(self, tokens, step, notes=None):
        torch._dynamo.graph_break()
        return plain(self, tokens, step, notes)

    def branching(self, tokens, step, notes=None):
        return plain(self, tokens, step, notes) if tokens.x.sum() > 0 else tokens

    def rebuilt(self, tokens, step, notes=None):
        self.calls = getattr(self, "calls", 0) + 1
        return plain(self, tokens._replace(x=tokens.x + 0 * self.calls), step, notes)

    monkeypatch.setattr(Block, "forward", {"break": broken, "branch on data": branching, "rebuilt": rebuilt}[fault])
    network = tiny("class_token", *PLAN)
    with caught:
        check_graphs_counted(network, random_paths(network, 2), images(2))


# 7. One method, one file, one test.


def check_one_file_one_test(shelf: File, tests: File) -> None:
    found = [file for slot in shelf.iterdir() if slot.is_dir() for file in slot.glob("*.py") if file.stem != "__init__"]
    assert found, f"nothing lies in {shelf}"
    for file in found:
        name = f"{file.parent.name}/{file.stem}"
        test = tests / file.parent.name / f"test_{file.stem}.py"
        assert test.is_file() and "def test_" in test.read_text(), f"{name} has no test at {test}"
        tree = ast.parse(file.read_text())
        assert any(isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "METHOD" for node in tree.body), f"{name} names no METHOD"
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names]
            else:
                continue
            for module in modules:
                lower = ("apportion.vocab.", "apportion.errors.", "apportion.methods.slots.", "apportion.methods.task.")
                allowed = module.startswith(lower) or module in ("apportion.methods.kernels", "apportion.methods.ops")
                assert allowed or not module.startswith(("apportion", ".")), f"{name} imports {module}"


def test_one_method_one_file_one_test():
    check_one_file_one_test(SHELF, TESTS)


@pytest.mark.parametrize("fault", ["no test", "an empty test", "another method", "find", "relative", "no METHOD"])
def test_one_method_one_file_one_test_catches(fault, tmp_path):
    shelf, tests = tmp_path / "shelf", tmp_path / "tests"
    shutil.copytree(SHELF, shelf, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(TESTS, tests, ignore=shutil.ignore_patterns("__pycache__"))
    check_one_file_one_test(shelf, tests)
    method, test = shelf / "reducer" / "evit.py", tests / "reducer" / "test_evit.py"
    lines = {
        "another method": "from apportion.methods.reducer.tome import ToMe",
        "find": "from apportion.methods import find",
        "relative": "from .tome import ToMe",
    }
    if fault == "no test":
        test.unlink()
    elif fault == "an empty test":
        test.write_text("")
    elif fault == "no METHOD":
        method.write_text(method.read_text().replace("METHOD =", "method ="))
    else:
        method.write_text(method.read_text().replace("import torch\n", f"import torch\n{lines[fault]}\n", 1))
    with caught:
        check_one_file_one_test(shelf, tests)


def test_a_file_is_found_by_its_place_alone():
    on_disk = {(file.parent.name, file.stem) for file in SHELF.glob("*/*.py") if file.stem != "__init__"}
    assert on_disk == {(slot, name) for slot in SLOTS for name in names(slot)}


# 8. Every number: multiply-adds in closed form are those that run.


def check_macs(network: Network, paths: Sequence[Path], inputs: Tensor) -> None:
    for path in paths:
        ran, said = executed_macs(lambda path=path: network(inputs, path)), network.macs(path)
        assert abs(said - ran) <= 0.001 * ran, f"{path.name}: {said} in closed form, {ran} executed"


@flavours
def test_multiply_adds_are_those_that_run(flavour):
    for name in reducers(flavour):
        network = tiny(flavour, *replaced(Choice("reducer", name)))
        check_macs(network, random_paths(network, 8), images(1))


@flavours
def test_multiply_adds_of_the_parts_are_those_of_the_whole(flavour):
    network = tiny(flavour, *PLAN)
    for path in random_paths(network, 4):
        cuts = [0, *sorted({1, len(path.steps)})]
        parts = sum(network.segment_macs(first, last, path) for first, last in itertools.pairwise(cuts))
        assert network.tokeniser.macs(path.patch) + parts == network.macs(path)
    glance = network.glance(1)
    first = network.tokeniser.macs(4) + network.blocks[0].macs(network.space.tokens, network.space.full.steps[0], network.space.prefix)
    assert executed_macs(lambda: glance(images(1))) == first + glance.macs()


@pytest.mark.parametrize("fault", ["attention", "reducer", "head", "tokens"])
def test_multiply_adds_catches(fault, monkeypatch):
    attention, tome, pool = find("mixer", "attention"), find("reducer", "tome"), find("head", "attention_pool")
    if fault == "attention":
        monkeypatch.setattr(attention, "macs", lambda self, tokens, heads: 4 * tokens * DIM * heads * self.channels)
    elif fault == "reducer":
        monkeypatch.setattr(tome, "macs", lambda self, before, keep, prefix, heads: 0)
    elif fault == "head":
        monkeypatch.setattr(pool, "macs", lambda self, tokens, prefix: self._macs)
    else:
        plain = attention.macs
        monkeypatch.setattr(attention, "macs", lambda self, tokens, heads: plain(self, tokens - 1, heads))
    network = tiny("attention_pool", *PLAN)
    with caught:
        check_macs(network, random_paths(network, 8), images(1))


def test_shaking_shows_what_a_fresh_network_hides():
    """Why the checks above mean something: at their initial values a dropped bias would not be seen."""
    part: nn.Module = nn.Linear(3, 3)
    before = [parameter.clone() for parameter in part.parameters()]
    shake(part)
    assert all(not torch.equal(old, new) for old, new in zip(before, part.parameters(), strict=True))
