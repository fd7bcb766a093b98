"""The data of the answers page, and its notes on what it does not show."""

from __future__ import annotations

import html
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from answer_runs import JUDGES, example_prompts, label_of, make_example_runs, put_run
from benchmark_files import put_image, vqav2
from finished_runs import make_run, number, unlearned
from helpers import raises_code
from vlm_unlearn.evaluation.generate import saved_suite
from vlm_unlearn.evaluation.scoring import build_row, read_graded_run
from vlm_unlearn.records import BlankEdit, Prompt, Response, Round, Verdict
from vlm_unlearn.reporting.answers.answers_page import STATES, write_answers
from vlm_unlearn.reporting.answers.thumbnails import MAX_IMAGE_SIDE, delete_stale_thumbnails, write_thumbnails
from vlm_unlearn.store import write_records


def columns(page: Path) -> dict[str, Any]:
    """Returns the data that the page's script reads."""
    match = re.search(
        r'<script type="application/json" id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL
    )
    assert match is not None
    return json.loads(match.group(1))


def texts(data: dict[str, Any], indices: list[int]) -> list[str | None]:
    return [None if index < 0 else data["texts"][index] for index in indices]


def prompt(id: str = "p", **fields: Any) -> Prompt:
    return Prompt(**{"id": id, "group_id": id, "set": "safe", "kind": "safe", "question": f"{id}?", **fields})


def static_text(page: Path) -> str:
    """Returns the page without its scripts and their data."""
    return page.read_text(encoding="utf-8").split('<script type="application/json"')[0]


def notes(page: Path) -> str:
    """Returns the notes at the top of the page, except the one for browsers without JavaScript."""
    return "\n".join(re.findall(r'^<p class="note">(.*)</p>$', static_text(page), re.MULTILINE))


def test_write_answers_contains_every_answer_and_verdict(tmp_path: Path) -> None:
    page = write_answers(tmp_path / "out", make_example_runs(tmp_path), "All")
    data = columns(page)
    prompts = example_prompts()
    assert page == tmp_path / "out" / "report" / "answers.html"
    assert texts(data, data["questions"]["id"]) == [prompt.id for prompt in prompts]
    rows = list(
        zip(data["answers"]["question"], data["answers"]["model"], texts(data, data["answers"]["text"]), strict=True)
    )
    models = texts(data, data["models"])
    assert rows == [
        (n, m, f"Answer {n} of {models[m]} to {p.id}, Überall.") for n, p in enumerate(prompts) for m in range(3)
    ]
    assert texts(data, data["judges"]) == list(JUDGES)
    for judge, given in zip(JUDGES, data["verdicts"], strict=True):
        states = [STATES[state] for state in given["state"]]
        assert states == [label_of(str(models[m]), n, judge) or "failed" for n, m, _ in rows]
        assert set(texts(data, given["error"])) == {None, "timed out"}


def test_write_answers_labels_agree_with_the_summary(tmp_path: Path) -> None:
    """A link from the report finds as many answers as the report counts."""
    folder = make_run(tmp_path / "m", lambda prompt: None if number(prompt) == 3 else unlearned(prompt))
    row = build_row(read_graded_run(folder, saved_suite(folder)), "m")
    data = columns(write_answers(tmp_path / "out", {"m": folder}, "t"))
    splits = texts(data, data["questions"]["split"])
    states = [data["verdicts"][judge]["state"][n] for n, judge in enumerate(data["answers"]["judge"])]
    counted = Counter((splits[q], STATES[state]) for q, state in zip(data["answers"]["question"], states, strict=True))
    assert counted == {
        (split, label): count for split, labels in row.labels.items() for label, count in labels.items() if count
    }
    assert {label for _, label in counted} == {"complied", "refused", "failed"}


