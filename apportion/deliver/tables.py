"""What the shell shows: plain values in, tables for people out. Nothing heavy is imported before a table has figures of work."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text


def grid(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table: words to the left, numbers to the right."""
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, show_header=any(head))
    for column, name in enumerate(head):
        numbers = column > 0 and all(row[column].replace("-", "").replace(".", "")[:1].isdigit() for row in rows if row[column])
        table.add_column(name, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # as it is: brackets in a file's name are no markup
    return table


def work(gmacs: Sequence[float]) -> list[str]:
    """GMACs one below the other, with four digits of the largest."""
    from apportion.measure.report import decimals

    return [f"{one:.{decimals(max(gmacs, default=0.0))}f}" for one in gmacs]


def summary(figures: dict[str, Any], report: Any) -> Table:
    """Dense against adaptive, then every path and who takes it."""
    batches = list(report.summary[0].latency_ms)
    gmacs = iter(work([row.gmacs for row in (*report.summary, *report.paths)]))
    rows = [
        [
            row.name,
            f"{row.accuracy:.2f} ({row.accuracy_interval[0]:.2f} to {row.accuracy_interval[1]:.2f})",
            next(gmacs),
            *(f"{row.latency_ms[batch]:.3f}" for batch in batches),
            f"{row.peak_bytes / 2**20:.2f}",
            "",
        ]
        for row in report.summary
    ]
    rows += [
        [f"  {path.name}", f"{path.accuracy:.2f}", next(gmacs), *(f"{path.latency_ms[batch]:.3f}" for batch in batches), "", f"{100 * path.share:.1f}"]
        for path in report.paths
    ]
    head = ["", f"{report.metric}, %", "GMACs", *(f"ms, batch {batch}" for batch in batches), "peak MiB", "inputs, %"]
    lost = figures["drop_points"]["points"]
    change = f"{lost:.2f} points lost" if lost >= 0 else f"{-lost:.2f} points gained"
    times = ", ".join(f"{found['value']:.2f}x the time at batch {batch}" for batch, found in figures["time_ratio"].items())
    return grid(f"{report.title}: {100 * figures['gmacs_saved_share']:.1f} % fewer GMACs, {times}, {change}", head, rows)


def spoken(row: dict[str, Any]) -> tuple[str, str]:
    """An answer and its probability in a line of their own."""
    answer = next(row[key] for key in ("label", "value", "embedding") if key in row)
    if isinstance(answer, dict):
        answer = [f"{name} {100 * share:.0f} %" for name, share in answer.items()]
    words = ", ".join(map(str, answer)) if isinstance(answer, list) else str(answer)
    chance = row.get("probability", [])
    return textwrap.shorten(words, 60), ", ".join(f"{one:.3f}" for one in (chance if isinstance(chance, list) else [chance]))


def fact(value: Any) -> str:
    """A fact of the machine in words."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {f'{one:.1f}' if isinstance(one, float) else one or 'missing'}" for name, one in value.items())
    return "none" if value is None else str(value)


def standings(model: str, ranking: dict[str, Any]) -> Table:
    """Back-ends best first, at each batch size."""
    rows = [[t["backend"], str(t["batch"]), "" if t["ms"] is None else f"{t['ms']:.3f}", f"{t['build_seconds']:.1f}", t["reason"]] for t in ranking["trials"]]
    return grid(f"back-ends on {model}: {ranking['backend']}", ["", "batch", "ms per input", "s to build", ""], rows)
