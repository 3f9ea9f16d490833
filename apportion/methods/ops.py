"""The few tensor moves that methods share. All are per sample: no row ever sees another sample's row."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from apportion.vocab import Tokens

Count = TypeVar("Count", int, Tensor)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Softmax attention, (b, h, n, c) each; `bias` is added to the scores and broadcasts to (b, h, n, m).

    Written out where a gradient is wanted on a CPU (the fused kernel's backward pass is half of a training step there),
    fused everywhere else; a test holds the two forms together.
    """
    if query.requires_grad and query.device.type == "cpu":
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        return (scores if bias is None else scores + bias).softmax(-1) @ value
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)


def margin(logits: Tensor) -> Tensor:
    """How much likelier the first answer is than the second, (..., classes) -> (...): the confidence that tables and checkpoints share."""
    top = logits.float().softmax(-1).topk(2, -1).values
    return top[..., 0] - top[..., 1]


def size_bias(tokens: Tokens) -> Tensor | None:
    """log(size) for every key, so that a merged token counts as often as the tokens it stands for and padding (size 0) never; None while all sizes are 1."""
    return tokens.size.log()[:, None, None, :] if tokens.reduced else None


def positions(tokens: Tokens) -> Tensor:
    """Where each token stands among its sources, (1 or b, n): of a merged token the first of those that it stands for, which padding behind cannot move."""
    b, n, sources = *tokens.x.shape[:2], tokens.origin.shape[1]
    index = torch.arange(sources, device=tokens.x.device)
    if sources - n <= 1:  # nothing merged; a text has one source more than tokens
        return index[None, :n]
    return torch.full((b, n), sources, device=index.device).scatter_reduce(1, tokens.origin, index.expand(b, -1), "amin")


def _flat(index: Tensor, rows: int) -> Tensor:
    """(b, m) indices into rows of one sample, as indices into the rows of the whole batch: one flat copy beats an expanded gather many times over."""
    return (index + torch.arange(index.shape[0], device=index.device)[:, None] * rows).flatten()


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (b, m) of x (b, n, ...) -> (b, m, ...)."""
    rows = x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]).index_select(0, _flat(index, x.shape[1]))
    return rows.view(index.shape[0], index.shape[1], *x.shape[2:])


def add_at(x: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """x (b, n, ...) with values (b, m, ...) added to its rows `index` (b, m); rows named twice get both."""
    rows = x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
    return rows.index_add(0, _flat(index, x.shape[1]), values.reshape(-1, *x.shape[2:])).view_as(x)


def reduce(tokens: Tokens, kept: Tensor, gone: Tensor, into: Tensor) -> Tokens:
    """Keep rows `kept` (b, k) in that order; add each row of `gone` (b, r) to the kept row at position `into` (b, r), weighted by size.

    Sum of size * value is unchanged; what is made of padding alone (size 0) is 0. All indices include the prefix, which must come first in `kept`.
    """
    x, size, origin, prefix = tokens
    weighted = x * size[..., None]
    new_size = add_at(take(size, kept), into, take(size, gone))
    new_x = add_at(take(weighted, kept), into, take(weighted, gone)) / torch.where(new_size > 0, new_size, 1)[..., None]
    place = torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device)
    place = place.scatter(1, kept, torch.arange(kept.shape[1], device=x.device).expand_as(kept)).scatter(1, gone, into)
    return Tokens(new_x, new_size, place.gather(1, origin), prefix)


def alike(key: Tensor, prefix: int) -> Tensor:
    """Cosine similarity of the first to the second of each two tokens behind the prefix, by keys (b, h, n, c) averaged over heads: (b, ceil, floor)."""
    metric = F.normalize(key[:, :, prefix:].mean(1), dim=-1)
    return metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)


def matched(similar: Tensor, prefix: int, remove: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The `remove` most alike pairs of first and second tokens (Bolya et al. 2023, arXiv 2210.09461, section 3), for `reduce`.

    Gives kept (b, n - remove), gone (b, remove) with the most alike first, into: places among the kept, and those tokens themselves.
    """
    best, partner = similar.max(-1)
    order = best.argsort(dim=-1, descending=True, stable=True)
    gone, stay = order[:, :remove], order[:, remove:].sort(dim=-1).values
    chosen, rows = partner.gather(1, gone), (len(order), -1)
    first = torch.arange(prefix, device=order.device).expand(rows)
    second = prefix + 1 + 2 * torch.arange(similar.shape[2], device=order.device).expand(rows)
    return torch.cat((first, prefix + 2 * stay, second), 1), prefix + 2 * gone, prefix + stay.shape[1] + chosen, prefix + 1 + 2 * chosen


def settle(tokens: Tokens, keep: int, gone: Tensor, into: Tensor, order: Tensor) -> Tokens:
    """Reduce rows of which some tokens are padding, each by its own number: what stays comes first, then padding up to `keep`.

    `gone` (b, n) bool, the real tokens that leave (so many that at most `keep` stay); `into` (b, n) the token that each of them joins, weighted by size;
    `order` (b, n) below 2n, the order in which those that stay lie.
    """
    x, size, origin, prefix = tokens
    n = x.shape[1]
    target = torch.where(gone, into, torch.arange(n, device=x.device))
    new_size = add_at(torch.zeros_like(size), target, size)
    new_x = add_at(torch.zeros_like(x), target, x * size[..., None]) / torch.where(new_size > 0, new_size, 1)[..., None]
    layout = (order + 2 * n * (gone | (size == 0))).argsort(dim=-1, stable=True)
    place = torch.zeros_like(layout).scatter(1, layout, torch.arange(n, device=x.device).expand_as(layout)).clamp_max(keep - 1)
    kept = layout[:, :keep]
    return Tokens(take(new_x, kept), take(new_size, kept), place.gather(1, target.gather(1, origin)), prefix)


def sizes(tokens: int, k: int, learners: int) -> list[int]:
    """How many of a sample's tokens get 0, 1, ..., N learners: a third one fewer than k, a third one more.

    Where thirds are unequal k - 1 comes before k + 1, so the mean is k, or less by one learner of one token; and a token more makes no third smaller, so that
    padding changes none.
    """
    fewer, more = thirds(tokens)
    return [(fewer, tokens - fewer - more, more)[count - k + 1] if abs(count - k) <= 1 else 0 for count in range(learners + 1)]


def thirds(tokens: Count) -> tuple[Count, Count]:
    """How many of so many tokens get one fewer, and how many one more."""
    return (tokens + 1) // 3, tokens // 3


def dealt(needs: Tensor, size: Tensor) -> Tensor:
    """The tokens (b, n) in the order in which `sizes` deals to them: words by what they need (b, n), as many in each third as if they were alone, and padding
    (of size 0) where a third has places left.
    """
    n, pad = size.shape[1], size == 0
    order, place = needs.masked_fill(pad, torch.inf).argsort(dim=-1, stable=True), torch.arange(n, device=size.device)
    (fewer, more), words = thirds(n), n - pad.sum(1, keepdim=True)
    few, many = thirds(words)
    middle = words - few - many
    of_word = place + torch.where(place >= few, fewer - few, 0) + torch.where(place >= few + middle, n - fewer - more - middle, 0)
    left = place - words  # of padding
    of_pad = left + few + torch.where(left >= fewer - few, middle, 0) + torch.where(left >= n - more - few - middle, many, 0)
    return torch.zeros_like(order).scatter(1, torch.where(place < words, of_word, of_pad), order)
