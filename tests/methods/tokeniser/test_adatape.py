"""Tape tokens: the reads by definition, with loops; when a sample stops; that places not read are nothing; and what a tape lets a network learn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from apportion.errors import PlanError
from apportion.measure.macs import executed_macs
from apportion.methods.tokeniser.adatape import AdaTape, Rows, extended
from apportion.methods.tokeniser.patch import PatchTokeniser
from apportion.network import Architecture, Network, put
from apportion.vocab import Choice, Step, Tokens
from tests.conftest import DIM, HEADS, HIDDEN, PLAN, assert_same_state, images, random_paths, rows, shake, state_of, tiny
from tests.methods.tokeniser.test_word import ids, padded
from tests.methods.tokeniser.test_word import tiny as text_network

KEY = 8


def second(patch: int) -> PatchTokeniser:
    shape = {"image_size": 16, "channels": 3, "patch": patch, "dim": DIM, "class_token": False, "registers": 0, "position_prefix": False, "bias": True}
    return PatchTokeniser(**shape, stem="patch", norm=nn.Identity())


def taped(part, bank, *, bank_patch: int = 0, rows: int, reads: int = 10, among: int = 5, threshold: float = 2.0):
    torch.manual_seed(1)
    facts = {"dim": DIM, "key": KEY, "hidden": 16}
    tape = AdaTape(part=part, bank=bank, bank_patch=bank_patch, rows=rows, reads=reads, among=among, threshold=threshold, **facts)
    return shake(tape).requires_grad_(False)


def learned(flavour: str = "class_token", *, rows: int = 60, **numbers) -> AdaTape:
    """With a bank whose rows differ enough that some samples stop early and some late."""
    tape = taped(tiny(flavour).tokeniser, Rows(rows, DIM), rows=rows, **numbers)
    tape.norm.weight.mul_(4)
    return tape


def answer(network: Network, tokens: Tokens) -> Tensor:
    """The rest of the network, on as many tokens as there are."""
    a = network.architecture
    n = a.tokens if a.words else tokens.x.shape[1]  # of a text a path states the share
    return network.finish(network.run(tokens, tuple(Step(block, n, a.heads, a.hidden) for block in range(a.depth)), before=n))


@pytest.mark.parametrize("flavour", ["registers", "mean"])
@pytest.mark.parametrize(("reads", "among", "threshold"), [(10, 5, 2.0), (4, 1, 2.5), (6, 3, 0.1), (3, 7, 9.0)])
def test_it_is_the_definition(flavour, reads, among, threshold):
    tape, inputs = learned(flavour, reads=reads, among=among, threshold=threshold), images(5)
    out, tokens = tape.read(inputs, 4), tape.part(inputs, 4)
    bank = tape.norm(tape.bank.rows[0])
    n = tokens.x.shape[1]
    for sample in range(5):
        query = tape.norm(tokens.x[sample, tokens.prefix :].mean(0))[:KEY]
        free, summed, doubt, place = list(range(60)), 0.0, 0.0, 0
        while summed < threshold and place < reads:
            best = sorted(free, key=lambda row, query=query: -float(bank[row, :KEY] @ query))[:among]
            weight = (bank[best, :KEY] @ query / KEY**0.5).softmax(0)
            read = weight @ bank[best]
            assert out.rows[sample, place].tolist() == best
            value = tape.down(F.gelu(tape.gate(read)) * tape.up(read))
            assert_close(out.tokens.x[sample, n + place], value, rtol=1e-3, atol=1e-3)
            free, query = [row for row in free if row not in best], (query + read[:KEY]) / 2
            summed, doubt, place = summed + float(weight[0]), doubt + 1 - float(weight.square().sum()), place + 1
        assert out.reads[sample] == place and out.tokens.size[sample].tolist() == [1] * (n + place) + [0] * (reads - place)
        assert float(out.doubt[sample]) == pytest.approx(doubt, abs=1e-5) and (out.rows[sample, place:] == -1).all()
    assert torch.equal(out.tokens.x[:, :n], tokens.x) and out.tokens.reduced


def test_no_row_is_read_twice_and_samples_differ_in_how_many_they_read():
    out = learned().read(images(16), 4)
    for row in out.rows:
        used = row[row >= 0].tolist()
        assert len(used) == len(set(used))
    assert len(out.reads.unique()) > 1 and out.reads.min() >= 2


def constructed(score: Tensor, *, reads: int = 10, among: int = 5, threshold: float = 2.0) -> int:
    """Reads of a sample for which the rows of the bank score like this at first."""
    n, numbers = len(score), {"reads": reads, "among": among, "threshold": threshold}
    tape = AdaTape(part=tiny().tokeniser, bank=Rows(n, DIM), bank_patch=0, rows=n, dim=DIM, key=1, hidden=4, **numbers)
    tape.norm = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    with torch.no_grad():
        tape.part.get_parameter("project.bias").zero_()
        tape.bank.get_parameter("rows")[0, :, 0] = score
        tape.part.get_parameter("position").fill_(1.0)
        return int(tape.read(torch.zeros(1, 3, 16, 16), 4).reads)


def test_one_row_that_stands_out_at_each_read_stops_at_two_and_equal_ones_at_the_last():
    assert constructed(torch.tensor([2.0**k for k in range(30)]) * 50) == 2
    assert constructed(torch.zeros(60)) == 10
    assert constructed(torch.zeros(60), threshold=1e-9) == 1


def test_a_higher_threshold_never_reads_less():
    found = torch.stack([learned(threshold=threshold).read(images(12), 4).reads for threshold in (1e-6, 0.5, 1.0, 1.5, 2.0, 4.0)])
    assert (found[0] == 1).all() and (found.diff(dim=0) >= 0).all() and (found[-1] > found[0]).all()


@pytest.mark.parametrize("flavour", ["class_token", "mean", "attention_pool"])
def test_places_that_are_not_read_are_nothing(flavour):
    """Whatever stands there, and as if they were cut away; with no tape at all the network is the network."""
    network = tiny(flavour)
    tape = taped(network.tokeniser, Rows(60, DIM), rows=60)
    tape.norm.weight.mul_(4)
    out = tape.read(images(8), 4)
    tokens, logits = out.tokens, answer(network, out.tokens)
    noisy = tokens._replace(x=torch.where(tokens.size[..., None] > 0, tokens.x, 9 * torch.randn(tokens.x.shape)))
    assert_close(answer(network, noisy), logits, rtol=1e-5, atol=1e-5)
    for sample in range(8):
        n = network.space.tokens + int(out.reads[sample])
        alone = Tokens(tokens.x[sample : sample + 1, :n], tokens.size[sample : sample + 1, :n], tokens.origin[sample : sample + 1], tokens.prefix)
        assert_close(answer(network, alone), logits[sample : sample + 1], rtol=1e-4, atol=1e-5)
    plain = tape.part(images(8), 4)
    dense = network(images(8), network.space.full)
    assert_close(answer(network, extended(plain, torch.randn(8, 3, DIM), torch.zeros(8, 3))), dense, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits, dense, atol=1e-2)


def test_a_sample_does_not_depend_on_its_batch_and_nothing_is_written():
    tape, inputs = learned(), images(6)
    before, together = state_of(tape), tape.read(inputs, 4)
    for order in ([3, 0, 5], [2], [1, 1, 4]):
        apart = tape.read(inputs[order], 4)
        assert torch.equal(apart.rows, together.rows[order]) and torch.equal(apart.reads, together.reads[order])
        for ours, theirs in zip(apart.tokens[:3], rows(together.tokens, order)[:3], strict=True):
            assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert_same_state(before, state_of(tape))
    assert torch.equal(tape(inputs, 4).x, together.tokens.x)


def test_a_bank_can_come_from_the_input():
    tape = taped(tiny().tokeniser, second(2), bank_patch=2, rows=64)
    one, two = tape.read(images(3), 4), tape.read(images(3, seed=1), 4)
    assert one.rows.max() < 64 and not torch.equal(one.rows, two.rows)
    assert executed_macs(lambda: tape(images(1), 4)) == tape.macs(4) and executed_macs(lambda: learned()(images(1), 4)) == learned().macs(4)


def test_behind_a_text_the_tape_comes_before_the_padding_and_answers_do_not_depend_on_it():
    network = text_network("sentence")
    tape = taped(network.tokeniser, Rows(60, DIM), rows=60)
    tape.norm.weight.mul_(4)
    text = ids(3, 9)
    short, long = tape.read(text, 0), tape.read(padded(text, 20), 0)
    assert torch.equal(short.reads, long.reads) and torch.equal(short.rows, long.rows)
    assert (long.tokens.size.diff(dim=1) <= 0).all() and long.tokens.origin.shape == (3, 20 + 10 + 1)
    assert_close(long.tokens.x[:, : 9 + 2], short.tokens.x[:, : 9 + 2])
    for sample in range(3):
        assert torch.equal(long.tokens.origin[sample, :9], torch.arange(9))
        assert long.tokens.origin[sample, 20 : 20 + int(long.reads[sample])].tolist() == list(range(9, 9 + int(long.reads[sample])))
    assert_close(answer(network, long.tokens), answer(network, short.tokens), rtol=1e-4, atol=1e-5)


MOST, STEPS = 16, 600


class Whole(nn.Module):
    """A string of bits (b, MOST), -1 behind its end, as one token."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(2 * MOST, DIM)

    def forward(self, inputs: Tensor, patch: int) -> Tokens:
        x = self.project(torch.cat((inputs == 0, inputs == 1), 1).float())[:, None]
        return Tokens(x, torch.ones(len(x), 1), torch.zeros(len(x), 1, dtype=torch.int64), 0)

    def macs(self, patch: int) -> int:
        return 2 * MOST * DIM


