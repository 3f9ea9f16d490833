"""Makes `import torchvision` possible where its compiled part does not load: a wheel built for CUDA beside a CPU build of torch."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path as File

import torch


@functools.cache
def ready() -> torch.library.Library | None:
    """Call before the first import of torchvision. Where its operators cannot be loaded, the two that it describes unasked are declared (not implemented).

    The compiled part is tried first: declaring what it declares itself would end the process. The cache keeps the declaration alive.
    """
    found = importlib.util.find_spec("torchvision")
    if torch.version.cuda is not None or found is None or found.origin is None or _declared("nms"):
        return None
    for file in File(found.origin).parent.glob("_C.*"):
        try:
            torch.ops.load_library(str(file))
            return None
        except OSError:
            continue
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def _declared(name: str) -> bool:
    return getattr(torch.ops.torchvision, name, None) is not None
