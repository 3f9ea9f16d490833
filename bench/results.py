"""Committed results: one JSON file a run, with the conditions it holds under."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping
from pathlib import Path as File
from typing import Any

import torch

from apportion.files import write_json
from apportion.measure.doctor import device

FOLDER = File(__file__).parent / "results"


def commit() -> str:
    """The commit that ran; marked where code was changed or added since."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, cwd=FOLDER.parent.parent, check=False).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("-changed" if git("status", "--porcelain", "--", "*.py", "pyproject.toml") else "")


def write(name: str, command: str, figures: Mapping[str, Any]) -> None:
    """`results/NAME.json`: the figures, the command that makes them again, the device, the versions and the commit."""
    conditions = {"command": command, "commit": commit(), "device": device(), "threads": torch.get_num_threads(), "day": time.strftime("%Y-%m-%d")}
    write_json(FOLDER / f"{name}.json", {"conditions": conditions, **figures})
    print(f"bench/results/{name}.json")
