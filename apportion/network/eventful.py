"""Streams: of each frame only the tokens are computed again that have changed most since they last were; the rest is taken from what the caller kept.

Dutson et al. 2023, "Eventful Transformers: Leveraging Temporal Redundancy in Vision Transformers", arXiv 2308.13494. A block has three gates: before queries,
keys and values, before their projection, and before the FFN. A gate compares each token with the one that it last let pass, passes the `recompute` that differ
most, and remembers those; slow drift adds up until it passes. Scores are renewed in the rows and columns of what passed. No training. The state of a stream is
an argument and a result: nothing is remembered here.

Two things are not the paper's. The prefix passes always, as the answer may be read from it. And in each head by itself those `recompute` columns of the
attention are exchanged, with their values, that changed the weighted sum most, instead of those of what passed the first gate: a token that stays itself
while others come to see it differently would never be put right.

Cost: `recompute` / n of the products with weights, and 2 `recompute` / n of those with other tokens; norms, softmax and sums are those of all tokens, and the
state holds two maps of all by all for each head and block. Not where the camera moves, nor for few tokens; nor with reducers, as tokens must stay who they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apportion.errors import PathError, PlanError
from apportion.methods import find, ops
from apportion.methods.mixer.attention import Attention
from apportion.network.model import Block, Network
from apportion.vocab import Tokens


class Gate(NamedTuple):
    """What last passed, and what came of it."""

    reference: Tensor  # (b, n, d)
    result: Tensor  # (b, n, e)


class BlockState(NamedTuple):
    """What a block keeps of a stream."""

    projected: Gate  # (b, n, d) -> queries, keys and values (b, n, 3 d), head by head
    scores: Tensor  # (b, h, n, n)
    attention: Tensor  # (b, h, n, n), each column as it was when it was last exchanged
    value: Tensor  # (b, h, n, c), likewise
    mixed: Tensor  # (b, h, n, c), the product of these two
    out: Gate  # (b, n, d) -> (b, n, d)
    ffn: Gate  # (b, n, d) -> (b, n, d)


State = tuple[BlockState, ...]


class Passed(NamedTuple):
    """The tokens that a gate let pass, some perhaps only because shapes are static."""

    where: Tensor  # (b, r)
    changed: Tensor  # (b, r) bool, by more than the threshold


@final
class Eventful(nn.Module):
    """A network for streams of frames: a batch of streams, each with its own state. `start` takes a first frame, the call itself every other one.

    The weights are the network's own. Raises PlanError for what is not plain: norms first, attention without positions of its own, no reducer, no width
    or heads to choose, all blocks in order.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        a, space = network.architecture, network.space
        plain = a.norm_first and not a.words and all(_plain(block) for block in network.blocks)
        if not plain or space.reduces or space.skips or len(space.heads) > 1 or len(space.width) > 1:
            wanted = "norms first, plain attention without positions of its own, no reducer, full heads, width and depth"
            raise PlanError("a network that a stream cannot be gated in", wanted=wanted, do="Read the model again, and put nothing into it that adapts a path.")
        self.network, self.blocks = network, tuple(EventfulBlock(block, a.prefix) for block in network.blocks)

    def start(self, inputs: Tensor) -> tuple[Tensor, State]:
        """Logits (b, classes) and the state after a first frame, of which everything is computed; also what to do after a cut."""
        tokens, state = self._tokens(inputs), []
        for block in self.blocks:
            x, kept = block.start(tokens.x)
            tokens = tokens._replace(x=x)
            state.append(kept)
        return self.network.finish(tokens), tuple(state)

    def forward(self, inputs: Tensor, state: State, recompute: int, threshold: float = 0.0) -> tuple[Tensor, State]:
        """Logits and state after the next frame, of which each gate passes at most `recompute` tokens, those that moved by more than `threshold` (a distance).

        A token that has not changed is never computed again, and a frame of which everything is to be is a first frame. Raises PathError.
        """
        n, prefix = self.network.architecture.tokens, self.network.architecture.prefix
        if not prefix < recompute <= n or len(state) != len(self.blocks) or len(state[0].mixed) != len(inputs):
            found = f"{recompute} tokens to compute for {len(inputs)} streams, and a state of {[len(block.mixed) for block in state]}"
            raise PathError(found, wanted=f"{prefix + 1} to {n} tokens, and the state that this network gave", do="Call start() for a new stream.")
        if recompute == n and threshold <= 0:
            return self.start(inputs)
        tokens, after = self._tokens(inputs), []
        for block, before in zip(self.blocks, state, strict=True):
            x, kept = block.step(tokens.x, before, recompute, threshold)
            tokens = tokens._replace(x=x)
            after.append(kept)
        return self.network.finish(tokens), tuple(after)

    def macs(self, recompute: int) -> int:
        """Multiply-adds of one frame: with all tokens those of the network."""
        path, a = self.network.space.full, self.network.architecture
        blocks = sum(block.macs(a.tokens, recompute) for block in self.blocks)
        return self.network.tokeniser.macs(path.patch) + blocks + self.network.head.macs(a.tokens, a.prefix)

    def _tokens(self, inputs: Tensor) -> Tokens:
        return self.network.tokeniser(inputs, self.network.architecture.patch)


