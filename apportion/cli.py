"""The same verbs from the shell. Every command takes `--json`; exit codes are those of `apportion.errors`, 130 for Ctrl-C, 2 for a wrong call.

Nothing heavy is imported until a command runs: help is there at once.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path as File
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup


class Commands(TyperGroup):
    """Errors of ours become one line and their exit code, Ctrl-C its message and 130."""

    def invoke(self, ctx: typer.Context) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        from apportion.errors import ApportionError

        try:
            return super().invoke(ctx)
        except ApportionError as error:
            line(Text.assemble((type(error).__name__, "bold red"), " ", " ".join(str(error).split())))
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt as stop:
            trains = ctx.invoked_subcommand in ("adapt", "demo")
            line(Text(str(stop) or ("stopped; the same command goes on from the last checkpoint" if trains else "stopped")))
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=Commands, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="Give each input the compute it needs, and no more."
)
out, err = Console(), Console(stderr=True)
if not out.is_terminal:
    out = Console(width=140)  # a pipe has no width of its own, and a table that is cut says nothing


Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output, and nothing else there.")]
Repeats = Annotated[int, typer.Option(min=1, help="Rounds of timing.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress; errors, and what could not be read, are still told.")]
Measured = Annotated[
    str,
    typer.Option(
        "--backend",
        help="inductor (compiled, fast), aotinductor (compiled, kept, no copies of weights), cudagraphs (recorded, on a GPU), eager (starts at once), "
        "openvino, onnxruntime, onnxruntime-int8, or auto: the fastest here.",
    ),
]
Folder = Annotated[File, typer.Argument(help="The folder of a bundle.")]
DATA = typer.Option(
    "--data",
    help="A folder of images or recordings, an .npz file or `digits`; for texts and rows a .csv, .tsv, .jsonl or .parquet file, or a folder of them;"
    " files of series.",
)
Data = Annotated[str, DATA]
Columns = Annotated[str | None, typer.Option(help="Other names of the columns in tables: text=sentence,label=intent,pair=second; file=NAME beside pictures.")]


STEPS = 300  # of training from scratch, at least: ten epochs of some dozens of samples teach nothing


def tell(text: str) -> None:
    """Progress goes to standard error, so that standard output can be piped."""
    line(Text.assemble(("·", "dim"), " ", text))


def told(quiet: bool) -> Callable[[str], None]:
    """Who is told of progress: someone, or nobody."""
    from apportion.verbs import silent

    return silent if quiet else tell


def line(text: Text) -> None:
    """One line on standard error, however long, and without markup."""
    err.print(text, highlight=False, soft_wrap=True)


def named(columns: str | None) -> dict[str, str] | None:
    """Pairs of a column and its name. Raises PlanError."""
    from apportion.errors import PlanError

    if columns is None:
        return None
    entries = [entry.split("=", 1) for entry in columns.split(",")]
    if any(len(entry) != 2 for entry in entries):
        raise PlanError(f"columns {columns!r}", wanted="such as text=sentence,label=intent", do="Correct them.")
    return {column.strip(): name.strip() for column, name in entries}


def show(data: Any, table: Callable[[], Table], as_json: bool) -> None:
    if as_json:
        print(json.dumps(data, indent=1, allow_nan=False))
    else:
        out.print(table())


@app.command()
def adapt(
    model: Annotated[str, typer.Argument(help="timm:NAME, a .safetensors file, the folder of a text or audio model, or `scratch` to train on the data first.")],
    given: Annotated[str | None, typer.Argument(metavar="DATA", help="The same as --data.", show_default=False)] = None,
    data: Annotated[str | None, DATA] = None,
    to: Annotated[File, typer.Option("--out", help="Where the bundle goes.")] = File("adapted"),
    tolerance: Annotated[float | None, typer.Option(min=0, help="Percentage points of accuracy that may be lost; 0.3 where nothing is said.")] = None,
    confidence: Annotated[
        float | None, typer.Option(min=0, max=1, help="With which the tolerance is to be certified, such as 0.9, on samples kept for that alone.")
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option(min=0, help="Epochs of teaching the paths; 0, the default, adapts without training. `scratch` trains before that as long as it takes."),
    ] = None,
    plan: Annotated[File | None, typer.Option(help="A plan in TOML; the options above come on top of it.")] = None,
    timm_name: Annotated[str | None, typer.Option(help="The timm model that a .safetensors file belongs to.")] = None,
    random: Annotated[bool, typer.Option("--random", help="Untrained weights, to try the way without a download.")] = False,
    length: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of a text, samples of a recording or points of a series, at most; else 512, 16,000 or all, or fewer."),
    ] = None,
    columns: Columns = None,
    task: Annotated[
        str | None, typer.Option(help="What outputs mean where the model does not say: classification, multilabel, regression or segmentation.")
    ] = None,
    pooling: Annotated[str | None, typer.Option(help="How an encoder without a head makes one vector: mean, class_token or pooler.")] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="acm: a gate gives every token its own width (needs epochs). exits: answers on the way, the model itself stays as it is."
            " surrogate: fitted maps in place of blocks left out. apt: plain pictures enter as fewer tokens, before anything runs. perceiver: with scratch."
        ),
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="What the data are, where `scratch` cannot see it: images, texts, recordings, rows (of a table) or series.")
    ] = None,
    vocabulary: Annotated[int, typer.Option(min=1, help="Pieces of words that `scratch` learns from texts.")] = 8000,
    backend: Measured = "inductor",
    allow_slower: Annotated[bool, typer.Option("--allow-slower", help="Serve paths also that are not faster than the dense model on this device.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Read a trained model, make it adapt its compute to each input, measure it, write the bundle and its report."""
    from apportion import verbs
    from apportion.deliver.bundle import read_plan
    from apportion.deliver.tables import summary
    from apportion.errors import PlanError
    from apportion.intake import Pooling
    from apportion.train import Recipe
    from apportion.vocab import Plan, Task

    if (given is None) == (data is None):
        raise typer.BadParameter("give the data once, behind the model or as --data")
    data = given or data
    assert data is not None
    compiler = verbs.wanted(backend)  # a wrong word is refused before anything is trained
    wanted = Plan() if plan is None else read_plan(plan)
    wanted = wanted if method is None else verbs.with_method(wanted, method)
    changes = {name: value for name, value in (("tolerance", tolerance), ("confidence", confidence), ("epochs", epochs)) if value is not None}
    wanted = replace(wanted, **changes, never_slower=wanted.never_slower and not allow_slower)
    source: Any = model
    images: Any = data
    preprocess = None
    if model == "scratch":
        recipe = Recipe(epochs=10, batch=wanted.batch, seed=wanted.seed)
        source, preprocess, images = verbs.scratch(
            data,
            recipe=recipe,
            kind=kind,
            columns=named(columns),
            task=verbs.one_of(Task, task) or "classification",
            length=length,
            vocabulary=vocabulary,
            certify=wanted.confidence > 0,
            least_steps=STEPS,
            perceiver=method == "perceiver",
            stem="patch" if method == "apt" else None,
            folder=to / "training" / "dense",
            tell=told(quiet),
        )
    elif method == "perceiver":
        raise PlanError("the method perceiver for a trained model", wanted="`scratch`: no other network can be read into one", do="Leave it out.")
    elif kind is not None:
        raise PlanError(f"kind {kind!r} for a model", wanted="`scratch`: a model knows what it reads", do="Leave it out.")
    weighed = verbs.adapt(
        source,
        images,
        plan=wanted,
        out=to,
        timm_name=timm_name,
        random=random,
        preprocess=preprocess,
        length=length,
        columns=named(columns),
        task=verbs.one_of(Task, task),
        pooling=verbs.one_of(Pooling, pooling),
        backend=compiler,
        tell=told(quiet),
    )
    show(weighed.figures, lambda: summary(dict(weighed.figures), weighed.report), as_json)
    told(quiet)(f"report: {to / 'report.html'}; try: apportion run {to} INPUT")


