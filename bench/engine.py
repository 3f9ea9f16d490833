"""The engine on the clock: time saved over multiply-adds saved for every path, run time and batch size; what deciding costs; builds under traffic; memory.

`python -m bench engine` needs no data: times do not depend on what weights a network has, and these are drawn from a seed. Two networks, ViT-S/16 at 224
pixels and the small one of `python -m bench cifar` at 32; eight paths that cut blocks, tokens and units, coarsely spaced, behind a glance of two blocks and a
controller that was not taught. Times are ratios to the dense network on the same run time, in the same interleaved rounds. `--parts` names what is to be
measured again; the rest stays as it was committed, with its own day.
"""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path as File
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn

from apportion.control import Controller
from apportion.control.complexity import Complexity
from apportion.control.policy import Policy
from apportion.deliver import deciding
from apportion.deliver.adapted import routed
from apportion.deliver.costs import mean_rung_macs
from apportion.engine import Backend, Engine, Graph, build, plain, serving
from apportion.intake import Preprocess, read_model
from apportion.intake._torchvision import ready
from apportion.measure.forecast import forecast, work
from apportion.measure.latency import interleaved, ratio, realisation_ratio
from apportion.measure.memory import peak_bytes
from apportion.network import Architecture, Network, put
from apportion.vocab import Ladder, Path, Plan, Space
from bench import cifar, results

GLANCE = 2
VIT_S = Architecture(image_size=224, patch=16, dim=384, depth=12, heads=6, hidden=1536, classes=1000)
NETWORKS = {"small ViT, 32 pixels": cifar.ARCHITECTURE, "ViT-S/16, 224 pixels": VIT_S}
BATCHES = {"small ViT, 32 pixels": (1, 8, 32), "ViT-S/16, 224 pixels": (1, 8)}
BACKENDS: tuple[Backend, ...] = ("openvino", "onnxruntime", "inductor")
TIMED = {"small ViT, 32 pixels": BACKENDS, "ViT-S/16, 224 pixels": BACKENDS[:2]}  # torch's compiler takes half a minute for each graph of the larger one
REQUESTS = 10_000  # batches of traffic
LARGEST = 32  # samples in one of them, at most
PIECES = (32, 16, 8)  # samples at once, of LARGEST in a call
HELD_OUT = 6  # paths that the table of times is asked about
STORED: tuple[Backend, ...] = ("openvino", "onnxruntime", "aotinductor")  # those that find their graphs in a cache


class Served(NamedTuple):
    """An engine with its graphs, its paths, and what each costs as a share of the dense network, decision included."""

    engine: Engine
    paths: tuple[Path, ...]
    shares: list[float]


def networks(architecture: Architecture) -> tuple[Network, Network]:
    """The dense network, and the same with what a plan puts into it by default."""
    torch.manual_seed(0)
    dense = Network(architecture).eval().requires_grad_(False)
    ours = Network(architecture)
    ours.load_state_dict(dense.state_dict())
    for choice in Plan().choices:
        put(ours, choice)
    return dense, ours.eval().requires_grad_(False)


