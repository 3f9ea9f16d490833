"""One verb for every trained model: a timm or transformers name, a local file or folder of weights, a module in hand, or a network of our own."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path as File
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from apportion.errors import DataError, NoEffect, PlanError, Refused
from apportion.intake import _torchvision
from apportion.intake.hf_families import Pooling
from apportion.intake.listen import Listen
from apportion.intake.preprocess import Preprocess
from apportion.intake.proof import proved
from apportion.intake.rows import Tabulate
from apportion.intake.series import Align
from apportion.intake.texts import Tokenise
from apportion.intake.verify import Verified
from apportion.network import Network
from apportion.vocab import Task

CLASSES: tuple[Task, ...] = ("classification", "multilabel", "regression")


@dataclass(frozen=True, slots=True)
class Source:
    """What came in: the network, how to feed it, and where it is from."""

    network: Network
    feed: Preprocess | Tokenise | Listen | Tabulate | Align | None  # None for a text model that brought no tokenizer
    classes: tuple[str, ...] | None
    verified: Verified | None  # None for a network of our own: there is nothing to compare with
    provenance: dict[str, str | int | bool | None]

    @property
    def equality(self) -> str:
        """How it was held against the model that was read, in a sentence."""
        if self.verified is None:
            return "nothing to compare with"
        facts, figures = self.provenance, f"a difference of at most {self.verified.max_abs:.1g}"
        if facts["equality_found_in"] is None:
            return f"{figures}, tested now" + (f"; not kept: {facts['equality_not_kept']}" if "equality_not_kept" in facts else "")
        return f"{figures}, this shape of model tested on {facts['equality_tested_on']} (found in {facts['equality_found_in']}), these weights now"

    @property
    def preprocess(self) -> Preprocess:
        """How pictures are made into inputs. Raises PlanError for a model that reads texts."""
        if not isinstance(self.feed, Preprocess):
            raise PlanError("a model that reads texts", wanted="a model for images", do="Use Source.tokenise.")
        return self.feed

    @property
    def fed(self) -> Preprocess | Tokenise | Listen | Tabulate | Align:
        """How samples are made into inputs. Raises PlanError where the model brought nothing that says so."""
        return self.tokenise if self.feed is None else self.feed

    @property
    def tokenise(self) -> Tokenise:
        """How texts are made into inputs. Raises PlanError for a model that reads images, or one that brought no tokenizer."""
        if not isinstance(self.feed, Tokenise):
            raise PlanError("a model without a tokenizer", wanted="a text model from a folder with a tokenizer.json", do="Pass preprocess=Tokenise(...).")
        return self.feed


def read_model(
    model: str | File | nn.Module,
    *,
    timm_name: str | None = None,
    random: bool = False,
    num_classes: int | None = None,
    image_size: int | None = None,
    seed: int = 0,
    preprocess: Preprocess | Tokenise | Listen | Tabulate | Align | None = None,
    example: Tensor | None = None,
    length: int | None = None,
    pooling: Pooling | None = None,
    unit: bool = False,
    task: Task | None = None,
    cache: File | None = None,
) -> Source:
    """Read a model and prove that nothing was lost.

    `model`: "timm:NAME" with its published weights (`random=True`: untrained weights from `seed`, with `num_classes` of one's own);
    a .safetensors file, or a folder with model.safetensors, of the timm model `timm_name` (or the "architecture" in a config.json beside it);
    a timm VisionTransformer; a Network, which needs `preprocess`; and for texts a folder as transformers or sentence-transformers writes it,
    "hf:NAME@REVISION", or a transformers model. With `image_size` positions are resampled as timm does it, which may cost accuracy. Texts' paths are stated at
    `length` tokens; an encoder without a head needs `pooling` ("mean", "class_token" or "pooler") and is of length 1 with `unit`, unless its folder says so.
    `task` says what the outputs mean where the model does not: one class, unless its folder says otherwise; without classes they are an embedding.
    Equality is tested on random inputs, with other weights; and with those that are there on a few of them, and on `example` (rows of inputs) where given.
    `cache`: a folder that remembers which shapes of model have passed the former, the greater part of what reading costs; `provenance` says when it was tested,
    and where it was found. What comes from a file looks into that file, as it does in its own library: replace the file, do not write over it.
    Raises Refused for a model that cannot be read exactly or whose weights cannot be had, DataError for a bad file or folder, PlanError for options that
    contradict each other, NoEffect for a cache with a network of our own, where there is nothing to test.
    """
    source = _read(model, timm_name, random, num_classes, image_size, seed, preprocess, example, length, pooling, unit, cache)
    _mean(source.network, task)
    return source


def _mean(network: Network, task: Task | None) -> None:
    """Writes down what the network's outputs mean. Raises PlanError where they cannot mean that."""
    a = network.architecture
    fits: tuple[Task, ...] = ("token_classification" if a.words else "segmentation",) if a.pool == "every_token" else CLASSES if a.classes else ("embedding",)
    if (task or a.task) not in fits and (task is not None or a.classes):
        raise PlanError(f"task {task or a.task!r} for this model", wanted=f"one of {', '.join(fits)}", do="Name another task, or read a model with that head.")
    network.architecture = replace(a, task=task or (a.task if a.task in fits else fits[0]))


def _read(
    model: str | File | nn.Module,
    timm_name: str | None,
    random: bool,
    num_classes: int | None,
    image_size: int | None,
    seed: int,
    preprocess: Preprocess | Tokenise | Listen | Tabulate | Align | None,
    example: Tensor | None,
    length: int | None,
    pooling: Pooling | None,
    unit: bool,
    cache: File | None,
) -> Source:
    if (num_classes is not None or random) and not (random and str(model).startswith("timm:")):
        found = "num_classes or random for trained weights"
        raise PlanError(found, wanted='"timm:NAME" with random=True', do="Leave them out: trained weights bring their own.")
    if image_size is not None and (isinstance(model, Network) or _of_transformers(model)):
        raise PlanError(f"image_size {image_size} for this model", wanted="a model of timm's that reads images", do="Leave it out.")
    if isinstance(model, Network):
        if preprocess is None:
            raise PlanError("a Network without preprocessing", wanted="preprocess=Preprocess(...)", do="Say how its inputs are made.")
        if cache is not None:
            raise NoEffect("a cache for a Network", wanted="a model of another library", do="Leave it out: there is nothing to compare it with.")
        return Source(model, preprocess, None, None, {"source": "network", "torch": str(torch.__version__)})
    if _of_transformers(model):
        return _transformers(model, preprocess, example, length, pooling, unit, cache)
    if length is not None or pooling is not None or unit:
        raise PlanError("length, pooling or unit for a model of images", wanted="a model that reads texts", do="Leave them out.")
    if preprocess is not None and not isinstance(preprocess, Preprocess):
        raise PlanError(f"{type(preprocess).__name__} for a model of images", wanted="preprocess=Preprocess(...)", do="Leave it out.")
    timm = _timm()
    origin: dict[str, str | int | bool | None] = {"timm": timm.__version__, "torch": str(torch.__version__)}
    if isinstance(model, nn.Module):
        source, names, origin = model, None, {"source": f"{type(model).__module__}.{type(model).__qualname__}", **origin}
    elif str(model).startswith("timm:"):
        name = str(model).removeprefix("timm:")
        source = _named(timm, name, random=random, seed=seed, num_classes=num_classes, image_size=image_size if random else None)
        names = None if random else _imagenet(source)
        cfg = _config(source)
        origin = {"source": str(model), "random": random, "hub": cfg.get("hf_hub_id"), "license": cfg.get("license"), **origin}
    else:
        file = File(model) / "model.safetensors" if File(model).is_dir() else File(model)
        source, names = _local(timm, file, timm_name)
        with file.open("rb") as handle:
            origin = {"source": str(file), "sha256": hashlib.file_digest(handle, "sha256").hexdigest(), **origin}
    from apportion.intake.timm_vit import describe, read_vit, resized

    if image_size is not None and not random:
        source, origin = resized(source, image_size), {**origin, "image_size": image_size}
    a = describe(source)
    if names is not None and len(names) != a.classes:
        raise DataError(f"{len(names)} class names for {a.classes} outputs", wanted="one name for each output", do="Correct label_names in config.json.")
    noise = torch.randn(3, a.channels, a.image_size, a.image_size, generator=torch.Generator().manual_seed(0))
    proof = proved(source, lambda made, own: read_vit(made, own=own), a, [noise, noise[:1]], example, own=isinstance(model, nn.Module), cache=cache)
    return Source(proof.network, preprocess or _preprocess(source, a.image_size), names, proof.figures, {**origin, **proof.facts})


def _of_transformers(model: str | File | nn.Module) -> bool:
    if isinstance(model, nn.Module):
        return any(kind.__module__.startswith("transformers.") for kind in type(model).__mro__)
    return str(model).startswith("hf:") or (File(model).is_dir() and "model_type" in _read_config(File(model) / "config.json"))


def _transformers(
    model: str | File | nn.Module,
    feed: Preprocess | Tokenise | Listen | Tabulate | Align | None,
    example: Tensor | None,
    length: int | None,
    pooling: Pooling | None,
    unit: bool,
    cache: File | None,
) -> Source:
    _torchvision.ready()
    try:
        import transformers
    except ImportError as error:
        raise Refused(f"no transformers here ({error})", wanted="transformers", do="Install the extra: pip install 'apportion[text]'.") from error
    from apportion.intake import hf_audio, hf_text
    from apportion.intake.hf_folder import open_folder

    if isinstance(feed, Preprocess):
        raise PlanError("preprocessing of images for a model of transformers", wanted="preprocess=Tokenise(...) or Listen(...)", do="Leave it out.")
    origin: dict[str, str | int | bool | None] = {"transformers": transformers.__version__, "torch": str(torch.__version__)}
    tokenizer = extractor = None
    if isinstance(model, nn.Module):
        source, origin = model, {"source": f"{type(model).__module__}.{type(model).__qualname__}", **origin}
    else:
        found = open_folder(str(model), pooling)
        source, tokenizer, extractor, origin = found.model, found.tokenizer, found.extractor, {"source": str(model), **found.facts, **origin}
        length, pooling, unit = found.length if length is None else length, pooling or found.pooling, unit or found.unit
    hears = hf_audio.hears(source)
    room = hf_audio if hears else hf_text

    def read(made: nn.Module, own: bool) -> Network:
        inner = made.get_submodule("model")
        if hears:
            return hf_audio.read_audio(inner, length=length, pooling=pooling, unit=unit, own=own)
        return hf_text.read_text(inner, length=length, pooling=pooling, unit=unit, own=own)

    a = room.describe(source, length=length, pooling=pooling, unit=unit)
    proof = proved(room.Answering(source, pooling, unit), read, a, room.examples(a), example, own=isinstance(model, nn.Module), cache=cache)
    if feed is None and hears and extractor is not None:
        if a.samples and extractor.get("return_attention_mask"):
            origin, extractor = {**origin, "attention_mask": "left out: what is filled up with zeros is heard"}, {**extractor, "return_attention_mask": False}
        feed = Listen.from_extractor(extractor, length=a.samples or a.frames)
    if feed is None and tokenizer is not None:
        feed = Tokenise(tokenizer, length=a.length, padding=a.padding)
    if feed is not None and isinstance(feed, Listen) != hears:
        found = f"{type(feed).__name__} for a model that {'hears' if hears else 'reads texts'}"
        raise PlanError(found, wanted="Listen(...)" if hears else "Tokenise(...)", do="Leave it out, or give the other.")
    return Source(proof.network, feed, hf_text.labels(source) if a.classes else None, proof.figures, {**origin, **proof.facts})


def _timm() -> ModuleType:
    _torchvision.ready()
    try:
        import timm
    except ImportError as error:
        raise Refused(f"no timm here ({error})", wanted="timm and torchvision", do="Install the extra: pip install 'apportion[timm]'.") from error
    return timm


def _named(timm: ModuleType, name: str, *, random: bool, seed: int, num_classes: int | None, image_size: int | None) -> nn.Module:
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), 3)
        raise Refused(f"timm model {name!r}", wanted=f"a name that timm knows, such as {', '.join(near) or 'vit_small_patch16_224'}", do="Correct the name.")
    options = {key: value for key, value in (("num_classes", num_classes), ("img_size", image_size)) if value is not None}
    try:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            return timm.create_model(name, pretrained=not random, **options)
    except Exception as error:  # downloads fail in as many ways as there are networks and hubs
        do = f"Pass a local file: read_model('weights.safetensors', timm_name={name!r}); or take untrained weights: random=True."
        wanted = "options that timm takes for this model" if random else "published weights, from timm's cache or over the network"
        raise Refused(f"timm:{name}, which could not be made ({type(error).__name__}: {str(error)[:200]})", wanted=wanted, do=do) from error


