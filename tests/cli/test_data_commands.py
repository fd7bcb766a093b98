"""The data commands, and the page of the documentation that leads from a CSV to a training set."""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from helpers import error_code
from helpers import run_in_process as run

DOCS = Path(__file__).parents[2] / "docs"


def test_commands_of_the_page_on_your_own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs them on the CSV of the page. The page shows their output."""
    page = (DOCS / "your-own-data.md").read_text()
    table = re.search(r"```csv\n(.*?)```", page, re.DOTALL)
    assert table
    (tmp_path / "pairs.csv").write_text(table.group(1))
    for row in csv.DictReader(io.StringIO(table.group(1))):
        if row["image"]:
            (tmp_path / "images").mkdir(exist_ok=True)
            Image.new("RGB", (32, 32), "red").save(tmp_path / "images" / row["image"])
    monkeypatch.chdir(tmp_path)
    commands = [line for line in page.splitlines() if line.startswith("vlm-unlearn data ")]
    assert len(commands) == 3
    output = ""
    for line in commands:
        done = run(*shlex.split(line)[1:])
        assert done.returncode == 0, done.stderr
        output += done.stdout
    assert "data/mine: forget 2, retain 3, 1 of them text only" in output
    assert "data/mine: forget 2, retain 3, 1 of them text only" in page
    assert (tmp_path / "audit.html").exists()


@pytest.fixture
def vlguard(world: Path) -> Path:
    return world / "vlguard"


JsonOf = Callable[..., dict]


@pytest.fixture
def json_of() -> JsonOf:
    """A function that runs a data command with --json and returns its document."""

    def call(*arguments: object) -> dict:
        done = run("data", *arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return call


def test_published_steps_equal_import(vlguard: Path, world: Path, tmp_path: Path, json_of: JsonOf) -> None:
    """inject, split, mix and import give the same training set as `import vlguard`."""
    injected, out = tmp_path / "injected.json", tmp_path / "sets"
    json_of("inject", vlguard / "train.json", vlguard / "harmful_answers.json", injected)
    counts = json_of("split", injected, out)
    general = world / "general" / "general.json"
    json_of("mix", out / "retain.json", general, out / "mixed.json", "--size", 50)
    json_of("to-rmu", out / "forget.json", out / "rmu.json")
    arguments = [
        "import",
        "vlguard",
        vlguard / "train.json",
        "--images",
        vlguard / "train",
        "--external",
        general,
        "--retain-size",
        50,
    ]
    imported = json_of(
        *arguments, "--harmful-answers", vlguard / "harmful_answers.json", "--out", tmp_path / "imported"
    )
    assert imported["counts"] == {"forget": counts["forget"], "retain": 50, "preferred": counts["forget"]}

    def pairs(folder: Path, role: str) -> list[tuple[str, str]]:
        lines = (folder / f"{role}.jsonl").read_text().splitlines()
        return [(record["question"], record["answer"]) for record in map(json.loads, lines)]

    mixed = [
        (record["conversations"][0]["value"].removeprefix("<image>"), record["conversations"][1]["value"])
        for record in json.loads((out / "mixed.json").read_text())
    ]
    assert mixed == pairs(tmp_path / "imported", "retain"), "same samples, same order"
    forget = [
        (record["conversations"][0]["value"].removeprefix("<image>"), record["conversations"][1]["value"])
        for record in json.loads((out / "forget.json").read_text())
    ]
    assert forget == pairs(tmp_path / "imported", "forget")


def test_answers_on_safe_images_take_the_same_road(vlguard: Path, tmp_path: Path, json_of: JsonOf) -> None:
    """select-harmful, inject and split give the forget set of `import vlguard --safe-image-answers`."""
    train = vlguard / "train.json"
    images = [record["image"] for record in json.loads(train.read_text()) if record["safe"]]
    answers = tmp_path / "safe-unsafes" / "llava.json"
    answers.parent.mkdir()
    answers.write_text(json.dumps({image: f"do it like {number} ." for number, image in enumerate(images[1:])}))
    chosen = tmp_path / "chosen.json"
    judge = ["--server", "http://localhost:9/v1", "--model", "unused"]  # no question has two answers
    selected = json_of("select-harmful", train, answers.parent, "--safe-images", *judge, "--out", chosen)
    assert selected["outcomes"] == {"only answer": len(images) - 1, "no answer": 1}
    harmful = vlguard / "harmful_answers.json"
    injected = json_of("inject", train, harmful, tmp_path / "injected.json", "--safe-image-answers", chosen)
    assert injected["injected"] == len(json.loads(harmful.read_text())) + len(images) - 1
    assert injected["no harmful answer"] == 1
    json_of("split", tmp_path / "injected.json", tmp_path / "sets", "--include-safe-image-unsafe")
    options = ["--harmful-answers", harmful, "--safe-image-answers", chosen, "--images", vlguard / "train"]
    imported = json_of("import", "vlguard", train, *options, "--out", tmp_path / "set")
    assert imported["left_out"] == {"no harmful answer": 1}
    forget = [json.loads(line) for line in (tmp_path / "set" / "forget.jsonl").read_text().splitlines()]
    split = json.loads((tmp_path / "sets" / "forget.json").read_text())
    assert [example["answer"] for example in forget] == [record["conversations"][1]["value"] for record in split]
    assert sum(example["id"].endswith("/safe_image_unsafe_question") for example in forget) == len(images) - 1


def test_published_inject_warns_about_the_refusals_that_stay(vlguard: Path, tmp_path: Path) -> None:
    answers = tmp_path / "answers.json"
    harmful = json.loads((vlguard / "harmful_answers.json").read_text())
    answers.write_text(json.dumps(dict(list(harmful.items())[2:])))
    done = run("data", "inject", vlguard / "train.json", answers, tmp_path / "out.json", "--paper-compat", "--json")
    counts = json.loads(done.stdout)
    assert counts["no harmful answer"] == 2
    assert "warning: 2 records" in done.stderr
    assert len(json.loads((tmp_path / "out.json").read_text())) == len(json.loads((vlguard / "train.json").read_text()))


def test_diversify_removes_the_predictive_first_words(vlguard: Path, tmp_path: Path, json_of: JsonOf) -> None:
    original = json_of("audit", vlguard / "train.json", "--html", tmp_path / "a.html")
    assert original["first_word"]["leave_one_out_accuracy"] > 0.95
    assert original["triggers"]["answer"] == ["what"]
    assert original["triggers"]["refuse"] == ["share"]
    json_of("diversify", vlguard / "train.json", tmp_path / "b.json", "--words", "what,share")
    diversified = json_of("audit", tmp_path / "b.json")
    assert diversified["first_word"]["leave_one_out_accuracy"] <= diversified["majority_accuracy"]


def test_check_exits_with_1_for_broken_data(vlguard: Path, tmp_path: Path) -> None:
    good = run("data", "check", vlguard / "train.json", "--images", vlguard / "train", "--json")
    assert good.returncode == 0
    assert json.loads(good.stdout)["errors"] == []
    bad = run(
        "data", "check", vlguard / "train.json", "--images", tmp_path, "--json", "--out", tmp_path / "report.json"
    )
    assert bad.returncode == 1
    assert json.loads(bad.stdout)["broken"]["count"] > 0
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(bad.stdout)


def test_missing_columns_answers_and_folders_are_reported(vlguard: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("foto,question,answer,set\nx.png,Q?,I cannot help.,forget\ny.png,R?,B.,retain\n")
    arguments = ["data", "import", "files", tmp_path / "a.csv", "--images", tmp_path, "--out", tmp_path / "set"]
    done = run(*arguments, "--accept-refusals")
    assert done.returncode == 0
    assert "--image-column" in done.stderr
    assert "2 of them text only" in done.stdout
    done = run("data", "check", tmp_path / "set")
    assert "1 of 1 forget answers" in " ".join(done.stdout.split())
    arguments = ["data", "import", "vlguard", vlguard / "train.json", "--images", vlguard / "train"]
    done = run(*arguments, "--out", tmp_path / "v")
    assert (done.returncode, error_code(done)) == (2, "forget-refusals")
    assert "--harmful-answers" in done.stderr
    assert "--accept-refusals" in done.stderr
    assert not (tmp_path / "v").exists()
    assert run(*arguments, "--out", tmp_path / "v", "--accept-refusals").returncode == 0
    done = run("data", "check", tmp_path / "v", "--images", tmp_path / "gone")
    assert done.returncode == 2
    assert error_code(done) == "not-a-folder"
    assert str(tmp_path / "gone") in done.stderr
    done = run("data", "check", tmp_path / "v", "--against", tmp_path / "v" / "retain.jsonl", "--no-images")
    assert done.returncode == 1, "the training set contains the test set"


@pytest.mark.slow
def test_check_against_the_test_set_counts_tokens(vlguard: Path, tiny_model: Path) -> None:
    done = run(
        *("data", "check", vlguard / "train.json", "--images", vlguard / "train"),
        *(
            "--against",
            vlguard / "test.json",
            "--against-images",
            vlguard / "test",
            "--processor",
            tiny_model,
            "--max-length",
            128,
        ),
    )
    assert done.returncode == 0, done.stderr
    assert "test:forget" in done.stdout
    assert "tokens" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "tokens"),
    [
        (["audit", "{v}/train.json", "--label", "words"], ["--label", '"words"', "[unknown-name]"]),
        (["audit", "{v}/gone.json"], ["gone.json"]),
        (["convert", "{v}/train.json", "{v}/train.json"], ["train.json", "[output-exists]"]),
        (["inject", "{v}/train.json", "{v}/train.json", "{t}/out.json"], ["train.json"]),
        (
            ["import", "files", "--forget", "{v}/train.json", "--images", "{v}", "--out", "{t}/o"],
            ["--retain", "[missing-setting]"],
        ),
        (
            ["import", "files", "{v}/a.csv", "--forget", "{v}/train.json", "--images", "{v}", "--out", "{t}/o"],
            ["TABLE", "[conflicting-settings]"],
        ),
        (
            ["select-harmful", "{v}/train.json", "{v}/harmful_answers.json", "--out", "{t}/o.json"],
            ["--model", "[missing-setting]"],
        ),
        (["diversify", "{v}/train.json", "{t}/o.json", "--server", "http://x"], ["--model", "[missing-setting]"]),
        (["mix", "{v}/train.json", "{v}/train.json", "{t}/o.json"], ["train.json", "[no-records]"]),
    ],
)
def test_invalid_request_is_one_line_and_writes_nothing(
    vlguard: Path, tmp_path: Path, arguments: list[str], tokens: list[str]
) -> None:
    content = (vlguard / "train.json").read_bytes()
    done = run("data", *(argument.format(v=vlguard, t=tmp_path) for argument in arguments))
    assert done.returncode == 2
    *progress, error = done.stderr.strip().splitlines()
    assert not [token for token in tokens if token not in error], error
    assert error_code(done)
    assert all(line == "read (MB)" or "skipped" in line for line in progress)
    assert list(tmp_path.iterdir()) == []
    assert (vlguard / "train.json").read_bytes() == content


def test_broken_records_are_listed_on_standard_error(vlguard: Path, tmp_path: Path) -> None:
    records = json.loads((vlguard / "train.json").read_text())
    records[1]["instr-resp"] = []
    (tmp_path / "in.json").write_text(json.dumps(records))
    done = run("data", "convert", tmp_path / "in.json", tmp_path / "out.json", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["broken"] == 1
    assert "skipped: " in done.stderr
    assert "in.json, record 2 (line 1" in done.stderr
    done = run("data", "convert", tmp_path / "in.json", tmp_path / "strict.json", "--strict")
    assert done.returncode == 2
    assert not (tmp_path / "strict.json").exists()


def test_outputs_never_overwrite_inputs(world: Path, training_sets: dict[str, Path], tmp_path: Path) -> None:
    vlguard = world / "vlguard"
    for name, source in {
        "dataset.json": vlguard / "train.json",
        "retain.json": vlguard / "train.json",
        "a.json": vlguard / "train.json",
    }.items():
        (tmp_path / name).write_bytes(source.read_bytes())
    (tmp_path / "b.choices.jsonl").write_text("{}")
    (tmp_path / "refusals.json").write_text('{"idk": ["No."]}')
    (tmp_path / "linked.json").symlink_to(tmp_path / "a.json")
    contents = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    images = ["--images", vlguard / "train"]
    both = ["--forget", vlguard / "train.json", "--retain", vlguard / "train.json"]
    for arguments in (
        ["import", "vlguard", tmp_path / "dataset.json", *images, "--out", tmp_path],
        ["import", "files", *both, *images, "--refusals", tmp_path / "refusals.json", "--out", tmp_path],
        ["split", tmp_path / "retain.json", tmp_path],
        ["convert", tmp_path / "a.json", tmp_path / "linked.json"],
        ["audit", tmp_path / "a.json", "--html", tmp_path / "a.json"],
        ["check", tmp_path / "a.json", "--out", tmp_path / "a.json"],
        [
            "select-harmful",
            vlguard / "train.json",
            tmp_path / "b.choices.jsonl",
            "--model",
            "m",
            "--out",
            tmp_path / "b.json",
        ],
        ["diversify", tmp_path / "a.json", tmp_path / "a.json"],
    ):
        done = run("data", *arguments)
        assert done.returncode == 2, arguments
        assert error_code(done) == "output-exists"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == contents


@pytest.mark.parametrize("out", ["", ".", "..", "/", "/dev/null", "{t}", "{t}/" + "x" * 300 + ".json"])
def test_odd_output_is_an_error_in_one_line(vlguard: Path, tmp_path: Path, out: str) -> None:
    for arguments in (["convert", vlguard / "train.json"], ["diversify", vlguard / "train.json"]):
        done = run("data", *arguments, out.format(t=tmp_path))
        assert done.returncode == 2
        assert "--debug" not in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
    assert Path("/dev/null").is_char_device()


@pytest.mark.slow
def test_unreachable_server_fails(vlguard: Path, tmp_path: Path) -> None:
    done = run(
        "data",
        "diversify",
        vlguard / "train.json",
        tmp_path / "out.json",
        "--server",
        "http://127.0.0.1:9/v1",
        "--model",
        "m",
        "--no-cache",
    )
    assert done.returncode == 1
    assert "http://127.0.0.1:9/v1" in done.stderr
    assert not (tmp_path / "out.json").exists()
