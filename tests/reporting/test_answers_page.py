"""What goes into the page of all answers, and what it says when something can't."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from answer_runs import JUDGES, asked, label_of, made_runs, put_run
from benchmark_files import put_image, vqav2
from finished_runs import make_run, number, unlearned
from helpers import raises_code
from vlm_unlearn.evaluation.generate import saved_suite
from vlm_unlearn.evaluation.scoring import build_row, read_graded_run
from vlm_unlearn.records import Prompt, Response, Verdict
from vlm_unlearn.reporting.answers.answers_page import STATES, write_answers
from vlm_unlearn.reporting.answers.thumbnails import MAX_IMAGE_SIDE, delete_other_thumbnails, write_thumbnails
from vlm_unlearn.store import write_records


def columns(page: Path) -> dict[str, Any]:
    """The data that the page's script reads."""
    found = re.search(
        r'<script type="application/json" id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL
    )
    assert found is not None
    return json.loads(found.group(1))


def texts(data: dict[str, Any], places: list[int]) -> list[str | None]:
    return [None if place < 0 else data["texts"][place] for place in places]


def prompt(id: str = "p", **fields: Any) -> Prompt:
    return Prompt(**{"id": id, "group_id": id, "set": "safe", "kind": "safe", "question": f"{id}?", **fields})


def shown_text(page: Path) -> str:
    """What stands in the page without its script."""
    return page.read_text(encoding="utf-8").split('<script type="application/json"')[0]


def test_every_answer_and_verdict_is_there(tmp_path: Path) -> None:
    page = write_answers(tmp_path / "out", made_runs(tmp_path), "All")
    data = columns(page)
    prompts = asked()
    assert page == tmp_path / "out" / "report" / "answers.html"
    assert texts(data, data["questions"]["id"]) == [one.id for one in prompts]
    rows = list(
        zip(data["answers"]["question"], data["answers"]["model"], texts(data, data["answers"]["text"]), strict=True)
    )
    models = texts(data, data["models"])
    assert rows == [
        (n, m, f"Answer {n} of {models[m]} to {p.id}, Überall.") for n, p in enumerate(prompts) for m in range(3)
    ]
    assert texts(data, data["judges"]) == list(JUDGES)
    for judge, given in zip(JUDGES, data["verdicts"], strict=True):
        told = [STATES[state] for state in given["state"]]
        assert told == [label_of(str(models[m]), n, judge) or "failed" for n, m, _ in rows]
        assert set(texts(data, given["error"])) == {None, "timed out"}


def test_labels_are_counted_as_in_the_rates(tmp_path: Path) -> None:
    """What the report's bars say of a case is what a link into this page finds."""
    folder = make_run(tmp_path / "m", lambda one: None if number(one) == 3 else unlearned(one))
    row = build_row(read_graded_run(folder, saved_suite(folder)), "m")
    data = columns(write_answers(tmp_path / "out", {"m": folder}, "t"))
    cases = texts(data, data["questions"]["case"])
    own = [data["verdicts"][judge]["state"][n] for n, judge in enumerate(data["answers"]["judge"])]
    counted = Counter((cases[q], STATES[state]) for q, state in zip(data["answers"]["question"], own, strict=True))
    assert counted == {
        (case, label): count for case, labels in row.labels.items() for label, count in labels.items() if count
    }
    assert {label for _, label in counted} == {"complied", "refused", "failed"}


def test_samples_scores_and_failures_are_told_apart(tmp_path: Path) -> None:
    one, other = prompt("one"), prompt("other")
    responses = [
        Response(prompt_id="one", sample=1, text="second", finish_reason="length"),
        Response(prompt_id="one", sample=0, text="first"),
        Response(prompt_id="other", error="cut off"),
    ]
    verdicts = {
        "keyword": [Verdict(prompt_id="one", sample=1, judge="keyword", label="refused", raw="cannot")],
        "rouge_l": [Verdict(prompt_id="one", judge="rouge_l", score=0.25)],
    }
    data = columns(
        write_answers(tmp_path / "out", {"m": put_run(tmp_path / "m", [one, other], responses, verdicts)}, "t")
    )
    assert data["answers"]["sample"] == [0, 1, 0]
    assert texts(data, data["answers"]["finish"]) == [None, "length", None]
    assert texts(data, data["answers"]["error"]) == [None, None, "cut off"]
    keyword, rouge = data["verdicts"]
    assert [STATES[state] for state in keyword["state"]] == [
        "none",
        "refused",
        "failed",
    ]  # an answer that failed has failed, judged or not
    assert texts(data, keyword["raw"]) == [None, "cannot", None]
    assert [STATES[state] for state in rouge["state"]] == ["score", "none", "none"]
    assert rouge["score"] == [0.25, None, None]


def test_runs_with_other_prompts_are_all_there(tmp_path: Path) -> None:
    shared = prompt("shared")

    def run(name: str, prompts: list[Prompt]) -> Path:
        return put_run(tmp_path / name, prompts, [Response(prompt_id=one.id, text=one.id) for one in prompts], {})

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


