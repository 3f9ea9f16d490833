"""One folder that holds an adaptive model whole: weights once, plain text beside them, nothing that runs on loading.

plan.toml                  what was adapted and how, and what it takes to build the network again
model.safetensors          the weights, once for all paths
controller.safetensors     the weights of the decision
tokenizer.json             how texts become tokens, where the model reads texts
ladder.json                the served paths, the operating budget, accuracy and cost measured for each
provenance.json            where it came from: source, versions, data, digests of the files above
costs/<device>.json        milliseconds on one device, named by its fingerprint, sealed to the files above; a device may be added at any time
README.md, report.html     for people
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path as File
from typing import Annotated, Any, TypeVar

import tomli_w
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as pack_tensors
from torch import nn

from apportion.control import Cascade, Certificate, Controller, Decider, Entry
from apportion.errors import ApportionError, BundleError, PathError, PlanError
from apportion.files import write_atomic, write_json
from apportion.intake import Align, Feed, Listen, Preprocess, Tabulate, Tokenise
from apportion.network import Architecture, Network, Perceiver, PerceiverArchitecture, put
from apportion.vocab import Ladder, Path, Plan

VERSION = 1
CORE = ("plan.toml", "model.safetensors", "controller.safetensors", "ladder.json")
WORDS = "tokenizer.json"
AGAIN = "Copy the bundle again, or run `adapt` again."
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Rung:
    """What was measured of one served path on data that nothing was fitted on: GMACs with the decision, accuracy (0..1) if every input took it."""

    gmacs: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class Reached:
    """The controller at one budget: cost as a share of the full path, accuracy (0..1), and the share of inputs on each rung."""

    budget: float
    cost: float
    accuracy: float
    share: list[float]


@dataclass(frozen=True, slots=True)
class Served:
    """ladder.json, as a whole."""

    glance: Annotated[int, Field(ge=-1)]
    paths: tuple[Path, ...]
    rungs: tuple[Rung, ...]
    budget: float
    frontier: tuple[Reached, ...]
    dense_gmacs: float
    classes: tuple[str, ...]
    certificate: Certificate | None = None
    buckets: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Sizes:
    """What it takes to build the controller again."""

    features: Annotated[int, Field(gt=0)]
    rungs: Annotated[int, Field(gt=0)]
    hidden: Annotated[int, Field(gt=0)]
    knots: Annotated[int, Field(gt=1)]


@dataclass(frozen=True, slots=True)
class Stops:
    """The same of checkpoints, and of a decision before the tokeniser."""

    rungs: Annotated[int, Field(gt=1)]
    knots: Annotated[int, Field(gt=1)]
    cells: Annotated[int, Field(ge=0)] = 0  # of a picture, that the decision looks at


@dataclass(frozen=True, slots=True)
class Tokens:
    """How texts are fed, beside tokenizer.json."""

    length: Annotated[int, Field(gt=0)]
    padding: int
    pairs: bool
    lengths: tuple[int, ...] = ()  # that graphs are built for, ascending; none: each twice the one before


@dataclass(frozen=True, slots=True)
class Settings:
    """plan.toml, as a whole: `preprocess` for a model of images, `tokenise` for one of texts, `listen` for one of sound, `tabulate` for one of tables,
    `align` for one of series; `perceiver` beside `preprocess` where the network is one."""

    version: int
    plan: Plan
    architecture: Architecture
    controller: Sizes | Stops
    preprocess: Preprocess | None = None
    tokenise: Tokens | None = None
    listen: Listen | None = None
    tabulate: Tabulate | None = None
    align: Align | None = None
    perceiver: PerceiverArchitecture | None = None  # whose encoder the architecture is, where the network is one

    def __post_init__(self) -> None:
        a, feeds = self.architecture, ("preprocess", "tokenise", "listen", "tabulate", "align")
        shaped = {"tokenise": a.words, "listen": a.samples or a.frames, "tabulate": a.columns, "align": a.points}
        kind = next((name for name, size in shaped.items() if size), "preprocess")
        found = [name for name in feeds if getattr(self, name) is not None]
        if found != [kind]:
            raise PlanError(f"{' and '.join(found) or 'nothing'} for inputs, with this architecture", wanted=f"{kind}, and no other", do=AGAIN)
        if self.listen is not None and (self.listen.length, self.listen.bands) != (a.samples or a.frames, a.bands):
            raise PlanError(f"a length of {self.listen.length} and {self.listen.bands} bands", wanted=f"{a.samples or a.frames} and {a.bands}", do=AGAIN)
        if self.tabulate is not None and (len(self.tabulate.numbers), self.tabulate.entries) != (a.numbers, a.categories):
            found = f"{len(self.tabulate.numbers)} numbers and categories of {self.tabulate.entries} entries"
            raise PlanError(found, wanted=f"{a.numbers} and {a.categories}", do=AGAIN)
        if self.align is not None and (self.align.channels, self.align.length) != (a.channels, a.points):
            found = f"{self.align.channels} channels of {self.align.length} points"
            raise PlanError(found, wanted=f"{a.channels} of {a.points}", do=AGAIN)
        if self.perceiver is not None and self.perceiver.encoder != a:
            raise PlanError(f"a perceiver whose encoder is {self.perceiver.encoder}", wanted=f"{a}", do=AGAIN)
        control = "glance" if isinstance(self.controller, Sizes) else "entry" if self.controller.cells else "checkpoints"
        if control != self.plan.control:
            raise PlanError(f"a controller that does not fit control = {self.plan.control!r}", wanted="the sizes of that kind", do=AGAIN)


@dataclass(frozen=True, slots=True)
class Bundle:
    """An adaptive model and all that is known of it; `budget` is the operating point, a share of the full path's cost."""

    network: Network
    ladder: Ladder
    controller: Decider
    preprocess: Feed
    plan: Plan
    budget: float
    rungs: tuple[Rung, ...]
    frontier: tuple[Mapping[str, Any], ...]  # the controller over its budgets: budget, cost, accuracy, share of inputs on each rung
    dense_gmacs: float  # of the network that was read, without any decision
    classes: tuple[str, ...] = ()
    certificate: Certificate | None = None  # where a confidence was asked for
    lengths: tuple[int, ...] = ()  # of texts, that graphs are built for, ascending up to the network's own; none: each twice the one before
    buckets: tuple[int, ...] = ()  # batch sizes that graphs are built for, ascending, where they were chosen from traffic; none: whatever loads it says
    costs: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)