def _local(timm: ModuleType, file: File, name: str | None) -> tuple[nn.Module, tuple[str, ...] | None]:
    """A timm model with the weights of a file; a config.json beside it, as timm writes one, gives name, arguments and preprocessing."""
    if not file.is_file() or file.suffix != ".safetensors":
        raise DataError(
            f"{file}, which ends otherwise" if file.is_file() else f"no file {file}",
            wanted='a .safetensors file, a folder with model.safetensors, or "timm:NAME"',
            do="Correct the path, or convert other formats first: pickles are not read.",
        )
    config = _read_config(file.parent / "config.json")
    name = name or config.get("architecture")
    if name is None or not timm.is_model(name):
        raise Refused(f"{file} of timm model {name!r}", wanted="the name of its architecture", do="Pass timm_name=, or put timm's config.json beside the file.")
    try:
        state = load_file(file)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file}: {error}", wanted="a whole .safetensors file", do="Fetch it again.") from error
    head = state.get("head.weight")
    arguments = {"num_classes": 0 if head is None else head.shape[0], **config.get("model_args", {})}
    try:
        source = timm.create_model(name, pretrained=False, pretrained_cfg_overlay=config.get("pretrained_cfg"), **arguments)
        source.load_state_dict({key: value.float() if value.is_floating_point() else value for key, value in state.items()}, strict=True, assign=True)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise Refused(
            f"{file}, which does not fit {name}: {str(error)[:300]}", wanted="that model's own tensors", do="Correct timm_name or the file."
        ) from error
    names = config.get("label_names") or config.get("pretrained_cfg", {}).get("label_names")
    return source, tuple(names) if names else None


