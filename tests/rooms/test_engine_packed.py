"""Packed texts: every answer as alone, hardly any padding, and nothing that could mix texts let in."""

from __future__ import annotations

import random
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from apportion.engine.packed import Packs, pack
from apportion.engine.table import plain
from apportion.errors import EngineError, PathError
from apportion.network import Architecture, Network, put
from apportion.network.model import Block
from apportion.network.packed import Packed
from apportion.vocab import Choice
from tests.conftest import shake

PAD, WORDS, LENGTH, SLOTS = 1, 30, 16, 4
BERT = {"norm_first": False, "final_norm": False, "stem_norm": True, "positions": 20, "position_offset": 2, "token_types": 2}
FLAVOURS: dict[str, dict[str, Any]] = {
    "bert": {**BERT, "pool": "class_token"},
    "mean": {**BERT, "class_token": False, "pool": "mean"},
    "rotary, windows": {"rotary": 1e4, "rotary_local": 1e2, "window": 2, "global_every": 2, "first_norm": False, "gated": True},
    "bias by distance": {"relative_buckets": 8, "embedding": 4, "positions": 16},
    "inner norms": {**BERT, "mixer_norm": True, "ffn_norm": True},
}


def made(flavour: str = "bert", *choices: Choice) -> Network:
    torch.manual_seed(0)
    a = Architecture(image_size=0, patch=0, dim=16, depth=3, heads=4, hidden=32, classes=3, words=WORDS, length=LENGTH, padding=PAD, **FLAVOURS[flavour])
    network = Network(a).eval().requires_grad_(False)
    shake(network)
    for choice in choices:
        put(network, choice)
    return network


def texts(sizes: list[int], *, pairs: bool = False, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(2, WORDS, (n,), generator=generator) for n in sizes]
    return [torch.stack((row, (torch.arange(len(row)) > 2).long())) for row in rows] if pairs else rows


def batch(rows: list[Tensor], width: int = LENGTH) -> Tensor:
    inputs = torch.zeros(len(rows), *rows[0].shape[:-1], width, dtype=torch.int64)
    (inputs if inputs.ndim == 2 else inputs[:, 0]).fill_(PAD)
    for row, text in zip(inputs, rows, strict=True):
        row[..., : text.shape[-1]] = text
    return inputs


def packs(module: torch.nn.Module, *, pairs: bool = False, backend: Any = "eager", make: Any = plain, slots: int = SLOTS) -> Packs:
    found = Packs(module, length=LENGTH, slots=slots, padding=PAD, pairs=pairs, buckets=(1, 4), backend=backend, make=make)
    assert found.warm() == found.wanted == 2
    return found


SIZES = [1, 16, 3, 7, 2, 9, 5, 1, 12, 4, 4]


@pytest.mark.parametrize("flavour, pairs", [*product(FLAVOURS, (False,)), ("bert", True)])
@torch.no_grad()
def test_every_text_is_answered_as_alone(flavour: str, pairs: bool) -> None:
    network, rows = made(flavour), texts(SIZES, pairs=pairs)
    full = network.space.full
    alone = torch.cat([network(row[None], full) for row in rows])
    engine = packs(Packed(network, full, slots=SLOTS), pairs=pairs)
    torch.testing.assert_close(engine(batch(rows)), alone, rtol=0, atol=1e-5)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1)).tolist()
    torch.testing.assert_close(engine(batch([rows[k] for k in order], 20)), alone[order], rtol=0, atol=1e-5)
    assert engine.traffic.total() == 2


@torch.no_grad()
def test_narrower_and_shorter_paths_are_packed_and_a_path_goes_on_where_it_was_cut() -> None:
    network, rows = made("bert", Choice("ffn", "matformer"), Choice("mixer", "head_prefix"), Choice("depth", "skip")), texts(SIZES)
    space = network.space
    path = space.path(blocks=(0, 2), heads=(4, 2), width=(16, 32))
    alone = torch.cat([network(row[None], path) for row in rows])
    torch.testing.assert_close(packs(Packed(network, path, slots=SLOTS))(batch(rows)), alone, rtol=0, atol=1e-5)
    given, text = torch.randint(2, WORDS, (3, LENGTH)), torch.tensor([0] * 5 + [1] * 9 + [SLOTS] * 2).expand(3, -1)
    half, rest = Packed(network, path, slots=SLOTS, last=1), Packed(network, path, slots=SLOTS, first=1)
    torch.testing.assert_close(rest(half(given, text), text), Packed(network, path, slots=SLOTS)(given, text), rtol=0, atol=1e-6)


