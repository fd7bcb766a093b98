"""The judge commands: a judge beside the suite's, cost, agreement with people, sheets to label."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from finished_runs import ANSWER, REFUSAL, make_run
from helpers import error_code, raises_code, run
from stub_server import stub_server
from vlm_unlearn.errors import UserError
from vlm_unlearn.evaluation.agreement import export_for_labeling, judge_agreement
from vlm_unlearn.records import LABELS, Prompt
from vlm_unlearn.store import open_run, record_cost


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


def test_a_judge_on_a_server_with_its_cost(tmp_path: Path) -> None:
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
        "error": "the reply contains no verdict in the requested form",
    }
    assert "24 verdicts, 3 failed (3 unreadable replies) (21 complied)" in " ".join(again.stdout.split())
    assert "; 24,000 tokens read, 1,200 written, cost 0.06" in " ".join(again.stdout.split())
    scored = run("score", folder, f"judge={{name: llm, rubric: four_labels, model: j, server: '{stub.url}'}}", "--json")
    row = json.loads(scored.stdout)["rows"][0]
    assert row["judge"] == "four_labels@j"
    assert row["metrics"]["asr_attacked"]["failed"] == 3


def test_generate_judge_and_score_apart(tiny_model: Path, world: Path, tmp_path: Path) -> None:
    """As docs/evaluation.md has it: the judge is named when it judges, and score and compare go by it."""
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
    assert len(judged.stdout.splitlines()) == 3
    row = json.loads(run("score", folder, "--json").stdout)["rows"][0]
    assert (row["judge"], row["metrics"]["refusal_rate"]["value"]) == ("four_labels@org--J", 1.0)
    assert row["paper"]["asr"]["value"] == 1.0
    changed = run("score", folder, "judge.max_tokens=999", "--json")
    assert (changed.returncode, error_code(changed)) == (2, "judge-changed")
    refused = run("score", folder, "generation.seed=3")
    assert error_code(refused) == "invalid-override"
    assert "paper_metrics" in refused.stderr  # the keys that can change
    assert run("score", folder, "--json").returncode == 0  # a request that failed has changed nothing
    mixed = run("judge", "run", folder, "name=keyword", "judge.model=x")
    assert "not both" in mixed.stderr
    one = run("judge", "run", folder, "name=keyword", "--case", "safe", "--json")
    assert json.loads(one.stdout)[0]["verdicts"] == 3
    unknown = run("judge", "run", folder, "name=keyword", "--case", "saef")
    assert error_code(unknown) == "unknown-name"
    assert 'did you mean "safe"' in unknown.stderr


def test_two_judges_of_one_name_are_refused(tmp_path: Path) -> None:
    judges = {name: {"name": "llm", "rubric": "safety", "model": "J", "server": f"http://{name}/v1"} for name in "ab"}
    metrics = {name: {"splits": ["safe"], "judge": name, "score": "mean"} for name in "ab"}
    folder = make_run(tmp_path / "run", every_third_refused, groups=2, judges=judges, metrics=metrics)
    done = run("judge", "run", folder)
    assert (done.returncode, error_code(done)) == (2, "duplicate-id")
    assert "safety@J" in done.stderr


def test_a_judge_that_says_nothing_is_a_failure(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", every_third_refused, groups=2)
    with stub_server(lambda text: "hm") as stub:
        done = run("judge", "run", folder, "name=llm", "rubric=refusal", "model=j", f"server={stub.url}")
    assert done.returncode == 1
    assert error_code(done) == "no-verdicts"
    assert "refusal@j" in done.stderr


def test_doubled_verdicts_are_mended(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", every_third_refused, groups=2)
    file = folder / "verdicts-keyword.jsonl"
    whole = file.read_text()
    file.write_text(whole + whole.splitlines(keepends=True)[0])
    assert error_code(run("score", folder)) == "incomplete-verdicts"
    assert run("judge", "run", folder).returncode == 0
    assert file.read_text() == whole


def test_agreement_by_hand(tmp_path: Path) -> None:
    """The keyword judge finds 14 refusals of 40 safe answers; people call two of them, and two others, otherwise."""
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
        rows.append({"prompt_id": f"safe/{number}/0", "label": label, "note": "kept"})
    rows.append({"prompt_id": "safe/5/0", "label": "", "note": "not labelled: passed over"})
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
    (found,) = json.loads(done.stdout)
    assert (found["reference"], found["judge"]) == ("human", "keyword")
    assert found["true_positive_rate"]["value"] == pytest.approx(12 / 14)
    assert found["true_negative_rate"]["value"] == pytest.approx(24 / 26)
    chance = (14 * 14 + 26 * 26) / 1600
    assert found["kappa"]["value"] == found["kappa_positive"]["value"] == pytest.approx((0.9 - chance) / (1 - chance))
    table = run("judge", "agreement", folder, "--human", tmp_path / "h.csv")
    assert "keyword" in table.stdout
    assert "true positives" in table.stdout


def test_judges_against_each_other(tmp_path: Path) -> None:
    """One that gives scores only is read as yes and no; what failed in either is counted and left out."""
    folder = make_run(tmp_path / "run", every_third_refused, groups=12)
    with stub_server(lambda text: "?" if "safe/1/" in text else "YES" if REFUSAL in text else "NO") as stub:
        done = run("judge", "run", folder, "name=llm", "rubric=refusal", "model=j", f"server={stub.url}")
        assert done.returncode == 0, done.stderr
    (found,) = judge_agreement(folder, ["keyword", "refusal@j"], None, "refused")
    assert found.kappa is None  # labels against scores
    assert (found.kappa_positive.value, found.kappa_positive.failed) == (1.0, 1)
    assert found.true_positive_rate.value == found.true_negative_rate.value == 1.0


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
def test_broken_labels(
    tmp_path: Path, rows: list[dict[str, object]], code: str, record: int | None, field: str | None
) -> None:
    folder = make_run(tmp_path / "run", every_third_refused, groups=2)
    labels = write_labels(tmp_path / "h.csv", rows)
    with raises_code(code, file=labels, record=record, field=field) as caught:
        judge_agreement(folder, [], labels, "complied")
    assert rows[0].get("label") != "refuse" or 'did you mean "refused"' in str(caught.value)


def test_wrong_requests(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", every_third_refused, groups=2)
    with raises_code("no-verdicts", file=folder):
        judge_agreement(folder, [], None, "complied")
    with raises_code("no-verdicts", file=folder) as caught:
        judge_agreement(folder, ["keywords"], None, "complied")
    assert 'did you mean "keyword"' in str(caught.value)
    with raises_code("unknown-name", field="--positive") as caught:
        judge_agreement(folder, [], None, "complies")
    assert 'did you mean "complied"' in str(caught.value)


def test_what_holds_no_answers_is_told_by_what_it_is(tmp_path: Path) -> None:
    open_run(tmp_path / "training", {"kind": "train"})
    record_cost(tmp_path / "training", 1.0, finished=True)
    for folder, told in (
        (tmp_path / "training", "it is a training run"),
        (tmp_path / "gone", "there is nothing of that name"),
    ):
        with pytest.raises(UserError, match=told):
            export_for_labeling(folder, tmp_path / "a.csv", 20, 0)


def test_a_sheet_to_label(tmp_path: Path) -> None:
    """Drawn over the cases in equal shares, the same for a seed; nothing in it is a formula; it is read back once filled in."""
    folder = make_run(
        tmp_path / "run", lambda prompt: None if prompt.id == "safe/0/0" else f"=HYPERLINK({prompt.id})", groups=20
    )
    assert export_for_labeling(folder, tmp_path / "a.csv", 20, 0) == 20
    export_for_labeling(folder, tmp_path / "b.csv", 20, 0)
    with raises_code("output-exists", file=tmp_path / "a.csv"):
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
    assert (
        export_for_labeling(folder, tmp_path / "all.csv", 1000, 0) == 79
    )  # the answer that failed is nobody's to label


def test_rubrics_are_listed() -> None:
    listed = json.loads(run("judge", "rubrics", "--json").stdout)
    assert {"name", "version", "source", "labels", "digest"} == set(listed[0])
    assert "four_labels" in run("judge", "rubrics").stdout
