"""The data commands as a user types them, and the page that takes a user from a CSV to a training set."""

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

from helpers import error_code, run

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_on_your_own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its CSV and its data commands, and what they say there."""
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
    said = ""
    for line in commands:
        done = run(*shlex.split(line)[1:])
        assert done.returncode == 0, done.stderr
        said += done.stdout
    assert "data/mine: forget 2, retain 3, 1 of them text only" in said
    assert "data/mine: forget 2, retain 3, 1 of them text only" in page
    assert (tmp_path / "audit.html").exists()


@pytest.fixture
def vlguard(world: Path) -> Path:
    return world / "vlguard"


Said = Callable[..., dict]


@pytest.fixture
def said() -> Said:
    """Runs a command with --json; its one document."""

    def call(*arguments: object) -> dict:
        done = run("data", *arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return call


def test_the_published_road_step_by_step(vlguard: Path, world: Path, tmp_path: Path, said: Said) -> None:
    """inject, split, mix, import give the training set that `import vlguard` gives in one go."""
    injected, out = tmp_path / "injected.json", tmp_path / "sets"
    said("inject", vlguard / "train.json", vlguard / "harmful_answers.json", injected)
    counts = said("split", injected, out)
    general = world / "general" / "general.json"
    said("mix", out / "retain.json", general, out / "mixed.json", "--size", 50)
    said("rmu", out / "forget.json", out / "rmu.json")
    whole = [
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
    in_one_go = said(*whole, "--harmful-answers", vlguard / "harmful_answers.json", "--out", tmp_path / "one")
    assert in_one_go["counts"] == {"forget": counts["forget"], "retain": 50, "preferred": counts["forget"]}

    def pairs(folder: Path, role: str) -> list[tuple[str, str]]:
        lines = (folder / f"{role}.jsonl").read_text().splitlines()
        return [(record["question"], record["answer"]) for record in map(json.loads, lines)]

    mixed = [
        (record["conversations"][0]["value"].removeprefix("<image>"), record["conversations"][1]["value"])
        for record in json.loads((out / "mixed.json").read_text())
    ]
    assert mixed == pairs(tmp_path / "one", "retain"), "same draws, same order"
    forget = [
        (record["conversations"][0]["value"].removeprefix("<image>"), record["conversations"][1]["value"])
        for record in json.loads((out / "forget.json").read_text())
    ]
    assert forget == pairs(tmp_path / "one", "forget")


def test_audit_and_diversify(vlguard: Path, tmp_path: Path, said: Said) -> None:
    before = said("audit", vlguard / "train.json", "--html", tmp_path / "a.html")
    assert before["first_word"]["leave_one_out_accuracy"] > 0.95
    assert before["triggers"]["answer"] == ["what"]
    assert before["triggers"]["refuse"] == ["share"]
    said("diversify", vlguard / "train.json", tmp_path / "b.json", "--words", "what,share")
    after = said("audit", tmp_path / "b.json")
    assert after["first_word"]["leave_one_out_accuracy"] <= after["majority_accuracy"]


def test_check_exits_with_1_on_errors(vlguard: Path, tmp_path: Path) -> None:
    good = run("data", "check", vlguard / "train.json", "--images", vlguard / "train", "--json")
    assert good.returncode == 0
    assert json.loads(good.stdout)["errors"] == []
    bad = run(
        "data", "check", vlguard / "train.json", "--images", tmp_path, "--json", "--out", tmp_path / "report.json"
    )
    assert bad.returncode == 1
    assert json.loads(bad.stdout)["broken"]["count"] > 0
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(bad.stdout)


def test_what_a_new_user_forgets(vlguard: Path, tmp_path: Path) -> None:
    """The image column's name, the harmful answers, the image folder."""
    (tmp_path / "a.csv").write_text("foto,question,answer,set\nx.png,Q?,I cannot help.,forget\ny.png,R?,B.,retain\n")
    done = run("data", "import", "files", tmp_path / "a.csv", "--images", tmp_path, "--out", tmp_path / "set")
    assert done.returncode == 0
    assert "pass --image-column" in done.stderr
    assert "2 of them text only" in done.stdout
    done = run("data", "check", tmp_path / "set")
    assert "1 of 1 forget answers decline" in " ".join(done.stdout.split())
    done = run(
        "data", "import", "vlguard", vlguard / "train.json", "--images", vlguard / "train", "--out", tmp_path / "v"
    )
    assert "pass --harmful-answers" in done.stderr
    done = run("data", "check", tmp_path / "v", "--images", tmp_path / "gone")
    assert done.returncode == 2
    assert error_code(done) == "not-a-folder"
    done = run("data", "check", tmp_path / "v", "--against", tmp_path / "v" / "retain.jsonl", "--no-images")
    assert done.returncode == 1, "the test set is in the training set"


