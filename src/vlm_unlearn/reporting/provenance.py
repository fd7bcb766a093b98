"""What a report's numbers come from: what was asked of whom, what it took, and how to make them again. Out of the runs' manifests."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_unlearn.config import Suite
from vlm_unlearn.errors import UserError
from vlm_unlearn.evaluation.generate import saved_suite
from vlm_unlearn.evaluation.verdicts import suite_costs
from vlm_unlearn.records import Row
from vlm_unlearn.reporting.columns import split_title
from vlm_unlearn.reporting.formatting import judges_of
from vlm_unlearn.store import digest_model, read_manifest, user_path

DIGEST = re.compile(r"[0-9a-f]{64}(\+[0-9a-f]{64})?")  # of weights; of an adapter its base's and its own


@dataclass(frozen=True)
class ModelProvenance:
    """What one model's row was made from; a manifest is empty where there is none."""

    model: str
    run: Path
    suite: Suite
    manifest: Mapping[str, Any]
    questions: int
    training: Path | None = None
    trained: Mapping[str, Any] = field(default_factory=dict)  # the training run's manifest


def read_provenance(runs: Mapping[str, Path], training: Mapping[str, Path]) -> dict[str, ModelProvenance]:
    """Each model's source, with its training run: the one given, else the one that its suite's model lies in."""
    found = {}
    for model, run in runs.items():
        suite = saved_suite(run)
        trained_in = training.get(model) or training_run(suite.model, run)
        trained = _manifest(trained_in) if trained_in is not None else {}
        found[model] = ModelProvenance(
            model, run, suite, _manifest(run), _lines(run / "prompts.jsonl"), trained_in if trained else None, trained
        )
    return found


def training_run(model: str, run: Path) -> Path | None:
    """The training run that a suite's model is, or lies in; of a run folder that was moved, below the folders that it lies in.

    One that holds other weights than the evaluation was of is none.

    Args:
        run: the evaluation.
    """
    evaluated = _manifest(run).get("identity", {}).get("model")
    asked = user_path(model)
    named = asked.parent if asked.name == "model" else asked
    moved = (
        [folder / "runs" / named.name for folder in run.resolve().parents[:3]] if named.parent.name == "runs" else []
    )
    for folder in (asked, named, *moved):
        identity = _manifest(folder).get("identity", {})
        if (
            identity.get("kind") == "train"
            and same_weights(evaluated, own_digest(folder, identity.get("model"))) is not False
        ):
            return folder
    return None


def same_weights(evaluated: object, wanted: object) -> bool | None:
    """Whether an evaluation was of these weights; None where one of the two has no digest to tell by, as with a server's model.

    Args:
        evaluated: what the evaluation's manifest calls its model.
        wanted: the weights' digest.
    """
    told = all(isinstance(one, str) and DIGEST.fullmatch(one) for one in (evaluated, wanted))
    return evaluated == wanted if told else None


def own_digest(run: Path, base_digest: object) -> str | None:
    """The digest of what a training run made, as an evaluation's manifest would have it: an adapter's stands behind its base's.

    None where the weights aren't there any more.
    """
    folder = run / "model"
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    digest = digest_model(folder)
    return f"{base_digest}+{digest}" if (folder / "adapter_config.json").is_file() else digest


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        return read_manifest(folder) if (folder / "manifest.json").is_file() else {}
    except UserError:  # another's file of that name
        return {}


def _lines(file: Path) -> int:
    if not file.is_file():
        return 0
    with file.open("rb") as handle:
        return sum(bool(line.strip()) for line in handle)


def describe_evaluation(rows: Sequence[Row], sources: Mapping[str, ModelProvenance]) -> list[str]:
    """A line or two: how many models, how many questions of what, who judged, how it was decoded, which seeds."""
    asked = list(sources.values())
    counts = sorted({source.questions for source in asked})
    many = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}" if counts else "no"
    cases = list(dict.fromkeys(case.name for source in asked for case in source.suite.splits))
    benchmarks = list(dict.fromkeys(one.name for source in asked for one in source.suite.benchmarks))
    files = dict.fromkeys(
        path.name for source in asked for path in (*(case.file for case in source.suite.splits), *_files(source.suite))
    )
    judges = judges_of(rows)
    models = f"{len(rows)} models were" if len(rows) > 1 else f"{rows[0].model} was" if rows else "No model was"
    first = f"{models} asked {many} questions{' each' if len(rows) > 1 else ''}"
    if cases:
        titles = ", ".join(map(split_title, cases[:3])) + (", …" if len(cases) > 3 else "")
        first += f" in {len(cases)} case{'' if len(cases) == 1 else 's'} ({titles})"
    if benchmarks:
        first += f"{' and' if cases else ''} of {len(benchmarks)} benchmark{'' if len(benchmarks) == 1 else 's'}"
    first += f", from {', '.join(list(files)[:4])}{', …' if len(files) > 4 else ''}." if files else "."
    settings = [f"Judged by {', '.join(judges)}" if judges else "Judged by nobody", _decoding(asked), _seeds(asked)]
    return [first, "; ".join(part for part in settings if part) + "."]


def _files(suite: Suite) -> list[Path]:
    return [path for benchmark in suite.benchmarks for path in benchmark.annotations]


def _decoding(sources: Sequence[ModelProvenance]) -> str:
    ways = {_way(source) for source in sources}
    return "decoded " + " or ".join(sorted(ways)) if ways else ""


