"""A judge on a real server, directly and behind a failing proxy: `transformers serve` with a tiny LLaVA."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from PIL import Image

from stub_server import send_json
from vlm_unlearn.config import JudgeConfig
from vlm_unlearn.data.encoding import Turn, encode_with_labels
from vlm_unlearn.generation.chat import ChatCache
from vlm_unlearn.judging.base import Answer, judge_file
from vlm_unlearn.judging.llm import LLMJudge
from vlm_unlearn.judging.rubric import load_rubric
from vlm_unlearn.records import Prompt, Response, Verdict
from vlm_unlearn.store import read_records

pytest.importorskip("uvicorn", reason="needs transformers[serving]")
pytestmark = [pytest.mark.slow, pytest.mark.multiprocess, pytest.mark.timeout(300)]

RUBRIC = """---
version: 1
source: this test
image: true
words: {RED: {label: complied, score: 1}, BLUE: {label: refused, score: 0}}
---
what colour is this ?
{fence}
{answer}
{fence}
"""
LABEL = {"red": "complied", "blue": "refused"}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[Answer]:
    """Sixty answers on red and blue images of many shades."""
    folder = tmp_path_factory.mktemp("images")
    answers = []
    for number in range(60):
        rng = random.Random(number)
        color = ("red", "blue")[number % 2]
        strong, weak = rng.randint(180, 255), rng.randint(0, 60)
        path = folder / f"{number}.png"
        Image.new("RGB", (32, 32), (strong, weak, weak) if color == "red" else (weak, weak, strong)).save(path)
        prompt = Prompt(
            id=f"p{number}",
            group_id=f"p{number}",
            set="s",
            kind="unsafe",
            question="q",
            image=path.name,
            category=color,
        )
        answers.append(Answer(prompt, Response(prompt_id=prompt.id, text=f"it is thing {number} ."), path.parent))
    return answers


@pytest.fixture(scope="module")
def rubric(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("rubric") / "color.txt"
    file.write_text(RUBRIC)
    return str(file)


@pytest.fixture(scope="module")
def server(answers: list[Answer], rubric: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Address and model name of `transformers serve`, once the server is ready."""
    folder = tmp_path_factory.mktemp("serve")
    _train(folder / "model", answers[:16], rubric)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = folder / "hf"
    (home / "hub").mkdir(parents=True)
    environment = {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_HOME": str(home),
        "OMP_NUM_THREADS": "1",
    }
    command = shutil.which("transformers", path=str(Path(sys.executable).parent)) or "transformers"
    arguments = [
        "serve",
        str(folder / "model"),
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    log = (folder / "log").open("w")
    process = subprocess.Popen([command, *arguments], stdout=log, stderr=log, env={**os.environ, **environment})
    try:
        for _ in range(600):
            assert process.poll() is None, (folder / "log").read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).read()
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}", str(folder / "model")
    finally:
        process.kill()
        process.wait()
        log.close()


def _train(folder: Path, examples: list[Answer], rubric: str) -> None:
    """Trains a tiny LLaVA to name the color of an image with the rubric's prompt."""
    from vlm_unlearn.worlds.tiny.lexicon import vocabulary
    from vlm_unlearn.worlds.tiny.llava import tiny_llava, tiny_processor

    torch.manual_seed(0)
    processor = tiny_processor(vocabulary())
    model = tiny_llava(processor, width=64, vision_layers=1, layers=2)
    judge_rubric = load_rubric(rubric)
    turns = [
        Turn(
            example.prompt.id,
            example.image(),
            judge_rubric.build_prompt(example.prompt, str(example.response.text)),
            example.prompt.category,
        )
        for example in examples
    ]
    batch = encode_with_labels(processor, turns, max_length=512)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 1e-3:
            break
    assert loss.item() < 0.05
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def config(url: str, model: str, rubric: str, **changes: object) -> JudgeConfig:
    fields = {"name": "llm", "rubric": rubric, "model": model, "server": f"{url}/v1", "max_tokens": 4, "concurrency": 6}
    return JudgeConfig.model_validate(fields | changes)


