"""Once the whole way for sound: a folder as transformers writes it and folders of recordings in, a bundle out that answers files and arrays."""

from __future__ import annotations

import json
import wave
from pathlib import Path as File

import pytest
import torch

from apportion import verbs
from apportion.deliver.adapted import load
from apportion.errors import DataError, PlanError
from apportion.intake import Listen, Preprocess, _torchvision, read_model
from apportion.network import Architecture
from apportion.train import Recipe
from apportion.vocab import Choice, Plan
from tests.test_cli import shell

_torchvision.ready()
transformers = pytest.importorskip("transformers")
from tests.rooms.test_intake_audio_models import SPECIAL, WAVE  # noqa: E402

RATE = 8000
CHOICES = (Choice("reducer", "tome"), Choice("depth", "skip"))
EXTRACTORS = {
    "Wav2Vec2": {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "sampling_rate": RATE, "feature_size": 1, "return_attention_mask": True},
    "Whisper": {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "sampling_rate": RATE,
        "feature_size": 8,
        "n_fft": 200,
        "hop_length": 200,
        "chunk_length": 1,
    },
}


def sung(folder: File, count: int, *, classes: tuple[str, ...] = ("high", "low", "mid")) -> File:
    """Short tones with noise, of three pitches and several lengths; the last of each class is no recording."""
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        for place, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for number in range(count if split == "train" else count // 2):
                n = int(torch.randint(400, 1600, (), generator=generator))
                tone = torch.sin(torch.arange(n) * (0.1 + 0.5 * place)) + 0.5 * torch.randn(n, generator=generator)
                with wave.open(str(folder / split / name / f"{number}.wav"), "wb") as file:
                    file.setnchannels(1)
                    file.setsampwidth(2)
                    file.setframerate(RATE)
                    file.writeframes((tone * 8000).clamp(-32768, 32767).to(torch.int16).numpy().tobytes())
            (folder / split / name / "torn.wav").write_bytes(b"RIFF")
    return folder


def saved(folder: File, name: str) -> File:
    torch.manual_seed(0)
    shape = {**SPECIAL.get(name, WAVE), "id2label": dict(enumerate(("high", "low", "mid"))), "label2id": {"high": 0, "low": 1, "mid": 2}}
    config = getattr(transformers, f"{name}Config")(**shape)
    classifies = "ForAudioClassification" if name == "Whisper" else "ForSequenceClassification"
    getattr(transformers, f"{name}{classifies}")(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(EXTRACTORS[name]))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("name", "control"), [("Wav2Vec2", "checkpoints"), ("Whisper", "glance")])
def test_the_whole_way(tmp_path: File, monkeypatch: pytest.MonkeyPatch, name: str, control: str) -> None:
    data, out, told = sung(tmp_path / "data", 140), tmp_path / "out", list[str]()
    plan = Plan(choices=CHOICES, rungs=3, tolerance=100.0, never_slower=False, glance=1, epochs=0.5, batch=16, control=control)  # pyright: ignore
    length = 640 if name == "Wav2Vec2" else None
    model = str(saved(tmp_path / "model", name))
    weighed = verbs.adapt(model, str(data), plan=plan, out=out, length=length, backend="eager", buckets=(1, 4), repeats=2, tell=told.append)
    assert sum(text.startswith("left out") and "torn.wav" in text for text in told) == 6 and told[-1].endswith(str(out))
    assert 0 < weighed.figures["gmacs_adaptive"] < weighed.figures["gmacs_dense"] and "model(recordings)" in (out / "README.md").read_text()
    again = load(out, backend="eager", buckets=(1, 4))
    source, feed = again.bundle.provenance["source"], again.bundle.preprocess
    assert isinstance(feed, Listen) and ("attention_mask" in source) == (name == "Wav2Vec2") and again.bundle.classes == ("high", "low", "mid")
    files = sorted((data / "test").rglob("[0-9].wav"))[:7]
    raw = [(torch.frombuffer(bytearray(file.read_bytes()[44:]), dtype=torch.int16), RATE) for file in files]
    answers = [weighed.adapted(files), again(files), again(raw), again(again.bundle.preprocess(files))]
    for answer in answers[1:]:
        assert torch.equal(answer.path, answers[0].path)
        torch.testing.assert_close(answer.logits, answers[0].logits, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(verbs, "load", lambda folder, **options: again)
    found = shell("run", out, data / "test" / "low", "--json")
    shown = json.loads(found.stdout)
    assert found.exit_code == 5 and len(shown["answers"]) == 70 and [row["file"][-8:] for row in shown["skipped"]] == ["torn.wav"]
    assert {row["label"] for row in shown["answers"]} <= {"high", "low", "mid"}


def test_what_does_not_belong_to_a_model_of_sound_is_refused(tmp_path: File) -> None:
    folder = saved(tmp_path / "model", "Whisper")
    source = read_model(folder)
    assert source.fed == Listen("whisper", RATE, 40, bands=8, window=200, hop=200) and source.verified is not None and source.verified.max_abs < 1e-5
    with pytest.raises(PlanError, match="images for a model of transformers"):
        read_model(folder, preprocess=Preprocess(32, (0.5,) * 3, (0.5,) * 3))
    with pytest.raises(DataError, match="images for a model of recordings"):
        verbs.adapt(str(folder), verbs.Parts.read("digits", seed=0), plan=Plan(choices=CHOICES))
    with pytest.raises(PlanError, match="columns for a model of recordings"):
        verbs.adapt(str(folder), str(tmp_path), columns={"text": "x"})


@pytest.mark.slow
def test_from_scratch_to_a_network_that_hears(tmp_path: File) -> None:
    shape = Architecture(image_size=0, patch=0, dim=16, depth=2, heads=2, hidden=32, classes=1, frames=20, bands=8, class_token=False, pool="mean")
    feed = Listen("whisper", RATE, 20, bands=8, window=200, hop=80)
    recipe = Recipe(epochs=20, batch=16, learning_rate=3e-3, crop_padding=0, ema=0.9)
    network, fed, parts = verbs.scratch(sung(tmp_path / "data", 60), recipe=recipe, architecture=shape, feed=feed)
    inputs, labels = next(parts.report.batches(1000, fed))
    assert labels is not None and (network.eval()(inputs, network.space.full).argmax(-1) == labels).double().mean() > 0.8
