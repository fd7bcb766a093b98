"""The benchmark of attacks pools seeds by the strongest variant, and prints the headings of the docs."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from vlm_unlearn.reporting.charts.chart import Lines
from vlm_unlearn.robustness.results import REPORT_FILE
from vlm_unlearn.store import RunDirectory

ROOT = Path(__file__).parents[2]
Variants = Mapping[str, Sequence[bool]]  # name of a variant -> whether each question gets a harmful answer


@pytest.fixture
def robustness(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("robustness")
    # The base and the never-knew model of these results are names, which are in place of digests.
    monkeypatch.setattr(module, "run_model_folder", str)
    monkeypatch.setattr(module, "run_digest", str)
    module.states.cache_clear()
    yield module
    module.states.cache_clear()


def write_results(seed: Path, row: str, measured: Mapping[str, Variants]) -> Path:
    """Writes the results of a row: the answers of each model, with two questions about each thing."""
    folder = seed / "robustness" / row
    RunDirectory(folder).open({"kind": "robustness", "model": "unlearned"})
    (folder / REPORT_FILE).write_text(json.dumps({"base": "base", "never_knew": "never"}))
    (folder / "measurements").mkdir()
    for model, variants in measured.items():
        states = [
            {"name": name, "answers": [answer(number, hit) for number, hit in enumerate(hits)]}
            for name, hits in variants.items()
        ]
        file = folder / "measurements" / f"{model}.json"
        file.write_text(json.dumps({"identity": {"model": model}, "states": states}))
    return folder


def answer(number: int, complied: bool) -> dict[str, object]:
    group = f"{number}:val/Weapon/thing{number // 2}_0.png/{number % 2}"
    return {
        "prompt_id": f"unsafe/{group}/0",
        "group_id": group,
        "sample": 0,
        "text": "mix it .",
        "label": "complied" if complied else "refused",
        "score": float(complied),
    }


YES, NO = True, False
ANSWERS: Variants = {
    "prefill/1-words": [YES, NO, NO, NO],
    "prefill/4-words": [NO, YES, YES, NO],
    "relearn/10/5": [NO, NO, NO, NO],
    "relearn/10/5/first_half": [YES, YES, YES, YES],
    "relearn/10/20": [YES, NO, NO, NO],
    "relearn/10/60": [YES, YES, NO, NO],
}
NOTHING: Variants = {name: [NO] * 4 for name in ANSWERS}
EVERYTHING: Variants = {name: [YES] * 4 for name in ANSWERS}
MODELS = {"unlearned": ANSWERS, "base": EVERYTHING, "never": NOTHING}


def test_a_cell_has_the_strongest_variant_and_not_all_together(tmp_path: Path, robustness: Any) -> None:
    folders = [write_results(tmp_path / "seed0", "po", MODELS)]
    rate = robustness.pooled(folders, "model", ("prefill/",))
    assert (rate.value, rate.n) == (0.5, 4)  # 0.75 of the questions are opened by one variant or the other


def test_the_strongest_variant_is_that_of_all_seeds_together(tmp_path: Path, robustness: Any) -> None:
    """The maxima of each seed would give (1 + 3) / 8."""
    first = {"unlearned": {"prefill/1-words": [YES, NO, NO, NO], "prefill/4-words": [NO] * 4}}
    second = {"unlearned": {"prefill/1-words": [NO] * 4, "prefill/4-words": [YES, YES, YES, NO]}}
    folders = [
        write_results(tmp_path / "seed0", "po", first),
        write_results(tmp_path / "seed1", "po", second),
    ]
    rate = robustness.pooled(folders, "model", ("prefill/",))
    assert (rate.value, rate.n) == (3 / 8, 8)


def test_clusters_are_the_things_of_each_seed(tmp_path: Path, robustness: Any) -> None:
    """Nothing in two seeds with two things each: the bound is that of four clusters, and not of eight questions."""
    folders = [write_results(tmp_path / f"seed{seed}", "po", MODELS) for seed in (0, 1)]
    rate = robustness.pooled(folders, "never_knew", ("relearn/10/5",))
    assert (rate.value, rate.n) == (0, 8)
    assert rate.high == pytest.approx(1 - 0.05 ** (1 / 4), abs=0.02)


def test_taught_answers_have_columns_of_their_own(tmp_path: Path, robustness: Any) -> None:
    folders = [write_results(tmp_path / "seed0", "po", MODELS)]
    columns = robustness.COLUMNS
    assert robustness.pooled(folders, "model", columns["5 steps"]).value == 0
    assert robustness.pooled(folders, "model", columns["taught, 5 steps"]).value == 1
    assert robustness.pooled(folders, "model", columns["sampling"]) is None


def test_tables_have_the_headings_of_the_docs(tmp_path: Path, robustness: Any) -> None:
    names = [robustness.heading_of(name) for name, _, _ in robustness.rows("methods")]
    docs = (ROOT / "docs" / "robustness.md").read_text()
    assert [name for name in names if f"\n| {name} |" not in docs] == []
    assert len(set(names)) == len(names)


def test_table_has_rows_that_all_seeds_have(tmp_path: Path, robustness: Any) -> None:
    names = [robustness.file_name(name) for name, _, _ in robustness.rows("methods")]
    folders = [tmp_path / "seed0", tmp_path / "seed1"]
    for folder in folders:
        write_results(folder, names[0], MODELS)
    write_results(folders[0], names[1], MODELS)
    lines = robustness.attack_table(folders, "methods", ["5 steps", "60 steps"]).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["`base`", "`mixed_sft`", "never knew"]
    assert [cell.split()[0] for cell in lines[3].split("|")[2:4]] == ["0", "50"]


def test_chart_has_a_line_for_each_model(tmp_path: Path, robustness: Any) -> None:
    for row in ("po_pd", "npo", "npo_refusal_pd"):
        write_results(tmp_path / "seed0", row, MODELS)
    chart = robustness.relearning_chart([tmp_path / "seed0"])
    assert isinstance(chart, Lines)
    values = {line.name: list(line.values) for line in chart.series}
    assert values["base"] == [100, 100, 100]
    assert values["never knew"] == [0, 0, 0]
    assert values["npo"] == [0, 25, 50]
    assert [line.name for line in chart.series if line.is_reference] == ["base", "never knew"]
    robustness.draw(chart, tmp_path / "relearning.png")
    assert (tmp_path / "relearning.png").read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.glob("*.png")] == ["relearning.png"]
