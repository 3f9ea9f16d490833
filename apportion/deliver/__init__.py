"""Handing over: the bundle on disk and the model that it becomes."""

from apportion.deliver.adapted import Adapted
from apportion.deliver.bundle import Bundle

__all__ = ["Adapted", "Bundle"]