class Bits(nn.Module):
    """The same as a bank: a row for each bit."""

    def __init__(self) -> None:
        super().__init__()
        self.bit = nn.Embedding(2, DIM)

    def forward(self, inputs: Tensor, patch: int) -> Tokens:
        return Tokens(self.bit(inputs.clamp_min(0)), (inputs >= 0).float(), torch.arange(MOST).expand(len(inputs), -1), 0)

    def macs(self, patch: int) -> int:
        return 0


def strings(rows: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Bits of 2 to MOST, and whether an odd number of them is 1."""
    n = torch.randint(2, MOST + 1, (rows, 1), generator=draw)
    bits = torch.where(torch.arange(MOST) < n, torch.randint(0, 2, (rows, MOST), generator=draw), -1)
    return bits, (bits == 1).sum(1) % 2


def test_a_bank_that_is_used_up_ends_the_tape():
    tape = taped(Whole(), Bits(), rows=MOST, reads=MOST, among=1, threshold=99.0)
    bits, _ = strings(40, torch.Generator().manual_seed(0))
    out = tape.read(bits, 0)
    assert torch.equal(out.reads, (bits >= 0).sum(1)) and (out.doubt == 0).all() and out.tokens.x.isfinite().all()
    nothing = tape.read(torch.full((2, MOST), -1), 0)
    assert (nothing.reads == 0).all() and nothing.tokens.x.isfinite().all() and nothing.tokens.size.tolist() == [[1] + [0] * MOST] * 2
    several = taped(Whole(), Bits(), rows=MOST, reads=MOST, among=5, threshold=99.0).read(bits, 0)
    assert torch.equal(several.reads, -(-(bits >= 0).sum(1) // 5))


@pytest.mark.parametrize("wrong", [{"reads": 0}, {"among": 0}, {"among": 61}, {"threshold": 0.0}, {"threshold": float("nan")}])
def test_numbers_that_make_no_tape_are_refused(wrong):
    with pytest.raises(PlanError):
        learned(**wrong)


PAIRS, WORDS = 16, 8


class Asked(nn.Module):
    """A key (b, 1 + 2 * PAIRS)[:, 0], as one token; keys and values of all pairs come behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Embedding(PAIRS, DIM)

    def forward(self, inputs: Tensor, patch: int) -> Tokens:
        return Tokens(self.key(inputs[:, :1]), torch.ones(len(inputs), 1), torch.zeros(len(inputs), 1, dtype=torch.int64), 0)

    def macs(self, patch: int) -> int:
        return 0


class Pairs(nn.Module):
    """A bank with a row for each pair."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.value = nn.Embedding(PAIRS, DIM), nn.Embedding(WORDS, DIM)

    def forward(self, inputs: Tensor, patch: int) -> Tokens:
        x = self.key(inputs[:, 1 : 1 + PAIRS]) + self.value(inputs[:, 1 + PAIRS :])
        return Tokens(x, torch.ones(x.shape[:2]), torch.arange(PAIRS).expand(len(x), -1), 0)

    def macs(self, patch: int) -> int:
        return 0


def questions(rows: int, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, the row of the bank that is asked for, and the value that stands there."""
    keys = torch.rand(rows, PAIRS, generator=draw).argsort(1)
    values, place = torch.randint(0, WORDS, (rows, PAIRS), generator=draw), torch.randint(0, PAIRS, (rows, 1), generator=draw)
    return torch.cat((keys.gather(1, place), keys, values), 1), place[:, 0], values.gather(1, place)[:, 0]


@pytest.mark.slow
def test_it_learns_which_row_to_read_and_to_stop_when_it_has_read_it():
    torch.manual_seed(0)
    shape = {"image_size": 16, "patch": 4, "dim": DIM, "depth": 1, "heads": HEADS, "hidden": HIDDEN, "classes": WORDS, "class_token": False, "pool": "mean"}
    network, draw = Network(Architecture(**shape)), torch.Generator().manual_seed(1)
    tape = AdaTape(part=Asked(), bank=Pairs(), bank_patch=0, rows=PAIRS, dim=DIM, key=16, reads=4, among=4, threshold=0.9, hidden=DIM)
    optimiser = torch.optim.AdamW([*network.parameters(), *tape.parameters()], lr=3e-3)
    told = tape.read(questions(500, draw)[0], 0).reads.float().mean()
    for _ in range(STEPS):
        inputs, _, value = questions(64, draw)
        read = tape.read(inputs, 0)
        loss = F.cross_entropy(answer(network, read.tokens), value) + 0.01 * read.doubt.mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(tape.parameters(), 1.0)
        optimiser.step()
    inputs, place, value = questions(1000, draw)
    with torch.no_grad():
        read = tape.read(inputs, 0)
        right = float((answer(network, read.tokens).argmax(-1) == value).float().mean())
        blank = read.tokens._replace(size=read.tokens.size * (torch.arange(5) < 1))
        without = float((answer(network, blank).argmax(-1) == value).float().mean())
    first, after = float((read.rows[:, 0, 0] == place).float().mean()), float(read.reads.float().mean())
    assert right >= 0.95 and without <= 0.25 and first >= 0.95 and after <= float(told) - 0.5, (right, without, first, float(told), after)


def taped_network(*choices: Choice, flavour: str = "class_token") -> Network:
    torch.manual_seed(2)
    network = Network(replace(tiny(flavour).architecture, tape=6, tape_rows=40, tape_key=KEY)).eval()
    shake(network)
    network.tokeniser.norm.weight.data.mul_(2.5)
    for choice in choices:
        put(network, choice)
    return network.requires_grad_(False)


@pytest.mark.parametrize("flavour", ["registers", "mean"])
def test_a_network_with_a_tape_answers_as_one_that_has_only_what_was_read(flavour):
    network, inputs = taped_network(flavour=flavour), images(8)
    whole, tape = network(inputs, network.space.full), network.tokeniser.read(inputs, 4)
    assert network.space.tokens == tape.tokens.x.shape[1] == tiny(flavour).space.tokens + 6 and len(tape.reads.unique()) > 1
    for sample in range(8):
        n = network.space.tokens - 6 + int(tape.reads[sample])
        assert (tape.tokens.size[sample, :n] > 0).all()
        read = Tokens(tape.tokens.x[sample : sample + 1, :n], torch.ones(1, n), torch.arange(n)[None], network.space.prefix)
        assert_close(answer(network, read)[0], whole[sample], rtol=1e-4, atol=1e-4)
        assert_close(network(inputs[sample : sample + 1], network.space.full)[0], whole[sample], rtol=1e-4, atol=1e-4)


def test_its_multiply_adds_are_those_that_run_along_every_path():
    network = taped_network(*PLAN)
    for path in random_paths(network, 5):
        assert executed_macs(lambda path=path: network(images(1), path)) == network.macs(path)
    assert network.macs(network.space.full) > tiny().macs(tiny().space.full)


def test_without_a_tape_nothing_is_built_and_where_places_are_numbers_it_is_refused():
    assert not tiny().architecture.tape and isinstance(tiny().tokeniser, PatchTokeniser)
    for more in ({"rotary": 100.0}, {"relative_buckets": 52}, {"grey_level": 0.2}):
        with pytest.raises(PlanError, match="tape"):
            Network(replace(tiny().architecture, tape=6, tape_rows=40, **more))
