"""From recordings to what a network takes: mono, resampled, cut or padded, and as samples or log-mel spectrograms, as the published extractors do it."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from apportion.errors import DataError, PlanError, Refused
from apportion.intake.audio import LONGEST_S, LOOK_AHEAD, RATE_LIMIT, SHORTEST_S, decode, heard

Kind = Literal["wave", "whisper", "ast"]
Recording = str | File | tuple[Any, int]  # a file, or (samples (n,) as an array or a tensor, rate in Hz)

VARIANCE_FLOOR = 1e-7  # of wav2vec 2.0
POWER_FLOOR = torch.finfo(torch.float32).eps  # of Kaldi
PREEMPHASIS, LOWEST_HZ = 0.97, 20.0  # of Kaldi
WHISPER_HIGHEST_HZ = 8000.0


@dataclass(frozen=True, slots=True)
class Listen:
    """Recordings in, one float32 tensor out, cut or padded with zeros to `length`.

    "wave": samples, (b, length); with `normalise` of mean 0 and variance 1 over those of the recording (wav2vec 2.0, Baevski et al., 2020, arXiv 2006.11477).
    "whisper": log-mel spectrogram, (b, bands, length), of the padded samples (Radford et al., 2022, arXiv 2212.04356, section 2.2).
    "ast": Kaldi's log filter banks, (b, length, bands), padded after the logarithm; with `normalise` (x - mean) / (2 std) (Gong et al., 2021, arXiv
    2104.01778, section 2.1).
    `window` and `hop` are in samples at `sampling_rate`. What cannot be heard is not read: of a file, as many seconds as `length` holds.
    Raises PlanError for numbers that do not fit together.
    """

    kind: Kind
    sampling_rate: int
    length: int  # samples of a "wave", frames of the others
    normalise: bool = False
    mean: float = 0.0
    std: float = 1.0
    bands: int = 0
    window: int = 0
    hop: int = 0

    def __post_init__(self) -> None:
        spectral, sizes = self.kind in ("whisper", "ast"), (self.bands, self.window, self.hop)
        if not (spectral or self.kind == "wave") or (min(sizes) < 1 if spectral else any(sizes)):
            wanted = 'kind "wave", or "whisper" or "ast" with bands, window and hop'
            raise PlanError(f"kind {self.kind!r} with bands, window and hop of {sizes}", wanted=wanted, do="Correct them.")
        if min(self.sampling_rate, self.length) < 1 or self.sampling_rate > RATE_LIMIT or self.samples > LONGEST_S * self.sampling_rate:
            wanted = f"at most {RATE_LIMIT} Hz and {LONGEST_S:g} s"
            raise PlanError(f"a length of {self.length} at {self.sampling_rate} Hz", wanted=wanted, do="Correct them.")
        if self.kind == "whisper" and (self.normalise or self.samples <= self.window // 2):
            found = f"kind 'whisper' with normalise {self.normalise} and {self.samples} samples"
            raise PlanError(found, wanted="no normalise, and more samples than half a window", do="Correct them.")
        if not (math.isfinite(self.mean) and 0 < self.std < math.inf) or ((self.mean, self.std) != (0, 1) and not (self.kind == "ast" and self.normalise)):
            wanted = 'finite ones with std above 0, and 0 and 1 unless kind "ast" normalises'
            raise PlanError(f"mean {self.mean} and std {self.std}", wanted=wanted, do="Correct them.")

    @classmethod
    def from_extractor(cls, config: Mapping[str, Any], *, length: int | None = None) -> Listen:
        """What a preprocessor_config.json says. `length` replaces that of the file, which a "wave" has not. Raises Refused, naming the entry not understood."""
        name, found = config.get("feature_extractor_type"), _understood(config)
        if name == "Wav2Vec2FeatureExtractor":
            if length is None:
                raise PlanError("no length for a network of raw samples", wanted="how many it is fed", do="Pass length=, such as that of a second or two.")
            return cls("wave", found["sampling_rate"], length, normalise=found["do_normalize"])
        if name == "WhisperFeatureExtractor":
            rate, hop = found["sampling_rate"], found["hop_length"]
            frames, rest = divmod(found["chunk_length"] * rate, hop) if hop > 0 else (0, 0)
            if rest:
                raise Refused(f"{name} with a hop_length of {hop}", wanted="a whole number of them in chunk_length", do="Make a Listen(...) by hand.")
            return cls("whisper", rate, frames if length is None else length, bands=found["feature_size"], window=found["n_fft"], hop=hop)
        normalise, frames = found["do_normalize"], found["max_length"] if length is None else length
        mean, std = (found["mean"], found["std"]) if normalise else (0.0, 1.0)
        return cls("ast", AST_HZ, frames, normalise, mean, std, bands=found["num_mel_bins"], window=AST_HZ // 40, hop=AST_HZ // 100)

    @property
    def samples(self) -> int:
        """That fill `length`."""
        if self.kind == "wave":
            return self.length
        return self.length * self.hop if self.kind == "whisper" else (self.length - 1) * self.hop + self.window

    @property
    def seconds(self) -> float:
        """Of a recording that are heard, with what a resampling filter wants beyond them."""
        return (self.samples + LOOK_AHEAD) / self.sampling_rate

    def __call__(self, recordings: Sequence[Recording]) -> Tensor:
        """Floats count as -1..1, 16-bit integers as parts of 2^15. Raises DataError naming the file or row."""
        if isinstance(recordings, str | File) or not len(recordings):
            raise DataError("no list of recordings", wanted="at least one, in a list", do="Put it into a list.")
        return torch.stack([self._features(self._samples(recording, row)) for row, recording in enumerate(recordings)])

    def _samples(self, recording: Recording, row: int) -> Tensor:
        """Those heard, at the network's rate, at most `samples`."""
        of_file = isinstance(recording, str | File)
        x, rate = decode(recording, seconds=self.seconds) if of_file else _given(recording, row)
        x = resampled(x[: heard(self.seconds, rate)], rate, self.sampling_rate)[: self.samples]
        least = self.window if self.kind == "ast" else min(self.samples, math.ceil(SHORTEST_S * self.sampling_rate))
        if len(x) < least:
            found = f"{recording if of_file else f'row {row}'}: {len(x)} samples at {self.sampling_rate} Hz"
            raise DataError(found, wanted=f"at least {least}", do="Give a longer recording, or leave it out.")
        return x

    def _features(self, x: Tensor) -> Tensor:
        if self.kind == "wave":
            x = (x - x.mean()) / (x.var(correction=0) + VARIANCE_FLOOR).sqrt() if self.normalise else x
            return F.pad(x, (0, self.length - len(x)))
        if self.kind == "whisper":
            return _log_mel(F.pad(x, (0, self.samples - len(x))), self.sampling_rate, self.bands, self.window, self.hop)
        banks = _log_banks(x, self.sampling_rate, self.bands, self.window, self.hop)
        return (F.pad(banks, (0, 0, 0, self.length - len(banks))) - self.mean) / (2 * self.std if self.normalise else 1)


