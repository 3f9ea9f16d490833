"""The page shows the data and nothing else, and asks for nothing from outside."""

from __future__ import annotations

import base64
import dataclasses
import html.parser
import io
import json
import math
import re

import numpy as np
import pytest
from matplotlib.image import imread

from apportion.errors import DataError
from apportion.measure.pictures import Point, merge_map, png, tradeoff
from apportion.measure.report import Held, PathRow, Picture, Report, Summary, headlines, ramp, render, report_dict, write_report

EVIL = '<script>alert("x")</script>$\\frac{'


def make() -> Report:
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8, 1)
    return Report(
        title=EVIL,
        summary=(
            Summary("dense", 81.4237, (81.08, 81.76), 4.6111, {1: 45.128, 32: 32.642}, 107_000_001),
            Summary("adaptive", 81.2019, (80.86, 81.54), 2.4133, {1: 27.417, 32: 19.404}, 62_300_003),
        ),
        paths=(PathRow("short", 1.3127, {1: 17.06, 32: 11.11}, 70.21, 0.625, 0.9413), PathRow(EVIL, 4.6111, {1: 45.128, 32: 32.642}, 81.4237, 0.375)),
        points=(Point("dense", 81.42, 4.61, 32.6, "dense"), Point("ours", 81.2, 2.41, 19.4, EVIL, (80.86, 81.54)), Point("oracle", 84.0, 2.0)),
        shares={EVIL: (0.625, 0.375), "0.9x": (0.0, 1.0)},
        memory=(Held("weights", 23_456_789, EVIL), Held("activations", 34_567_891, "followed")),
        pictures=(Picture(grey, EVIL, "easiest"), Picture(grey.repeat(3, 2), "hard", "hardest")),
        notes=(EVIL,),
        conditions={"device": "a CPU", "samples": 5000},
    )