def test_write_answers_distinguishes_samples_scores_and_failures(tmp_path: Path) -> None:
    prompts = [prompt("one"), prompt("other")]
    responses = [
        Response(prompt_id="one", sample=1, text="second", finish_reason="length"),
        Response(prompt_id="one", sample=0, text="first"),
        Response(prompt_id="other", error="cut off"),
    ]
    verdicts = {
        "keyword": [Verdict(prompt_id="one", sample=1, judge="keyword", label="refused", raw="cannot")],
        "rouge_l": [Verdict(prompt_id="one", judge="rouge_l", score=0.25)],
    }
    data = columns(write_answers(tmp_path / "out", {"m": put_run(tmp_path / "m", prompts, responses, verdicts)}, "t"))
    assert data["answers"]["sample"] == [0, 1, 0]
    assert texts(data, data["answers"]["finish"]) == [None, "length", None]
    assert texts(data, data["answers"]["error"]) == [None, None, "cut off"]
    keyword, rouge = data["verdicts"]
    assert [STATES[state] for state in keyword["state"]] == [
        "none",
        "refused",
        "failed",
    ]  # a failed answer counts as failed without a verdict
    assert texts(data, keyword["raw"]) == [None, "cannot", None]
    assert [STATES[state] for state in rouge["state"]] == ["score", "none", "none"]
    assert rouge["score"] == [0.25, None, None]


def test_write_answers_runs_with_different_prompts_are_joined_by_prompt(tmp_path: Path) -> None:
    shared = prompt("shared")

    def run(name: str, prompts: list[Prompt]) -> Path:
        return put_run(
            tmp_path / name, prompts, [Response(prompt_id=prompt.id, text=prompt.id) for prompt in prompts], {}
        )

    first = run("first", [shared, prompt("same", question="One?")])
    second = run("second", [prompt("own"), prompt("same", question="Other?"), shared])
    data = columns(write_answers(tmp_path / "out", {"a": first, "b": second}, "t"))
    assert texts(data, data["questions"]["text"]) == ["shared?", "One?", "own?", "Other?"]
    assert list(zip(data["answers"]["question"], data["answers"]["model"], strict=True)) == [
        (0, 0),
        (0, 1),
        (1, 0),
        (2, 1),
        (3, 1),
    ]


def test_write_answers_changed_image_makes_another_question(tmp_path: Path) -> None:
    with_image = prompt("p", image="a.png")
    runs = {}
    for color, name in enumerate("abc"):
        runs[name] = put_run(tmp_path / name / "run", [with_image], [Response(prompt_id="p", text=name)], {})
        if color < 2:
            put_image(tmp_path / name / "images" / "a.png", color=color)
    both = write_answers(tmp_path / "two", {"a": runs["a"], "b": runs["b"]}, "t")
    assert columns(both)["answers"]["question"] == [0, 1]
    # The image of c is missing, so it may have been the same.
    lost = write_answers(tmp_path / "one", {"c": runs["c"], "a": runs["a"]}, "t")
    assert columns(lost)["answers"]["question"] == [0, 0]
    assert columns(lost)["images"][0][1:3] == [32, 32]
    assert columns(lost)["images"][0][3] == -1
    assert notes(lost) == ""


def test_write_answers_benchmark_shows_official_scores(tmp_path: Path) -> None:
    fields = vqav2(tmp_path)
    prompts = [
        prompt(f"vqav2/{n}", set="vqav2", question=f"how many in {n} ?", image=f"COCO_val2014_{40 + n // 2:012d}.jpg")
        for n in range(4)
    ]
    responses = [Response(prompt_id=prompt.id, text="3" if n < 2 else "no") for n, prompt in enumerate(prompts)]
    run = put_run(tmp_path / "run", prompts, responses, {}, benchmarks=[{"name": "vqav2", **fields}])
    page = write_answers(tmp_path / "out", {"m": run}, "t")
    data = columns(page)
    assert texts(data, data["judges"]) == ["vqav2's own scores"]
    assert data["verdicts"][0]["score"] == [1.0, 1.0, 0.0, 0.0]
    assert notes(page) == ""
    (tmp_path / str(fields["annotations"])).unlink()
    page = write_answers(tmp_path / "out", {"m": run}, "t")
    assert [STATES[state] for state in columns(page)["verdicts"][0]["state"]] == ["none"] * 4
    assert "m: " in notes(page)
    assert "vqav2" in notes(page)


