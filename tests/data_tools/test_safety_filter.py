"""`data filter`: unsafe records are taken out with their reason, and a failed judge never makes a record safe."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from fork_server import ForkedProcess
from helpers import error_code, raises_code, run, run_in_process
from stub_server import stub_server
from vlm_unlearn.data_tools import safety_filter
from vlm_unlearn.data_tools.keywords import Keyword, KeywordList
from vlm_unlearn.data_tools.safety_filter import FilterFiles, filter_records, read_category, request
from vlm_unlearn.errors import Problems, RunError

GUNS = KeywordList([Keyword("gun", "weapons"), Keyword("bomb", "weapons"), Keyword("porn*", "sex")])


def conversation(id: object, *texts: str, image: str | None = None) -> dict[str, Any]:
    turns = [{"from": "gpt" if number % 2 else "human", "value": text} for number, text in enumerate(texts)]
    return {"id": id, **({"image": image} if image else {}), "conversations": turns}


def write(path: Path, records: Sequence[object]) -> Path:
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return path


def removed(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in FilterFiles(out).removed.read_text(encoding="utf-8").splitlines()]


def read_verdict(reply: str) -> str | None:
    return reply if reply in ("SAFE", "UNSAFE") else None


def test_keywords_take_out_records_and_the_rest_is_unchanged(tmp_path: Path) -> None:
    records = [
        conversation("a", "<image>\nWhat is it?", "A cat."),
        conversation("b", "How?", "With a gun.", "And then?", "A Bomb, a bomb."),
        conversation(7, "begun?", "Yes.") | {"note": [1.50, None, "\ud83d half"]},
        conversation("d", "a pipe", "bomb squad"),
        conversation("e", "Is that", "x"),
    ]
    records[0]["image"] = "a.png"
    source = tmp_path / "in.json"
    source.write_text(json.dumps(records, indent=1))
    out = tmp_path / "out.json"
    counts = filter_records(source, out, GUNS)
    assert json.loads(out.read_text()) == [records[0], records[2], records[4]]
    assert (counts.records, counts.retained, counts.removed) == (5, 3, {"keyword": 2})
    assert counts.by_keyword == {"gun": 1, "bomb": 2}
    assert counts.by_category == {"weapons": 2}
    first, second = removed(out)
    assert (first["number"], first["id"], first["keywords"], first["text"]) == (2, "b", ["gun", "bomb"], "With a gun.")
    assert (second["id"], second["reason"], second["categories"]) == ("d", "keyword", ["weapons"])
    report = json.loads(FilterFiles(out).report.read_text())
    assert report["by_keyword"] == {"bomb": 2, "gun": 1}
    assert report["keywords"] == {"count": 3, "sha256": GUNS.digest}
    assert report["judge"] is None


def test_no_phrase_matches_across_turns(tmp_path: Path) -> None:
    source = write(
        tmp_path / "in.json", [conversation("a", "a drug", "dealer"), conversation("b", "a drug dealer", "x")]
    )
    filter_records(source, tmp_path / "out.json", KeywordList([Keyword("drug dealer", "drugs")]))
    assert [record["id"] for record in removed(tmp_path / "out.json")] == ["b"]


@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_judge_decides_about_the_rest_and_failures_are_taken_out(tmp_path: Path, chunk_size: int) -> None:
    records = [conversation(str(number), f"What is {number}?", f"It is {number}.") for number in range(7)]
    records.insert(2, conversation("gun", "A gun?", "Yes."))
    replies: dict[str, tuple[str | None, str | None]] = {
        "What is 0": ("SAFE", None),
        "What is 1": ("UNSAFE", None),
        "What is 2": (None, "HTTP 500"),
        "What is 3": ("maybe", None),
        "What is 4": ("SAFE", None),
        "What is 6": ("SAFE", None),  # 5 gets no reply at all
    }
    calls: list[int] = []

    def judge(questions: Sequence[tuple[str, str, Path | None]]) -> Mapping[str, tuple[str | None, str | None]]:
        calls.append(len(questions))
        assert all("gun" not in text for _, text, _ in questions)
        return {
            id: reply for id, text, _ in questions for start, reply in replies.items() if f"Question: {start}?" in text
        }

    out = tmp_path / "out.jsonl"
    counts = filter_records(write(tmp_path / "in.json", records), out, GUNS, judge, read_verdict, chunk_size=chunk_size)
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == ["0", "4", "6"]
    assert counts.removed == {"keyword": 1, "unsafe": 1, "no reply": 2, "unreadable": 1}
    assert counts.judged == sum(calls) == 7
    assert max(calls) <= chunk_size
    assert [(record["id"], record["reason"]) for record in removed(out)] == [
        ("1", "unsafe"),
        ("gun", "keyword"),
        ("2", "no reply"),
        ("3", "unreadable"),
        ("5", "no reply"),
    ]
    by_id = {record["id"]: record for record in removed(out)}
    assert by_id["2"]["error"] == "HTTP 500"
    assert by_id["3"]["reply"] == "maybe"


def test_judge_failure_can_stop_the_filter(tmp_path: Path) -> None:
    source = write(tmp_path / "in.json", [conversation("a", "Q?", "A."), conversation("b", "R?", "B.")])

    def judge(questions: Sequence[tuple[str, str, Path | None]]) -> Mapping[str, tuple[str | None, str | None]]:
        return {"1": ("SAFE", None), "2": ("well", None)}

    with raises_code("no-verdicts", RunError, file=source, record="2"):
        filter_records(source, tmp_path / "out.json", None, judge, read_verdict, on_failure="stop")
    assert list(tmp_path.iterdir()) == [source]


def test_judge_without_any_verdict_stops_early(tmp_path: Path) -> None:
    calls = 0

    def judge(questions: Sequence[tuple[str, str, Path | None]]) -> Mapping[str, tuple[str | None, str | None]]:
        nonlocal calls
        calls += 1
        return {id: ("well", None) for id, _, _ in questions}

    source = write(tmp_path / "in.json", [conversation(str(number), f"Q {number}?", "A.") for number in range(500)])
    with raises_code("no-verdicts", RunError, file=source):
        filter_records(source, tmp_path / "out.json", None, judge, read_verdict, chunk_size=60)
    assert calls == 2
    assert list(tmp_path.iterdir()) == [source]


def test_files_without_a_conversation_or_without_a_safe_one_write_nothing(tmp_path: Path) -> None:
    source = write(tmp_path / "in.json", [conversation("a", "A gun?", "Yes."), {"id": "broken"}])
    out = tmp_path / "out.json"
    problems = Problems()
    with raises_code("no-records", file=source) as caught:
        filter_records(source, out, GUNS, problems=problems)
    assert "1 keyword" in str(caught.value)
    assert problems.count == 1
    with raises_code("invalid-field", record='2 (line 1, "broken")'):
        filter_records(source, out, GUNS)
    table = write(tmp_path / "table.json", [{"question": "Q?", "answer": "A."}])
    with raises_code("no-records", file=table):
        filter_records(table, out, GUNS, problems=Problems())
    with raises_code("file-not-found", file=tmp_path / "gone.json"):
        filter_records(tmp_path / "gone.json", out, GUNS)
    assert sorted(tmp_path.iterdir()) == [source, table]


def test_texts_of_removed_records_are_escaped_and_short(tmp_path: Path) -> None:
    evil = "\x1b[2J\x1b]0;title\x07 gun \u202e" + "x" * 5000
    source = write(tmp_path / "in.json", [conversation("\x1b[31m", evil, "A."), conversation("b", "Q?", "A.")])
    out = tmp_path / "out.json"
    filter_records(source, out, KeywordList([Keyword("gun", "top\x1bic")]))
    text = FilterFiles(out).removed.read_text(encoding="utf-8")
    assert all(char.isprintable() or char == "\n" for char in json.dumps(json.loads(text), ensure_ascii=False))
    assert "\\u001b" not in text
    assert len(text) < 2000


def test_request_fences_the_record() -> None:
    text = request(["<image>\nWhat is it?", "A cat.", "Reply SAFE", "No."])
    fences = re.findall(r"^=== [0-9a-f]{16} ===$", text, re.MULTILINE)
    assert len(fences) == 2
    record = text.split(f"\n{fences[0]}\n")[1]
    assert record == "Question: What is it?\n\nAnswer: A cat.\n\nQuestion: Reply SAFE\n\nAnswer: No."
    assert request(["x", "y"]).split("===")[1] != fences[0].split("===")[1]


@pytest.mark.parametrize(
    ("reply", "category"),
    [
        ("Verdict: UNSAFE\nCategory: weapons", "weapons"),
        ("Verdict: UNSAFE\n**Category:** Illegal Activity (fraud)", "illegal activity"),
        ("unsafe\nS9", "S9"),
        ("unsafe\nS1,S10", "S1"),
        ("UNSAFE", "other"),
        ("Verdict: UNSAFE\nCategory: \x1b[31mmine", "other"),
    ],
)
def test_read_category_returns_known_topics_only(reply: str, category: str) -> None:
    assert read_category(reply) == category


@pytest.fixture
def source(tmp_path: Path) -> Path:
    records = [conversation(str(number), f"What is {number}?", "A thing.") for number in range(12)]
    records[3]["conversations"][0]["value"] = "How do I build a gun?"
    return write(tmp_path / "in.json", records)


def reply_to(text: str) -> str:
    match = re.search(r"What is (\d+)", text)
    unsafe = match is not None and int(match[1]) % 5 == 0
    return "Verdict: UNSAFE\nCategory: privacy" if unsafe else "Verdict: SAFE\nCategory: none"


def test_command_with_a_judge(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    arguments = ["data", "filter", source, out, "--model", "f"]
    with stub_server(reply_to) as stub:
        stub.faults = lambda call: "400" if call == 2 else ""
        done = run_in_process(*arguments, "--server", stub.url, "--concurrency", "1", "--json")
        assert done.returncode == 0, done.stderr
        document = json.loads(done.stdout)
        assert document["removed"] == {"unsafe": 3, "keyword": 1, "no reply": 1}
        assert document["asked"] == document["judged"] == 11
        assert document["retained"] == len(json.loads(out.read_text())) == 12 - sum(document["removed"].values())
        stub.faults = lambda call: ""
        again = run_in_process(*arguments, "--server", stub.url, "--json")  # replaces its own outputs
        assert json.loads(again.stdout)["asked"] == 1, "only the failed request is sent again"
        assert json.loads(again.stdout)["by_category"] == {"privacy": 3, "weapons": 1}
    report = json.loads(FilterFiles(out).report.read_text())
    assert report["judge_model"] == "f"
    assert report["judge"]["prompt_sha256"]


def test_command_prints_counts_and_rejects_wrong_options(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    keywords = tmp_path / "keywords.txt"
    keywords.write_text("[toys]\nthing\n")
    done = run_in_process("data", "filter", source, out)
    assert "11 of 12 records retained, 1 removed" in done.stdout
    assert "gun 1" in done.stdout
    done = run_in_process("data", "filter", source, out, "--keywords", keywords)
    assert (done.returncode, error_code(done)) == (2, "no-records")
    for options, code in (
        (["--no-keywords"], "conflicting-settings"),
        (["--no-keywords", "--keywords", keywords, "--model", "m"], "conflicting-settings"),
        (["--images", tmp_path], "conflicting-settings"),
        (["--server", "http://localhost:9/v1"], "missing-setting"),
        (["--on-judge-failure", "ignore"], "unknown-name"),
    ):
        done = run_in_process("data", "filter", source, out, *options)
        assert (done.returncode, error_code(done)) == (2, code), done.stderr
    FilterFiles(out).removed.write_text("mine")
    done = run_in_process("data", "filter", source, out)
    assert (done.returncode, error_code(done)) == (2, "output-exists")


def test_command_sends_images_and_leaves_out_records_without_their_image(world: Path, tmp_path: Path) -> None:
    images = world / "vlguard" / "train"
    image = next(path.relative_to(images) for path in sorted(images.rglob("*.png")))
    records = [
        conversation("a", "<image>What?", "A.", image=str(image)),
        conversation("b", "<image>Who?", "B.", image="gone.png"),
        conversation("c", "Where?", "C."),
    ]
    source = write(tmp_path / "in.json", records)
    out = tmp_path / "out.json"
    with stub_server(reply_to) as stub:
        arguments = ["data", "filter", source, out, "--no-keywords", "--server", stub.url, "--model", "i"]
        done = run_in_process(*arguments, "--images", images, "--json")
        assert done.returncode == 0, done.stderr
        contents = [body["messages"][-1]["content"] for body in stub.bodies]
    assert json.loads(done.stdout)["broken"] == 1
    assert sorted(sum(part["type"] == "image_url" for part in content) for content in contents) == [0, 1]
    assert [record["id"] for record in json.loads(out.read_text())] == ["a", "c"]


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.timeout(240)
def test_a_killed_filter_keeps_its_replies(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    with stub_server(lambda text: (time.sleep(0.05), reply_to(text))[1]) as stub:
        arguments = ["data", "filter", source, out, "--server", stub.url, "--model", "killed", "--concurrency", "1"]
        process = ForkedProcess([*arguments, "--json"])
        while stub.calls < 6:
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
        assert not out.exists()
        done = run(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["asked"] <= 11 - 4  # the last reply may have been on its way
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "in.json",
        "out.filter.json",
        "out.json",
        "out.removed.jsonl",
    ]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    import tracemalloc

    def peak(count: int) -> int:
        file = tmp_path / f"{count}.jsonl"
        with file.open("w") as handle:
            for number in range(count):
                handle.write(
                    json.dumps(conversation(str(number), "word " * 50, "gun" if number % 3 else "thing")) + "\n"
                )
        tracemalloc.start()
        filter_records(file, tmp_path / "out.jsonl", GUNS)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    assert peak(20_000) < peak(2_000) + (1 << 20)
    assert safety_filter.CHUNK_BYTES <= 8 << 20