def _read_config(file: File) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        config = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: {error}", wanted="a JSON object", do="Correct or remove it.") from error
    if not isinstance(config, dict):
        raise DataError(f"{file} that is a {type(config).__name__}", wanted="a JSON object", do="Correct or remove it.")
    return config


def _config(source: nn.Module) -> Mapping[str, Any]:
    return getattr(source, "pretrained_cfg", None) or {}


def _imagenet(source: nn.Module) -> tuple[str, ...] | None:
    """Names of the outputs of published weights that were trained on ImageNet."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    cfg = _config(source)
    if cfg.get("label_names"):
        return tuple(cfg["label_names"])
    subset = infer_imagenet_subset(cfg) if cfg.get("num_classes") else None
    return None if subset is None else tuple(ImageNetInfo(subset).label_descriptions())


def _preprocess(source: nn.Module, size: int) -> Preprocess:
    cfg = _config(source)
    found = {key: cfg.get(key) for key in ("mean", "std", "crop_pct", "interpolation", "crop_mode")}
    squash, interpolation = found["crop_mode"] == "squash", found["interpolation"]
    if not found["mean"] or not found["std"] or interpolation not in ("bicubic", "bilinear") or found["crop_mode"] not in ("center", "squash", None):
        raise PlanError(
            f"a model with preprocessing {found}", wanted="mean, std, bicubic or bilinear, centre crop or squash", do="Pass preprocess=Preprocess(...)."
        )
    return Preprocess(size, tuple(found["mean"]), tuple(found["std"]), found["crop_pct"] or 1.0, interpolation, squash)