def test_write_thumbnails_encodes_again_and_writes_identical_images_once(tmp_path: Path) -> None:
    """Data that was appended to an image, or a comment in it, is not copied."""
    source = tmp_path / "images"
    source.mkdir()
    large = Image.effect_noise((900, 600), 80)
    large.save(source / "photo.jpg", comment=b"<script>hidden</script>")
    (source / "photo.jpg").write_bytes((source / "photo.jpg").read_bytes() + b"<script>appended</script>")
    (source / "again.jpg").write_bytes((source / "photo.jpg").read_bytes())
    put_image(source / "icon.png")
    out = tmp_path / "out"
    thumbnails = write_thumbnails(
        out, [(source, name, ()) for name in ("photo.jpg", "again.jpg", "icon.png", "photo.jpg")]
    )
    assert [thumbnail.problem for thumbnail in thumbnails.values()] == ["", "", ""]
    photo, again, icon = thumbnails.values()
    assert photo == again
    assert (photo.width, photo.height) == (MAX_IMAGE_SIDE, 213)
    assert (photo.file[-4:], icon.file[-4:]) == (".jpg", ".png")
    assert sorted(file.name for file in out.iterdir()) == sorted({photo.file, icon.file})
    assert b"script" not in (out / photo.file).read_bytes()
    (out / icon.file).write_bytes(b"")
    # A damaged one is written again.
    assert list(write_thumbnails(out, [(source, "icon.png", ())]).values()) == [icon]
    written = (out / photo.file).stat().st_mtime_ns
    assert list(write_thumbnails(out, [(source, "photo.jpg", ())]).values()) == [photo]
    assert (out / photo.file).stat().st_mtime_ns == written
    for name in (f".{'0' * 32}.png.part", "mine.png"):
        (out / name).write_text("x")
    delete_stale_thumbnails(out, [photo])
    assert sorted(file.name for file in out.iterdir()) == sorted([photo.file, "mine.png"])


def test_answers_page_shows_edited_pictures_and_everything_that_was_asked(tmp_path: Path) -> None:
    put_image(tmp_path / "images" / "a.png")
    attacked = prompt(
        "attacked",
        image="a.png",
        image_edits=(BlankEdit(color=(0, 0, 0)),),
        system="Be brief.",
        history=(Round(question="Hi.", answer="Hello."),),
        prefill="Sure, here",
    )
    prompts = [prompt("plain", image="a.png"), attacked]
    run = put_run(tmp_path / "m", prompts, [Response(prompt_id=p.id, text=" it is") for p in prompts], {})
    data = columns(write_answers(tmp_path / "out", {"m": run}, "t"))
    files = [tmp_path / "out" / "report" / "images" / data["images"][index][0] for index in data["questions"]["image"]]
    assert files[0] != files[1]
    with Image.open(files[1]) as shown:
        assert shown.convert("RGB").getextrema() == ((0, 0),) * 3
    text = data["texts"][data["questions"]["text"][1]]
    lines = ["System: Be brief.", "User: Hi.", "Assistant: Hello.", f"User: {attacked.question}"]
    assert text.splitlines() == [*lines, "Assistant: Sure, here ..."]
    assert data["texts"][data["questions"]["text"][0]] == prompts[0].question


@pytest.mark.parametrize(
    "image", ["gone.png", "../secret.png", "text.png", "empty.png", "<script>\u202e\x00.png"], ids=ascii
)
def test_write_answers_invalid_image_is_a_note(tmp_path: Path, image: str) -> None:
    put_image(tmp_path / "secret.png")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "text.png").write_text("<svg onload=alert(1)>")
    (tmp_path / "images" / "empty.png").touch()
    run = put_run(tmp_path / "m", [prompt(image=image)], [Response(prompt_id="p", text="still here")], {})
    page = write_answers(tmp_path / "out", {"m": run}, "t")
    data = columns(page)
    assert "still here" in data["texts"]
    [[file, _, _, problem]] = data["images"]
    assert file == ""
    name = image.split("/")[-1].split("\u202e")[0]
    assert name in data["texts"][problem]
    assert "1 question " in notes(page)
    assert name in html.unescape(notes(page))
    assert "<script>\u202e" not in static_text(page)
    assert list((tmp_path / "out" / "report" / "images").iterdir()) == []