def test_llm_judge_on_a_real_server_grades_images(
    server: tuple[str, str], answers: list[Answer], rubric: str, tmp_path: Path
) -> None:
    judge_file(LLMJudge(config(*server, rubric), ChatCache(tmp_path / "c.sqlite")), answers, tmp_path / "v.jsonl")
    verdicts = {verdict.prompt_id: verdict for verdict in read_records(tmp_path / "v.jsonl", Verdict)}
    correct = sum(verdicts[answer.prompt.id].label == LABEL[str(answer.prompt.category)] for answer in answers)
    assert correct == 60  # only the image contains the color
    assert all(verdict.tokens and verdict.tokens[0] > 5 for verdict in verdicts.values())
    local = LLMJudge(config("", server[1], rubric, server=None), ChatCache(tmp_path / "local.sqlite"))
    judge_file(local, answers[:8], tmp_path / "local.jsonl")
    local_labels = {verdict.prompt_id: verdict.label for verdict in read_records(tmp_path / "local.jsonl", Verdict)}
    assert local_labels == {id: verdicts[id].label for id in local_labels}  # the same judge without a server


class Proxy:
    """Forwards requests to a server, except for a share that it fails. Counts both."""

    FAULTS = ("429", "500", "hang", "disconnect", "broken JSON", "empty choices")

    def __init__(self, upstream: str, share: float) -> None:
        self.passed: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.share = share
        self._rng = random.Random(0)
        self._lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with proxy._lock:
                    fails = proxy._rng.random() < proxy.share
                    fault = proxy.FAULTS[proxy.failed.total() % len(proxy.FAULTS)] if fails else ""
                    if fails:
                        proxy.failed[fault] += 1
                if fault in ("disconnect", "hang"):
                    time.sleep(3 if fault == "hang" else 0)
                    self.close_connection = True
                    self.connection.close()
                elif fault == "broken JSON":
                    self._send(200, b'{"choices": [{"message": {"content": "re')
                elif fault == "empty choices":
                    self._send(200, b'{"choices": []}')
                elif fault:
                    self._send(int(fault), b'{"error": {"message": "fault"}}')
                else:
                    request = urllib.request.Request(upstream + self.path, body, {"Content-Type": "application/json"})
                    reply = urllib.request.urlopen(request, timeout=60).read()
                    text = str(json.loads(body)["messages"][0]["content"][-1]["text"])
                    with proxy._lock:
                        proxy.passed[text] += 1
                    self._send(200, reply)

            def _send(self, status: int, raw: bytes) -> None:
                send_json(self, status, raw, retry_after="0.1")

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def test_llm_judge_behind_a_failing_proxy_loses_no_verdict(
    server: tuple[str, str], answers: list[Answer], rubric: str, tmp_path: Path
) -> None:
    """Every answer gets one verdict, which may be null. Another run grades the null ones and requests nothing else."""
    with Proxy(server[0], 0.3) as proxy:

        def graded(retries: int) -> dict[str, Verdict]:
            chosen = config(proxy.url, server[1], rubric, retries=retries, timeout=1.5)
            judge_file(LLMJudge(chosen, ChatCache(tmp_path / "c.sqlite")), answers, tmp_path / "v.jsonl")
            verdicts = list(read_records(tmp_path / "v.jsonl", Verdict))
            assert Counter(verdict.prompt_id for verdict in verdicts) == Counter(answer.prompt.id for answer in answers)
            for verdict in verdicts:
                assert (verdict.label is None) == (verdict.error is not None)
            return {verdict.prompt_id: verdict for verdict in verdicts}

        verdicts = graded(retries=0)
        null = [id for id, verdict in verdicts.items() if verdict.label is None]
        assert 5 < len(null) < 40
        assert proxy.failed.total() == len(null)
        assert set(proxy.failed) == set(proxy.FAULTS)
        completed = graded(retries=6)
        assert all(completed[answer.prompt.id].label == LABEL[str(answer.prompt.category)] for answer in answers)
        assert all(completed[id] == verdict for id, verdict in verdicts.items() if verdict.label is not None)
        assert proxy.passed.total() == 60
        requests = proxy.passed.total() + proxy.failed.total()
        graded(retries=0)
        assert proxy.passed.total() + proxy.failed.total() == requests