AST_HZ = 16000  # the published extractors agree at this rate alone
IDLE = frozenset({"feature_extractor_type", "processor_class"})
ZEROS_AFTER = {"padding_side": "right", "padding_value": 0}
# Of each extractor: entries and what they are where the file is silent, entries that must be so, entries that follow from others or change nothing.
EXTRACTORS: dict[str, tuple[dict[str, Any], dict[str, Any], frozenset[str]]] = {
    "Wav2Vec2FeatureExtractor": (
        {"sampling_rate": 16000, "do_normalize": True},
        {**ZEROS_AFTER, "feature_size": 1, "return_attention_mask": False},
        frozenset(),
    ),
    "WhisperFeatureExtractor": (
        {"sampling_rate": 16000, "feature_size": 80, "hop_length": 160, "n_fft": 400, "chunk_length": 30},
        {**ZEROS_AFTER, "dither": 0},
        frozenset({"return_attention_mask", "n_samples", "nb_max_frames", "mel_filters"}),
    ),
    "ASTFeatureExtractor": (
        {"num_mel_bins": 128, "max_length": 1024, "do_normalize": True, "mean": -4.2677393, "std": 4.5689974},
        {"sampling_rate": AST_HZ},
        frozenset({*ZEROS_AFTER, "feature_size", "return_attention_mask"}),
    ),
}