def test_check_against_the_test_set(vlguard: Path, tiny_model: Path) -> None:
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
    ("arguments", "message"),
    [
        (["audit", "{v}/train.json", "--label", "words"], "use auto, set or answer"),
        (["audit", "{v}/gone.json"], "no such file"),
        (["convert", "{v}/train.json", "{v}/train.json"], "is an input too"),
        (["inject", "{v}/train.json", "{v}/train.json", "{t}/out.json"], "expected an object, image -> answer"),
        (
            ["import", "files", "--forget", "{v}/train.json", "--images", "{v}", "--out", "{t}/o"],
            "both --forget and --retain",
        ),
        (["select-harmful", "{v}/train.json", "{v}/harmful_answers.json", "--out", "{t}/o.json"], "pass --model"),
        (["diversify", "{v}/train.json", "{t}/o.json", "--server", "http://x"], "pass --model"),
        (["mix", "{v}/train.json", "{v}/train.json", "{t}/o.json"], "[no-records]"),
    ],
)
def test_wrong_requests(vlguard: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    before = (vlguard / "train.json").read_bytes()
    done = run("data", *(argument.format(v=vlguard, t=tmp_path) for argument in arguments))
    assert done.returncode == 2
    *before_it, last = done.stderr.strip().splitlines()
    assert message in last
    assert all(line == "read (MB)" or "left out" in line for line in before_it)
    assert list(tmp_path.iterdir()) == []
    assert (vlguard / "train.json").read_bytes() == before


def test_broken_records_are_listed_on_standard_error(vlguard: Path, tmp_path: Path) -> None:
    records = json.loads((vlguard / "train.json").read_text())
    records[1]["instr-resp"] = []
    (tmp_path / "in.json").write_text(json.dumps(records))
    done = run("data", "convert", tmp_path / "in.json", tmp_path / "out.json", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["broken"] == 1
    assert "in.json, record 2 (line 1" in done.stderr
    done = run("data", "convert", tmp_path / "in.json", tmp_path / "strict.json", "--strict")
    assert done.returncode == 2
    assert not (tmp_path / "strict.json").exists()


def test_no_input_is_written_over(world: Path, training_sets: dict[str, Path], tmp_path: Path) -> None:
    """Whatever the command calls its outputs."""
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
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
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
        assert "is an input too" in done.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("out", ["", ".", "..", "/", "/dev/null", "{t}", "{t}/" + "x" * 300 + ".json"])
def test_odd_outputs_are_one_clear_line(vlguard: Path, tmp_path: Path, out: str) -> None:
    for arguments in (["convert", vlguard / "train.json"], ["diversify", vlguard / "train.json"]):
        done = run("data", *arguments, out.format(t=tmp_path))
        assert done.returncode == 2
        assert "--debug" not in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
    assert Path("/dev/null").is_char_device()


def test_a_dead_server_is_a_failure(vlguard: Path, tmp_path: Path) -> None:
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
    assert "is the server up?" in done.stderr
    assert not (tmp_path / "out.json").exists()
