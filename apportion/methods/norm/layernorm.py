"""Layer normalisation over the channels of each token (Ba et al. 2016, arXiv 1607.06450)."""

from __future__ import annotations

from torch import nn

from apportion.vocab import Card


class LayerNorm(nn.LayerNorm):
    card = Card("Layer normalisation", "Ba et al. 2016", "1607.06450", None, exact=True, needs="nothing")


METHOD = LayerNorm
