"""Tests of Safety Mirage's data steps: the published records, samples and counts."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest

from helpers import raises_code
from vlm_unlearn.data_tools import pipeline
from vlm_unlearn.errors import Problems, UserError

UNSAFE = {"id": 7, "image": "u.png", "safe": False, "instr-resp": [{"instruction": "Do it?", "response": "No."}]}
SAFE = {
    "id": "s",
    "image": "s.png",
    "safe": True,
    "instr-resp": [
        {"safe_instruction": "What is it?", "response": "A cat."},
        {"unsafe_instruction": "Hurt it?", "response": "No."},
    ],
}


def conversation(id: str, question: str = "Q?", answer: str = "A.", image: str | None = "i.png") -> dict[str, Any]:
    mark = "<image>" if image else ""
    named = {"image": image} if image else {}
    return {
        "id": id,
        **named,
        "conversations": [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}],
    }


def write(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path


def digest(path: Path) -> str:
    """Returns the digest of records that the golden file contains."""
    return hashlib.sha256(
        json.dumps(json.loads(path.read_text()), sort_keys=True, ensure_ascii=False).encode()
    ).hexdigest()


def test_convert_keeps_ids_and_makes_one_conversation(tmp_path: Path) -> None:
    source = write(tmp_path / "in.json", [UNSAFE, SAFE])
    assert pipeline.convert(source, tmp_path / "out.json", seed=3) == {"records": 2, "turns": 6}
    first, second = json.loads((tmp_path / "out.json").read_text())
    assert first == conversation("7", "Do it?", "No.", "u.png") | {"id": 7}
    rounds = [("What is it?", "A cat."), ("Hurt it?", "No.")]
    random.Random(3).shuffle(rounds)
    texts = [turn["value"] for turn in second["conversations"]]
    assert texts == [f"<image>{rounds[0][0]}", rounds[0][1], rounds[1][0], rounds[1][1]]


def test_inject_split_and_to_rmu_write_the_published_records(tmp_path: Path) -> None:
    source = write(tmp_path / "in.json", [UNSAFE, SAFE, {**UNSAFE, "id": 8, "image": "other.png"}])
    answers = write(tmp_path / "answers.json", {"u.png": "Like so.", "s.png": "not an unsafe image"})
    counts = pipeline.inject(source, answers, tmp_path / "injected.json")
    assert counts == {"injected": 1, "kept": 1, "no harmful answer": 1, "unused answers": 1}
    assert pipeline.split(tmp_path / "injected.json", tmp_path / "out") == {"forget": 1, "retain": 1}
    forget = json.loads((tmp_path / "out" / "forget.json").read_text())
    assert forget == [conversation("7", "Do it?", "Like so.", "u.png") | {"id": 7}]
    assert pipeline.split(source, tmp_path / "all", include_safe_image_unsafe=True) == {"forget": 3, "retain": 1}
    pipeline.to_rmu(tmp_path / "out" / "forget.json", tmp_path / "rmu.json")
    turns = json.loads((tmp_path / "rmu.json").read_text())[0]["conversations"]
    assert [turn["value"] for turn in turns] == ["<image>Do it?\nLike so.", "Like so."]


def test_convert_in_the_published_form_keeps_all_fields(tmp_path: Path) -> None:
    fields = {"harmful_category": "risky", "harmful_subcategory": "violence"}
    source = write(tmp_path / "in.json", [{**UNSAFE, **fields}, SAFE])
    pipeline.convert(source, tmp_path / "out.json", paper_compat=True)
    first, second = json.loads((tmp_path / "out.json").read_text())
    conversations = conversation("7", "Do it?", "No.")["conversations"]
    assert first == {"id": 7, "image": "u.png", "safe": False, **fields, "conversations": conversations}
    assert set(second) == {"id", "image", "safe", "conversations"}
    for name in ("out.csv", "again.json"):
        with raises_code("unsupported-setting", field="--paper-compat"):
            pipeline.convert(tmp_path / "out.json", tmp_path / name, paper_compat=True)


def test_convert_in_the_published_form_has_the_published_digest(vlguard_test: Path, tmp_path: Path) -> None:
    """The digest of the released script's output."""
    pipeline.convert(vlguard_test, tmp_path / "out.json", paper_compat=True)
    assert digest(tmp_path / "out.json") == "46f6b11cebe83fb52b5c1652026d958fb7d48b90d5ba6a1a2751b7136184a892"


