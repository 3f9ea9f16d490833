"""What a run says while it goes: a bar on a terminal, a plain line now and then elsewhere, nothing where nothing is wanted."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self, final

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

REFRESH_S = 0.5
LINE_EVERY_S = 20.0


@final
class Reporter:
    """Loss, images per second and time left, on standard error. It draws by itself, without a thread that takes a core from the training."""

    def __init__(self, *, steps: int, first: int, batch: int, wanted: bool, console: Console | None = None) -> None:
        self.steps, self.first, self.batch = steps, first, batch
        self.console = console or Console(stderr=True)
        self.wanted, self.bar = wanted, wanted and self.console.is_terminal
        self.every_s = REFRESH_S if self.bar else LINE_EVERY_S
        self.progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]:.0f} samples/s"),
            TimeRemainingColumn(),
            console=self.console,
            auto_refresh=False,
            disable=not self.bar,
        )
        self.task = self.progress.add_task("", total=steps, completed=first, loss=float("nan"), speed=0.0)
        self.loss = float("nan")

    def __enter__(self) -> Self:
        self.started = self.shown = time.monotonic()
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()

    def tell(self, step: int, loss: float) -> None:
        """After each step; shows something only when it is time to. The loss shown is a running mean over about 20 steps."""
        self.loss = loss if self.loss != self.loss else self.loss + 0.05 * (loss - self.loss)
        now = time.monotonic()
        if not self.wanted or (now - self.shown < self.every_s and step < self.steps):
            return
        self.shown, done = now, step - self.first
        speed = done * self.batch / (now - self.started)
        if self.bar:
            self.progress.update(self.task, completed=step, loss=self.loss, speed=speed)
            self.progress.refresh()
        else:
            left_s = (self.steps - step) * self.batch / speed
            self.console.print(f"step {step}/{self.steps}  loss {self.loss:.4f}  {speed:.0f} samples/s  {left_s:.0f} s left", highlight=False, soft_wrap=True)
