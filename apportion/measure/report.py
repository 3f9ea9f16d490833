"""One page that a person reads: plain data in, a single HTML file out that asks for nothing from outside."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path as File
from typing import Any, Literal

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from apportion.errors import DataError
from apportion.files import write_atomic
from apportion.measure.pictures import Image, Point, check, png, reliability, standing, tradeoff

Text = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Summary:
    """One model as a whole. Accuracy (or the task's metric) in percent with its interval, milliseconds per input at each batch size, peak of activations."""

    name: str
    accuracy: float
    accuracy_interval: tuple[float, float]
    gmacs: float
    latency_ms: Mapping[int, float]
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class PathRow:
    """One served path: accuracy in percent when every input takes it, share (0..1) of inputs that do; realisation is None for the full path."""

    name: str
    gmacs: float
    latency_ms: Mapping[int, float]
    accuracy: float
    share: float
    realisation: float | None = None


@dataclass(frozen=True, slots=True)
class Picture:
    """One input with its caption: bytes (height, width, channels)."""

    image: Image
    caption: str
    group: Literal["easiest", "hardest", "merged"]


@dataclass(frozen=True, slots=True)
class Passage:
    """One text with its caption: pieces in order, each with whether it is marked."""

    pieces: tuple[tuple[str, bool], ...]
    caption: str
    group: Literal["easiest", "hardest", "merged"]


@dataclass(frozen=True, slots=True)
class Decision:
    """How the controller decides: (stated chance, observed share, samples) of its promises, the share of each path among inputs from those it holds
    easiest to those it holds hardest (equal parts), and its mean cost between what no controller can beat and what needs none, as shares of the full path."""

    reliability: tuple[tuple[float, float, int], ...]
    by_complexity: tuple[tuple[float, ...], ...]
    costs: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes of one kind, and how they were come by."""

    name: str
    bytes: int
    how: str


@dataclass(frozen=True, slots=True)
class Report:
    """All that the page shows. Raises DataError, naming the entry, on a number that is not finite or parts that do not fit together.

    `summary` begins with the dense model, the adaptive one second, rivals after; `paths` are cheapest first, full last;
    `shares` gives for each budget (its name as the user wrote it) the share of inputs on each path.
    """

    title: str
    summary: tuple[Summary, ...]
    paths: tuple[PathRow, ...]
    points: tuple[Point, ...]
    shares: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    decision: Decision | None = None
    memory: tuple[Held, ...] = ()
    pictures: tuple[Picture, ...] = ()
    passages: tuple[Passage, ...] = ()
    notes: tuple[str, ...] = ()
    conditions: Mapping[str, Text] = field(default_factory=dict)
    metric: str = "accuracy"  # what is in percent

    def __post_init__(self) -> None:
        for where, value in _numbers(self, "report"):
            if not math.isfinite(value):
                raise DataError(f"{where} = {value}", wanted="a finite number", do="Measure it again, or leave the row out.")
        if len(self.summary) < 2 or not self.paths or not self.points:
            raise DataError(
                f"{len(self.summary)} summary rows, {len(self.paths)} paths, {len(self.points)} points",
                wanted="dense and adaptive, one path, one point",
                do="Measure these.",
            )
        batches = {tuple(row.latency_ms) for row in (*self.summary, *self.paths)}
        if len(batches) != 1 or batches == {()}:
            raise DataError(f"times at batch sizes {sorted(batches)}", wanted="the same ones in every row", do="Measure each row at the same batch sizes.")
        for budget, shares in {**self.shares, "the path table": tuple(row.share for row in self.paths)}.items():
            if len(shares) != len(self.paths) or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
                raise DataError(f"shares {shares} at {budget}", wanted=f"{len(self.paths)} shares that add up to 1", do="Count every input once.")
        for picture in self.pictures:
            check(picture.image)


def _numbers(value: Any, where: str) -> Iterator[tuple[str, float]]:
    """Every number in the data with the place it stands at; pixels are bytes and need no look."""
    if is_dataclass(value) and not isinstance(value, type):
        for entry in fields(value):
            yield from _numbers(getattr(value, entry.name), f"{where}.{entry.name}")
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _numbers(entry, f"{where}[{key!r}]")
    elif isinstance(value, tuple):
        for index, entry in enumerate(value):
            yield from _numbers(entry, f"{where}[{index}]")
    elif isinstance(value, int | float | np.number):
        yield where, float(value)


def decimals(largest: float) -> int:
    """Digits behind the point that show four of the largest figure: the GMACs of a small network are more than zeros."""
    return max(1, 3 - math.floor(math.log10(largest))) if largest > 0 else 1


def report_dict(report: Report) -> dict[str, Any]:
    """The same as plain JSON values; a picture is told by its size, group and caption."""
    plain = asdict(report)
    for picture in plain["pictures"]:
        picture["image"] = list(picture["image"].shape)
    return plain


def write_report(file: str | os.PathLike[str], report: Report) -> None:
    """Write the page to `file` in one piece, or to `report.html` in it where `file` is a folder that exists."""
    target = File(file) / "report.html" if File(file).is_dir() else File(file)
    write_atomic(target, render(report))


def render(report: Report) -> str:
    """The whole page; every text from outside is escaped."""
    shelf = Environment(loader=FileSystemLoader(File(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    batches = tuple(report.summary[0].latency_ms)
    return shelf.get_template("report.html.jinja").render(
        report=report,
        batches=batches,
        digits=decimals(max(row.gmacs for row in (*report.summary, *report.paths))),
        headlines=headlines(report),
        charts=[Markup(svg) for svg in _charts(report, batches[-1])],
        decisions=[Markup(svg) for svg in _decisions(report.decision)],
        colours=ramp(len(report.paths)),
        groups=[(group, [picture for picture in report.pictures if picture.group == group]) for group in ("easiest", "hardest", "merged")],
        texts=[(group, [passage for passage in report.passages if passage.group == group]) for group in ("easiest", "hardest", "merged")],
        png=png,
    )


def _charts(report: Report, batch: int) -> Iterator[str]:
    """Work first, then time; the time only where it was measured."""
    yield tradeoff(report.points, unit="gmacs", axis="GMACs per input", metric=report.metric)
    if any(point.latency_ms is not None for point in report.points):
        yield tradeoff(
            report.points,
            unit="latency_ms",
            axis=f"ms per input, batch {batch}",
            metric=report.metric,
        )


def _decisions(decision: Decision | None) -> Iterator[str]:
    if decision is not None:
        yield standing(decision.costs, title="Mean cost of this model between its bounds; numbers are on the marks")
        yield reliability(decision.reliability, title="Observed share of right answers against the stated chance")


@dataclass(frozen=True, slots=True)
class Headline:
    """One big number with what it says."""

    figure: str
    says: str
    good: bool


def headlines(report: Report) -> list[Headline]:
    """The adaptive model against the dense one, in four numbers; a loss is shown as one."""
    dense, ours = report.summary[:2]
    batch = tuple(dense.latency_ms)[-1]
    points, work = ours.accuracy - dense.accuracy, ours.gmacs / dense.gmacs - 1
    speed, memory = dense.latency_ms[batch] / ours.latency_ms[batch], ours.peak_bytes / dense.peak_bytes - 1
    low, high = ours.accuracy_interval
    return [
        Headline(f"{_signed(points, 2)}", f"points of {report.metric}: {ours.accuracy:.2f} % ({low:.2f} to {high:.2f})", points >= 0 or dense.accuracy <= high),
        Headline(f"{_signed(100 * work, 1)} %", f"multiply-adds: {ours.gmacs:.3g} of {dense.gmacs:.3g} GMACs per input", work < 0),
        Headline(f"{speed:.2f}×", f"as fast at batch {batch}: {ours.latency_ms[batch]:.2f} ms per input", speed > 1),  # noqa: RUF001
        Headline(f"{_signed(100 * memory, 1)} %", f"peak memory of activations: {ours.peak_bytes / 2**20:.1f} MiB", memory <= 0),
    ]


def _signed(value: float, digits: int) -> str:
    """With a true minus sign, and no sign where it rounds to nothing."""
    rounded = round(value, digits) + 0.0
    return f"{'−' if rounded < 0 else '+' if rounded else ''}{abs(rounded):.{digits}f}"  # noqa: RUF001


def ramp(steps: int) -> list[tuple[str, str]]:
    """Ground and ink for each path, from pale (cheapest) to deep blue (full): one hue, told apart by lightness alone."""
    pale, deep = np.array([205, 226, 242.0]), np.array([8, 60, 110.0])
    shades = [pale + (deep - pale) * (step / max(1, steps - 1)) for step in range(steps)]
    return [("#" + "".join(f"{round(v):02x}" for v in shade), "#fff" if shade.mean() < 126 else "#04101c") for shade in shades]
