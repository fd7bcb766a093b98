"""Both papers' suites from end to end: the tiny world's files, a random model, and a judge on a server whose verdicts are known."""

from __future__ import annotations

import json
import re
import zlib
from collections import defaultdict
from pathlib import Path

import pytest

from stub_server import Stub, stub_server
from vlm_unlearn.config import Suite, load
from vlm_unlearn.errors import UserError
from vlm_unlearn.evaluation.prompts import suite_prompts
from vlm_unlearn.evaluation.runner import evaluate_run
from vlm_unlearn.evaluation.verdicts import metrics_without_judge
from vlm_unlearn.judging.degenerate import degenerate_reason
from vlm_unlearn.judging.llm import IRRELEVANT_WORDS
from vlm_unlearn.records import Prompt, Response, Row
from vlm_unlearn.store import read_records

LABELS = ("COMPLIED", "REFUSED", "OFF_TOPIC", "DEGENERATE")


def fenced(text: str) -> list[str]:
    """The texts of others in a judge's prompt: the question, perhaps a reference, the answer."""
    line = next(line for line in text.splitlines() if line.startswith("=== "))
    return [part.strip("\n") for part in text.replace(f'"{line}"', "").split(line)[1::2]]


def number(answer: str) -> int:
    return zlib.crc32(answer.encode())


def judge(text: str) -> str:
    """A verdict that depends on the answer alone; every eleventh can't be read."""
    answer = fenced(text)[-1]
    if number(answer) % 11 == 0:
        return "I would rather not say."
    if "OFF_TOPIC" in text:
        return f"Verdict: {LABELS[number(answer) % 4]}"
    if "RELEVANT" in text:
        return f"Verdict: {'RELEVANT' if number(answer) % 2 else 'IRRELEVANT'}"
    if "UNSAFE" in text:
        return f"Verdict: {'UNSAFE' if number(answer) % 2 else 'SAFE'}"
    if "Score:" in text:
        return f"Score: {number(answer) % 5 / 4}"
    return f"Verdict: {'YES' if number(answer) % 3 else 'NO'}"


def label(answer: str) -> str | None:
    """What the judge of four labels makes of an answer."""
    if degenerate_reason(answer):
        return "degenerate"
    return None if number(answer) % 11 == 0 else LABELS[number(answer) % 4].lower()


def answers_of(run: Path) -> dict[str, list[tuple[Prompt, str]]]:
    """By case."""
    prompts = {prompt.id: prompt for prompt in read_records(run / "prompts.jsonl", Prompt)}
    found: dict[str, list[tuple[Prompt, str]]] = defaultdict(list)
    for response in read_records(run / "responses.jsonl", Response):
        found[prompts[response.prompt_id].set].append((prompts[response.prompt_id], response.text or ""))
    return found


def any_of_group(answers: list[tuple[Prompt, str]], wanted: str) -> float:
    """The share of questions with the label, of those that can be told."""
    groups: dict[str, list[str | None]] = defaultdict(list)
    for prompt, text in answers:
        groups[prompt.group_id].append(label(text))
    told = [wanted in labels for labels in groups.values() if None not in labels]
    return sum(told) / len(told)


def share(values: list[float]) -> float:
    return sum(values) / len(values)


def evaluated(name: str, model: Path, root: Path, folder: Path) -> tuple[Row, Stub]:
    """A suite's row with both countings, and what its judge was asked."""
    with stub_server(judge) as stub:
        settings = [
            f"model={model}",
            "generation.max_new_tokens=12",
            "generation.batch_size=64",
            "judge.model=judge",
            "paper_compat=true",
        ]
        suite = load(Suite, Path(name), [*settings, f"judge.server={stub.url}"], {"root": str(root)})
        return evaluate_run(suite, folder, "random"), stub


def test_safety_mirage(tiny_model: Path, world: Path, tmp_path: Path) -> None:
    row, stub = evaluated("suites/safety_mirage", tiny_model, world / "vlguard", tmp_path / "run")
    answers = answers_of(tmp_path / "run")
    asked = {case: len(of_case) for case, of_case in answers.items()}
    assert asked["unsafe_what"] == asked["unsafe_control"] == 3 * asked["unsafe"]
    assert asked["safe_share"] == asked["safe_control"] == asked["safe"]
    assert row.judge == "four_labels@judge"
    for metric, case in (("asr", "unsafe"), ("asr_attacked", "unsafe_what"), ("asr_control", "unsafe_control")):
        assert row.metrics[metric].value == pytest.approx(any_of_group(answers[case], "complied")), metric
    told = [label(text) for _, text in answers["safe"]]
    assert row.metrics["refusal_rate"].value == pytest.approx(told.count("refused") / (len(told) - told.count(None)))
    assert row.metrics["refusal_rate"].failed == told.count(None)
    assert len(row.rewrites["asr_attacked"]) == 3
    assert row.rewrites["asr_attacked"][2] == row.metrics["asr_attacked"]

    def relevant(text: str) -> bool:
        said = any(word in text.lower() for word in IRRELEVANT_WORDS)
        return not said and number(text) % 11 != 0 and number(text) % 2 == 1

    attacked: dict[str, list[bool]] = defaultdict(list)
    for prompt, text in answers["unsafe_what"]:
        attacked[prompt.group_id].append(relevant(text))
    assert row.paper["asr_attacked"].value == pytest.approx(share([any(hits) for hits in attacked.values()]))
    assert row.paper["answers_relevant_attacked"].value == pytest.approx(
        share([relevant(text) for _, text in answers["unsafe_what"]])
    )
    assert row.paper["refusal_rate"].n == asked["safe"]
    # Every shot was shown with its group's first question.
    first = {(prompt.group_id): prompt.question for prompt, _ in answers["unsafe_what"] if prompt.rewrite == 0}
    relevance = [body["messages"][0]["content"][-1]["text"] for body in stub.bodies]
    shown = {fenced(text)[0] for text in relevance if "IRRELEVANT" in text}
    assert shown <= set(first.values()) | {prompt.question for prompt, _ in answers["unsafe"]}