def test_an_image_that_changed_makes_another_question(tmp_path: Path) -> None:
    seen = prompt("seen", image="a.png")
    runs = {}
    for color, name in enumerate("abc"):
        runs[name] = put_run(tmp_path / name / "run", [seen], [Response(prompt_id="seen", text=name)], {})
        if color < 2:
            put_image(tmp_path / name / "images" / "a.png", color=color)
    assert columns(write_answers(tmp_path / "two", {"a": runs["a"], "b": runs["b"]}, "t"))["answers"]["question"] == [
        0,
        1,
    ]
    lost = write_answers(
        tmp_path / "one", {"c": runs["c"], "a": runs["a"]}, "t"
    )  # c's image is gone: it was the same for all we know
    assert columns(lost)["answers"]["question"] == [0, 0]
    assert columns(lost)["pictures"][0][1:3] == [32, 32]
    assert "without their image" not in shown_text(lost)


def test_benchmarks_have_their_own_scores(tmp_path: Path) -> None:
    fields = vqav2(tmp_path)
    prompts = [
        prompt(f"vqav2/{n}", set="vqav2", question=f"how many in {n} ?", image=f"COCO_val2014_{40 + n // 2:012d}.jpg")
        for n in range(4)
    ]
    responses = [Response(prompt_id=one.id, text="3" if n < 2 else "no") for n, one in enumerate(prompts)]
    run = put_run(tmp_path / "run", prompts, responses, {}, benchmarks=[{"name": "vqav2", **fields}])
    page = write_answers(tmp_path / "out", {"m": run}, "t")
    data = columns(page)
    assert texts(data, data["judges"]) == ["vqav2's own scores"]
    assert data["verdicts"][0]["score"] == [1.0, 1.0, 0.0, 0.0]
    assert "stand without" not in shown_text(page)
    (tmp_path / str(fields["annotations"])).unlink()
    page = write_answers(tmp_path / "out", {"m": run}, "t")
    assert [STATES[state] for state in columns(page)["verdicts"][0]["state"]] == ["none"] * 4
    assert "answers to vqav2 stand without their scores" in shown_text(page)


def test_images_are_made_anew_and_kept_once(tmp_path: Path) -> None:
    """What is appended to a picture, or written into it as a comment, doesn't come along."""
    source = tmp_path / "images"
    source.mkdir()
    large = Image.effect_noise((900, 600), 80)
    large.save(source / "photo.jpg", comment=b"<script>hidden</script>")
    (source / "photo.jpg").write_bytes((source / "photo.jpg").read_bytes() + b"<script>appended</script>")
    (source / "again.jpg").write_bytes((source / "photo.jpg").read_bytes())
    put_image(source / "icon.png")
    out = tmp_path / "out"
    found = write_thumbnails(
        out, [(source, "photo.jpg"), (source, "again.jpg"), (source, "icon.png"), (source, "photo.jpg")]
    )
    assert [picture.problem for picture in found.values()] == ["", "", ""]
    photo, again, icon = found.values()
    assert photo == again
    assert (photo.width, photo.height) == (MAX_IMAGE_SIDE, 213)
    assert (photo.file[-4:], icon.file[-4:]) == (".jpg", ".png")
    assert sorted(file.name for file in out.iterdir()) == sorted({photo.file, icon.file})
    assert b"script" not in (out / photo.file).read_bytes()
    (out / icon.file).write_bytes(b"")
    assert write_thumbnails(out, [(source, "icon.png")])[source, "icon.png"] == icon  # a damaged one is made anew
    made = (out / photo.file).stat().st_mtime_ns
    assert write_thumbnails(out, [(source, "photo.jpg")])[source, "photo.jpg"] == photo
    assert (out / photo.file).stat().st_mtime_ns == made
    for name in (f".{'0' * 32}.png.part", "mine.png"):
        (out / name).write_text("left by a kill, and somebody's")
    delete_other_thumbnails(out, [photo])
    assert sorted(file.name for file in out.iterdir()) == sorted(
        [photo.file, "mine.png"]
    )  # what nobody asks for any more goes


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ("gone.png", "not found"),
        ("../secret.png", "outside the image folder"),
        ("text.png", "is not an image"),
        ("empty.png", "is an empty file"),
        ("<script>\u202e\x00.png", "is not a path"),
    ],
)
def test_an_image_that_cannot_be_shown_is_a_note(tmp_path: Path, image: str, reason: str) -> None:
    put_image(tmp_path / "secret.png")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "text.png").write_text("<svg onload=alert(1)>")
    (tmp_path / "images" / "empty.png").touch()
    run = put_run(tmp_path / "m", [prompt(image=image)], [Response(prompt_id="p", text="still here")], {})
    page = write_answers(tmp_path / "out", {"m": run}, "t")
    data = columns(page)
    assert "still here" in data["texts"]
    [[file, _, _, problem]] = data["pictures"]
    assert file == ""
    assert reason in data["texts"][problem]
    assert "1 question stands without its image" in shown_text(page)
    assert "<script>\u202e" not in shown_text(page)
    assert list((tmp_path / "out" / "report" / "images").iterdir()) == []


