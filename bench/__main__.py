"""`python -m bench NAME --data FOLDER` measures again what lies in `results/`; `python -m bench --help` lists the names."""

from __future__ import annotations

from pathlib import Path as File
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True)
Data = Annotated[File, typer.Option("--data", help="The folder with the data sets, laid out as each bench says.")]


@app.command()
def cifar(data: Data, runs: File = File("runs/cifar"), seeds: str = "0,1,2") -> None:
    """CIFAR-10, dense against adaptive, trained from scratch."""
    from bench import cifar as bench

    bench.main(data, runs, [int(seed) for seed in seeds.split(",")])


@app.command()
def smaller(
    data: Data,
    runs: File = File("runs/cifar"),
    model: Annotated[File | None, typer.Option(help="Texts instead of pictures: the folder of all-MiniLM-L6-v2, as sentence-transformers writes it.")] = None,
    texts: Annotated[File, typer.Option(help="Where networks of texts go.")] = File("runs/text"),
    sets: str = "banking77",
    blocks: Annotated[str, typer.Option(help="Of texts: sizes to train, such as 2,3; without, those about the adaptive one's cost.")] = "",
) -> None:
    """Smaller networks trained alike, beside the adaptive one of `cifar`, or of `text`, at the same cost."""
    from bench import smaller as bench

    if model is None:
        bench.main(data, runs)
    else:
        bench.texts(data, model, texts, sets=sets.split(","), depths=[int(each) for each in blocks.split(",") if each])


@app.command()
def deit(
    data: Data, model: Annotated[File, typer.Option(help="DeiT-Tiny's weights, timm names, safetensors.")], runs: File = File("runs/deit"), repeats: int = 12
) -> None:
    """A real DeiT-Tiny, without training and healed without labels."""
    from bench import deit as bench

    bench.main(data, model, runs, repeats=repeats)


@app.command()
def tuned(
    data: Data,
    model: Annotated[File, typer.Option(help="DeiT-Tiny's weights, timm names, safetensors.")],
    runs: File = File("runs/tuned"),
    repeats: int = 6,
    blocks: Annotated[str, typer.Option(help="Smaller networks of so many blocks beside it, such as 6,8.")] = "",
    ways: Annotated[str, typer.Option(help="Such as glance,checkpoints; all by default.")] = "",
    tests: int = 10_000,
) -> None:
    """A pretrained DeiT-Tiny fine-tuned on CIFAR-10 by us, dense against adaptive."""
    from bench import tuned as bench

    sizes, names = [int(each) for each in blocks.split(",") if each], [each for each in ways.split(",") if each]
    bench.main(data, model, runs, repeats=repeats, blocks=sizes, names=names, tests=tests)


@app.command()
def text(
    data: Data,
    model: Annotated[File, typer.Option(help="The folder of all-MiniLM-L6-v2, as sentence-transformers writes it.")],
    runs: File = File("runs/text"),
    sets: str = "sst2",
    repeats: int = 6,
) -> None:
    """A pretrained MiniLM-L6 on sentences, fine-tuned by us, dense against adaptive."""
    from bench import text as bench

    bench.main(data, model, runs, sets=sets.split(","), repeats=repeats)


@app.command()
def engine(parts: str = "", repeats: int = 12) -> None:
    """The engine on the clock: time saved over work saved, run times side by side, builds under traffic, foretold times, memory. Needs no data."""
    from bench import engine as bench

    bench.main([part for part in parts.split(",") if part], repeats)


@app.command()
def acm(
    data: Data,
    model: Annotated[File, typer.Option(help="The folder of all-MiniLM-L6-v2, as sentence-transformers writes it.")],
    runs: File = File("runs/acm"),
    networks: File = File("runs/cifar"),
    texts: File = File("runs/text"),
    repeats: int = 12,
    only: str = "",
) -> None:
    """Learners that add up, with a gate for every token, on a trained ViT and on a trained text encoder."""
    from bench import acm as bench

    bench.main(data, model, runs, networks=networks, texts=texts, repeats=repeats, only=[name for name in only.split(",") if name])


@app.command()
def packing(
    data: Data, model: Annotated[File, typer.Option(help="The folder of all-MiniLM-L6-v2, as sentence-transformers writes it.")], repeats: int = 5
) -> None:
    """Texts that share rows against graphs by length and against padding, operator by operator."""
    from bench import packing as bench

    bench.main(data, model, repeats=repeats)