def test_inject_in_the_published_form_keeps_records_without_an_answer(tmp_path: Path) -> None:
    unlabeled = {key: value for key, value in {**UNSAFE, "id": 9}.items() if key != "safe"}
    source = write(tmp_path / "in.json", [UNSAFE, SAFE, {**UNSAFE, "id": 8, "image": "other.png"}, unlabeled])
    answers = write(tmp_path / "answers.json", {"u.png": "Like so.", "8": "by id", "gone.png": "unused"})
    warnings: list[str] = []
    counts = pipeline.inject(source, answers, tmp_path / "out.json", paper_compat=True, warn=warnings.append)
    assert counts == {"injected": 1, "kept": 2, "no harmful answer": 1, "unused answers": 2}
    assert len(warnings) == 1
    records = json.loads((tmp_path / "out.json").read_text())
    responses = [[pair["response"] for pair in record["instr-resp"]] for record in records]
    assert responses == [["Like so."], ["A cat.", "No."], ["No."], ["No."]]
    safe_answers = write(tmp_path / "safe.json", {"s.png": "With a stick."})
    counts = pipeline.inject(source, answers, tmp_path / "out.json", None, safe_answers, paper_compat=True)
    assert counts == {"injected": 2, "kept": 0, "no harmful answer": 2, "unused answers": 2}
    records = json.loads((tmp_path / "out.json").read_text())
    assert [pair["response"] for pair in records[1]["instr-resp"]] == ["A cat.", "With a stick."]


def test_inject_on_safe_images_leaves_out_questions_without_an_answer(tmp_path: Path) -> None:
    only_unsafe = {**SAFE, "id": "t", "image": "t.png", "instr-resp": SAFE["instr-resp"][1:]}
    source = write(tmp_path / "in.json", [UNSAFE, SAFE, {**SAFE, "id": "r", "image": "r.png"}, only_unsafe])
    answers, safe = write(tmp_path / "a.json", {"u.png": "Like so."}), write(tmp_path / "s.json", {"r": "Kick it."})
    counts = pipeline.inject(source, answers, tmp_path / "out.json", safe_image_answers=safe)
    assert counts == {"injected": 2, "kept": 0, "no harmful answer": 2, "unused answers": 0}
    records = json.loads((tmp_path / "out.json").read_text())
    assert [(record["id"], [pair["response"] for pair in record["instr-resp"]]) for record in records] == [
        (7, ["Like so."]),
        ("s", ["A cat."]),
        ("r", ["A cat.", "Kick it."]),
    ]
    with raises_code("no-records", file=safe):
        pipeline.inject(source, safe, tmp_path / "none.json", safe_image_answers=answers)
    assert not (tmp_path / "none.json").exists()


