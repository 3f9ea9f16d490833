"""The inspection adds up, offers what `put` takes, and quotes what it refuses."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from apportion.errors import ApportionError
from apportion.measure.inspect import ADAPTING, inspected
from apportion.methods import card, names
from apportion.network import Network, put
from apportion.vocab import Choice
from tests.conftest import DEPTH, FLAVOURS, HEADS, HIDDEN, PLAN, assert_same_state, state_of, tiny


@pytest.mark.parametrize("flavour", list(FLAVOURS))
@pytest.mark.parametrize("choices", [(), PLAN], ids=["dense", "adapted"])
def test_parts_add_up_to_the_whole(flavour, choices):
    network = tiny(flavour, *choices)
    found = inspected(network)
    assert [part.name for part in found.parts] == ["tokeniser", *(f"blocks.{i}" for i in range(DEPTH)), "head"]
    assert round(sum(part.gmacs for part in found.parts) * 1e9) == network.macs(network.space.full)
    assert sum(part.parameters for part in found.parts) == sum(value.numel() for value in network.parameters())
    assert sum(part.share for part in found.parts) == pytest.approx(1)


@pytest.mark.parametrize("flavour", ["class_token", "mean"])
def test_offers_are_what_can_be_put_there(flavour):
    network = tiny(flavour)
    before = state_of(network)
    offers = inspected(network).offers
    assert_same_state(before, state_of(network))
    assert [(offer.slot, offer.method) for offer in offers] == [(slot, name) for slot in ADAPTING for name in names(slot) if card(slot, name).axis]
    for offer in offers:
        twin = tiny(flavour)
        if offer.refused:
            with pytest.raises(ApportionError) as error:
                put(twin, Choice(offer.slot, offer.method))
            assert error.value.found == offer.refused
        else:
            put(twin, Choice(offer.slot, offer.method))
            space = twin.space
            if offer.slot in ("mixer", "ffn"):
                assert offer.choices == (space.heads if offer.slot == "mixer" else space.width)
            if offer.slot == "reducer":
                space.path(tokens=(offer.choices[0],) * DEPTH)
                with pytest.raises(ApportionError):
                    space.path(tokens=(offer.choices[0] - 1,) * DEPTH)
    assert any(offer.refused for offer in offers) == (flavour == "mean")


def test_what_is_in_place_is_offered_too():
    offers = {offer.method: offer for offer in inspected(tiny("class_token", *PLAN)).offers}
    assert offers["head_prefix"].choices == (1, 2, 3, HEADS) and offers["matformer"].choices[-1] == HIDDEN and offers["skip"].choices[-1] == DEPTH


def test_what_is_approximate_is_said():
    a = replace(tiny("mean").architecture, rotary=100.0, mixer_norm=True, ffn_norm=True, gated=True)
    found = inspected(Network(a))
    remarks = {offer.slot: offer.remark for offer in found.offers if not offer.refused}
    assert "first of its tokens" in remarks["reducer"] and "over what is left" in remarks["mixer"] and "over what is left" in remarks["ffn"]
    assert not any(offer.remark for offer in inspected(tiny("mean")).offers)
    facts = dict(found.recognised)
    assert facts["positions"] == "learned, rotary" and "over heads, over hidden units" in facts["norms"] and "gated" in facts["ffn"]


def test_a_table_and_what_its_numbers_mean_are_said():
    a = replace(tiny("mean").architecture, image_size=0, patch=0, numbers=3, categories=(4, 5), task="regression", classes=2)
    facts = dict(inspected(Network(a)).recognised)
    assert facts["inputs"] == "rows of a table: 3 columns of numbers, 2 of categories" and facts["tokens"] == "5"
    assert facts["positions"] == "each column has vectors of its own" and facts["answer"] == "mean, 2 numbers"


def test_it_is_plain_data():
    found = json.loads(json.dumps(asdict(inspected(tiny("registers")))))
    assert dict(found["recognised"])["tokens"] == "20, of which 4 are never reduced" and found["offers"][0]["slot"] == "reducer"