def test_write_answers_foreign_image_folder_is_a_note_and_the_root_folder_is_not_read(tmp_path: Path) -> None:
    """A suite from somebody else may name any folder of this machine as its image folder."""
    put_image(tmp_path / "private" / "a.png")
    run = put_run(tmp_path / "sent" / "m", [prompt(image="a.png")], [Response(prompt_id="p", text="x")], {})
    suite = json.loads((run / "suite.json").read_text())
    suite["splits"][0]["images"] = str(tmp_path / "private")
    (run / "suite.json").write_text(json.dumps(suite))
    page = write_answers(tmp_path / "out", {"m": run}, "t")
    assert f"1 image from {tmp_path / 'private'}" in static_text(page)
    put_image(tmp_path / "sent" / "images" / "a.png")
    suite["splits"][0]["images"] = str(tmp_path / "sent" / "images")
    (run / "suite.json").write_text(json.dumps(suite))
    assert "<footer" not in static_text(write_answers(tmp_path / "out", {"m": run}, "t"))
    suite["splits"][0]["images"] = "/"
    (run / "suite.json").write_text(json.dumps(suite))
    named = [prompt(image=str(tmp_path / "private" / "a.png")[1:])]
    write_records(run / "prompts.jsonl", named)
    data = columns(write_answers(tmp_path / "out", {"m": run}, "t"))
    assert data["images"][0][0] == ""
    assert "root of the file system" in data["texts"][data["images"][0][3]]


def test_write_answers_too_large_truncates_texts_then_leaves_out_questions(tmp_path: Path) -> None:
    prompts = [prompt(f"{split}{n}", set=split) for split in ("safe", "other") for n in range(50)]
    run = put_run(tmp_path / "m", prompts, [Response(prompt_id=p.id, text=p.id + " word" * 5000) for p in prompts], {})
    complete = write_answers(tmp_path / "complete", {"m": run}, "t")
    assert columns(complete)["truncated"] == {}
    assert notes(complete) == ""
    truncated = write_answers(tmp_path / "truncated", {"m": run}, "t", max_bytes=500_000)
    assert len(columns(truncated)["truncated"]) == 100
    assert len(columns(truncated)["questions"]["id"]) == 100
    assert "100 texts of more than 4,000 characters" in notes(truncated)
    fewer = write_answers(tmp_path / "fewer", {"m": run}, "t", max_bytes=50_000)
    data = columns(fewer)
    ids = texts(data, data["questions"]["id"])
    assert len(json.dumps(data, separators=(",", ":"))) <= 50_000
    assert 20 < len(ids) < 50
    assert ids == [
        f"{split}{n}" for split in ("safe", "other") for n in range(len(ids) // 2)
    ]  # the first of each split
    assert f"{100 - len(ids)} of 100 questions" in notes(fewer)


@pytest.mark.parametrize("share", [0.9, 0.3])
def test_write_answers_too_large_for_two_questions_shows_one(tmp_path: Path, share: float) -> None:
    prompts = [prompt("one"), prompt("other")]
    responses = [
        Response(prompt_id=p.id, sample=n, text=f"{p.id} {n} " + "漢" * 100) for p in prompts for n in range(20)
    ]
    run = put_run(tmp_path / "m", prompts, responses, {})
    complete = len(json.dumps(columns(write_answers(tmp_path / "complete", {"m": run}, "t")), separators=(",", ":")))
    page = write_answers(tmp_path / "fewer", {"m": run}, "t", max_bytes=int(share * complete))
    assert len(columns(page)["questions"]["id"]) == 1
    assert "1 of 2 questions" in notes(page)
    assert (" MB" in notes(page)) == (share < 0.5)  # one question alone is too large


def test_write_answers_truncated_verdict_file_is_a_note(tmp_path: Path) -> None:
    prompts = [prompt(f"p{n}") for n in range(3)]
    verdicts = {
        judge: [Verdict(prompt_id=p.id, judge=judge, label="refused") for p in prompts]
        for judge in ("keyword", "other")
    }
    run = put_run(tmp_path / "m", prompts, [Response(prompt_id=p.id, text="a") for p in prompts], verdicts)
    file = run / "verdicts-other.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    page = write_answers(tmp_path / "out", {"m": run}, "t")
    keyword, other = columns(page)["verdicts"]
    assert [STATES[state] for state in keyword["state"]] == ["refused"] * 3
    assert [STATES[state] for state in other["state"]] == ["refused", "refused", "none"]
    assert "2 verdicts of the judge other" in notes(page)
    assert str(file) in notes(page)


def test_write_answers_folder_without_evaluation_raises(tmp_path: Path) -> None:
    with raises_code("run-not-found", file=tmp_path):
        write_answers(tmp_path / "out", {"m": tmp_path}, "t")


def test_write_answers_reports_progress(tmp_path: Path) -> None:
    progress: list[tuple[str, int, int]] = []
    write_answers(tmp_path / "out", make_example_runs(tmp_path), "t", lambda *arguments: progress.append(arguments))
    assert progress == [("images", 1, 3), ("images", 2, 3), ("images", 3, 3)]
