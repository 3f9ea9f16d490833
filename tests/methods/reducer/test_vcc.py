"""Compression in segments against the definition, with loops; what the VIPs look for stays fine, and every token comes back moved as its segment was."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from apportion.errors import PlanError
from apportion.methods.reducer.vcc import VCC, decompressed
from apportion.methods.slots import Mixed
from apportion.network import Architecture, Network
from apportion.vocab import Choice, Step, Tokens
from tests.conftest import DIM, HEADS, HIDDEN, fitted, images, mixed_of, tiny, tokens_of

C = DIM // HEADS


def sized(n: int, *, prefix: int = 1) -> Tokens:
    """Tokens of which some stand for two or three."""
    tokens = tokens_of(3, n, prefix=prefix)
    size = torch.cat((torch.ones(3, prefix), 1 + torch.arange(n - prefix).expand(3, -1) % 3), 1)
    return tokens._replace(size=size, origin=torch.stack([torch.arange(n).repeat_interleave(size[0].long())] * 3))


@pytest.mark.parametrize("prefix", [0, 1, 4])
@pytest.mark.parametrize(("left", "segment", "removed"), [(20, 4, 1), (21, 4, 7), (20, 4, 15), (18, 5, 9), (17, 16, 10), (3, 4, 2)])
def test_it_is_the_definition(prefix, left, segment, removed):
    tokens = sized(left + prefix, prefix=prefix)
    mixed = mixed_of(tokens)
    out = VCC(C, segment)(tokens, left + prefix - removed, mixed)
    for sample in range(3):
        size, score = tokens.size[sample], [0.0] * -(-left // segment)
        for query, key in zip(mixed.query[sample], mixed.key[sample], strict=True):
            for vip in query[:prefix] if prefix else [(query * size[:, None]).sum(0) / size.sum()]:
                weight = size * (key @ vip / C**0.5).exp()
                for token in range(left):
                    score[token // segment] += float(weight[prefix + token] / weight.sum())
        into, more = list(range(left)), removed
        for chosen in sorted(range(len(score)), key=lambda place, score=score: score[place]):
            for token in range(chosen * segment + 1, min(left, (chosen + 1) * segment)):
                if more:
                    into[token], more = chosen * segment, more - 1
        for place, first in enumerate(sorted(set(into)), start=prefix):
            members = [prefix + token for token in range(left) if into[token] == first]
            assert_close(out.x[sample, place], (tokens.x[sample, members] * size[members, None]).sum(0) / size[members].sum(), rtol=1e-4, atol=1e-5)
            assert out.size[sample, place] == size[members].sum() and (out.origin[sample] == place).sum() == size[members].sum()
        assert prefix + len(set(into)) == out.x.shape[1]


def cut(tokens: Tokens, mixed: Mixed, n: int) -> tuple[Tokens, Mixed]:
    """The first n tokens as if no others were there."""
    short = Tokens(tokens.x[:1, :n], tokens.size[:1, :n], torch.cat((torch.arange(n), torch.tensor([n - 1])))[None], tokens.prefix)
    return short, Mixed(mixed.out[:1, :n], mixed.query[:1, :, :n], mixed.key[:1, :, :n])


@pytest.mark.parametrize("n", [1, 2, 3, 6, 14, 21])
def test_padding_changes_nothing(n):
    """A row of n tokens in a batch that is longer, with whatever in the places behind, keeps what it keeps alone."""
    tokens, vcc = tokens_of(1, 21), VCC(C, 4)
    mixed = mixed_of(tokens)
    padded = tokens._replace(size=(torch.arange(21) < n)[None].float(), origin=torch.cat((torch.arange(21).clamp_max(n - 1), torch.tensor([n - 1])))[None])
    for real in range(n - (n - 1) // 2, n + 1):
        short, own = cut(tokens, mixed, n)
        alone = vcc(short, real, own, real=torch.tensor([real]))
        for keep in (real, 21):
            together = vcc(padded, keep, mixed, real=torch.tensor([real]))
            assert_close(together.x[:, :real], alone.x, rtol=1e-5, atol=1e-6)
            assert torch.equal(together.size[:, :real], alone.size) and (together.size[:, real:] == 0).all()
            assert torch.equal(together.origin[:, :n], alone.origin[:, :n])


def step(keep: int, block: int = 0) -> Step:
    return Step(block, keep, HEADS, HIDDEN)


def compressed_layer(network: Network, tokens: Tokens, keep: int, *, index: int = 0, segment: int = 4, mixed: Mixed | None = None) -> tuple[Tokens, Tokens]:
    """VCC's layer: chosen by the block's own queries and keys, then the ordinary block on what is left. What went into the block and what came out."""
    block = network.blocks[index]
    mixed = block.mixer(tokens._replace(x=block.norm1(tokens.x)), HEADS) if mixed is None else mixed
    compressed = VCC(network.blocks[0].mixer.channels, segment)(tokens, keep, mixed)
    return compressed, block(compressed, step(keep, index))


@pytest.mark.parametrize("keep", [17, 13, 9, 5])
def test_where_the_members_of_each_segment_are_the_same_nothing_is_lost(keep):
    network = tiny().double()
    tokens = tokens_of(2, 17)
    x = torch.cat((tokens.x[:, :1], tokens.x[:, 1::4].repeat_interleave(4, 1)), 1).double()
    tokens = tokens._replace(x=x, size=tokens.size.double())
    compressed, after = compressed_layer(network, tokens, keep)
    assert_close(decompressed(tokens, compressed, after).x, network.blocks[0](tokens, step(17)).x, rtol=0, atol=1e-9)


def test_every_token_moves_as_its_segment_did_and_fine_ones_are_what_the_block_made_of_them():
    network, tokens = tiny().double(), tokens_of(2, 17)
    start = now = tokens._replace(x=tokens.x.double(), size=tokens.size.double())
    for index in range(3):
        compressed, after = compressed_layer(network, now, 10, index=index)
        new = decompressed(now, compressed, after)
        for sample in range(2):
            for place in range(10):
                members = compressed.origin[sample] == place
                assert_close(new.x[sample, members].mean(0), after.x[sample, place], rtol=0, atol=1e-9)
                apart = now.x[sample, members] - compressed.x[sample, place]
                assert_close(new.x[sample, members] - after.x[sample, place], apart, rtol=0, atol=1e-9)
        now = new
    assert not torch.allclose(now.x, start.x, atol=0.1)


def test_when_everything_stays_the_layer_is_the_layer():
    network, tokens = tiny(), tokens_of(2, 17)
    compressed, after = compressed_layer(network, tokens, 17)
    assert torch.equal(decompressed(tokens, compressed, after).x, network.blocks[0](tokens, step(17)).x)


def test_what_is_compressed_twice_comes_back_by_two_steps():
    tokens, vcc = sized(21), VCC(C, 4)
    once = vcc(tokens, 14, mixed_of(tokens))
    twice = vcc(once, 9, mixed_of(once, seed=4))
    shift = torch.randn(twice.x.shape, generator=torch.Generator().manual_seed(8))
    back = decompressed(tokens, once, decompressed(once, twice, twice._replace(x=twice.x + shift)))
    for sample in range(3):
        place = twice.origin[sample][[int((tokens.origin[sample] == token).nonzero()[0]) for token in range(21)]]
        assert_close(back.x[sample] - tokens.x[sample], shift[sample, place], rtol=1e-4, atol=1e-5)


def test_on_compressed_tokens_a_layer_costs_what_is_left_and_the_choice_is_linear():
    block, vcc = tiny().blocks[0], VCC(C, 16)
    assert [vcc.macs(n, n // 2, 1, HEADS) for n in (1024, 4096, 16384)] == [n * DIM for n in (1024, 4096, 16384)]
    assert vcc.macs(64, 32, 0, HEADS) == 64 * DIM and vcc.macs(64, 32, 4, HEADS) == 4 * 64 * DIM and vcc.macs(64, 64, 1, HEADS) == 0
    left = {n: 1 + 2 * 16 + (n // 16 - 2) for n in (1024, 2048, 4096)}  # two fine segments
    linear = {n: block.ffn.macs(left[n], HIDDEN) for n in left}
    assert linear[4096] - linear[2048] == 2048 // 16 * block.ffn.macs(1, HIDDEN) == 2 * (linear[2048] - linear[1024])


def test_short_segments_are_refused():
    with pytest.raises(PlanError, match="at least 3"):
        tiny("class_token", Choice("reducer", "vcc", options={"segment": 2}))
    assert fitted("reducer", "vcc")[0].segment == 4


def test_a_network_without_a_class_token_takes_it():
    network = tiny("mean", Choice("reducer", "vcc")).requires_grad_(False)
    assert network(images(2), network.space.path(tokens=(16, 12, 9, 9))).isfinite().all()


KINDS, NOISE, SEGMENT, LENGTH = 8, 40, 16, 1025


def texts(rows: int, n: int, *, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A class token's id, then noise and somewhere in it one word that matters: ids (rows, n), where it stands, and which it is."""
    draw = torch.Generator().manual_seed(seed)
    text = torch.randint(1 + KINDS + 1, 1 + KINDS + 1 + NOISE, (rows, n), generator=draw)
    where, kind = torch.randint(1, n, (rows,), generator=draw), torch.randint(0, KINDS, (rows,), generator=draw)
    text[:, 0], text[torch.arange(rows), where] = 1, 2 + kind
    return text, where, kind


