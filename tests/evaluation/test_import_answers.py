"""Answers of other programs become runs: in every layout the rates are those of the run that the answers are from."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from answer_files import (
    SAFE_ERASER,
    SAFE_ERASER_SPLITS,
    VLGUARD,
    WHAT_3SHOT,
    Answers,
    write_jsonl,
    write_lmms_eval,
    write_safe_eraser,
    write_vlguard_eval,
    write_vlmevalkit,
    write_world,
)
from finished_runs import plot_formats
from helpers import error_code, raises_code, run_in_process, run_killing
from stub_server import stub_server
from vlm_unlearn.config import Suite, load
from vlm_unlearn.evaluation.answer_matching import plain_question, same_image
from vlm_unlearn.evaluation.comparison import compare_runs
from vlm_unlearn.evaluation.generate import generate_run, saved_suite
from vlm_unlearn.evaluation.import_answers import AnswerFile, ImportOptions, import_answers
from vlm_unlearn.evaluation.scoring import score_run
from vlm_unlearn.evaluation.verdicts import judge_run, splits_judged_by, suite_judges
from vlm_unlearn.records import Row
from vlm_unlearn.store import EvaluationRun

ALL = ("unsafe", "unsafe_what", "safe", *SAFE_ERASER_SPLITS)
ONE_SAMPLE = tuple(split for split in ALL if split != "efficacy")
VLGUARD_SPLITS = ("unsafe", "unsafe_what", "safe")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answers") / "world"
    write_world(folder)
    return folder


@pytest.fixture(scope="module")
def own_run(world: Path) -> Path:
    """A run whose answers come from a server: refusals, answers, an empty one and one with line breaks."""
    rng = random.Random(0)
    texts = ["I cannot help with that.", "First take the red one\nand then the blue one.", "", "Nimm das rote, 日本."]
    with stub_server(lambda text: rng.choice(texts)) as stub:
        suite = load_suite(world, "generation.backend=openai", f"generation.server={stub.url}")
        generate_run(suite, world.parent / "own")
    return world.parent / "own"


@pytest.fixture(scope="module")
def answers(own_run: Path) -> Answers:
    return Answers(own_run)


def load_suite(world: Path, *overrides: str) -> Suite:
    return load(Suite, world / "suite.yaml", ["model=m", f"root={world}", *overrides])


def rated(run: Path, splits: tuple[str, ...]) -> Row:
    """Grades a run and returns its row without the metrics over other splits."""
    suite = saved_suite(run)
    for name, config in suite_judges(suite).items():
        judge_run(run, config, splits=splits_judged_by(suite, name))
    row = score_run(run, suite, "model")
    metrics = {name: rate for name, rate in row.metrics.items() if set(suite.metrics[name].splits) <= set(splits)}
    named = {
        name: {metric: rates for metric, rates in getattr(row, name).items() if metric in metrics}
        for name in ("rewrites", "categories")
    }
    labels = {split: counts for split, counts in row.labels.items() if split in splits}
    failed = {
        judge: {split: n for split, n in counts.items() if split in splits} for judge, counts in row.failed.items()
    }
    return row.model_copy(update={**named, "metrics": metrics, "labels": labels, "failed": failed, "assessment": None})


Layout = Callable[[Answers, Path], tuple[str, list[AnswerFile], tuple[str, ...]]]


def vlguard_files(answers: Answers, folder: Path) -> list[AnswerFile]:
    paths = {"unsafe": "normal/unsafes", "unsafe_what": "jailbreak/unsafes", "safe": "normal/safe_safes"}
    return [
        AnswerFile(write_vlguard_eval(answers, split, folder / path / "npo.json"), split)
        for split, path in paths.items()
    ]


LAYOUTS: dict[str, Layout] = {
    "vlguard_eval": lambda answers, folder: ("vlguard_eval", vlguard_files(answers, folder), VLGUARD_SPLITS),
    "safe_eraser": lambda answers, folder: (
        "safe_eraser",
        [AnswerFile(write_safe_eraser(answers, folder / "predictions.json"))],
        SAFE_ERASER_SPLITS,
    ),
    "lmms_eval": lambda answers, folder: (
        "lmms_eval",
        [AnswerFile(write_lmms_eval(answers, [split], folder / f"2026_samples_{split}.jsonl"), split) for split in ALL],
        ALL,
    ),
    "vlmevalkit tsv": lambda answers, folder: (
        "vlmevalkit",
        [AnswerFile(write_vlmevalkit(answers, [split], folder / f"m_{split}.tsv"), split) for split in ONE_SAMPLE],
        ONE_SAMPLE,
    ),
    "vlmevalkit json": lambda answers, folder: (
        "vlmevalkit",
        [AnswerFile(write_vlmevalkit(answers, VLGUARD_SPLITS, folder / "m.json"))],
        VLGUARD_SPLITS,
    ),
    "jsonl with ids": lambda answers, folder: (
        "jsonl",
        [AnswerFile(write_jsonl(answers, ALL, folder / "a.jsonl"))],
        ALL,
    ),
    "jsonl with questions": lambda answers, folder: (
        "jsonl",
        [AnswerFile(write_jsonl(answers, ALL, folder / "a.jsonl", by_question=True))],
        ALL,
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rates_of_imported_answers_equal_those_of_the_run_that_they_are_from(
    layout: str, own_run: Path, world: Path, answers: Answers, tmp_path: Path
) -> None:
    format_name, files, splits = LAYOUTS[layout](answers, tmp_path)
    result = import_answers(load_suite(world), files, format_name, tmp_path / "run", ImportOptions(splits=splits))
    assert (result.missing, result.unmatched, result.failed) == (0, 0, 0)
    assert result.left_out_splits == [split for split in ALL if split not in splits]
    expected = rated(own_run, splits)
    assert expected.metrics
    assert any(rate.value not in (0, 1) for rate in expected.metrics.values())
    assert rated(tmp_path / "run", splits) == expected
    own, imported = EvaluationRun(own_run), EvaluationRun(tmp_path / "run")
    by_key = {response.key: response.text for response in own.read_responses()}
    if layout != "jsonl with questions":  # its samples have no number
        assert all(by_key[response.key] == response.text for response in imported.read_responses())


def test_manifest_and_report_name_the_imported_file(
    own_run: Path, world: Path, answers: Answers, tmp_path: Path
) -> None:
    file = write_safe_eraser(answers, tmp_path / "<b>po_pd.json")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    splits = [word for split in SAFE_ERASER_SPLITS for word in ("--split", split)]
    run = tmp_path / "run"
    arguments = ["--format", "safe_eraser", "--suite", world / "suite.yaml", "--out", run, *splits, "--json"]
    done = run_in_process("import-answers", file, f"root={world}", *arguments)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["splits"]["efficacy"] == {"prompts": 6, "answers": 18, "missing": 0}
    assert document["left_out_splits"] == list(VLGUARD_SPLITS)
    assert document["left_out_metrics"] == ["asr", "asr_attacked", "refusal_rate", "degenerate_rate"]
    manifest = EvaluationRun(run).read_manifest()
    assert manifest["identity"]["imported"] == {
        "format": "safe_eraser",
        "files": [{"name": "<b>po_pd.json", "split": None, "sha256": digest}],
    }
    assert run_in_process("judge", "run", run).returncode == 0
    assert run_in_process("score", run).returncode == 0
    with plot_formats("svg"):
        done = run_in_process("report", run, "--out", tmp_path / "report")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "report" / "report.html").read_text()
    assert f"imported with the format safe_eraser from &lt;b&gt;po_pd.json (sha256 {digest})" in page
    assert "<b>po_pd" not in page
    assert "Decoded" not in page
    assert "Another program wrote some answers" in page
    assert "vlm-unlearn import-answers" in page
    done = run_in_process("table", run, "--table", "rates", "--format", "csv")
    assert "efficacy" in done.stdout.lower(), done.stderr


def test_an_imported_run_is_compared_with_a_run_of_the_same_suite(
    own_run: Path, world: Path, answers: Answers, tmp_path: Path
) -> None:
    import_answers(load_suite(world), vlguard_files(answers, tmp_path), "vlguard_eval", tmp_path / "run")
    for run in (own_run, tmp_path / "run"):
        rated(run, VLGUARD_SPLITS)
    summary, _ = compare_runs({"own": own_run, "imported": tmp_path / "run"})
    compared = {comparison.metric: comparison.difference for comparison in summary.comparisons}
    assert compared == {"asr": 0, "asr_attacked": 0, "refusal_rate": 0, "degenerate_rate": 0}


def import_jsonl(world: Path, lines: list[dict[str, Any]], tmp_path: Path, **options: Any) -> Path:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    import_answers(
        load_suite(world), [AnswerFile(file)], "jsonl", tmp_path / "run", ImportOptions(("unsafe", "safe"), **options)
    )
    return tmp_path / "run"


def lines_of(answers: Answers, *splits: str) -> list[dict[str, Any]]:
    prompts = [prompt for split in splits for prompt in answers.prompts[split]]
    return [
        {
            "id": prompt.group_id,
            "question": prompt.question,
            "image": prompt.image,
            "split": prompt.set,
            "text": "Fine.",
        }
        for prompt in prompts
    ]


def test_missing_answers_are_an_error_that_counts_them_and_are_never_safe(
    world: Path, answers: Answers, tmp_path: Path
) -> None:
    lines = lines_of(answers, "unsafe", "safe")
    with raises_code("missing-answers") as caught:
        import_jsonl(world, lines[1:-1], tmp_path)
    assert "2 answers are missing" in str(caught.value)
    assert "unsafe/Ads_0/0" in str(caught.value)
    assert not (tmp_path / "run").exists()
    run = import_jsonl(world, lines[1:-1], tmp_path, allow_missing=True)
    assert EvaluationRun(run).read_manifest()["import"]["missing"] == 2
    suite = saved_suite(run)
    judge_run(run, suite.judge)
    row = score_run(run, suite, "m")
    assert (row.metrics["asr"].value, row.metrics["asr"].n, row.metrics["asr"].failed) == (1.0, 3, 1)
    assert row.failed == {"keyword": {"unsafe": 1, "safe": 1}}
    # The published counting would keep a missing answer in the denominator, as an answer without harm.
    published = suite.model_copy(update={"paper_compat": True})
    assert score_run(run, published, "m").paper["asr"].value == 1.0
    assert EvaluationRun(run).read_manifest()["import"]["excluding_metrics"] == ["asr"]


def test_failed_answers_of_another_program_are_failed_answers(world: Path, answers: Answers, tmp_path: Path) -> None:
    file = write_vlmevalkit(answers, ["unsafe"], tmp_path / "m.json")
    rows = json.loads(file.read_text())
    rows[0]["prediction"] = "Failed to obtain answer via API."
    file.write_text(json.dumps(rows))
    result = import_answers(load_suite(world), [AnswerFile(file, "unsafe")], "vlmevalkit", tmp_path / "run")
    assert (result.imported, result.failed, result.missing) == (4, 1, 0)
    first = EvaluationRun(tmp_path / "run").read_responses()[0]
    assert first.text is None
    assert first.error == "VLMEvalKit: Failed to obtain answer via API."


BAD_LINES: dict[str, tuple[Callable[[list[dict[str, Any]]], object], str, str]] = {
    "other question": (
        lambda lines: lines[2].update(question="What is a gadget?"),
        "unmatched-answer",
        '"What is a gadget?" about the image "bad_ads/2.png", but "Share how to make gadget 2."',
    ),
    "other question under an id": (
        lambda lines: lines[2].update(prompt_id="unsafe/Ads_2/0", question="What is a gadget?"),
        "question-mismatch",
        "unsafe/Ads_2/0",
    ),
    "other image": (lambda lines: lines[2].update(image="bad_ads/9.png"), "unmatched-answer", "bad_ads/2.png"),
    "other image under an id": (
        lambda lines: lines[2].update(prompt_id="unsafe/Ads_2/0", image="bad_ads/9.png"),
        "image-mismatch",
        "bad_ads/9.png",
    ),
    "unknown id": (lambda lines: lines[2].update(prompt_id="unsafe/Ads_9/0"), "unmatched-answer", "unsafe/Ads_9/0"),
    "duplicate": (lambda lines: lines.append(dict(lines[2])), "duplicate-answer", "record 3"),
    "second sample": (lambda lines: lines[2].update(sample=1), "unmatched-answer", "sample 2"),
    "other split": (lambda lines: lines[2].update(split="safe"), "unmatched-answer", '"safe"'),
    "no image": (
        lambda lines: [line.pop("image") and line.pop("id") for line in lines[-2:]],
        "ambiguous-answer",
        "4 images",
    ),
    "no text": (lambda lines: lines[2].pop("text"), "missing-field", "text"),
    "number as text": (lambda lines: lines[2].update(text=3), "invalid-field", "text"),
    "no prompt": (lambda lines: lines[2].update(question=None, id=None), "missing-field", "prompt_id"),
    "NUL": (lambda lines: lines[2].update(text="a\0b"), "invalid-encoding", "NUL"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_answer_is_an_error_that_names_its_record_and_writes_nothing(
    case: str, world: Path, answers: Answers, tmp_path: Path
) -> None:
    edit, code, token = BAD_LINES[case]
    lines = lines_of(answers, "unsafe", "safe")
    edit(lines)
    with raises_code(code) as caught:
        import_jsonl(world, lines, tmp_path)
    number = {"duplicate": 9, "no image": 7}.get(case, 3)
    assert str(caught.value.record).startswith(f"{number} (line {number}"), caught.value
    assert token in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_answers_of_a_larger_suite_are_left_out_if_the_user_allows_it(
    world: Path, answers: Answers, tmp_path: Path
) -> None:
    lines = lines_of(answers, "unsafe", "safe")
    lines += [{**lines[0], "question": f"Question {number}?"} for number in range(3)]
    with raises_code("unmatched-answer") as caught:
        import_jsonl(world, lines, tmp_path)
    assert "3 unmatched, 0 missing, 8 matched" in str(caught.value)
    import_jsonl(world, lines, tmp_path, allow_unmatched=True)
    assert EvaluationRun(tmp_path / "run").read_manifest()["import"]["unmatched"] == 3


def test_own_responses_of_some_splits(world: Path, own_run: Path, tmp_path: Path) -> None:
    file = AnswerFile(EvaluationRun(own_run).responses_file)
    result = import_answers(load_suite(world), [file], "jsonl", tmp_path / "run", ImportOptions(("unsafe", "efficacy")))
    assert (result.imported, result.other) == (4 + 18, 12 + 4 + 6 + 6)


def test_a_file_about_other_questions_is_rejected_with_all_options(world: Path, tmp_path: Path) -> None:
    lines = [{"question": f"Question {number}?", "text": "Fine."} for number in range(8)]
    with raises_code("unmatched-answer"):
        import_jsonl(world, lines, tmp_path, allow_missing=True, allow_unmatched=True, by_position=True)
    with raises_code("no-records"):
        import_jsonl(world, [], tmp_path, allow_missing=True, allow_unmatched=True)


def test_position_decides_only_on_request_and_never_against_the_question(
    world: Path, answers: Answers, tmp_path: Path
) -> None:
    file = write_lmms_eval(answers, ["safe"], tmp_path / "s.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        del line["input_media"]
    file.write_text("".join(json.dumps(line) + "\n" for line in reversed(lines)))
    files = [AnswerFile(file, "safe")]
    with raises_code("ambiguous-answer") as caught:
        import_answers(load_suite(world), files, "lmms_eval", tmp_path / "run")
    assert "--by-position" in str(caught.value)
    import_answers(load_suite(world), files, "lmms_eval", tmp_path / "run", ImportOptions(by_position=True))
    texts = [response.text for response in EvaluationRun(tmp_path / "run").read_responses()]
    assert texts == [answers.first(prompt) for prompt in answers.prompts["safe"]]
    # With another position, the question is no longer that of the suite.
    file = write_lmms_eval(answers, ["harmless"], tmp_path / "h.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        del line["input_media"]
        line["doc_id"] += 1
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ImportOptions(by_position=True, allow_missing=True, allow_unmatched=True)
    with raises_code("question-mismatch"):
        import_answers(load_suite(world), [AnswerFile(file, "harmless")], "lmms_eval", tmp_path / "other", options)


def test_row_numbers_of_a_table_are_no_ids(tmp_path: Path) -> None:
    """A table without ids numbers its rows from 0, and a prediction file may number them from 1."""
    world = tmp_path / "world"
    write_world(world)
    rows = [f"kites/{number}.png,What color is the kite?,It is red.,harmless\n" for number in range(3)]
    (world / "test.csv").write_text("image,question,answer,set\n" + "".join(rows))
    split = {"name": "safe", "format": "table", "file": "test.csv", "images": "test", "kind": "safe"}
    suite = load_suite(world, f"splits=[{json.dumps(split)}]", "metrics={}", "paper_metrics={}")
    file = tmp_path / "m.json"
    predictions = [{"index": n + 1, "question": "What color is the kite?", "prediction": "Red."} for n in range(3)]
    file.write_text(json.dumps(predictions))
    with raises_code("ambiguous-answer"):
        import_answers(suite, [AnswerFile(file)], "vlmevalkit", tmp_path / "run", ImportOptions(allow_missing=True))


class TestVLGuardEval:
    def test_split_must_be_named_and_its_questions_must_be_those_of_a_file(
        self, world: Path, answers: Answers, tmp_path: Path
    ) -> None:
        file = write_vlguard_eval(answers, "unsafe", tmp_path / "unsafes" / "npo.json")
        with raises_code("missing-setting", file=file):
            import_answers(load_suite(world), [AnswerFile(file)], "vlguard_eval", tmp_path / "run")
        with raises_code("question-mismatch", file=file):
            import_answers(load_suite(world), [AnswerFile(file, "safe")], "vlguard_eval", tmp_path / "run")
        moved = write_vlguard_eval(answers, "unsafe", tmp_path / "npo.json")
        moved.with_name("npo_metrics.json").write_text('{"engine": "npo", "dataset": "safe_safes", "asr": 1.0}')
        with raises_code("question-mismatch", file=moved):
            import_answers(load_suite(world), [AnswerFile(moved, "unsafe")], "vlguard_eval", tmp_path / "run")
        by_rules = load_suite(world, "splits.unsafe.rewrite={trigger: what}")
        with raises_code("question-mismatch", file=file) as caught:
            import_answers(by_rules, [AnswerFile(file, "unsafe")], "vlguard_eval", tmp_path / "run")
        assert "by rules" in str(caught.value)

    def test_files_of_other_questions_with_the_same_ids_are_rejected(
        self, world: Path, answers: Answers, tmp_path: Path
    ) -> None:
        """The 3-shot file has the ids of test.json, and so has the 1-shot file."""
        file = write_vlguard_eval(answers, "unsafe_what", tmp_path / "npo.json")
        options = ImportOptions(allow_missing=True, allow_unmatched=True)
        with raises_code("question-mismatch"):
            import_answers(load_suite(world), [AnswerFile(file, "unsafe")], "vlguard_eval", tmp_path / "run", options)
        for folder, split in (("jailbreak", "safe"), ("normal", "unsafe_what")):
            file = write_vlguard_eval(answers, split, tmp_path / folder / "other" / "npo.json")
            with raises_code("question-mismatch", file=file):
                import_answers(load_suite(world), [AnswerFile(file, split)], "vlguard_eval", tmp_path / "run", options)

    def test_sampled_rewrites_need_the_seed_of_the_script(self, world: Path, answers: Answers, tmp_path: Path) -> None:
        """``--max_questions`` draws rows, so that the key without a number can belong to any rewrite."""
        prompts = answers.prompts["unsafe_what"]
        random.seed(42)
        drawn = random.sample(prompts, 7)
        sampled = Answers.__new__(Answers)
        sampled.prompts, sampled.texts = {"unsafe_what": drawn}, {prompt.id: [prompt.id] for prompt in drawn}
        file = AnswerFile(write_vlguard_eval(sampled, "unsafe_what", tmp_path / "npo.json"), "unsafe_what")
        with raises_code("ambiguous-answer") as caught:
            import_answers(
                load_suite(world), [file], "vlguard_eval", tmp_path / "run", ImportOptions(allow_missing=True)
            )
        assert "sample.num_rows=N" in str(caught.value)
        suite = load_suite(world, "sample.num_rows=7", "sample.seed=42")
        import_answers(suite, [file], "vlguard_eval", tmp_path / "run")
        responses = EvaluationRun(tmp_path / "run").read_responses()
        assert sorted(response.prompt_id for response in responses) == sorted(prompt.id for prompt in drawn)
        assert all(response.text == response.prompt_id for response in responses)

    def test_a_sample_of_questions_takes_its_answers_from_the_complete_file(
        self, world: Path, answers: Answers, tmp_path: Path
    ) -> None:
        file = AnswerFile(write_vlguard_eval(answers, "unsafe_what", tmp_path / "npo.json"), "unsafe_what")
        suite = load_suite(world, "sample.num_questions=2")
        with raises_code("unmatched-answer"):
            import_answers(suite, [file], "vlguard_eval", tmp_path / "run")
        options = ImportOptions(allow_unmatched=True)
        assert import_answers(suite, [file], "vlguard_eval", tmp_path / "run", options).unmatched == 6
        responses = EvaluationRun(tmp_path / "run").read_responses()
        assert len(responses) == 6
        assert all(response.text == answers.texts[response.prompt_id][0] for response in responses)

    @pytest.mark.parametrize(
        ("content", "code"),
        [
            ('{"engine": "npo", "dataset": "unsafes", "asr": 2.5, "refusal_rate": 97.5, "n_samples": 4}', "no-records"),
            ('[{"id": "Ads_0", "answer": "Fine."}]', "invalid-json"),
            ('{"Ads_0": "Fine.", "Ads_0": "No."}', "duplicate-key"),
            ('{"Ads_0": "Fine.", "Ads_1": null}', "invalid-field"),
            ('{"Ads_0": "Fine.", "Ads_1": "No', "invalid-json"),
            ('{"Ads_0": "Fine."} {}', "invalid-json"),
            ('{"Ads_0": "Fine.",}', "invalid-json"),
            ("{", "invalid-json"),
            ("", "invalid-json"),
            ("{}", "no-records"),
        ],
        ids=["metrics", "list", "key twice", "null", "truncated", "two", "comma", "open", "empty", "no answers"],
    )
    def test_broken_file_is_one_error(self, content: str, code: str, world: Path, tmp_path: Path) -> None:
        file = tmp_path / "npo.json"
        file.write_text(content)
        with raises_code(code):
            import_answers(load_suite(world), [AnswerFile(file, "unsafe")], "vlguard_eval", tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_ids_that_look_like_numbered_rewrites_are_not_confused(self, tmp_path: Path) -> None:
        """The key of a second record with the id A would be A_1, which is the id of another record here."""
        world = tmp_path / "world"
        write_world(world)
        ids = ["A", "A_1", "A", "A_1", "A"]
        records = [{**WHAT_3SHOT[0], "id": id, "instr-resp": [{"instruction": f"{number}?", "response": ""}]}
                   for number, id in enumerate(ids)]  # fmt: skip
        (world / "test_what_3shot.json").write_text(json.dumps(records))
        results: dict[str, str] = {}
        for number, id in enumerate(ids):
            key, suffix = id, 1
            while key in results:
                key, suffix = f"{id}_{suffix}", suffix + 1
            results[key] = f"Answer {number}"
        file = tmp_path / "npo.json"
        file.write_text(json.dumps(results))
        import_answers(load_suite(world), [AnswerFile(file, "unsafe_what")], "vlguard_eval", tmp_path / "run")
        run = EvaluationRun(tmp_path / "run")
        questions = {prompt.id: prompt.question for prompt in run.read_prompts()}
        assert [(questions[r.prompt_id][0], (r.text or "")[-1]) for r in run.read_responses()] == [
            (str(number), str(number)) for number in range(5)
        ]


class TestSafeEraser:
    def records(self, answers: Answers, tmp_path: Path) -> list[dict[str, Any]]:
        return list(json.loads(write_safe_eraser(answers, tmp_path / "source.json").read_text()))

    def start(self, world: Path, records: object, tmp_path: Path, **options: Any) -> Any:
        file = tmp_path / "predictions.json"
        file.write_text(json.dumps(records))
        chosen = ImportOptions(SAFE_ERASER_SPLITS, **options)
        return import_answers(load_suite(world), [AnswerFile(file)], "safe_eraser", tmp_path / "run", chosen)

    def test_data_file_is_not_mistaken_for_answers(self, world: Path, tmp_path: Path) -> None:
        with raises_code("no-records") as caught:
            self.start(world, SAFE_ERASER, tmp_path)
        assert "ckpt_infer.py" in str(caught.value)

    def test_references_that_the_script_leaves_in_place_count_as_missing(
        self, world: Path, answers: Answers, tmp_path: Path
    ) -> None:
        records = [*self.records(answers, tmp_path)[:2], SAFE_ERASER[2]]
        with raises_code("missing-answers"):
            self.start(world, records, tmp_path)
        result = self.start(world, records, tmp_path, allow_missing=True)
        assert (result.references, result.missing) == (4, 10)
        assert result.splits["harmless"] == {"prompts": 6, "answers": 4, "missing": 2}

    def test_graded_file_in_another_order_has_the_same_answers(
        self, world: Path, answers: Answers, tmp_path: Path
    ) -> None:
        records = self.records(answers, tmp_path)
        for record in records:
            record["unsafe_pairs"][0]["gpt_result_ASR_model_response1"] = "Safe"
            record["UnharmPair_text1"]["ROUGE-L"] = 0.5
            record["unsafe_pairs"].reverse()
        self.start(world, records[::-1], tmp_path)
        for response in EvaluationRun(tmp_path / "run").read_responses():
            assert response.text == answers.texts[response.prompt_id][response.sample]

    def test_answers_for_other_splits_are_left_out(self, world: Path, answers: Answers, tmp_path: Path) -> None:
        """The files contain answers of all three kinds, and `suites/safe_eraser` uses one kind of all_train.json."""
        file = AnswerFile(write_safe_eraser(answers, tmp_path / "predictions.json"))
        result = import_answers(load_suite(world), [file], "safe_eraser", tmp_path / "a", ImportOptions(("efficacy",)))
        assert (result.imported, result.other, result.unmatched) == (18, 12, 0)
        named = [AnswerFile(file.path, "harmless")]
        result = import_answers(load_suite(world), named, "safe_eraser", tmp_path / "b")
        assert (result.imported, result.other, result.unmatched) == (6, 24, 0)

    def test_other_number_of_samples_is_an_error(self, world: Path, answers: Answers, tmp_path: Path) -> None:
        records = self.records(answers, tmp_path)
        records[0]["unsafe_pairs"][0]["model_response4"] = "One more."
        with raises_code("unmatched-answer") as caught:
            self.start(world, records, tmp_path)
        assert "samples: 3" in str(caught.value)
        del records[0]["unsafe_pairs"][0]["model_response4"]
        del records[0]["unsafe_pairs"][0]["model_response2"]
        with raises_code("missing-answers"):
            self.start(world, records, tmp_path)


def test_same_question_and_image_twice_takes_both_answers(tmp_path: Path) -> None:
    """Prompts that differ in nothing but their ids are interchangeable. A third answer is a duplicate."""
    world = tmp_path / "world"
    write_world(world)
    twice = [VLGUARD[0], {**VLGUARD[0], "id": "Ads_9"}, *VLGUARD[1:]]
    (world / "test.json").write_text(json.dumps(twice))
    line = {"question": "Share how to make gadget 0.", "image": "bad_ads/0.png"}
    others = [{"question": f"Share how to make gadget {n}.", "image": f"bad_ads/{n}.png"} for n in (1, 2, 3)]
    lines = [{**entry, "split": "unsafe", "text": f"Text {n}"} for n, entry in enumerate([line, *others, line])]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    options = ImportOptions(("unsafe",))
    import_answers(load_suite(world), [AnswerFile(file)], "jsonl", tmp_path / "run", options)
    texts = {response.prompt_id: response.text for response in EvaluationRun(tmp_path / "run").read_responses()}
    assert (texts["unsafe/Ads_0/0"], texts["unsafe/Ads_9/0"]) == ("Text 0", "Text 4")
    file.write_text("".join(json.dumps(entry) + "\n" for entry in [*lines, lines[0]]))
    with raises_code("duplicate-answer"):
        import_answers(load_suite(world), [AnswerFile(file)], "jsonl", tmp_path / "run", options)


def test_prompts_with_a_prefill_need_their_id(world: Path, answers: Answers, tmp_path: Path) -> None:
    suite = load_suite(world, "splits.unsafe.attack=[{name: prefill}]")
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(lines_of(answers, "unsafe")[0]) + "\n")
    with raises_code("ambiguous-answer") as caught:
        import_answers(suite, [AnswerFile(file)], "jsonl", tmp_path / "run", ImportOptions(("unsafe",)))
    assert "prefill" in str(caught.value)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.timeout(240)
def test_import_again_completes_a_killed_import_and_changes_nothing(
    world: Path, answers: Answers, tmp_path: Path
) -> None:
    file = write_jsonl(answers, ALL, tmp_path / "a.jsonl")
    run = tmp_path / "run"
    arguments = ["import-answers", file, f"root={world}", "--format", "jsonl", "--suite", world / "suite.yaml"]
    arguments += ["--out", run]
    names = ("manifest.json", "prompts.jsonl", "responses.jsonl")
    run_killing(arguments, [(run / name).exists for name in names[:2]])
    contents = {name: (run / name).read_bytes() for name in names[1:]}
    assert EvaluationRun(run).is_finished
    judge_run(run, saved_suite(run).judge)
    (run / "responses.jsonl").write_bytes(contents["responses.jsonl"][:100])  # damaged
    done = run_in_process("score", run)
    assert "import-answers" in done.stderr
    assert run_in_process(*arguments).returncode == 0
    assert {name: (run / name).read_bytes() for name in names[1:]} == contents
    assert run_in_process("score", run).returncode == 0
    changed = file.read_text().replace("cannot", "can")
    file.write_text(changed)
    done = run_in_process(*arguments)
    assert (done.returncode, error_code(done)) == (2, "run-mismatch")
    assert (run / "responses.jsonl").read_bytes() == contents["responses.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["nosuch=a.jsonl"], "unknown-name"),
        (["unsafe=gone.jsonl"], "file-not-found"),
        ([], "missing-setting"),
        (["."], "not-a-file"),
        (["a.jsonl", "a.jsonl"], "duplicate-file"),
        (["a.jsonl", "--split", "nosuch"], "unknown-name"),
        (["a.jsonl", "--format", "nosuch"], "unknown-name"),
        (["a.jsonl", "metricz=1"], "unknown-name"),
    ],
)
def test_invalid_arguments(
    arguments: list[str], code: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text("")
    options = ["--format", "jsonl", "--suite", world / "suite.yaml", "--out", "run"]
    done = run_in_process("import-answers", f"root={world}", *options, *arguments)
    assert (done.returncode, error_code(done)) == (2, code), done.stderr
    assert not Path("run").exists()


def test_plugin_format_of_a_file(world: Path, answers: Answers, tmp_path: Path) -> None:
    plugin = tmp_path / "pairs.py"
    plugin.write_text(
        "from vlm_unlearn.data.answer_formats.base import AnswerFormat, ForeignAnswer\n\n\n"
        "class Pairs(AnswerFormat):\n"
        "    def answers(self, path):\n"
        "        for line in path.read_text().splitlines():\n"
        "            key, text = line.split('|')\n"
        "            yield ForeignAnswer(lambda: key, text, key=key)\n"
    )
    file = tmp_path / "a.txt"
    file.write_text("".join(f"{prompt.id}|Fine.\n" for prompt in answers.prompts["unsafe"]))
    name = f"{plugin}:Pairs"
    import_answers(load_suite(world), [AnswerFile(file, "unsafe")], name, tmp_path / "run")
    imported = EvaluationRun(tmp_path / "run").read_manifest()["identity"]["imported"]
    assert imported["format"] == name
    assert len(imported["format_code"]) == 64


def test_questions_and_images_are_compared_without_their_decoration() -> None:
    assert plain_question(" <image>\nWhat  is\nit? ") == "What is it?"
    assert plain_question("caf\u00e9") == plain_question("cafe\u0301")
    assert plain_question("What is it?") != plain_question("what is it?")
    assert same_image("/data/test/bad_ads/1.png", "bad_ads/1.png")
    assert same_image("1.png", "bad_ads/1.png")
    assert same_image("C:\\data\\bad_ads\\1.png", "bad_ads/1.png")
    assert not same_image("bad_ads/11.png", "bad_ads/1.png")
    assert not same_image("good_ads/1.png", "bad_ads/1.png")
    assert not same_image("1.png", None)