def _understood(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that count, each there and of its type."""
    name = config.get("feature_extractor_type")
    if not isinstance(name, str) or name not in EXTRACTORS:
        raise Refused(f"feature_extractor_type {name!r}", wanted=f"one of {', '.join(EXTRACTORS)}", do="Make a Listen(...) by hand.")
    defaults, fixed, idle = EXTRACTORS[name]
    if unknown := sorted(config.keys() - defaults.keys() - fixed.keys() - idle - IDLE):
        raise Refused(f"{name} with {unknown[0]} {config[unknown[0]]!r}", wanted="entries that are known", do="Remove it if it changes nothing.")
    for key, value in fixed.items():
        if config.get(key, value) != value:
            raise Refused(f"{name} with {key} {config[key]!r}", wanted=repr(value), do="Set it so if the network shall be fed that way.")
    for key, value in defaults.items():
        entry = config.get(key, value)
        if type(entry) is not type(value) and not (isinstance(value, float) and type(entry) is int):
            raise Refused(f"{name} with {key} {entry!r}", wanted=f"a {type(value).__name__}", do="Correct it.")
    return {**defaults, **config}


def resampled(x: Tensor, rate: int, wanted: int) -> Tensor:
    """(n,) at another rate, by a polyphase filter (scipy's, Kaiser window): (ceil(n * wanted / rate),)."""
    if rate == wanted:
        return x
    from scipy.signal import resample_poly  # a third of a second that recordings at the right rate do not pay

    common = math.gcd(rate, wanted)
    return torch.from_numpy(resample_poly(x.numpy(), wanted // common, rate // common))


def _given(recording: Any, row: int) -> tuple[Tensor, int]:
    try:
        waveform, rate = recording
        x, rate = torch.as_tensor(waveform), operator.index(rate)
    except (TypeError, ValueError, RuntimeError) as error:
        found = f"row {row}: a {type(recording).__name__} that is no recording ({str(error)[:100]})"
        raise DataError(found, wanted="a file, or (samples, rate)", do="Give recordings: this model hears them.") from error
    if x.ndim != 1 or not (x.is_floating_point() or x.dtype == torch.int16) or not 0 < rate <= RATE_LIMIT:
        found = f"row {row}: samples of shape {tuple(x.shape)} and type {x.dtype} at {rate} Hz"
        raise DataError(found, wanted=f"(n,) of floats or int16, at up to {RATE_LIMIT} Hz", do="Convert them; the mean of channels is one.")
    if not x.isfinite().all():
        raise DataError(f"row {row}: samples that are no numbers", wanted="finite ones", do="Correct or remove it.")
    return (x.float() if x.is_floating_point() else x.float().div_(2**15)), rate


def _log_mel(x: Tensor, rate: int, bands: int, window: int, hop: int) -> Tensor:
    """(bands, n / hop): decimal logarithm of the power in Slaney's bands, at most 8 below its maximum, shifted and scaled."""
    spectrum = torch.stft(x, window, hop, window=torch.hann_window(window), return_complex=True)[:, :-1]
    edges = _slaney_hz(torch.linspace(0, _slaney_mel(WHISPER_HIGHEST_HZ), bands + 2, dtype=torch.float64))
    bins = torch.linspace(0, rate // 2, window // 2 + 1, dtype=torch.float64)
    weight = _triangles(edges, bins) * 2 / (edges[2:] - edges[:-2])  # every band of one area
    log = (weight.T.float() @ spectrum.abs().square()).clamp(min=1e-10).log10()
    return (log.maximum(log.max() - 8) + 4) / 4


def _log_banks(x: Tensor, rate: int, bands: int, window: int, hop: int) -> Tensor:
    """(frames, bands): logarithm of the power in Kaldi's bands; whole frames only, each without its mean and with its high tones raised.

    Double precision within: near a loud tone the quiet bands are lost to the rounding of single precision.
    """
    frames = x.double().unfold(0, window, hop)
    frames = frames - frames.mean(1, keepdim=True)
    before = F.pad(frames, (1, -1))  # what stands before the first sample is of no account: the window begins with 0
    points = 1 << (window - 1).bit_length()
    power = torch.fft.rfft((frames - PREEMPHASIS * before) * torch.hann_window(window, periodic=False, dtype=torch.float64), points).abs().square()
    edges = torch.linspace(_kaldi_mel(LOWEST_HZ), _kaldi_mel(rate // 2), bands + 2, dtype=torch.float64)
    bins = 1127 * (1 + torch.arange(points // 2 + 1, dtype=torch.float64) * rate / points / 700).log()
    return (power @ _triangles(edges, bins)).clamp(min=POWER_FLOOR).log().float()


def _triangles(edges: Tensor, bins: Tensor) -> Tensor:
    """(bins, bands): band i rises from 0 at edges[i] to 1 at edges[i + 1] and falls to 0 at edges[i + 2]."""
    low, peak, high = edges[:-2], edges[1:-1], edges[2:]
    at = bins[:, None]
    return torch.minimum((at - low) / (peak - low), (high - at) / (high - peak)).clamp(min=0)


def _kaldi_mel(hz: float) -> float:
    return 1127 * math.log(1 + hz / 700)


def _slaney_mel(hz: float) -> float:
    """Linear up to 1 kHz, which is 15, logarithmic above (Slaney, Auditory Toolbox, 1998)."""
    return 3 * hz / 200 if hz < 1000 else 15 + 27 * math.log(hz / 1000) / math.log(6.4)


def _slaney_hz(mel: Tensor) -> Tensor:
    return torch.where(mel < 15, 200 * mel / 3, 1000 * ((mel - 15) * (math.log(6.4) / 27)).exp())
