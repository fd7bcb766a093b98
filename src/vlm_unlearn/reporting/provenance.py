"""Reads where a report's numbers come from: runs, prompts, judges, seeds, cost, and commands to reproduce them."""

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
from vlm_unlearn.store import EvaluationRun, RunDirectory, digest_model, user_path, validate_model_files

WEIGHTS_DIGEST = re.compile(r"[0-9a-f]{64}(\+[0-9a-f]{64})?")  # of an adapter: the base's digest + the adapter's


@dataclass(frozen=True)
class ModelProvenance:
    """The runs that one model's row was made from. A manifest is empty if there is none."""

    model: str  # the name in the report
    run: Path  # the evaluation's folder
    suite: Suite
    manifest: Mapping[str, Any]  # the evaluation's
    questions: int  # the number of prompts
    training: Path | None = None  # the folder of the training run, if it was found
    training_manifest: Mapping[str, Any] = field(default_factory=dict)

    @property
    def imported_files(self) -> list[str]:
        """The names and digests of the files that the answers were imported from. Empty if a model generated them."""
        files = _imported(self.manifest).get("files")
        entries = [entry for entry in files if isinstance(entry, dict)] if isinstance(files, list) else []
        return [f"{entry.get('name', '–')} (sha256 {entry.get('sha256', '–')})" for entry in entries]


