"""A folder with small versions of the files that the documentation assumes, and the programs of its commands."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import shutil
import sys
import tomllib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from doc_pages import MODULE, ROOT
from doc_shell import Done, Program, Shell
from doc_stand_ins import ADDED, AFTER, GRANTED, REFUSED, WRITTEN

import answer_files
import benchmark_files

MODELS = ("llava-hf/llava-1.5-7b-hf",)  # a local folder each, which has priority over the hub


def make_scene(folder: Path, world: Path, model: Path) -> None:
    """Fills a folder with the tiny world and a tiny model, under the names of the real data sets and models."""
    for name in MODELS:
        shutil.copytree(model, folder / name)
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    _put(folder / ".venv" / "bin" / "activate", "")
    shutil.copytree(world / "vlguard", folder / "VLGuard")
    shutil.copytree(world / "safe_eraser", folder / "dataset")
    harmful = world / "vlguard" / "harmful_answers.json"
    for name in ("harmful.json", "llava.json", "qwen.json"):
        shutil.copy(harmful, folder / name)
    records = json.loads((world / "vlguard" / "train.json").read_text())
    on_safe_images = {record["image"]: "do it like this ." for record in records if record["safe"]}
    for name in ("llava.json", "qwen.json"):
        _put(folder / "safe-unsafes" / name, json.dumps(on_safe_images))
    shutil.copy(world / "general" / "general.json", folder / "llava_v1_5_mix665k.json")
    shutil.copy(next((world / "vlguard" / "test").rglob("*.png")), folder / "photo.png")
    for images in (world / "general", world / "vlguard" / "train"):
        shutil.copytree(images, folder / "images", dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.json"))
    _put_benchmarks(folder)
    _put_checkpoints(folder)
    answers = [{"question_id": number, "text": "3"} for number in range(4)]
    _put(folder / "answers.jsonl", "".join(json.dumps(line) + "\n" for line in answers))
    answer_files.write_for_docs(folder)
    table = "image,question,answer,set\na.png,what is it ?,it is red .,harmful\na.png,what is this ?,a kite .,harmless"
    for name in ("pairs.csv", "test.csv", "mine/test.csv"):
        put_file(folder, name, table)


def _put_checkpoints(folder: Path) -> None:
    """Writes tiny checkpoints in the formats of the published code, under the names of released models."""
    from foreign_checkpoints import (
        OriginalLlava,
        sentence_pieces,
        write_clip,
        write_llava,
        write_llava_lora,
        write_safe_eraser,
    )

    model = OriginalLlava(len(sentence_pieces()))
    write_llava(folder / "liuhaotian" / "llava-v1.5-7b", model)
    write_clip(folder / "openai" / "clip-vit-tiny", model)
    write_llava_lora(folder / "checkpoints" / "llava-npo-lora", model, model)
    write_safe_eraser(folder / "ckpt_results" / "llava-7b" / "po", folder / MODELS[0])


def _put_benchmarks(folder: Path) -> None:
    """Writes the official files where ``suites/specificity`` and the page on benchmarks expect them."""
    benchmarks = folder / "benchmarks"
    for write in benchmark_files.WRITERS.values():
        write(benchmarks)
    moves = {
        "coco": "coco/val2014",
        "gqa/testdev.json": "gqa/testdev_balanced_questions.json",
        "scienceqa/splits.json": "scienceqa/pid_splits.json",
        "vqav2/answers.json": "vqav2/v2_mscoco_val2014_annotations.json",
        "vqav2/questions.json": "vqav2/v2_OpenEnded_mscoco_val2014_questions.json",
        "mmvet": "mm-vet",
        "mmbench/dev.tsv": "mmbench/mmbench_dev_en_20231003.tsv",
    }
    for old, new in moves.items():
        moved = (benchmarks / old).rename(benchmarks / "moved")
        (benchmarks / new).parent.mkdir(parents=True, exist_ok=True)
        moved.rename(benchmarks / new)
    shutil.copy(benchmarks / "pope" / "coco_pope_popular.json", benchmarks / "pope" / "coco_pope_adversarial.json")
    shutil.copytree(benchmarks / "gqa", folder / "gqa")
    shutil.copy(benchmarks / "vqav2" / "v2_mscoco_val2014_annotations.json", folder)
    shutil.copy(benchmarks / "mm-vet" / "mm-vet.json", folder)
    shutil.copytree(benchmarks / "mm-vet" / "images", folder / "images", dirs_exist_ok=True)
    shutil.copytree(benchmarks / "llava_bench", folder, dirs_exist_ok=True)


def put_file(folder: Path, name: str, text: str) -> None:
    """Writes a file that a page shows, and the images that it names into the folder next to it."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise AssertionError(f"a page shows the file {name}, which lies outside the reader's folder")
    _put(folder / name, text + "\n")
    if name.endswith(".csv"):
        images = (folder / name).parent / "images"
        for value in (value for row in csv.DictReader(io.StringIO(text)) for value in row.values()):
            if re.fullmatch(r"[\w./-]+\.(png|jpe?g)", value or "") and not (images / value).exists():
                benchmark_files.put_image(images / value, len(value))


