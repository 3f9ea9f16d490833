"""The one transformer. Slots are attributes, the path is an argument, and `forward` writes no attribute."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apportion.errors import PathError
from apportion.methods import find
from apportion.network.architecture import Architecture
from apportion.vocab import Notes, Path, Space, Step, Tokens


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the approximation that CLIP was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def activation(name: str) -> nn.Module:
    return {"gelu": nn.GELU(), "gelu_tanh": nn.GELU(approximate="tanh"), "quick_gelu": QuickGELU(), "relu": nn.ReLU()}[name]


class Block(nn.Module):
    """Mixer, reducer, FFN; each in its slot, with the norm before the branch (pre-norm) or after the sum (post-norm)."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        linear, norm = find("weight", "dense"), find("norm", "layernorm")
        channels = a.dim // a.heads

        def inner(wanted: bool) -> nn.Module:
            return norm(channels, eps=a.eps) if wanted else nn.Identity()

        def residual() -> nn.Module:
            return find("residual", "layerscale")(a.dim) if a.layer_scale else find("residual", "plain")()

        self.norm_first = a.norm_first
        self.norm1, self.norm2 = norm(a.dim, eps=a.eps), norm(a.dim, eps=a.eps)
        self.mixer = find("mixer", "attention")(
            heads=a.heads,
            channels=channels,
            qkv=linear(a.dim, 3 * a.dim, bias=a.qkv_bias),
            proj=linear(a.dim, a.dim, bias=a.proj_bias),
            query_norm=inner(a.qk_norm),
            key_norm=inner(a.qk_norm),
        )
        self.reducer = find("reducer", "keep_all")()
        self.ffn = find("ffn", "dense")(up=linear(a.dim, a.hidden), down=linear(a.hidden, a.dim), act=activation(a.activation), hidden=a.hidden)
        self.residual1, self.residual2 = residual(), residual()
        self.adapter = find("adapter", "none")()

    def forward(self, tokens: Tokens, step: Step, notes: Notes | None = None) -> Tokens:
        before, after = (self.norm1, nn.Identity()) if self.norm_first else (nn.Identity(), self.norm1)
        mixed = self.mixer(tokens._replace(x=before(tokens.x)), step.heads, notes)
        tokens = tokens._replace(x=after(self.residual1(tokens.x, mixed.out)))
        tokens = self.reducer(tokens, step.tokens, mixed, notes)
        before, after = (self.norm2, nn.Identity()) if self.norm_first else (nn.Identity(), self.norm2)
        x = before(tokens.x)
        return tokens._replace(x=after(self.residual2(tokens.x, self.adapter(x, self.ffn(x, step.width, notes)))))

    def macs(self, before: int, step: Step, prefix: int) -> int:
        return (
            self.mixer.macs(before, step.heads)
            + self.reducer.macs(before, step.tokens, prefix, step.heads)
            + self.ffn.macs(step.tokens, step.width)
            + self.adapter.macs(step.tokens)
        )