def _way(source: ModelProvenance) -> str:
    generation = source.suite.generation
    if generation.temperature == 0:
        return "greedily"
    return f"at temperature {generation.temperature:g} (seed {generation.seed})"


def _seeds(sources: Sequence[ModelProvenance]) -> str:
    seeds = sorted({seed for source in sources if (seed := training_seed(source)) is not None})
    return f"training seed{'' if len(seeds) == 1 else 's'} {', '.join(map(str, seeds))}" if seeds else ""


def training_seed(source: ModelProvenance) -> int | None:
    """The seed that a model was trained with."""
    recipe = source.trained.get("identity", {}).get("recipe")
    seed = (
        recipe.get("training", {}).get("seed")
        if isinstance(recipe, dict) and isinstance(recipe.get("training"), dict)
        else None
    )
    return seed if isinstance(seed, int) else None


COSTS = (
    "training",
    "optimizer steps",
    "training's peak memory",
    "generation",
    "generation's peak memory",
    "judges' tokens read",
    "judges' tokens written",
    "judges' cost",
)


def read_costs(sources: Mapping[str, ModelProvenance]) -> dict[str, dict[str, str]]:
    """What each model took, by heading: its training, its evaluation and its judges, as far as manifests and verdicts tell."""
    found: dict[str, dict[str, str]] = {}
    for model, source in sources.items():
        spent = {}
        if source.trained:
            spent["training"] = _seconds(source.trained)
            spent["optimizer steps"] = (
                f"{source.trained['steps']:,}" if isinstance(source.trained.get("steps"), int) else "–"
            )
            spent["training's peak memory"] = _memory(source.trained)
        if source.manifest:
            spent["generation"] = _seconds(source.manifest)
            spent["generation's peak memory"] = _memory(source.manifest)
        costs = suite_costs(source.run, source.suite)
        if any(cost.tokens_read for cost in costs):
            spent["judges' tokens read"] = f"{sum(cost.tokens_read for cost in costs):,}"
            spent["judges' tokens written"] = f"{sum(cost.tokens_written for cost in costs):,}"
        if any(cost.cost is not None for cost in costs):
            spent["judges' cost"] = f"{sum(cost.cost or 0.0 for cost in costs):,.2f}"
        if spent:
            found[model] = spent
    return found


def _seconds(manifest: Mapping[str, Any]) -> str:
    seconds = float(manifest["wall_seconds"])
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _memory(manifest: Mapping[str, Any]) -> str:
    memory = manifest.get("peak_memory_mb")
    if not isinstance(memory, int) or memory <= 0:
        return "–"
    return f"{memory:,} MiB" if memory < 10_000 else f"{memory / 1024:,.1f} GiB"


def reproduction_commands(sources: Mapping[str, ModelProvenance]) -> list[str]:
    """The commands that make each model and its answers again, out of the files that the runs keep, and a report of what they made."""
    names = _names_of_folders(sources)
    trained: dict[Path, str] = {}
    lines = []
    for model, source in sources.items():
        made = ""
        if source.training is not None:
            if source.training not in trained:
                trained[source.training] = f"again/runs/{names[model]}"
                lines.append(
                    f"vlm-unlearn train {_quoted(source.training / 'recipe.json')} output={_quoted(trained[source.training])}"
                )
            made = f" model={_quoted(trained[source.training])}"
        out = f"--out {_quoted(f'again/evaluations/{names[model]}')} --name={_quoted(model)}"
        lines.append(f"vlm-unlearn evaluate {_quoted(source.run / 'suite.json')}{made} {out}")
    again = " ".join(_quoted(f"again/evaluations/{name}") for name in names.values())
    return [*lines, f"vlm-unlearn report {again} --out again/report"]


def _names_of_folders(models: Iterable[str]) -> dict[str, str]:
    """A folder's name for each model, none twice, also where upper and lower case are the same."""
    found: dict[str, str] = {}
    for model in models:
        plain = re.sub(r"[^A-Za-z0-9._+-]", "_", model)[-60:].lstrip(".-") or "model"
        taken = {name.lower() for name in found.values()}
        found[model] = next(
            name for name in (plain, *(f"{plain}-{i}" for i in range(2, len(found) + 3))) if name.lower() not in taken
        )
    return found


def _quoted(path: Path | str) -> str:
    return shlex.quote(str(path))


def list_digests(sources: Mapping[str, ModelProvenance]) -> list[tuple[str, str, str, str]]:
    """Model, digest of its weights, digest of the questions, and its training data's digests, as the manifests hold them."""
    found = []
    for source in sources.values():
        identity = source.manifest.get("identity", {})
        data = source.trained.get("identity", {}).get("data")
        told = ", ".join(f"{name} {str(value)[:12]}" for name, value in data.items()) if isinstance(data, dict) else "–"
        found.append((source.model, str(identity.get("model", "–")), str(identity.get("prompts", "–")), told))
    return found


def package_versions(sources: Mapping[str, ModelProvenance]) -> str:
    """``"torch 2.13.0, transformers 5.23.0"``; where runs differ, each version."""
    found: dict[str, dict[str, None]] = {}
    for source in sources.values():
        for manifest in (source.manifest, source.trained):
            versions = manifest.get("versions")
            for package, version in versions.items() if isinstance(versions, dict) else ():
                found.setdefault(str(package), {})[str(version)] = None
    return ", ".join(f"{package} {' and '.join(versions)}" for package, versions in found.items())


def training_time(training: Path) -> str:
    """``"5.1 s"``: the training time that a run's manifest holds."""
    manifest = _manifest(training)
    return _seconds(manifest) if manifest else "–"
