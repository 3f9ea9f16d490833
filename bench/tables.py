"""Pages made from what is executed: the README's table of results from `results/`, docs/methods.md from the cards on the shelf."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path as File
from typing import Any

from apportion import methods
from apportion.files import write_atomic
from bench.results import FOLDER

ROOT = File(__file__).parent.parent
BEGIN, END = "<!-- results: made by `make docs` -->", "<!-- /results -->"


def main() -> None:
    readme = (ROOT / "README.md").read_text()
    before, rest = readme.split(BEGIN)
    after = rest.split(END)[1]
    write_atomic(ROOT / "README.md", f"{before}{BEGIN}\n{results()}\n{END}{after}")
    write_atomic(ROOT / "docs" / "methods.md", shelf())


def results() -> str:
    rows = [row for file in sorted(FOLDER.glob("*.json")) for row in read(file.stem, json.loads(file.read_text()))]
    head = "| run | dense, % | adaptive, % | drop, points (95 %) | GMACs saved | above the hull, points (95 %) | time, batch 1 | time, largest batch |"
    return "\n".join([head, "|---|---|---|---|---|---|---|---|", *rows])


def read(name: str, result: dict[str, Any]) -> Iterator[str]:
    if "seeds" in result:
        for seed in result["seeds"]:
            yield row(f"{name}, seed {seed['seed']}", seed["figures"])
        saved = [seed["figures"]["gmacs_saved_share"] for seed in result["seeds"]]
        drop = [seed["figures"]["drop_points"]["points"] for seed in result["seeds"]]
        yield f"| {name}, mean | | | {statistics.mean(drop):.2f} | {100 * statistics.mean(saved):.1f} % | | | |"
    for run, found in result.get("runs", {}).items():
        yield row(f"{name}, {run.replace('_', ' ')}", found["figures"])


def row(name: str, figures: dict[str, Any]) -> str:
    drop, gain, ratios = figures["drop_points"], figures["adaptive_gain_points"], list(figures.get("time_ratio", {}).values())
    times = [f"{ratio['value']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})" for ratio in ratios] or ["", ""]
    return (
        f"| {name} | {100 * figures['accuracy_dense']:.2f} | {100 * figures['accuracy_adaptive']:.2f} "
        f"| {drop['points']:.2f} ({drop['low']:.2f} to {drop['high']:.2f}) | {100 * figures['gmacs_saved_share']:.1f} % "
        f"| {gain['value']:.2f} ({gain['low']:.2f} to {gain['high']:.2f}) | {times[0]} | {times[-1]} |"
    )


def shelf() -> str:
    lines = ["# The shelf", "", "Made by `make docs` from the cards in `apportion/methods`; `apportion systems` prints the same.", ""]
    for slot in methods.SLOTS:
        lines += [f"## {slot}", "", "| method | title | source | axis | exact at full | needs |", "|---|---|---|---|---|---|"]
        for name in methods.names(slot):
            card = methods.card(slot, name)
            source = f"{card.source}, arXiv {card.arxiv}" if card.arxiv else card.source
            lines.append(f"| `{name}` | {card.title} | {source} | {card.axis or ''} | {'yes' if card.exact else 'no'} | {card.needs} |")
        lines.append("")
    return "\n".join(lines)
