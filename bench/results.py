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


def write(name: str, command: str, figures: Mapping[str, Any]) -> None:
    """`results/NAME.json`: the figures, the command that makes them again, the device, the versions and the commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=FOLDER.parent, check=False).stdout.strip()
    conditions = {"command": command, "commit": commit, "device": device(), "threads": torch.get_num_threads(), "day": time.strftime("%Y-%m-%d")}
    write_json(FOLDER / f"{name}.json", {"conditions": conditions, **figures})
    print(f"bench/results/{name}.json")