def paths(space: Space) -> list[Path]:
    """The full path and seven cheaper ones: blocks left out, tokens cut, units cut, and two of these together."""
    rest, movable = space.depth - GLANCE, space.tokens - space.prefix
    quarter, half, most = (space.prefix + movable * part // 4 for part in (1, 2, 3))
    every = [*range(GLANCE), *range(GLANCE, space.depth, 2)]

    def cut(keep: int, blocks: int = rest) -> list[int]:
        return [space.tokens] * GLANCE + [keep] * blocks

    return [
        space.path(blocks=range(GLANCE)),
        space.path(tokens=[*cut(half, 1), *[quarter] * (rest - 1)]),
        space.path(blocks=every, tokens=cut(half, len(every) - GLANCE)),
        space.path(tokens=cut(half)),
        space.path(blocks=range(GLANCE + rest // 2)),
        space.path(width=[space.width[-1]] * GLANCE + [space.width[-2]] * rest),
        space.path(tokens=cut(most)),
        space.full,
    ]


def served(network: Network, backend: Backend, buckets: Sequence[int], make: Callable[..., Graph] = build) -> Served:
    ladder = Ladder(tuple(sorted(paths(network.space), key=network.macs)), GLANCE)
    width = network.glance(GLANCE)(torch.zeros(1, *network.architecture.input_shape))[1].shape[1]
    sizes = {"features": width, "rungs": len(ladder.paths)}
    controller = Controller(Complexity(**sizes), Policy(**sizes)).requires_grad_(False)
    macs = mean_rung_macs(network, ladder, decision=deciding.decision_macs(width, len(ladder.paths)))
    feed = Preprocess(network.architecture.image_size, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    gmacs = {network.architecture.tokens: torch.tensor(macs) / 1e9}
    engine = routed(network, ladder, controller, feed, gmacs, backend=backend, buckets=buckets, make=make)
    assert isinstance(engine, Engine)
    engine.warm(lambda text: print(f"{backend}: {text}", flush=True))
    return Served(engine, ladder.paths, [each / network.macs(network.space.full) for each in macs])


def realised(name: str, backend: Backend, repeats: int) -> list[dict[str, Any]]:
    """Each path behind the decision, against the dense network whole, at every batch size."""
    dense, ours = networks(NETWORKS[name])
    it, rows = served(ours, backend, BATCHES[name]), []
    for batch in BATCHES[name]:
        inputs = torch.randn(batch, *dense.architecture.input_shape, generator=torch.Generator().manual_seed(0))
        whole = build(dense.at(dense.space.full), (inputs,), backend=backend, name=f"dense {batch}")
        often = 4 if batch == 1 and NETWORKS[name] is cifar.ARCHITECTURE else 1  # a round of one call of a millisecond would time the clock
        calls = {"dense": partial(again, often, partial(whole, inputs))}
        calls |= {f"rung {k}": partial(again, often, partial(it.engine.forced, inputs, k)) for k in range(len(it.paths))}
        with serving():
            times = interleaved(calls, repeats=repeats)
        for k, (path, share) in enumerate(zip(it.paths, it.shares, strict=True)):
            over = ratio(times[f"rung {k}"], times["dense"])
            row = {"network": name, "backend": backend, "batch": batch, "path": path.name, "macs_share": share, "time": over._asdict()}
            saved = realisation_ratio(1.0, over.value, 1.0, share) if share < 1 else None
            rows.append({**row, "dense_ms": times["dense"].median_ms / often, "realised": saved})
            print(f"{name}, {backend}, batch {batch}: {path.name}: {share:.3f} of the work in {over.value:.3f} of the time", flush=True)
    return rows


def again(often: int, call: Callable[[], Any]) -> None:
    for _ in range(often):
        call()


def wholes(repeats: int) -> list[dict[str, Any]]:
    """timm's ViT-S/16: the library's own module as each run time is commonly used, and ours, which read it, through the engine."""
    ready()
    import timm

    torch.manual_seed(0)
    theirs = timm.create_model("vit_small_patch16_224").eval().requires_grad_(False)
    ours = read_model(theirs).network.eval().requires_grad_(False)
    rows = []
    for batch in BATCHES["ViT-S/16, 224 pixels"]:
        inputs = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        with serving():
            whole = ours.at(ours.space.full)
            calls = {f"ours, {backend}": partial(build(whole, (inputs,), backend=backend, name=f"whole {batch}"), inputs) for backend in BACKENDS}
            calls |= {f"timm, {name}": call for name, call in common(theirs, inputs).items()}
            times = interleaved(calls, repeats=repeats)
        best = min((key for key in times if key.startswith("timm")), key=lambda key: times[key].median_ms)
        rows += [{"batch": batch, "way": key, "ms": t.median_ms / batch, "over": best, "time": ratio(t, times[best])._asdict()} for key, t in times.items()]
        print(*rows[-len(times) :], sep="\n", flush=True)
    return rows


def common(module: nn.Module, inputs: Tensor) -> dict[str, Callable[[], Any]]:
    """A module on each run time as its manual says, on one thread."""
    import onnxruntime
    import openvino
    from torch._inductor import config as inductor

    from apportion.engine.openvino import OpenVINO

    with TemporaryDirectory() as folder:
        OpenVINO().convert(torch.export.export(module, (inputs,)), File(folder) / "it.xml")
        core = openvino.Core()
        threads = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        vino = core.compile_model(core.read_model(File(folder) / "it.xml"), "CPU", threads)
        program = torch.onnx.export(module, (inputs,), dynamo=True, verbose=False)
        assert program is not None
        program.save(File(folder) / "it.onnx")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(File(folder) / "it.onnx", options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    with inductor.patch(freezing=True):
        compiled = torch.compile(module, dynamic=False)
        compiled(inputs)
    return {
        "eager": partial(module, inputs),
        "torch.compile, frozen": partial(compiled, inputs),
        "OpenVINO": lambda: vino([inputs.numpy()])[0],
        "ONNX Runtime": lambda: session.run(None, {name: inputs.numpy()})[0],
    }


def traffic() -> dict[str, Any]:
    """Batches of random sizes at random budgets on a tiny network: how many graphs were built before the first, and how many after."""
    count = 0

    def counting(module: nn.Module, example: tuple[Any, ...], /, *, backend: Backend, name: str) -> Graph:
        nonlocal count
        count += 1
        return build(module, example, backend=backend, name=name)

    _, network = networks(Architecture(image_size=16, patch=4, dim=32, depth=3, heads=2, hidden=64, classes=4))
    engine = served(network, "openvino", (1, 8, 32), counting).engine
    before, draw, begin = count, random.Random(0), time.monotonic()
    pool = torch.randn(LARGEST, *network.architecture.input_shape, generator=torch.Generator().manual_seed(0))
    samples = 0
    for _ in range(REQUESTS):
        size = draw.randint(1, LARGEST)
        samples += len(engine(pool[:size], budget=draw.random()).logits)
    return {"batches": REQUESTS, "samples": samples, "graphs": before, "built_after": count - before, "seconds": time.monotonic() - begin}


def table(repeats: int) -> list[dict[str, Any]]:
    """Milliseconds foretold from eight measured paths at two batch sizes, held against paths that were not measured."""
    _, network = networks(cifar.ARCHITECTURE)
    space, draw, rows = network.space, random.Random(0), []
    every = [drawn(space, draw) for _ in range(60)]
    asked, known = every[:HELD_OUT], [space.full, *every[HELD_OUT:]]
    for backend in BACKENDS[:2]:

        def make(module: nn.Module, inputs: Tensor, backend: Backend = backend) -> Callable[[Tensor], Any]:
            return build(module, (inputs,), backend=backend, name="path")

        example = torch.randn(1, *network.architecture.input_shape, generator=torch.Generator().manual_seed(0))
        foretold = forecast(network, known, example, build=make, backend=backend, batches=(1, 8), count=12, repeats=repeats)
        calls: dict[tuple[int, int], Callable[[], Any]] = {}
        for at, path in enumerate(asked):
            for batch in (1, 8):
                inputs = example.expand(batch, -1, -1, -1).contiguous()
                calls[at, batch] = partial(make(network.at(path), inputs), inputs)
        with serving():
            times = interleaved({f"{at} {batch}": call for (at, batch), call in calls.items()}, repeats=repeats)
        wrong = [abs(foretold.ms(network, asked[at], batch) / times[f"{at} {batch}"].median_ms - 1) for at, batch in calls]
        rows.append({"backend": backend, "paths": 12, "held_out": len(wrong), "mean": float(np.mean(wrong)), "p95": float(np.quantile(wrong, 0.95))})
        print(rows[-1], flush=True)
    assert all(np.isfinite(work(network, path, 1)).all() for path in asked)
    return rows


def drawn(space: Space, draw: random.Random) -> Path:
    """Some path behind the glance."""
    blocks = draw.choice([order for order in space.orders if len(order) > GLANCE])
    kept, left = [], space.tokens
    for _ in blocks:
        left = max(space.prefix + 8, draw.choice((left, left, left * 3 // 4)))
        kept.append(left)
    return space.path(blocks=blocks, tokens=kept, width=draw.choice(space.width[1:]))


def memory() -> list[dict[str, Any]]:
    """What a process holds at most for the dense network and for the engine, each in a process of its own."""
    rows = []
    for name in NETWORKS:
        for backend in STORED:
            with TemporaryDirectory() as cache:  # the first start converts, the second is what is measured
                held = [{what: measured(name, backend, what, cache) for what in ("nothing", "dense", "engine")} for _ in range(2)][-1]
            grown = {what: held[what] - held["nothing"] for what in ("dense", "engine")}
            rows.append(
                {
                    "network": name,
                    "backend": backend,
                    "batch": BATCHES[name][-1],
                    "peak_bytes": held,
                    "engine_over_dense": grown["engine"] / grown["dense"],
                    "from_cache": True,
                }
            )
            print(rows[-1], flush=True)
    return rows


def activations() -> list[dict[str, Any]]:
    """Most bytes of activations alive at once while so many samples are answered, all on the dearest of the paths; exact, operator by operator.

    An engine whose largest batch is smaller than a call runs the call in pieces, decision included. The dense network is shown in the same pieces.
    """
    rows = []
    for name, architecture in NETWORKS.items():
        dense, ours = networks(architecture)
        inputs = torch.randn(LARGEST, *architecture.input_shape, generator=torch.Generator().manual_seed(0))

        def whole(size: int, dense: Network = dense, inputs: Tensor = inputs) -> None:
            for piece in inputs.split(size):
                dense(piece, dense.space.full)

        with serving():
            alone = {size: peak_bytes(partial(whole, size)) for size in PIECES}
            engines = {size: served(ours, "eager", (size,), plain) for size in PIECES}
            held = {size: max(peak_bytes(partial(it.engine.forced, inputs, rung)) for rung in range(len(it.paths))) for size, it in engines.items()}
        rows.append({"network": name, "samples": LARGEST, "dense_bytes": alone, "engine_bytes": held})
        print(rows[-1], flush=True)
    return rows


def measured(name: str, backend: str, what: str, cache: str) -> int:
    """Peak bytes of a process that does this and nothing else."""
    line = f"from bench.engine import hold; hold({name!r}, {backend!r}, {what!r}, {cache!r})"
    found = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=True, cwd=File(__file__).parent.parent)
    return json.loads(found.stdout.splitlines()[-1])["peak_bytes"]


def hold(name: str, backend: Backend, what: str, cache: str) -> None:
    """Print the peak of this process after one call of the dense graph, of each of the engine's paths, or of neither, at the largest batch."""
    torch.set_num_threads(1)
    kept = partial(build, backend=backend, cache=File(cache))
    dense, ours = networks(NETWORKS[name])
    batch = BATCHES[name][-1]
    inputs = torch.randn(batch, *dense.architecture.input_shape)
    if what == "nothing":  # the run time itself, with a network too small to count
        small = Network(Architecture(image_size=8, patch=4, dim=8, depth=1, heads=1, hidden=8, classes=2)).eval().requires_grad_(False)
        with serving():
            kept(small.at(small.space.full), (torch.zeros(1, 3, 8, 8),), name="small")
    elif what == "dense":
        with serving():
            kept(dense.at(dense.space.full), (inputs,), name="dense")(inputs)
    else:
        it = served(ours, backend, (batch,), partial(build, cache=File(cache)))
        for rung in range(len(it.paths)):
            it.engine.forced(inputs, rung)
    print(json.dumps({"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


def draw(rows: Sequence[dict[str, Any]], file: File) -> None:
    """Time against multiply-adds, with the line on which all that is saved in work is saved in time."""
    names = list(dict.fromkeys(row["network"] for row in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(5.2 * len(names), 4.6), squeeze=False, layout="constrained")
    marks = {1: "o", 8: "s", 32: "^"}
    for axis, name in zip(axes[0], names, strict=True):
        axis.plot([0, 1.1], [0, 1.1], color="0.6", linewidth=1, zorder=1)
        for colour, backend in enumerate(dict.fromkeys(row["backend"] for row in rows)):
            for batch, mark in marks.items():
                mine = [row for row in rows if (row["network"], row["backend"], row["batch"]) == (name, backend, batch)]
                x, y = [row["macs_share"] for row in mine], [row["time"]["value"] for row in mine]
                if mine:
                    axis.scatter(x, y, marker=mark, s=26, color=f"C{colour}", alpha=0.85, label=f"{backend}, batch {batch}", zorder=2)
        axis.set(title=name, xlabel="multiply-adds / dense, decision included", ylabel="time / dense on the same run time", xlim=(0, 1.1), ylim=(0, None))
        axis.legend(fontsize=7, frameon=False, loc="upper left")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main(parts: Sequence[str], repeats: int) -> None:
    torch.set_num_threads(1)
    file = results.FOLDER / "engine.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    make: dict[str, Callable[[], Any]] = {
        "paths": lambda: [row for name in NETWORKS for backend in TIMED[name] for row in realised(name, backend, repeats)],
        "dense": lambda: wholes(repeats),
        "traffic": traffic,
        "table": lambda: table(repeats),
        "memory": memory,
        "activations": activations,
    }
    for part in parts or make:
        found[part] = {"day": time.strftime("%Y-%m-%d"), "commit": results.commit(), "found": make[part]()}
        results.write("engine", "python -m bench engine", {part: found[part] for part in make if part in found})
    draw(found["paths"]["found"], results.FOLDER.parent.parent / "docs" / "engine.png")
