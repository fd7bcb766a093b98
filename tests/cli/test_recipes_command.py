"""recipes lists what is shipped, and prints what one's own can start from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from vlm_unlearn.cli import main as cli
from vlm_unlearn.config import Recipe, Suite, load, shipped_names


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["vlm-unlearn", "recipes", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


def test_it_lists_every_recipe_and_suite(call) -> None:
    page = call()[1]
    found = {one["name"]: one for one in json.loads(call("--json")[1])}
    assert sorted(found) == sorted(shipped_names())
    assert all(f"  {name} " in page for name in found)
    assert found["safe_eraser/po_pd_13b"]["about"] == "po+pd, LoRA on llava-hf/llava-1.5-13b-hf"
    assert found["suites/tiny"]["kind"] == "suite"
    assert found["suites/tiny"]["about"].startswith("asr, asr_attacked")


@pytest.mark.parametrize("name", shipped_names())
@pytest.mark.parametrize("flat", [False, True])
def test_a_copy_elsewhere_says_the_same(call, tmp_path: Path, name: str, flat: bool) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(call(name, *["--resolved"] * flat)[1])
    suite = name.startswith("suites/")
    config, keys = (Suite, ["model=m", "root=/data"]) if suite else (Recipe, ["model=m", "data=d", "output=o"])
    assert load(config, mine, keys) == load(config, Path(name), keys)
    assert ("extends" in yaml.safe_load(mine.read_text())) <= (not flat)


def test_what_is_not_there_is_told_with_the_nearest(call) -> None:
    assert 'did you mean "suites/specificity"?' in call("suites/specificty")[2]
    assert call("../../etc/passwd")[0] == 2
    assert "of one recipe" in call("--resolved")[2]
