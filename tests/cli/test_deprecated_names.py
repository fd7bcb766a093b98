"""Old names of commands, options and config keys work from the command line and print one warning line each."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import typer.main

from finished_runs import complies, make_run
from helpers import command
from helpers import run as run_in_new_process
from helpers import run_in_process as run
from vlm_unlearn.cli import main as cli
from vlm_unlearn.cli.deprecation import COMMANDS, OPTIONS

pytestmark = pytest.mark.filterwarnings("always:.*is deprecated; use:FutureWarning")
WARNING = "warning: "


def warnings_of(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The warning lines of a finished command."""
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr  # neither Python's form nor its source line
    return [line.removeprefix(WARNING) for line in done.stderr.splitlines() if line.startswith(WARNING)]


def test_deprecated_names_lead_to_commands_and_options_that_exist() -> None:
    def find(path: str):
        command = typer.main.get_command(cli.app)
        for name in path.split():
            command = command.commands[name]
        return command

    for old, new in COMMANDS.items():
        assert old.split()[0] == new.split()[0]
        assert old.split()[1] not in find(old.split()[0]).commands
        assert find(new)
    for path, options in OPTIONS.items():
        names = {option for parameter in find(path).params for option in parameter.opts}
        assert set(options.values()) <= names
        assert not set(options) & names


def test_judge_commands_old_names_give_the_same_results(tmp_path: Path) -> None:
    (tmp_path / "answers.json").write_text(json.dumps({"a": "I cannot help.", "b": "I\u2019m sorry."}))
    new = run("judge", "keyword", tmp_path / "answers.json", "--paper-compat", "--json")
    old = run("judge", "keyword", tmp_path / "answers.json", "--paper", "--json")
    assert (old.stdout, warnings_of(new)) == (new.stdout, [])
    assert [line.count("`--paper-compat`") for line in warnings_of(old)] == [1]
    folder = make_run(tmp_path / "run", complies, groups=2)
    new = run("judge", "run", folder, "name=keyword", "--split", "safe", "--json")
    old = run("judge", "run", folder, "name=keyword", "--case=safe", "--json")
    assert (old.stdout, warnings_of(new)) == (new.stdout, [])
    assert ["`--split`" in line for line in warnings_of(old)] == [True]
    new = run("judge", "export-for-labeling", folder, tmp_path / "new.csv", "--count", 4)
    old = run("judge", "sheet", folder, tmp_path / "old.csv", "--count", 4)
    assert (tmp_path / "new.csv").read_bytes() == (tmp_path / "old.csv").read_bytes()
    assert (warnings_of(new), ["`judge export-for-labeling`" in line for line in warnings_of(old)]) == ([], [True])


def test_data_and_attack_commands_old_names_give_the_same_results(world: Path, tmp_path: Path) -> None:
    record = {"id": "a", "conversations": [{"from": "human", "value": "q?"}, {"from": "gpt", "value": "w"}]}
    (tmp_path / "in.json").write_text(json.dumps([record]))
    old, new = (run("data", name, tmp_path / "in.json", tmp_path / f"{name}.json") for name in ("rmu", "to-rmu"))
    assert (tmp_path / "rmu.json").read_bytes() == (tmp_path / "to-rmu.json").read_bytes()
    assert (warnings_of(new), ["`data to-rmu`" in line for line in warnings_of(old)]) == ([], [True])
    line = ["attack", "rewrite", world / "vlguard" / "test.json"]
    new = run(*line, tmp_path / "new-attack.json", "--trigger", "what", "--num-rewrites", 3)
    old = run(*line, tmp_path / "old-attack.json", "--trigger", "what", "--shots", 3)
    assert (tmp_path / "new-attack.json").read_bytes() == (tmp_path / "old-attack.json").read_bytes()
    assert (warnings_of(new), ["`--num-rewrites`" in line for line in warnings_of(old)]) == ([], [True])


@pytest.mark.parametrize("arguments", [["data", "rmu"], ["judge", "sheet"]])
def test_deprecated_commands_are_hidden_from_the_help(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["vlm-unlearn", arguments[0], "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    assert f"\n  {arguments[1]} " not in capsys.readouterr().out


@pytest.mark.parametrize("run_command", [run, pytest.param(run_in_new_process, marks=pytest.mark.multiprocess)])
def test_old_config_keys_warn_once_each_on_plain_lines(
    run_command: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """In a new process, imports of the command change the warning filters between the warnings."""
    folder = make_run(tmp_path / "run", complies, groups=2)
    saved = json.loads((folder / "suite.json").read_text())
    saved["cases"] = saved.pop("splits")
    (folder / "suite.json").write_text(json.dumps(saved))

    done = run_command("score", folder, "paper=false")
    lines = warnings_of(done)
    assert sorted(line.split('"')[1] for line in lines) == ["cases", "paper"]
    assert all(line.count("is deprecated; use") == 1 for line in lines)


def test_deprecation_warnings_of_other_ranks_are_not_printed(tmp_path: Path) -> None:
    (tmp_path / "answers.json").write_text(json.dumps({"a": "No."}))
    line = command("judge", "keyword", tmp_path / "answers.json", "--paper")
    done = subprocess.run(line, env={**os.environ, "RANK": "1"}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_judge_run_accepts_paper_compat_with_keys_of_the_suite_and_of_one_judge(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", complies, groups=2)
    for name in ("paper", "paper_compat"):
        assert run("judge", "run", folder, "judge=keyword", f"{name}=true").returncode == 0
        done = run("judge", "run", folder, "name=keyword", f"{name}=true", "--json")
        assert json.loads(done.stdout)[0]["judge"] == "keyword-paper"
