"""A start before the tokeniser: the picture is looked at as it is, and every path goes on from the picture."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from apportion.errors import PathError, PlanError
from apportion.methods import find
from apportion.network.stem import tokeniser
from apportion.vocab import Path, Tokens

if TYPE_CHECKING:
    from apportion.network.model import Network


class Preview(nn.Module):
    """Inputs -> (the inputs, as the x of a state that has no tokens yet, how much there is to see in each cell (b, cells))."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        if type(network.tokeniser) is not find("tokeniser", "apt"):
            found = f"a decision before the tokeniser, which is {type(network.tokeniser).__name__}"
            raise PathError(found, wanted="one that can make fewer tokens of a plain picture", do="Use the method `apt`, or decide after a glance.")
        self.tokeniser: Any = network.tokeniser
        self.pixels, self.channels = network.architecture.image_size**2, network.architecture.channels

    def forward(self, inputs: Tensor) -> tuple[Tokens, Tensor]:
        nothing = inputs.new_zeros(len(inputs), 1)
        return Tokens(inputs, nothing, nothing.long(), 0), self.tokeniser.entropy(inputs)

    def macs(self) -> int:
        """What it charges to every path: a product for each channel of a pixel, an addition for each pixel counted, a product for each level of a cell.

        More than the dispatcher's counter sees, for which nothing of this is a product.
        """
        return (self.channels + 1) * self.pixels + self.tokeniser.levels * self.tokeniser.cells**2


class Whole(nn.Module):
    """A path from a `Preview` on: the state with the picture in it -> logits."""

    def __init__(self, network: Network, path: Path) -> None:
        super().__init__()
        self.at = network.at(path)

    def forward(self, state: Tokens) -> Tensor:
        return self.at(state.x)


@torch.no_grad()
def coarse(network: Network, level: float) -> None:
    """Adaptive patch sizes for a trained network (in place); `level`: one grey level of 255 in the units of its inputs. The full path stays what it was.

    Raises PlanError where its patches cannot be joined.
    """
    if not network.architecture.image_size or network.architecture.tape:
        raise PlanError("adaptive patch sizes for what is no picture", wanted="a network of pictures, without a tape", do="Leave the method out.")
    made: Any = tokeniser(replace(network.architecture, grey_level=level))
    made.part = network.tokeniser
    like = next(network.parameters())
    network.tokeniser = made.to(like.device, like.dtype).requires_grad_(like.requires_grad).train(network.training)
    network.architecture = replace(network.architecture, grey_level=level)
