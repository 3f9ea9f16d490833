"""Recordings come in as they are, or are named: every width of PCM, every kind of bad file, and nothing opened that was not asked for."""

from __future__ import annotations

import struct
import sys
import wave

import pytest
import torch

from apportion.errors import DataError
from apportion.intake.audio import LONGEST_S, LOOK_AHEAD, AudioSet, decode, read_audio_set

RATE = 8000


def tone(seed=0, *, seconds=0.05, channels=1):
    generator = torch.Generator().manual_seed(seed)
    return 1.8 * torch.rand(round(seconds * RATE), channels, generator=generator, dtype=torch.float64) - 0.9


def save(file, samples, *, rate=RATE, width=2):
    """PCM by the definition: little-endian integers, those of one byte counted from 128."""
    file.parent.mkdir(parents=True, exist_ok=True)
    top = 2 ** (8 * width - 1)
    integers = [round(value * top) for value in samples.flatten().tolist()]
    with wave.open(str(file), "wb") as sink:
        sink.setparams((samples.shape[1], width, rate, 0, "NONE", ""))
        sink.writeframes(b"".join((i + 128).to_bytes(1, "little") if width == 1 else i.to_bytes(width, "little", signed=True) for i in integers))
    return file


def header(*, channels=1, rate=RATE, bits=16, kind=1, data=b"", claims=None):
    """A .wav file whose header may lie."""
    claims = len(data) if claims is None else claims
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, kind, channels, rate, rate * channels * bits // 8, channels * bits // 8, bits)
    return struct.pack("<4sI4s", b"RIFF", 4 + len(form) + 8 + claims, b"WAVE") + form + struct.pack("<4sI", b"data", claims) + data


def folder(root, *, classes=("no", "yes"), each=5):
    for c, name in enumerate(classes):
        for i in range(each):
            save(root / name / f"{i}.wav", tone(10 * c + i))
    return root


def first(files):
    """A feed: the first sample of each recording."""
    return torch.stack([decode(file)[0][:1] for file in files])


@pytest.fixture
def opened(monkeypatch):
    """Names of the files that were opened as recordings."""
    names, real = [], wave.open
    monkeypatch.setattr(wave, "open", lambda file, mode="rb": names.append(str(getattr(file, "name", file))) or real(file, mode))
    return names


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_every_width_and_the_mean_of_channels(tmp_path, width, channels):
    samples = tone(channels=channels)
    samples[:2] = torch.tensor([[-1.0], [0.0]])
    got, rate = decode(save(tmp_path / "x.wav", samples, width=width))
    assert rate == RATE and got.dtype == torch.float32 and got[:2].tolist() == [-1.0, 0.0]
    assert torch.allclose(got.double(), samples.mean(1), atol=max(0.5 / 2 ** (8 * width - 1), 1e-7) * 1.01)


def test_no_more_is_read_than_asked_for(tmp_path):
    file = save(tmp_path / "x.wav", tone(seconds=0.5))
    whole = decode(file)[0]
    assert len(whole) == 4000 and torch.equal(decode(file, seconds=0.1)[0], whole[: 800 + LOOK_AHEAD])


def test_folders_and_batches(tmp_path):
    found = read_audio_set(folder(tmp_path))
    assert found.classes == ("no", "yes") and found.labels.tolist() == [0] * 5 + [1] * 5 and found.files[5] == tmp_path / "yes" / "0.wav"
    got = list(found.batches(4, first))
    assert [len(x) for x, _ in got] == [4, 4, 2] and torch.cat([y for _, y in got]).equal(found.labels)
    assert torch.cat([x for x, _ in got]).equal(first(found.files)) and found.sizes(first) is None
    shuffled = [torch.cat(part) for part in zip(*found.batches(4, first, seed=1), strict=True)]
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    assert shuffled[0].equal(first(found.files)[order]) and shuffled[1].equal(found.labels[order]) and order.tolist() != list(range(10))
    assert found.rows([9, 0]).files == (found.files[9], found.files[0]) and found.rows([9, 0]).labels.tolist() == [1, 0]
    found.check(2)
    with pytest.raises(DataError, match=r"label 1 at .*yes/0\.wav \(5 such"):
        found.check(1)


def test_splits_are_partitions_and_even(tmp_path):
    found = read_audio_set(folder(tmp_path))
    rest, held = found.split(0.4, seed=3)
    assert sorted(rest.files + held.files) == list(found.files) and held.labels.bincount().tolist() == [2, 2]
    assert held.files == found.split(0.4, seed=3)[1].files != found.split(0.4, seed=4)[1].files
    with pytest.raises(DataError, match="held out"):
        found.rows([0]).split(0.5)
    train, test = read_audio_set(tmp_path, split="train"), read_audio_set(tmp_path, split="test")
    assert sorted(train.files + test.files) == list(found.files) and test.labels.tolist() == [0, 1]
    assert read_audio_set(tmp_path, limit=4).labels.tolist() == [0, 0, 1, 1]
    with pytest.raises(DataError, match="labels for 10"):
        AudioSet(found.files, found.labels[:3], found.classes)


def test_split_folders_share_their_labels(tmp_path):
    folder(tmp_path / "train", classes=("2", "10", "3"), each=2)
    folder(tmp_path / "val", classes=("10",), each=1)
    assert read_audio_set(tmp_path).classes == ("2", "3", "10") and len(read_audio_set(tmp_path)) == 7
    assert read_audio_set(tmp_path, split="test").labels.tolist() == [2] and len(read_audio_set(tmp_path, split="train")) == 6