@app.command()
def tasks(
    data: Data,
    model: Annotated[File, typer.Option(help="The folder of all-MiniLM-L6-v2, as sentence-transformers writes it.")],
    runs: File = File("runs/tasks"),
    repeats: int = 6,
) -> None:
    """Sentence embeddings, and a class for each pixel of road scenes."""
    from bench import tasks as bench

    bench.main(data, model, runs, repeats=repeats)


@app.command()
def audio(data: Data, runs: File = File("runs/audio"), repeats: int = 30) -> None:
    """A small encoder of our own for spoken digits, dense against adaptive."""
    from bench import audio as bench

    bench.main(data, runs, repeats=repeats)


@app.command()
def control(data: Data, runs: File = File("runs/cifar")) -> None:
    """Deciding: made-up populations with a known optimum, and the networks that `cifar` trained."""
    from bench import control as bench

    bench.main(data, runs)


@app.command()
def checkpoints(data: Data, runs: File = File("runs/cifar"), texts: File = File("runs/text")) -> None:
    """Thresholds at every exit beside one decision after a glance, and thresholds that were placed elsewhere."""
    from bench import checkpoints as bench

    bench.main(data, runs, texts)


@app.command()
def joint(data: Data, runs: File = File("runs/cifar")) -> None:
    """Network and policy taught together, on the networks that `cifar` trained."""
    from bench import joint as bench

    bench.main(data, runs)


@app.command()
def peers(
    data: Data, model: Annotated[File, typer.Option(help="DeiT-Tiny's weights, timm names, safetensors.")], runs: File = File("runs/deit"), repeats: int = 15
) -> None:
    """What else one could do with a DeiT-Tiny: other run times, INT8, static cuts, merging at a fixed rate, exits that mask."""
    from bench import peers as bench

    bench.main(data, model, runs, repeats=repeats)


@app.command()
def perceiver(runs: File = File("runs/perceiver")) -> None:
    """One network for every number of latents, width and depth, on digits that scikit-learn brings."""
    from bench import perceiver as bench

    bench.main(runs)


@app.command()
def systems(data: Data, model: Annotated[File, typer.Option(help="DeiT-Tiny's weights, timm names, safetensors.")], repeats: int = 7) -> None:
    """Every method that cuts an axis, side by side on one trained network as it is."""
    from bench import systems as bench

    bench.main(data, model, repeats=repeats)


@app.command()
def healing(
    data: Data,
    networks: Annotated[File, typer.Option(help="Where `bench cifar` left its networks.")] = File("runs/cifar"),
    runs: File = File("runs/healing"),
    images: int = 15_000,
    tests: int = 10_000,
    seeds: str = "0",
    repeats: int = 15,
    without: Annotated[str, typer.Option(help="Methods to leave out, such as fixed_point,mind_skip.")] = "",
) -> None:
    """Every method with the same short healing on one trained network."""
    from bench import healing as bench

    bench.main(
        data,
        networks,
        runs,
        images=images,
        tests=tests,
        seeds=[int(seed) for seed in seeds.split(",")],
        repeats=repeats,
        without=without.split(",") if without else (),
    )


@app.command()
def distil(data: Data, runs: File = File("runs/cifar")) -> None:
    """What each term of the loss of a taught path is worth, on digits and on CIFAR-10."""
    from bench import distil as bench

    bench.main(data, runs)


@app.command()
def reading(
    part: Annotated[str, typer.Option(help="models or streaming.")] = "models",
    kind: Annotated[str, typer.Option(help="Of streaming: pictures, texts, rows, series, recordings or masks.")] = "pictures",
) -> None:
    """What reading a text model costs over loading it; or the memory that samples take which are larger than a bound."""
    from bench import reading as bench
    from bench import streaming

    if part == "streaming":
        streaming.main(kind)
    else:
        bench.main()


@app.command()
def models() -> None:
    """docs/models.md: which models are read, and which are refused."""
    from bench import models as bench

    bench.main()


@app.command()
def tables() -> None:
    """The README's tables and docs/methods.md, made from results and cards."""
    from bench import tables as pages

    pages.main()


@app.command(name="all")
def everything(data: Data, model: Annotated[File, typer.Option(help="DeiT-Tiny's weights.")] = File("deit_tiny.safetensors")) -> None:
    """Every committed result, then the tables."""
    cifar(data)
    control(data)
    joint(data)
    deit(data, model)
    peers(data, model)
    perceiver()
    audio(data)
    systems(data, model)
    tables()


app()
