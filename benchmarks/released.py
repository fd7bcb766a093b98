"""Our recipes as shipped compared with the released code of both papers, which runs unedited.

    git clone https://github.com/yuu250/SafeEraser
    git clone https://github.com/OPTML-Group/VLM-Safety-Unlearn
    python benchmarks/released.py --safe-eraser SafeEraser --safe-eraser-python OLD/bin/python \\
        --safety-mirage VLM-Safety-Unlearn --safety-mirage-python OLD2/bin/python
    python benchmarks/released.py --docs     writes the results into docs/performance.md
    python benchmarks/released.py --table    prints them as Markdown

The released code needs old versions of its libraries, so each repository has a Python of its own. Without the options
the command prints how to make it.

Both sides train the same LLaVA of random weights (5.4M parameters, 144 image tokens) on the same made-up data, with one
thread and in float32. Both processes are alive during a case and run their steps in turn. Run this on a quiet machine:
on a busy one the two sides lose their caches to other programs unequally, and processor times suffer too. A case is
added to benchmarks/results/released.json when it is measured, and a second call measures the missing ones.
`benchmarks/speed.py` compares with the published structure on machines without the released code.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from speed import machine

RESULTS = Path(__file__).parent / "results" / "released.json"
DOCS = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
DOCS_MARKS = "<!-- tables of benchmarks/released.py -->\n", "<!-- end of these tables -->\n"
SIDES = Path(__file__).with_name("released_sides.py")
WARM_UP = 1  # repeats before the measured ones, after the first step
REPOSITORIES = {
    "safe_eraser": "https://github.com/yuu250/SafeEraser",
    "safety_mirage": "https://github.com/OPTML-Group/VLM-Safety-Unlearn",
}
MAIN_FILES = {"safe_eraser": "forget.py", "safety_mirage": "llava/train/train_unlearn.py"}
PACKAGES = {
    "safe_eraser": "torch==2.13.0 transformers==4.46.3 accelerate==1.1.1 peft==0.13.2 hydra-core 'datasets<3.3' "
    "'pyarrow<19' 'numpy<2' matplotlib debugpy scipy sentencepiece protobuf pillow",
    "safety_mirage": "torch==2.13.0 transformers==4.37.2 accelerate==0.21.0 peft==0.10.0 tokenizers==0.15.1 'numpy<2' "
    "'datasets<3.3' 'pyarrow<19' 'pydantic<2' einops einops-exts sentencepiece protobuf pillow requests httpx "
    "gradio_client shortuuid markdown2",
}
IMPORTS = {
    "safe_eraser": ("torch", "transformers", "accelerate", "peft", "hydra", "datasets", "matplotlib", "debugpy"),
    "safety_mirage": ("torch", "transformers", "accelerate", "peft", "datasets", "einops", "sentencepiece"),
}
RELEASED_LOSSES = {"ga": "ga", "gd": "gd", "kl": "kl", "po": "idk"}  # SafeEraser's names
# Data shapes. Images count by their paths, and features are cached by their pixels. Few different pictures have cached
# features after the first steps, as all images have after the first epoch. Many paths are needed where questions share
# an image: 600 images have about one pair of questions on one image in a step of 32, and SafeEraser's 3,000 fewer.
SHAPES: dict[str, dict[str, Any]] = {
    "single": {"images": 96, "questions": 1, "contents": 4},
    "first epoch": {"images": 256, "questions": 1, "contents": 256},
    "several": {"images": 600, "questions": 3, "contents": 4},
    "same": {"images": 32, "questions": 1, "contents": 1, "same": True},
}
NPO = {"unlearn_type": "npo", "npo_forget_alpha": 1.0, "npo_llava_loss_weight": 1.0}
RMU = {"unlearn_type": "rmu", "rmu_steering_coeffs": "10"}
FULL = {"per_device_train_batch_size": 1, "num_train_epochs": 10, "learning_rate": 1e-6}
LORA = {
    "per_device_train_batch_size": 8,
    "num_train_epochs": 10,
    "learning_rate": 1.1e-5,
    "mm_projector_lr": 1.1e-5,
    "lora_enable": True,
    "lora_r": 128,
    "lora_alpha": 256,
}
# recipe -> flags of the released script. RMU's layers are those of the published runs, scaled from 32 layers to 8.
SAFETY_MIRAGE: dict[str, dict[str, Any]] = {
    "npo_full": {
        **FULL,
        **NPO,
        "num_train_epochs": 1,
        "learning_rate": 5e-7,
        "npo_beta": 0.9,
        "npo_retain_alpha": 1.0,
    },
    "npo_full_generic": {**FULL, **NPO, "npo_beta": 0.1},
    "npo_lora": {**LORA, **NPO, "npo_beta": 0.7},
    "rmu_full": {
        **FULL,
        **RMU,
        "rmu_layer_id": 1,
        "rmu_layer_ids": "1",
        "rmu_param_ids": "6",
        "rmu_retain_alpha": 1.0,
        "rmu_llava_loss_weight": 1.0,
    },
    "rmu_lora": {**LORA, **RMU, "rmu_layer_id": 3, "rmu_llava_loss_weight": 1.2, "rmu_retain_alpha": 0.0},
}
OVERRIDES = {"rmu_full": ["method.layer=1", "trainable.layers=[1]"], "rmu_lora": ["method.layer=3"]}


@dataclass(frozen=True)
class Case:
    """A recipe and a shape of the data.

    Args:
        system: ``safe_eraser`` or ``safety_mirage``.
        recipe: The shipped recipe, without its size.
        shape: A key of `SHAPES`.
        overrides: Further settings of our side.
    """

    system: str
    recipe: str
    shape: str = "single"
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return " ".join([self.system, self.recipe, self.shape, *self.overrides])

    @property
    def steps(self) -> int:
        """The number of optimizer steps of a repeat. Steps of one sample are short."""
        return 8 if self.system == "safety_mirage" and "full" in self.recipe else 1


def cases() -> list[Case]:
    """Returns all cases in the order of the tables."""
    losses = [f"{loss}{ending}" for loss in RELEASED_LOSSES for ending in ("", "_pd")]
    grouped = ("training.group_by_image=true",)
    return [
        *(Case("safe_eraser", loss) for loss in losses),
        Case("safe_eraser", "gd_pd", "first epoch"),
        *(Case("safe_eraser", loss, "several") for loss in losses),
        *(Case("safe_eraser", loss, "several", grouped) for loss in losses),
        *(Case("safety_mirage", recipe) for recipe in SAFETY_MIRAGE),
        Case("safety_mirage", "npo_full", "first epoch"),
    ]


def job(case: Case, side: str, work: Path, code: Path, workers: int) -> dict[str, Any]:
    """Returns the settings of one process. See `released_sides.py`."""
    common = {"system": case.system, "side": side, "work": str(work), "workers": workers}
    common["out"] = tempfile.mkdtemp(dir=work, prefix=side)
    if side == "ours":
        overrides = [*OVERRIDES.get(case.recipe, []), *case.overrides]
        return {**common, "recipe": f"{case.system}/{case.recipe}_7b", "overrides": overrides}
    common["code"] = str(code)
    if case.system == "safety_mirage":
        script = "lora" if case.recipe.endswith("lora") else "full"
        return {**common, "script": script, "settings": SAFETY_MIRAGE[case.recipe]}
    loss = RELEASED_LOSSES[case.recipe.removesuffix("_pd")] + ("pd" if case.recipe.endswith("_pd") else "")
    return {**common, "loss": loss, "settings": {}}


class Side:
    """A training process that runs steps on command.

    Attributes:
        first: The report of its first step, whose seconds include the start of the process.
    """

    first: dict[str, Any]

    def __init__(self, python: str, settings: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        file = Path(settings["out"]) / "job.json"
        file.write_text(json.dumps(settings), encoding="utf-8")
        self._log = file.with_name("log.txt")
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [python, "-W", "ignore", str(SIDES), str(file)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **environment},
            )

    def command(self, text: str) -> dict[str, Any]:
        """Sends a command and returns the report."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # `report` raises the error
            self._process.stdin.write(f"{text}\n")
            self._process.stdin.flush()
        return self.report()

    def report(self) -> dict[str, Any]:
        """Waits for a report.

        Raises:
            SystemExit: The process has ended.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])
            raise SystemExit(f"{self._process.args[3]} ended:\n{tail}")  # type: ignore[index]
        report: dict[str, Any] = json.loads(line)
        return report

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@contextmanager
def two_sides(jobs: Mapping[str, dict[str, Any]], pythons: Mapping[str, str]) -> Iterator[dict[str, Side]]:
    """Starts the processes of a case one after the other, up to their first optimizer step, and ends them."""
    environment = {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_DISABLED": "true",
        "HF_HUB_OFFLINE": "1",
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
    }
    sides: dict[str, Side] = {}
    try:
        for name, settings in jobs.items():
            cache = {"VLM_UNLEARN_CACHE": f"{settings['out']}/cache"}  # so that our side computes the reference pass
            sides[name] = Side(pythons[name], settings, {**environment, **cache})
            sides[name].first = sides[name].report()
            if "control_vector" in sides[name].first and "ours" in jobs:
                jobs["ours"]["control_vector"] = sides[name].first["control_vector"]
        yield sides
    finally:
        for side in sides.values():
            side.kill()


def measure(case: Case, code: Path, python: str, repeats: int, workers: int) -> dict[str, Any]:
    """Returns the times and the memory of both sides of a case, and their first losses."""
    pythons = {"released": python, "ours": sys.executable}
    with tempfile.TemporaryDirectory(prefix="released") as scratch:
        work = Path(scratch) / "llava"
        write_inputs(work, case.system, SHAPES[case.shape])
        jobs = {side: job(case, side, work, code, workers) for side in pythons}
        reports: dict[str, list[dict[str, Any]]] = {side: [] for side in jobs}
        with two_sides(jobs, pythons) as sides:
            for side in sides.values():
                side.command(str(WARM_UP * case.steps))
            for _ in range(repeats):
                for name, side in sides.items():
                    reports[name].append(side.command(str(case.steps)))
            first = {name: side.first["seconds"] for name, side in sides.items()}
            last = {name: side.command("stop") for name, side in sides.items()}
    ratios, processor = (
        sorted(slow[key] / fast[key] for slow, fast in zip(reports["released"], reports["ours"], strict=True))
        for key in ("seconds", "processor_seconds")
    )
    seconds = {name: statistics.median(report["seconds"] for report in reports[name]) / case.steps for name in reports}
    return {
        "repeats": repeats,
        "ratio": round(statistics.median(ratios), 3),
        "ratio_lowest": round(ratios[0], 3),
        "ratio_highest": round(ratios[-1], 3),
        "processor_ratio": round(statistics.median(processor), 3),
        "seconds": round(seconds["ours"], 4),
        "released_seconds": round(seconds["released"], 4),
        "start_seconds": round(first["ours"], 2),
        "released_start_seconds": round(first["released"], 2),
        "memory_mb": round(last["ours"]["memory_mb"]),
        "released_memory_mb": round(last["released"]["memory_mb"]),
        "first_loss": last["ours"]["first_loss"],
        "released_first_loss": last["released"]["first_loss"],
    }


def compare_losses(case: Case, code: Path, python: str) -> float:
    """Returns the difference of both sides' losses of the first sample under ``method.paper_compat=full``.

    All samples of a role are equal, so that the draws of the two sides do not matter. RMU's control vector is that of
    the released code.
    """
    pythons = {"released": python, "ours": sys.executable}
    with tempfile.TemporaryDirectory(prefix="released") as scratch:
        work = Path(scratch) / "llava"
        write_inputs(work, case.system, SHAPES["same"])
        jobs = {side: job(case, side, work, code, workers=0) for side in pythons}
        jobs["ours"]["overrides"] += ["method.paper_compat=full", "training.gradient_accumulation_steps=1"]
        jobs["released"] |= {"report_control_vector": True}
        if case.system == "safe_eraser":
            jobs["released"]["settings"] = {"gradient_accumulation_steps": 1}
        with two_sides(jobs, pythons) as sides:
            for side in sides.values():
                side.command("1")  # our side logs a step after it
            losses = [side.command("stop")["first_loss"] for side in sides.values()]
    return abs(losses[0] - losses[1])


def write_inputs(work: Path, system: str, shape: dict[str, Any]) -> None:
    """Writes the model and the data of a case into a new folder. See `released_sides.py`."""
    import released_sides

    work.mkdir(parents=True)
    released_sides.write_inputs(work, system, shape)


def profile(case: Case, code: Path, python: str) -> str:
    """Returns profiles of an optimizer step of both sides, by Python's functions and by PyTorch's operators."""
    pythons = {"released": python, "ours": sys.executable}
    texts = []
    with tempfile.TemporaryDirectory(prefix="released") as scratch:
        work = Path(scratch) / "llava"
        write_inputs(work, case.system, SHAPES[case.shape])
        jobs = {side: job(case, side, work, code, workers=0) for side in pythons}
        with two_sides(jobs, pythons) as sides:
            for name, side in sides.items():
                side.command(str(WARM_UP * case.steps))
                for kind in ("operators", "functions"):
                    report = side.command(f"{case.steps} {kind}")
                    texts.append(f"{case.name}, {name}, {kind}, {report['seconds']:.2f} s\n{report['profile']}")
    return "\n".join(texts)


# Results

CHECK = "full_loss_difference"
COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "recipe": lambda row: f"`{row['recipe']}`",
    "batch": lambda row: BATCHES[row["system"], row["recipe"].endswith("lora")],
    "released": lambda row: f"{row['released_seconds']:.2f} s",
    "ours": lambda row: f"{row['seconds']:.2f} s",
    "times faster": lambda row: f"**{row['ratio']:.2f}** ({row['ratio_lowest']:.2f}–{row['ratio_highest']:.2f})",
    "processor time": lambda row: f"{row['processor_ratio']:.2f}",
    "memory": lambda row: f"{row['memory_mb'] / row['released_memory_mb']:.2f}",
    "losses differ by": lambda row: f"{row[CHECK]:.0e}" if row[CHECK] else "0",
}
BATCHES = {
    ("safe_eraser", False): "1 × 16",
    ("safety_mirage", False): "1 × 1",
    ("safety_mirage", True): "8 × 1",
}
TABLES = {  # title -> system, shape and whether our side has further settings
    "SafeEraser, one question an image": ("safe_eraser", "single", False),
    "SafeEraser, three questions of each role an image": ("safe_eraser", "several", False),
    "The same with `training.group_by_image: true`": ("safe_eraser", "several", True),
    "SafeEraser, one question an image, images that were not seen before": ("safe_eraser", "first epoch", False),
    "Safety Mirage, one question an image": ("safety_mirage", "single", False),
    "Safety Mirage, one question an image, images that were not seen before": ("safety_mirage", "first epoch", False),
}


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the rows as the Markdown tables of docs/performance.md, one for each shape of the data."""
    texts = []
    for title, key in TABLES.items():
        chosen = [row for row in rows if (row["system"], row["shape"], bool(row["overrides"])) == key]
        columns = [name for name in COLUMNS if name != "losses differ by" or all(CHECK in row for row in chosen)]
        lines = [columns, ["---", *["---:"] * (len(columns) - 1)]]
        lines += [[COLUMNS[name](row) for name in columns] for row in chosen]
        if chosen:
            texts.append(f"{title}:\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(texts)


def write_docs(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Replaces the tables in the docs, between two comments."""
    start, end = DOCS_MARKS
    before_tables, _, rest = file.read_text(encoding="utf-8").partition(start)
    after_tables = rest.partition(end)[2]
    file.write_text(f"{before_tables}{start}\n{tables(rows)}\n\n{end}{after_tables}", encoding="utf-8")


def read_rows(file: Path) -> dict[str, dict[str, Any]]:
    """Returns the measured rows by the names of their cases, in the order of the tables."""
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else []
    by_name = {
        Case(*(row[key] for key in ("system", "recipe", "shape")), tuple(row["overrides"])).name: row for row in rows
    }
    return {case.name: by_name[case.name] for case in cases() if case.name in by_name}


def write_rows(file: Path, rows: Mapping[str, dict[str, Any]], codes: Mapping[str, str]) -> None:
    """Writes the rows with the machine, and the commits of the released code that was measured."""
    from vlm_unlearn.store import package_versions, write_json

    stored = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    ordered = [rows[case.name] for case in cases() if case.name in rows]
    write_json(
        file,
        {
            "machine": machine(),
            "threads": 1,
            "versions": package_versions(),
            "released_commits": {**stored.get("released_commits", {}), **codes},
            "rows": ordered,
        },
    )


def commit_of(folder: Path) -> str:
    """Returns the commit of a checkout, with ``+`` if files differ from it. Empty if it is no checkout."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


# Command


def check_released_code(system: str, code: Path | None, python: Path | None) -> str | None:
    """Returns the reason why a system cannot be measured, with the fix. None if it can."""
    option, file = f"--{system.replace('_', '-')}", MAIN_FILES[system]
    advice = f"Clone {REPOSITORIES[system]} and pass its folder as {option}"
    if code is None:
        return f"{option} is missing. {advice}."
    if not (code / file).is_file():
        return f"{option} {code}: {file} not found. {advice}."
    environment = f"Create one with: python3.11 -m venv OLD && OLD/bin/pip install {PACKAGES[system]}"
    if python is None:
        return f"{option}-python is missing. It is the Python of an environment with old versions. {environment}"
    check = [str(python), "-c", f"import {', '.join(IMPORTS[system])}; print(transformers.__version__)"]
    try:
        done = subprocess.run(check, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    except OSError as error:
        return f"{option}-python {python}: {error.strerror}. {environment}"
    version = PACKAGES[system].partition("transformers==")[2].split()[0]
    if done.returncode or done.stdout.strip() != version:
        reason = done.stderr.strip().splitlines()[-1:] or [f"transformers is {done.stdout.strip()}, not {version}"]
        return f"{option}-python {python}: {reason[0]}. {environment}"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for system in REPOSITORIES:
        option = f"--{system.replace('_', '-')}"
        parser.add_argument(option, type=Path, metavar="FOLDER", help=f"a clone of {REPOSITORIES[system]}")
        parser.add_argument(f"{option}-python", type=Path, metavar="PYTHON", help="the Python of its environment")
    parser.add_argument("--cases", nargs="+", metavar="TEXT", help="measure the cases whose name contains one of these")
    parser.add_argument("--list", action="store_true", help="print the names of all cases")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=0, help="processes of each side that load data")
    parser.add_argument("--again", action="store_true", help="also measure cases that the results file has")
    parser.add_argument("--override", nargs="+", default=[], metavar="KEY=VALUE", help="change our recipes, for trials")
    parser.add_argument("--profile", action="store_true", help="print profiles of a step of each case instead")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the results file")
    parser.add_argument("--table", action="store_true", help="print the results as Markdown, without measuring")
    parser.add_argument("--docs", action="store_true", help="write the results into docs/performance.md")
    options = parser.parse_args()
    if options.table:
        print(tables(list(read_rows(options.out).values())))
        return
    if options.docs and not any(getattr(options, system) for system in REPOSITORIES):
        write_docs(DOCS, list(read_rows(options.out).values()))
        return
    selected = [case for case in cases() if options.cases is None or any(text in case.name for text in options.cases)]
    if options.list:
        print("\n".join(case.name for case in selected))
        return
    if not selected:
        sys.exit(f"No case has this name. The cases are: {', '.join(case.name for case in cases())}")
    if options.override and options.out == RESULTS and not options.profile:
        sys.exit("--override does not measure the recipes as shipped. Pass another results file as --out.")
    usable: dict[str, tuple[Path, str]] = {}
    for system in dict.fromkeys(case.system for case in selected):
        code, python = getattr(options, system), getattr(options, f"{system}_python")
        reason = check_released_code(system, code, python)
        if reason is None:
            usable[system] = code.resolve(), str(python)
        else:
            print(reason, file=sys.stderr)
    if not usable:
        sys.exit("Nothing was measured. benchmarks/speed.py needs no released code.")
    import vlm_unlearn

    rows = read_rows(options.out)
    for case in selected:
        if case.system not in usable:
            continue
        code, python_name = usable[case.system]
        trial = replace(case, overrides=(*case.overrides, *options.override))
        if options.profile:
            print(profile(trial, code, python_name))
            continue
        if options.again or case.name not in rows:
            row = {**asdict(case), **measure(trial, code, python_name, options.repeats, options.workers)}
            rows[case.name] = {**row, "commit": commit_of(Path(vlm_unlearn.__file__).parent)}
            write_rows(options.out, rows, {case.system: commit_of(code)})
            ratios = f"{row['ratio']:.2f} ({row['ratio_lowest']:.2f}-{row['ratio_highest']:.2f})"
            print(f"{case.name:<60} {ratios}", flush=True)
        if case.shape == "single" and CHECK not in rows[case.name]:
            rows[case.name][CHECK] = compare_losses(trial, code, python_name)
            write_rows(options.out, rows, {case.system: commit_of(code)})
    if options.docs:
        write_docs(DOCS, list(read_rows(options.out).values()))


if __name__ == "__main__":
    main()