class Network(nn.Module):
    """Images (b, channels, side, side) and a path in, logits (b, classes) out."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        a = self.architecture = architecture
        norm = find("norm", "layernorm")
        self.tokeniser = find("tokeniser", "patch")(
            image_size=a.image_size,
            channels=a.channels,
            patch=a.patch,
            dim=a.dim,
            class_token=a.class_token,
            registers=a.registers,
            position_prefix=a.position_prefix,
            bias=a.patch_bias,
            stem=a.stem,
            norm=norm(a.dim, eps=a.eps) if a.stem_norm else nn.Identity(),
        )
        self.blocks = nn.ModuleList(Block(a) for _ in range(a.depth))
        self.depth = find("depth", "every")()
        self.norm = norm(a.dim, eps=a.eps) if a.final_norm else nn.Identity()
        extra = (
            {"heads": a.heads, "hidden": a.hidden, "act": activation(a.activation), "pool_norm": norm(a.dim, eps=a.eps)} if a.pool == "attention_pool" else {}
        )
        self.head = find("head", a.pool)(
            norm=norm(a.dim, eps=a.eps) if a.head_norm else nn.Identity(),
            project=nn.Linear(a.dim, a.classes, bias=a.head_bias) if a.classes else nn.Identity(),
            macs_per_token=a.dim * a.classes,
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
        )

    def forward(self, inputs: Tensor, path: Path, notes: Notes | None = None) -> Tensor:
        """Logits along `path`. `notes`, an empty dict of the caller's, receives "feature" (b, n, d), "size" and "origin" after each step. Raises PathError."""
        self.space.check(path)
        return self.finish(self.run(self.tokeniser(inputs, path.patch), path.steps, notes))

    def run(self, tokens: Tokens, steps: tuple[Step, ...], notes: Notes | None = None) -> Tokens:
        for step in steps:
            tokens = self.blocks[step.block](tokens, step, notes)
            if notes is not None:
                for name, value in (("feature", tokens.x), ("size", tokens.size), ("origin", tokens.origin)):
                    notes.setdefault(name, []).append(value)
        return tokens

    def finish(self, tokens: Tokens) -> Tensor:
        """Tokens -> logits: the final norm and the head, after whichever block came last."""
        return self.head(tokens._replace(x=self.norm(tokens.x)))

    def macs(self, path: Path) -> int:
        """Multiply-adds of one sample along `path`, in closed form."""
        return self.tokeniser.macs(path.patch) + self.segment_macs(0, len(path.steps), path)

    def segment_macs(self, first: int, last: int, path: Path) -> int:
        """Multiply-adds of the steps from `first` up to `last`, with the head where `last` is the end."""
        prefix, total = self.architecture.prefix, 0
        before = path.tokens[first - 1] if first else self.architecture.tokens
        for step in path.steps[first:last]:
            total += self.blocks[step.block].macs(before, step, prefix)  # pyright: ignore[reportCallIssue]
            before = step.tokens
        return total + (self.head.macs(before, prefix) if last == len(path.steps) else 0)

    def at(self, path: Path) -> At:
        """This network along one path: one argument, for compilers and export."""
        return At(self, path)

    def segment(self, first: int, last: int, path: Path) -> Segment:
        """Steps `first` up to `last` of a path: tokens in, tokens out, or logits where `last` is the end."""
        return Segment(self, first, last, path)

    def glance(self, steps: int) -> Glance:
        """The start that all paths of a ladder share: inputs -> (tokens, signal)."""
        return Glance(self, steps)


class At(nn.Module):
    def __init__(self, network: Network, path: Path) -> None:
        super().__init__()
        network.space.check(path)
        self.network, self.path = network, path

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network.finish(self.network.run(self.network.tokeniser(inputs, self.path.patch), self.path.steps))


class Segment(nn.Module):
    def __init__(self, network: Network, first: int, last: int, path: Path) -> None:
        super().__init__()
        network.space.check(path)
        if not 0 <= first <= last <= len(path.steps):
            raise PathError(f"steps {first} to {last}", wanted=f"a range within the {len(path.steps)} steps of {path.name}", do="Correct the range.")
        self.network, self.steps, self.ends = network, path.steps[first:last], last == len(path.steps)

    def forward(self, tokens: Tokens) -> Tokens | Tensor:
        tokens = self.network.run(tokens, self.steps)
        return self.network.finish(tokens) if self.ends else tokens


class Glance(nn.Module):
    """Tokeniser and the first full blocks, and what can be seen there: pooled features and how sure the head would already be.

    The signal (b, features) holds, after the final norm: the mean and spread of the tokens, the first token where it is a class token, and of the
    head's answer at this point the five largest probabilities, the margin between the first two, and the entropy.
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
        patches = x[:, tokens.prefix :]
        parts = [patches.mean(1), patches.std(1)]
        if tokens.prefix:
            parts.append(x[:, 0])
        if self.network.architecture.classes:
            logits = self.network.head(tokens._replace(x=x)).float()
            top = logits.softmax(-1).topk(min(5, logits.shape[-1]), -1).values
            entropy = -(F.log_softmax(logits, -1) * logits.softmax(-1)).sum(-1, keepdim=True)
            parts += [top, top[:, :1] - top[:, 1:2], entropy]
        return tokens, torch.cat([part.float() for part in parts], -1)

    def macs(self) -> int:
        """Multiply-adds that the glance adds to those of the path: the head, evaluated once more."""
        full = self.network.space.full
        return self.network.head.macs(full.tokens[0], self.network.architecture.prefix) if self.network.architecture.classes else 0
