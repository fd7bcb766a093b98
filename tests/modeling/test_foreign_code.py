"""Python code in a model folder is never executed, whatever its files refer to and whatever standard input contains."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from helpers import raises_code
from vlm_unlearn.errors import UserError
from vlm_unlearn.modeling.loader import load_model, load_processor, read_config

MODULE = (
    "from pathlib import Path\nPath({!r}).touch()\n"
    "class Config: pass\nclass Model: pass\nclass Processor: pass\nclass Tokenizer: pass\n"
)
UNKNOWN_TYPES = {"config.json": {"model_type": "evil"}, "processor_config.json": {"processor_class": "EvilProcessor"}}


@pytest.mark.parametrize(
    ("load", "auto_maps"),
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
def test_loading_model_folder_never_runs_its_code(
    load: Callable[[Path], object],
    auto_maps: dict[str, dict[str, object]],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, marker = Path(shutil.copytree(tiny_model, tmp_path / "model")), tmp_path / "marker"
    (folder / "evil.py").write_text(MODULE.format(str(marker)))
    for name, auto_map in auto_maps.items():
        file = folder / name
        content = json.loads(file.read_text()) if file.is_file() else {}
        changes = {"auto_map": auto_map, **UNKNOWN_TYPES.get(name, {"tokenizer_class": "EvilTokenizer"})}
        file.write_text(json.dumps(content | changes))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # the answer to transformers' question
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    # A processor may still load: transformers can know its components by other names.
    with raises_code("invalid-model", file=folder) if "config.json" in auto_maps else suppress(UserError):
        load(folder)
    assert not marker.exists()
