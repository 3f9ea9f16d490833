"""Pictures for the report: accuracy against cost as SVG, and merged tokens drawn on the image."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from apportion.errors import DataError

Image = NDArray[np.uint8]
Kind = Literal["dense", "static", "hull", "ours", "random", "cascade", "oracle"]


@dataclass(frozen=True, slots=True)
class Point:
    """One operating point: accuracy in percent, cost per input; a point without a time is left out of that picture."""

    kind: Kind
    accuracy: float
    gmacs: float
    latency_ms: float | None = None
    label: str = ""  # a short word written beside it, such as a budget
    interval: tuple[float, float] | None = None  # of the accuracy


# Okabe and Ito's colours, and a shape and a dash for each, so that none is told by its colour alone. The later are drawn on top.
STYLES: dict[Kind, tuple[str, dict[str, Any]]] = {
    "oracle": ("oracle (knows the answer)", {"color": "#009E73", "marker": "D", "ls": (0, (1, 1.5)), "ms": 5, "lw": 1.8}),
    "hull": ("hull (best static mix)", {"color": "#6B7280", "ls": (0, (5, 3)), "lw": 1.4}),
    "static": ("static paths", {"color": "#6B7280", "marker": "s", "ls": "none", "ms": 6, "mfc": "white", "mew": 1.5}),
    "random": ("random policy", {"color": "#D55E00", "marker": "x", "ls": (0, (3, 2, 1, 2)), "ms": 6, "mew": 1.7, "lw": 1.2}),
    "cascade": ("confidence cascade", {"color": "#CC79A7", "marker": "^", "ls": (0, (4, 1.5)), "ms": 6.5, "lw": 1.4}),
    "dense": ("dense model", {"color": "#111827", "marker": "*", "ls": "none", "ms": 15, "mec": "white", "mew": 0.8}),
    "ours": ("adaptive (this model)", {"color": "#0072B2", "marker": "o", "ls": "-", "ms": 7.5, "lw": 2.6, "mec": "white", "mew": 1.2}),
}

_CANVAS: dict[Any, Any] = {
    "font.size": 11,
    "svg.fonttype": "none",  # letters stay letters: they can be read aloud and searched
    "svg.hashsalt": "apportion",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9CA3AF",
    "axes.labelcolor": "#374151",
    "xtick.color": "#4B5563",
    "ytick.color": "#4B5563",
}


def tradeoff(points: Sequence[Point], *, unit: Literal["gmacs", "latency_ms"], axis: str, metric: str = "accuracy") -> str:
    """Accuracy (or another metric) against one cost as an `<svg>` element that needs nothing from outside; every mark carries its numbers as a tooltip.

    Raises DataError where no point has that cost.
    """
    rows = [(point, float(cost)) for point in points if (cost := getattr(point, unit)) is not None]
    if not rows:
        raise DataError(f"no point with {unit}", wanted="one at least", do="Measure it, or leave the picture out.")
    tips: dict[str, str] = {}
    with matplotlib.rc_context(_CANVAS):
        figure = Figure(figsize=(6.4, 5.8), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(color="#E5E7EB", lw=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, pad=6)
        for order, (kind, (name, style)) in enumerate(STYLES.items()):
            mine = sorted((row for row in rows if row[0].kind == kind), key=lambda row: row[1])
            if not mine:
                continue
            x, y = [cost for _, cost in mine], [point.accuracy for point, _ in mine]
            axes.plot(x, y, label=name, zorder=3 + order, **style)
            for point, cost in mine:
                if point.interval is not None:
                    axes.plot([cost, cost], point.interval, color=style["color"], lw=5, alpha=0.22, zorder=2.5, solid_capstyle="butt")
                if kind != "hull":
                    gid = f"{unit}-{len(tips)}"
                    axes.plot([cost], [point.accuracy], "o", ms=16, alpha=0, zorder=30, gid=gid)
                    tips[gid] = f"{name}{point.label and f' {point.label}'}: {point.accuracy:.2f} % at {cost:.4g} {'GMACs' if unit == 'gmacs' else 'ms'}"
                if point.label:
                    _beside(axes, point, cost, style["color"])
        axes.margins(x=0.07, y=0.1)
        axes.set_xlabel(axis, labelpad=8)
        axes.set_ylabel(f"{metric}, %", labelpad=8)
        axes.xaxis.set_major_locator(MaxNLocator(7))
        axes.yaxis.set_major_locator(MaxNLocator(7))
        figure.legend(reverse=True, loc="outside lower center", ncols=2, frameon=False, fontsize=10, handlelength=2.6, labelspacing=0.45)
        return _inline(_svg(figure), title=f"{metric} in percent against {axis}; numbers are in the tables", tips=tips)


def reliability(bins: Sequence[tuple[float, float, int]], *, title: str) -> str:
    """What was promised against what came true, as an `<svg>` element: one disc for each bin (stated chance, observed share, samples), area by samples.

    After the reliability diagrams of Guo et al., 2017 (arXiv 1706.04599).
    """
    most = max(count for *_, count in bins)
    tips: dict[str, str] = {}
    with matplotlib.rc_context(_CANVAS):
        figure, axes = _square()
        axes.plot([0, 100], [0, 100], color="#6B7280", ls=(0, (5, 3)), lw=1.4)
        for number, (said, seen, count) in enumerate(bins):
            gid = f"bin-{number}"
            axes.plot([100 * said], [100 * seen], "o", ms=4 + 16 * (count / most) ** 0.5, color="#0072B2", alpha=0.75, mec="white", gid=gid)
            tips[gid] = f"said {100 * said:.1f} %, right {100 * seen:.1f} % of {count}"
        axes.set(xlim=(-2, 102), ylim=(-2, 102), xlabel="stated chance of being right, %", ylabel="right, %")
        return _inline(_svg(figure), title=title, tips=tips)


def standing(costs: Mapping[str, float], *, title: str) -> str:
    """Mean costs as shares of the full path on one line each, dearest on top, as an `<svg>` element."""
    tips: dict[str, str] = {}
    with matplotlib.rc_context(_CANVAS):
        figure, axes = _square()
        for row, (name, cost) in enumerate(costs.items()):
            ours, gid = name == "this model", f"cost-{row}"
            axes.plot([0, 100 * cost], [row, row], color="#0072B2" if ours else "#D1D5DB", lw=2.6 if ours else 1.6)
            axes.plot([100 * cost], [row], "o", ms=9, color="#0072B2" if ours else "#6B7280", gid=gid)
            axes.annotate(f"{100 * cost:.1f} %", (100 * cost, row), textcoords="offset points", xytext=(0, 9), ha="center", fontsize=10)
            tips[gid] = f"{name}: {100 * cost:.2f} % of the full path"
        axes.set_yticks(range(len(costs)), labels=list(costs))
        axes.set(xlim=(0, 110), ylim=(-0.6, len(costs) - 0.4), xlabel="mean cost, % of the full path")
        return _inline(_svg(figure), title=title, tips=tips)


def _square() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(color="#E5E7EB", lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=6)
    return figure, axes


def _svg(figure: Figure) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return out.getvalue()


def _beside(axes: Axes, point: Point, cost: float, colour: str) -> None:
    """Our budgets stand above their line, where only the oracle is; other words below theirs."""
    ours = point.kind == "ours"
    note = axes.annotate(
        point.label,
        (cost, point.accuracy),
        textcoords="offset points",
        xytext=(-5, 9) if ours else (0, -18),
        ha="right" if ours else "center",
        color=colour,
        weight="bold" if ours else "normal",
        zorder=20,
    )
    note.set_parse_math(False)


def _inline(svg: str, *, title: str, tips: dict[str, str]) -> str:
    """The bare element: no prologue, no addresses of name spaces (HTML knows them), no fixed size."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{html.escape(title)}">', svg, count=1)
    for gid, tip in tips.items():
        svg = svg.replace(f'<g id="{gid}">', f'<g class="tip"><title>{html.escape(tip)}</title>')
    return svg


