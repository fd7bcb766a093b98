"""Output on a terminal (progress bars, Ctrl-C, narrow and dumb terminals) and on a pipe."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from finished_runs import complies, make_run, unlearned
from helpers import command, run
from terminal import at_terminal

ESCAPE = "\x1b"


def plain(text: str) -> list[str]:
    """The final lines of a terminal, without colors."""
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).splitlines()
    return [line.rsplit("\r", 1)[-1].rstrip() for line in lines]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [make_run(folder / "base", complies), make_run(folder / "npo", unlearned)]


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.timeout(180)
def test_training_shows_its_time_and_is_stopped_by_ctrl_c(
    training_sets: dict[str, Path], tiny_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "npo"
    line = [
        "train",
        "tiny/npo",
        f"model={tiny_model}",
        f"data={training_sets['harmful']}",
        f"output={out}",
        "training.save_steps=2",
    ]
    code, screen = at_terminal(*line, "training.max_steps=4000", stop_at=r"\d\d/4000")  # the bar may skip steps
    assert code == 130
    assert screen.count("vlm-unlearn: stopped") == 1
    assert re.search(r"\d/4000\S* \S*\d:\d\d:\d\d\S* \S*[-\d]:", screen)  # the elapsed time and the remaining time
    assert "Traceback" not in screen
    assert screen.rindex(f"{ESCAPE}[?25h") > screen.rindex(f"{ESCAPE}[?25l")  # the cursor is visible again
    assert (out / "checkpoints").is_dir()


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.timeout(180)
def test_large_file_has_a_bar_and_ctrl_c_leaves_no_output(tmp_path: Path) -> None:
    record = {"id": "a", "conversations": [{"from": "human", "value": "q?"}, {"from": "gpt", "value": "word " * 2000}]}
    (tmp_path / "retain.json").write_text(json.dumps([record]))
    (tmp_path / "large.json").write_text(json.dumps([record] * 4000))
    line = ["data", "mix", tmp_path / "retain.json", tmp_path / "large.json", tmp_path / "out.json"]
    code, screen = at_terminal(*line, stop_at=r"read large\.json \(MB\)")
    assert (code, "vlm-unlearn: stopped" in screen) == (130, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large.json", "retain.json"]
    assert at_terminal(*line, "--size", "10")[0] == 0
    assert run(*line, "--json").stderr.splitlines() == ["read large.json (MB) (38)"]


@pytest.mark.slow
def test_narrow_terminal_has_no_truncated_lines(runs: list[Path]) -> None:
    code, screen = at_terminal("compare", *runs, columns=60)
    assert code == 0
    lines = plain(screen)
    assert max(map(len, lines)) <= 60
    assert not any("…" in line for line in lines)
    assert any("asr_attacked" in line and "*" in line for line in lines)


@pytest.mark.slow
def test_dumb_terminals_and_pipes_get_no_control_characters(runs: list[Path]) -> None:
    code, screen = at_terminal("compare", *runs, environment={"TERM": "dumb", "NO_COLOR": "1"})
    assert (code, ESCAPE in screen) == (0, False)
    done = run("compare", *runs, "--json")
    assert json.loads(done.stdout)["rows"][0]["model"] == "base"
    assert (ESCAPE in done.stdout + done.stderr, "\r" in done.stderr) == (False, False)


@pytest.mark.slow
def test_no_color_turns_colors_off(runs: list[Path]) -> None:
    screen = {value: at_terminal("compare", *runs, environment={"NO_COLOR": value})[1] for value in ("", "1")}
    assert {value: bool(re.search(r"\x1b\[[0-9;]*3[0-9]m", text)) for value, text in screen.items()} == {
        "": True,
        "1": False,
    }


@pytest.mark.slow
def test_characters_outside_the_encoding_are_escaped(runs: list[Path]) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command("compare", *runs), capture_output=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert b"asr_attacked" in done.stdout
    assert done.stdout.isascii()
    assert at_terminal("doctor", environment={"PYTHONIOENCODING": "latin-1"})[0] == 0


@pytest.mark.parametrize("line", ["recipes --json", "--help"])
@pytest.mark.slow
def test_closed_pipe_is_no_error(line: str) -> None:
    process = subprocess.Popen(command(*line.split()), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() in (0, 1)
