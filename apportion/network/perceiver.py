"""A network that adapts latents, width and depth at once: its blocks run on latents that have read the input once, and the first never see the rest.

Jajal et al. 2025, "AdaPerceiver: Transformers with Adaptive Width, Depth, and Tokens", arXiv 2511.18105; cross-attention to latents: Jaegle et al. 2021,
"Perceiver IO", arXiv 2107.14795, section 3; nested widths: `methods/ffn/matformer.py`; leaving when sure: Teerapittayanon et al. 2016, arXiv 1709.01686.

A path is (t latents, w hidden units, n blocks): `path.tokens` is t in every step, `path.blocks` the first n, `path.width` any choice in any block. One learned
vector, told apart by rotary positions alone, is all of the latents. They come in groups, and one of group j attends to groups up to j: so the first t are
what a run with t latents alone makes of them, at every depth, and one pass with all of them holds the answers of every t and every n.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn

from apportion.errors import PathError, PlanError
from apportion.methods import find, ops
from apportion.methods.mixer.attention import Attention, rates, rotated
from apportion.methods.slots import Contribution, Mixed
from apportion.network.architecture import Activation, Architecture
from apportion.network.model import Glance, Network, layer_norm, projection
from apportion.vocab import Notes, Path, Space, Step, Tokens

POSITION_STD = 0.5  # that of patches' learned positions at the beginning


@dataclass(frozen=True, slots=True)
class PerceiverArchitecture:
    """Shape of a perceiver: that of its blocks as in `Architecture`, and its latents. `latents` ascend, each the end of a group; the last is full."""

    image_size: int
    patch: int
    dim: int
    depth: int
    heads: int
    hidden: int
    classes: int
    latents: tuple[int, ...]
    per_patch: bool = False  # an answer for every patch (segmentation, depth, features) instead of one
    channels: int = 3
    stem: Literal["patch", "conv"] = "patch"
    qk_norm: bool = False
    layer_scale: bool = False
    activation: Activation = "gelu"
    eps: float = 1e-6
    rotary: float = 1e4

    @property
    def encoder(self) -> Architecture:
        """Of tokeniser and blocks, in the words of every network."""
        shared = {name: getattr(self, name) for name in ("image_size", "patch", "dim", "depth", "heads", "hidden", "classes", "channels", "stem")}
        flavour = {name: getattr(self, name) for name in ("qk_norm", "layer_scale", "activation", "eps", "rotary")}
        return Architecture(**shared, **flavour, class_token=False, pool="mean", final_norm=False)


@final
@dataclass(frozen=True, slots=True)
class LatentSpace(Space):
    """The paths of a perceiver: one number of latents in all steps, and the first blocks."""

    counts: tuple[int, ...] = ()  # latents, ascending; the last is full

    def family(self) -> tuple[Path, ...]:
        """Every number of latents with every width and depth."""
        every = itertools.product(self.counts, self.width, self.orders)
        return tuple(self.path(tokens=t, width=w, blocks=blocks) for t, w, blocks in every)

    def check(self, path: Path) -> None:
        """Raises PathError, naming the first entry that cannot be served."""
        depth = len(path.blocks)
        rules = [
            (path.entering is None, f"{path.entering} tokens from the tokeniser", "None: latents read all patches"),
            (path.patch == self.patch, f"patch {path.patch}", f"patch {self.patch}"),
            (1 <= depth <= self.depth and path.blocks == tuple(range(depth)), f"blocks {path.blocks}", f"the first 1 to {self.depth} blocks in order"),
            (len(set(path.tokens)) == 1 and path.tokens[0] in self.counts, f"tokens {path.tokens}", f"one of {self.counts} in every step"),
            (set(path.heads) <= set(self.heads), f"heads {path.heads}", f"some of {self.heads}"),
            (set(path.width) <= set(self.width), f"width {path.width}", f"some of {self.width}"),
        ]
        for fits, found, wanted in rules:
            if not fits:
                raise PathError(found, wanted=wanted, do="Take one of Perceiver.settings(), or build the path with Space.path().")


@final
class Grouped(nn.Module):
    """Rotary self-attention in which a latent sees its own group and those before it: one product for each group, no mask and no work that a mask undoes."""

    def __init__(self, part: Attention, ends: tuple[int, ...]) -> None:
        super().__init__()
        self.part, self.ends, self.choices = part, ends, part.choices

    def forward(self, tokens: Tokens, heads: int, notes: Notes | None = None) -> Mixed:
        part, (b, n, _) = self.part, tokens.x.shape
        query, key, value = part.qkv(tokens.x, out=heads * 3 * part.channels).view(b, n, heads, 3, part.channels).permute(3, 0, 2, 1, 4).unbind(0)
        angle = angles(n, part.channels, part.rotary, query)
        query, key = rotated(part.query_norm(query), angle), rotated(part.key_norm(key), angle)
        seen = [ops.attend(query[:, :, begin:end], key[:, :, :end], value[:, :, :end]) for begin, end in groups(self.ends, n)]
        out = torch.cat(seen, 2).transpose(1, 2).reshape(b, n, heads * part.channels)
        return Mixed(part.proj(out, inp=heads * part.channels), query, key)

    def macs(self, tokens: int, heads: int) -> int:
        pairs = sum((end - begin) * end for begin, end in groups(self.ends, tokens))
        return (4 * tokens * self.part.proj.out_features + 2 * pairs) * heads * self.part.channels

    def contribution(self) -> Contribution:
        return self.part.contribution()

    def permute(self, order: Tensor) -> None:
        self.part.permute(order)


def groups(ends: tuple[int, ...], latents: int) -> list[tuple[int, int]]:
    """Where each group begins and ends, of those that lie within so many latents."""
    return [(begin, end) for begin, end in itertools.pairwise((0, *ends)) if end <= latents]


def angles(latents: int, channels: int, base: float, like: Tensor) -> Tensor:
    """(1, latents, channels / 2) float32: how far the channels of each latent are turned."""
    where = torch.arange(latents, device=like.device)
    return where[None, :, None].float() * rates(channels, base, where)


def sources(a: Architecture) -> nn.Sequential:
    """Norm, then keys and values side by side: (b, n, d) -> (b, n, 2 d)."""
    return nn.Sequential(layer_norm(a), find("weight", "dense")(a.dim, 2 * a.dim))


@final
class Patches(nn.Module):
    """The tokeniser, and keys and values (b, n, 2 d) of its patches: made once, however many latents then read them."""

    def __init__(self, part: nn.Module, a: Architecture) -> None:
        super().__init__()
        self.part, self.sources, self.projected = part, sources(a), 2 * a.tokens * a.dim * a.dim
        # One vector asks for all latents, and by position alone they ask differently: positions must weigh as much as what stands there, or all read one mean.
        nn.init.normal_(part.get_parameter("position"), std=POSITION_STD)

    def forward(self, inputs: Tensor, patch: int) -> Tokens:
        tokens = self.part(inputs, patch)
        return tokens._replace(x=self.sources(tokens.x))

    def macs(self, patch: int) -> int:
        return self.part.macs(patch) + self.projected  # pyright: ignore[reportCallIssue]


@final
class Cross(nn.Module):
    """Queries (1 or b, m, d) with what they find in sources (b, n, 2 d) added; either the queries or the sources are latents, and have rotary positions."""

    def __init__(self, a: Architecture, *, reads: bool) -> None:
        super().__init__()
        linear = find("weight", "dense")
        self.heads, self.dim, self.rotary, self.reads = a.heads, a.dim, a.rotary, reads
        self.query_norm, self.query, self.proj = layer_norm(a), linear(a.dim, a.dim), linear(a.dim, a.dim)

    def forward(self, query: Tensor, found: Tensor, latents: int) -> Tensor:
        """With `reads` there is one query, which every latent asks at its own angle: so it is projected once."""
        (b, n, _), c = found.shape, self.dim // self.heads
        asked = self.query(self.query_norm(query)).view(len(query), -1, self.heads, c).transpose(1, 2)
        key, value = found.view(b, n, 2, self.heads, c).permute(2, 0, 3, 1, 4).unbind(0)
        angle = angles(latents, c, self.rotary, found)
        if self.reads:
            asked = rotated(asked, angle)
        else:
            key = rotated(key, angle)
        out = ops.attend(asked.expand(b, -1, -1, -1), key, value)
        return query + self.proj(out.transpose(1, 2).reshape(b, -1, self.dim))

    def macs(self, queries: int, found: int) -> int:
        """A query that is the same for all samples is charged to each, as at batch 1."""
        return ((1 if self.reads else queries) + queries) * self.dim * self.dim + 2 * queries * found * self.dim


@final
class Write(nn.Module):
    """The one way out, for every depth and any number of latents: a learned query, or one from each patch, reads the latents; then norm and projection."""

    def __init__(self, a: Architecture, *, per_patch: bool) -> None:
        super().__init__()
        self.query = None if per_patch else nn.Parameter(torch.empty(1, 1, a.dim).normal_(std=0.02))
        self.sources, self.cross, self.norm, self.project = sources(a), Cross(a, reads=False), layer_norm(a), projection(a)
        self.queries, self.dim, self.classes = a.tokens if per_patch else 1, a.dim, a.classes

    def forward(self, tokens: Tokens) -> Tensor:
        latents = tokens.x[:, tokens.prefix :]
        query = tokens.x[:, : tokens.prefix] if self.query is None else self.query
        out = self.project(self.norm(self.cross(query, self.sources(latents), latents.shape[1])))
        return out if self.query is None else out[:, 0]

    def macs(self, tokens: int, prefix: int) -> int:
        """`tokens` are latents; queries of patches are carried along, and no work here."""
        return 2 * tokens * self.dim * self.dim + self.cross.macs(self.queries, tokens) + self.queries * self.dim * self.classes


@final
class Perceiver(Network):
    """Images (b, channels, side, side) and a path in; logits (b, classes) out, or (b, patches, classes) with `per_patch`.

    Reading belongs to the first block: what goes into a run from block 0 are keys and values of patches, what comes out of any block are latents (behind
    the queries of patches, with `per_patch`). To be trained from scratch or by distillation (`train.nested`): no published encoder can be read into it.
    Raises PlanError for latents that do not ascend and for channels that cannot be turned in pairs.
    """

    def __init__(self, shape: PerceiverArchitecture) -> None:
        if not shape.latents or list(shape.latents) != sorted({*shape.latents}) or shape.latents[0] < 1:
            raise PlanError(f"latents {shape.latents}", wanted="at least one number, ascending from 1 on", do="Correct the architecture.")
        if shape.dim % (2 * shape.heads) or shape.rotary <= 0:
            do = "Correct the architecture: by rotary positions alone latents differ."
            raise PlanError(f"width {shape.dim}, {shape.heads} heads, base {shape.rotary:g}", wanted="an even number of channels, a base above 0", do=do)
        a = shape.encoder
        super().__init__(a)
        self.shape = shape
        for block in self.blocks:
            block.mixer = Grouped(block.mixer, shape.latents)  # pyright: ignore[reportArgumentType]
            block.ffn = find("ffn", "matformer").from_dense(block.ffn)
        self.depth = find("depth", "first")()
        self.latent = nn.Parameter(torch.empty(1, 1, a.dim).normal_(std=0.02))
        self.tokeniser, self.reader = Patches(self.tokeniser, a), Cross(a, reads=True)
        self.patch_query = find("weight", "dense")(2 * a.dim, a.dim) if shape.per_patch else None
        self.head = Write(a, per_patch=shape.per_patch)

    @property
    def space(self) -> LatentSpace:
        a, block = self.shape, self.blocks[0]
        return LatentSpace(
            patch=a.patch,
            depth=a.depth,
            tokens=a.latents[-1],
            prefix=0,
            heads=block.mixer.choices,  # pyright: ignore
            width=block.ffn.choices,  # pyright: ignore
            reduces=False,
            skips=True,
            orders=self.depth.orders(a.depth),
            counts=a.latents,
        )

    def settings(self) -> list[Path]:
        """Every number of latents with every width and depth, cheapest first and full last. Any mix of widths is a path too."""
        return sorted(self.space.family(), key=self.macs)

    def run(self, tokens: Tokens, steps: tuple[Step, ...], notes: Notes | None = None, *, before: int | None = None, after: int | None = None) -> Tokens:
        """Tokens after these steps; `before` and `after` say nothing here: the number of latents never changes on the way, and nothing stands for a block."""
        for step in steps:
            tokens = self._read(tokens, step.tokens) if step.block == 0 else tokens
            queries, x = tokens.x.tensor_split((tokens.prefix,), 1)
            x = self.blocks[step.block](placed(x), step, notes).x
            tokens = placed(torch.cat((queries, x), 1) if tokens.prefix else x, tokens.prefix)
            if notes is not None:
                for name, value in (("feature", tokens.x), ("size", tokens.size), ("origin", tokens.origin)):
                    notes.setdefault(name, []).append(value)
        return tokens

    def _read(self, patches: Tokens, latents: int) -> Tokens:
        x = self.reader(self.latent, patches.x, latents)
        return placed(x) if self.patch_query is None else placed(torch.cat((self.patch_query(patches.x), x), 1), patches.x.shape[1])

    def first(self, tokens: Tokens, latents: int) -> Tokens:
        """What a run with so many latents would have come to after the same steps."""
        return placed(tokens.x[:, : tokens.prefix + latents], tokens.prefix)

    def segment_macs(self, first: int, last: int, path: Path, *, entering: int | None = None) -> int:
        patches, dim = self.architecture.tokens, self.architecture.dim
        total = sum(self.blocks[step.block].macs(step.tokens, step, 0) for step in path.steps[first:last])  # pyright: ignore[reportCallIssue]
        if first == 0 < last:
            total += self.reader.macs(path.tokens[0], patches) + (2 * patches * dim * dim if self.shape.per_patch else 0)
        return total + (self.head.macs(path.tokens[0], 0) if last == len(path.steps) else 0)

    def glance(self, steps: int) -> Glance:
        """The start that all paths of a ladder share; with no steps, which a ladder over latents or widths needs, the cheapest setting looks ahead."""
        return Scout(self, steps)

    @torch.no_grad()
    def until_sure(self, inputs: Tensor, path: Path, threshold: float) -> tuple[Tensor, Tensor]:
        """Answers (b, classes) and blocks run (b,): a sample leaves after the first block whose answer's largest probability reaches the threshold.

        Only samples that are left go on, each by itself: the others of its batch change nothing. Costs `macs_until`. Raises PlanError with `per_patch`.
        """
        if self.shape.per_patch:
            raise PlanError("an answer for every patch", wanted="one for each sample, to be sure of", do="Choose a path for each sample beforehand.")
        self.space.check(path)
        state, left = self.tokeniser(inputs, path.patch), torch.arange(len(inputs), device=inputs.device)
        logits, depth = inputs.new_zeros(len(inputs), self.shape.classes), torch.zeros_like(left)
        for number, step in enumerate(path.steps, 1):
            state = self.run(state, (step,))
            answer = self.finish(state)
            logits[left], depth[left] = answer, number
            on = answer.softmax(-1).amax(-1) < threshold
            if not on.any():
                break
            left, state = left[on], placed(state.x[on])
        return logits, depth

    def macs_until(self, path: Path) -> tuple[int, ...]:
        """Multiply-adds of a sample that leaves after 1, 2, ... blocks of a path, with the answers that were not yet sure enough."""
        write, last = self.head.macs(path.tokens[0], 0), len(path.steps)
        blocks = itertools.accumulate(self.segment_macs(step, step + 1, path) + (write if step + 1 < last else 0) for step in range(last))
        return tuple(self.tokeniser.macs(path.patch) + spent for spent in blocks)


def placed(x: Tensor, prefix: int = 0) -> Tokens:
    """Values (b, n, d) as tokens, each standing for itself."""
    b, n, _ = x.shape
    return Tokens(x, x.new_ones(b, n), torch.arange(n, device=x.device).expand(b, n), prefix)


@final
class Scout(Glance):
    """The shared start of a ladder, and what is seen there: mean and spread of the latents, and how sure their answer would already be.

    Without shared steps the state is the patches, and what is seen is what the cheapest setting makes of them; that work is charged and not used again.
    Signal (b, 2 d), and with two classes or more their five largest probabilities, the margin and the entropy (means over patches with `per_patch`).
    """

    def __init__(self, network: Perceiver, steps: int) -> None:
        super().__init__(network, steps)
        self.cheapest = network.settings()[0]

    def forward(self, inputs: Tensor) -> tuple[Tokens, Tensor]:
        start = self.network.tokeniser(inputs, self.patch)
        seen = self.network.run(start, self.steps or self.cheapest.steps)
        x = seen.x[:, seen.prefix :].float()
        parts = [x.mean(1), x.std(1, correction=0)]
        if self.network.architecture.classes > 1:
            log_p = self.network.finish(seen).float().log_softmax(-1)
            top = log_p.exp().topk(min(5, log_p.shape[-1]), -1).values
            sure = torch.cat((top, top[..., :1] - top[..., 1:2], -(log_p * log_p.exp()).sum(-1, keepdim=True)), -1)
            parts.append(sure if sure.ndim == 2 else sure.mean(1))
        return (seen if self.steps else start), torch.cat(parts, -1)

    def macs(self) -> int:
        """Multiply-adds beside those of the path: the answer at this point, and without shared steps all of the cheapest setting."""
        if not self.steps:
            return self.network.segment_macs(0, len(self.cheapest.steps), self.cheapest)
        return self.network.head.macs(self.steps[0].tokens, 0) if self.network.architecture.classes > 1 else 0
