"""Tape tokens: an input that is hard to place reads more rows from a bank, one read at a time, and the reads stand behind its own tokens.

Xue et al. 2023, "Adaptive Computation with Elastic Input Sequence" (AdaTape), arXiv 2301.13195. Query: the mean of the tokens; keys: the first `key` channels
of the bank's rows, both behind one norm. A read takes the `among` best rows that this sample has not used, and is their mean by softmax; the largest weights
add up over the reads, and at `threshold` the sample stops: soon where one row stands out, late where none does. A tokeniser around another one, because
whatever comes behind, from the first block to the head, then sees a longer sequence and nothing else that is new. Shapes are static: there are always `reads`
places, and those not read are tokens of size 0, which no attention sees and no mean counts; so a graph pays for all of them. To be trained together with the
network. Not where the bank knows nothing that the tokens do not.
"""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apportion.errors import PlanError
from apportion.methods import ops
from apportion.methods.slots import Tokeniser
from apportion.vocab import Card, Tokens


class Tape(NamedTuple):
    tokens: Tokens  # with the tape; what stands for nothing comes last
    reads: Tensor  # (b,) int64, how many
    rows: Tensor  # (b, reads, among) int64, rows of the bank; -1 where none was read
    doubt: Tensor  # (b,) sum over the reads of 1 - sum of squared weights; its mean times 0.01 goes into the loss


class Rows(nn.Module):
    """A bank that is learned and the same for all inputs. Any tokeniser can be a bank: then its rows come from the input."""

    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, rows, dim), std=0.02))

    def forward(self, inputs: Tensor, patch: int) -> Tokens:
        index = torch.arange(self.rows.shape[1], device=self.rows.device)[None]
        return Tokens(self.rows, self.rows.new_ones(index.shape), index, 0)

    def macs(self, patch: int) -> int:
        return 0


class AdaTape(nn.Module):
    """`part` makes the tokens; `bank`, given `bank_patch`, up to `rows` rows, of which those of size 0 are not read; `hidden`: units of the FFN behind a read.

    Where `threshold` times `among` is at most `reads`, every sample gets to the threshold; one whose bank is used up stops too. Raises PlanError for numbers
    that make no tape.
    """

    card = Card(
        "AdaTape",
        "Xue et al. 2023",
        "2301.13195",
        "tokens",
        exact=False,
        needs="training",
        changed="always the mean asks: before the first block a class token is the same for all inputs; weights are gathered sample by sample; places not read "
        "have size 0, in means too; no noise on queries, no rows masked at random",
    )
    entering: tuple[int, ...] = ()

    def __init__(
        self,
        *,
        part: Tokeniser,
        bank: Tokeniser,
        bank_patch: int,
        rows: int,
        dim: int,
        key: int,
        reads: int = 10,
        among: int = 5,
        threshold: float = 2.0,
        hidden: int,
    ) -> None:
        super().__init__()
        if reads < 1 or not 1 <= among <= rows or not 1 <= key <= dim or not threshold > 0:
            found = f"{reads} reads among {among} of {rows} rows by {key} of {dim} channels up to {threshold}"
            raise PlanError(found, wanted="positive numbers, no more rows and channels than there are", do="Correct them.")
        self.part, self.bank, self.bank_patch = part, bank, bank_patch
        self.rows, self.dim, self.key, self.reads, self.among, self.threshold, self.hidden = rows, dim, key, reads, among, threshold, hidden
        self.norm = nn.LayerNorm(dim)
        self.up, self.gate, self.down = nn.Linear(dim, hidden), nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    @classmethod
    def from_dense(cls, part: Tokeniser, *, rows: int, dim: int, key: int, reads: int, hidden: int) -> Self:
        return cls(part=part, bank=Rows(rows, dim), bank_patch=0, rows=rows, dim=dim, key=key, reads=reads, hidden=hidden)

    def forward(self, inputs: Tensor, patch: int) -> Tokens:
        return self.read(inputs, patch).tokens

    def read(self, inputs: Tensor, patch: int) -> Tape:
        """Tokens with their tape, and what training and a picture want to know of it."""
        tokens, found = self.part(inputs, patch), self.bank(inputs, self.bank_patch)
        size, bank = tokens.size[:, tokens.prefix :, None], self.norm(found.x)
        query = self.norm((tokens.x[:, tokens.prefix :] * size).sum(1) / size.sum(1).clamp_min(1))[:, : self.key]
        free, going = (found.size > 0).expand(len(query), -1), torch.ones(len(query), dtype=torch.bool, device=query.device)
        summed, doubt, tape, taken, rows = query.new_zeros(len(query)), query.new_zeros(len(query)), [], [], []
        for _ in range(self.reads):
            index, weight = self._best(query, bank, free)
            read = (gathered(bank, index) * weight[..., None]).sum(1)
            going = going & (weight[:, 0] > 0)
            tape.append(read)
            taken.append(going)
            rows.append(torch.where(going[:, None] & (weight > 0), index, -1))
            doubt = doubt + going * (1 - weight.square().sum(-1))
            free, query, summed = free.scatter(1, index, False), (query + read[:, : self.key]) / 2, summed + weight[:, 0]
            going = going & (summed < self.threshold)
        x, mask = torch.stack(tape, 1), torch.stack(taken, 1)
        x = self.down(F.gelu(self.gate(x)) * self.up(x)) * mask[..., None]
        return Tape(extended(tokens, x, mask.to(x.dtype)), mask.sum(1), torch.stack(rows, 1), doubt)

    def _best(self, query: Tensor, bank: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
        """The best rows (b, among) that are free, best first, and their weights; weight 0 where there is none left."""
        key = bank[..., : self.key]
        score = query @ key[0].T if len(key) == 1 else (key @ query[..., None])[..., 0]
        best = score.masked_fill(~free, -torch.inf).topk(min(self.among, score.shape[1]), -1)
        there = best.values > -torch.inf
        weight = (best.values.masked_fill(~there, torch.finfo(score.dtype).min) * self.key**-0.5).softmax(-1)
        return best.indices, weight * there

    def macs(self, patch: int) -> int:
        return self.part.macs(patch) + self.bank.macs(self.bank_patch) + self.reads * (self.rows * self.key + 3 * self.dim * self.hidden)


def gathered(bank: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (b, k) of a bank (1 or b, m, d) -> (b, k, d)."""
    return bank[0][index] if len(bank) == 1 else ops.take(bank, index)


def extended(tokens: Tokens, x: Tensor, size: Tensor) -> Tokens:
    """Tokens with values x (b, t, d) and sizes (b, t) behind them, sources of their own, and padding last.

    The last source stands for no token, so that sizes count.
    """
    n, more, reduced = tokens.x.shape[1], x.shape[1], tokens.reduced
    added = torch.arange(n, n + more + (not reduced), device=x.device).clamp_max(n + more - 1).expand(len(x), -1)
    own, spare = tokens.origin.tensor_split((tokens.origin.shape[1] - reduced,), 1)
    whole = Tokens(torch.cat((tokens.x, x), 1), torch.cat((tokens.size, size), 1), torch.cat((own, added, spare), 1), tokens.prefix)
    if not tokens.reduced:
        return whole
    order = (whole.size == 0).int().argsort(dim=1, stable=True)
    return Tokens(ops.take(whole.x, order), whole.size.gather(1, order), order.argsort(dim=1).gather(1, whole.origin), tokens.prefix)


METHOD = AdaTape