def taught(steps: int = 250) -> Network:
    torch.manual_seed(0)
    shape = {"image_size": 0, "patch": 0, "dim": 32, "depth": 1, "heads": 4, "hidden": 64, "classes": KINDS}
    network = Network(Architecture(**shape, words=2 + KINDS + NOISE, length=LENGTH, padding=0))
    optimiser = torch.optim.AdamW(network.parameters(), lr=5e-3, weight_decay=0.01)
    for number in range(steps):
        text, _, kind = texts(32, 65, seed=number)
        loss = F.cross_entropy(network(text, network.space.full), kind)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return network.requires_grad_(False)


def read(network: Network, text: Tensor, fine: int, *, blind: bool = False) -> tuple[Tensor, Tensor]:
    """Answers with `fine` segments left fine, and where each source went; `blind` chooses them at random."""
    tokens, block = network.tokeniser(text, 0), network.blocks[0]
    mixed = block.mixer(tokens._replace(x=block.norm1(tokens.x)), HEADS)
    if blind:
        mixed = mixed._replace(query=torch.randn(mixed.query.shape, generator=torch.Generator().manual_seed(1)))
    segments = (text.shape[1] - 1) // SEGMENT
    compressed, after = compressed_layer(network, tokens, 1 + segments + fine * (SEGMENT - 1), segment=SEGMENT, mixed=mixed)
    return network.finish(after), compressed.size.gather(1, compressed.origin)


@pytest.mark.slow
def test_a_needle_is_left_fine_and_answers_come_nearer_with_every_fine_segment():
    """Taught on 65 words without compression; then 1025 words, one segment of 64 left fine: its segment is found, and found by chance it would not do."""
    network = taught()
    text, where, kind = texts(64, LENGTH, seed=-1)
    full = network(text, network.space.full)
    found, size = read(network, text, 1)
    by_chance, _ = read(network, text, 1, blind=True)
    recall = float((size.gather(1, where[:, None]) == 1).float().mean())
    right = {name: float((logits.argmax(-1) == kind).float().mean()) for name, logits in (("full", full), ("vips", found), ("chance", by_chance))}
    error = [float((read(network, text, fine)[0] - full).norm(dim=-1).mean()) for fine in (0, 1, 4, 16, 64)]
    assert recall >= 0.95 and right["vips"] >= right["chance"] + 0.3 and right["vips"] >= right["full"] - 0.05
    assert error == sorted(error, reverse=True) and error[-1] <= 1e-4