def _imported(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the format and the files of imported answers, or an empty mapping."""
    imported = manifest.get("identity", {}).get("imported")
    return imported if isinstance(imported, dict) else {}


def read_provenance(runs: Mapping[str, Path], training: Mapping[str, Path]) -> dict[str, ModelProvenance]:
    """Reads the provenance of each model.

    Args:
        runs: The evaluation folder of each model.
        training: The training run of a model. For other models it is the run that the suite's `model` belongs to.
    """
    provenance = {}
    for model, run in runs.items():
        suite = saved_suite(run)
        folder = training.get(model) or training_run(suite.model, run)
        manifest = run_manifest(folder) if folder is not None else {}
        questions = _count_lines(EvaluationRun(run).prompts_file)
        provenance[model] = ModelProvenance(
            model, run, suite, run_manifest(run), questions, folder if manifest else None, manifest
        )
    return provenance


def training_run(model: str, run: Path) -> Path | None:
    """Returns the training run that an evaluated model belongs to, or None.

    If the folder does not exist any more, a run of the same name in a folder ``runs`` above the evaluation is used.
    This finds the runs of a project folder that was moved. A run with other weights than the evaluated ones is ignored.

    Args:
        model: The suite's `model`: a training run, or its folder ``model``.
        run: The evaluation's folder.
    """
    evaluated = run_manifest(run).get("identity", {}).get("model")
    folder = user_path(model)
    named = folder.parent if folder.name == "model" else folder
    above = run.resolve().parents[:3] if named.parent.name == "runs" else ()
    for candidate in (folder, named, *(parent / "runs" / named.name for parent in above)):
        identity = run_manifest(candidate).get("identity", {})
        digest = trained_digest(candidate, identity.get("model")) if identity.get("kind") == "train" else None
        if identity.get("kind") == "train" and same_weights(evaluated, digest) is not False:
            return candidate
    return None


def same_weights(evaluated: object, expected: object) -> bool | None:
    """Returns whether two digests identify the same weights, or None if one of them is not a digest of weights.

    Args:
        evaluated: The `model` of an evaluation's manifest. For a model on a server this is not a digest.
        expected: The digest to compare with.
    """
    comparable = all(isinstance(digest, str) and WEIGHTS_DIGEST.fullmatch(digest) for digest in (evaluated, expected))
    return evaluated == expected if comparable else None


def trained_digest(run: Path, base_digest: object) -> str | None:
    """Returns the digest of a training run's weights, in the form of an evaluation's manifest.

    The digest of an adapter follows that of its base, with a ``+`` between them. The result is None if the run has no
    weights any more.
    """
    weights = RunDirectory(run).model
    if not weights.is_dir() or not any(weights.iterdir()):
        return None
    validate_model_files(weights)  # an incomplete adapter would count as the trained model
    digest = digest_model(weights)
    return f"{base_digest}+{digest}" if (weights / "adapter_config.json").is_file() else digest


def run_manifest(path: Path) -> dict[str, Any]:
    """Returns the manifest of a run, or an empty dict if the folder is not a run."""
    run = RunDirectory(path)
    try:
        return run.read_manifest() if run.exists() else {}
    except UserError:  # a file of that name that another program wrote
        return {}


def _count_lines(file: Path) -> int:
    if not file.is_file():
        return 0
    with file.open("rb") as handle:
        return sum(bool(line.strip()) for line in handle)


def describe_evaluation(rows: Sequence[Row], sources: Mapping[str, ModelProvenance]) -> list[str]:
    """Describes an evaluation in two paragraphs: models and questions, then judges, decoding and training seeds."""
    suites = [source.suite for source in sources.values()]
    counts = sorted({source.questions for source in sources.values()})
    questions = " to ".join(f"{count:,}" for count in dict.fromkeys((*counts[:1], *counts[-1:]))) or "no"
    splits = dict.fromkeys(split.name for suite in suites for split in suite.splits)
    benchmarks = dict.fromkeys(benchmark.name for suite in suites for benchmark in suite.benchmarks)
    annotations = [path for suite in suites for benchmark in suite.benchmarks for path in benchmark.annotations]
    files = dict.fromkeys(
        path.name for path in (*(split.file for suite in suites for split in suite.splits), *annotations)
    )
    models, each = (f"{len(rows)} models", " each") if len(rows) > 1 else (rows[0].model if rows else "No model", "")
    titles = _first(list(map(split_title, splits)), 3)
    pieces = [
        f"{models} answered {questions} questions{each}",
        f" in {_plural(len(splits), 'split')} ({titles})" if splits else "",
        f"{' and' if splits else ''} of {_plural(len(benchmarks), 'benchmark')}" if benchmarks else "",
        f", from {_first(list(files), 4)}" if files else "",
    ]
    judges = judges_of(rows)
    decoding = sorted({_decoding(source.suite) for source in sources.values() if not source.imported_files})
    seeds = sorted({seed for source in sources.values() if (seed := training_seed(source)) is not None})
    imported = [
        f"The answers of {model} were imported with the format {_imported(source.manifest).get('format', '–')} from "
        f"{', '.join(source.imported_files)}."
        for model, source in sources.items()
        if source.imported_files
    ]
    details = [
        *imported,
        f"Judged by {', '.join(judges)}." if judges else "Without a judge.",
        f"Decoded {' or '.join(decoding)}." if decoding else "",
        f"Training seed{'' if len(seeds) == 1 else 's'} {', '.join(map(str, seeds))}." if seeds else "",
    ]
    return [f"{''.join(pieces)}.", " ".join(filter(None, details))]


def _first(names: Sequence[str], count: int) -> str:
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _decoding(suite: Suite) -> str:
    generation = suite.generation
    sampled = f"at temperature {generation.temperature:g} (seed {generation.seed})"
    return sampled if generation.temperature else "greedily"


def training_seed(source: ModelProvenance) -> int | None:
    """Returns the seed that a model was trained with, or None if it is unknown."""
    recipe = source.training_manifest.get("identity", {}).get("recipe")
    training = recipe.get("training") if isinstance(recipe, dict) else None
    seed = training.get("seed") if isinstance(training, dict) else None
    return seed if isinstance(seed, int) else None


COSTS = (
    *("training", "optimizer steps", "training's peak memory", "generation", "generation's peak memory"),
    *("judges' tokens read", "judges' tokens written", "judges' cost"),
)


def read_costs(sources: Mapping[str, ModelProvenance]) -> dict[str, dict[str, str]]:
    """Returns the cost of each model's training, evaluation and judges, from manifests and verdicts.

    Returns:
        The costs of each model as text, with the headings of `COSTS` as keys. Unknown costs are left out.
    """
    costs: dict[str, dict[str, str]] = {}
    for model, source in sources.items():
        values = {}
        if source.training_manifest:
            steps = source.training_manifest.get("steps")
            values["training"] = _seconds(source.training_manifest)
            values["optimizer steps"] = f"{steps:,}" if isinstance(steps, int) else "–"
            values["training's peak memory"] = _memory(source.training_manifest)
        if source.manifest and not source.imported_files:
            values["generation"] = _seconds(source.manifest)
            values["generation's peak memory"] = _memory(source.manifest)
        judges = suite_costs(EvaluationRun(source.run), source.suite)
        if any(cost.tokens_read for cost in judges):
            values["judges' tokens read"] = f"{sum(cost.tokens_read for cost in judges):,}"
            values["judges' tokens written"] = f"{sum(cost.tokens_written for cost in judges):,}"
        if any(cost.cost is not None for cost in judges):
            values["judges' cost"] = f"{sum(cost.cost or 0.0 for cost in judges):,.2f}"
        if values:
            costs[model] = values
    return costs


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
    """Returns the commands that repeat each training and evaluation from the runs' files, and the final report."""
    names = _folder_names(sources)
    outputs: dict[Path, str] = {}
    commands = []
    for model, source in sources.items():
        options = f"--out {_quote(f'again/evaluations/{names[model]}')}"
        if source.imported_files:
            commands.append(f"vlm-unlearn import-answers {_import_arguments(source)} {options}")
            continue
        override = ""
        if source.training is not None:
            if source.training not in outputs:
                outputs[source.training] = f"again/runs/{names[model]}"
                recipe = _quote(RunDirectory(source.training).recipe_file)
                commands.append(f"vlm-unlearn train {recipe} output={_quote(outputs[source.training])}")
            override = f" model={_quote(outputs[source.training])}"
        suite_file = _quote(EvaluationRun(source.run).suite_file)
        commands.append(f"vlm-unlearn evaluate {suite_file}{override} {options} --name={_quote(model)}")
    evaluations = " ".join(_quote(f"again/evaluations/{name}") for name in names.values())
    return [*commands, f"vlm-unlearn report {evaluations} --out again/report"]


def _import_arguments(source: ModelProvenance) -> str:
    """Returns the arguments that import the answers of a run again: its files, format and suite, and its exceptions."""
    outcome = source.manifest.get("import")
    outcome = outcome if isinstance(outcome, dict) else {}
    files = outcome.get("files")
    arguments = [
        _quote(f"{entry['split']}={entry['file']}" if entry.get("split") else str(entry.get("file", "–")))
        for entry in (files if isinstance(files, list) else [])
        if isinstance(entry, dict)
    ]
    exceptions = {"--allow-missing": "missing", "--allow-unmatched": "unmatched"}
    return " ".join(
        [
            *arguments,
            f"--format {_quote(str(_imported(source.manifest).get('format', '–')))}",
            f"--suite {_quote(EvaluationRun(source.run).suite_file)}",
            *(option for option, count in exceptions.items() if outcome.get(count)),
            *(["--by-position"] if _imported(source.manifest).get("by_position") else []),
        ]
    )


def _folder_names(models: Iterable[str]) -> dict[str, str]:
    """Returns a unique folder name for each model, also on file systems that ignore case."""
    names: dict[str, str] = {}
    for model in models:
        plain = re.sub(r"[^A-Za-z0-9._+-]", "_", model)[-60:].lstrip(".-") or "model"
        used = {name.lower() for name in names.values()}
        candidates = (plain, *(f"{plain}-{i}" for i in range(2, len(names) + 3)))
        names[model] = next(name for name in candidates if name.lower() not in used)
    return names


def _quote(path: Path | str) -> str:
    return shlex.quote(str(path))


def list_digests(sources: Mapping[str, ModelProvenance]) -> list[tuple[str, str, str, str]]:
    """Returns for each model its name and the digests of its weights, its prompts and its training data."""
    digests = []
    for source in sources.values():
        identity = source.manifest.get("identity", {})
        data = source.training_manifest.get("identity", {}).get("data")
        files = [f"{name} {str(value)[:12]}" for name, value in data.items()] if isinstance(data, dict) else ["–"]
        model, prompts = (str(identity.get(key, "–")) for key in ("model", "prompts"))
        if source.imported_files:
            model = f"unknown: imported from {', '.join(source.imported_files)}"
        digests.append((source.model, model, prompts, ", ".join(files)))
    return digests


def package_versions(sources: Mapping[str, ModelProvenance]) -> str:
    """Returns ``"torch 2.13.0, transformers 5.23.0"``, with every version if the runs differ."""
    packages: dict[str, dict[str, None]] = {}
    for source in sources.values():
        for manifest in (source.manifest, source.training_manifest):
            versions = manifest.get("versions")
            for package, version in versions.items() if isinstance(versions, dict) else ():
                packages.setdefault(str(package), {})[str(version)] = None
    return ", ".join(f"{package} {' and '.join(versions)}" for package, versions in packages.items())


def training_time(training: Path) -> str:
    """Returns the wall time of a training run, such as ``"5.1 s"``, or a dash if there is no manifest."""
    manifest = run_manifest(training)
    return _seconds(manifest) if manifest else "–"