def _plain(block: nn.Module) -> bool:
    assert isinstance(block, Block)
    mixer = block.mixer
    own = isinstance(mixer, Attention) and not mixer.rotary and not mixer.window and mixer.relative is None
    return own and isinstance(block.ffn, find("ffn", "dense")) and isinstance(block.adapter, find("adapter", "none"))


@final
class EventfulBlock:
    """One block, gated: values (b, n, d) and state in, values and state out. No module: the block belongs to its network."""

    def __init__(self, block: nn.Module, prefix: int) -> None:
        assert isinstance(block, Block) and isinstance(block.mixer, Attention)
        self.block, self.mixer, self.width, self.prefix = block, block.mixer, block.ffn.choices[-1], prefix

    def start(self, x: Tensor) -> tuple[Tensor, BlockState]:
        normed = self.block.norm1(x)
        projected = Gate(normed, self._project(normed))
        query, key, value = self._split(projected.result)
        scores = query @ key.transpose(-1, -2) * self.mixer.channels**-0.5
        attention = scores.softmax(-1)
        mixed = attention @ value
        joined = mixed.transpose(1, 2).flatten(2)
        out = Gate(joined, self._out(joined))
        x = self.block.residual1(x, out.result)
        normed = self.block.norm2(x)
        ffn = Gate(normed, self._ffn(normed))
        return self.block.residual2(x, ffn.result), BlockState(projected, scores, attention, value, mixed, out, ffn)

    def step(self, x: Tensor, state: BlockState, recompute: int, threshold: float) -> tuple[Tensor, BlockState]:
        projected, passed = gated(self._project, self.block.norm1(x), state.projected, recompute, threshold, self.prefix)
        query, key, value = self._split(projected.result)
        scores = renewed(state.scores, query * self.mixer.channels**-0.5, key, passed)
        attention, value, mixed = exchanged(scores.softmax(-1), value, state.attention, state.value, state.mixed, recompute)
        out, _ = gated(self._out, mixed.transpose(1, 2).flatten(2), state.out, recompute, threshold, self.prefix)
        x = self.block.residual1(x, out.result)
        ffn, _ = gated(self._ffn, self.block.norm2(x), state.ffn, recompute, threshold, self.prefix)
        return self.block.residual2(x, ffn.result), BlockState(projected, scores, attention, value, mixed, out, ffn)

    def macs(self, tokens: int, recompute: int) -> int:
        whole = self.mixer.macs(tokens, self.mixer.heads) + self.block.ffn.macs(tokens, self.width)
        pairs = 2 * tokens * tokens * self.mixer.heads * self.mixer.channels
        return whole if recompute == tokens else (whole - pairs) * recompute // tokens + 2 * pairs * recompute // tokens

    def _project(self, x: Tensor) -> Tensor:
        """Queries, keys and values (b, m, 3 d) of some tokens."""
        query, key, value = self.mixer.qkv(x).unflatten(-1, (self.mixer.heads, 3, self.mixer.channels)).unbind(3)
        return torch.stack((self.mixer.query_norm(query), self.mixer.key_norm(key), value), 3).flatten(2)

    def _split(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = projected.unflatten(-1, (self.mixer.heads, 3, self.mixer.channels)).permute(3, 0, 2, 1, 4).unbind(0)
        return query, key, value

    def _out(self, mixed: Tensor) -> Tensor:
        return self.mixer.proj(mixed if self.mixer.norm is None else self.mixer.norm(mixed))

    def _ffn(self, x: Tensor) -> Tensor:
        return self.block.ffn(x, self.width)


def gated(function: Callable[[Tensor], Tensor], now: Tensor, gate: Gate, recompute: int, threshold: float, prefix: int) -> tuple[Gate, Passed]:
    """The gate after a frame: `function` is run on the prefix and on those of the tokens `now` (b, n, d) that differ most from what last passed."""
    moved = (now - gate.reference).norm(dim=-1)
    index = F.pad(moved[:, prefix:], (prefix, 0), value=torch.inf).topk(recompute, dim=-1).indices
    changed = moved.gather(1, index) > threshold
    chosen = ops.take(now, index)
    # What has not changed keeps its result to the last bit: a smaller product may round differently.
    reference = torch.where(changed[..., None], chosen, ops.take(gate.reference, index))
    result = torch.where(changed[..., None], function(chosen), ops.take(gate.result, index))
    return Gate(written(gate.reference, index, reference), written(gate.result, index, result)), Passed(index, changed)


def written(x: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """x (b, n, d) with rows `index` (b, r), each once, replaced by values (b, r, d)."""
    return x.scatter(1, index[..., None].expand_as(values), values)


def renewed(scores: Tensor, query: Tensor, key: Tensor, passed: Passed) -> Tensor:
    """Scores (b, h, n, n) with the rows and columns of what passed made anew from query and key (b, h, n, c)."""
    _, h, n, c = query.shape
    row, column = passed.where[:, None, :, None].expand(-1, h, -1, n), passed.where[:, None, None, :].expand(-1, h, n, -1)
    place, changed = passed.where[:, None, :, None].expand(-1, h, -1, c), passed.changed[:, None]
    across = torch.where(changed[..., None], query.gather(2, place) @ key.transpose(-1, -2), scores.gather(2, row))
    scores = scores.scatter(2, row, across)
    down = torch.where(changed[:, :, None], query @ key.gather(2, place).transpose(-1, -2), scores.gather(3, column))
    return scores.scatter(3, column, down)


def exchanged(attention: Tensor, value: Tensor, before: Tensor, values: Tensor, mixed: Tensor, recompute: int) -> tuple[Tensor, Tensor, Tensor]:
    """Attention (b, h, n, n), values (b, h, n, c) and their product, of which `recompute` columns are new and the others as `before`.

    Each column's part of the product is weights times one value, so that its change is at most the sum here. Where nothing changed it is 0 to the last bit.
    """
    change = (attention - before).norm(dim=2) * value.norm(dim=-1) + before.norm(dim=2) * (value - values).norm(dim=-1)
    where = change.topk(recompute, dim=-1).indices
    column, row = where[:, :, None, :].expand(-1, -1, mixed.shape[2], -1), where[..., None].expand(-1, -1, -1, mixed.shape[3])
    weight, each = attention.gather(3, column), value.gather(2, row)
    mixed = mixed + (weight @ each - before.gather(3, column) @ values.gather(2, row))
    return before.scatter(3, column, weight), values.scatter(2, row, each), mixed
