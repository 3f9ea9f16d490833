"""Teaching: the resumable loop, the sandwich of paths, dual-path feature distillation."""

from apportion.train.data import Data, Images, Sounds, Texts
from apportion.train.dense import dense
from apportion.train.joint import Joint, joint
from apportion.train.loop import Fitted, Mark, Objective, fit
from apportion.train.perceiver import alike, classes, nested
from apportion.train.recipe import Recipe, fast_dtype
from apportion.train.sandwich import draw, sandwich

__all__ = [
    "Data",
    "Fitted",
    "Images",
    "Joint",
    "Mark",
    "Objective",
    "Recipe",
    "Sounds",
    "Texts",
    "alike",
    "classes",
    "dense",
    "draw",
    "fast_dtype",
    "fit",
    "joint",
    "nested",
    "sandwich",
]
