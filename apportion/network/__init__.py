"""The spine: the one transformer that every trained model is read into."""

from apportion.network.architecture import Architecture
from apportion.network.fold import Surrogate, fold, surrogate
from apportion.network.model import Network
from apportion.network.order import sort_by_importance
from apportion.network.perceiver import Perceiver, PerceiverArchitecture
from apportion.network.surgery import Change, put

__all__ = ["Architecture", "Change", "Network", "Perceiver", "PerceiverArchitecture", "Surrogate", "fold", "put", "sort_by_importance", "surrogate"]