def save(bundle: Bundle, folder: File, *, extra: Mapping[str, str] | None = None) -> None:
    """Write the folder, each file in one piece and provenance.json, which names the digests, last: a write cut short is an altered bundle or the old one.

    `extra` maps file names to text. Times of devices that the bundle does not know are removed: they were of a model that stood here before.
    """
    feed = bundle.preprocess
    settings = Settings(
        VERSION,
        bundle.plan,
        bundle.network.architecture,
        (Sizes if isinstance(bundle.controller, Controller) else Stops)(**bundle.controller.config()),
        preprocess=feed if isinstance(feed, Preprocess) else None,
        tokenise=Tokens(feed.length, feed.padding, feed.pairs, bundle.lengths) if isinstance(feed, Tokenise) else None,
        listen=feed if isinstance(feed, Listen) else None,
        tabulate=feed if isinstance(feed, Tabulate) else None,
        align=feed if isinstance(feed, Align) else None,
        perceiver=bundle.network.shape if isinstance(bundle.network, Perceiver) else None,
    )
    served = Served(
        glance=bundle.ladder.glance,
        paths=bundle.ladder.paths,
        rungs=bundle.rungs,
        budget=bundle.budget,
        frontier=tuple(Reached(**point) for point in bundle.frontier),
        dense_gmacs=bundle.dense_gmacs,
        classes=bundle.classes,
        certificate=bundle.certificate,
        buckets=bundle.buckets,
    )
    parts = (tomli_w.dumps(_plain(asdict(settings))).encode(), _pack(bundle.network), _pack(bundle.controller), _json(asdict(served)))
    contents = dict(zip(CORE, parts, strict=True)) | ({WORDS: feed.tokenizer.encode()} if isinstance(feed, Tokenise) else {})
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    for name, content in contents.items():
        write_atomic(folder / name, content)
    if WORDS not in contents:
        (folder / WORDS).unlink(missing_ok=True)  # of a model that stood here before
    for file in _tables(folder):
        if file.stem not in bundle.costs:
            file.unlink()
    for device, table in bundle.costs.items():
        write_json(folder / "costs" / f"{device}.json", {**table, "seal": _seal(table, digests)})
    for name, text in (extra or {}).items():
        write_atomic(folder / name, text)
    write_json(folder / "provenance.json", {**bundle.provenance, "sha256": digests})