@app.command()
def demo(
    to: Annotated[File, typer.Option("--out", help="Where bundle and report go.")] = File("demo"),
    epochs: Annotated[float, typer.Option(min=0, help="Of dense training; half as many teach the paths.")] = 20.0,
    backend: Measured = "inductor",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """The whole way on handwritten digits, with nothing to bring."""
    from apportion import verbs
    from apportion.deliver.tables import summary

    weighed = verbs.demo(to, epochs=epochs, backend=verbs.wanted(backend), tell=told(quiet))
    show(weighed.figures, lambda: summary(dict(weighed.figures), weighed.report), as_json)
    told(quiet)(f"report: {to / 'report.html'}")


@app.command()
def run(
    folder: Folder,
    inputs: Annotated[
        list[str], typer.Argument(help="Pictures or recordings, or folders of them; tables of rows; files of series; for texts tables, or texts as they stand.")
    ],
    budget: Annotated[str | None, typer.Option(help="0.5x, 12ms or 2GMACs per input; with < before it, a cap.")] = None,
    columns: Columns = None,
    backend: Measured = "eager",
    cache: Annotated[File | None, typer.Option(help="A folder in which OpenVINO and ONNX Runtime keep converted graphs for the next start.")] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Label, path and cost of each picture, recording or text. One that cannot be read is named, the others are answered, and the exit code is 5."""
    from apportion import verbs
    from apportion.deliver.tables import grid, spoken, work

    rows, skipped = verbs.run(folder, inputs, budget=budget, columns=named(columns), backend=verbs.wanted(backend), cache=cache, tell=told(quiet))
    found = {"answers": rows, "skipped": [{"file": file, "why": why} for file, why in skipped]}
    lines = [[row["file"], *spoken(row), row["path"], gmacs] for row, gmacs in zip(rows, work([row["gmacs"] for row in rows]), strict=True)]
    show(found, lambda: grid(str(folder), ["file", "answer", "probability", "path", "GMACs"], lines), as_json)
    for file, why in skipped:
        line(Text.assemble(("left out", "red"), f" {file}: {why}"))
    if skipped:
        err.print(f"{len(skipped)} of {len(skipped) + len(rows)} inputs could not be read")
        raise typer.Exit(5)


@app.command()
def bench(
    folder: Folder,
    data: Data,
    columns: Columns = None,
    backend: Measured = "inductor",
    repeats: Repeats = 30,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure a bundle on this device, dense and adaptive in turn, and write the times into it."""
    from apportion import verbs
    from apportion.deliver.tables import summary

    weighed = verbs.bench(folder, data, columns=named(columns), backend=verbs.wanted(backend), repeats=repeats, tell=told(quiet))
    show(weighed.figures, lambda: summary(dict(weighed.figures), weighed.report), as_json)


@app.command()
def report(folder: Folder, as_json: Json = False) -> None:
    """The frontier of a bundle, and where its page with pictures is."""
    from apportion.deliver.adapted import load
    from apportion.deliver.tables import grid, work
    from apportion.measure.judge import METRICS

    adapted = load(folder, backend="eager")
    places, metric = adapted.frontier(), METRICS[adapted.bundle.network.architecture.task]
    page = folder / "report.html"
    lines = [
        [p.name, gmacs, f"{100 * p.accuracy:.2f}", "not measured here" if p.latency_ms is None else f"{p.latency_ms:.3f}"]
        for p, gmacs in zip(places, work([p.gmacs for p in places]), strict=True)
    ]
    show(
        {"frontier": [asdict(place) for place in places], "page": str(page) if page.exists() else None},
        lambda: grid(str(page), ["", "GMACs", f"{metric}, %", "ms, batch 1"], lines),
        as_json,
    )


@app.command()
def systems(name: Annotated[str | None, typer.Argument(help="A method; all of them where none is named.")] = None, as_json: Json = False) -> None:
    """Every method on the shelf: its slot, its source, the axis it adapts and what it needs."""
    from apportion import verbs
    from apportion.deliver.tables import grid

    rows = verbs.systems(name)
    lines = [[row["name"], row["slot"], row["axis"] or "", row["needs"], row["source"], row["arxiv"], row["title"]] for row in rows]
    show(rows, lambda: grid("methods", ["name", "slot", "axis", "needs", "source", "arXiv", "title"], lines), as_json)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="timm:NAME, a .safetensors file, the folder of a text or audio model, or that of a bundle.")],
    timm_name: Annotated[str | None, typer.Option(help="The timm model that a .safetensors file belongs to.")] = None,
    random: Annotated[bool, typer.Option("--random", help="Untrained weights, to look without a download.")] = False,
    image_size: Annotated[int | None, typer.Option(min=1, help="Side of the images, where it is to be another than the model's own.")] = None,
    length: Annotated[int | None, typer.Option(min=1, help="Tokens of a text at full, or samples of a recording.")] = None,
    cache: Annotated[File | None, typer.Option(help="A folder that remembers which shapes of model were found equal, for a quicker reading.")] = None,
    as_json: Json = False,
) -> None:
    """What a model is read as: its parts with parameters and GMACs, the axes that can adapt, and what is refused and why. Nothing is trained or measured."""
    from apportion import verbs
    from apportion.deliver.tables import grid, work

    found = verbs.inspect(model, timm_name=timm_name, random=random, image_size=image_size, length=length, cache=cache)
    if as_json:
        print(json.dumps(asdict(found), indent=1))
        return
    gmacs = work([part.gmacs for part in found.parts])
    parts = [[part.name, part.what, f"{part.parameters:,}", cost, f"{100 * part.share:.1f}"] for part, cost in zip(found.parts, gmacs, strict=True)]
    axes = [[offer.axis, offer.slot, offer.method, ", ".join(map(str, offer.choices)), offer.needs, offer.refused or offer.remark] for offer in found.offers]
    out.print(grid(model, ["", ""], [list(row) for row in found.recognised]))
    out.print(grid("parts", ["part", "methods", "parameters", "GMACs", "%"], parts))
    out.print(grid("axes", ["axis", "slot", "method", "choices", "needs", "remark"], axes))


