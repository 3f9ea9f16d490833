"""The spine: the one transformer that every trained model is read into."""

from apportion.network.architecture import Architecture
from apportion.network.bridges import Bridge, fit_bridges, keep_bridges, left_out
from apportion.network.entry import coarse
from apportion.network.fold import fold
from apportion.network.model import Network
from apportion.network.order import sort_by_importance
from apportion.network.perceiver import Perceiver, PerceiverArchitecture
from apportion.network.surgery import Change, put

__all__ = [
    "Architecture",
    "Bridge",
    "Change",
    "Network",
    "Perceiver",
    "PerceiverArchitecture",
    "coarse",
    "fit_bridges",
    "fold",
    "keep_bridges",
    "left_out",
    "put",
    "sort_by_importance",
]