def load(folder: File) -> Bundle:
    """Read the folder back. Raises BundleError or PlanError naming the file that is missing, altered, or does not fit the others; nothing is filled in."""
    if not folder.is_dir():
        raise BundleError(f"no folder {folder}", wanted="the folder of a bundle", do="Give the folder that `adapt` wrote.")
    provenance = _parse(folder / "provenance.json", _read(folder, "provenance.json"))
    digests = provenance.pop("sha256", None)
    content = {name: _vouched(folder, name, digests) for name in CORE}
    settings = _settings(content["plan.toml"], folder / "plan.toml")
    network, controller = _built(settings, folder / "plan.toml")
    served = validated(Served, _parse(folder / "ladder.json", content["ladder.json"]), folder / "ladder.json")
    return Bundle(
        network=_fill(network, content["model.safetensors"], folder / "model.safetensors"),
        ladder=_ladder(served, settings, network, folder / "ladder.json"),
        controller=_fill(controller, content["controller.safetensors"], folder / "controller.safetensors"),
        preprocess=settings.preprocess
        or settings.listen
        or settings.tabulate
        or settings.align
        or _tokenise(settings, _vouched(folder, WORDS, digests), folder / WORDS),
        plan=settings.plan,
        budget=served.budget,
        rungs=served.rungs,
        frontier=tuple(asdict(point) for point in served.frontier),
        dense_gmacs=served.dense_gmacs,
        classes=served.classes,
        certificate=served.certificate,
        lengths=() if settings.tokenise is None else settings.tokenise.lengths,
        buckets=served.buckets,
        costs={file.stem: _table(file, digests) for file in _tables(folder)},
        provenance=provenance,
    )


def read_plan(file: File) -> Plan:
    """A plan from a TOML file. Raises PlanError, naming the entry, for an unknown key or a value of the wrong kind."""
    try:
        data = tomllib.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise PlanError(f"{file}: {error}", wanted="a plan in TOML", do="See docs/design.md for one.") from error
    return validated(Plan, data, file)


def validated(kind: type[T], data: Any, where: File) -> T:
    """`data` as `kind`, every key known and every value of its kind. Raises PlanError."""
    strict = with_config(ConfigDict(extra="forbid", allow_inf_nan=False))
    for known in (Plan, Settings, Served):
        strict(known)
    try:
        # By way of JSON: there a list may stand for a tuple, and still nothing else is converted.
        return TypeAdapter(kind).validate_json(json.dumps(data, default=str), strict=True)
    except ApportionError as error:  # from the type itself
        raise PlanError(f"{where}: {error.found}", wanted=error.wanted, do="Correct the file.") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        entries = ", ".join(entry.name for entry in fields(kind))  # pyright: ignore[reportArgumentType]
        raise PlanError(f"{where}: {place} ({first['msg'].lower()})", wanted=f"the entries of {kind.__name__}: {entries}", do="Correct the file.") from error


def _vouched(folder: File, name: str, digests: Any) -> bytes:
    """The content of a file of the bundle, as it was written."""
    data = _read(folder, name)
    if not isinstance(digests, dict) or hashlib.sha256(data).hexdigest() != digests.get(name):
        raise BundleError(f"{folder / name}, altered since it was written", wanted="the file that provenance.json names", do=AGAIN)
    return data


def _tokenise(settings: Settings, data: bytes, file: File) -> Tokenise:
    """Raises PlanError where the package for it is missing or cannot read the file."""
    found, a = settings.tokenise, settings.architecture
    assert found is not None  # Settings has one of the two
    if (found.length, found.padding) != (a.length, a.padding) or (found.pairs and a.token_types < 2):
        raise BundleError(f"{file.parent / 'plan.toml'}: tokenise {asdict(found)}", wanted="what the architecture takes", do=AGAIN)
    if found.lengths and (min(found.lengths) < 1 or list(found.lengths) != sorted(set(found.lengths)) or found.lengths[-1] != a.length):
        raise BundleError(f"{file.parent / 'plan.toml'}: tokenise.lengths {found.lengths}", wanted=f"positive ones, ascending to {a.length}", do=AGAIN)
    try:
        return Tokenise(data.decode(), length=found.length, padding=found.padding, pairs=found.pairs)
    except UnicodeDecodeError as error:
        raise BundleError(f"{file}: {error}", wanted="text in UTF-8", do=AGAIN) from error


def _settings(data: bytes, file: File) -> Settings:
    try:
        found = tomllib.loads(data.decode())
    except ValueError as error:
        raise BundleError(f"{file}: {error}", wanted="TOML", do=AGAIN) from error
    # The version comes first: another one may have other entries.
    if found.get("version") != VERSION:
        raise BundleError(f"{file} of version {found.get('version')}", wanted=f"version {VERSION}", do="Write the bundle again with this release.")
    return validated(Settings, found, file)


