"""``vlm-unlearn recipes`` lists the shipped files, and prints one as the start of another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from helpers import error_code, run_in_process
from vlm_unlearn.cli import main as cli
from vlm_unlearn.config import Recipe, RobustnessSuite, Suite, Sweep, load, shipped_names


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def run_recipes(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["vlm-unlearn", "recipes", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return run_recipes


def test_list_has_every_recipe_and_suite(call) -> None:
    page = call()[1]
    descriptions = {one["name"]: one for one in json.loads(call("--json")[1])}
    assert sorted(descriptions) == sorted(shipped_names())
    assert all(f"  {name} " in page for name in descriptions)
    assert descriptions["safe_eraser/po_pd_13b"]["about"] == "po+pd, LoRA on llava-hf/llava-1.5-13b-hf"
    assert descriptions["suites/tiny"]["kind"] == "suite"
    assert descriptions["suites/tiny"]["about"].startswith("asr, asr_attacked")


@pytest.mark.parametrize("name", shipped_names())
@pytest.mark.parametrize("flat", [False, True])
def test_a_printed_copy_loads_as_the_shipped_file(call, tmp_path: Path, name: str, flat: bool) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(call(name, *["--resolved"] * flat)[1])
    suite = name.startswith("suites/")
    config, keys = (Suite, ["model=m", "root=/data"]) if suite else (Recipe, ["model=m", "data=d", "output=o"])
    if "robustness" in name:
        config, keys = RobustnessSuite, ["root=/data"]
    elif name.startswith("sweeps/"):
        config, keys = Sweep, ["trials=3"]
    assert load(config, mine, keys) == load(config, Path(name), keys)
    assert ("extends" in yaml.safe_load(mine.read_text())) <= (not flat)


def test_unknown_name_suggests_the_nearest() -> None:
    done = run_in_process("recipes", "suites/specificty")
    assert (done.returncode, error_code(done)) == (2, "unknown-name")
    assert '"suites/specificity"' in done.stderr
    assert run_in_process("recipes", "../../etc/passwd").returncode == 2
    assert error_code(run_in_process("recipes", "--resolved")) == "missing-setting"
