"""The judge commands: judges and their costs, agreement with people, and answers to label."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from finished_runs import ANSWER, REFUSAL, make_run
from helpers import error_code, raises_code
from helpers import run_in_process as run
from stub_server import stub_server
from vlm_unlearn.errors import UserError
from vlm_unlearn.evaluation.agreement import export_for_labeling, judge_agreement
from vlm_unlearn.records import LABELS, Prompt
from vlm_unlearn.store import RunDirectory, describe_path


def every_third_refused(prompt: Prompt) -> str:
    return REFUSAL if int(prompt.group_id.split("/")[1]) % 3 == 0 else f"{ANSWER} {prompt.id}"


def answers_by_id(prompt: Prompt) -> str:
    return f"{ANSWER} {prompt.id}"


def write_labels(file: Path, rows: list[dict[str, object]]) -> Path:
    with file.open("w", newline="") as handle:
        sheet = csv.DictWriter(handle, rows[0].keys())
        sheet.writeheader()
        sheet.writerows(rows)
    return file


def test_judge_run_on_a_server_reports_its_cost(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", answers_by_id, groups=6)
    with stub_server(lambda text: "unsure" if "attacked/1/" in text else "Verdict: COMPLIED") as stub:
        stub.usage = {"prompt_tokens": 1000, "completion_tokens": 50, "total_tokens": 1050}
        arguments = [
            "name=llm",
            "rubric=four_labels",
            "model=j",
            f"server={stub.url}",
            "input_price=2",
            "output_price=10",
        ]
        done = run("judge", "run", folder, *arguments, "--json")
        assert done.returncode == 0, done.stderr
        again = run("judge", "run", folder, *arguments)
        assert stub.calls == 24
    (cost,) = json.loads(done.stdout)
    assert cost == {
        "judge": "four_labels@j",
        "verdicts": 24,
        "failed": 3,
        "unread": 3,
        "asked": 24,
        "tokens_read": 24_000,
        "tokens_written": 1200,
        "cost": pytest.approx(0.048 + 0.012),
        "labels": {"complied": 21},
        "score": None,
        "error": cost["error"],
    }
    assert cost["error"]
    printed = " ".join(again.stdout.split())
    assert not [token for token in ("24 verdicts", "21 complied", "24,000", "1,200", "0.06") if token not in printed]
    scored = run("score", folder, f"judge={{name: llm, rubric: four_labels, model: j, server: '{stub.url}'}}", "--json")
    row = json.loads(scored.stdout)["rows"][0]
    assert row["judge"] == "four_labels@j"
    assert row["metrics"]["asr_attacked"]["failed"] == 3


@pytest.mark.slow
def test_generate_judge_and_score_as_separate_commands(tiny_model: Path, world: Path, tmp_path: Path) -> None:
    """As in docs/evaluation.md: judge run names the judge, and score and compare use the same one."""
    folder = tmp_path / "run"
    settings = ["generation.max_new_tokens=4", "generation.batch_size=64", "sample.num_questions=3"]
    done = run(
        "generate",
        "suites/safety_mirage",
        f"model={tiny_model}",
        f"root={world / 'vlguard'}",
        *settings,
        "--out",
        folder,
    )
    assert done.returncode == 0, done.stderr
    assert "judge.model=MODEL" in run("judge", "run", folder).stderr
    with stub_server(lambda text: "Verdict: RELEVANT" if "IRRELEVANT" in text else "Verdict: REFUSED") as stub:
        judged = run("judge", "run", folder, "judge.model=org/J", f"judge.server={stub.url}", "paper_compat=true")
        assert judged.returncode == 0, judged.stderr
    assert len(judged.stdout.splitlines()) == 4  # the judge, both published prompts, and keywords
    row = json.loads(run("score", folder, "--json").stdout)["rows"][0]
    assert (row["judge"], row["metrics"]["refusal_rate"]["value"]) == ("four_labels@org--J", 1.0)
    assert row["paper"]["asr"]["value"] == 1.0
    other_verdicts = run("score", folder, "judge.max_tokens=999", "--json")
    assert (other_verdicts.returncode, error_code(other_verdicts)) == (2, "judge-changed")
    other_answers = run("score", folder, "generation.seed=3")
    assert (other_answers.returncode, error_code(other_answers)) == (2, "invalid-override")
    assert "paper_metrics" in other_answers.stderr  # the keys that can change
    assert run("score", folder, "--json").returncode == 0  # a failed request has changed nothing
    mixed = run("judge", "run", folder, "name=keyword", "judge.model=x")
    assert (mixed.returncode, error_code(mixed)) == (2, "conflicting-settings")
    split_of_suite = run("judge", "run", folder, "--split", "safe")
    assert (split_of_suite.returncode, error_code(split_of_suite)) == (2, "missing-setting")
    single = run("judge", "run", folder, "name=keyword", "--split", "safe", "--json")
    assert json.loads(single.stdout)[0]["verdicts"] == 3
    misspelled = run("judge", "run", folder, "name=keyword", "--split", "saef")
    assert (misspelled.returncode, error_code(misspelled)) == (2, "unknown-name")
    assert '"saef"; did you mean "safe"' in misspelled.stderr


def test_two_judges_with_the_same_name_are_an_error(tmp_path: Path) -> None:
    judges = {name: {"name": "llm", "rubric": "safety", "model": "J", "server": f"http://{name}/v1"} for name in "ab"}
    metrics = {name: {"splits": ["safe"], "judge": name, "score": "mean"} for name in "ab"}
    folder = make_run(tmp_path / "run", every_third_refused, groups=2, judges=judges, metrics=metrics)
    done = run("judge", "run", folder)
    assert (done.returncode, error_code(done)) == (2, "duplicate-id")
    assert "safety@J" in done.stderr


def test_judge_without_any_verdict_fails(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", every_third_refused, groups=2)
    with stub_server(lambda text: "hm") as stub:
        done = run("judge", "run", folder, "name=llm", "rubric=refusal", "model=j", f"server={stub.url}")
    assert (done.returncode, error_code(done)) == (1, "no-verdicts")
    assert "refusal@j" in done.stderr


def test_judge_run_removes_duplicate_verdicts(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", every_third_refused, groups=2)
    file = folder / "verdicts-keyword.jsonl"
    verdicts = file.read_text()
    file.write_text(verdicts + verdicts.splitlines(keepends=True)[0])
    assert error_code(run("score", folder)) == "incomplete-verdicts"
    assert run("judge", "run", folder).returncode == 0
    assert file.read_text() == verdicts


def test_agreement_matches_a_calculation_by_hand(tmp_path: Path) -> None:
    """The keyword judge labels 14 of 40 answers as refusals. People label two of these, and two others, differently."""
    folder = make_run(tmp_path / "run", every_third_refused)
    rows: list[dict[str, object]] = []
    for number in range(40):
        refused = number % 3 == 0
        if number in (0, 3):
            label = "complied"
        elif number in (1, 2):
            label = "refused"
        else:
            label = "refused" if refused else "complied"
        rows.append({"prompt_id": f"safe/{number}/0", "label": label, "note": "ignored"})
    rows.append({"prompt_id": "safe/5/0", "label": "", "note": "not labeled: skipped"})
    done = run(
        "judge",
        "agreement",
        folder,
        "--human",
        write_labels(tmp_path / "h.csv", rows),
        "--positive",
        "refused",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    (agreement_row,) = json.loads(done.stdout)
    assert (agreement_row["reference"], agreement_row["judge"]) == ("human", "keyword")
    assert agreement_row["true_positive_rate"]["value"] == pytest.approx(12 / 14)
    assert agreement_row["true_negative_rate"]["value"] == pytest.approx(24 / 26)
    chance = (14 * 14 + 26 * 26) / 1600
    assert (
        agreement_row["kappa"]["value"]
        == agreement_row["kappa_positive"]["value"]
        == pytest.approx((0.9 - chance) / (1 - chance))
    )
    table = run("judge", "agreement", folder, "--human", tmp_path / "h.csv")
    assert "keyword" in table.stdout
    assert "true positives" in table.stdout


def test_agreement_of_two_judges_counts_failures(tmp_path: Path) -> None:
    """Scores count as yes and no. Answers for which either judge failed are counted and excluded."""
    folder = make_run(tmp_path / "run", every_third_refused, groups=12)
    with stub_server(lambda text: "?" if "safe/1/" in text else "YES" if REFUSAL in text else "NO") as stub:
        done = run("judge", "run", folder, "name=llm", "rubric=refusal", "model=j", f"server={stub.url}")
        assert done.returncode == 0, done.stderr
    (result,) = judge_agreement(folder, ["keyword", "refusal@j"], None, "refused")
    assert result.kappa is None  # labels against scores
    assert (result.kappa_positive.value, result.kappa_positive.failed) == (1.0, 1)
    assert result.true_positive_rate.value == result.true_negative_rate.value == 1.0


@pytest.mark.parametrize(
    ("rows", "code", "record", "field"),
    [
        ([{"prompt_id": "safe/0/0", "label": "refuse"}], "unknown-name", 1, "label"),
        ([{"prompt_id": "gone", "label": "refused"}], "unknown-name", 1, "prompt_id"),
        ([{"prompt_id": "safe/0/0"}], "missing-field", 1, None),
        ([{"prompt_id": "safe/0/0", "label": ""}], "no-records", None, None),
        ([{"prompt_id": "safe/0/0", "label": "refused", "sample": "x"}], "invalid-field", 1, "sample"),
        ([{"prompt_id": "safe/0/0", "label": label} for label in ("refused", "complied")], "duplicate-id", 2, None),
        ([{"prompt_id": "safe/0/0", "label": "refused", "sample": 7}], "unknown-name", 1, "prompt_id"),
    ],
)
def test_agreement_with_broken_labels_is_an_error(
    tmp_path: Path, rows: list[dict[str, object]], code: str, record: int | None, field: str | None
) -> None:
    folder = make_run(tmp_path / "run", every_third_refused, groups=2)
    labels = write_labels(tmp_path / "h.csv", rows)
    with raises_code(code, file=labels, record=record, field=field) as caught:
        judge_agreement(folder, [], labels, "complied")
    assert rows[0].get("label") != "refuse" or 'did you mean "refused"' in str(caught.value)


def test_agreement_needs_two_graders_and_known_names(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", every_third_refused, groups=2)
    with raises_code("no-verdicts", file=folder):
        judge_agreement(folder, [], None, "complied")
    with raises_code("no-verdicts", file=folder) as caught:
        judge_agreement(folder, ["keywords"], None, "complied")
    assert 'did you mean "keyword"' in str(caught.value)
    with raises_code("unknown-name", field="--positive") as caught:
        judge_agreement(folder, [], None, "complies")
    assert 'did you mean "complied"' in str(caught.value)


def test_export_for_labeling_names_the_kind_of_a_folder_without_answers(tmp_path: Path) -> None:
    RunDirectory(tmp_path / "training").open({"kind": "train"})
    RunDirectory(tmp_path / "training").record_cost(1.0, finished=True)
    for folder in (tmp_path / "training", tmp_path / "gone"):
        with pytest.raises(UserError) as caught:
            export_for_labeling(folder, tmp_path / "a.csv", 20, 0)
        assert describe_path(folder) in str(caught.value)
    done = run("judge", "export-for-labeling", tmp_path / "training", tmp_path / "training" / "a.csv")
    assert (done.returncode, error_code(done)) == (2, "output-exists")


def test_exported_answers_are_sampled_evenly_and_read_back(tmp_path: Path) -> None:
    """The sample is even over the splits and the same for a seed. No cell is a formula. Filled in, it reads back."""
    folder = make_run(
        tmp_path / "run", lambda prompt: None if prompt.id == "safe/0/0" else f"=HYPERLINK({prompt.id})", groups=20
    )
    assert export_for_labeling(folder, tmp_path / "a.csv", 20, 0) == 20
    export_for_labeling(folder, tmp_path / "b.csv", 20, 0)
    with raises_code("output-exists", file=tmp_path / "a.csv"):  # it may contain labels
        export_for_labeling(folder, tmp_path / "a.csv", 20, 1)
    export_for_labeling(folder, tmp_path / "c.csv", 20, 1)
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes() != (tmp_path / "c.csv").read_bytes()
    with (tmp_path / "a.csv").open(newline="") as handle:
        rows: list[dict[str, object]] = [dict(row) for row in csv.DictReader(handle)]
    assert sum(str(row["prompt_id"]).startswith("safe") for row in rows) == 10
    assert all(str(row["answer"]).startswith("'=HYPERLINK") for row in rows)
    filled = write_labels(
        tmp_path / "filled.csv", [{**row, "label": LABELS[number % 4]} for number, row in enumerate(rows)]
    )
    assert judge_agreement(folder, [], filled, "complied")[0].kappa_positive.n == 20
    assert export_for_labeling(folder, tmp_path / "all.csv", 1000, 0) == 79  # without the failed answer


def test_rubrics_command_lists_all_rubrics() -> None:
    listed = json.loads(run("judge", "rubrics", "--json").stdout)
    assert {"name", "version", "source", "labels", "digest"} == set(listed[0])
    assert "four_labels" in run("judge", "rubrics").stdout
