"""``vlm-unlearn demo``: both papers in miniature on the tiny world."""

from __future__ import annotations

import time
from pathlib import Path

import typer

from vlm_unlearn.cli.common import (
    JSON_OPTION,
    RatesTable,
    Stages,
    print_assessments,
    print_json,
    quiet_libraries,
    result_console,
    status_console,
)

# What the processes of a demo import.
WORKER_MODULES = ("vlm_unlearn.worlds.tiny.demo", "vlm_unlearn.reporting.charts.matplotlib_charts", "matplotlib.figure")


def demo(
    out: Path = typer.Option(..., "--out", help="Folder for the tiny world, runs, summary.json and report.html."),
    seed: int = typer.Option(
        0, "--seed", min=0, max=2**32 - 1, help="Seed of the tiny world, the base model and every run."
    ),
    full: bool = typer.Option(
        False, "--full", help="Run every method, with and without prompt decoupling, and the baselines."
    ),
    processes: int = typer.Option(
        None,
        "--processes",
        min=1,
        show_default=False,
        help="Number of models that are trained or attacked at the same time, 1 GB of memory and one core each. By "
        "default the number of cores, at most 4, and 1 with a GPU.",
    ),
    as_json: bool = JSON_OPTION,
) -> None:
    """Reproduces both papers in miniature on a CPU: a table in the terminal, summary.json and report.html.

    It draws a tiny world in the formats of VLGuard and SafeEraser, trains a tiny LLaVA on it, unlearns with several
    methods, attacks the models and grades their answers. Run again after an interruption, it resumes.

    Example:

      vlm-unlearn demo --out demo
    """
    from vlm_unlearn.store import SUMMARY, RunDirectory, peak_memory_mb, write_json
    from vlm_unlearn.worker_pool import default_processes, prepare_processes

    started = time.monotonic()
    if RunDirectory(out).is_finished:
        processes = 1  # there is nothing to compute
    if (processes or default_processes()) > 1:
        prepare_processes(WORKER_MODULES)
    notes = status_console()
    with notes.status("loading transformers"):
        from vlm_unlearn.modeling.loader import default_device
        from vlm_unlearn.reporting.provenance import training_time
        from vlm_unlearn.reporting.report import write_report
        from vlm_unlearn.reporting.robustness.assessment import assess_with_attacks
        from vlm_unlearn.reporting.robustness.files import find_robustness
        from vlm_unlearn.worlds.tiny.base_model import BaseConfig, base_model
        from vlm_unlearn.worlds.tiny.demo import run_demo_tasks, training_folder
        from vlm_unlearn.worlds.tiny.findings import demo_findings

        quiet_libraries()
    if processes is None:
        processes = default_processes() if default_device().type == "cpu" else 1
    with Stages() as stages:
        stages.wait("drawing the world")
        summary, results = run_demo_tasks(out, seed, stages.update, full, processes)
        runs = {row.model: out / "evaluations" / row.model for row in summary.rows}
        training = {
            row.model: training_folder(out, row.model)
            for row in summary.rows
            if training_folder(out, row.model).is_dir()
        }
        title = f"vlm-unlearn demo{' --full' if full else ''}, seed {seed}"
        findings = demo_findings(summary.rows)
        attacks = find_robustness(runs)
        summary = assess_with_attacks(summary, attacks.by_model, {})
        report = write_report(out, summary, runs, title, training, (), stages.update, findings, attacks, processes)
        if attacks.by_model:  # run_demo wrote the assessments without them
            write_json(out / SUMMARY, summary.model_dump())
    seconds = time.monotonic() - started
    RunDirectory(out).record_cost(seconds, finished=True)
    if as_json:
        print_json(summary.model_dump())
        return
    console = result_console()
    console.print(RatesTable(summary, {model: training_time(run) for model, run in training.items()}))
    print_assessments(console, summary.rows)
    for finding in findings:
        console.print(finding, markup=False, highlight=False)
    base = base_model(BaseConfig(seed=seed))
    console.print(
        f"\nModels: base in {base}, the others in {out / 'runs'}/*/model.",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    workers = results.peak_memory_mb
    memory = f"peak memory {peak_memory_mb() + sum(workers.values())} MB"
    if workers:
        memory += f" in {len(workers) + 1} processes"
    console.print(
        f"{seconds:.0f} s, {memory}. Report: {report}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
