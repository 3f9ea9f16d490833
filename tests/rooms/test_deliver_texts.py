"""A bundle of a model that reads texts: strings in, each at the cost of its own length, and whole on disk with its tokenizer."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path as File

import pytest
import torch

from apportion.control import fit_controller, frontier
from apportion.deliver import Adapted, Bundle
from apportion.deliver.adapted import load
from apportion.deliver.bundle import Rung
from apportion.deliver.bundle import load as read_bundle
from apportion.deliver.bundle import save as write_bundle
from apportion.deliver.costs import Ledger, chosen_lengths, macs, mean_macs, padded, places, profile
from apportion.deliver.page import marked
from apportion.deliver.weighing import judged
from apportion.engine import plain
from apportion.errors import BundleError, DataError, EngineError, PlanError
from apportion.intake import Preprocess, TextSet, Tokenise
from apportion.measure.macs import executed_macs
from apportion.network import Architecture, Network, put
from apportion.vocab import Choice, Ladder, Outcomes, Plan
from tests.conftest import shake
from tests.rooms.test_deliver_bundle import made_up_bundle, rewrite, toml

pytest.importorskip("tokenizers")
CHOICES = (Choice("reducer", "tome"), Choice("depth", "skip"))
LENGTH, WORDS = 48, "the a good bad film is was not".split()


def tokenise() -> Tokenise:
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = ["[UNK]", "[PAD]", *WORDS]
    made = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return Tokenise(made.to_str(), length=LENGTH, padding=1)


def texts(count: int = 120) -> TextSet:
    """From 1 to 48 words; those of class 1 are long."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(1, LENGTH + 1, (count,), generator=generator).tolist()
    made = [" ".join(WORDS[word] for word in torch.randint(8, (n,), generator=generator).tolist()) for n in counts]
    return TextSet(tuple(made), torch.tensor([int(n > 24) for n in counts]), ("short", "long"))


def made_up(feed: Tokenise) -> Bundle:
    torch.manual_seed(0)
    a = Architecture(0, 0, 16, 3, 2, 32, 2, words=10, length=LENGTH, padding=1, positions=LENGTH, token_types=2, stem_norm=True)
    network = Network(a).eval().requires_grad_(False)
    shake(network)
    for choice in CHOICES:
        put(network, choice)
    space, samples = network.space, texts()
    paths = (space.path(blocks=(0, 2)), space.path(tokens=(48, 30, 20)), space.full)
    over, glance = profile(network, samples, feed), network.glance(1)
    inputs, labels = next(samples.batches(120, feed))
    assert labels is not None
    correct = torch.stack([labels == 0, (labels == 0) | (torch.arange(120) % 2 == 0), torch.ones(120, dtype=torch.bool)], 1)
    cost = torch.tensor([mean_macs(network, path, over) + glance.macs() for path in paths])
    table = Outcomes(glance(inputs)[1], correct, correct, 1 - correct.float(), torch.rand(120, 3), cost / cost[-1])
    controller = fit_controller(table, fit_rows=torch.arange(70), calibrate_rows=torch.arange(70, 120), seed=0)
    gmacs = [(mean_macs(network, path, over) + glance.macs() + controller.macs) / 1e9 for path in paths]
    return Bundle(
        network=network,
        ladder=Ladder(paths, 1),
        controller=controller,
        preprocess=feed,
        plan=Plan(choices=CHOICES, tolerance=0.7),
        budget=0.9,
        rungs=tuple(Rung(g, 0.5) for g in gmacs),
        frontier=tuple(frontier(controller, table, [0.9, 1.0])),
        dense_gmacs=mean_macs(network, space.full, over) / 1e9,
        classes=("short", "long"),
        provenance={"source": {"source": "made up"}},
    )


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return made_up(tokenise())


