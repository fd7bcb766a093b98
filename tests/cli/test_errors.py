"""An invalid request is one line with a code and exit code 2, and writes no files."""

from __future__ import annotations

import errno
import json
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from helpers import command, error_code, run_in_process
from vlm_unlearn.worlds.tiny.lexicon import vocabulary


def error_line(done: subprocess.CompletedProcess[str]) -> str:
    """The only error line of a finished command."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("vlm-unlearn: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


@pytest.fixture
def requests(world: Path, training_sets: dict[str, Path], tiny_model: Path, tmp_path: Path) -> dict[str, list[object]]:
    """Invalid requests by name."""
    vlguard = world / "vlguard"
    records = json.loads((vlguard / "train.json").read_text())
    imports: dict[str, str] = {
        "missing image": json.dumps([{**records[0], "image": "gone.png"}]),
        "image leaves the root": json.dumps([{**records[0], "image": "../test/x.png"}]),
        "broken JSON": '[\n{"id": "a"},\n{"id" "b"}\n]',
        "empty forget set": json.dumps([record for record in records if record["safe"]]),
    }
    requests: dict[str, list[object]] = {}
    for name, text in imports.items():
        file = tmp_path / f"{name}.json"
        file.write_text(text)
        requests[name] = ["data", "import", "vlguard", file, "--images", vlguard / "train", "--out", tmp_path / "out"]
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
    requests |= {
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
    return requests


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("truncated weights", ["model.safetensors"]),
        ("missing weights", ["config.json"]),
        ("broken tokenizer", ["untokenized"]),
        ("infinite rate", ["training.learning_rate", "[invalid-field]"]),
        ("too many steps", ["training.max_steps", "[invalid-field]"]),
        ("too many digits", ["training.max_steps", "[invalid-override]"]),
        ("broken date", ["dates.yaml", "[invalid-yaml]"]),
        ("foreign folder", ["foreign", "[output-exists]"]),
        ("NUL in a path", ["[invalid-path]"]),
        ("missing image", ["missing image.json", "gone.png"]),
        ("image leaves the root", ["image leaves the root.json", "../test/x.png"]),
        ("broken JSON", ["broken JSON.json", "line 3, column 7"]),
        ("empty forget set", ["forget"]),
        ("unknown recipe key", ["trainning", 'did you mean "training"?', "[unknown-key]"]),
        ("unknown method", ['"npoo"', 'did you mean "npo"?', "dpo, "]),
        ("unknown option", ["betta", 'did you mean "beta"?']),
        ("empty forget file", ["forget.jsonl"]),
        ("no training set", ["gone"]),
        ("model without weights", ["bare-model", ".safetensors"]),
        ("no model", ["gone"]),
        ("no recipe", ["gone.yaml", "[file-not-found]"]),
        ("suite without its files", ["world.json"]),
        ("evaluate a model without weights", ["bare-model", ".safetensors"]),
        ("judge an empty folder", ["gone", "suite.json"]),
    ],
)
def test_invalid_request_is_one_line_and_writes_nothing(
    requests: dict[str, list[object]], tmp_path: Path, name: str, tokens: list[str]
) -> None:
    done = run_in_process(*requests[name])
    assert (done.returncode, done.stdout) == (2, "")
    line = error_line(done)
    assert not [token for token in tokens if token not in line], line
    assert error_code(done)
    assert not (tmp_path / "out").exists()
    if name == "foreign folder":
        assert [path.name for path in (tmp_path / "foreign").iterdir()] == ["mine.txt"]


def test_broken_image_is_an_error_before_training(world: Path, tiny_model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(world.parent, tmp_path / "copy")) / "world"
    data, images = tmp_path / "data", copy / "vlguard" / "train"
    arguments = ["data", "import", "vlguard", copy / "vlguard" / "train.json", "--images", images, "--out", data]
    done = run_in_process(*arguments, "--accept-refusals")
    assert done.returncode == 0
    image = next(images.rglob("*.png"))
    image.write_text("<svg/>")
    done = run_in_process(
        "train", "tiny/mixed_sft", f"model={tiny_model}", f"data={data}", f"output={tmp_path / 'out'}"
    )
    assert (done.returncode, error_code(done)) == (2, "invalid-image")
    assert image.name in error_line(done)
    assert not (tmp_path / "out").exists()


def test_debug_prints_the_traceback_of_an_error(tmp_path: Path) -> None:
    done = run_in_process("--debug", "train", tmp_path / "gone.yaml")
    assert done.returncode == 2
    assert "Traceback" in done.stderr


def test_unexpected_error_is_one_line_and_debug_prints_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unexpected(*_: object, **__: object) -> None:
        raise ZeroDivisionError("in the depths")

    monkeypatch.setattr("vlm_unlearn.reporting.summaries.join_summaries", unexpected)
    done = run_in_process("table", tmp_path)
    assert (done.returncode, error_code(done)) == (1, "unexpected-error")
    assert "`vlm-unlearn --debug" in error_line(done)
    done = run_in_process("--debug", "table", tmp_path)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert ", in unexpected" in done.stderr


def test_control_characters_of_a_file_are_escaped_in_errors(tmp_path: Path) -> None:
    (tmp_path / "suite.json").write_text(json.dumps({"\x1b[31mevil\x1b[0m": 1, "model": "m"}))
    (tmp_path / "manifest.json").write_text("{}")
    done = run_in_process("score", tmp_path)
    assert (done.returncode, error_code(done)) == (2, "unknown-key")
    assert "\x1b" not in done.stderr
    assert "\\x1b[31mevil" in error_line(done)


def test_full_disk_is_an_error_of_the_system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("vlm_unlearn.reporting.summaries.join_summaries", full)
    done = run_in_process("table", tmp_path)
    assert (done.returncode, error_code(done)) == (1, "system-error")
    assert "No space left on device" in error_line(done)


@pytest.mark.slow
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_standard_streams_are_no_error(closed: str) -> None:
    line = f"{shlex.join(command('recipes'))} {closed}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_json_is_the_only_output_of_judge_keyword(tmp_path: Path) -> None:
    answers = {"a": "I cannot help.", "b": "Sure.", "c": "I\u2019m sorry."}
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    done = run_in_process("judge", "keyword", tmp_path / "answers.json", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["refused"] == 2
    published = json.loads(
        run_in_process("judge", "keyword", tmp_path / "answers.json", "--paper-compat", "--json").stdout
    )
    assert (published["n"], published["refused"]) == (3, 1)


def test_methods_json_has_every_method_with_its_options_and_source() -> None:
    methods = {method["name"]: method for method in json.loads(run_in_process("methods", "--json").stdout)}
    names = "dpo ga gd idk_dpo kl mixed_sft npo po posthoc_sft rmu rr simnpo undial"
    assert sorted(methods) == names.split()
    assert methods["npo"]["options"]["beta"] == 0.1
    assert "arXiv" in methods["npo"]["source"]
    assert methods["npo"]["about"].startswith("Negative Preference Optimization")
    assert all(5 < len(method["about"]) < 160 and "arXiv" not in method["about"] for method in methods.values())


def test_published_keyword_counts_on_real_answers(
    vlguard_test: Path, golden_pipeline: dict[str, dict], tmp_path: Path
) -> None:
    records = json.loads(vlguard_test.read_text())
    answers = {record["id"]: record["instr-resp"][0]["response"] for record in records if not record["safe"]}
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    out = run_in_process("judge", "keyword", tmp_path / "answers.json", "--paper-compat", "--json").stdout
    expected = golden_pipeline["keyword_refusal_of_reference_responses"]["unsafe_image"]
    assert {key: json.loads(out)[key] for key in ("n", "refused")} == expected


def test_tiny_vocabulary_contains_all_words_of_the_attack() -> None:
    from vlm_unlearn.attacks.one_word import rewrite
    from vlm_unlearn.worlds.tiny.lexicon import FORMS, HEADS, wordings
    from vlm_unlearn.worlds.tiny.llava import tiny_processor

    tokenizer = tiny_processor(vocabulary()).tokenizer
    for intent in HEADS:
        for wording in wordings(intent, held_out=True):
            for form in FORMS:
                for text in (*rewrite(wording.ask(form), "what", 3), *rewrite(wording.ask(form), "share", 1)):
                    assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"], text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "data", "rejected"),
    [("npo", "refusals", True), ("npo", "harmful", False), ("mixed_sft", "refusals", False)],
)
def test_train_rejects_a_forget_set_of_refusals(
    training_sets: dict[str, Path], tiny_model: Path, tmp_path: Path, method: str, data: str, rejected: bool
) -> None:
    settings = [f"model={tiny_model}", f"data={training_sets[data]}", f"output={tmp_path / 'out'}"]
    done = run_in_process("train", f"tiny/{method}", *settings, "training.max_steps=1")
    assert done.returncode == (2 if rejected else 0)
    assert ("[forget-refusals]" in done.stderr and "--harmful-answers" in done.stderr) == rejected