def test_pictures_from_elsewhere_are_told_and_the_whole_disk_is_refused(tmp_path: Path) -> None:
    """A run that somebody sent may name any folder of the reader's as its images."""
    put_image(tmp_path / "private" / "a.png")
    run = put_run(tmp_path / "sent" / "m", [prompt(image="a.png")], [Response(prompt_id="p", text="x")], {})
    suite = json.loads((run / "suite.json").read_text())
    suite["splits"][0]["images"] = str(tmp_path / "private")
    (run / "suite.json").write_text(json.dumps(suite))
    page = write_answers(tmp_path / "out", {"m": run}, "t")
    assert f"Small copies of pictures in {tmp_path / 'private'} are in this report (1)" in shown_text(page)
    put_image(tmp_path / "sent" / "images" / "a.png")
    suite["splits"][0]["images"] = str(tmp_path / "sent" / "images")
    (run / "suite.json").write_text(json.dumps(suite))
    assert "Small copies" not in shown_text(write_answers(tmp_path / "out", {"m": run}, "t"))
    suite["splits"][0]["images"] = "/"
    (run / "suite.json").write_text(json.dumps(suite))
    named = [prompt(image=str(tmp_path / "private" / "a.png")[1:])]
    write_records(run / "prompts.jsonl", named)
    data = columns(write_answers(tmp_path / "out", {"m": run}, "t"))
    assert data["pictures"][0][0] == ""
    assert "names the whole disk" in data["texts"][data["pictures"][0][3]]


def test_too_much_is_cut_and_said(tmp_path: Path) -> None:
    prompts = [prompt(f"{case}{n}", set=case) for case in ("safe", "other") for n in range(50)]
    run = put_run(tmp_path / "m", prompts, [Response(prompt_id=p.id, text=p.id + " word" * 5000) for p in prompts], {})
    whole = write_answers(tmp_path / "whole", {"m": run}, "t")
    assert columns(whole)["cut"] == {}
    assert "too much for one page" not in shown_text(whole)
    cut = write_answers(tmp_path / "cut", {"m": run}, "t", most_bytes=500_000)
    assert len(columns(cut)["cut"]) == 100
    assert len(columns(cut)["questions"]["id"]) == 100
    assert "100 texts of more than 4,000 characters are cut" in shown_text(cut)
    fewer = write_answers(tmp_path / "fewer", {"m": run}, "t", most_bytes=50_000)
    data = columns(fewer)
    kept = texts(data, data["questions"]["id"])
    assert len(json.dumps(data, separators=(",", ":"))) <= 50_000
    assert 20 < len(kept) < 50
    assert kept == [f"{case}{n}" for case in ("safe", "other") for n in range(len(kept) // 2)]  # of each case the first
    assert f"{100 - len(kept)} of 100 questions are left out" in shown_text(fewer)


@pytest.mark.parametrize(("share", "kept"), [(0.9, 1), (0.3, 1)])
def test_questions_of_many_samples_are_left_out_until_one_is_left(tmp_path: Path, share: float, kept: int) -> None:
    prompts = [prompt("one"), prompt("other")]
    responses = [
        Response(prompt_id=one.id, sample=n, text=f"{one.id} {n} " + "漢" * 100) for one in prompts for n in range(20)
    ]
    run = put_run(tmp_path / "m", prompts, responses, {})
    whole = len(json.dumps(columns(write_answers(tmp_path / "whole", {"m": run}, "t")), separators=(",", ":")))
    page = write_answers(tmp_path / "fewer", {"m": run}, "t", most_bytes=int(share * whole))
    assert len(columns(page)["questions"]["id"]) == kept
    assert "1 of 2 questions are left out" in shown_text(page)
    assert ("may open slowly" in shown_text(page)) == (share < 0.5)


def test_a_judge_that_was_killed_is_a_note(tmp_path: Path) -> None:
    prompts = [prompt(f"p{n}") for n in range(3)]
    given = {
        judge: [Verdict(prompt_id=one.id, judge=judge, label="refused") for one in prompts]
        for judge in ("keyword", "other")
    }
    run = put_run(tmp_path / "m", prompts, [Response(prompt_id=one.id, text="a") for one in prompts], given)
    file = run / "verdicts-other.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    page = write_answers(tmp_path / "out", {"m": run}, "t")
    keyword, other = columns(page)["verdicts"]
    assert [STATES[state] for state in keyword["state"]] == ["refused"] * 3
    assert [STATES[state] for state in other["state"]] == ["refused", "refused", "none"]
    assert "m: of the judge other 2 verdicts are shown; the rest of its file can&#39;t be read:" in shown_text(page)


def test_what_is_no_evaluation_is_refused(tmp_path: Path) -> None:
    with raises_code("run-not-found", file=tmp_path):
        write_answers(tmp_path / "out", {"m": tmp_path}, "t")


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    write_answers(
        tmp_path / "out", made_runs(tmp_path), "t", lambda stage, done, total: told.append((stage, done, total))
    )
    assert told == [("images", 1, 3), ("images", 2, 3), ("images", 3, 3)]
