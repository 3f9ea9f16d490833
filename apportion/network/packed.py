"""Texts laid end to end: rows of a fixed number of tokens that hold several texts each, so that hardly anything that runs is padding.

Zhai et al. 2022, "ByteTransformer", arXiv 2210.03052, section III (no work on padding); rows of one length with a mask between the texts: Krell et al. 2021,
arXiv 2107.02027, section 3. The paper scatters and gathers around a kernel of its own for attention; here texts share static rows, which any back-end runs.
"""

from __future__ import annotations

import copy
from typing import Any, final

import torch
from torch import Tensor, nn

from apportion.errors import PathError
from apportion.methods import find, ops
from apportion.methods.slots import Mixed
from apportion.network.model import Block, Network
from apportion.vocab import Notes, Path, Tokens

BY_TOKEN = ("dense", "matformer")  # FFNs that take each token by itself


@final
class Packed(nn.Module):
    """Steps `first` up to `last` of a path without token reduction, on packed rows: (given, text) -> states (r, n, d), or logits (r, slots, ...) at the end.

    `given`: ids int64 (r, n), or (r, 2, n) with token types, where `first` is 0, else states (r, n, d). `text` int64 (r, n): which of the `slots` texts of its
    row a token belongs to, ascending from the left; `slots` where there is nothing. n is free, up to the longest text that the network takes.
    What stands in a slot without a text means nothing. An answer does not depend on the other texts of a row, up to rounding.

    Cost: that of r * n tokens, attention over rows of n, and the head on r * slots texts of n tokens. Worth it where lengths differ much within a batch.
    Raises PathError for a path with fewer tokens than full, for a network that takes no texts, and for a mixer or FFN that is not known to keep texts apart.
    """

    def __init__(self, network: Network, path: Path, *, slots: int, first: int = 0, last: int | None = None) -> None:
        super().__init__()
        network.space.check(path)
        a, last = network.architecture, len(path.steps) if last is None else last
        if not a.words or a.pool == "every_token" or slots < 1 or not 0 <= first < last <= len(path.steps):
            found = f"steps {first} to {last} of {path.name} with {slots} texts in a row"
            raise PathError(
                found, wanted="a stretch of a path of a network for texts with one answer each, one text in a row at least", do="Correct what is packed."
            )
        if any(step.tokens != a.tokens for step in path.steps[:last]):
            raise PathError(f"{path.name}, which takes tokens away", wanted="all tokens in every step", do="Run it by lengths: packed texts keep their tokens.")
        if bridged := network.bridged(path):
            found = f"{path.name}, in which a map stands for blocks {bridged}"
            raise PathError(found, wanted="a path without", do="Run it by lengths: the map reads a text's mean.")
        self.tokeniser, self.network, self.slots = network.tokeniser, network, slots
        self.first, self.ends, self.prefix = first, last == len(path.steps), a.prefix
        self.steps = path.steps[first:last]
        self.blocks = nn.ModuleList(_apart(network.blocks[step.block]) for step in self.steps)

    def forward(self, given: Tensor, text: Tensor) -> Tensor:
        count = (text[..., None] == torch.arange(self.slots, device=text.device)).sum(1)
        start = torch.cat((torch.zeros_like(count[:, :1]), count.cumsum(1)), 1)
        place = torch.arange(text.shape[1], device=text.device) - start.gather(1, text)
        x = given if self.first else self._embedded(given, place)
        tokens = Tokens(x, text[:, :, None] == text[:, None], place, 0)
        for block, step in zip(self.blocks, self.steps, strict=True):
            tokens = block(tokens, step._replace(tokens=x.shape[1]))
        return self._answers(tokens.x, start, count) if self.ends else tokens.x

    def _embedded(self, inputs: Tensor, place: Tensor) -> Tensor:
        made: Any = self.tokeniser
        ids, kinds = (inputs[:, 0], inputs[:, 1]) if inputs.ndim == 3 else (inputs, None)
        x = made.word(ids)
        if made.kind is not None:
            x = x + (made.kind[0] if kinds is None else made.kind[kinds])
        if made.position is not None:
            x = x + made.position[made.offset + place]
        return made.project(made.norm(x))

    def _answers(self, x: Tensor, start: Tensor, count: Tensor) -> Tensor:
        """Every slot's tokens by themselves, padded to a row, and what the head makes of them."""
        r, n, d = x.shape
        index = torch.arange(n, device=x.device)
        apart = ops.take(x, (start[:, : self.slots, None] + index).clamp_max(n - 1).flatten(1)).view(r * self.slots, n, d)
        size = (index < count.clamp_min(1)[..., None]).to(x.dtype).view(-1, n)
        origin = torch.arange(n + 1, device=x.device).clamp_max(n - 1).expand(len(size), n + 1)
        return self.network.finish(Tokens(apart, size, origin, self.prefix)).unflatten(0, (r, self.slots))


@final
class Apart(nn.Module):
    """Attention within each text of a row. Takes tokens whose `size` (r, n, n) says which tokens a query sees and whose `origin` (r, n) is their place."""

    def __init__(self, part: Any) -> None:
        super().__init__()
        self.part = part

    def forward(self, tokens: Tokens, heads: int, notes: Notes | None = None) -> Mixed:
        part, (r, n, _) = self.part, tokens.x.shape
        query, key, value = part.qkv(tokens.x, out=heads * 3 * part.channels).view(r, n, heads, 3, part.channels).permute(3, 0, 2, 1, 4).unbind(0)
        query, key, bias = part.query_norm(query), part.key_norm(key), tokens.size[:, None]
        if part.rotary or part.window or part.relative is not None:
            query, key, bias = part._placed(tokens.origin, tokens, query, key, bias.to(query.dtype).log())
        out = ops.attend(query, key, value, bias).transpose(1, 2).reshape(r, n, heads * part.channels)
        return Mixed(part.proj(out if part.norm is None else part.norm(out), inp=heads * part.channels), query, key)


def _apart(block: nn.Module) -> Block:
    """The same block, its weights shared, with attention within texts. Raises PathError."""
    assert isinstance(block, Block)
    mixer, plain = block.mixer, find("mixer", "attention")
    mixer = mixer.part if isinstance(mixer, find("mixer", "head_prefix")) else mixer
    for part, known in ((mixer, (plain,)), (block.ffn, tuple(find("ffn", name) for name in BY_TOKEN))):
        if not isinstance(part, known):
            found = f"{type(part).__name__} in a block that is packed"
            raise PathError(found, wanted=f"one of {tuple(kind.__name__ for kind in known)}", do="Run it by lengths: it is not known to keep texts apart.")
    made = copy.copy(block)
    made._modules = {**block._modules, "mixer": Apart(mixer)}
    return made
