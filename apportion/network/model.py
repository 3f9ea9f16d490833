"""The one transformer. Slots are attributes, the path is an argument, and `forward` writes no attribute."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apportion.errors import PathError, PlanError
from apportion.methods import find
from apportion.methods.task import sight
from apportion.network.architecture import Architecture
from apportion.network.entry import Preview, Whole
from apportion.network.gate import Gate
from apportion.network.stem import activation, layer_norm, tokeniser
from apportion.vocab import Notes, Path, Space, Step, Tokens

Run = tuple[int, int]
"""The first of some blocks in a row, and the one behind the last."""


def gaps(blocks: Sequence[int], depth: int, *, after: int = -1) -> tuple[Run, ...]:
    """Runs of blocks that are left out where these run, of so many, and `after` ran last before them."""
    return tuple((before + 1, block) for before, block in pairwise((after, *blocks, depth)) if before + 1 < block)


class Unit(nn.Module):
    """x / |x|: sentence embeddings that are compared by angle."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1)


def projection(a: Architecture) -> nn.Module:
    """From what was pooled to the answer."""
    layers: list[nn.Module] = []
    width = (a.head_width if a.head_hidden else 0) or a.dim
    if a.head_hidden:
        layers += [nn.Linear(a.dim, width, bias=a.head_hidden_bias), activation(a.head_hidden)]
    if a.head_hidden_norm:
        layers.append(layer_norm(a, width))
    if a.classes:
        layers.append(nn.Linear(width, a.classes, bias=a.head_bias))
    if a.head_unit:
        layers.append(Unit())
    return nn.Sequential(*layers) if len(layers) > 1 else (layers or [nn.Identity()])[0]


class Block(nn.Module):
    """Mixer, reducer, FFN; each in its slot, with the norm before the branch (pre-norm), after the sum (post-norm) or on the branch (res-post-norm)."""

    def __init__(self, a: Architecture, index: int = 0) -> None:
        super().__init__()
        linear = find("weight", "dense")
        channels, everywhere = a.dim // a.heads, index % a.global_every == 0
        disentangled = a.content_to_position or a.position_to_content

        def inner(wanted: bool) -> nn.Module:
            return layer_norm(a, channels) if wanted else nn.Identity()

        def nested(wanted: bool, width: int) -> nn.Module | None:
            return find("norm", "nested")(width, eps=a.eps, bias=a.norm_bias) if wanted else None

        def residual() -> nn.Module:
            return find("residual", "layerscale")(a.dim) if a.layer_scale else find("residual", "plain")()

        self.norm_first, self.norm_branch = a.norm_first, a.norm_branch
        self.norm1, self.norm2 = layer_norm(a) if a.first_norm or index else nn.Identity(), layer_norm(a)
        self.mixer = find("mixer", "attention")(
            heads=a.heads,
            channels=channels,
            qkv=linear(a.dim, 3 * a.dim, bias=a.qkv_bias),
            proj=linear(a.dim, a.dim, bias=a.proj_bias),
            query_norm=inner(a.qk_norm),
            key_norm=inner(a.qk_norm),
            rotary=a.rotary if everywhere else a.rotary_local,
            window=0 if everywhere else a.window,
            relative=0 if disentangled else a.relative_buckets,
            relative_range=a.relative_range,
            gate=Gate(a.heads, linear(a.dim, 2 * a.heads)) if a.relative_gate else None,
            grid=a.grid,
            start=a.rotary_start,
            step=a.rotary_step,
            norm=nested(a.mixer_norm, a.dim),
        )
        if disentangled:
            self.mixer = find("mixer", "disentangled")(
                self.mixer,
                relative=a.relative_buckets,
                relative_range=a.relative_range,
                length=a.length,
                content_to_position=a.content_to_position,
                position_to_content=a.position_to_content,
            )
        self.reducer = find("reducer", "keep_all")()
        self.ffn = find("ffn", "dense")(
            up=linear(a.dim, a.hidden, bias=a.ffn_bias),
            down=linear(a.hidden, a.dim, bias=a.ffn_bias),
            act=activation(a.activation),
            hidden=a.hidden,
            gate=linear(a.dim, a.hidden, bias=a.ffn_bias) if a.gated else None,
            norm=nested(a.ffn_norm, a.hidden),
        )
        self.padded = a.words > 0
        self.residual1, self.residual2 = residual(), residual()
        self.adapter = find("adapter", "none")()

    def forward(self, tokens: Tokens, step: Step, notes: Notes | None = None, real: Tensor | None = None) -> Tokens:
        mixed = self.mixer(tokens._replace(x=self._before(self.norm1, tokens.x)), step.heads, notes)
        tokens = tokens._replace(x=self._sum(self.norm1, self.residual1, tokens.x, mixed.out))
        tokens = self.reducer(tokens, step.tokens, mixed, notes) if real is None else self.reducer(tokens, step.tokens, mixed, notes, real)
        x = self._before(self.norm2, tokens.x)
        fed = self.ffn(x, step.width, notes, tokens.size if self.padded else None)
        return tokens._replace(x=self._sum(self.norm2, self.residual2, tokens.x, self.adapter(x, fed)))

    def _before(self, norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x) if self.norm_first else x

    def _sum(self, norm: nn.Module, residual: nn.Module, x: Tensor, branch: Tensor) -> Tensor:
        if self.norm_branch:
            return residual(x, norm(branch))
        x = residual(x, branch)
        return x if self.norm_first else norm(x)

    def macs(self, before: int, step: Step, prefix: int) -> int:
        return (
            self.mixer.macs(before, step.heads)
            + self.reducer.macs(before, step.tokens, prefix, step.heads)
            + self.ffn.macs(step.tokens, step.width)
            + self.adapter.macs(step.tokens)
        )


