"""One folder that holds an adaptive model whole: weights once, plain text beside them, nothing that runs on loading.

plan.toml                  what was adapted and how, and what it takes to build the network again
model.safetensors          the weights, once for all paths
controller.safetensors     the weights of the decision
ladder.json                the served paths, the operating budget, accuracy and cost measured for each
costs/<device>.json        milliseconds on one device, named by its fingerprint
provenance.json            where it came from: source, versions, data, digests of the files above
README.md, report.html     for people
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path as File
from typing import Any, TypeVar

import tomli_w
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as pack_tensors
from torch import nn

from apportion.control import Controller
from apportion.errors import BundleError, PlanError
from apportion.files import write_atomic, write_json
from apportion.intake import Preprocess
from apportion.network import Architecture, Network, put
from apportion.vocab import Ladder, Path, Plan

VERSION = 1
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Rung:
    """What was measured of one served path on data that nothing was fitted on: GMACs with the decision, accuracy (0..1) if every input took it."""

    gmacs: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class Settings:
    """plan.toml, as a whole."""

    version: int
    plan: Plan
    architecture: Architecture
    preprocess: Preprocess
    controller: dict[str, int]


@dataclass(frozen=True, slots=True)
class Bundle:
    """An adaptive model and all that is known of it; `budget` is the operating point, a share of the full path's cost."""

    network: Network
    ladder: Ladder
    controller: Controller
    preprocess: Preprocess
    plan: Plan
    budget: float
    rungs: tuple[Rung, ...]
    frontier: tuple[Mapping[str, Any], ...]  # the controller over its budgets: budget, cost, accuracy, share of inputs on each rung
    dense_gmacs: float  # of the network that was read, without any decision
    classes: tuple[str, ...] = ()
    costs: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)


def save(bundle: Bundle, folder: File, *, extra: Mapping[str, str] | None = None) -> None:
    """Write the folder, each file in one piece and provenance.json, which names the digests of the others, last. `extra` maps file names to text."""
    settings = Settings(VERSION, bundle.plan, bundle.network.architecture, bundle.preprocess, bundle.controller.config())
    files: dict[str, bytes] = {
        "plan.toml": tomli_w.dumps(_plain(asdict(settings))).encode(),
        "model.safetensors": _pack(bundle.network),
        "controller.safetensors": _pack(bundle.controller),
        "ladder.json": _json(
            {
                "glance": bundle.ladder.glance,
                "paths": [path.to_dict() for path in bundle.ladder.paths],
                "rungs": [asdict(rung) for rung in bundle.rungs],
                "budget": bundle.budget,
                "frontier": [dict(point) for point in bundle.frontier],
                "dense_gmacs": bundle.dense_gmacs,
                "classes": list(bundle.classes),
            }
        ),
    }
    for name, content in files.items():
        write_atomic(folder / name, content)
    for device, table in bundle.costs.items():
        write_json(folder / "costs" / f"{device}.json", table)
    for name, text in (extra or {}).items():
        write_atomic(folder / name, text)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    write_json(folder / "provenance.json", {**bundle.provenance, "sha256": digests})


def load(folder: File) -> Bundle:
    """Read the folder back. Raises BundleError naming the file that is missing, altered, or does not fit the others; nothing is filled in or left out."""
    if not folder.is_dir():
        raise BundleError(f"no folder {folder}", wanted="the folder of a bundle", do="Give the folder that `adapt` wrote.")
    provenance = _parse(folder, "provenance.json", _read(folder, "provenance.json"))
    content = {name: _read(folder, name) for name in ("plan.toml", "model.safetensors", "controller.safetensors", "ladder.json")}
    for name, data in content.items():
        if hashlib.sha256(data).hexdigest() != provenance.get("sha256", {}).get(name):
            raise BundleError(f"{folder / name}, altered since it was written", wanted="the file that provenance.json names", do="Copy the bundle again.")
    settings = validated(Settings, tomllib.loads(content["plan.toml"].decode()), folder / "plan.toml")
    if settings.version != VERSION:
        raise BundleError(f"a bundle of version {settings.version}", wanted=f"version {VERSION}", do="Write it again with this release.")
    ladder = _parse(folder, "ladder.json", content["ladder.json"])
    try:
        network = Network(settings.architecture)
        for choice in settings.plan.choices:
            put(network, choice)
        controller = Controller.from_config(settings.controller)
        paths = Ladder(tuple(Path.from_dict(path) for path in ladder["paths"]), ladder["glance"])
        for path in paths.paths:
            network.space.check(path)
        costs = {file.stem: _parse(folder, f"costs/{file.name}", file.read_bytes()) for file in sorted((folder / "costs").glob("*.json"))}
        bundle = Bundle(
            network=_fill(network, content["model.safetensors"], folder / "model.safetensors"),
            ladder=paths,
            controller=_fill(controller, content["controller.safetensors"], folder / "controller.safetensors"),
            preprocess=settings.preprocess,
            plan=settings.plan,
            budget=ladder["budget"],
            rungs=tuple(Rung(**rung) for rung in ladder["rungs"]),
            frontier=tuple(ladder["frontier"]),
            dense_gmacs=ladder["dense_gmacs"],
            classes=tuple(ladder["classes"]),
            costs=costs,
            provenance={key: value for key, value in provenance.items() if key != "sha256"},
        )
    except (KeyError, TypeError) as error:
        raise BundleError(f"{folder / 'ladder.json'} with {error}", wanted="the entries that `save` writes", do="Copy the bundle again.") from error
    return bundle


def read_plan(file: File) -> Plan:
    """A plan from a TOML file. Raises PlanError, naming the entry, for an unknown key or a value of the wrong kind."""
    try:
        data = tomllib.loads(file.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise PlanError(f"{file}: {error}", wanted="a plan in TOML", do="See docs/design.md for one.") from error
    return validated(Plan, data, file)


def validated(kind: type[T], data: Any, where: File) -> T:
    """`data` as `kind`, every key known and every value of its kind. Raises PlanError."""
    strict = with_config(ConfigDict(extra="forbid"))
    for known in (Plan, Settings):
        strict(known)
    try:
        return TypeAdapter(kind).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise PlanError(f"{where}: {place} ({first['msg'].lower()})", wanted=f"the entries of {kind.__name__}", do="Correct the file.") from error


def _fill(module: Any, data: bytes, file: File) -> Any:
    """The module with exactly these tensors in it, in eval mode: unknown, missing or misshapen ones are an error."""
    try:
        module.load_state_dict(parse_tensors(data), strict=True)
    except (RuntimeError, SafetensorError) as error:
        raise BundleError(f"{file}: {str(error).splitlines()[-1].strip()}", wanted="the tensors of the plan beside it", do="Copy the bundle again.") from error
    return module.requires_grad_(False).eval()


def _pack(module: nn.Module) -> bytes:
    return pack_tensors({name: tensor.detach().contiguous() for name, tensor in module.state_dict().items()})


def _read(folder: File, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        raise BundleError(f"{folder} without {name}", wanted="a whole bundle", do="Copy it again, or run `adapt` again.") from error


def _parse(folder: File, name: str, data: bytes) -> dict[str, Any]:
    try:
        return json.loads(data)
    except ValueError as error:
        raise BundleError(f"{folder / name}: {error}", wanted="JSON", do="Copy the bundle again.") from error


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _plain(value: Any) -> Any:
    """Tuples as lists, as TOML wants them."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, tuple | list) else value
