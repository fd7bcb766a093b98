"""``vlm-unlearn demo``."""

from __future__ import annotations

import time
from pathlib import Path

import typer

from vlm_unlearn.cli.common import (
    JSON_OPTION,
    RatesTable,
    Stages,
    print_json,
    print_verdicts,
    quiet_libraries,
    result_console,
    status_console,
)


def demo(
    out: Path = typer.Option(..., "--out", help="Folder for the world, runs, summary.json and report.html."),
    seed: int = typer.Option(
        0, "--seed", min=0, max=2**32 - 1, help="Seed of the world, the base model and every run."
    ),
    full: bool = typer.Option(
        False, "--full", help="Every method, with and without prompt decoupling, and the baselines."
    ),
    as_json: bool = JSON_OPTION,
) -> None:
    """Both papers in miniature, on a CPU: a table in the terminal, summary.json and report.html.

    Draws a tiny world in VLGuard's and SafeEraser's formats, trains a tiny LLaVA on it, unlearns with every method, attacks
    and grades. Run again after an interruption it goes on where it stopped.

    Example:

      vlm-unlearn demo --out demo
    """
    started = time.monotonic()
    notes = status_console()
    with notes.status("loading transformers"):
        from vlm_unlearn.reporting.charts.curves import write_loss_png
        from vlm_unlearn.reporting.demo_findings import demo_findings
        from vlm_unlearn.reporting.provenance import training_time
        from vlm_unlearn.reporting.report import write_report
        from vlm_unlearn.store import peak_memory_mb, record_cost
        from vlm_unlearn.tiny_world.base_model import BaseConfig, base_model
        from vlm_unlearn.tiny_world.demo import run_demo, training_folder

        quiet_libraries()
    with Stages() as bars:
        bars.wait("drawing the world")
        summary = run_demo(out, seed, bars.update, full)
        runs = {row.model: out / "evaluations" / row.model for row in summary.rows}
        training = {
            row.model: training_folder(out, row.model)
            for row in summary.rows
            if training_folder(out, row.model).is_dir()
        }
        for run in training.values():
            write_loss_png(run)
        title = f"vlm-unlearn demo{' --full' if full else ''}, seed {seed}"
        report = write_report(out, summary, runs, title, training, on_done=bars.update)
    seconds = time.monotonic() - started
    record_cost(out, seconds, finished=True)
    if as_json:
        print_json(summary.model_dump())
        return
    console = result_console()
    console.print(RatesTable(summary, {model: training_time(run) for model, run in training.items()}))
    print_verdicts(console, summary.rows, runs)
    for sentence in demo_findings(summary.rows):
        console.print(sentence, markup=False, highlight=False)
    base = base_model(BaseConfig(seed=seed))
    console.print(
        f"\nModels: base in {base}, the others in {out / 'runs'}/*/model.",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    console.print(
        f"{seconds:.0f} s, peak memory {peak_memory_mb()} MB. Report: {report}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
