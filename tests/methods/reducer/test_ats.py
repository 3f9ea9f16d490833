"""Token sampling against the definition, with loops; how many tokens are drawn, and that the places left over stand for nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from apportion.methods.reducer.ats import ATS, sampled
from apportion.vocab import Choice, Tokens
from tests.conftest import DIM, HEADS, images, mixed_of, tiny, tokens_of

C = DIM // HEADS


def drawn(score: Tensor, targets: int) -> set[int]:
    """Of one sample: the index with the nearest cumulative share to each target."""
    order = sorted(range(len(score)), key=lambda i: float(score[i]))
    cumulative = score.double()[order].cumsum(0) / score.double().sum()
    first = float(cumulative[cumulative > 0][0])
    steps = [first + (1 - first) * k / (targets - 1) for k in range(targets)]
    return {order[int((cumulative - step).abs().argmin())] for step in steps}


def mask(score: Tensor, targets: int) -> Tensor:
    return sampled(score, torch.full((len(score), 1), targets))


@pytest.mark.parametrize("targets", [2, 5, 12, 40])
@pytest.mark.parametrize("concentration", [10.0, 0.3])
def test_each_target_draws_the_nearest(targets, concentration):
    torch.manual_seed(0)
    score = torch.distributions.Dirichlet(torch.full((40,), concentration)).sample((20,)) * 3
    score[:, 7] = 0
    for sample, found in enumerate(mask(score, targets)):
        assert set(found.nonzero().flatten().tolist()) == drawn(score[sample], targets)


@pytest.mark.parametrize("prefix", [1, 4])
@pytest.mark.parametrize("keep", [16, 13, 11])
def test_it_is_the_definition(prefix, keep):
    n = 17 + prefix
    tokens = tokens_of(3, n, prefix=prefix)
    tokens = tokens._replace(size=torch.cat((torch.ones(3, prefix), 1 + torch.arange(17).expand(3, 17) % 3), 1))
    tokens = tokens._replace(origin=torch.stack([torch.arange(n).repeat_interleave(tokens.size[0].long())] * 3))
    mixed = mixed_of(tokens)
    out = ATS(C, True)(tokens, keep, mixed)
    for sample in range(3):
        size, attention = tokens.size[sample], torch.zeros(n)
        for query, key in zip(mixed.query[sample], mixed.key[sample], strict=True):
            weight = size * (key @ query[0] / C**0.5).exp()
            attention += weight / weight.sum()
        chosen = drawn(attention[prefix:], keep - prefix)
        key = mixed.key[sample, :, prefix:].mean(0)
        alike = torch.cosine_similarity(key[:, None], key, dim=-1)
        best = [token if token in chosen else max(chosen, key=lambda other, token=token: float(alike[token, other])) for token in range(17)]
        for place, token in enumerate(sorted(chosen), start=prefix):
            members = [prefix + other for other in range(17) if best[other] == token]
            x = (tokens.x[sample, members] * size[members, None]).sum(0) / size[members].sum()
            assert_close(out.x[sample, place], x, rtol=1e-4, atol=1e-5)
            assert out.size[sample, place] == size[members].sum() and (out.origin[sample] == place).sum() == size[members].sum()
        assert (out.size[sample, prefix + len(chosen) :] == 0).all() and len(chosen) <= keep - prefix


@pytest.mark.parametrize("targets", [1, 7, 30, 45])
def test_even_scores_draw_one_for_each_target_and_a_single_one_draws_itself(targets):
    assert mask(torch.full((1, 30), 0.2), targets).sum() == min(targets, 30)
    alone = torch.zeros(1, 30)
    alone[0, 11] = 1
    assert mask(alone, targets).nonzero().tolist() == [[0, 11]]
    assert mask(torch.tensor([[0.1, 0.5, 0.4]]), 1).tolist() == [[False, True, False]]


def test_very_many_targets_draw_all_that_count():
    score = torch.rand(4, 60, generator=torch.Generator().manual_seed(0)) + 0.01
    score[:, 5] = 0
    assert torch.equal(mask(score, 100_000), score > 0)


@pytest.mark.parametrize(("concentration", "wanted"), [(10, 172), (1, 125), (0.3, 84), (0.1, 49), (0.03, 24)])
def test_the_more_concentrated_the_fewer(concentration, wanted):
    torch.manual_seed(0)
    score = torch.distributions.Dirichlet(torch.full((196,), float(concentration))).sample((200,))
    assert abs(float(mask(score, 196).sum(1).float().mean()) / wanted - 1) <= 0.05


def test_the_places_left_over_stand_for_nothing():
    """The rest of the network on padded tokens is the rest of the network on each sample's own tokens, gathered."""
    network = tiny("class_token", Choice("reducer", "ats")).requires_grad_(False)
    path, inputs = network.space.path(tokens=(17, 13, 13, 13)), images(6, seed=3)
    whole, lengths = network(inputs, path), set()
    state = network.segment(0, 2, path)(network.tokeniser(inputs, 4))
    for sample in range(6):
        n = int((state.size[sample] > 0).sum())
        lengths.add(n)
        alone = Tokens(state.x[sample : sample + 1, :n], state.size[sample : sample + 1, :n], state.origin[sample : sample + 1], 1)
        steps = tuple(step._replace(tokens=n) for step in path.steps[2:])
        assert_close(network.finish(network.run(alone, steps, before=n)), whole[sample : sample + 1], rtol=1e-4, atol=1e-5)
    assert len(lengths) > 1 and max(lengths) < 13