def test_safe_eraser(tiny_model: Path, world: Path, tmp_path: Path) -> None:
    row, stub = evaluated("suites/safe_eraser", tiny_model, world / "safe_eraser", tmp_path / "run")
    answers = answers_of(tmp_path / "run")
    asked = {case: len(of_case) for case, of_case in answers.items()}
    questions = {case: len({prompt.id for prompt, _ in of_case}) for case, of_case in answers.items()}
    assert asked["generality"] == 3 * questions["generality"] == 3 * asked["benign_image"]
    assert asked["harmless"] == questions["harmless"]
    assert row.metrics["generality_asr"].value == pytest.approx(any_of_group(answers["generality"], "complied"))
    assert row.metrics["generality_asr"].n <= questions["generality"]
    told = [label(text) for _, text in answers["benign_image"]]
    told = [found for found in told if found is not None]
    assert row.metrics["sarr"].value == pytest.approx(1 - told.count("complied") / len(told))

    def published(text: str, yes: int) -> float:
        return float(number(text) % 11 != 0 and number(text) % yes != 0)

    unsafe = [text for _, text in answers["efficacy"]]
    assert row.paper["efficacy_asr"].value == pytest.approx(share([published(text, 2) for text in unsafe]))
    assert row.paper["efficacy_asr"].n == len(unsafe)
    assert row.paper["efficacy_rr"].value == pytest.approx(share([published(text, 3) for text in unsafe]))
    assert 0 <= (row.metrics["rouge_l"].value or 0) <= 1
    assert row.metrics["rouge_l"].n == row.paper["rouge_l"].n == asked["harmless"]
    assert {"efficacy_asr", "sarr", "answer_score"} <= row.categories.keys()
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["identity"]["samples"] == {"efficacy": 3, "generality": 3}
    # As published the script hands the judge the answer as the reference and the reference as the answer.
    references = {prompt.reference for prompt, _ in answers["harmless"]}
    scored = [fenced(body["messages"][0]["content"][-1]["text"]) for body in stub.bodies if "Score:" in str(body)]
    assert any(texts[-1] in references for texts in scored)
    assert any(texts[-2] in references for texts in scored)


@pytest.mark.parametrize("name", ["safety_mirage", "safe_eraser"])
def test_without_a_language_model(name: str, tiny_model: Path, world: Path, tmp_path: Path) -> None:
    """The suites say what to pass; judge=keyword measures what keywords can, and says what it left out."""
    root = world / ("vlguard" if name == "safety_mirage" else "safe_eraser")
    settings = [f"model={tiny_model}", "generation.max_new_tokens=2", "generation.batch_size=64"]
    with pytest.raises(UserError, match=re.escape("judge.model=MODEL")):
        evaluate_run(load(Suite, Path(f"suites/{name}"), settings, {"root": str(root)}), tmp_path / "none", "random")
    assert not (tmp_path / "none").exists()
    suite = load(Suite, Path(f"suites/{name}"), [*settings, "judge=keyword"], {"root": str(root)})
    row = evaluate_run(suite, tmp_path / "run", "random")
    assert metrics_without_judge(suite) == (["answer_score"] if name == "safe_eraser" else [])
    assert not set(metrics_without_judge(suite)) & row.metrics.keys()
    assert row.metrics["degenerate_rate"].n > 0


def test_the_released_attack_files(tmp_path: Path, vlguard_test: Path) -> None:
    """The real annotation files: 442 groups of three, 558 of one, and the groups stay whole when sampled."""
    root = tmp_path / "vlguard"
    (root / "test").mkdir(parents=True)
    (root / "test.json").write_bytes(vlguard_test.read_bytes())
    for name in ("test_what_3shot", "test_share_1shot"):
        (root / f"{name}.json").write_bytes(vlguard_test.with_name(f"vlguard_{name}.json").read_bytes())
    for record in json.loads((root / "test.json").read_text()):
        image = root / "test" / record["image"]
        image.parent.mkdir(exist_ok=True)
        image.write_bytes(b"")
    settings = ["model=m", "judge.model=j"]
    prompts = suite_prompts(load(Suite, Path("suites/safety_mirage_released_attack"), settings, {"root": str(root)}))
    counts = {
        case: sum(prompt.set == case for prompt in prompts) for case in ("unsafe", "unsafe_what", "safe", "safe_share")
    }
    assert counts == {"unsafe": 442, "unsafe_what": 1326, "safe": 558, "safe_share": 556}
    groups = defaultdict(list)
    for prompt in prompts:
        if prompt.set == "unsafe_what":
            groups[prompt.group_id].append(prompt.rewrite)
    assert all(shots == [0, 1, 2] for shots in groups.values())
    assert len(groups) == 442
    for settings_of, whole in (
        (["sample.num_questions=50", "sample.seed=3"], True),
        (["sample.num_rows=150", "sample.seed=3"], False),
    ):
        suite = load(
            Suite, Path("suites/safety_mirage_released_attack"), [*settings, *settings_of], {"root": str(root)}
        )
        sampled = suite_prompts(suite)
        assert sampled == suite_prompts(suite)
        attacked = [prompt for prompt in sampled if prompt.set == "unsafe_what"]
        assert len(attacked) == 150
        names = {prompt.group_id for prompt in attacked}
        assert (len(names) == 50) == whole  # rows, as published, tear the triples apart
        if whole:
            assert names == {
                prompt.group_id for prompt in sampled if prompt.set == "unsafe"
            }  # the same questions before and after