@pytest.fixture(scope="module")
def written(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> File:
    folder = tmp_path_factory.mktemp("texts") / "bundle"
    write_bundle(bundle, folder)
    return folder


@pytest.fixture
def folder(written: File, tmp_path: File) -> File:
    return shutil.copytree(written, tmp_path / "bundle")


@pytest.fixture(scope="module")
def model(written: File) -> Adapted:
    adapted = load(written, backend="eager", buckets=(4,))
    assert adapted.warm() == 2 * 4  # decision and three rungs, at two lengths
    return adapted


def test_strings_are_answered_as_the_network_answers_each_alone(model: Adapted, bundle: Bundle) -> None:
    some, feed = list(texts().texts[:11]), tokenise()
    answer = model(some)
    assert len(answer.path.unique()) > 1
    for row, (text, rung) in enumerate(zip(some, answer.path.tolist(), strict=True)):
        torch.testing.assert_close(answer.logits[row], bundle.network(feed([text]), bundle.ladder.paths[rung])[0], atol=1e-5, rtol=1e-4)
        length = 32 if len(text.split()) <= 32 else 48
        assert answer.cost[row].item() == pytest.approx((macs(bundle.network, bundle.ladder.paths[rung], length) + decision(bundle)) / 1e9)
    assert torch.equal(model(feed(some)).path, answer.path)
    full = model(some, "1x")
    assert (full.path == 2).all() and len(full.cost.unique()) == 2


def decision(bundle: Bundle) -> int:
    return bundle.network.glance(1).macs() + bundle.controller.macs


@pytest.mark.parametrize("length", [32, 48])
def test_costs_are_what_is_executed_at_each_length(bundle: Bundle, length: int) -> None:
    inputs = torch.randint(2, 10, (1, length), generator=torch.Generator().manual_seed(0))
    for path in bundle.ladder.paths:
        ran = executed_macs(lambda path=path: bundle.network(inputs, path))
        assert macs(bundle.network, path, length) == pytest.approx(ran, rel=1e-3), path.name
    assert macs(bundle.network, bundle.ladder.paths[1], 48) == bundle.network.macs(bundle.ladder.paths[1])


def test_a_profile_is_where_the_texts_are(bundle: Bundle) -> None:
    counts = [len(text.split()) for text in texts().texts]
    share = sum(n <= 32 for n in counts) / 120
    assert profile(bundle.network, texts(), tokenise()) == pytest.approx({32: share, 48: 1 - share})
    full = bundle.network.space.full
    wanted = share * macs(bundle.network, full, 32) + (1 - share) * macs(bundle.network, full, 48)
    assert mean_macs(bundle.network, full, {32: share, 48: 1 - share}) == pytest.approx(wanted)


def of(counts: list[int]) -> TextSet:
    """A text of so many words for each."""
    return TextSet(tuple(" ".join(itertools.islice(itertools.cycle(WORDS), n)) for n in counts), None, ())


def test_lengths_come_from_the_texts_where_they_save_enough(bundle: Bundle) -> None:
    feed, some = tokenise(), [3, 9, 33, 34, 34, 35, 35, 48]
    found, saved = chosen_lengths(bundle.network, of(some * 9), of(some), feed)
    best = min(((length, LENGTH) for length in range(32, LENGTH)), key=lambda every: padded(torch.tensor(some), every))
    assert found == best == (35, 48)
    assert saved == pytest.approx(1 - (7 * 35 + 48) / (2 * 32 + 6 * 48))
    assert chosen_lengths(bundle.network, of(some), of([32, 31, 48, 47]), feed)[0] == ()  # judged on texts that were not chosen for
    assert chosen_lengths(bundle.network, of([3, 9, 12] * 9), of([3, 9, 12]), feed) == ((), 0.0)  # below the shortest a call costs more than padding
    assert chosen_lengths(bundle.network, of([32, 47, 48] * 9), of([32, 47, 48]), feed)[0] == ()


def test_costs_follow_the_lengths_that_were_chosen(bundle: Bundle) -> None:
    every, place = places(bundle.network, texts(), tokenise(), (20, 48))
    counts = torch.tensor([len(text.split()) for text in texts().texts])
    assert every == (20, 48) and torch.equal(place, (counts > 20).long()) and padded(counts, every) == torch.tensor(every)[place].sum()
    assert profile(bundle.network, texts(), tokenise(), (20, 48)) == pytest.approx(
        {20: (counts <= 20).double().mean().item(), 48: (counts > 20).double().mean().item()}
    )
    ledger = Ledger.of(replace(bundle, lengths=(20, 48)))
    assert ledger.lengths == (20, 48) and ledger.dense[0] == macs(bundle.network, bundle.network.space.full, 20) / 1e9
    assert torch.equal(ledger.rungs[1], Ledger.of(bundle).rungs[1])


def test_answers_are_the_same_whatever_the_lengths(model: Adapted, bundle: Bundle) -> None:
    chosen, some = replace(bundle, lengths=(20, 29, 48)), list(texts().texts[:40])
    other = Adapted(chosen, backend="eager", buckets=(4,), engine=Adapted(chosen, buckets=(4,)).built("eager", make=plain))
    assert other.warm() == 3 * 4
    first, second = model(some), other(some)
    assert torch.equal(first.path, second.path) and len(first.path.unique()) > 1
    torch.testing.assert_close(first.logits, second.logits, atol=1e-5, rtol=1e-4)
    assert second.cost.sum() < first.cost.sum()


def test_what_is_saved_is_counted_text_by_text(bundle: Bundle) -> None:
    """Long texts on the full path and short ones on the cheapest: the mean of the rungs alone would flatter."""
    long = torch.tensor([False, True, True, False])
    choice, place, ledger = long.long() * 2, long.long(), Ledger.of(bundle)
    seen = Outcomes(torch.zeros(4, bundle.controller.config()["features"]), *[torch.ones(4, 3, dtype=torch.bool)] * 2, torch.zeros(4, 3), torch.ones(4, 3),
                    torch.tensor([rung.gmacs / bundle.rungs[-1].gmacs for rung in bundle.rungs]))  # fmt: skip
    found = judged(bundle, seen, choice, torch.ones(4, dtype=torch.bool), place=place)
    assert found["gmacs_adaptive"] == pytest.approx(float(ledger.rungs[0, 0] + ledger.rungs[1, 2]) / 2)
    assert found["gmacs_dense"] == pytest.approx(float(ledger.dense.mean()))
    assert found["gmacs_adaptive"] > sum(bundle.rungs[k].gmacs for k in choice.tolist()) / 4


def test_a_cap_holds_for_every_text_whatever_its_length(model: Adapted) -> None:
    some, ledger = list(texts().texts), model.ledger
    amount = float(ledger.rungs[1, 0]) * 1.001  # the cheapest path of a long text, and more than that for a short one
    answer = model(some, f"<{amount}GMACs")
    assert (answer.cost <= amount).all() and answer.path.unique().numel() > 1
    assert (model(some, "<0.99x").path < 2).all()
    with pytest.raises(PlanError, match="the cheapest path"):
        model(some, f"<{amount / 1.1}GMACs")
    assert len(model(["a good film"], f"<{amount / 1.1}GMACs").path) == 1  # short texts still fit
    with pytest.raises(PlanError, match="a cap in ms"):
        model(some, "<2ms")


@pytest.mark.parametrize("bad", [["a", ""], "a good film", [3], [("a", "b")], []])
def test_what_is_no_list_of_texts_is_a_data_error(model: Adapted, bad: object) -> None:
    with pytest.raises(DataError):
        model(bad)  # pyright: ignore


def test_tokens_that_do_not_fit_are_engine_errors(model: Adapted) -> None:
    for bad in (torch.zeros(2, 4), torch.full((1, 49), 3), torch.full((2, 2, 9), 3)):
        with pytest.raises(EngineError):
            model(bad)


def test_texts_for_a_model_of_images_are_a_data_error() -> None:
    with pytest.raises(DataError, match="a str"):
        Preprocess(8, (0.5,) * 3, (0.25,) * 3)(["a good film"])  # pyright: ignore


def test_comes_back_the_same(bundle: Bundle, folder: File, tmp_path: File) -> None:
    again = read_bundle(folder)
    assert again.preprocess == bundle.preprocess and again.ladder == bundle.ladder and again.network.architecture == bundle.network.architecture
    write_bundle(again, tmp_path / "copy")
    for file in folder.iterdir():
        assert (tmp_path / "copy" / file.name).read_bytes() == file.read_bytes(), file.name
    write_bundle(made_up_bundle(), folder)  # a model of images in the same place
    assert not (folder / "tokenizer.json").exists() and isinstance(read_bundle(folder).preprocess, Preprocess)


def test_lengths_come_back_and_bundles_without_them_have_doubled_ones(bundle: Bundle, folder: File, tmp_path: File) -> None:
    write_bundle(replace(bundle, lengths=(20, 48)), tmp_path / "chosen")
    assert read_bundle(tmp_path / "chosen").lengths == (20, 48)
    assert load(tmp_path / "chosen", backend="eager").ledger.lengths == (20, 48)
    rewrite(folder, "plan.toml", toml(lambda d: d["tokenise"].pop("lengths")))  # as written before there was a choice
    assert read_bundle(folder).lengths == () and load(folder, backend="eager").ledger.lengths == (32, 48)


def test_a_tokenizer_that_is_missing_or_altered_is_named(folder: File) -> None:
    file = folder / "tokenizer.json"
    content = file.read_text()
    file.write_text(content.replace("good", "gold"))
    with pytest.raises(BundleError, match=r"tokenizer\.json, altered"):
        read_bundle(folder)
    file.unlink()
    with pytest.raises(BundleError, match=r"without tokenizer\.json"):
        read_bundle(folder)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda d: d["tokenise"].update(length=47), "tokenise"),
        (lambda d: d["tokenise"].update(padding=0), "tokenise"),
        (lambda d: d["tokenise"].pop("pairs"), "pairs"),
        (lambda d: d["tokenise"].update(lengths=[20, 47]), "tokenise.lengths"),
        (lambda d: d["tokenise"].update(lengths=[30, 20, 48]), "tokenise.lengths"),
        (lambda d: d["tokenise"].update(lengths=[20, 20, 48]), "tokenise.lengths"),
        (lambda d: d["tokenise"].update(lengths=[0, 48]), "tokenise.lengths"),
        (lambda d: d["tokenise"].update(lengths=[20.5, 48]), "tokenise.lengths"),
        (lambda d: d.pop("tokenise"), "tokenise"),
        (lambda d: d.update(preprocess={"size": 8, "mean": [0.5] * 3, "std": [0.5] * 3}), "tokenise"),
    ],
)
def test_settings_that_do_not_fit_are_named(folder: File, change, named: str) -> None:
    rewrite(folder, "plan.toml", toml(change))
    with pytest.raises((BundleError, PlanError), match=named) as caught:
        read_bundle(folder)
    assert "plan.toml" in str(caught.value)


def test_without_the_package_the_extra_is_named(folder: File, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(PlanError, match=r"apportion\[text\]"):
        load(folder, backend="eager")


@pytest.mark.slow
def test_loading_and_answering_needs_no_transformers(folder: File) -> None:
    code = f"import sys, apportion; sys.modules['transformers'] = None; print(apportion.load({str(folder)!r}, backend='eager', buckets=(1,))(['a film']).path)"
    assert "tensor" in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_marks_show_what_stands_alone() -> None:
    spans = [(0, 0), (0, 1), (2, 6), (7, 11), (0, 0)]
    assert marked("a good film", spans, [0, 1, 2, 2, 3, 4]) == (("a", True), (" good film", False))
