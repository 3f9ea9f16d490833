"""Texts: look-ups by definition, and what padding is: nothing that an answer sees, on any path, however much of it there is."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from apportion.errors import PathError
from apportion.measure.macs import executed_macs
from apportion.methods import find, names
from apportion.network import Architecture, Network, put, sort_by_importance
from apportion.vocab import Choice
from tests.conftest import PLAN, assert_same_state, random_paths, shake, state_of

LENGTH, WORDS, PAD = 24, 50, 3
TEXTS: dict[str, dict] = {
    "bert": {"norm_first": False, "final_norm": False, "positions": 40, "token_types": 2, "head_hidden": "tanh"},
    "roberta": {"norm_first": False, "final_norm": False, "positions": 40, "position_offset": 4, "embedding": 16, "head_hidden": "gelu"},
    "sentence": {"class_token": False, "pool": "mean", "classes": 0, "head_unit": True, "positions": 24},
    "mpnet": {"norm_first": False, "final_norm": False, "positions": 40, "relative_buckets": 32},
    "modern": {
        "first_norm": False,
        "norm_bias": False,
        "gated": True,
        "ffn_bias": False,
        "qkv_bias": False,
        "proj_bias": False,
        "rotary": 1000.0,
        "rotary_local": 10.0,
        "window": 3,
        "global_every": 2,
        "head_hidden": "gelu",
        "head_hidden_norm": True,
    },
}
flavours = pytest.mark.parametrize("flavour", list(TEXTS))


def tiny(flavour: str, *choices: Choice) -> Network:
    torch.manual_seed(0)
    shape = {"image_size": 0, "patch": 0, "dim": 32, "depth": 4, "heads": 4, "hidden": 64, "classes": 5, "stem_norm": True}
    network = Network(Architecture(**{**shape, "words": WORDS, "length": LENGTH, "padding": PAD, **TEXTS[flavour]})).eval().requires_grad_(False)
    shake(network)
    for choice in choices:
        put(network, choice)
    return network


def ids(rows: int, n: int, *, seed: int = 0) -> torch.Tensor:
    drawn = torch.randint(0, WORDS - 1, (rows, n), generator=torch.Generator().manual_seed(seed))
    return drawn + (drawn >= PAD)


def padded(text: torch.Tensor, n: int) -> torch.Tensor:
    return torch.cat((text, torch.full((*text.shape[:-1], n - text.shape[-1]), PAD)), -1)


def plans(flavour: str) -> list[tuple[Choice, ...]]:
    """The plan with each reducer of the shelf that can stand in this network: a new one has to know padding as well."""
    found = [name for name in names("reducer") if find("reducer", name).reduces and (name != "evit" or TEXTS[flavour].get("class_token", True))]
    return [(Choice("reducer", name), *PLAN[1:]) for name in found]


def test_it_looks_up_adds_and_normalises():
    tokeniser = tiny("roberta").tokeniser
    text = padded(ids(2, 5), 8)
    tokens = tokeniser(text, 0)
    for row in range(2):
        for place in range(5):
            x = tokeniser.word.weight[text[row, place]] + tokeniser.position[4 + place]
            assert_close(tokens.x[row, place], tokeniser.project(tokeniser.norm(x)))
    assert tokens.x.shape == (2, 8, 32) and tokens.size.tolist() == [[1] * 5 + [0] * 3] * 2 and tokens.prefix == 1
    assert tokens.reduced and torch.equal(tokens.origin[:, :8], torch.arange(8).expand(2, 8))


def test_token_types_and_padding_that_stands_elsewhere():
    tokeniser = tiny("bert").tokeniser
    text, kinds = ids(2, 6), torch.tensor([[0, 0, 1, 1, 1, 0]]).expand(2, 6)
    plain, pair = tokeniser(text, 0), tokeniser(torch.stack((text, kinds), 1), 0)
    assert_close(pair.x[:, 0], plain.x[:, 0])
    assert not torch.allclose(pair.x[:, 2], plain.x[:, 2])
    apart = torch.stack((text[:, 0], torch.full((2,), PAD), *text[:, 1:].unbind(1)), 1)
    moved = tokeniser(apart, 0)
    assert_close(moved.x[:, :6], plain.x) and moved.origin[0, :7].tolist() == [0, 6, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("wrong", [ids(1, LENGTH + 1), ids(1, 0), ids(1, 4).int(), ids(1, 4).float(), ids(1, 9).view(1, 3, 3)])
def test_other_inputs_are_refused(wrong):
    tokeniser = tiny("bert").tokeniser
    before = state_of(tokeniser)
    with pytest.raises(PathError, match="1 to 24"):
        tokeniser(wrong, 0)
    with pytest.raises(PathError, match="patch"):
        tokeniser(ids(1, 4), 4)
    assert_same_state(before, state_of(tokeniser))
    with pytest.raises(PathError):
        tiny("roberta").tokeniser(ids(2, 8).view(2, 2, 4), 0)


@flavours
def test_an_answer_does_not_depend_on_padding_or_company(flavour):
    for plan in plans(flavour):
        network = tiny(flavour, *plan)
        texts = [ids(1, n, seed=n) for n in (1, 2, 3, 5, 8, 9, 13, 17, 24)]
        for path in random_paths(network, 5):
            alone = torch.cat([network(text, path) for text in texts])
            assert alone.isfinite().all()
            for rows in (3, 9):
                some = texts[:rows]
                for n in {some[-1].shape[1], min(some[-1].shape[1] + 5, LENGTH), LENGTH}:
                    together = network(torch.cat([padded(text, n) for text in some]), path)
                    assert_close(together, alone[:rows], rtol=1e-5, atol=1e-5, msg=lambda m, p=path, n=n: f"{p.name} at {n}: {m}")


@flavours
def test_that_law_catches_a_reducer_that_counts_padding(flavour, monkeypatch):
    plain = Network._fitted
    monkeypatch.setattr(Network, "_fitted", lambda self, *given: (*plain(self, *given)[:2], None))
    network = tiny(flavour, *PLAN)
    text, path = ids(1, 9), network.space.path(tokens=(16, 12, 12, 12))
    assert not torch.allclose(network(padded(text, 20), path), network(text, path), atol=1e-5)


@flavours
def test_a_row_of_padding_alone_is_harmless(flavour):
    network = tiny(flavour, *PLAN)
    text = torch.cat((padded(ids(1, 12), 20), torch.full((1, 20), PAD)))
    for path in random_paths(network, 3):
        assert_close(network(text, path)[:1], network(text[:1], path), rtol=1e-5, atol=1e-5)
        assert network(text, path).isfinite().all()


@flavours
def test_a_shorter_text_keeps_the_same_share(flavour):
    network = tiny(flavour, *PLAN)
    prefix, notes = network.space.prefix, {}
    path = network.space.path(tokens=(18, 12, 12, 7))
    network(ids(1, 13), path, notes)
    wanted = [prefix + -(-(keep - prefix) * (13 - prefix) // (LENGTH - prefix)) for keep in path.tokens]
    assert [x.shape[1] for x in notes["feature"]] == wanted
    assert all(size.sum() == 13 for size in notes["size"])


@flavours
def test_multiply_adds_are_those_that_run(flavour):
    for plan in plans(flavour):
        network = tiny(flavour, *plan)
        for path in random_paths(network, 6):
            ran, said = executed_macs(lambda path=path, network=network: network(ids(1, LENGTH), path)), network.macs(path)
            assert abs(said - ran) <= 0.001 * ran, f"{path.name}: {said} in closed form, {ran} executed"


@flavours
def test_sorting_heads_and_units_changes_nothing(flavour):
    network = tiny(flavour, *PLAN).double()
    text = padded(ids(3, 11), 14)
    before = network(text, network.space.full)
    heads = network(text, network.space.path(heads=2, width=16))
    sort_by_importance(network, [text])
    assert_close(network(text, network.space.full), before, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(network(text, network.space.path(heads=2, width=16)), heads)


@flavours
def test_pieces_make_the_whole_and_the_glance_does_not_see_padding(flavour):
    network = tiny(flavour, *PLAN)
    for path in random_paths(network, 3):
        text = padded(ids(2, 11), 15)
        start, last = network.tokeniser(text, 0), len(path.steps)
        for cut in range(1, last):
            state = network.segment(0, cut, path)(start)
            assert torch.equal(network.segment(cut, last, path)(state), network(text, path))
    glance = network.glance(1)
    assert_close(glance(padded(ids(2, 11), 20))[1], glance(ids(2, 11))[1], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("flavour", "backend"), [("bert", "inductor"), ("modern", "eager")])
def test_it_is_one_graph_that_gives_the_same(flavour, backend):
    network = tiny(flavour, *PLAN)
    path = network.space.path(tokens=(18, 12, 12, 7))
    text = padded(ids(2, 11), 15)
    torch.compiler.reset()
    compiled = torch.compile(network.at(path), fullgraph=True, backend=backend, dynamic=False)
    assert_close(compiled(text), network(text, path), rtol=1e-4, atol=1e-5)