class Reader(html.parser.HTMLParser):
    """Collects machine-readable values, their text, tags and alternative texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.data: list[tuple[float, str]] = []
        self.tags: list[str] = []
        self.alts: list[str | None] = []
        self.value: float | None = None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        found = dict(attrs)
        if tag == "data":
            self.value = float(found["value"] or "nan")
        if tag in ("img", "svg"):
            self.alts.append(found.get("alt") or found.get("aria-label"))

    def handle_data(self, data):
        if self.value is not None:
            self.data.append((self.value, data))
            self.value = None


@pytest.fixture(scope="module")
def page() -> str:
    return render(make())


def test_the_page_stands_alone(page):
    assert "http://" not in page and "https://" not in page and "//" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)
    assert not re.search(r"<(link|script|iframe|object)|@import|xmlns", page)
    for uri in re.findall(r"base64,([A-Za-z0-9+/=]+)", page):
        assert b"http" not in base64.b64decode(uri)
    assert all(target.startswith(("#", "data:")) for target in re.findall(r'(?:href|src)="([^"]*)"', page))


def test_text_from_outside_is_escaped(page):
    tags = Reader(page).tags
    assert "script" not in tags and "alert(&#34;x&#34;)" in page


def test_every_picture_has_a_text(page):
    alts = Reader(page).alts
    assert len(alts) == 4 and all(alts) and EVIL in alts


def test_every_figure_equals_the_data(page):
    report, shown = make(), Reader(page).data
    wanted: list[float] = []
    for row in report.summary:
        wanted += [row.accuracy, *row.accuracy_interval, row.gmacs, *row.latency_ms.values(), row.peak_bytes]
    wanted += [held.bytes for held in report.memory]
    for row in report.paths:
        wanted += [row.accuracy, row.gmacs, *row.latency_ms.values(), row.share, *([] if row.realisation is None else [row.realisation])]
    assert [value for value, _ in shown] == wanted
    for value, text in shown:
        scale = 1 / 2**20 if value > 1e6 else 100 if text in ("62.5", "37.5") else 1
        assert abs(float(text) - value * scale) <= 0.5 * 10.0 ** -len(text.split(".")[1]) + 1e-9
    assert shown[0][1] == "81.42" and shown[6][1] == "102.0"


def test_headlines_tell_gains_and_losses():
    report = make()
    assert [each.figure for each in headlines(report)] == ["−0.22", "−47.7 %", "1.68×", "−41.8 %"]  # noqa: RUF001
    assert all(each.good for each in headlines(report))
    slower = dataclasses.replace(report.summary[1], latency_ms={1: 50.0, 32: 40.0}, accuracy_interval=(80.0, 81.3))
    told = headlines(dataclasses.replace(report, summary=(report.summary[0], slower)))
    assert [each.good for each in told] == [False, True, False, True]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda r: {"points": (Point("ours", math.nan, 1.0),)}, r"points\[0\].accuracy"),
        (lambda r: {"summary": (r.summary[0], dataclasses.replace(r.summary[1], latency_ms={1: math.inf, 32: 1.0}))}, r"summary\[1\].latency_ms\[1\]"),
        (lambda r: {"paths": (r.paths[0], dataclasses.replace(r.paths[1], realisation=math.nan))}, r"paths\[1\].realisation"),
        (lambda r: {"paths": (r.paths[0], dataclasses.replace(r.paths[1], latency_ms={8: 1.0}))}, "batch sizes"),
        (lambda r: {"shares": {"0.5x": (0.5, 0.4)}}, "0.5x"),
        (lambda r: {"shares": {"0.5x": (1.0,)}}, "0.5x"),
        (lambda r: {"summary": r.summary[:1]}, "1 summary"),
        (lambda r: {"conditions": {"rate": float("nan")}}, "rate"),
        (lambda r: {"pictures": (Picture(np.zeros((3, 8, 8), np.float32), "x", "hardest"),)}, "float32"),  # type: ignore[arg-type]
    ],
)
def test_senseless_data_is_refused(change, named):
    report = make()
    with pytest.raises(DataError, match=named):
        dataclasses.replace(report, **change(report))


def test_json_and_file(tmp_path, page):
    plain = json.loads(json.dumps(report_dict(make()), allow_nan=False))
    assert plain["summary"][1]["gmacs"] == 2.4133 and plain["pictures"][0]["image"] == [8, 8, 1]
    write_report(tmp_path, make())
    write_report(tmp_path / "new" / "page.html", make())
    assert (tmp_path / "report.html").read_text() == (tmp_path / "new" / "page.html").read_text() == page


def test_a_picture_in_time_needs_times():
    with pytest.raises(DataError, match="latency_ms"):
        tradeoff([Point("ours", 80.0, 1.0)], unit="latency_ms", axis="ms")
    report = dataclasses.replace(make(), points=(Point("ours", 80.0, 1.0),))
    assert Reader(render(report)).tags.count("svg") == 1


def test_pictures_survive_as_they_are():
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    back = imread(io.BytesIO(base64.b64decode(png(image).split(",")[1])), format="png")
    assert np.array_equal((back[..., :3] * 255).round().astype(np.uint8), image)


def test_ramp_darkens_and_stays_readable():
    def luminance(colour: str) -> float:
        full = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
        linear = [(v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4) for v in (int(full[i : i + 2], 16) / 255 for i in (0, 2, 4))]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for steps in (1, 2, 6, 16):
        grounds = [luminance(ground) for ground, _ in ramp(steps)]
        assert grounds == sorted(grounds, reverse=True)
        for ground, ink in ramp(steps):
            light, dark = sorted((luminance(ground), luminance(ink)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) > 4


def test_merge_map_fills_groups_with_their_mean():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    origin = [0, 1, 2, 3, 1]  # prefix, then patches: the first and the last merged
    drawn = merge_map(image, origin, (2, 2), 1, side=32)
    mean = np.concatenate([image[:16, :16].reshape(-1, 3), image[16:, 16:].reshape(-1, 3)]).mean(0).round()
    assert drawn.shape == image.shape and (drawn[1:15, 1:15] == mean).all() and (drawn[17:, 17:] == mean).all()
    assert np.array_equal(drawn[1:16, 17:], image[1:16, 17:]) and not np.array_equal(drawn[:, 16], image[:, 16])
    assert np.array_equal(merge_map(image, [0, 5, 5, 5, 5], (2, 2), 1)[0, 0], image.reshape(-1, 3).mean(0).round())


def test_merge_map_blows_up_small_pictures_and_refuses_misfits():
    small = np.zeros((8, 8, 1), np.uint8)
    assert merge_map(small, list(range(17)), (4, 4), 1).shape == (192, 192, 3)
    for origin, grid in (([0, 1, 2], (4, 4)), (list(range(10)), (3, 3))):
        with pytest.raises(DataError, match="grid"):
            merge_map(small, origin, grid, 1)