def _put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def stood_in(script: str, server: str) -> str:
    """Returns a script with the stand-ins for resources that a test does not have."""
    for stand_in in WRITTEN:
        script = re.sub(stand_in.written, stand_in.run.replace("{server}", server), script)
    return script


def read_command(words: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Returns the name of a command, such as ``data import files``, and its parsed options.

    Raises:
        Exception: An error of the command's parser.
        LookupError: There is no such command.
    """
    command, names, rest = _find(words)
    if hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        raise LookupError(f"no command {rest[0]}")
    if not names and rest:  # options of the program itself; parsing them could change files of the shell
        unknown = unknown_in(rest)
        if unknown:
            raise LookupError(f"no option {unknown}")
        return "", {}
    context = command.make_context(" ".join(names), list(rest))
    return " ".join(names), dict(context.params)


def _find(words: Sequence[str]) -> tuple[Any, list[str], list[str]]:
    import typer.main

    from vlm_unlearn.cli.main import app

    command: Any = typer.main.get_command(app)
    names: list[str] = []
    rest = list(words)[1:] if words[:1] == ["--debug"] else list(words)
    while rest and hasattr(command, "commands") and rest[0] in command.commands:
        names.append(rest.pop(0))
        command = command.commands[names[-1]]
    return command, names, rest


def read_launcher(words: Sequence[str]) -> Any:
    """Returns the options of a launcher, parsed by its own parser, or None if the words start with no launcher.

    Raises:
        SystemExit: The parser rejects the options. It has printed the reason.
    """
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.run import get_args_parser

    if list(words[:2]) == ["accelerate", "launch"]:
        return launch_command_parser().parse_args(words[2:])
    return get_args_parser().parse_args(words[1:]) if words[:1] == ["torchrun"] else None


def unknown_in(words: Sequence[str]) -> str | None:
    """Returns the first unknown command or option of a command in a sentence, which may lack required arguments."""
    command, _, rest = _find(words)
    if hasattr(command, "commands") and rest and re.fullmatch(r"[a-z][a-z-]*", rest[0]):
        return rest[0]
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)} | {
        "--help",
        "-h",
    }
    options |= {"--install-completion", "--show-completion", "--debug", "--version"}
    return next(
        (word for word in rest if re.match(r"--?[a-zA-Z]", word) and word.partition("=")[0] not in options), None
    )


class Scene:
    """Copies of the scene, one folder per page, and the programs that run in them."""

    def __init__(self, store: Path, server: str) -> None:
        self._store = store
        self._server = server
        self._shell: Shell | None = None
        self.ran: list[str] = []  # the commands that ran

    def programs(self) -> dict[str, Program]:
        """Returns the programs by name."""
        return {
            "vlm-unlearn": self._ours,
            "accelerate": self._launcher("accelerate"),
            "torchrun": self._launcher("torchrun"),
            "make": _make,
            "pip": _pip,
            "git": _git,
            "vllm": _serve,
            "transformers": _serve,
            **dict.fromkeys(REFUSED, _refuse),
        }

    def use(self, opened: Shell) -> None:
        """Sets the shell that has these programs."""
        self._shell = opened

    def copy(self, folder: Path) -> Path:
        """Copies the scene into a folder for a page."""
        return Path(
            shutil.copytree(
                self._store, folder, symlinks=True, ignore=lambda where, names: _granted_in(self._store, where, names)
            )
        )

    def run(self, script: str, folder: Path) -> Done:
        """Runs a script in the folder of a page, which is also its home folder."""
        assert self._shell is not None
        return self._shell.run(stood_in(script, self._server), folder, {"HOME": str(folder), "OPENAI_API_KEY": "a-key"})

    def grant(self, program: str) -> None:
        """Adds the files that a Python program assumes to this folder."""
        self._grant(re.findall(r"[\"'=]([\w./-]+)(?=[\"'])", program), [])

    def _ours(self, words: list[str]) -> int:
        try:
            name, options = read_command(words)
        except BaseException:  # main() prints the error
            return _main(words)
        outputs = [str(options["out"])] if options.get("out") else []
        outputs += [text.partition("=")[2] for text in options.get("overrides") or [] if text.startswith("output=")]
        self._grant(words, outputs)
        added = [text for extra in ADDED if extra.command == name for text in extra.overrides]
        self.ran.append(name)
        code = _main([*words, *added])
        if code == 0 and name in AFTER:
            AFTER[name](options)
        missing = [
            output for output in outputs if code == 0 and not options.get("plan_only") and not Path(output).exists()
        ]
        if missing:
            sys.stderr.write(f"the command succeeded but did not write {missing[0]}\n")
        return 1 if missing else code

    def _grant(self, words: Sequence[str], outputs: Sequence[str]) -> None:
        """Adds the folders that a command assumes, unless the page has created them or the command will."""
        named = [word.partition("=")[2] or word for word in words]
        for name, command in GRANTED.items():
            if (
                any(word == name or word.startswith(f"{name}/") for word in named)
                and name not in outputs
                and not Path(name).exists()
            ):
                stored = self._store / name
                if not stored.exists():
                    self._make(name, command)
                if stored != Path(name).absolute():
                    shutil.copytree(stored, name)

    def _make(self, name: str, command: str) -> None:
        with contextlib.chdir(self._store):
            if self._ours(command.split()[1:]):
                raise AssertionError(f"{name}, which pages assume, cannot be created: {command}")

    def _launcher(self, name: str) -> Program:
        def start(words: list[str]) -> int:
            options = read_launcher([name, *words])
            if options is None:
                sys.stderr.write(f"{name}: only launches are supported here\n")
                return 2
            return self._launched(options)

        return start

    def _launched(self, options: Any) -> int:
        """Runs the module that a launcher starts, once instead of in several processes."""
        config = getattr(options, "config_file", None)
        if config is not None and not Path(config).is_file():
            sys.stderr.write(f"{config}: no such file\n")
            return 2
        if not options.module or options.training_script != MODULE:
            sys.stderr.write(f"starts {options.training_script}, which is not -m {MODULE}\n")
            return 2
        return self._ours(options.training_script_args)


def _granted_in(store: Path, where: str, names: Sequence[str]) -> set[str]:
    return {name for name in names if str((Path(where) / name).relative_to(store)) in GRANTED}


def _main(words: Sequence[str]) -> int:
    """Runs the command in this process."""
    from vlm_unlearn.cli.main import main

    outer_argv, sys.argv = sys.argv, ["vlm-unlearn", *words]
    try:
        main()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        sys.argv = outer_argv
    return 0


def _make(words: list[str]) -> int:
    """Checks that the targets exist."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    missing = [word for word in words if "=" not in word and not word.startswith("-") and word not in targets]
    sys.stderr.write(
        "".join(f"make: no target {word}; the targets are {', '.join(sorted(targets))}\n" for word in missing)
    )
    return 2 if missing else 0


def _pip(words: list[str]) -> int:
    """Checks that the extras and constraint files exist."""
    extras: Mapping[str, object] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    problems = [
        f"no extra {name}"
        for word in words
        for group in re.findall(r"\[([\w,]+)\]", word)
        for name in group.split(",")
        if name not in extras
    ]
    problems += [
        f"no file {file}" for flag, file in pairwise(words) if flag in ("-c", "-r") and not (ROOT / file).is_file()
    ]
    problems += [] if words[:1] == ["install"] else ["only `install` is supported here"]
    sys.stderr.write("".join(f"pip: {text}\n" for text in problems))
    return 2 if problems else 0


def _git(words: list[str]) -> int:
    """Creates the folder of a clone, empty."""
    if words[:1] != ["clone"] or len(words) not in (2, 3):
        sys.stderr.write("git: only `clone` is supported here\n")
        return 2
    Path(words[2] if len(words) == 3 else Path(words[1]).stem).mkdir(exist_ok=True)
    return 0


def _serve(words: list[str]) -> int:
    if words[:1] != ["serve"]:
        sys.stderr.write("only `serve` is supported here\n")
        return 2
    return 0


def _refuse(words: list[str]) -> int:
    sys.stderr.write("would download files or change the machine, so that tests do not run it\n")
    return 1