def _built(settings: Settings, file: File) -> tuple[Network, Decider]:
    """Network and controller of these shapes, weights still to come."""
    try:
        network = Network(settings.architecture) if settings.perceiver is None else Perceiver(settings.perceiver)
        for choice in settings.plan.choices:
            put(network, choice)
        kind = {"glance": Controller, "checkpoints": Cascade, "entry": Entry}[settings.plan.control]
        return network, kind.from_config(asdict(settings.controller))
    except ApportionError as error:
        raise BundleError(f"{file}: {error.found}", wanted=error.wanted, do=AGAIN) from error
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, ValueError) as error:  # sizes that no module can be built with
        raise BundleError(f"{file}: {error}", wanted="sizes that fit each other", do=AGAIN) from error


def _ladder(served: Served, settings: Settings, network: Network, file: File) -> Ladder:
    rungs, outputs = settings.controller.rungs, settings.architecture.classes
    counts = {len(served.paths), len(served.rungs), *(len(point.share) for point in served.frontier)}
    if counts != {rungs} or len(served.classes) not in (0, outputs):
        wanted = f"{rungs} of each, and {outputs} class names or none"
        raise BundleError(f"{file} with {sorted(counts)} entries for the paths and {len(served.classes)} class names", wanted=wanted, do=AGAIN)
    if served.buckets and (min(served.buckets) < 1 or list(served.buckets) != sorted(set(served.buckets))):
        raise BundleError(f"{file}: buckets {served.buckets}", wanted="positive batch sizes, ascending", do=AGAIN)
    try:
        ladder = Ladder(served.paths, served.glance)
        if (served.glance == -1) != (settings.plan.control == "entry"):
            raise PathError(f"a glance of {served.glance} with control {settings.plan.control!r}", wanted="-1 with 'entry' alone", do=AGAIN)
        network.glance(served.glance)
        for path in served.paths:
            network.space.check(path)
        exits = [network.space.path(blocks=range(len(path.steps))) for path in served.paths]
        if settings.plan.control == "checkpoints" and served.paths != tuple(exits):
            raise PathError(f"checkpoints on {[path.name for path in served.paths]}", wanted="exits of the full path", do=AGAIN)
    except ApportionError as error:
        raise BundleError(f"{file}: {error.found}", wanted=error.wanted, do=AGAIN) from error
    return ladder


def _tables(folder: File) -> list[File]:
    return sorted((folder / "costs").glob("*.json"))


def _table(file: File, digests: Mapping[str, str]) -> dict[str, Any]:
    table = _parse(file, file.read_bytes())
    if table.pop("seal", None) != _seal(table, digests):
        raise BundleError(f"{file}, altered or of another model", wanted="times of this model", do="Remove it and run `apportion bench` on that device.")
    return table


def _seal(table: Mapping[str, Any], digests: Mapping[str, str]) -> str:
    """Ties a table of times to its content and to the files that it was measured with."""
    return hashlib.sha256(_json([dict(table), digests])).hexdigest()


def _fill(module: Any, data: bytes, file: File) -> Any:
    """The module with exactly these tensors in it, in eval mode: unknown, missing or misshapen ones are an error."""
    try:
        tensors = parse_tensors(data)
        for name, own in module.state_dict().items():
            if name in tensors and tensors[name].dtype != own.dtype:
                raise BundleError(f"{file}: {name} of {tensors[name].dtype}", wanted=str(own.dtype), do=AGAIN)
        module.load_state_dict(tensors, strict=True)
    except (RuntimeError, SafetensorError) as error:
        raise BundleError(f"{file}: {str(error).splitlines()[-1].strip()}", wanted="the tensors of the plan beside it", do=AGAIN) from error
    return module.requires_grad_(False).eval()


def _pack(module: nn.Module) -> bytes:
    return pack_tensors({name: tensor.detach().contiguous() for name, tensor in module.state_dict().items()})


def _read(folder: File, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        raise BundleError(f"{folder} without {name}", wanted="a whole bundle", do=AGAIN) from error


def _parse(file: File, data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError as error:
        raise BundleError(f"{file}: {error}", wanted="JSON", do=AGAIN) from error
    if not isinstance(found, dict):
        raise BundleError(f"{file} that holds a {type(found).__name__}", wanted="a JSON object", do=AGAIN)
    return found


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _plain(value: Any) -> Any:
    """Tuples as lists, and None left out, as TOML wants them."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items() if entry is not None}
    return [_plain(entry) for entry in value] if isinstance(value, tuple | list) else value