def png(image: Image) -> str:
    """A data URI. Raises DataError where the picture is not (height, width, 1 or 3 channels) of bytes."""
    check(image)
    out = io.BytesIO()
    pixels = np.broadcast_to(image, (*image.shape[:2], 3))
    imsave(out, pixels, format="png", metadata={"Software": "apportion"})  # else matplotlib signs with an address
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def check(image: Any) -> None:
    """Raises DataError unless `image` is (height, width, 1 or 3) uint8."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3) or not image.size:
        found = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise DataError(f"a picture of {found}", wanted="uint8 (height, width, 1 or 3)", do="Undo the normalisation and permute to HWC first.")


def merge_map(image: Image, origin: Sequence[int] | NDArray[np.integer], grid: tuple[int, int], prefix: int, *, side: int = 192) -> Image:
    """The image with each group of merged source patches filled with its mean colour and outlined; a patch that stayed alone keeps its pixels.

    After the pictures of Bolya et al., 2023 (arXiv 2210.09461, figure 4). `image` (height, width, channels) bytes, `origin` (n0,) where each
    source token went, the first `prefix` of which are no patches; `grid` (rows, columns) of patches. Small pictures are blown up by a whole factor
    until its shorter side has `side` pixels. Raises DataError where these do not fit together.
    """
    check(image)
    rows, columns = grid
    (height, width), group = image.shape[:2], np.asarray(origin)
    if min(grid) < 1 or height % rows or width % columns or group.shape != (prefix + rows * columns,):
        raise DataError(
            f"picture {height}x{width}, grid {rows}x{columns}, {group.shape} origins with prefix {prefix}",
            wanted="whole patches and one origin for each token",
            do="Give the origin of one sample and the grid of its tokeniser.",
        )
    zoom = -(-side // min(height, width))
    high, wide = height // rows * zoom, width // columns * zoom
    _, group, count = np.unique(group[prefix:], return_inverse=True, return_counts=True)
    pixels = np.broadcast_to(image, (height, width, 3)).repeat(zoom, 0).repeat(zoom, 1).astype(np.float64)
    where = group.reshape(grid).repeat(high, 0).repeat(wide, 1)
    sums = np.stack([np.bincount(where.ravel(), pixels[..., c].ravel()) for c in range(3)], axis=1)
    means = sums / (count * high * wide)[:, None]
    drawn = np.where((count > 1)[where][..., None], means[where], pixels)
    # The line lies inside each group, darker or lighter than the group itself, so that it shows on any ground.
    ink = np.where(means @ [0.299, 0.587, 0.114] > 110, 0.0, 255.0)[where][..., None]
    return np.where(_edges(where)[..., None], 0.45 * drawn + 0.55 * ink, drawn).round().astype(np.uint8)


def _edges(where: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Pixels whose upper or left neighbour belongs to another group."""
    edge = np.zeros(where.shape, dtype=bool)
    edge[1:] |= where[1:] != where[:-1]
    edge[:, 1:] |= where[:, 1:] != where[:, :-1]
    return edge
