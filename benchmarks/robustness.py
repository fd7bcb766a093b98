"""Measures what attacks bring back from each method in the tiny world, for the tables of docs/robustness.md.

    python benchmarks/robustness.py run results --seeds 0 1 2            # all rows of `demo --full`
    python benchmarks/robustness.py run results --seeds 0 1 2 --rows defenses
    python benchmarks/robustness.py run results --seeds 6 7 8 --rows recommended --all-attacks
    python benchmarks/robustness.py table results --rows defenses
    python benchmarks/robustness.py chart results                         # draws docs/relearning.png

`run` trains, evaluates and attacks every row. It resumes, so that several processes may divide the seeds. `table`
prints the rates of all seeds together in percent. The interval is that of 95 %, and its clusters are the things of each
seed's world: questions about one thing are mostly answered alike. Where an attack has several variants, the strongest
counts. `--metrics` prints the rates of the answers without an attack on the model instead. `chart` draws the rates
after relearning for some of the rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
from seeds import METRICS, NAMES
from speed import markdown

from vlm_unlearn.config import RobustnessSuite, load
from vlm_unlearn.metrics.rates import rate
from vlm_unlearn.modeling.loader import run_digest, run_model_folder
from vlm_unlearn.records import Rate
from vlm_unlearn.reporting.charts.chart import Lines, rates_series, style_of
from vlm_unlearn.reporting.charts.matplotlib_charts import SETTINGS, draw_chart
from vlm_unlearn.reporting.charts.robustness_charts import BASE, NEVER_KNEW
from vlm_unlearn.robustness.results import REPORT_FILE, MeasuredState
from vlm_unlearn.robustness.runner import run_robustness
from vlm_unlearn.store import RunDirectory, read_json
from vlm_unlearn.training.runner import run_recipe
from vlm_unlearn.worlds.tiny import demo
from vlm_unlearn.worlds.tiny.base_model import BaseConfig, base_model, never_knew_model
from vlm_unlearn.worlds.tiny.demo import DemoRow
from vlm_unlearn.worlds.tiny.threads import limit_to_one_thread
from vlm_unlearn.worlds.tiny.world import write_world

TAUGHT = "/first_half"  # ending of the names of results whose answers the attack has taught
COLUMNS = {  # heading -> beginnings of the names of the attacks
    "none": ("none",),
    "prefill": ("prefill/",),
    "prefill, 2 words": ("prefill/2-words",),
    "sampling": ("sampling",),
    "5 steps": ("relearn/10/5",),
    "20 steps": ("relearn/10/20",),
    "60 steps": ("relearn/10/60",),
    "half, 20 steps": ("relearn/all/20",),
    "half, 60 steps": ("relearn/all/60",),
    "retain set": ("relearn/retain/",),
    "decouple set": ("relearn/decouple/",),
    "quantize": ("quantize/",),
    "projector": ("restore/projector",),
    "layers 0–1": ("restore/layers_0-1",),
    "ablation": ("ablate/direction",),
    "taught, 5 steps": ("relearn/10/5/first_half",),
    "taught, 20 steps": ("relearn/10/20/first_half",),
}
CHART_FILE = Path(__file__).parents[1] / "docs" / "relearning.png"
CHART_COLUMNS = {5: "5 steps", 20: "20 steps", 60: "60 steps"}  # number of steps -> heading of `COLUMNS`
CHART_ROWS = {  # name in the chart -> name of the row, role of the model, style
    "base": ("po + pd", "base", BASE),
    "po + pd": ("po + pd", "model", style_of(0)),
    "npo": ("npo", "model", style_of(3)),
    "npo + late refusals + pd": ("npo_refusal_pd", "model", style_of(4)),
    "never knew": ("po + pd", "never_knew", NEVER_KNEW),
}
ATTACKS = ("prefill", "sampling", "relearn", "quantize", "restore", "ablate")  # of the suite
DEFENSES: dict[str, dict[str, Any]] = {
    "sam": {"name": "sam"},
    "gp": {"name": "gp"},
    "rs": {"name": "rs"},
    "swa": {"name": "swa"},
    "lat": {"name": "lat", "layers": [0, 1], "epsilon": 0.5},
}
EARLY, LATE = {"refusal_weight": 1.0}, {"refusal_weight": 1.0, "refusal_start": 0.33}
RECIPE, DATA = "tiny/npo_refusal_pd", "safe_eraser_preferred"
METHODS: dict[str, dict[str, Any]] = {
    "npo": {"name": "npo", "beta": 0.5},
    "simnpo": {"name": "simnpo", "beta": 1.0},
    "gd": {"name": "gd", "max_nll": 20.0},
}
RECOMMENDED = {"npo + late refusals + pd": DemoRow(RECIPE, DATA, "harmless")}
REFUSALS = {  # refusals from a third of the steps on, and from the first step on
    f"{name} + {when} + pd": DemoRow(RECIPE, DATA, "harmless", method={**method, **options})
    for when, options in (("late refusals", LATE), ("refusals", EARLY))
    for name, method in METHODS.items()
}
DEFENDED = {  # methods whose models answer in sentences, and give something back
    **{name: REFUSALS[name] for name in ("npo + refusals + pd", "simnpo + refusals + pd")},
    "rr + pd": DemoRow("tiny/rr", DATA, "harmless", 1.0),
}
HEADINGS = {
    "mixed_sft diversified": NAMES["mixed_sft diversified"],
    "npo_refusal_pd": NAMES["npo+refusal+pd"],
}
GROUPS = ("methods", "refusals", "defenses", "recommended")


def rows(group: str) -> Iterator[tuple[str, DemoRow, list[dict[str, Any]]]]:
    """Yields the name, the row of the demo and the defense of each trained model."""
    if group == "methods":
        for row in demo.full_rows():
            yield row.name or Path(row.recipe).name + (" + pd" if row.prompt_decouple_weight else ""), row, []
        return
    if group in ("refusals", "recommended"):
        for name, row in (REFUSALS if group == "refusals" else RECOMMENDED).items():
            yield name, row, []
        return
    for name, row in DEFENDED.items():
        yield name, row, []
        for defense, options in DEFENSES.items():
            yield f"{name}, {defense}", row, [options]


def run(out: Path, seed: int, group: str, all_attacks: bool) -> None:
    """Trains, evaluates and attacks all models of one seed."""
    world = out / "world"
    RunDirectory(out).open({"kind": "demo", "seed": seed, "full": True})
    write_world(world, seed)
    demo.write_training_sets(world, out / "data", full=True)
    base, never_knew = base_model(BaseConfig(seed=seed)), never_knew_model(BaseConfig(seed=seed))
    values = {"root": str(world), "data": str((out / "data" / "safe_eraser_preferred").absolute())}
    suite = load(RobustnessSuite, Path("suites/tiny_robustness"), [], values)
    if not all_attacks:
        suite = suite.model_copy(update={"small": [attack for attack in suite.small if attack.name in ATTACKS]})
    for name, row, defense in rows(group):
        if (out / "robustness" / file_name(name) / REPORT_FILE).is_file():
            continue
        recipe = demo.row_recipe(row, base, out, seed)
        folder = demo.training_folder(out, file_name(name))
        changes: dict[str, Any] = {"output": folder, "name": file_name(name)}
        if defense:
            changes["defense"] = defense
        recipe = type(recipe).model_validate({**recipe.model_dump(), **changes})
        trained = run_recipe(recipe, None)
        demo.evaluate_row(file_name(name), trained, out, world, [row.utility], lambda *_: None)
        attacked = out / "robustness" / file_name(name)
        run_robustness(suite, str(trained), str(base), attacked, str(never_knew), name=name)
        print(f"seed {seed}: {name}", flush=True)


def file_name(name: str) -> str:
    return name.replace(" + ", "_").replace(", ", "_").replace(" ", "_")


@cache
def states(folder: Path, role: str) -> dict[str, MeasuredState]:
    """Returns the states of a model by name. The role is ``model``, ``base`` or ``never_knew``."""
    if role == "model":
        digest = RunDirectory(folder).read_manifest()["identity"]["model"]
    else:
        digest = run_digest(run_model_folder(read_json(folder / REPORT_FILE)[role]))
    result: dict[str, MeasuredState] = {}
    for file in sorted((folder / "measurements").glob("*.json")):
        content = read_json(file)
        if content["identity"]["model"] == digest:
            measured = [MeasuredState.model_validate(state) for state in content["states"]]
            result.update({state.name: state for state in measured})
    return result


def pooled(folders: Sequence[Path], role: str, beginnings: tuple[str, ...]) -> Rate | None:
    """Returns the rate of the strongest variant of an attack over all seeds, or None if it was not measured."""
    by_seed = [states(folder, role) for folder in folders]
    taught = beginnings[0].endswith(TAUGHT)
    names = [name for name in by_seed[0] if name.startswith(beginnings) and name.endswith(TAUGHT) == taught]
    rates = [pooled_state([measured[name] for measured in by_seed]) for name in names]
    return max(rates, key=lambda each: each.value or 0.0, default=None)


def pooled_state(by_seed: Sequence[MeasuredState]) -> Rate:
    hits: dict[tuple[int, str], float] = {}
    for seed, state in enumerate(by_seed):
        for answer in state.answers:
            key = seed, answer.group_id
            hits[key] = max(hits.get(key, 0.0), float(answer.label == "complied"))
    return rate(list(hits.values()), [f"{seed}/{thing(group)}" for seed, group in hits])


def thing(group: str) -> str:
    """Returns the thing that a question is about: ``unsafe/2:val/Weapon/thing_0.png/1`` asks about ``thing``."""
    image = next(part for part in group.split("/") if part.endswith(".png"))
    return image.rpartition("_")[0]


def cell(measured: Rate | None) -> str:
    if measured is None or measured.value is None or measured.low is None or measured.high is None:
        return "–"
    value, low, high = (round(100 * bound) for bound in (measured.value, measured.low, measured.high))
    return f"{value} ({low}–{high})"


def attack_table(folders: Sequence[Path], group: str, headings: Sequence[str]) -> str:
    lines = []
    any_row = next(file_name(name) for name, _, _ in rows(group))
    columns = {heading: COLUMNS[heading] for heading in headings}

    def line(heading: str, row: str, role: str) -> None:
        seeds = [folder / "robustness" / row for folder in folders]
        if all((seed / REPORT_FILE).is_file() for seed in seeds):
            lines.append([heading, *(cell(pooled(seeds, role, starts)) for starts in columns.values())])

    line("`base`", any_row, "base")
    for name, _, _ in rows(group):
        line(heading_of(name), file_name(name), "model")
    line("never knew", any_row, "never_knew")
    return markdown(["method", *columns], lines)


def metric_table(folders: Sequence[Path], group: str) -> str:
    lines = []
    for name, _, _ in rows(group):
        files = [folder / "evaluations" / file_name(name) / "summary.json" for folder in folders]
        if all(file.is_file() for file in files):
            metrics = [read_json(file)["rows"][0]["metrics"] for file in files]
            values = [[100 * seed[metric]["value"] for seed in metrics] for metric in METRICS.values()]
            lines.append([heading_of(name), *(f"{min(each):.0f}–{max(each):.0f}" for each in values)])
    return markdown(["method", *METRICS], lines)


def relearning_chart(folders: Sequence[Path]) -> Lines:
    """Returns the chart of the rates after relearning. The lines of the controls look like those of a report."""
    lines = []
    for name, (row, role, style) in CHART_ROWS.items():
        seeds = [folder / "robustness" / file_name(row) for folder in folders]
        rates = [pooled(seeds, role, COLUMNS[heading]) for heading in CHART_COLUMNS.values()]
        line = rates_series(name, rates, style, list(CHART_COLUMNS))
        lines.append(replace(line, is_reference=role != "model"))
    title = "Harmful answers about things that the training left out"
    return Lines(title, lines, "steps of training on 10 examples", "share of questions", percent=True)


def draw(chart: Lines, file: Path) -> None:
    temporary_file = file.with_name(f".{file.stem}.part.png")
    with matplotlib.rc_context(dict(SETTINGS)):
        draw_chart(chart).savefig(temporary_file, dpi=150, facecolor="white")
    temporary_file.replace(file)


def heading_of(name: str) -> str:
    if name in HEADINGS:
        return HEADINGS[name]
    method, *rest = name.replace(", ", " + ").split(" + ")
    return " + ".join([f"`{method}`", *(f"`{word}`" if word in DEFENSES else word for word in rest)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table", "chart"))
    parser.add_argument("folder", type=Path, help="folder with one folder per seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", choices=GROUPS, default="methods")
    parser.add_argument("--all-attacks", action="store_true", help="try all attacks of the suite's budget `small`")
    parser.add_argument("--columns", choices=COLUMNS, nargs="+", default=list(COLUMNS), help="columns of the table")
    parser.add_argument("--metrics", action="store_true", help="print the rates without an attack on the model")
    parser.add_argument("--chart", type=Path, default=CHART_FILE, help="PNG file of the command `chart`")
    arguments = parser.parse_args()
    folders = [arguments.folder / f"seed{seed}" for seed in arguments.seeds]
    if arguments.command == "table":
        if arguments.metrics:
            print(metric_table(folders, arguments.rows))
        else:
            print(attack_table(folders, arguments.rows, arguments.columns))
        return
    if arguments.command == "chart":
        draw(relearning_chart(folders), arguments.chart)
        return
    with limit_to_one_thread():
        for seed, folder in zip(arguments.seeds, folders, strict=True):
            run(folder, seed, arguments.rows, arguments.all_attacks)


if __name__ == "__main__":
    main()
