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
from vlm_unlearn.store import EvaluationRun, RunDirectory, digest_model, user_path

WEIGHTS_DIGEST = re.compile(r"[0-9a-f]{64}(\+[0-9a-f]{64})?")  # of an adapter: the base's digest + the adapter's


@dataclass(frozen=True)
class ModelProvenance:
    """The runs that one model's row was made from.

    Args:
        model: The model's name in the report.
        run: The evaluation's folder.
        suite: The evaluation's suite.
        manifest: The evaluation's manifest, or an empty mapping if there is none.
        questions: The number of prompts.
        training: The folder of the training run, if it was found.
        training_manifest: The training run's manifest, or an empty mapping if there is none.
    """

    model: str
    run: Path
    suite: Suite
    manifest: Mapping[str, Any]
    questions: int
    training: Path | None = None
    training_manifest: Mapping[str, Any] = field(default_factory=dict)


def read_provenance(runs: Mapping[str, Path], training: Mapping[str, Path]) -> dict[str, ModelProvenance]:
    """Reads the provenance of each model.

    Args:
        runs: The evaluation folder of each model.
        training: The training run of a model. For other models it is the run that the suite's `model` belongs to.
    """
    provenance = {}
    for model, run in runs.items():
        suite = saved_suite(run)
        training_folder = training.get(model) or training_run(suite.model, run)
        training_manifest = _manifest(training_folder) if training_folder is not None else {}
        provenance[model] = ModelProvenance(
            model,
            run,
            suite,
            _manifest(run),
            _count_lines(EvaluationRun(run).prompts_file),
            training_folder if training_manifest else None,
            training_manifest,
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
    evaluated = _manifest(run).get("identity", {}).get("model")
    folder = user_path(model)
    named = folder.parent if folder.name == "model" else folder
    moved = (
        [parent / "runs" / named.name for parent in run.resolve().parents[:3]] if named.parent.name == "runs" else []
    )
    for candidate in (folder, named, *moved):
        identity = _manifest(candidate).get("identity", {})
        if identity.get("kind") != "train":
            continue
        if same_weights(evaluated, trained_digest(candidate, identity.get("model"))) is not False:
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
    digest = digest_model(weights)
    return f"{base_digest}+{digest}" if (weights / "adapter_config.json").is_file() else digest


def _manifest(path: Path) -> dict[str, Any]:
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
    """Describes the evaluation in sentences: models, questions, files, judges, decoding and training seeds.

    Args:
        rows: The rows of the summary.
        sources: The provenance of each model.

    Returns:
        Two paragraphs: the first about models and questions, the second about judges, decoding and seeds.
    """
    provenances = list(sources.values())
    suites = [source.suite for source in provenances]
    counts = sorted({source.questions for source in provenances})
    questions = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}" if counts else "no"
    splits = list(dict.fromkeys(split.name for suite in suites for split in suite.splits))
    benchmarks = list(dict.fromkeys(benchmark.name for suite in suites for benchmark in suite.benchmarks))
    paths = [split.file for suite in suites for split in suite.splits]
    paths += [path for suite in suites for benchmark in suite.benchmarks for path in benchmark.annotations]
    files = list(dict.fromkeys(path.name for path in paths))
    models = f"{len(rows)} models" if len(rows) > 1 else rows[0].model if rows else "No model"
    subject = f"{models} answered {questions} questions{' each' if len(rows) > 1 else ''}"
    if splits:
        titles = ", ".join(map(split_title, splits[:3])) + (", …" if len(splits) > 3 else "")
        subject += f" in {_plural(len(splits), 'split')} ({titles})"
    if benchmarks:
        subject += f"{' and' if splits else ''} of {_plural(len(benchmarks), 'benchmark')}"
    subject += f", from {', '.join(files[:4])}{', …' if len(files) > 4 else ''}." if files else "."
    judges = judges_of(rows)
    details = [f"Judged by {', '.join(judges)}." if judges else "Without a judge."]
    decoding = sorted({_decoding(suite) for suite in suites})
    if decoding:
        details.append(f"Decoded {' or '.join(decoding)}.")
    seeds = sorted({seed for source in provenances if (seed := training_seed(source)) is not None})
    if seeds:
        details.append(f"Training seed{'' if len(seeds) == 1 else 's'} {', '.join(map(str, seeds))}.")
    return [subject, " ".join(details)]


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _decoding(suite: Suite) -> str:
    generation = suite.generation
    if generation.temperature == 0:
        return "greedily"
    return f"at temperature {generation.temperature:g} (seed {generation.seed})"


def training_seed(source: ModelProvenance) -> int | None:
    """Returns the seed that a model was trained with, or None if it is unknown."""
    recipe = source.training_manifest.get("identity", {}).get("recipe")
    training = recipe.get("training") if isinstance(recipe, dict) else None
    seed = training.get("seed") if isinstance(training, dict) else None
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
        if source.manifest:
            values["generation"] = _seconds(source.manifest)
            values["generation's peak memory"] = _memory(source.manifest)
        judge_costs = suite_costs(EvaluationRun(source.run), source.suite)
        if any(cost.tokens_read for cost in judge_costs):
            values["judges' tokens read"] = f"{sum(cost.tokens_read for cost in judge_costs):,}"
            values["judges' tokens written"] = f"{sum(cost.tokens_written for cost in judge_costs):,}"
        if any(cost.cost is not None for cost in judge_costs):
            values["judges' cost"] = f"{sum(cost.cost or 0.0 for cost in judge_costs):,.2f}"
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
        override = ""
        if source.training is not None:
            if source.training not in outputs:
                outputs[source.training] = f"again/runs/{names[model]}"
                recipe = _quote(RunDirectory(source.training).recipe_file)
                commands.append(f"vlm-unlearn train {recipe} output={_quote(outputs[source.training])}")
            override = f" model={_quote(outputs[source.training])}"
        options = f"--out {_quote(f'again/evaluations/{names[model]}')} --name={_quote(model)}"
        commands.append(f"vlm-unlearn evaluate {_quote(EvaluationRun(source.run).suite_file)}{override} {options}")
    evaluations = " ".join(_quote(f"again/evaluations/{name}") for name in names.values())
    return [*commands, f"vlm-unlearn report {evaluations} --out again/report"]


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
        files = (
            ", ".join(f"{name} {str(value)[:12]}" for name, value in data.items()) if isinstance(data, dict) else "–"
        )
        digests.append((source.model, str(identity.get("model", "–")), str(identity.get("prompts", "–")), files))
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
    manifest = _manifest(training)
    return _seconds(manifest) if manifest else "–"
