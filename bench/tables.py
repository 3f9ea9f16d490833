"""Pages made from what is executed: the README's table of results from `results/`, docs/methods.md from the cards on the shelf."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path as File
from typing import Any

from apportion import methods
from apportion.files import write_atomic
from bench.results import FOLDER

ROOT = File(__file__).parent.parent


def main() -> None:
    fill(ROOT / "README.md", "results", results())
    fill(ROOT / "docs" / "control.md", "control", deciding())
    write_atomic(ROOT / "docs" / "distil.md", distil())
    fill(ROOT / "docs" / "tasks.md", "tasks", tasks())
    fill(ROOT / "docs" / "engine.md", "engine", engine())
    fill(ROOT / "docs" / "acm.md", "acm", learners())
    write_atomic(ROOT / "docs" / "methods.md", shelf())
    write_atomic(ROOT / "docs" / "peers.md", peers())
    write_atomic(ROOT / "docs" / "systems.md", systems())
    write_atomic(ROOT / "docs" / "checkpoints.md", checkpoints())


def fill(page: File, name: str, made: str) -> None:
    """Exchange what stands between the marks of that name."""
    begin, end = marks(name)
    before, rest = page.read_text().split(begin)
    write_atomic(page, f"{before}{begin}\n{made}\n{end}{rest.split(end)[1]}")


def marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}: made by `make docs` -->", f"<!-- /{name} -->"


def deciding() -> str:
    """Everything in `results/control.json` that a reader of docs/control.md wants, as tables; three seeds side by side."""
    found = json.loads((FOLDER / "control.json").read_text())
    made, images = found["planted"], found["images"]

    def table(head: list[str], rows: list[list[str]]) -> list[str]:
        return ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows), ""]

    def seeds(values: list[float], form: str) -> str:
        return ", ".join(format(value, form) for value in values)

    lines = [
        "## Measured: made-up populations",
        "",
        "Three seeds in each entry; 3,000 rows to learn from, 10,000 to weigh on. T1 and T2 are at the controller's own violation.",
    ]
    for name in ("clear", "blurred"):
        rows = []
        for number, first in enumerate(made[0][name]):
            here = [seed[name][number] for seed in made]
            over = [100 * (row["cost"] / row["information_bound"] - 1) for row in here]
            rows.append(
                [
                    f"{first['budget']}",
                    seeds([row["cost"] for row in here], ".3f"),
                    seeds([row["oracle_bound"] for row in here], ".3f"),
                    seeds([row["information_bound"] for row in here], ".3f"),
                    seeds(over, "+.1f"),
                    seeds([100 * row["violation"] for row in here], ".1f"),
                    seeds([row["gain_points"]["low"] for row in here], ".1f"),
                ]
            )
        said = "The signal tells all:" if name == "clear" else "The signal is noisy:"
        lines += ["", said, *table(["budget", "cost", "T1", "T2", "above T2, %", "lost, points", "above the hull, points, lower end"], rows)]
    ratios = [[row["ppo_accuracy"] / row["exact_accuracy"] for row in seed["ppo"]] for seed in made]
    rows = [
        [
            f"{first['budget']}",
            seeds([seed["ppo"][n]["exact_cost"] for seed in made], ".3f"),
            seeds([seed["ppo"][n]["ppo_cost"] for seed in made], ".3f"),
            seeds([ratio[n] for ratio in ratios], ".3f"),
        ]
        for n, first in enumerate(made[0]["ppo"])
    ]
    lines += ["PPO against the exact expectation, one decision:", *table(["budget", "cost, exact", "cost, PPO", "accuracy, PPO over exact"], rows)]
    lines += ["## Measured: CIFAR-10", "", "The three networks of `python -m bench cifar`, exits after 2 to 6 blocks, 10,000 test images."]
    rows = [
        [
            f"{first['budget']}",
            seeds([100 * seed["budgets"][n]["budget_error"] for seed in images], "+.1f"),
            "; ".join(f"{g['value']:.2f} ({g['low']:.2f} to {g['high']:.2f})" for g in (seed["budgets"][n]["gain_points"] for seed in images)),
            "yes" if all(seed["budgets"][n]["same_in_other_batches"] for seed in images) else "no",
        ]
        for n, first in enumerate(images[0]["budgets"])
    ]
    lines += table(["budget", "mean cost off budget, %", "above the hull, points", "same in other batches"], rows)
    rows = [[name, *(seeds([seed["rules"][name][n] for seed in images], ".2f") for n in range(len(first)))] for name, first in images[0]["rules"].items()]
    lines += ["Points above the hull with one part taken away or exchanged:", *table(["rule", *(str(b["budget"]) for b in images[0]["budgets"])], rows)]
    rows = []
    for n, first in enumerate(images[0]["sequential"]):
        here = [seed["sequential"][n] for seed in images]
        setting = f"budget {first['budget']}" if "budget" in first else f"margin {first['threshold']}"
        rows.append([first["rule"], setting, seeds([row["cost"] for row in here], ".3f"), seeds([row["gain_points"] for row in here], ".2f")])
    lines += ["Deciding at every exit:", *table(["rule", "setting", "cost", "above the hull, points"], rows)]
    rows = [
        [
            f"{row['tolerance_points']}",
            f"{row['rows']}",
            "refused" if "refused" in row else f"{row['cost']:.3f}",
            "" if "refused" in row else f"{row['drop_on_test_points']:.2f}",
        ]
        for seed in images
        for row in seed["certificates"]
        if "tolerance_points" in row
    ]
    lines += [
        "Certificates at confidence 0.9, each seed in turn:",
        *table(["tolerance, points", "images", "certified cost", "drop on test images, points"], rows),
    ]
    rows = [
        [
            row["kind"],
            str(row.get("strength", "")),
            f"{row['cost']:.3f}",
            f"{100 * row['accuracy']:.1f}",
            f"{100 * row['full']:.1f}" if "full" in row else "",
            str(row.get("rings_after") or "-"),
        ]
        for row in images[0]["shift"]
    ]
    lines += [
        "Corrupted pictures at the 0.6x setting, seed 0, 1,000 images each:",
        *table(["kind", "strength", "cost", "accuracy, %", "full path, %", "alarm after"], rows),
    ]
    rows = [
        [str(row["cap"] or "none"), f"{row['before']:.3f}", f"{row['random_signs']:.3f}", f"{row['after']:.3f}", str(row["over_cap"])]
        for seed in images
        for row in seed["attack"]
    ]
    lines += ["Gradient attack within 8/255 at the 0.5x setting:", *table(["cap", "before", "random signs", "attacked", "inputs over the cap"], rows)]
    lines += ["Network and policy taught together, against the same multiply-adds spent on the paths alone (`python -m bench joint`), accuracy in %:"]
    lines += table(*together())
    rows = [[f"{row['batch']}", f"{100 * row['share_of_full']:.1f} %"] for row in images[0]["overhead"]]
    lines += ["Time of the decision over the full path's, eager, one thread:", *table(["batch", "share"], rows)]
    return "\n".join(lines).strip()


def together() -> tuple[list[str], list[list[str]]]:
    """Accuracy at each budget in `results/joint.json`, the three seeds side by side."""
    seeds = json.loads((FOLDER / "joint.json").read_text())["seeds"]
    head = ["taught", *(str(row["budget"]) for row in seeds[0]["rules"]["as healed"])]
    return head, [
        [name, *(", ".join(f"{100 * seed['rules'][name][n]['accuracy']:.2f}" for seed in seeds) for n in range(len(head) - 1))] for name in seeds[0]["rules"]
    ]


def results() -> str:
    rows = [row for file in sorted(FOLDER.glob("*.json")) for row in read(file.stem, json.loads(file.read_text()))]
    head = "| run | dense, % | adaptive, % | drop, points (95 %) | GMACs saved | above the hull, points (95 %) | time, batch 1 | time, largest batch |"
    return "\n".join([head, "|---|---|---|---|---|---|---|---|", *rows])


def read(name: str, result: dict[str, Any]) -> Iterator[str]:
    if all("figures" in seed for seed in result.get("seeds", [{}])):
        for seed in result["seeds"]:
            yield row(f"{name}, seed {seed['seed']}", seed["figures"])
        saved = [seed["figures"]["gmacs_saved_share"] for seed in result["seeds"]]
        drop = [seed["figures"]["drop_points"]["points"] for seed in result["seeds"]]
        yield f"| {name}, mean | | | {statistics.mean(drop):.2f} | {100 * statistics.mean(saved):.1f} % | | | |"
    for run, found in result.get("runs", {}).items():
        plans = {"": found} if "figures" in found else {f", {plan}": part for plan, part in found.items() if isinstance(part, dict) and "figures" in part}
        for plan, part in plans.items():
            yield row(f"{name}, {run.replace('_', ' ')}{plan}", part["figures"])


def row(name: str, figures: dict[str, Any]) -> str:
    drop, gain, ratios = figures["drop_points"], figures["adaptive_gain_points"], list(figures.get("time_ratio", {}).values())
    times = [f"{ratio['value']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})" for ratio in ratios] or ["", ""]
    return (
        f"| {name} | {100 * figures['accuracy_dense']:.2f} | {100 * figures['accuracy_adaptive']:.2f} "
        f"| {drop['points']:.2f} ({drop['low']:.2f} to {drop['high']:.2f}) | {100 * figures['gmacs_saved_share']:.1f} % "
        f"| {gain['value']:.2f} ({gain['low']:.2f} to {gain['high']:.2f}) | {times[0]} | {times[-1] if len(times) > 1 else ''} |"
    )


def checkpoints() -> str:
    """`results/checkpoints.json` as a page: one decision, thresholds at every exit, and thresholds from elsewhere."""
    found = json.loads((FOLDER / "checkpoints.json").read_text())
    lines = [
        "# Leaving when sure",
        "",
        "Made by `python -m bench tables` from `bench/results/checkpoints.json`. Each entry: accuracy in % at the mean cost that was spent, and points above",
        "the static hull of the same exits at that cost (95 % interval). *One decision* is taken after the glance; *thresholds* stand at every exit, whose",
        "answers are paid for; *thresholds of* others were placed on another network or on other data and are used as they are. " + machine(found),
        "",
    ]
    for run, ways in found["runs"].items():
        exits = ", ".join(f"{100 * exit['accuracy']:.2f} at {exit['cost']:.2f}" for exit in ways["exits"])
        budgets = [row["budget"] for row in ways["thresholds"]]
        lines += [f"## {run}", "", f"Exits, accuracy in % at their cost: {exits}.", ""]
        lines += ["| | " + " | ".join(f"budget {budget:g}" for budget in budgets) + " |", "|---|" + "---|" * len(budgets)]
        for way, rows in ways.items():
            by = {row["budget"]: row for row in rows} if way != "exits" else {}
            cells = [_spent(by[budget]) if budget in by else "" for budget in budgets]
            lines += [f"| {way} | " + " | ".join(cells) + " |"] if by else []
        lines.append("")
    return "\n".join(lines)


def tasks() -> str:
    """docs/tasks.md: what was measured of tasks other than one class."""
    found = json.loads((FOLDER / "tasks.json").read_text())
    names = {"banking77": "sentences of BANKING77, MiniLM-L6, embedding", "camvid": "CamVid at 96 pixels, six blocks of our own, segmentation"}
    lines = [
        f"{machine(found)} On OpenVINO; points are hundredths of the measure. Embeddings learned for one epoch, tolerance 6 points; pixels 1 point.",
        "",
        "| what | decided | dense | adaptive | drop, points (95 %) | GMACs saved | above the hull, points (95 %) | time over dense, batch 1 | batch 32 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, run in found["runs"].items():
        for way, decided in (("glance", "once"), ("checkpoints", "at every exit")):
            if way in run:
                figures = run[way]["figures"]
                drop, gain, ratios = figures["drop_points"], figures["adaptive_gain_points"], figures["time_ratio"]
                times = [f"{ratios[batch]['value']:.2f}x ({ratios[batch]['low']:.2f} to {ratios[batch]['high']:.2f})" for batch in ("1", "32")]
                lines.append(
                    f"| {names[name]} | {decided} | {100 * figures['accuracy_dense']:.2f} % | {100 * figures['accuracy_adaptive']:.2f} %"
                    f" | {drop['points']:.2f} ({drop['low']:.2f} to {drop['high']:.2f}) | {100 * figures['gmacs_saved_share']:.1f} %"
                    f" | {gain['value']:.2f} ({gain['low']:.2f} to {gain['high']:.2f}) | {times[0]} | {times[1]} |"
                )
    search, iou = found["runs"]["banking77"]["search"], found["runs"]["camvid"]["mean_iou"]
    right = ", ".join(f"{name} {100 * value:.2f} %" for name, value in search["accuracy"].items())
    lines += [
        "",
        f"A search with these embeddings: {search['questions']} questions, embedded so, whose nearest among {search['index']} sentences, embedded by the dense",
        f"model, has their label: {right}. Mean IoU of the dense network on CamVid's 11 classes {100 * iou['dense']:.1f} %, of the full path after healing",
        f"{100 * iou['full path']:.1f} %.",
    ]
    return "\n".join(lines)


def engine() -> str:
    """docs/engine.md: what the engine does on the clock."""
    found = json.loads((FOLDER / "engine.json").read_text())
    lines = [machine(found), "", "### Paths", "", "![time against multiply-adds](engine.png)", ""]
    lines += [
        "Time over the dense network on the same run time; in brackets what part of the work saved is time saved. Each path runs behind glance and decision,",
        "so what the full path takes beyond 1 is the price of deciding.",
        "",
    ]
    rows = found["paths"]["found"]
    for name in dict.fromkeys(row["network"] for row in rows):
        mine = [row for row in rows if row["network"] == name]
        ways = list(dict.fromkeys((row["backend"], row["batch"]) for row in mine))
        by = {(row["path"], row["backend"], row["batch"]): row for row in mine}
        lines += [f"**{name}**", "", f"| path | work | {' | '.join(f'{backend}, batch {batch}' for backend, batch in ways)} |", "|---" * (2 + len(ways)) + "|"]
        for path in dict.fromkeys(row["path"] for row in mine):
            cells = [by[path, *way] for way in ways]
            texts = [f"{row['time']['value']:.2f}x" + ("" if row["realised"] is None else f" ({row['realised']:.2f})") for row in cells]
            lines.append(f"| `{path.rsplit('_', 1)[0]}` | {cells[0]['macs_share']:.3f} | {' | '.join(texts)} |")
        full = [by[mine[-1]["path"], *way]["dense_ms"] / way[1] for way in ways]
        lines += [f"| dense, ms each |  | {' | '.join(f'{ms:.2f}' for ms in full)} |", ""]
    whole = found["dense"]["found"]
    batches = list(dict.fromkeys(row["batch"] for row in whole))
    lines += [
        "### The dense network",
        "",
        "timm's ViT-S/16 as each run time's manual has it, and what we read of it through the engine. *Time* is over the fastest of timm's.",
        "",
    ]
    lines += [f"| way | {' | '.join(f'ms each, batch {batch} | time' for batch in batches)} |", "|---" * (1 + 2 * len(batches)) + "|"]
    for way in dict.fromkeys(row["way"] for row in whole):
        mine = [row for row in whole if row["way"] == way]
        cells = [f"{row['ms']:.1f} | {row['time']['value']:.2f}x ({row['time']['low']:.2f} to {row['time']['high']:.2f})" for row in mine]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    busy = found["traffic"]["found"]
    lines += ["", "### Under traffic", ""]
    lines += [
        f"{busy['batches']:,} batches of 1 to 32 samples at random budgets on a tiny network: {busy['graphs']} graphs built before the first,"
        f" {busy['built_after']} after."
    ]
    lines += [
        "",
        "### Times foretold",
        "",
        "Paths of the small ViT that were not measured, at batch 1 and 8, foretold from paths that were; relative error.",
        "",
    ]
    lines += ["| run time | measured paths | points asked | mean | 95 % below |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['backend']} | {row['paths']} | {row['held_out']} | {100 * row['mean']:.1f} % | {100 * row['p95']:.1f} % |" for row in found["table"]["found"]
    ]
    lines += [
        "",
        "### Memory",
        "",
        "What a process that finds its graphs in a cache grew by at most, the run time and the module with its weights left out: the dense graph, and the",
        "engine with all paths, both at the largest batch.",
        "",
        "| network | run time | batch | dense, MiB | engine, MiB | engine over dense |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["memory"]["found"]:
        grown = [(row["peak_bytes"][what] - row["peak_bytes"]["nothing"]) / 2**20 for what in ("dense", "engine")]
        cells = [row["network"], row["backend"], str(row["batch"]), *(f"{each:.0f}" for each in grown), f"{row['engine_over_dense']:.2f}x"]
        lines.append(f"| {' | '.join(cells)} |")
    held = found["activations"]["found"]
    sizes = sorted(held[0]["engine_bytes"], key=int, reverse=True)
    lines += [
        "",
        "### Activations",
        "",
        f"Most that is alive at once while {held[0]['samples']} samples are answered on the dearest path, operator by operator, to the byte, over the dense",
        "network on all of them at once. An engine whose largest batch is smaller runs a call in pieces; so could the dense network. What smaller batches",
        "cost in time is above.",
        "",
        "| network | dense, all at once, MiB | " + " | ".join(f"engine, {size} at once | dense, {size} at once" for size in sizes) + " |",
        "|---|---" + "|---" * 2 * len(sizes) + "|",
    ]
    for row in held:
        whole = row["dense_bytes"][str(row["samples"])]
        shares = [f"{row['engine_bytes'][size] / whole:.2f}x | {row['dense_bytes'][size] / whole:.2f}x" for size in sizes]
        lines.append(f"| {row['network']} | {whole / 2**20:.1f} | {' | '.join(shares)} |")
    return "\n".join(lines)


def learners() -> str:
    """docs/acm.md: the trained encoders."""
    found = json.loads((FOLDER / "acm.json").read_text())
    lines = [f"`python -m bench acm`: {found['learners']} learners, a gate of {found['gate']} hidden units. {machine(found)}", ""]
    for name, run in found["runs"].items():
        lines += [
            f"**{name}**: dense {correct(run['accuracy_dense'], run['samples'])} % on {run['samples']:,} test samples, taught for {run['epochs']:g} epochs."
            f" Time at batch {found['batch']} over the dense network on the same run time, in brackets what part of the work saved is time saved.",
            "",
            "| learners | work | served | drop, points (95 %) | same for all | dealt at random | OpenVINO | eager |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in run["rows"]:
            drop, right = row["drop_points"]["served"], row["accuracy"]
            times = [f"{t['value']:.2f}x" + ("" if t["realised"] is None else f" ({t['realised']:.2f})") for t in row["time"].values()]
            lost = f"{drop['points']:.2f} ({drop['low']:.2f} to {drop['high']:.2f})"
            lines.append(
                f"| {row['learners']} of {found['learners']} | {row['macs_share']:.3f} | {100 * right['served']:.2f} | {lost}"
                f" | {100 * right['same for all']:.2f} | {100 * right['dealt at random']:.2f} | {' | '.join(times)} |"
            )
        lines.append("")
    return "\n".join(lines)


def _spent(row: dict[str, Any]) -> str:
    gain = row["gain_points"]
    return f"{100 * row['accuracy']:.2f} at {row['cost']:.2f}; {gain['value']:+.2f} ({gain['low']:.2f} to {gain['high']:.2f})"


def machine(found: dict[str, Any]) -> str:
    """Where a result was measured."""
    conditions = found["conditions"]
    device = conditions["device"]
    where = f"{device['cpu']} ({device['instructions']}), {conditions['threads']} thread, torch {device['torch']}"
    return f"Measured on {where}, {conditions['day']}; float32 where not said otherwise."


def correct(share: float, samples: int) -> str:
    """A share of right answers in %, and its standard error."""
    return f"{100 * share:.1f} ± {100 * math.sqrt(share * (1 - share) / samples):.1f}"


def peers() -> str:
    """`results/peers.json` as a page: what else one could do with the same weights, timed in the same rounds."""
    found = json.loads((FOLDER / "peers.json").read_text())
    lines = [
        "# Other ways",
        "",
        "Made by `make docs` from `python -m bench peers`: a real DeiT-Tiny at 224 pixels, everything in the same interleaved rounds on changing pictures;",
        f"accuracy, with its standard error, of the very calls that are timed on {found['images']} ImageNet pictures. *Time* is over the dense network",
        "compiled by torch; *realised* is time saved over multiply-adds saved, against the dense network on the same run time; `ms` is per picture.",
        machine(found),
        "",
        *ways(found["peers"], found["images"]),
    ]
    return "\n".join([*lines, "", *smaller(), ""])


def ways(rows: list[dict[str, Any]], images: int) -> list[str]:
    """The table of other ways; one that was not timed at a batch size has nothing there."""
    batches = sorted({key for row in rows for key in row if key.startswith("batch")}, key=lambda key: int(key.split()[1]))
    lines = [f"| way | accuracy, % | GMACs | {' | '.join(f'ms, {batch} | time | realised' for batch in batches)} |", "|---" * (3 + 3 * len(batches)) + "|"]
    for row in rows:
        cells = []
        for batch in batches:
            here = row.get(batch)
            if here is None:
                cells += [""] * 3
                continue
            over = here["over_dense_inductor"]
            cells += [
                f"{here['ms']:.1f}",
                f"{over['value']:.2f}x ({over['low']:.2f} to {over['high']:.2f})",
                f"{here['realisation']:.2f}" if "realisation" in here else "",
            ]
        lines.append(f"| {row['peer']} | {correct(row['accuracy'], images)} | {row['gmacs']:.3f} | {' | '.join(cells)} |")
    return lines


def smaller() -> list[str]:
    """A smaller network trained alike, beside the adaptive one at about the same cost."""
    found = json.loads((FOLDER / "smaller.json").read_text())
    lines = [
        "## A smaller network, trained alike",
        "",
        "`python -m bench smaller`: CIFAR-10, a dense network with as many multiply-adds of training as the whole adaptive one had, healing included, and so",
        "with more epochs. " + machine(found),
        "",
        "| network | GMACs | epochs | accuracy, % |",
        "|---|---|---|---|",
    ]
    for row in found["smaller"]:
        lines.append(f"| dense, {row['network']} | {row['gmacs']:.4f} | {row['epochs']:.1f} | {correct(row['accuracy'], found['samples'])} |")
        for run in found["adaptive"]:
            gmacs, right = min((value for key, value in run.items() if key != "seed"), key=lambda at, like=row["gmacs"]: abs(at[0] - like))
            lines.append(f"| adaptive, seed {run['seed']} | {gmacs:.4f} | 2.5 and 0.9 | {correct(right, found['samples'])} |")
    return [*lines, "", "The adaptive networks are those of the README: they are far from trained out, so this says more about epochs than about adapting."]


def systems() -> str:
    """`results/systems.json` as a page: every method that cuts an axis, side by side."""
    found = json.loads((FOLDER / "systems.json").read_text())
    lines = [
        "# Side by side",
        "",
        "Made by `make docs` from `python -m bench systems`: every method of the shelf that cuts an axis, on one trained DeiT-Tiny **as it is, without",
        f"healing**; accuracy, with its standard error, on {found['images']} ImageNet pictures, time operator by operator at batch 8 over the dense",
        "network's in the same rounds, with a 95 % interval. Methods that need healing or training are shown as they start; `random` drops tokens by lot.",
        machine(found),
        "",
        "![accuracy against multiply-adds and against time](systems.png)",
        "",
        "| method | axis | needs | path | GMACs | accuracy, % | time over dense |",
        "|---|---|---|---|---|---|---|",
    ]
    for way in found["ways"]:
        over = way["time_over_dense"]
        time, path = f"{over['value']:.2f}x ({over['low']:.2f} to {over['high']:.2f})", way["key"].split()[-1]
        lines.append(
            f"| {way['method']} | {way['axis']} | {way['needs']} | `{path}` | {way['gmacs']:.3f} | {correct(way['accuracy'], found['images'])} | {time} |"
        )
    return "\n".join([*lines, "", *(line for file in FOLDER.glob("systems-healed.json") for line in healed(json.loads(file.read_text())))])


def healed(found: dict[str, Any]) -> list[str]:
    """`results/systems-healed.json` as a section: the same methods on a small network of our own, each healed on as many images."""
    tests = found["tests"]
    lines = [
        "## Healed alike",
        "",
        f"Made from `python -m bench healing`: the dense CIFAR-10 network of `python -m bench cifar`, seed {found['ways'][0]['seed']}; each method in all",
        f"blocks, healed on {found['images']:,} images by one recipe: the full path learns from labels, its answers teach the others (learners and gates of",
        "`acm` in stages of their own, of as many images in all; `mind_skip` once for each capacity). Accuracy, with its standard error, on",
        f"{tests:,} test images; two ways on the same images differ more surely than these errors say. `ms` is per image, operator by operator",
        f"at batch {found['batch']}, the median of rounds that all share; of what decides, the mean over its paths as if samples were sorted by path.",
        "*Foresight* takes the cheapest path from which on all are right and, where the full one errs, the cheapest, right by luck at times: it is no policy.",
        *([f"Left out of this run: {', '.join(found['left_out'])}."] if found.get("left_out") else []),
        "Rows in italics are controls. Above the hull: points above the best mixture of all rows of fixed cost, which was drawn from these test images.",
        machine(found),
        "",
        "![accuracy against multiply-adds and against time, healed](systems-healed.png)",
        "",
        "| method | path or budget | GMACs | ms | accuracy, % | above the hull, points |",
        "|---|---|---|---|---|---|",
    ]

    def row(name: str, path: str, each: dict[str, Any]) -> str:
        above = 100 * (each["accuracy"] - under(found["hull"]["gmacs"], each["gmacs"]))
        control = any(word in name for word in ("lot", "fixed places", "no gate", "dealt"))
        shown = f"{each['ms']:.3f}" if "ms" in each else ""
        return f"| {f'*{name}*' if control else name} | {path} | {each['gmacs']:.4f} | {shown} | {correct(each['accuracy'], tests)} | {above:+.2f} |"

    for way in found["ways"]:
        lines += [row(each["label"] or way["method"], f"`{each['path']}`", each) for each in way["rows"]]
        lines += [row(way["adaptive"]["method"], f"{each['budget']:g}x", each) for each in way.get("adaptive", {}).get("rows", ())]
        lines += [row(f"{way['method']}, foresight", "cheapest path that is enough", way["oracle"])] if "oracle" in way else []
    lines += ["", "What decides, beside the hull of its own paths: points above it (95 %), in order of budget.", ""]
    for way in (way for way in (*found["ways"], *found["other_seeds"]) if "adaptive" in way):
        gains = (each["gain_points"] for each in way["adaptive"]["rows"])
        said = "; ".join(f"{gain['value']:+.2f} ({gain['low']:.2f} to {gain['high']:.2f})" for gain in gains)
        lines.append(f"- {way['adaptive']['method']}, seed {way['seed']}: {said}.")
    return [*lines, ""]


def under(corners: list[list[float]], cost: float) -> float:
    """Height of a hull at this cost: flat behind its last corner; before its first there is none, and the first counts."""
    after = next((place for place, (x, _) in enumerate(corners) if x >= cost), None)
    if after is None or after == 0:
        return corners[-1 if after is None else 0][1]
    (x0, y0), (x1, y1) = corners[after - 1], corners[after]
    return y0 + (y1 - y0) * (cost - x0) / (x1 - x0)


def distil() -> str:
    """`results/distil.json` as a page: what each term of the paths' loss is worth."""
    found = json.loads((FOLDER / "distil.json").read_text())
    recipe = found["recipe"]
    lines = [
        "# What each term is worth",
        "",
        "Made by `python -m bench tables` from `bench/results/distil.json`. A taught path's loss is the sum of four terms: *labels*, the *logits* and the",
        "*features* (tokens after each block) of what it learns from, and a *bound* on what it errs oftener than that. Each way begins with the same dense",
        "network and takes the same steps with the same images along the same paths. Accuracy in % on images that were not taught with, mean over the seeds",
        "and (lowest to highest); *area* is the mean over budgets of 0.4 to 0.9 of what mixtures of the paths reach, and the last column what it differs from",
        "all terms by, seed by seed.",
        machine(found),
        "",
    ]

    def spread(values: list[float], form: str = ".1f") -> str:
        each = [100 * value for value in values]
        return f"{statistics.mean(each):{form}} ({min(each):{form}} to {max(each):{form}})"

    for name, seeds in found["ways"].items():
        costs = [path["cost"] for path in seeds[0]["ways"]["all terms"]["paths"]]
        shown = [0, min(range(len(costs)), key=lambda place: abs(costs[place] - 0.7)), len(costs) - 1]
        used = recipe[name]
        teacher = "a frozen copy of the dense network" if used["frozen_teacher"] else "the full path, which goes on learning from the labels"
        lines += [
            f"## {name}",
            "",
            f"{len(seeds)} seeds, {seeds[0]['images']} images seen while taught, in batches of {used['batch']}; {seeds[0]['samples']} to judge on. What",
            f"teaches is {teacher}; weights 1, features {used['feature_weight']:g}, slack {recipe['slack']:g}.",
            "",
            *(
                []
                if used["frozen_teacher"]
                else ["An exit's tokens are then the full path's own: features weigh on the merged path alone, next to nothing.", ""]
            ),
            "| way | " + " | ".join(f"path at {costs[place]:.2f}" for place in shown) + " | area | beside all terms |",
            "|---" * (len(shown) + 3) + "|",
        ]
        for way in seeds[0]["ways"]:
            paths = [spread([seed["ways"][way]["paths"][place]["accuracy"] for seed in seeds]) for place in shown]
            areas, beside = ([seed["ways"][each]["area"] for seed in seeds] for each in (way, "all terms"))
            differs = "" if way == "all terms" else spread([a - b for a, b in zip(areas, beside, strict=True)], "+.1f")
            lines.append(f"| {way} | {' | '.join(paths)} | {spread(areas, '.2f')} | {differs} |")
        lines.append("")
    return "\n".join(lines)


def shelf() -> str:
    lines = ["# The shelf", "", "Made by `make docs` from the cards in `apportion/methods`; `apportion systems` prints the same.", ""]
    for slot in methods.SLOTS:
        lines += [f"## {slot}", "", "| method | title | source | axis | exact at full | needs |", "|---|---|---|---|---|---|"]
        for name in methods.names(slot):
            card = methods.card(slot, name)
            source = f"{card.source}, arXiv {card.arxiv}" if card.arxiv else card.source
            lines.append(f"| `{name}` | {card.title} | {source} | {card.axis or ''} | {'yes' if card.exact else 'no'} | {card.needs} |")
        lines.append("")
    return "\n".join(lines)