def test_a_flat_folder_and_one_file(tmp_path):
    for name in ("b.wav", "a.WAV"):
        save(tmp_path / name, tone())
    found = read_audio_set(tmp_path)
    assert found.labels is None and found.classes == () and [file.name for file in found.files] == ["a.WAV", "b.wav"]
    inputs, labels = next(read_audio_set(tmp_path / "b.wav").batches(4, first))
    assert inputs.shape == (1, 1) and labels is None


def test_only_what_is_asked_for_is_opened(tmp_path, opened):
    content = save(tmp_path / "x" / "0.wav", tone()).read_bytes()
    for i in range(1, 1000):
        (tmp_path / "x" / f"{i}.wav").write_bytes(content)
    opened.clear()
    few = read_audio_set(tmp_path, limit=10)
    assert len(few) == 10 and sorted(opened) == sorted(map(str, few.files))
    opened.clear()
    batches = few.batches(5, first)
    assert not opened
    next(batches)
    assert opened == list(map(str, few.files[:5]))


BAD = {
    "empty": (b"", "empty"),
    "text": (b"not a recording at all", "RIFF"),
    "header": (header(data=bytes(800))[:30], "does not open"),
    "short": (header(data=bytes(900))[:500], "cut short"),
    "torn": (header(data=bytes(800), claims=900), "cut short"),
    "channels": (header(channels=0), "channels"),
    "many": (header(channels=100, data=bytes(80000)), "100 channels"),
    "rate": (header(rate=0, data=bytes(800)), "at 0 Hz"),
    "wide": (header(bits=64, data=bytes(8000)), "64 bits"),
    "blink": (header(data=bytes(2 * 199)), "0.02488 s"),
    "nothing": (header(), "0 s of sound"),
    "long": (header(rate=8, data=bytes(2 * 8 * (int(LONGEST_S) + 1))), "301 s"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_files_are_named(tmp_path, name):
    content, why = BAD[name]
    good, bad = save(tmp_path / "a" / "0.wav", tone()), tmp_path / "a" / "1.wav"
    bad.write_bytes(content)
    told = []
    found = read_audio_set(tmp_path, on_skip=lambda file, reason: told.append((file, reason)))
    assert found.files == (good,) and found.labels.tolist() == [0] and found.skipped == tuple(told)
    assert [file for file, _ in told] == [str(bad)] and why in told[0][1]
    with pytest.raises(DataError) as error:
        decode(bad)
    assert error.value.found.startswith(f"{bad}: ") and (why in error.value.found or why in error.value.wanted)
    (tmp_path / "a" / "2.wav").write_bytes(content)
    with pytest.raises(DataError, match=r"2 of 3 files .*1\.wav"):
        read_audio_set(tmp_path)


def test_a_good_header_is_good(tmp_path):
    """The bad ones fail for what is said of them, not for the way they are written here."""
    (tmp_path / "x.wav").write_bytes(header(data=bytes(2 * 200)))
    assert decode(tmp_path / "x.wav")[0].tolist() == [0.0] * 200
    assert len(read_audio_set(tmp_path)) == 1


def test_other_files_are_told_and_changed_ones_are_an_error(tmp_path):
    folder(tmp_path)
    (tmp_path / "yes" / "readme.txt").write_text("hello")
    (tmp_path / "notes.txt").write_text("hello")
    found = read_audio_set(tmp_path)
    assert len(found) == 10 and [why.split(" ", 2)[0] for _, why in found.skipped] == ["lies", "found"] and "'.txt'" in found.skipped[1][1]
    (tmp_path / "yes" / "2.wav").write_bytes(b"gone")
    with pytest.raises(DataError, match=r"yes/2\.wav"):
        list(found.batches(8, first))
    (tmp_path / "yes" / "2.wav").unlink()
    with pytest.raises(DataError, match=r"yes/2\.wav"):
        list(found.batches(8, first))


def test_nothing_there(tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        read_audio_set(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no recording"):
        read_audio_set(tmp_path)
    for options in ({"split": "dev"}, {"limit": 0}):
        with pytest.raises(DataError, match="split"):
            read_audio_set(tmp_path, **options)
    folder(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"class folder .*empty"):
        read_audio_set(tmp_path)


def test_without_soundfile_its_formats_say_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    save(tmp_path / "a.wav", tone())
    (tmp_path / "b.flac").write_bytes(b"fLaC")
    assert "apportion[audio]" in read_audio_set(tmp_path).skipped[0][1]
    (tmp_path / "c.wav").write_bytes(header(kind=3, bits=32, data=bytes(4000)))
    with pytest.raises(DataError, match=r"apportion\[audio\]"):
        decode(tmp_path / "c.wav")


def test_with_soundfile(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    samples = tone(seconds=0.5, channels=2)
    for name, kind in (("x.flac", "PCM_16"), ("x.wav", "FLOAT"), ("x.ogg", "VORBIS")):
        soundfile.write(tmp_path / name, samples.numpy(), RATE, subtype=kind)
        got, rate = decode(tmp_path / name, seconds=0.1)
        assert rate == RATE and len(got) == 800 + LOOK_AHEAD
        assert torch.allclose(got.double(), samples.mean(1)[: len(got)], atol=1.0 if kind == "VORBIS" else 2e-5)
    samples[3000, 1] = torch.nan
    soundfile.write(tmp_path / "nan.wav", samples.numpy(), RATE, subtype="FLOAT")
    whole = (tmp_path / "x.flac").read_bytes()
    (tmp_path / "torn.flac").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.ogg").write_text("not a recording at all")
    (tmp_path / "y.ogg").write_bytes((tmp_path / "x.ogg").read_bytes())
    why = {file.rsplit("/", 1)[1]: reason for file, reason in read_audio_set(tmp_path).skipped}
    assert why.keys() == {"nan.wav", "torn.flac", "text.ogg"} and "no numbers" in why["nan.wav"] and "does not open" in why["text.ogg"]
