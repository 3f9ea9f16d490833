"""Audio encoders of transformers as our network, exact or refused: wav2vec 2.0 and its kin (HuBERT, WavLM, UniSpeech), AST, the encoder of Whisper.

A class is read where `hf_audio_families` names it; every tensor must find its place: what is left over was not understood. Sound is of one length, filled up
with zeros: the network equals the source called without attention_mask. A large wav2vec 2.0, which was trained with masks, is best given sound of full length.
Written against transformers 5.23. Import through `read.py`, which readies torchvision first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apportion.errors import PlanError
from apportion.intake.hf_audio_families import EPS, FAMILIES, IN_THE_WAY, TABLE, Family, Pooling, need, refusal
from apportion.intake.hf_text import labels
from apportion.network import Architecture, Network

__all__ = ["Answering", "describe", "examples", "hears", "labels", "read_audio"]

KNOWN = ("transformers.models.", "transformers.activations", "torch.nn.modules.", "torch.nn.utils.parametriz")  # the last: weight norm
IDLE = "masked_spec_embed"  # stands for what is masked in training
MANY = 400  # tokens from which on an equality test of 17 samples takes minutes


class Answering(nn.Module):
    """A transformers model as a function of one tensor, as the network takes it: what the network is compared with."""

    def __init__(self, model: nn.Module, pooling: Pooling | None = None, unit: bool = False) -> None:
        super().__init__()
        self.model, self.unit = model, unit
        self.pooling: Pooling | None = pooling

    def forward(self, inputs: Tensor) -> Tensor:
        if self.pooling is None:
            return self.model(inputs).logits
        family, base = _family(self.model, self.pooling)
        out = self.model.get_submodule(base.removesuffix("."))(inputs)
        if self.pooling == "pooler":
            x = out.pooler_output
        elif self.pooling == "class_token":
            x = out.last_hidden_state[:, 0]
        else:
            x = out.last_hidden_state[:, family.prefix :].mean(1)
        return F.normalize(x, dim=-1) if self.unit else x


def hears(model: nn.Module) -> bool:
    """Whether a transformers model takes sound: waveforms, or features made of them."""
    return getattr(model, "main_input_name", "") in ("input_values", "input_features")


def read_audio(model: nn.Module, *, length: int | None = None, pooling: Pooling | None = None, unit: bool = False, own: bool = True) -> Network:
    """A network with copies of the model's weights in float32, in evaluation mode; without `own`, weights that stay as they are look into its memory.

    `length`: samples of a waveform, a second at 16 kHz where none is named; spectrograms have the length that their model insists on. A model without a head
    needs `pooling`: "mean" (AST: of the tokens behind the first two), and for AST also "class_token", or "pooler" for the mean of the first two.
    Raises Refused, naming what has no exact counterpart, and PlanError for a length or pooling that the model does not have.
    """
    family, base = _family(model, pooling)
    a = describe(model, length=length, pooling=pooling, unit=unit)
    with torch.device("meta"):
        network = Network(a)
    left = {
        name: value.detach().float() for name, value in model.state_dict().items() if not name.startswith(family.beside) and name.rpartition(".")[2] != IDLE
    }
    shared = {name: left.pop(name) for name in list(left) if name.endswith("attention.rel_attn_embed.weight")}
    seen = ((name, _tensor(name, left, shared, family, base, a).cpu()) for name in network.state_dict())
    state = {name: value.clone() if own else value for name, value in seen}
    if left:
        raise refusal(f"{next(iter(left))}, which has no place in the network")
    for name, value in network.state_dict().items():
        need(state[name].shape == value.shape, f"{tuple(state[name].shape)} for {name}", str(tuple(value.shape)))
    network.load_state_dict(state, assign=True)
    return network.eval()


def describe(model: nn.Module, *, length: int | None = None, pooling: Pooling | None = None, unit: bool = False) -> Architecture:
    """The shape of a transformers model. Raises Refused for what its configuration asks of it and the network would not do."""
    family, _ = _family(model, pooling)
    any_model: Any = model
    config, eps = any_model.config, getattr(any_model.config, "layer_norm_eps", EPS)
    if unit and pooling is None:
        raise PlanError("unit for a model that answers with classes", wanted="unit for a model without a head", do="Leave unit out.")
    _check(model, config, eps, pooling)
    pool = "mean" if not family.prefix or pooling == "mean" else "class_token" if pooling == "class_token" else "prefix_mean"
    shared: dict[str, Any] = {
        "image_size": 0,
        "patch": 0,
        "dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "classes": config.num_labels if pooling is None else 0,
        "class_token": False,
        "eps": eps,
        "pool": pool,
        "head_unit": unit,
    }
    return Architecture(**{**shared, **family.describe(config, length, pooling is None)})


def examples(a: Architecture, *, seed: int = 0) -> list[Tensor]:
    """Made-up sound for the equality test, 1, 3 and 17 at once: noise, and waveforms of which most end early in zeros. Fewer of what is long."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(17 if a.tokens < MANY else 3, *a.input_shape, generator=generator)
    few = [noise[:3]] if len(noise) > 3 else []
    if not a.samples:
        return [noise, *few, noise[:1]]
    ends = torch.randint(a.samples // 4, a.samples, (len(noise), 1), generator=generator)
    early = noise.flip(0) * (torch.arange(a.samples) < ends)
    return [noise, early, *few, early[:1]]


def _family(model: nn.Module, pooling: Pooling | None) -> tuple[Family, str]:
    """The family of a model, and the prefix of its encoder's tensors."""
    name = type(model).__name__
    if not type(model).__module__.startswith("transformers.models.") or name not in TABLE:
        reason = next((why for part, why in IN_THE_WAY.items() if part in name), "no exact counterpart is known")
        wanted = f"one of {', '.join(f'{each} (Model or {family.classifies})' for each, family in FAMILIES.items())}"
        raise refusal(f"model of class {_name(model)}: {reason}", wanted=wanted)
    family = FAMILIES[TABLE[name]]
    whole = name.endswith(family.classifies)
    if pooling not in ((None,) if whole else family.pooling):
        do = "Leave pooling out." if whole else f"Pass pooling as one of {', '.join(family.pooling)}: transformers leaves it to the user."
        raise PlanError(f"pooling {pooling!r} for a {name}", wanted="pooling for a model without a head, of a kind that it can have", do=do)
    prefix: str = model.base_model_prefix  # pyright: ignore[reportAttributeAccessIssue, reportAssignmentType]
    return family, family.base if family.base is not None else f"{prefix}." if whole else ""


def _check(model: nn.Module, config: Any, eps: float, pooling: Pooling | None) -> None:
    for name, module in model.named_modules():
        if not type(module).__module__.startswith(KNOWN):
            raise refusal(f"{name or 'the model'} of class {_name(module)}", do="Read the model as transformers made it, without adapters or quantisation.")
        if isinstance(module, nn.LayerNorm | nn.GroupNorm):
            wanted = EPS if ".conv_layers." in f".{name}" else eps
            need(module.eps == wanted, f"eps {module.eps} in {name}", str(wanted))
    if pooling is None:
        need(config.problem_type in (None, "single_label_classification"), f"problem_type {config.problem_type}", "one class for each sound")
        need(config.num_labels > 1, f"{config.num_labels} output", "at least two classes")


def _tensor(ours: str, left: dict[str, Tensor], shared: Mapping[str, Tensor], family: Family, base: str, a: Architecture) -> Tensor:
    """The tensor of the source that belongs to ours; it is taken out of what is `left`."""

    def take(name: str) -> Tensor:
        if name not in left:
            raise refusal(f"no {name}", wanted="every block alike, with weights and biases where the network has them")
        return left.pop(name)

    module, _, leaf = ours.rpartition(".")
    parts = family.parts
    if module.startswith("head."):
        return take(f"{family.head[module]}.{leaf}")
    if ours == "tokeniser.position":
        return take(f"{base}{parts[ours]}").reshape(-1, a.dim)
    if ours == "tokeniser.first":
        return torch.cat([take(f"{base}embeddings.{name}")[0] for name in ("cls_token", "distillation_token")])
    if ours == "tokeniser.position.weight":  # of a convolution, as one length for each tap and directions
        length, direction = (take(f"{base}{parts[module]}.parametrizations.weight.original{i}") for i in (0, 1))
        return direction * (length / direction.norm(dim=(0, 1), keepdim=True))
    if module.startswith("tokeniser.layers."):
        index, part = module.removeprefix("tokeniser.layers.").split(".")
        return take(f"{base}{parts[f'tokeniser.layers.{part}'].format(index)}.{leaf}")
    if not module.startswith("blocks."):
        return take(f"{base}{parts[module]}.{leaf}")
    _, index, part = module.split(".", 2)
    block = f"{base}{family.block}.{index}."
    if leaf == "relative":
        need(len(shared) == 1, f"{len(shared)} tables of a bias by distance", "one, which all blocks share")
        return next(iter(shared.values()))
    if part == "mixer.gate":
        return take(f"{block}{parts['gate_scale']}").flatten()
    if part == "mixer.gate.linear":
        return _gate(take(f"{block}{parts['gate']}.{leaf}"), a.heads)
    if part == "mixer.qkv":
        if leaf == "bias" and f"{block}{parts['key']}.bias" not in left:  # Whisper has none: a shift of all keys is nothing to the softmax
            left[f"{block}{parts['key']}.bias"] = torch.zeros(a.dim)
        fused = torch.cat([take(f"{block}{parts[each]}.{leaf}") for each in ("query", "key", "value")])
        return fused.unflatten(0, (3, a.heads, -1)).transpose(0, 1).flatten(0, 2)
    return take(f"{block}{parts[part]}.{leaf}")


def _gate(found: Tensor, heads: int) -> Tensor:
    """Two gates for each head from its own channels of a token; the source adds up four numbers for each, and uses the same for all heads."""
    summed = found.unflatten(0, (2, 4)).sum(1)
    return summed.repeat(heads) if summed.ndim == 1 else torch.block_diag(*[summed] * heads)


def _name(module: object) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