class Network(nn.Module):
    """Images (b, channels, side, side), or texts or sound as their tokenisers take them, and a path in; logits (b, classes) out."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        a = self.architecture = architecture
        if a.classes and a.task == "embedding":
            raise PlanError(f"{a.classes} classes for an embedding", wanted="classes 0, or a task with classes", do="Name the task.")
        self.tokeniser = tokeniser(a)
        self.blocks = nn.ModuleList(Block(a, index) for index in range(a.depth))
        self.depth, self.bridge = find("depth", "every")(), find("bridge", "none")()
        self.norm = layer_norm(a) if a.final_norm else nn.Identity()
        extra = (
            {"heads": a.pool_heads or a.heads, "hidden": a.pool_hidden or a.hidden, "act": activation(a.activation), "pool_norm": layer_norm(a)}
            if a.pool == "attention_pool"
            else {"words": a.words > 0}
            if a.pool == "every_token"
            else {}
        )
        project = projection(a)
        self.head = find("head", a.pool)(
            norm=layer_norm(a) if a.head_norm else nn.Identity(),
            project=project,
            macs_per_token=sum(part.in_features * part.out_features for part in project.modules() if isinstance(part, nn.Linear)),
            dim=a.dim,
            **extra,
        )

    @property
    def space(self) -> Space:
        """Every path that the methods in place can serve."""
        a, block = self.architecture, self.blocks[0]
        return Space(
            patch=a.patch,
            depth=a.depth,
            tokens=a.tokens,
            prefix=a.prefix,
            heads=block.mixer.choices,  # pyright: ignore
            width=block.ffn.choices,  # pyright: ignore
            reduces=block.reducer.reduces,  # pyright: ignore
            skips=self.depth.skips,
            orders=self.depth.orders(a.depth),
            entering=self.tokeniser.entering,
        )

    def forward(self, inputs: Tensor, path: Path, notes: Notes | None = None) -> Tensor:
        """Logits along `path`. `notes`, an empty dict of the caller's, receives "feature" (b, n, d), "size" and "origin" after each step. Raises PathError."""
        self.space.check(path)
        return self.finish(self.run(self.enter(inputs, path), path.steps, notes, before=path.entering, after=-1), after=path.blocks[-1])

    def enter(self, inputs: Tensor, path: Path) -> Tokens:
        """What the tokeniser makes of the inputs along `path`."""
        return self.tokeniser(inputs, path.patch) if path.entering is None else self.tokeniser(inputs, path.patch, path.entering)

    def run(self, tokens: Tokens, steps: tuple[Step, ...], notes: Notes | None = None, *, before: int | None = None, after: int | None = None) -> Tokens:
        """Tokens after these steps of a path; `before`: what the path states before the first of them, where that is not the beginning; `after`: the block
        that ran last before them, -1 for none. Without it nothing was left out there.
        """
        before = self.architecture.tokens if before is None else before
        for step in steps:
            tokens, after = self.over(tokens, after, step.block), step.block
            fitted = self._fitted(tokens, step, before, notes) if self.architecture.words else (step, notes)
            tokens, before = self.blocks[step.block](tokens, *fitted), step.tokens
            if notes is not None:
                for name, value in (("feature", tokens.x), ("size", tokens.size), ("origin", tokens.origin)):
                    notes.setdefault(name, []).append(value)
        return tokens

    def _fitted(self, tokens: Tokens, step: Step, before: int, notes: Notes | None) -> tuple[Step, Notes | None, Tensor | None]:
        """The step for a text of its own length: the share that the path states at full length, of the padded batch and of each row without its padding."""
        a, sources = self.architecture, tokens.origin.shape[1] - 1
        share, whole = step.tokens - a.prefix, a.tokens - a.prefix
        fitted = step._replace(tokens=a.prefix - (-share * (sources - a.prefix) // whole))
        if step.tokens == before or tokens.x.shape[1] <= a.prefix + 1:
            return fitted, notes, None
        # A row keeps as many as it would alone: so its answer does not depend on the padding.
        rows = tokens.size.float().sum(1).round().long()
        # Rounded up without a negative number: run times differ in how they divide these.
        return fitted, notes, a.prefix + (share * (rows - a.prefix) + whole - 1).div(whole, rounding_mode="floor")

    def over(self, tokens: Tokens, after: int | None, block: int) -> Tokens:
        """Tokens as block `block` takes them where `after` ran last: by way of the bridge where blocks between them are left out."""
        return tokens if after is None or after + 1 >= block else self.bridge(tokens, after + 1, block)

    def over_macs(self, tokens: int, after: int, block: int) -> int:
        return self.bridge.macs(tokens, after + 1, block) if after + 1 < block else 0

    def bridged(self, path: Path) -> tuple[Run, ...]:
        """The runs of blocks that this path leaves out and for which something stands."""
        return tuple(run for run in gaps(path.blocks, self.architecture.depth) if run in self.bridge.runs)

    def finish(self, tokens: Tokens, *, after: int | None = None) -> Tensor:
        """Tokens -> logits: the final norm and the head. `after`: the block that ran last; without it nothing was left out behind it."""
        tokens = self.over(tokens, after, self.architecture.depth)
        return self.head(tokens._replace(x=self.norm(tokens.x)))

    def macs(self, path: Path) -> int:
        """Multiply-adds of one sample along `path`, in closed form."""
        start = self.tokeniser.macs(path.patch) if path.entering is None else self.tokeniser.macs(path.patch, path.entering)
        return start + self.segment_macs(0, len(path.steps), path)

    def segment_macs(self, first: int, last: int, path: Path, *, entering: int | None = None) -> int:
        """Multiply-adds of the steps from `first` up to `last`, with the head where `last` is the end; `entering`: tokens at the beginning, if others."""
        prefix, total, after = self.architecture.prefix, 0, path.blocks[first - 1] if first else -1
        before = path.tokens[first - 1] if first else entering or path.entering or self.architecture.tokens
        for step in path.steps[first:last]:
            total += self.over_macs(before, after, step.block)
            total += self.blocks[step.block].macs(before, step, prefix)  # pyright: ignore[reportCallIssue]
            before, after = step.tokens, step.block
        return total + (self.over_macs(before, after, self.architecture.depth) + self.head.macs(before, prefix) if last == len(path.steps) else 0)

    def at(self, path: Path) -> At:
        """This network along one path: one argument, for compilers and export."""
        return At(self, path)

    def segment(self, first: int, last: int, path: Path) -> Segment | Whole:
        """Steps `first` up to `last` of a path: tokens in, tokens out, or logits where `last` is the end. From -1, all of it: a preview's state in."""
        return Whole(self, path) if (first, last) == (-1, len(path.steps)) else Segment(self, first, last, path)

    def station(self, first: int, last: int) -> Station:
        """Steps `first` up to `last` of the full path, and the answer that could be given there: inputs (where `first` is 0) or tokens -> (tokens, logits)."""
        return Station(self, first, last)

    def glance(self, steps: int) -> Glance | Preview:
        """The start that all paths of a ladder share: inputs -> (tokens, signal); of -1 steps, before the tokeniser, the inputs themselves."""
        return Preview(self) if steps == -1 else Glance(self, steps)


class At(nn.Module):
    def __init__(self, network: Network, path: Path) -> None:
        super().__init__()
        network.space.check(path)
        self.network, self.path = network, path

    def forward(self, inputs: Tensor) -> Tensor:
        path, network = self.path, self.network
        return network.finish(network.run(network.enter(inputs, path), path.steps, before=path.entering, after=-1), after=path.blocks[-1])


class Segment(nn.Module):
    def __init__(self, network: Network, first: int, last: int, path: Path) -> None:
        super().__init__()
        network.space.check(path)
        if not 0 <= first <= last <= len(path.steps):
            raise PathError(f"steps {first} to {last}", wanted=f"a range within the {len(path.steps)} steps of {path.name}", do="Correct the range.")
        self.network, self.steps, self.ends = network, path.steps[first:last], last == len(path.steps)
        self.before = path.tokens[first - 1] if first else path.entering
        self.after, self.last = path.blocks[first - 1] if first else -1, path.blocks[last - 1] if last else -1

    def forward(self, tokens: Tokens) -> Tokens | Tensor:
        tokens = self.network.run(tokens, self.steps, before=self.before, after=self.after)
        return self.network.finish(tokens, after=self.last) if self.ends else tokens


class Station(nn.Module):
    def __init__(self, network: Network, first: int, last: int) -> None:
        super().__init__()
        full = network.space.full
        if not 0 <= first <= last <= len(full.steps) or not last:
            raise PathError(f"steps {first} to {last}", wanted=f"a range within the {len(full.steps)} steps of the full path", do="Correct the range.")
        self.network, self.steps, self.patch, self.block = network, full.steps[first:last], full.patch, full.steps[last - 1].block

    def forward(self, given: Tensor | Tokens) -> tuple[Tokens, Tensor]:
        tokens = given if isinstance(given, tuple) else self.network.tokeniser(given, self.patch)
        tokens = self.network.run(tokens, self.steps)
        return tokens, self.network.finish(tokens, after=self.block)


class Glance(nn.Module):
    """Tokeniser and the first full blocks, and what can be seen there: pooled features and how sure the head would already be.

    The signal (b, features) holds, after the final norm: the mean and spread of the tokens, the first token where it is a class token, and what the
    head's answer at this point shows (`methods.task.sight`).
    """

    def __init__(self, network: Network, steps: int) -> None:
        super().__init__()
        full = network.space.full
        if not 0 <= steps < len(full.steps):
            raise PathError(f"a glance of {steps} blocks", wanted=f"0 to {len(full.steps) - 1}", do="Leave at least one block to decide about.")
        self.network, self.steps, self.patch = network, full.steps[:steps], full.patch

    def forward(self, inputs: Tensor) -> tuple[Tokens, Tensor]:
        tokens = self.network.run(self.network.tokeniser(inputs, self.patch), self.steps)
        x = self.network.norm(tokens.x)
        parts = _spread(x[:, tokens.prefix :], tokens.size[:, tokens.prefix :, None] if tokens.reduced else None)
        if tokens.prefix:
            parts.append(x[:, 0])
        if self.network.architecture.classes:
            parts.append(sight(self.network.finish(tokens, after=len(self.steps) - 1), self.network.architecture.task))
        return tokens, torch.cat([part.float() for part in parts], -1)

    def macs(self) -> int:
        """Multiply-adds that the glance adds to those of the path: the head, evaluated once more, by way of the bridge where there is one."""
        a, tokens = self.network.architecture, self.network.space.full.tokens[0]
        return self.network.over_macs(tokens, len(self.steps) - 1, a.depth) + self.network.head.macs(tokens, a.prefix) if a.classes else 0


def _spread(x: Tensor, size: Tensor | None) -> list[Tensor]:
    """Mean and standard deviation over the tokens (b, n, d), where there are sizes (b, n, 1) of those that count."""
    if size is None:
        return [x.mean(1), x.std(1)]
    total = size.sum(1)
    mean = (x * size).sum(1) / total.clamp_min(1)
    square = ((x - mean[:, None]).square() * size).sum(1) / (total - 1).clamp_min(1)
    return [mean, square.sqrt()]
