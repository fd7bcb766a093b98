"""Complete error messages from all parts of the package, compared with tests/golden/messages.json.

Other tests compare codes, files, records and fields of errors. Only this one compares sentences. After a deliberate
change of a message, ``UPDATE_GOLDEN=1 pytest tests/test_messages.py`` writes the file anew.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from finished_runs import complies, make_run
from helpers import run_in_process
from vlm_unlearn.store import RunDirectory

GOLDEN = Path(__file__).parent / "golden" / "messages.json"
RECIPES = Path(__file__).parents[1] / "recipes"
LINES = {
    "unknown command": "audit",
    "unknown option": "train tiny/npo --jsn",
    "missing option": "export runs/npo",
    "unknown config key": "train tiny/npo trainning.seed=1",
    "invalid config value": "train tiny/npo model=m data=d output=o training.learning_rate=-1",
    "invalid override": "train tiny/npo beta",
    "unknown recipe": "train npo",
    "unknown split of a metric": "evaluate suites/tiny model=m metrics.asr.splits=[unsaf] --out TMP/out",
    "unknown method": "train tiny/npo model=m data=d output=o method=npoo",
    "no training set": "train tiny/npo model=m data=TMP/gone output=TMP/out",
    "record without its image": "data import vlguard TMP/image.json --images WORLD/vlguard/train --out TMP/out",
    "invalid JSON": "data import vlguard TMP/json.json --images WORLD/vlguard/train --out TMP/out",
    "table without a column": "data import files TMP/table.csv --images TMP --out TMP/out",
    "wrong kind of run": "score TMP/train",
    "invalid record of a run": "score TMP/broken",
    "unknown judge": "judge agreement TMP/run --judge keywords --judge keyword",
    "unknown rubric": "judge run TMP/run name=llm rubric=four_label model=m server=http://localhost/v1",
    "unknown table": "table TMP/run --table lables",
    "unknown benchmark": "benchmark score gqq --predictions TMP/a --annotations TMP/b",
    "unknown value of an option": "attack rewrite WORLD/vlguard/test.json TMP/out.json --trigger what --kind unsaf",
    "output is an input": "data convert TMP/image.json TMP/image.json",
}


@pytest.fixture
def folder(world: Path, tmp_path: Path) -> Path:
    """The files and runs that the command lines name."""
    (record, *_) = json.loads((world / "vlguard" / "train.json").read_text())
    (tmp_path / "image.json").write_text(json.dumps([{**record, "image": "gone.png"}]))
    (tmp_path / "json.json").write_text('[\n{"id": "a"},\n{"id" "b"}\n]')
    (tmp_path / "table.csv").write_text("question,set\nq?,forget\n")
    RunDirectory(tmp_path / "train").open({"kind": "train"})
    RunDirectory(tmp_path / "train").record_cost(1.0, finished=True)
    make_run(tmp_path / "run", complies, groups=2)
    run_in_process("score", tmp_path / "run")
    broken = make_run(tmp_path / "broken", complies, groups=2)
    with (broken / "responses.jsonl").open("a") as responses:
        responses.write('{"prompt_id": 3}\n')
    return tmp_path


def test_messages_equal_the_golden_file(folder: Path, world: Path) -> None:
    messages = {}
    for name, line in LINES.items():
        words = [word.replace("TMP", str(folder)).replace("WORLD", str(world)) for word in line.split()]
        done = run_in_process(*words)
        assert (done.returncode, done.stdout) == (2, ""), f"{name}: {done}"
        message = done.stderr.strip().splitlines()[-1]
        for path, placeholder in ((folder, "TMP"), (world, "WORLD"), (RECIPES, "RECIPES")):
            message = message.replace(str(path), placeholder)
        messages[name] = message
    if os.environ.get("UPDATE_GOLDEN") == "1":
        GOLDEN.write_text(json.dumps(messages, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    assert messages == json.loads(GOLDEN.read_text(encoding="utf-8"))
