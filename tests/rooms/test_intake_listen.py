"""What a network hears is what the published extractors give it: samples and spectrograms against theirs, resampling against sines."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from apportion.errors import DataError, PlanError, Refused
from apportion.intake.listen import AST_HZ, Listen, resampled
from tests.rooms.test_intake_audio import save

RATE = 16000
WAVE = {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "do_normalize": True, "feature_size": 1, "padding_side": "right", "padding_value": 0.0}
WHISPER = {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 80, "chunk_length": 1, "n_fft": 400, "hop_length": 160, "padding_value": 0.0}
AST = {"feature_extractor_type": "ASTFeatureExtractor", "num_mel_bins": 64, "max_length": 100, "mean": -4.0, "std": 4.5, "do_normalize": True}


def clip(samples, *, seed=0, rate=RATE):
    """Three tones, the last far quieter than the first, a hum, an offset and a little noise, fading in and out."""
    time = torch.arange(samples, dtype=torch.float64) / rate
    generator = torch.Generator().manual_seed(seed)
    sound = sum(a * (2 * math.pi * hz * time + seed).sin() for a, hz in ((0.4, 440 + 50 * seed), (0.05, 2500), (0.001, 6100), (0.1, 50)))
    noise = 0.002 * torch.randn(samples, generator=generator, dtype=torch.float64)
    return ((sound + noise) * (math.pi * time / time[-1].clamp(min=1e-9)).sin().abs() + 0.01).float()


CLIPS = [clip(n, seed=seed) for seed, n in enumerate((400, 5000, 15999, 16000, 16001, 30000))]


def theirs(config):
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, config["feature_extractor_type"])(**{key: value for key, value in config.items() if key != "feature_extractor_type"})


@pytest.mark.parametrize("normalise", [True, False])
def test_samples_agree_with_the_published_extractor(normalise):
    config = WAVE | {"do_normalize": normalise, "return_attention_mask": False}
    extractor = theirs(config)
    listen = Listen.from_extractor(extractor.to_dict(), length=16000)
    # Clip by clip: of a batch with no attention mask theirs takes mean and variance over the padding as well, of one recording over its own samples.
    for x in CLIPS:
        wanted = torch.from_numpy(extractor([x[:16000].numpy()], sampling_rate=RATE)["input_values"][0])
        got = listen([(x, RATE)])
        assert got.shape == (1, 16000) and got.dtype == torch.float32 and not got[0, len(x) :].any()
        assert (got[0, : len(x)] - wanted).abs().max() < 1e-4
    masked = extractor([x.numpy() for x in CLIPS], sampling_rate=RATE, padding="max_length", max_length=16000, truncation=True, return_attention_mask=True)
    assert (listen([(x, RATE) for x in CLIPS]) - torch.stack([torch.as_tensor(x) for x in masked["input_values"]])).abs().max() < 1e-4


@pytest.mark.parametrize("bands", [80, 128])
def test_whisper_spectrograms_agree_with_the_published_extractor(bands):
    extractor = theirs(WHISPER | {"feature_size": bands})
    listen = Listen.from_extractor(extractor.to_dict())
    wanted = extractor([x.numpy() for x in CLIPS], sampling_rate=RATE, return_tensors="pt")["input_features"]
    got = listen([(x, RATE) for x in CLIPS])
    assert got.shape == wanted.shape == (6, bands, 100) and got.dtype == torch.float32
    assert (got - wanted).abs().max() < 1e-4


@pytest.mark.filterwarnings("ignore:At least one mel filter")
@pytest.mark.parametrize(("bands", "normalise"), [(64, True), (128, True), (128, False)])
def test_ast_spectrograms_agree_with_the_published_extractor(bands, normalise):
    extractor = theirs(AST | {"num_mel_bins": bands, "do_normalize": normalise})
    listen = Listen.from_extractor(extractor.to_dict())
    wanted = torch.stack([torch.as_tensor(x) for x in extractor([x.numpy() for x in CLIPS], sampling_rate=RATE)["input_values"]])
    got = listen([(x, RATE) for x in CLIPS])
    assert got.shape == wanted.shape == (6, 100, bands) and got.dtype == torch.float32
    assert (got - wanted).abs().max() < 1e-4


def test_quiet_bands_beside_a_loud_tone():
    """Where single precision would lose them; the whole-numbered frequency keeps the window's own leakage small."""
    extractor = theirs(AST)
    time = torch.arange(16000) / RATE
    x = ((2 * math.pi * 1000 * time).sin() * 0.9 + 1e-4 * (2 * math.pi * 5000 * time).sin()).float()
    wanted = torch.as_tensor(extractor(x.numpy(), sampling_rate=RATE)["input_values"][0])
    assert (Listen.from_extractor(AST)([(x, RATE)])[0] - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("config", [WAVE, WHISPER, AST], ids=lambda config: config["feature_extractor_type"])
def test_alone_as_in_company(config):
    listen = Listen.from_extractor(config, length=50 if config is not WAVE else 8000)
    together = listen([(x, RATE) for x in CLIPS])
    assert all(torch.equal(listen([(x, RATE)])[0], row) for x, row in zip(CLIPS, together, strict=True))


@pytest.mark.parametrize(("rate", "wanted"), [(8000, 16000), (44100, 16000), (22050, 16000), (48000, 16000), (11025, 16000), (16000, 8000)])
def test_a_sine_keeps_its_frequency_and_height(rate, wanted):
    hz, x = 1000.0, 0.5 * (2 * math.pi * 1000 * torch.arange(rate) / rate).sin()
    got = resampled(x.float(), rate, wanted)
    assert len(got) == wanted and got.dtype == torch.float32
    middle = got[wanted // 10 : -wanted // 10].double()
    time = torch.arange(wanted, dtype=torch.float64)[wanted // 10 : -wanted // 10] / wanted
    basis = torch.stack(((2 * math.pi * hz * time).sin(), (2 * math.pi * hz * time).cos()), 1)
    sine, cosine = torch.linalg.lstsq(basis, middle[:, None]).solution.flatten().tolist()
    # The same sine, in phase: what is left over beside it is less than a hundredth of it.
    assert abs(sine - 0.5) < 0.005 and abs(cosine) < 0.005 and (middle - basis[:, 0] * 0.5).abs().max() < 0.005
    spectrum = torch.fft.rfft(got.double()).abs()
    assert int(spectrum.argmax()) == hz


def test_what_is_above_half_the_rate_is_gone():
    x = (2 * math.pi * 12000 * torch.arange(48000) / 48000).sin().float()
    assert resampled(x, 48000, 16000)[200:-200].abs().max() < 0.01


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 96000, 500])
@pytest.mark.parametrize("listen", [Listen("wave", RATE, 1600), Listen("whisper", RATE, 10, bands=8, window=400, hop=160)], ids=lambda listen: listen.kind)
def test_reading_a_part_is_reading_the_whole_and_cutting(tmp_path, rate, listen):
    """Of files and of arrays: the filter sees beyond the cut."""
    x = clip(rate, seed=1, rate=rate)
    whole = resampled(x, rate, RATE)[: listen.samples]
    wanted = listen([(whole, RATE)])
    assert (listen([(x, rate)]) - wanted).abs().max() < 1e-6
    file = save(tmp_path / "x.wav", x[:, None], rate=rate, width=4)
    assert (listen([file, str(file)]) - wanted).abs().max() < 1e-5
    assert math.ceil(listen.seconds * rate) < 0.2 * rate


def test_kinds_of_samples():
    listen = Listen("wave", RATE, 2000)
    integers = (CLIPS[1] * 2**15).round().to(torch.int16)
    want = integers[:2000].float() / 2**15
    for given in (integers, integers.numpy(), integers.float() / 2**15, integers.double().numpy() / 2**15):
        assert torch.equal(listen([(given, RATE)])[0], want)


@pytest.mark.parametrize(
    ("recording", "what"),
    [
        ((torch.zeros(2, 800), RATE), r"shape \(2, 800\)"),
        ((torch.zeros(800, dtype=torch.int64), RATE), "int64"),
        ((torch.zeros(800, dtype=torch.complex64), RATE), "complex64"),
        ((torch.zeros(800), 0), "at 0 Hz"),
        ((torch.zeros(800), -8000), "at -8000 Hz"),
        ((torch.zeros(800), 1e4), "no recording"),
        ((torch.tensor([0.0, torch.nan] * 400), RATE), "no numbers"),
        ((torch.zeros(399), RATE), "399 samples"),
        ((torch.zeros(0), RATE), "0 samples"),
        (torch.zeros(800), "no recording"),
        ("nowhere.wav", r"nowhere\.wav"),
        (("a", "b"), "no recording"),
    ],
)
def test_bad_recordings_are_named(recording, what):
    with pytest.raises(DataError, match=what):
        Listen("wave", RATE, 1000)([(CLIPS[0], RATE), recording])
    for nothing in ([], "x.wav"):
        with pytest.raises(DataError, match="no list"):
            Listen("wave", RATE, 1000)(nothing)


def test_a_listen_is_plain_numbers():
    for listen in (Listen.from_extractor(WAVE, length=8000), Listen.from_extractor(WHISPER), Listen.from_extractor(AST)):
        assert Listen(**json.loads(json.dumps(dataclasses.asdict(listen)))) == listen
    assert Listen.from_extractor({"feature_extractor_type": "WhisperFeatureExtractor"}) == Listen("whisper", RATE, 3000, bands=80, window=400, hop=160)
    assert Listen.from_extractor(AST, length=50) == Listen("ast", AST_HZ, 50, True, -4.0, 4.5, bands=64, window=400, hop=160)
    assert Listen.from_extractor(AST | {"do_normalize": False}).std == 1.0 and Listen.from_extractor(AST | {"mean": -4}).mean == -4.0


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({}, "feature_extractor_type None"),
        ({"feature_extractor_type": "ClapFeatureExtractor"}, "ClapFeatureExtractor"),
        ({"feature_extractor_type": ["x"]}, "feature_extractor_type"),
        (WAVE | {"return_attention_mask": True}, "return_attention_mask True"),
        (WAVE | {"padding_side": "left"}, "padding_side 'left'"),
        (WAVE | {"padding_value": 1.0}, r"padding_value 1\.0"),
        (WAVE | {"feature_size": 2}, "feature_size 2"),
        (WAVE | {"do_normalize": 1}, "do_normalize 1"),
        (WAVE | {"sampling_rate": "16000"}, "sampling_rate '16000'"),
        (WHISPER | {"dither": 0.1}, r"dither 0\.1"),
        (WHISPER | {"mel_scale": "htk"}, "mel_scale 'htk'"),
        (WHISPER | {"hop_length": 163}, "hop_length of 163"),
        (AST | {"sampling_rate": 8000}, "sampling_rate 8000"),
        (AST | {"window": "povey"}, "window 'povey'"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(config, what):
    with pytest.raises(Refused, match=what):
        Listen.from_extractor(config, length=8000)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Listen.from_extractor(WAVE),
        lambda: Listen.from_extractor(WHISPER | {"hop_length": 0}),
        lambda: Listen("mfcc", RATE, 100),  # pyright: ignore[reportArgumentType]
        lambda: Listen("wave", RATE, 0),
        lambda: Listen("wave", 0, 100),
        lambda: Listen("wave", RATE, 301 * RATE),
        lambda: Listen("wave", RATE, 100, bands=80),
        lambda: Listen("wave", RATE, 100, mean=1.0),
        lambda: Listen("ast", RATE, 100, True, 0.0, 0.0, bands=80, window=400, hop=160),
        lambda: Listen("ast", RATE, 100, True, math.nan, 1.0, bands=80, window=400, hop=160),
        lambda: Listen("ast", RATE, 100, bands=80, window=400),
        lambda: Listen("whisper", RATE, 1, bands=80, window=400, hop=160),
        lambda: Listen("whisper", RATE, 100, True, bands=80, window=400, hop=160),
    ],
)
def test_numbers_that_do_not_fit_together(make):
    with pytest.raises(PlanError):
        make()
