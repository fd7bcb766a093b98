"""A wrong request is one clear line and exit code 2, and nothing is half-written."""

from __future__ import annotations

import errno
import json
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from helpers import command
from vlm_unlearn.cli import main as cli
from vlm_unlearn.tiny_world.lexicon import vocabulary


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs the command in this process; returns exit code, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["vlm-unlearn", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def one_line(err: str) -> str:
    lines = [line for line in err.splitlines() if line.startswith("vlm-unlearn: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


@pytest.fixture
def broken(world: Path, training_sets: dict[str, Path], tiny_model: Path, tmp_path: Path) -> dict[str, list[object]]:
    """Wrong requests, by name."""
    vlguard = world / "vlguard"
    records = json.loads((vlguard / "train.json").read_text())
    imports: dict[str, str] = {
        "missing image": json.dumps([{**records[0], "image": "gone.png"}]),
        "image leaves the root": json.dumps([{**records[0], "image": "../test/x.png"}]),
        "broken JSON": '[\n{"id": "a"},\n{"id" "b"}\n]',
        "empty forget set": json.dumps([record for record in records if record["safe"]]),
    }
    found: dict[str, list[object]] = {}
    for name, text in imports.items():
        file = tmp_path / f"{name}.json"
        file.write_text(text)
        found[name] = ["data", "import", "vlguard", file, "--images", vlguard / "train", "--out", tmp_path / "out"]
    empty = Path(shutil.copytree(training_sets["harmful"], tmp_path / "empty"))
    (empty / "forget.jsonl").write_text("")
    bare = tmp_path / "bare-model"
    bare.mkdir()
    shutil.copy(tiny_model / "config.json", bare)

    def train(*changes: object) -> list[object]:
        return [
            "train",
            "tiny/npo",
            f"model={tiny_model}",
            f"data={training_sets['harmful']}",
            f"output={tmp_path / 'out'}",
            *changes,
        ]

    truncated, deeper, no_tokenizer = (
        Path(shutil.copytree(tiny_model, tmp_path / name)) for name in ("truncated", "deeper", "untokenized")
    )
    (truncated / "model.safetensors").write_bytes((truncated / "model.safetensors").read_bytes()[:500])
    config = json.loads((deeper / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 5
    config["text_config"].pop("layer_types", None)
    (deeper / "config.json").write_text(json.dumps(config))
    (no_tokenizer / "tokenizer.json").write_text("[]")
    dates = tmp_path / "dates.yaml"
    dates.write_text("name: 2024-99-99")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "mine.txt").write_text("mine")
    found |= {
        "truncated weights": train(f"model={truncated}"),
        "missing weights": [
            "evaluate",
            "suites/tiny",
            f"model={deeper}",
            f"root={world}",
            "--out",
            tmp_path / "measured",
        ],
        "broken tokenizer": train(f"model={no_tokenizer}"),
        "infinite rate": train("training.learning_rate=.inf"),
        "too many steps": train("training.max_steps=99999999999999999999"),
        "too many digits": train(f"training.max_steps={'9' * 5000}"),
        "broken date": ["train", dates],
        "foreign folder": train(f"output={foreign}"),
        "NUL in a path": train('output="a\\0b"'),
        "unknown recipe key": train("trainning.seed=1"),
        "unknown method": train("method=npoo"),
        "unknown option": train("method.betta=1"),
        "empty forget file": train(f"data={empty}"),
        "no training set": train(f"data={tmp_path / 'gone'}"),
        "model without weights": train(f"model={bare}"),
        "no model": train(f"model={tmp_path / 'gone'}"),
        "no recipe": ["train", tmp_path / "gone.yaml"],
        "suite without its files": [
            "evaluate",
            "suites/tiny",
            f"model={tiny_model}",
            f"root={tmp_path}",
            "--out",
            tmp_path / "out",
        ],
        "evaluate a model without weights": [
            "evaluate",
            "suites/tiny",
            f"model={bare}",
            f"root={world}",
            "--out",
            tmp_path / "out",
        ],
        "judge an empty folder": ["judge", "run", tmp_path / "gone"],
    }
    return found


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("truncated weights", "model.safetensors: broken weights"),
        ("missing weights", "missing from the weight files"),
        ("broken tokenizer", "the processor cannot be loaded"),
        ("infinite rate", "training.learning_rate: Input should be a finite number"),
        ("too many steps", "training.max_steps: Input should be less than"),
        ("too many digits", "the value is not valid YAML"),
        ("broken date", "dates.yaml: not valid YAML"),
        ("foreign folder", "is not empty and holds no manifest.json"),
        ("NUL in a path", "no file name can have"),
        ("missing image", r'record 1 (line 1, "'),
        ("image leaves the root", "outside the image folder"),
        ("broken JSON", "line 3, column 7"),
        ("empty forget set", "the forget set is empty. Nothing was written."),
        ("unknown recipe key", 'unknown key "trainning"; did you mean "training"?'),
        ("unknown method", 'unknown method "npoo"; did you mean "npo"?; known: dpo, '),
        ("unknown option", 'unknown key "betta"; did you mean "beta"?'),
        ("empty forget file", "forget.jsonl: the forget set is empty"),
        ("no training set", "no such training set"),
        ("model without weights", "no weights (*.safetensors)"),
        ("no model", "model folder not found"),
        ("no recipe", "gone.yaml: No such file"),
        ("suite without its files", "world.json: no such file"),
        ("evaluate a model without weights", "no weights (*.safetensors)"),
        ("judge an empty folder", "suite.json: no such file"),
    ],
)
def test_wrong_requests(broken: dict[str, list[object]], call, tmp_path: Path, name: str, message: str) -> None:
    code, out, err = call(*broken[name])
    assert code == 2
    assert message in one_line(err)
    assert out == ""
    assert not (tmp_path / "out").exists()
    if name == "foreign folder":
        assert [path.name for path in (tmp_path / "foreign").iterdir()] == ["mine.txt"]


def test_a_broken_image_is_refused_before_training(
    call, training_sets: dict[str, Path], tiny_model: Path, world: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(world.parent, tmp_path / "copy")) / "world"
    data = tmp_path / "data"
    assert (
        call(
            "data",
            "import",
            "vlguard",
            copy / "vlguard" / "train.json",
            "--images",
            copy / "vlguard" / "train",
            "--out",
            data,
        )[0]
        == 0
    )
    next((copy / "vlguard" / "train").rglob("*.png")).write_text("<svg/>")
    code, _, err = call("train", "tiny/mixed_sft", f"model={tiny_model}", f"data={data}", f"output={tmp_path / 'out'}")
    assert code == 2
    assert "[invalid-image]" in one_line(err)
    assert not (tmp_path / "out").exists()


def test_debug_shows_the_traceback(call, tmp_path: Path) -> None:
    code, _, err = call("--debug", "train", tmp_path / "gone.yaml")
    assert code == 2
    assert "Traceback" in err


def test_debug_shows_what_nobody_expected(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(*_: object, **__: object) -> None:
        raise ZeroDivisionError("in the depths")

    monkeypatch.setattr("vlm_unlearn.reporting.summaries.join_summaries", unexpected)
    code, _, err = call("table", tmp_path)
    assert (code, "vlm-unlearn --debug" in one_line(err)) == (1, True)
    code, _, err = call("--debug", "table", tmp_path)
    assert code == 1
    assert "Traceback" in err
    assert ", in unexpected" in err


def test_nothing_of_a_file_reaches_the_terminal_raw(call, tmp_path: Path) -> None:
    (tmp_path / "suite.json").write_text(json.dumps({"\x1b[31mevil\x1b[0m": 1, "model": "m"}))
    (tmp_path / "manifest.json").write_text("{}")
    code, _, err = call("score", tmp_path)
    assert code == 2
    assert "\x1b" not in err
    assert "\\x1b[31mevil" in one_line(err)


def test_a_full_disk_is_told(call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("vlm_unlearn.reporting.summaries.join_summaries", full)
    code, _, err = call("table", tmp_path)
    assert (code, "the disk of the output or of the temporary folder: No space left" in one_line(err)) == (1, True)


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_end_nothing(closed: str) -> None:
    line = f"{shlex.join(command('methods'))} {closed}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_json_is_the_only_output(call, tmp_path: Path) -> None:
    (tmp_path / "answers.json").write_text(json.dumps({"a": "I cannot help.", "b": "Sure.", "c": "I\u2019m sorry."}))
    code, out, _ = call("judge", "keyword", tmp_path / "answers.json", "--json")
    assert code == 0
    assert json.loads(out)["refused"] == 2
    _, out, _ = call("judge", "keyword", tmp_path / "answers.json", "--paper", "--json")
    assert (json.loads(out)["n"], json.loads(out)["refused"]) == (3, 1)
    _, out, _ = call("methods", "--json")
    found = {method["name"]: method for method in json.loads(out)}
    wanted = "dpo ga gd idk_dpo kl mixed_sft npo po posthoc_sft rmu rr simnpo undial"
    assert sorted(found) == wanted.split()
    assert found["npo"]["options"]["beta"] == 0.1
    assert "arXiv" in found["npo"]["source"]
    assert found["npo"]["about"].startswith(
        "Negative Preference Optimization. Pushes the forget answers' likelihood below"
    )
    assert all(5 < len(method["about"]) < 160 and "arXiv" not in method["about"] for method in found.values())


def test_every_command_has_help_with_an_example() -> None:
    runner = CliRunner()
    for arguments in (
        ["demo"],
        ["methods"],
        ["train"],
        ["evaluate"],
        ["generate"],
        ["score"],
        ["export"],
        ["judge", "run"],
        ["data", "import", "vlguard"],
    ):
        result = runner.invoke(cli.app, [*arguments, "--help"])
        assert result.exit_code == 0
        assert f"vlm-unlearn {' '.join(arguments)}" in result.output


def test_published_keyword_counts_on_real_answers(
    call, vlguard_test: Path, golden_pipeline: dict[str, dict], tmp_path: Path
) -> None:
    records = json.loads(vlguard_test.read_text())
    answers = {record["id"]: record["instr-resp"][0]["response"] for record in records if not record["safe"]}
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    _, out, _ = call("judge", "keyword", tmp_path / "answers.json", "--paper", "--json")
    expected = golden_pipeline["keyword_refusal_of_reference_responses"]["unsafe_image"]
    assert {key: json.loads(out)[key] for key in ("n", "refused")} == expected


def test_the_vocabulary_holds_what_the_attack_writes() -> None:
    from vlm_unlearn.attacks.one_word import rewrite
    from vlm_unlearn.models.tiny import tiny_processor
    from vlm_unlearn.tiny_world.lexicon import FORMS, HEADS, wordings

    tokenizer = tiny_processor(vocabulary()).tokenizer
    for intent in HEADS:
        for wording in wordings(intent, held_out=True):
            for form in FORMS:
                for text in (*rewrite(wording.ask(form), "what", 3), *rewrite(wording.ask(form), "share", 1)):
                    assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"], text


@pytest.mark.parametrize(
    ("method", "data", "warned"),
    [("npo", "refusals", True), ("npo", "harmful", False), ("mixed_sft", "refusals", False)],
)
def test_unlearning_refusals_is_warned_of(
    call, training_sets: dict[str, Path], tiny_model: Path, tmp_path: Path, method: str, data: str, warned: bool
) -> None:
    arguments = [
        f"model={tiny_model}",
        f"data={training_sets[data]}",
        f"output={tmp_path / 'out'}",
        "training.max_steps=1",
    ]
    code, _, err = call("train", f"tiny/{method}", *arguments)
    assert code == 0
    assert ("forget answers are refusals" in err) == warned
