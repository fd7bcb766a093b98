"""The helpers that find the commands of the pages. A command that they miss is never tested."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from doc_pages import Block, our_commands, read_blocks
from doc_scene import unknown_in
from doc_shell import Shell, shell

PAGE = """Text, and `pairs.csv`:

```csv
image,question
```

```bash
vlm-unlearn train a \\
    b=c
vlm-unlearn score runs/x | head -n 1   # a remark
```

Indented:

    vlm-unlearn data audit x.json

    Output that is no command.

<!-- not run: needs two nodes -->
```sh title="start.sh"
srun bash -c 'accelerate launch -m vlm_unlearn.cli.main train r'
```

!!! note

    ```console
    $ vlm-unlearn doctor \\
      --json
    {"python": "3.11"}
    ```
"""


def test_read_blocks_finds_blocks_of_every_form() -> None:
    csv, bash, indented, marked, console = read_blocks("p.md", PAGE)
    assert (csv.kind, csv.file, csv.text, csv.line) == ("csv", "pairs.csv", "image,question", 4)
    assert (bash.kind, bash.file, bash.not_run, bash.line) == ("bash", None, None, 8)
    assert (indented.kind, indented.line, indented.text.split()) == (
        "bash",
        15,
        ["vlm-unlearn", "data", "audit", "x.json"],
    )
    assert (marked.not_run, marked.file, marked.line) == ("needs two nodes", "start.sh", 21)
    assert (console.kind, console.line) == ("console", 27)
    assert console.script.splitlines() == ["vlm-unlearn doctor \\", "  --json"]


def test_our_commands_finds_commands_behind_launchers() -> None:
    commands = [
        command for block in read_blocks("p.md", PAGE) if block.kind != "csv" for command in our_commands(block.script)
    ]
    launcher = ["accelerate", "launch", "-m", "vlm_unlearn.cli.main"]
    assert commands == [
        ([], ["train", "a", "b=c"]),
        ([], ["score", "runs/x"]),
        ([], ["data", "audit", "x.json"]),
        (launcher, ["train", "r"]),
        ([], ["doctor", "--json"]),
    ]


def test_invalid_shell_syntax_is_an_error() -> None:
    with pytest.raises(AssertionError, match="no shell reads this"):
        list(our_commands("vlm-unlearn train 'x"))


@pytest.mark.parametrize(
    ("words", "unknown"),
    [
        ("train RECIPE --plan", None),
        ("train RECIPE --plann", "--plann"),
        ("data audits FILE", "audits"),
        ("data import files --out=x", None),
        ("attack rewrite ... --model", None),
    ],
)
def test_unknown_commands_and_options_are_found(words: str, unknown: str | None) -> None:
    assert unknown_in(words.split()) == unknown


@pytest.fixture
def opened() -> Iterator[Shell]:
    import sys

    def say(words: list[str]) -> int:
        sys.stdout.write(" ".join(words) + "\n")
        sys.stderr.write("said\n")
        return int(words[0] == "badly")

    with shell({"say": say}) as opened:
        yield opened


def test_programs_of_this_process_run_in_a_real_shell(opened: Shell, tmp_path: Path) -> None:
    script = Block(
        "p.md", 1, "bash", "mkdir sub && cd sub\nWORD=two\nsay one $WORD > said.txt\nsay three | tr a-z A-Z\n"
    ).script
    done = opened.run(script, tmp_path, {})
    assert (done.code, done.stdout, done.stderr) == (0, "THREE\n", "said\nsaid\n")
    assert (tmp_path / "sub" / "said.txt").read_text() == "one two\n"


def test_failing_command_is_reported_with_its_line(opened: Shell, tmp_path: Path) -> None:
    done = opened.run("say well\n\nsay badly here\nsay never\n", tmp_path, {})
    assert (done.code, done.line, done.command, done.stdout) == (1, 3, "say badly here", "well\nbadly here\n")
    assert opened.run("say badly | cat\n", tmp_path, {}).code == 1
    done = opened.run("say well\nnosuchprogram\n", tmp_path, {})
    assert (done.code, done.line, done.command) == (127, 2, "nosuchprogram")


def test_closed_pipe_is_no_failure(opened: Shell, tmp_path: Path) -> None:
    done = opened.run(f"say {'x' * 100_000} | head -c 2\n", tmp_path, {})
    assert (done.code, done.stdout) == (0, "xx")
