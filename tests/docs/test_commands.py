"""The code blocks of the documentation work: commands and programs are run, recipes, suites and JSON are loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from doc_pages import PAGES, ROOT, SHELL, Block, blocks_of, name_of, our_commands
from doc_scene import Scene, make_scene, put_file, read_command, read_launcher, stood_in, unknown_in
from doc_shell import shell
from doc_stand_ins import ADDED, WRITTEN, judge_reply, leave_the_plots_empty, make_the_demo_small

from stub_server import stub_server
from vlm_unlearn.config import JudgeConfig, Recipe, Suite, Sweep, apply_overrides, load, validate
from vlm_unlearn.errors import UserError

FILES = ("csv", "json", "jsonl", "yaml", "yml", "text", "")  # languages of blocks that can be files of the reader


@pytest.fixture(scope="module")
def scene(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    from vlm_unlearn.worlds.tiny.base_model import BaseConfig, base_model

    with pytest.MonkeyPatch.context() as patch, stub_server(judge_reply) as stub:
        store = tmp_path_factory.mktemp("docs") / "store"
        store.mkdir()
        make_scene(store, world, base_model(BaseConfig(steps=60, width=32)))
        make_the_demo_small(patch)
        leave_the_plots_empty(patch)
        with open_scene(store, stub.url) as scene:
            yield scene


@pytest.fixture(scope="module")
def empty_scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """The programs of a scene without its files, for commands that fail before they read any."""
    with open_scene(tmp_path_factory.mktemp("empty"), "http://localhost:8000/v1") as scene:
        yield scene


@contextmanager
def open_scene(store: Path, server: str) -> Iterator[Scene]:
    scene = Scene(store, server)
    with shell(scene.programs()) as opened:
        scene.use(opened)
        yield scene


@pytest.mark.parametrize("page", PAGES, ids=name_of)
@pytest.mark.slow
@pytest.mark.timeout(420)
def test_code_blocks_of_a_page_work(page: Path, scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs all blocks in one folder, in the order of the page."""
    folder = scene.copy(tmp_path / "reader")
    monkeypatch.chdir(folder)
    names: dict[str, object] = {"__name__": "docs"}
    for block in blocks_of(page):
        if block.file and block.kind in FILES:
            put_file(folder, block.file, block.text)
        if block.kind in SHELL and block.not_run:
            only_read(block)
        elif block.kind in SHELL:
            run(block, scene, folder)
        elif block.kind in ("python", "py"):
            run_python(block, scene, names)
        elif block.kind in ("yaml", "yml"):
            read_yaml(block, folder)
        elif block.kind in ("json", "jsonl"):
            read_json(block)


def run_python(block: Block, scene: Scene, names: dict[str, object]) -> None:
    """Runs a program. Code of the walk-throughs is only compiled, because test_walkthroughs.py runs it."""
    line_breaks = "\n" * (block.line - 1)
    try:
        compiled = compile(line_breaks + block.text, block.page, "exec")
    except SyntaxError:
        compiled = compile(f"{line_breaks}{{{block.text}}}", block.page, "exec")  # lines of a table
    if not block.not_run and not block.page.startswith("docs/extend/"):
        scene.grant(block.text)
        exec(compiled, names)


def run(block: Block, scene: Scene, folder: Path) -> None:
    """Runs a block of commands.

    Raises:
        AssertionError: A command failed. The message contains the page, line, command and standard error.
    """
    done = scene.run(block.script, folder)
    if done.code:
        raise AssertionError(
            f"{block.page}:{block.line + done.line - 1}: `{done.command}` ended with {done.code}; "
            f"a command that can't be run anywhere is marked <!-- not run: REASON -->\n{done.stderr[-3000:]}"
        )


def only_read(block: Block) -> None:
    """Parses the commands of a block that is not run, and loads their recipes, suites and judges.

    Raises:
        AssertionError: A command is invalid. The message contains the page and line of the block.
    """
    script = re.sub(r"\$\(\(.*?\)\)|\$\w+", "1", stood_in(block.script, "http://localhost:8000/v1"))
    for launcher, words in our_commands(script):
        try:
            read_launcher(launcher)
            name, options = read_command(words)
            overrides = options.get("overrides") or []
            if name == "train":
                load(Recipe, options["recipe_file"], ["model=m", "data=d", "output=o", *overrides])
            elif name in ("evaluate", "generate"):
                load(Suite, options["suite_file"], ["model=m", *overrides])
            elif name == "judge run" and any(text.startswith("name=") for text in overrides):
                validate(JudgeConfig, apply_overrides({}, overrides), "judge")
        except BaseException as error:  # Exit and usage errors of the parsers among them
            command = " ".join([*launcher, "vlm-unlearn", *words])
            raise AssertionError(f"{block.page}:{block.line}: {command}: {type(error).__name__}: {error}") from None


