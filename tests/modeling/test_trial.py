"""Model folders that take forever, fill the memory or crash a library: a clear error, from a process of its own."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import families
from helpers import error_code, raises_code, run
from vlm_unlearn.data.encoding import PromptMeter, Turn, encode
from vlm_unlearn.modeling import trial
from vlm_unlearn.modeling.loader import load_processor
from vlm_unlearn.modeling.trial import Pattern, check_processor_files, try_patterns, try_processor_files
from vlm_unlearn.store import write_json

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="without POSIX timers and limits")
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
RECURSION = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
DOUBLING = "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}"


@pytest.fixture
def copy(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(families.shared_folder("llava", tmp_path_factory), tmp_path / "model"))


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "SECONDS", 5.0)
    monkeypatch.setattr(trial, "MEMORY_BYTES", 1 << 30)
    monkeypatch.setattr(trial, "START_SECONDS", 120.0)
    monkeypatch.setattr(trial, "PATTERN_SECONDS", 2.0)


def prepend_to_template(folder: Path, text: str) -> None:
    file = folder / "chat_template.jinja"
    file.write_text(text + file.read_text())


def change_tokenizer(folder: Path, **settings: object) -> None:
    file = folder / "tokenizer.json"
    write_json(file, {**json.loads(file.read_text()), **settings})


def split_by(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [split, byte_level]}


@pytest.mark.timeout(120)
def test_folder_that_passed_is_not_tried_again(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepend_to_template(copy, "{# a template of this test #}")
    try_processor_files(copy)
    monkeypatch.setattr(subprocess, "Popen", None)
    try_processor_files(copy)
    prepend_to_template(copy, "{# another one #}")
    with pytest.raises(TypeError):
        try_processor_files(copy)


@pytest.mark.timeout(120)
def test_without_a_writable_cache_each_process_tries(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy / "cache").write_text("")
    monkeypatch.setenv("VLM_UNLEARN_CACHE", str(copy / "cache"))
    try_processor_files(copy)


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "text",
    [
        LOOPS,
        RECURSION,
        "{% if not add_generation_prompt %}" + LOOPS + "{% endif %}",
        "{% if messages | length > 2 %}" + LOOPS + "{% endif %}",
        "{% if messages[0].role == 'system' %}" + LOOPS + "{% endif %}",
    ],
)
def test_endless_chat_template_is_an_error(text: str, copy: Path, small_limits: None) -> None:
    prepend_to_template(copy, text)
    with raises_code("resource-limit", file=copy / "chat_template.jinja"):
        try_processor_files(copy)


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "text", [DOUBLING, "{% set s = 'x' * 10000000000 %}", "{{ '%3000000000d' % 1 }}", "{{ 'x ' * 2000000 }}"]
)
def test_gigantic_text_of_a_chat_template_is_an_error(text: str, copy: Path, small_limits: None) -> None:
    prepend_to_template(copy, text)
    with raises_code("resource-limit", file=copy / "chat_template.jinja"):
        try_processor_files(copy)


@pytest.mark.timeout(180)
def test_template_in_the_tokenizer_config_is_tried(copy: Path, small_limits: None) -> None:
    file = copy / "tokenizer_config.json"
    write_json(file, {**json.loads(file.read_text()), "chat_template": [{"name": "default", "template": DOUBLING}]})
    with raises_code("resource-limit", file=file, field="chat_template"):
        try_processor_files(copy)


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "settings",
    [
        {"pre_tokenizer": split_by(r"(a+)+$")},
        {"pre_tokenizer": split_by(r"(?:x+x+)+y")},
        {"pre_tokenizer": split_by(r"(?:\d|\d\d)+z")},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": r"(a+)+\d"}, "content": "b"}},
        {"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<no>", "type_id": 0}}]}},
        {
            "normalizer": {
                "type": "Sequence",
                "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}] * 9,
            }
        },
    ],
    ids=["nested", "adjacent", "alternatives", "normalizer", "panic", "growth"],
)
def test_tokenizer_that_hangs_or_crashes_is_an_error(settings: dict[str, Any], copy: Path, small_limits: None) -> None:
    if "post_processor" in settings:
        single = settings["post_processor"]["single"]
        sequences = {"pair": [{"Sequence": {"id": "A", "type_id": 0}}], "special_tokens": {}}
        settings = {"post_processor": {**settings["post_processor"], "single": single, **sequences}}
    change_tokenizer(copy, **settings)
    with raises_code("resource-limit", file=copy / "tokenizer.json"):
        try_processor_files(copy)


@pytest.mark.timeout(180)
def test_million_added_tokens_are_an_error(copy: Path, small_limits: None) -> None:
    file = copy / "tokenizer_config.json"
    tokens = [f"<token{number}>" for number in range(1_000_000)]
    write_json(file, {**json.loads(file.read_text()), "additional_special_tokens": tokens})
    with raises_code("resource-limit", file=copy / "tokenizer.json"):
        try_processor_files(copy)


@pytest.mark.parametrize(
    ("name", "size"), [("chat_template.jinja", 2 << 20), ("config.json", 5 << 20), ("tokenizer_config.json", 65 << 20)]
)
def test_gigantic_file_is_an_error(name: str, size: int, copy: Path) -> None:
    with (copy / name).open("r+b") as file:
        file.truncate(size)
    with raises_code("file-too-large", file=copy / name):
        check_processor_files(copy)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("function", "expression"),
    [
        ("fullmatch", r"(.*a)*b"),
        ("fullmatch", r"((\w+)\.?)+!"),
        ("match", r"(^|.*\.)(a|aa)+!($|\..*)"),
        ("fullmatch", r"(((a{1,999}){1,999}){1,999}){1,999}b"),
    ],
)
def test_endless_pattern_is_an_error(function: str, expression: str, tmp_path: Path, small_limits: None) -> None:
    pattern = Pattern(tmp_path / "adapter_config.json", "target_modules", function, expression, expression)
    with raises_code("resource-limit", file=pattern.file, field="target_modules"):
        try_patterns([pattern], ["a" * 60 + ".q_proj"])


def test_usual_patterns_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"model.language_model.layers.{layer}.self_attn.q_proj" for layer in range(100)]
    expression = r"model\.language_model\.layers\.(\d+)\..*\.(q_proj|v_proj)"
    try_patterns([Pattern(Path("a"), "target_modules", "fullmatch", expression, expression)], names)
    try_patterns([Pattern(Path("a"), "target_modules", "fullmatch", "(", "(")], names)  # PEFT reports it
    monkeypatch.setattr(subprocess, "Popen", None)
    try_patterns([Pattern(Path("a"), "modules_to_save", "match", "lm_head", "lm_head")], names)


@pytest.mark.timeout(120)
def test_panic_on_one_text_is_an_error_of_its_record(copy: Path, tmp_path: Path) -> None:
    change_tokenizer(copy, pre_tokenizer=split_by(r"qv(z+)+w"))
    processor = load_processor(copy)
    turn = Turn("first", None, "qv" + "z" * 60 + "! w", None)
    calls: list[Callable[[], object]] = [
        lambda: encode(processor, [turn], "right"),
        lambda: PromptMeter(processor).prompt_tokens(turn),
    ]
    for call in calls:
        with raises_code("tokenizer-failed"):
            call()
    encode(processor, [Turn("second", None, "What is it?", None)], "right")


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "text", ["{% if 1 %}" * 9000 + "{% endif %}" * 9000, "{{ nothing.at.all }}", "{{ raise_exception('no') }}"]
)
def test_failing_chat_template_names_the_record(text: str, copy: Path) -> None:
    prepend_to_template(copy, text)
    processor = load_processor(copy)
    with raises_code("chat-template-failed", record='"first"'):
        encode(processor, [Turn("first", None, "What is it?", None)], "right")


@pytest.mark.timeout(120)
def test_extreme_image_is_an_error_of_its_record(copy: Path, tmp_path: Path) -> None:
    file = copy / "processor_config.json"
    content = json.loads(file.read_text())
    content["image_processor"]["size"] = {"shortest_edge": 336}
    write_json(file, content)
    processor = load_processor(copy)
    Image.new("RGB", (20_000, 1)).save(tmp_path / "line.png")
    with raises_code("image-too-large", record='"first"'):
        encode(processor, [Turn("first", tmp_path / "line.png", "What is it?", None)], "right")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("command", ["train", "evaluate", "check"])
def test_commands_print_one_line(
    command: str, copy: Path, training_sets: dict[str, Path], world: Path, tmp_path: Path
) -> None:
    prepend_to_template(copy, "{% set s = 'x' * 10000000000 %}")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {copy}\ndata: {training_sets['harmful']}\noutput: {tmp_path / 'run'}\nmethod: npo\n")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "What is it?", "answer": "A cat."}\n')
    arguments: dict[str, list[object]] = {
        "train": ["train", recipe, "--plan"],
        "evaluate": ["evaluate", "suites/tiny", f"model={copy}", f"root={world}", "--out", tmp_path / "evaluation"],
        "check": ["data", "check", rows, "--processor", copy],
    }
    done = run(*arguments[command])
    assert (done.returncode, error_code(done)) == (2, "resource-limit"), done.stderr
    assert "chat_template.jinja" in done.stderr
