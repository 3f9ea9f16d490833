"""Random changes to a batch that leave its meaning alone; each is drawn from the generator that it is given."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor

from apportion.errors import PlanError
from apportion.methods.task import UNKNOWN
from apportion.train.recipe import Recipe


def augment(inputs: Tensor, labels: Tensor | None, recipe: Recipe, step: int) -> tuple[Tensor, Tensor | None]:
    """What the recipe asks for, as a function of the step alone. Draws are made on the CPU, so that they are the same on every device.

    inputs (b, c, h, w) float, normalised; with mixup labels (b,) become (b, classes); labels of pixels (b, h, w) move with the pixels.
    Raises PlanError where the inputs are no images, and for mixup of labels of pixels.
    """
    if labels is not None and labels.ndim == 3:
        return _with_masks(inputs, labels, recipe, step)
    if (inputs.ndim != 4 and (recipe.crop_padding or recipe.flip)) or (not inputs.is_floating_point() and recipe.mixup):
        do = "Set crop_padding=0, flip=False and mixup=0."
        raise PlanError(f"inputs of shape {tuple(inputs.shape)}, {inputs.dtype}", wanted="images (b, c, h, w) to crop, flip and mix", do=do)
    generator = recipe.generator("augment", step)
    if recipe.crop_padding:
        inputs = crop(inputs, recipe.crop_padding, generator)
    if recipe.flip:
        inputs = flip(inputs, generator)
    if recipe.mixup:
        share = random.Random(recipe.derived("mixup", step)).betavariate(recipe.mixup, recipe.mixup)
        inputs, labels = mix(inputs, labels, share, torch.randperm(len(inputs), generator=generator), classes=recipe.classes)
    return inputs, labels


def _with_masks(inputs: Tensor, masks: Tensor, recipe: Recipe, step: int) -> tuple[Tensor, Tensor]:
    """Masks go along as one more channel, in which 0, with which the border is filled up, stands for what is not known."""
    if recipe.mixup or masks.shape[1:] != inputs.shape[2:]:
        raise PlanError(f"mixup {recipe.mixup}, masks of {tuple(masks.shape[1:])} for {tuple(inputs.shape)}", wanted="no mixup, one size", do="Set mixup=0.")
    both, _ = augment(torch.cat((inputs, (masks - UNKNOWN)[:, None].to(inputs.dtype)), 1), None, recipe, step)
    return both[:, :-1].contiguous(), both[:, -1].long() + UNKNOWN


def crop(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """A window of the old size, each sample's own, out of images with `padding` pixels of 0 (the mean colour) around them."""
    b, _, height, width = images.shape
    windows = F.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)  # (b, c, 2p+1, 2p+1, h, w), a view
    down, right = torch.randint(0, 2 * padding + 1, (2, b), generator=generator).to(images.device)
    return windows[torch.arange(b, device=images.device), :, down, right]


def flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Left and right exchanged in about half of the samples."""
    chosen = (torch.rand(len(images), generator=generator) < 0.5).to(images.device)
    return torch.where(chosen[:, None, None, None], images.flip(-1), images)


def mix(inputs: Tensor, labels: Tensor | None, share: float, partner: Tensor, *, classes: int | None) -> tuple[Tensor, Tensor | None]:
    """Every sample with `share` of itself and the rest of its partner (Zhang et al. 2018, "mixup", arXiv 1710.09412, section 2)."""
    partner = partner.to(inputs.device)
    mixed = inputs * share + inputs[partner] * (1 - share)
    if labels is None:
        return mixed, None
    if classes is None:
        raise PlanError("mixup without a number of classes", wanted="recipe.classes, to write mixed labels as shares", do="Set classes, or mixup=0.")
    shares = F.one_hot(labels, classes).float()
    return mixed, shares * share + shares[partner] * (1 - share)