def read_yaml(block: Block, folder: Path) -> None:
    """Loads a recipe or a suite, or some of its keys. Missing keys are taken from those of the tiny world.

    Raises:
        AssertionError: The block is neither a recipe nor a suite.
    """
    value = yaml.safe_load(block.text)
    if isinstance(value, list):
        value = {"splits": value}  # the splits of a suite
    suite = set(value) <= {*Suite.model_fields, "extends"} and (
        set(value) & {"splits", "judge", "judges", "metrics", "generation", "benchmarks"}
    )
    if set(value) <= {*Sweep.model_fields, "extends"} and "space" in value:
        validate(Sweep, value, block.page)
        return
    recipe = set(value) <= {*Recipe.model_fields, "extends"}
    if not suite and not recipe:
        raise AssertionError(f"{block.page}:{block.line}: neither a recipe nor a suite: {', '.join(map(str, value))}")
    if "extends" not in value and "splits" not in value and "benchmarks" not in value:
        value["extends"] = "suites/tiny" if suite else "tiny/npo"
    file = folder / "as-shown.yaml"
    file.write_text(yaml.safe_dump(value, sort_keys=False), encoding="utf-8")
    config: type[Any] = Suite if suite else Recipe
    required = ["model", "root"] if suite else ["model", "data", "output"]
    load(config, file, values={key: key for key in required if key not in value})


def read_json(block: Block) -> None:
    try:
        json.loads(block.text)
    except ValueError:
        for line in filter(str.strip, block.text.splitlines()):  # JSON lines
            json.loads(line)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_in_sentences_exist(page: Path) -> None:
    text = re.sub(r"^(```|~~~).*?^\1", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    invalid = []
    for words in re.findall(r"`vlm-unlearn ([^`]+)`", text):
        unknown = unknown_in(words.split())
        if unknown:
            invalid.append(f"`vlm-unlearn {words}`: no {unknown}")
    assert not invalid, f"{name_of(page)}: {'; '.join(invalid)}"


def scripts() -> list[str]:
    return [block.script for page in PAGES for block in blocks_of(page) if block.kind in SHELL]


def test_every_stand_in_is_used() -> None:
    text = "\n".join(scripts())
    unused = [stand_in.written for stand_in in WRITTEN if not re.search(stand_in.written, text)]
    program = r"(vlm-unlearn|vlm_unlearn\.cli\.main)"
    unused += [added.command for added in ADDED if not re.search(rf"{program} {added.command}\b", text)]
    assert not unused, f"no page contains these; remove them from doc_stand_ins.py: {unused}"


def test_commands_of_the_readme_are_run() -> None:
    """Guards against a change of the pages' form that hides their commands from the tests."""
    commands = [
        words[0]
        for block in blocks_of(ROOT / "README.md")
        if block.kind in SHELL and not block.not_run
        for _, words in our_commands(block.script)
    ]
    assert {"data", "train", "evaluate", "report", "table", "export"} <= set(commands)


@pytest.mark.parametrize(
    ("kind", "text", "token"),
    [
        ("bash", "true\nvlm-unlearn benchmark score nosuch --predictions a --annotations b", "nosuch"),
        ("bash", "true\npip install '.[nosuch]'", "no extra nosuch"),
        ("bash", "true\nmake nosuch", "no target nosuch"),
        (
            "bash",
            "true\naccelerate launch --config_file nosuch -m vlm_unlearn.cli.main methods",
            "nosuch: no such file",
        ),
    ],
)
def test_failing_command_fails_its_page(kind: str, text: str, token: str, empty_scene: Scene, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=rf"(?s)page\.md:11: .*{token}"):
        run(Block("page.md", 10, kind, text), empty_scene, empty_scene.copy(tmp_path / "reader"))


@pytest.mark.parametrize(
    ("text", "token"),
    [
        ("vlm-unlearn trian x", "trian"),
        ("vlm-unlearn --install-complet", "no option --install-complet"),
        ("vlm-unlearn train tiny/npo --no-such", "no-such"),
        ("vlm-unlearn train tiny/nosuch", "nosuch"),
        ("vlm-unlearn train tiny/npo training.learnin_rate=1", "training.learning_rate|learnin_rate"),
        ("vlm-unlearn evaluate suites/tiny judge.nam=x --out y", "judge.nam"),
        ("accelerate launch --num_procs 8 -m vlm_unlearn.cli.main methods", "num_procs|SystemExit"),
        ("srun bash -c 'accelerate launch -m vlm_unlearn.cli.main train tiny/npo trainin.x=1'", "trainin"),
    ],
)
def test_command_that_is_not_run_is_parsed(text: str, token: str) -> None:
    with pytest.raises(AssertionError, match=token):
        only_read(Block("page.md", 10, "bash", text, not_run="needs GPUs"))


@pytest.mark.parametrize(
    "text",
    ["trainin: {}", "method: npo\ntraining: {learnin_rate: 1}", "metrics: {asr: {case: [unsafe]}}", "engine: fsdp2"],
)
def test_invalid_recipe_or_suite_fails_its_page(text: str, tmp_path: Path) -> None:
    with pytest.raises((AssertionError, UserError)):
        read_yaml(Block("page.md", 10, "yaml", text), tmp_path)
