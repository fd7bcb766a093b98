"""No Python that comes with a model folder is run, whatever its files name and whatever stands on standard input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from vlm_unlearn.errors import UserError
from vlm_unlearn.models.loader import load_model, load_processor, read_config

EVIL = "from pathlib import Path\nPath({!r}).touch()\nclass Config: pass\nclass Model: pass\nclass Processor: pass\nclass Tokenizer: pass\n"


def _with(file: Path, **changes: object) -> None:
    known = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(known | changes))


@pytest.mark.parametrize(
    ("load", "wanted"),
    [
        (read_config, {"config.json": {"AutoConfig": "evil.Config"}}),
        (
            lambda folder: load_model(folder, "fp32"),
            {"config.json": {"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.Model"}},
        ),
        (load_processor, {"processor_config.json": {"AutoProcessor": "evil.Processor"}}),
        (load_processor, {"tokenizer_config.json": {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}}),
    ],
)
def test_it_is_not_run(
    load: Callable[[Path], object],
    wanted: dict[str, dict[str, object]],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, ran = Path(shutil.copytree(tiny_model, tmp_path / "model")), tmp_path / "ran"
    (folder / "evil.py").write_text(EVIL.format(str(ran)))
    for name, classes in wanted.items():
        unknown = {"config.json": {"model_type": "evil"}, "processor_config.json": {"processor_class": "EvilProcessor"}}
        _with(folder / name, auto_map=classes, **unknown.get(name, {"tokenizer_class": "EvilTokenizer"}))
    monkeypatch.setattr(
        "builtins.input", lambda *_: "y"
    )  # what somebody, or a pipe, would answer to transformers' question
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(UserError, match="can't load it") if "config.json" in wanted else suppress(UserError):
        load(folder)  # a processor's parts may be known under other names
    assert not ran.exists()