@torch.no_grad()
def test_the_law_catches_texts_that_see_each_other() -> None:
    network, rows = made(), texts(SIZES)
    module = Packed(network, network.space.full, slots=SLOTS)
    for block in module.blocks:
        assert isinstance(block, Block)
        block.mixer.forward = lambda tokens, heads, notes=None, own=block.mixer.forward: own(tokens._replace(size=torch.ones_like(tokens.size)), heads, notes)
    alone = torch.cat([network(row[None], network.space.full) for row in rows])
    assert (packs(module)(batch(rows)) - alone).abs().max() > 1e-3


@torch.no_grad()
def test_padding_within_a_text_and_a_text_of_nothing_are_read_as_the_tokeniser_does() -> None:
    network = made()
    inputs = torch.tensor([[5, PAD, 6, 7, PAD, 8, PAD, PAD], [PAD] * 8, [9, 8, 7, 6, 5, 4, 3, 2]])
    alone = torch.cat([network(row[None], network.space.full) for row in inputs])
    torch.testing.assert_close(packs(Packed(network, network.space.full, slots=SLOTS))(inputs), alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_static_graphs_answer_as_the_module_does_and_refuse_other_forms() -> None:
    from apportion.engine import build

    network, rows = made(), texts(SIZES)
    module = Packed(network, network.space.full, slots=SLOTS)
    engine = packs(module, make=build)
    torch.testing.assert_close(engine(batch(rows)), packs(module)(batch(rows)), rtol=0, atol=1e-6)
    with pytest.raises(EngineError, match="inputs of shape"):
        engine(batch(texts([3], pairs=True)))
    with pytest.raises(EngineError, match="17 tokens"):
        engine(batch(texts([17]), 17))
    with pytest.raises(EngineError, match="no text"):
        engine(batch(rows)[:0])


def test_rows_hold_every_text_once_and_few_rows_do() -> None:
    draw = random.Random(0)
    for slots in (1, 3, 50):
        sizes = [draw.randint(1, 20) for _ in range(50)]
        rows = pack(sizes, length=20, slots=slots)
        assert sorted(text for row in rows for text in row) == list(range(50))
        assert all(sum(sizes[text] for text in row) <= 20 and len(row) <= slots for row in rows)
        fewest = max(-(-sum(sizes) // 20), -(-50 // slots))
        assert len(rows) <= (50 if slots == 1 else 11 / 9 * fewest + 1)
    assert pack([], length=4, slots=1) == [] and pack([2, 4, 2], length=4, slots=2) == [[1], [0, 2]]
    for sizes in ([0], [5]):
        with pytest.raises(EngineError, match="texts of"):
            pack(sizes, length=4, slots=2)


def test_the_tokens_that_run_are_counted() -> None:
    network, rows = made(), texts(SIZES)
    engine = packs(Packed(network, network.space.full, slots=SLOTS))
    calls: list[int] = []
    engine._table._graphs = {key: _counted(graph, calls) for key, graph in engine._table._graphs.items()}
    engine(batch(rows))
    assert engine.tokens_run(batch(rows)) == sum(calls) < len(SIZES) * LENGTH and sum(calls) >= sum(SIZES)


def _counted(graph: Any, calls: list[int]) -> Any:
    def run(given: Tensor, text: Tensor) -> Tensor:
        calls.append(given.numel())
        return graph(given, text)

    return run


def test_what_could_mix_texts_or_drops_tokens_is_refused() -> None:
    network = made("bert", Choice("reducer", "tome"))
    with pytest.raises(PathError, match="takes tokens away"):
        Packed(network, network.space.path(tokens=(16, 12, 12)), slots=2)
    for choice, name in ((Choice("mixer", "disentangled"), "Disentangled"), (Choice("ffn", "switch"), "Switch")):
        mixing = made("mean", choice)
        with pytest.raises(PathError, match=name):
            Packed(mixing, mixing.space.full, slots=2)
    for wrong in ({"slots": 0}, {"slots": 2, "first": 3}, {"slots": 2, "last": 4}):
        with pytest.raises(PathError, match="steps"):
            Packed(network, network.space.full, **wrong)
