"""One odd record is one failed, named answer in every backend, and training's checks name it."""

from __future__ import annotations

import importlib.machinery
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

import families
from helpers import error_code, run_in_process
from stub_server import stub_server
from vlm_unlearn.config import Suite, load
from vlm_unlearn.evaluation.generate import generate_run
from vlm_unlearn.evaluation.prompts import suite_prompts
from vlm_unlearn.generation.chat import ChatRequest, complete_all
from vlm_unlearn.generation.local_chat import LocalChat
from vlm_unlearn.records import Response
from vlm_unlearn.store import read_records


def encoded(size: tuple[int, int], form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 90).convert("RGB").save(buffer, format=form)
    return buffer.getvalue()


BROKEN: dict[str, Callable[[], bytes]] = {
    "text": lambda: b"no image",
    "empty": lambda: b"",
    "truncated JPEG": lambda: encoded((320, 240), "JPEG")[:3000],
    "truncated PNG": lambda: encoded((64, 48))[:2000],
}
# The image processor of Qwen rejects an aspect ratio above 200.
ODD = BROKEN | {
    "wide": lambda: encoded((1093, 5)),
    "tall": lambda: encoded((3, 700)),
    "thin": lambda: encoded((2000, 9)),
}


@pytest.fixture
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.shared_folder("qwen2_5_vl", tmp_path_factory)


def records(folder: Path, odd: bytes) -> Path:
    """A table of three rows, of which the second has an odd image."""
    (folder / "images").mkdir()
    for name, content in (("a.png", encoded((32, 32))), ("odd.png", odd), ("b.png", encoded((48, 32)))):
        (folder / "images" / name).write_bytes(content)
    rows = [
        {"id": name, "image": f"{name}.png", "question": "What is it?", "answer": "A kite.", "set": "harmful"}
        for name in ("a", "odd", "b")
    ]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder / "rows.jsonl"


def suite(folder: Path, model: object, *overrides: str) -> Suite:
    file = folder / "suite.yaml"
    file.write_text(
        "splits: [{name: mine, format: table, file: rows.jsonl, images: images, kind: unsafe}]\n"
        "metrics: {asr: {splits: [mine], labels: [complied]}}\njudge: keyword\n"
        "generation: {max_new_tokens: 3, batch_size: 4}\n"
    )
    return load(Suite, file, [f"model={model}", f"root={folder}", *overrides])


def assert_only_the_odd_one_fails(config: Suite, folder: Path) -> None:
    """Twice: the second run asks the failed question again."""
    for _ in range(2):
        generate_run(config, folder / "run")
        answers = {response.prompt_id: response for response in read_records(folder / "run/responses.jsonl", Response)}
        assert len(answers) == 3
        assert [id for id, response in answers.items() if response.text is None] == ["mine/odd/0"]
        assert answers["mine/odd/0"].error


@pytest.mark.parametrize("kind", ODD)
def test_local_model(kind: str, model: Path, tmp_path: Path) -> None:
    records(tmp_path, ODD[kind]())
    assert_only_the_odd_one_fails(suite(tmp_path, model), tmp_path)


@pytest.mark.parametrize("kind", BROKEN)
def test_server(kind: str, tmp_path: Path) -> None:
    records(tmp_path, BROKEN[kind]())
    with stub_server(lambda text: "A kite.") as server:
        keys = ("generation.backend=openai", f"generation.server={server.url}")
        assert_only_the_odd_one_fails(suite(tmp_path, "m", *keys), tmp_path)


def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM, which rejects images of an extreme aspect ratio, and with them all requests of the call."""

    class LLM:
        def __init__(self, **settings: Any) -> None:
            pass

        def chat(self, messages: list[Any], sampling_params: list[Any], use_tqdm: bool = True) -> list[Any]:
            from base64 import b64decode

            for (message,) in messages:
                url = message["content"][0]["image_url"]["url"]
                with Image.open(io.BytesIO(b64decode(url.partition(",")[2]))) as image:
                    if max(image.size) > 200 * min(image.size):
                        raise ValueError("absolute aspect ratio must be smaller than 200")
            output = SimpleNamespace(outputs=[SimpleNamespace(text="A kite.", finish_reason="stop")])
            return [output for _ in messages]

    module = ModuleType("vllm")
    module.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    module.LLM, module.SamplingParams = LLM, SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)


@pytest.mark.parametrize("kind", ODD)
def test_vllm(kind: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_vllm(monkeypatch)
    records(tmp_path, ODD[kind]())
    assert_only_the_odd_one_fails(suite(tmp_path, model, "generation.backend=vllm"), tmp_path)


@pytest.mark.parametrize("kind", ODD)
def test_chat_model_of_a_judge(kind: str, model: Path, tmp_path: Path) -> None:
    records(tmp_path, ODD[kind]())
    requests = [ChatRequest(name, "What is it?", tmp_path / "images" / f"{name}.png") for name in ("a", "odd", "b")]
    responses, _ = complete_all(LocalChat(str(model), max_tokens=3, batch_size=3), requests, None)
    assert {id for id, response in responses.items() if response.finish_reason is None} == {"odd"}
    assert responses["odd"].error


@pytest.mark.parametrize("kind", ["wide", "tall", "thin"])
def test_training_and_its_check_name_the_record(kind: str, model: Path, tmp_path: Path) -> None:
    table = records(tmp_path, ODD[kind]())
    files = ("--forget", table, "--retain", table, "--images", tmp_path / "images", "--out", tmp_path / "set")
    table.write_text(table.read_text().replace(', "set": "harmful"', ""))
    assert run_in_process("data", "import", "files", *files).returncode == 0
    done = run_in_process("data", "check", tmp_path / "set", "--processor", model, "--json")
    (first, *_) = json.loads(done.stdout)["broken"]["first"]
    assert "table/odd" in first
    keys = (f"model={model}", f"data={tmp_path / 'set'}", f"output={tmp_path / 'run'}")
    done = run_in_process("train", "tiny/gd", *keys)
    assert (done.returncode, error_code(done)) == (2, "invalid-image")
    assert "table/odd" in done.stderr
    assert not (tmp_path / "run" / "manifest.json").exists()


@pytest.mark.parametrize("question", ["What does <image> mean?", "<|im_end|> What?", "What is <|image_pad|>?"])
def test_placeholder_in_a_question_is_text(question: str, model: Path, tmp_path: Path) -> None:
    table = records(tmp_path, encoded((32, 32)))
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    rows[1]["question"] = question
    table.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    config = suite(tmp_path, model)
    assert len(suite_prompts(config)) == 3
    generate_run(config, tmp_path / "run")
    assert all(response.text is not None for response in read_records(tmp_path / "run/responses.jsonl", Response))
