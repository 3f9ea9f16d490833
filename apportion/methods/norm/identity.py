"""No normalisation, where a model has none."""

from __future__ import annotations

from torch import nn

from apportion.vocab import Card


class NoNorm(nn.Identity):
    card = Card("No normalisation", "", "", None, exact=True, needs="nothing")


METHOD = NoNorm