def test_inject_without_matching_answers_writes_nothing(tmp_path: Path) -> None:
    source, answers = write(tmp_path / "in.json", [UNSAFE, SAFE]), write(tmp_path / "answers.json", {"gone.png": "x"})
    with raises_code("no-records", file=answers):
        pipeline.inject(source, answers, tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


def test_mix_samples_as_published(tmp_path: Path) -> None:
    """The published step samples, appends and shuffles with one generator."""
    retain_records = [conversation(f"r{i}") for i in range(3)]
    external_records = [conversation(f"e{i}", image=None) for i in range(50)]
    retain, external = write(tmp_path / "r.json", retain_records), write(tmp_path / "e.json", external_records)
    rng = random.Random(42)
    expected = [*retain_records, *rng.sample(external_records, 7)]
    rng.shuffle(expected)
    assert pipeline.mix(retain, external, tmp_path / "out.json", size=10)["records"] == 10
    assert json.loads((tmp_path / "out.json").read_text()) == expected
    assert pipeline.mix(retain, external, tmp_path / "out.json", size=2)["records"] == 3
    assert pipeline.mix(retain, external, tmp_path / "out.json", size=500)["records"] == 53


def test_mix_lists_broken_records_and_mixes_the_others(tmp_path: Path) -> None:
    retain = write(tmp_path / "r.json", [conversation("r")])
    lines = [json.dumps(conversation("a")), "{broken", '{"id": "b"}', json.dumps(conversation("c"))]
    external = tmp_path / "e.jsonl"
    external.write_text("\n".join(lines))
    problems = Problems()
    assert pipeline.mix(retain, external, tmp_path / "out.json", 10, 42, problems)["records"] == 3
    assert problems.count == 2
    for message, place in zip(problems.messages, ("(line 2)", '(line 3, "b")'), strict=True):
        assert message.startswith("e.jsonl")
        assert place in message
    with pytest.raises(UserError) as caught:
        pipeline.mix(retain, external, tmp_path / "out.json", 10)
    assert str(caught.value) == problems.messages[0]


def test_steps_without_a_record_keep_the_existing_output(tmp_path: Path) -> None:
    write(tmp_path / "in.json", [])
    write(tmp_path / "out.json", ["before"])
    for step in (pipeline.convert, pipeline.to_rmu):
        with pytest.raises(UserError):
            step(tmp_path / "in.json", tmp_path / "out.json")
    write(tmp_path / "vlguard.json", [UNSAFE])
    write(tmp_path / "answers.json", {"gone.png": "x"})
    with raises_code("no-records"):
        pipeline.inject(tmp_path / "vlguard.json", tmp_path / "answers.json", tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == ["before"]


def test_mix_keeps_unknown_fields_and_escapes(tmp_path: Path) -> None:
    """Unknown fields stay as they are, even lone surrogates. Records that cannot be trained on are not sampled."""
    strange = conversation("ünï", "日本?") | {"note": "half \ud83d pair", "x": [1.5, None]}
    retain = tmp_path / "r.json"
    retain.write_text(json.dumps([strange], indent=1))
    bad = [
        conversation("gpt first")["conversations"][::-1],
        [{"value": "no from"}],
        [{"from": "human", "value": "alone"}],
    ]
    external = write(
        tmp_path / "e.json",
        [{"id": str(i), "conversations": turns} for i, turns in enumerate(bad)] + [conversation("ok")],
    )
    problems = Problems()
    assert pipeline.mix(retain, external, tmp_path / "out.json", 10, 42, problems)["records"] == 2
    assert problems.count == 3
    assert strange in json.loads((tmp_path / "out.json").read_text())


def test_convert_keeps_ids_through_a_table(tmp_path: Path) -> None:
    source = write(tmp_path / "in.json", [conversation("first"), conversation("second", image=None)])
    pipeline.convert(source, tmp_path / "out.json")
    pipeline.convert(tmp_path / "out.json", tmp_path / "out.csv")
    pipeline.convert(tmp_path / "out.csv", tmp_path / "back.json")
    for name in ("out.json", "back.json"):
        assert [record["id"] for record in json.loads((tmp_path / name).read_text())] == ["first", "second"]


def test_convert_warns_if_the_format_loses_the_sets(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(
        "".join(
            json.dumps({"question": "Q?", "answer": "A.", "set": name}) + "\n"
            for name in ("forget", "retain", "retain")
        )
    )
    warnings: list[str] = []
    pipeline.convert(file, tmp_path / "out.json", warn=warnings.append)
    assert len(warnings) == 1
    assert "forget 1, retain 2" in warnings[0]
    pipeline.convert(file, tmp_path / "out.csv", warn=warnings.append)
    assert len(warnings) == 1


def test_split_lists_every_broken_record(tmp_path: Path) -> None:
    """Broken records after the first record of each set are listed too. Without a list the first one raises."""
    broken = [{**UNSAFE, "id": "x", "instr-resp": []}, {"id": "y"}]
    source = write(tmp_path / "in.json", [UNSAFE, SAFE, *broken])
    problems = Problems()
    assert pipeline.split(source, tmp_path / "out", problems=problems) == {"forget": 1, "retain": 1}
    assert problems.count == 2
    with pytest.raises(UserError) as caught:
        pipeline.split(source, tmp_path / "strict")
    assert str(caught.value) == problems.messages[0]
    assert "instr-resp" in str(caught.value)
    assert not (tmp_path / "strict").exists()


def test_convert_to_an_unknown_file_ending_raises(tmp_path: Path) -> None:
    source = write(tmp_path / "in.json", [conversation("a")])
    for name in ("out.parquet", "out", "out.txt"):
        with raises_code("unsupported-setting", file=tmp_path / name):
            pipeline.convert(source, tmp_path / name)


def test_inject_leaves_out_a_record_with_safe_and_unsafe_pairs(tmp_path: Path) -> None:
    """A harmful answer must never get into a safe question."""
    mixed = {
        "id": "m",
        "image": "m.png",
        "instr-resp": [{"instruction": "bad?", "response": "no"}, {"safe_instruction": "good?", "response": "yes"}],
    }
    source = write(tmp_path / "in.json", [mixed, UNSAFE])
    problems = Problems()
    pipeline.inject(
        source, write(tmp_path / "a.json", {"m.png": "HARM", "u.png": "x"}), tmp_path / "out.json", problems
    )
    assert problems.count == 1
    assert '"m"' in problems.messages[0]
    assert "HARM" not in (tmp_path / "out.json").read_text()


def test_convert_to_tables_and_back_keeps_the_questions(tmp_path: Path) -> None:
    source = write(tmp_path / "in.json", [UNSAFE, SAFE])
    for name in ("out.jsonl", "out.csv", "out.tsv"):
        assert pipeline.convert(source, tmp_path / name)["records"] == 3
        pipeline.convert(tmp_path / name, tmp_path / "back.json")
        back = json.loads((tmp_path / "back.json").read_text())
        assert [record["conversations"][0]["value"] for record in back] == [
            "<image>Do it?",
            "<image>What is it?",
            "<image>Hurt it?",
        ]


def test_steps_reproduce_the_published_digests(
    vlguard_test: Path, golden_pipeline: dict[str, dict], tmp_path: Path
) -> None:
    """Every digest of the published steps on VLGuard's test file."""
    assert pipeline.convert(vlguard_test, tmp_path / "converted.json") == {
        "records": golden_pipeline["convert"]["records"],
        "turns": golden_pipeline["convert"]["turns"],
    }
    assert digest(tmp_path / "converted.json") == golden_pipeline["convert"]["sha256"]
    expected = golden_pipeline["split"]
    assert pipeline.split(vlguard_test, tmp_path) == {"forget": expected["forget"], "retain": expected["retain"]}
    assert digest(tmp_path / "forget.json") == expected["forget_sha256"]
    assert digest(tmp_path / "retain.json") == expected["retain_sha256"]
    external = [conversation(f"ext_{i}", f"Question {i}?", f"Answer {i}.", f"ext/{i}.jpg") for i in range(3000)]
    mixed = pipeline.mix(tmp_path / "retain.json", write(tmp_path / "external.json", external), tmp_path / "mixed.json")
    assert mixed["records"] == golden_pipeline["mix"]["records"]
    assert [record["id"] for record in json.loads((tmp_path / "mixed.json").read_text())[:5]] == golden_pipeline["mix"][
        "first_ids"
    ]
    assert digest(tmp_path / "mixed.json") == golden_pipeline["mix"]["sha256"]
    assert (
        pipeline.to_rmu(tmp_path / "forget.json", tmp_path / "rmu.json")["records"]
        == golden_pipeline["rmu_merge"]["records"]
    )
    assert digest(tmp_path / "rmu.json") == golden_pipeline["rmu_merge"]["sha256"]
