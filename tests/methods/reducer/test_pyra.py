"""Re-activation: token merging until it is taught, and then its own formula, pair by pair."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import layer_norm
from torch.testing import assert_close

from apportion.errors import PathError
from apportion.methods.reducer.pyra import PYRA
from apportion.methods.reducer.tome import ToMe
from apportion.vocab import Choice, Tokens
from tests.conftest import DIM, HEADS, images, mixed_of, shake, tiny, tokens_of

C = DIM // HEADS


def taught(pairs: int = 16) -> PYRA:
    """One in which every parameter counts."""
    torch.manual_seed(0)
    pyra = PYRA(C, DIM, pairs).requires_grad_(False)
    shake(pyra)
    return pyra


@pytest.mark.parametrize("keep", [20, 19, 14, 11])
def test_before_it_is_taught_it_is_token_merging_to_the_last_bit(keep):
    tokens = tokens_of(3, 21)
    for ours, merged in zip(PYRA(C, DIM, 16)(tokens, keep, mixed_of(tokens)), ToMe(C)(tokens, keep, mixed_of(tokens)), strict=True):
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(merged))


@pytest.mark.parametrize("prefix", [0, 1, 4])
@pytest.mark.parametrize("remove", [1, 3, 8])
def test_it_is_the_definition(prefix, remove):
    n, pyra = 17 + prefix, taught()
    tokens = tokens_of(3, n, prefix=prefix)
    tokens = tokens._replace(size=torch.cat((torch.ones(3, prefix), 1 + torch.arange(17).expand(3, 17) % 3), 1))
    mixed = mixed_of(tokens)
    out = pyra(tokens, n - remove, mixed)
    for sample in range(3):
        key, x, size = mixed.key[sample].mean(0), tokens.x[sample], tokens.size[sample]
        similar = torch.cosine_similarity(key[prefix::2, None], key[None, prefix + 1 :: 2], dim=-1)
        best = sorted(range(similar.shape[0]), key=lambda a: -float(similar[a].max()))[:remove]
        pairs = [(prefix + 2 * a, prefix + 1 + 2 * int(similar[a].argmax())) for a in best]
        z = [layer_norm(x[s] * size[s] + x[t] * size[t], (DIM,), pyra.norm.weight, pyra.norm.bias) for s, t in pairs]
        channel = 2 / (1 + torch.stack([-w * each for w, each in zip(pyra.over_pairs, z, strict=False)]).sum(0).exp())
        mass, weight = x * size[:, None], size.clone()
        for (source, target), each in zip(pairs, z, strict=True):
            token = 2 / (1 + (-(each @ pyra.over_channels)).exp()) - 1
            mass[target] += (x[source] * size[source]) * (1 + channel * token)
            weight[target] += size[source]
        for source, target in pairs:
            place = out.origin[sample, target]
            assert out.origin[sample, source] == place
            assert_close(out.x[sample, place], mass[target] / weight[target], rtol=1e-4, atol=1e-5)


def test_what_padding_there_is_changes_nothing():
    """A row may lose one token more than the padded batch does, as rounding of shares has it."""
    pyra, real = taught(), [(13, 9), (9, 7), (16, 12)]
    whole = tokens_of(3, 16)
    mixed = mixed_of(whole)
    index = torch.arange(16)
    size = torch.stack([(index < n).float() for n, _ in real])
    padded = Tokens(whole.x, size, torch.arange(17).clamp_max(15).expand(3, 17), 1)
    out = pyra(padded, 13, mixed, None, torch.tensor([keep for _, keep in real]))
    for row, (n, keep) in enumerate(real):
        alone = Tokens(whole.x[row : row + 1, :n], torch.ones(1, n), index[None, :n], 1)
        wanted = pyra(alone, keep, mixed._replace(key=mixed.key[row : row + 1, :, :n], query=mixed.query[row : row + 1, :, :n]))
        assert_close(out.x[row, :keep], wanted.x[0], rtol=1e-5, atol=1e-6)
        assert (out.size[row, keep:] == 0).all() and torch.equal(out.size[row, :keep], wanted.size[0])


def test_it_adds_so_many_parameters_and_refuses_more_pairs_than_it_has():
    pyra = PYRA(C, DIM, 5)
    assert sum(parameter.numel() for parameter in pyra.parameters()) == 5 + DIM + 2 * DIM
    tokens = tokens_of(1, 17)
    assert pyra(tokens, 12, mixed_of(tokens)).x.shape[1] == 12
    with pytest.raises(PathError, match="6 pairs"):
        pyra(tokens, 11, mixed_of(tokens))


def test_its_weights_depend_on_the_input_and_the_count_follows_the_path():
    network, notes = tiny("class_token", Choice("reducer", "pyra", options={"pairs": 8})).requires_grad_(False), {}
    plain = tiny("class_token", Choice("reducer", "tome"))
    path = network.space.path(tokens=(13, 10, 7, 7))
    assert torch.equal(network(images(2), path, notes), plain(images(2), path))
    assert [feature.shape[1] for feature in notes["feature"]] == [13, 10, 7, 7]
    pyra, tokens = taught(), tokens_of(2, 17)
    gain = (pyra.reactivated(tokens, torch.tensor([[1, 3]] * 2), torch.tensor([[2, 4]] * 2)).x / tokens.x)[:, [1, 3]]
    assert not torch.allclose(gain[0], gain[1], atol=1e-3) and not torch.allclose(gain, torch.ones_like(gain), atol=1e-3)


def test_teaching_these_numbers_alone_brings_the_answer_nearer_to_the_unmerged():
    """The pairs are fixed by the keys, so what is learned is how much of a token that goes may move the one that stays."""
    torch.manual_seed(0)
    tokens, read = tokens_of(64, 32, prefix=0), torch.randn(DIM, DIM) / DIM**0.5
    mixed = mixed_of(tokens)

    def wrong(pyra: PYRA) -> torch.Tensor:
        """Mean square of what the mean of a non-linear read-out has moved by."""
        out = pyra(tokens, 20, mixed)
        merged = ((out.x @ read).relu() * out.size[..., None]).sum(1) / out.size.sum(1, keepdim=True)
        return (merged - (tokens.x @ read).relu().mean(1)).square().mean()

    pyra = PYRA(C, DIM, 12)
    before, optimiser = wrong(pyra).item(), torch.optim.Adam(pyra.parameters(), lr=5e-2)
    for _ in range(30):
        optimiser.zero_grad()
        loss = wrong(pyra)
        loss.backward()
        optimiser.step()
    assert wrong(pyra).item() <= 0.75 * before