def test_what_padding_is_there_already_changes_nothing():
    """Sampling what was sampled: padding is never drawn, joins nothing and is not counted as kept."""
    ats, tokens = ATS(C, True), tokens_of(3, 21)
    once = ats(tokens, 20, mixed_of(tokens))
    n = int((once.size > 0).sum(1).max())
    assert n < 20
    short = Tokens(once.x[:, :n], once.size[:, :n], once.origin, 1)
    mixed = mixed_of(once)
    cut = mixed._replace(query=mixed.query[:, :, :n], key=mixed.key[:, :, :n])
    for keep in (n - 1, 11):
        twice, wanted = ats(once, keep, mixed), ats(short, keep, cut)
        for ours, alone in zip(twice[:3], wanted[:3], strict=True):
            assert_close(ours, alone)
    assert torch.equal(ats(once, n, mixed).x, once.x[:, :n]), "what fits is left as it is"


def test_the_order_of_the_patches_is_nothing_to_it():
    ats, tokens, order = ATS(C, True), tokens_of(3, 21), torch.cat((torch.zeros(1).long(), 1 + torch.randperm(20, generator=torch.Generator().manual_seed(0))))
    mixed = mixed_of(tokens)
    turned = ats(tokens._replace(x=tokens.x[:, order]), 15, mixed._replace(query=mixed.query[:, :, order], key=mixed.key[:, :, order]))
    plain = ats(tokens, 15, mixed)
    for sample in range(3):
        assert_close(turned.x[sample][turned.origin[sample]], plain.x[sample][plain.origin[sample, order]], rtol=1e-5, atol=1e-5)


def test_without_a_class_token_the_mean_query_asks():
    tokens = tokens_of(2, 16, prefix=0)
    mixed = mixed_of(tokens)
    asked = mixed._replace(query=mixed.query.mean(2, keepdim=True).expand_as(mixed.query))
    assert torch.equal(ATS(C, False)(tokens, 9, mixed).origin, ATS(C, True)(tokens, 9, asked).origin)
    assert not torch.equal(ATS(C, False)(tokens, 9, mixed).origin, ATS(C, True)(tokens, 9, mixed).origin)


def test_it_has_no_parameters_and_costs_a_row_of_attention_and_a_square_of_keys():
    assert not ATS(C, True).state_dict() and tiny("class_token", Choice("reducer", "ats")).state_dict().keys() == tiny().state_dict().keys()
    assert ATS(C, True).macs(17, 12, 1, HEADS) == 17 * DIM + 16 * 16 * C and ATS(C, True).macs(17, 17, 1, HEADS) == 0


@pytest.mark.parametrize("concentration", [1.0, 0.3, 0.1])
def test_what_is_drawn_holds_more_of_the_score_than_chance_and_at_most_what_the_largest_hold(concentration):
    torch.manual_seed(0)
    score = torch.distributions.Dirichlet(torch.full((64,), concentration)).sample((200,))
    found = mask(score, 32)
    held, best = (score * found).sum(1), score.sort(dim=-1, descending=True).values.cumsum(-1).gather(1, found.sum(1, keepdim=True) - 1)[:, 0]
    assert (held <= best + 1e-6).all() and float(held.mean()) >= float(found.float().mean()) + 0.2
