"""Answer files of other programs, read one at a time: layouts of several versions, broken files, and mutated ones."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import raises_code
from vlm_unlearn.data import json_stream
from vlm_unlearn.data.answer_formats.base import ANSWER_FORMATS, ForeignAnswer, get_answer_format
from vlm_unlearn.errors import UserError

ROUNDS = int(os.environ.get("VLM_UNLEARN_FUZZ", "300"))


def read(name: str, file: Path) -> list[ForeignAnswer]:
    return list(get_answer_format(name).answers(file))


def write_lines(file: Path, *records: object) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


@pytest.mark.parametrize(
    ("record", "texts", "question", "image"),
    [
        ({"doc_id": 3, "filtered_resps": "Red.", "input": "What?"}, ["Red."], "What?", None),
        ({"doc_id": 3, "filtered_resps": ["Red."], "input": "What?"}, ["Red."], "What?", None),
        ({"doc_id": 3, "filtered_resps": "R", "resps": ["Red."], "input": "What?"}, ["Red."], "What?", None),
        ({"doc_id": 3, "filtered_resps": ["R"] * 2, "resps": [["A"], ["B"]], "input": "W?"}, ["A", "B"], "W?", None),
        ({"doc_id": 3, "filtered_resps": "", "input": "What?", "input_media": ["a/b.png"]}, [""], "What?", "a/b.png"),
        ({"doc_id": 3, "filtered_resps": "R", "input": "W?", "input_media": ["data:image/png,A"]}, ["R"], "W?", None),
        ({"doc_id": 3, "filtered_resps": "R", "input": "W?", "input_media": ["a.png", "b.png"]}, ["R"], "W?", None),
        # Versions before 0.4
        ({"doc_id": 3, "resps": [["R"]], "filtered_resps": ["R"], "arguments": [["W?", {"until": ["\n"]}]],
          "doc": {"question": "other", "image_path": "a.png"}}, ["R"], "W?", "a.png"),
        ({"doc_id": 3, "resps": [["R"]], "filtered_resps": ["R"], "doc": {"question": "W?"}}, ["R"], "W?", None),
    ],
)  # fmt: skip
def test_lmms_eval_of_several_versions(
    record: dict[str, Any], texts: list[str], question: str, image: str | None, tmp_path: Path
) -> None:
    answers = read("lmms_eval", write_lines(tmp_path / "samples_task.jsonl", record))
    assert [answer.text for answer in answers] == texts
    assert {(answer.question, answer.image, answer.number) for answer in answers} == {(question, image, 3)}


def test_vlmevalkit_reads_numbers_failures_and_empty_predictions(tmp_path: Path) -> None:
    file = tmp_path / "m.json"
    rows = [
        {"index": 7, "question": "How many?", "prediction": 3},
        {"index": "b", "question": "What?", "prediction": "", "image_path": "['a.png', 'b.png']"},
        {"index": 9, "question": "What?", "prediction": "Failed to obtain answer: <class 'RuntimeError'>"},
        {"index": 10, "question": "What?", "prediction": float("nan")},
    ]
    file.write_text(json.dumps(rows))
    answers = read("vlmevalkit", file)
    assert [answer.text for answer in answers] == ["3", "", None, None]
    assert [answer.number for answer in answers] == [7, None, 9, 10]
    assert [answer.group for answer in answers] == [None, "b", None, None]  # a row's number is no id
    assert [answer.image for answer in answers] == [None] * 4
    assert answers[2].error is not None
    assert answers[3].error is not None


@pytest.mark.parametrize(
    ("name", "content", "code", "token"),
    [
        ("m.xlsx", "PK", "invalid-table", ".tsv"),
        ("m.pkl", "x", "invalid-table", "pickle"),
        ("m.tsv", "index\tquestion\n1\tWhat?\n", "missing-field", "prediction"),
        ("m.tsv", "index\tquestion\tprediction\n1\tWhat?\n", "invalid-table", "2 cells"),
        ("m.json", '[{"index": 1, "question": "", "prediction": "R"}]', "empty-field", "question"),
    ],
)
def test_vlmevalkit_rejects_other_files(name: str, content: str, code: str, token: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with raises_code(code) as caught:
        read("vlmevalkit", tmp_path / name)
    assert token in str(caught.value)


def test_jsonl_reads_the_fields_of_common_programs(tmp_path: Path) -> None:
    file = write_lines(
        tmp_path / "a.jsonl",
        {"prompt_id": "unsafe/a/0", "sample": 2, "text": "Red.", "finish_reason": "length"},
        {"id": 5, "question": "What?", "image": "a.png", "prediction": "Red."},
        {"id": "a", "response": None, "error": "out of memory"},
        {"id": "a", "text": "half", "error": "stopped"},
    )
    first, second, third, fourth = read("jsonl", file)
    assert (first.key, first.sample, first.text, first.finish_reason) == ("unsafe/a/0", 2, "Red.", "length")
    assert (second.group, second.question, second.image, second.text) == ("5", "What?", "a.png", "Red.")
    assert (third.text, third.error, fourth.text, fourth.error) == (None, "out of memory", None, "stopped")


def test_format_names_are_checked(tmp_path: Path) -> None:
    with raises_code("unknown-name", field="--format"):
        get_answer_format("vlguard", "--format")
    (tmp_path / "p.py").write_text("Mine = 3\n")
    with raises_code("invalid-plugin"):
        get_answer_format(f"{tmp_path / 'p.py'}:Mine")


SEEDS: dict[str, Any] = {
    "vlguard_eval": {"Ads_1": "It is red.", "Ads_1_1": "I cannot say.", "Ads_2": ""},
    "safe_eraser": [
        {
            "image_path": "W/a.png",
            "SDImage_path": "S/a.png",
            "unsafe_pairs": [{"question": "How?", "model_response1": "So.", "sd_response": "Bread."}],
            "UnharmPair_text1": {"Question": "What?", "Prediction": "Red."},
        }
    ],
    "lmms_eval": [
        {"doc_id": 0, "input": "What?", "resps": [["a"], ["b"]], "filtered_resps": "a", "input_media": ["a"]}
    ],
    "vlmevalkit": [{"index": 0, "question": "What?", "image_path": "a.png", "prediction": "Red."}],
    "jsonl": [{"prompt_id": "u/1/0", "id": "1", "question": "What?", "image": "a.png", "sample": 0, "text": "Red."}],
}
ODD: list[Any] = [
    None,
    True,
    3,
    -1,
    1e308,
    2**70,
    "",
    " ",
    "\0",
    "\ud800",
    "x" * 70_000,
    [],
    {},
    [[[[["deep"]]]]],
    {"a": 1},
]


def mutate(value: Any, rng: random.Random) -> Any:
    """Replaces, removes, adds or repeats one part of a value."""
    if isinstance(value, dict) and value:
        key = rng.choice(list(value))
        changed = dict(value)
        choice = rng.randrange(4)
        if choice == 0:
            del changed[key]
        elif choice == 1:
            changed[rng.choice(["other", "model_response2", "", "error"])] = rng.choice(ODD)
        else:
            changed[key] = rng.choice(ODD) if choice == 2 else mutate(value[key], rng)
        return changed
    if isinstance(value, list) and value:
        changed_list = list(value)
        position = rng.randrange(len(value))
        changed_list[position] = rng.choice(ODD) if rng.random() < 0.3 else mutate(value[position], rng)
        return changed_list
    return rng.choice(ODD)


@pytest.mark.parametrize("name", SEEDS)
def test_mutated_files_are_read_or_are_an_error_of_the_user(name: str, tmp_path: Path) -> None:
    file = tmp_path / "answers.json"
    for number in range(ROUNDS):
        rng = random.Random(number)
        value = mutate(copy.deepcopy(SEEDS[name]), rng)
        content = json.dumps(value).encode()
        if rng.random() < 0.2:
            position = rng.randrange(len(content))
            content = content[:position] + bytes([rng.randrange(256)]) + content[position + rng.randrange(3) :]
        file.write_bytes(content)
        try:
            for answer in read(name, file):
                assert isinstance(answer.text, str | None), number
                assert answer.text is not None or answer.error, number
                assert isinstance(answer.position(), str), number
                (answer.text or "").encode()
        except UserError:
            continue


def test_every_format_has_a_seed() -> None:
    assert set(SEEDS) == set(ANSWER_FORMATS.built_in)


LARGE: dict[str, Callable[[int], str]] = {
    "vlguard_eval": lambda n: f'"Ads_{n}": "{"word " * 400}"',
    "jsonl": lambda n: json.dumps({"prompt_id": f"u/{n}/0", "text": "word " * 400}),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_files_are_read_one_answer_at_a_time(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tracemalloc

    file = tmp_path / "a.json"
    texts = [LARGE[name](number) for number in range(8000)]  # 16 MB
    file.write_text("{" + ",".join(texts) + "}" if name == "vlguard_eval" else "\n".join(texts))
    monkeypatch.setattr(json_stream, "CHUNK_BYTES", 1 << 18)
    tracemalloc.start()
    count = sum(1 for _ in get_answer_format(name).answers(file))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 8000
    assert peak < file.stat().st_size / 4