@app.command()
def doctor(
    model: Annotated[str | None, typer.Option("--model", help="timm:NAME, a .safetensors file, or a folder of a text or audio model, to time.")] = None,
    timm_name: Annotated[str | None, typer.Option(help="The timm model that a .safetensors file belongs to.")] = None,
    random: Annotated[bool, typer.Option("--random", help="Untrained weights, to rank without a download.")] = False,
    length: Annotated[int | None, typer.Option(min=1, help="Tokens of a text, or samples of a recording.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Inputs at once, beside one at a time.")] = 32,
    repeats: Repeats = 20,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """What this machine can run, and how fast; with --model, by which back-end that runs fastest."""
    from apportion import verbs
    from apportion.deliver.tables import fact, grid, standings
    from apportion.measure.doctor import device

    options = {"timm_name": timm_name, "random": random, "length": length}
    ranking = None if model is None else verbs.backends(model, **options, batch=batch, repeats=repeats, tell=told(quiet)).plain()
    facts = device()
    lines = [[key.replace("_", " "), fact(value)] for key, value in facts.items() if key != "advice"]
    found = facts if ranking is None else {**facts, "backends": ranking}
    show(found, lambda: grid("this device", ["", ""], [*lines, *(["advice", hint] for hint in facts["advice"])]), as_json)
    if ranking is not None and not as_json:
        out.print(standings(str(model), ranking))


def main() -> None:
    """The entry point. What other libraries remark below an error is no answer to a command."""
    logging.disable(logging.WARNING)
    app()
