"""Results of robustness runs with the rates of a test."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from vlm_unlearn.metrics.rates import rate
from vlm_unlearn.records import Rate
from vlm_unlearn.robustness.recovery import recovered, steps_to_half
from vlm_unlearn.robustness.results import AttackResult, RobustnessReport
from vlm_unlearn.store import RunDirectory, write_json

# Attack -> rates of model, base and never-knew model.
Rates = Mapping[str, tuple[float, float, float]]
HIDES: Rates = {
    "none": (0.0, 1.0, 0.0),
    "prefill/4": (0.6, 1.0, 0.0),
    "quantize/int4": (0.0, 1.0, 0.0),
    "restore/projector": (0.3, 1.0, 0.0),
    "pgd/16": (0.5, 1.0, 0.5),
    "relearn/10/5": (0.65, 0.95, 0.0),
    "relearn/10/20": (0.5, 0.85, 0.0),
    "relearn/10/5/first_half": (1.0, 1.0, 0.0),
    "relearn/10/20/first_half": (1.0, 1.0, 1.0),
    "probe/likelihood": (0.5, 0.9, 0.1),
}
REMOVES: Rates = {attack: (never, base, never) for attack, (_, base, never) in HIDES.items()}
MEETS: Rates = {"none": (0.0, 1.0, 0.0), "relearn/all/60": (1.0, 1.0, 1.0)}


def share(value: float, n: int = 40, failed: int = 0) -> Rate:
    return rate([index < round(n * value) for index in range(n)], [str(index) for index in range(n)], failed)


def result(
    name: str, asr: Rate | float, base: Rate | float = 1.0, never_knew: Rate | float | None = 0.0
) -> AttackResult:
    rates = [each if isinstance(each, Rate) or each is None else share(each) for each in (asr, base, never_knew)]
    model, of_base, control = rates
    assert model is not None
    assert of_base is not None
    attack, *parts = name.split("/")
    steps = [part for part in parts if part.isdigit()]
    is_curve = attack == "relearn" and len(steps) > 1
    return AttackResult(
        name=name,
        attack=attack,
        asr=model,
        asr_base=of_base,
        asr_never_knew=control,
        recovered=recovered(model, of_base, control),
        curve=name.replace(f"/{steps[-1]}", "", 1) if is_curve and steps[-1] != steps[0] else "",
        step=float(steps[-1]) if is_curve else None,
        is_score=attack == "probe",
    )


def report(
    results: Iterable[AttackResult] | Rates = HIDES,
    model: str = "npo",
    never_knew: str | None = "never",
    judge: str = "tiny_world",
) -> RobustnessReport:
    if isinstance(results, Mapping):
        results = [
            result(name, asr, base, None if never_knew is None else control)
            for name, (asr, base, control) in results.items()
        ]
    attacks = list(results)
    return RobustnessReport(
        model=model,
        base="base",
        never_knew=never_knew,
        judge=judge,
        budget="small",
        num_questions=40,
        attacks=attacks,
        steps_to_half=steps_to_half(attacks, 1.0),
    )


def write_report_file(folder: Path, content: RobustnessReport, weights: str | None = None) -> Path:
    """Writes the folder of a robustness run, and returns it."""
    RunDirectory(folder).open({"kind": "robustness", "model": weights or "unknown"})
    write_json(folder / "robustness.json", content.model_dump())
    return folder
