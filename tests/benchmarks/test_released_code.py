"""The benchmark against the released code: its cases, data, results and tables. The released code is not needed."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from vlm_unlearn.config import Recipe, load
from vlm_unlearn.data.dataset import UnlearningDataset
from vlm_unlearn.data_tools.importers import import_files, import_safe_eraser

ROOT = Path(__file__).parents[2]


@pytest.fixture
def released(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("released")


@pytest.fixture
def sides(released: Any) -> Any:
    return importlib.import_module("released_sides")


def row(case: Any, released: Any, **values: Any) -> dict[str, Any]:
    measured = {
        "ratio": 2.0,
        "ratio_lowest": 1.5,
        "ratio_highest": 2.5,
        "processor_ratio": 2.1,
        "seconds": 1.0,
        "released_seconds": 2.0,
        "memory_mb": 100,
        "released_memory_mb": 200,
    }
    return {**released.asdict(case), **measured, **values}


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "released.py"), *arguments], capture_output=True, text=True
    )


def test_docs_have_the_tables_of_the_results_file(released: Any) -> None:
    rows = list(released.read_rows(released.RESULTS).values())
    start, end = released.DOCS_MARKS
    tables = released.DOCS.read_text(encoding="utf-8").partition(start)[2].partition(end)[0]
    assert tables.strip() == released.tables(rows), "run `python benchmarks/released.py --docs`"


def test_every_case_is_a_shipped_recipe(released: Any) -> None:
    """Our side changes nothing but paths, the number of loading processes and the layers of RMU."""
    for case in released.cases():
        path = Path(f"{case.system}/{case.recipe}_7b")
        overrides = [*released.OVERRIDES.get(case.recipe, []), *case.overrides]
        paths = {"data": "data", "output": "out"}
        shipped, used = load(Recipe, path, values=paths), load(Recipe, path, overrides, paths)
        differences = {
            key for key in ("method", "trainable", "training") if getattr(shipped, key) != getattr(used, key)
        }
        assert differences == {override.partition(".")[0] for override in overrides}
        assert (case.system, case.recipe.endswith("lora")) in released.BATCHES
    assert len({case.name for case in released.cases()}) == len(released.cases())


def test_tables_have_each_case_once(released: Any) -> None:
    rows = [row(case, released) for case in released.cases()]
    lines = [line for line in released.tables(rows).splitlines() if line.startswith("| `")]
    assert len(lines) == len(rows)
    assert lines[0] == "| `ga` | 1 × 16 | 2.00 s | 1.00 s | **2.00** (1.50–2.50) | 2.10 | 0.50 |"
    checked = [row(case, released, full_loss_difference=3e-7) for case in released.cases()[:8]]
    assert "| losses differ by |" in released.tables(checked)
    assert "| 0.50 | 3e-07 |" in released.tables(checked)
    assert released.tables([]) == ""


def test_docs_are_replaced_between_the_comments(released: Any, tmp_path: Path) -> None:
    page, (start, end) = tmp_path / "page.md", released.DOCS_MARKS
    page.write_text(f"Above.\n\n{start}\nold\n\n{end}\nBelow.\n")
    released.write_docs(page, [row(released.cases()[0], released)])
    text = page.read_text()
    assert text.startswith(f"Above.\n\n{start}")
    assert text.endswith(f"{end}\nBelow.\n")
    assert "old" not in text
    assert "| `ga` |" in text


def test_a_stopped_run_keeps_its_rows_and_continues(
    released: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, measured = tmp_path / "results.json", []

    def measure(case: Any, *_: Any) -> dict[str, Any]:
        measured.append(case.recipe)
        if len(measured) == 3:
            raise SystemExit("killed")
        return row(case, released)

    monkeypatch.setattr(released, "measure", measure)
    monkeypatch.setattr(released, "compare_losses", lambda *_: 1e-7)
    monkeypatch.setattr(released, "check_released_code", lambda *_: None)
    names = [f"safe_eraser {recipe} single" for recipe in ("ga", "ga_pd", "kl")]
    arguments = ["released.py", "--safe-eraser", str(tmp_path), "--cases", *names]
    monkeypatch.setattr(sys, "argv", [*arguments, "--out", str(out)])
    with pytest.raises(SystemExit):
        released.main()
    assert measured == ["ga", "ga_pd", "kl"]
    assert [stored["recipe"] for stored in json.loads(out.read_text())["rows"]] == ["ga", "ga_pd"]
    released.main()
    assert measured[3:] == ["kl"]
    rows = released.read_rows(out)
    assert list(rows) == names
    assert rows["safe_eraser kl single"]["full_loss_difference"] == 1e-7
    measured.clear()
    measured += ["", "", ""]
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--again"])
    released.main()
    assert measured[3:] == [stored["recipe"] for stored in rows.values()]


def test_rows_of_other_cases_are_dropped(released: Any, tmp_path: Path) -> None:
    file, known = tmp_path / "results.json", released.cases()[0]
    removed = {**row(known, released), "recipe": "nosuch"}
    file.write_text(json.dumps({"rows": [removed, row(known, released)]}))
    assert list(released.read_rows(file)) == [known.name]
    assert released.read_rows(tmp_path / "none.json") == {}


def test_without_the_released_code_the_command_says_how_to_get_it(tmp_path: Path) -> None:
    done = command("--out", str(tmp_path / "results.json"))
    assert done.returncode == 1
    for text in ("--safe-eraser is missing", "--safety-mirage is missing", "github.com/yuu250/SafeEraser"):
        assert text in done.stderr
    assert not list(tmp_path.iterdir())


def test_wrong_folders_and_environments_are_named(released: Any, tmp_path: Path) -> None:
    check = released.check_released_code
    assert "forget.py not found" in check("safe_eraser", tmp_path, None)
    (tmp_path / "forget.py").touch()
    assert "--safe-eraser-python is missing" in check("safe_eraser", tmp_path, None)
    missing = check("safe_eraser", tmp_path, tmp_path / "python")
    assert "No such file" in missing
    assert "transformers==4.46.3" in missing
    ours = check("safe_eraser", tmp_path, Path(sys.executable))  # hydra is missing, or transformers is newer
    assert "--safe-eraser-python" in ours
    assert "pip install" in ours


def test_unknown_cases_and_trials_are_rejected() -> None:
    unknown = command("--cases", "nosuch")
    assert unknown.returncode == 1
    assert "safe_eraser gd_pd single" in unknown.stderr
    trial = command("--override", "training.gradient_checkpointing=false")
    assert trial.returncode == 1
    assert "--out" in trial.stderr
    assert command("--list", "--cases", "rmu_lora").stdout == "safety_mirage rmu_lora single\n"


@pytest.mark.parametrize("shape", ["single", "several"])
def test_safe_eraser_data_have_their_shape(released: Any, sides: Any, tmp_path: Path, shape: str) -> None:
    settings = {**released.SHAPES[shape], "images": 12}
    released.write_inputs(tmp_path / "in", "safe_eraser", settings)
    folder = tmp_path / "in" / "dataset"
    import_safe_eraser(folder / "all_train.json", tmp_path / "in", tmp_path / "data", folder / "prompt.json")
    data = UnlearningDataset.from_folder(tmp_path / "data")
    questions = settings["questions"]
    for role in ("forget", "retain", "decouple"):
        images = Counter(example.image for example in data[role])
        assert list(images.values()) == [questions] * 12
    shared = {example.image for example in data["forget"]} & {example.image for example in data["retain"]}
    assert bool(shared) == (questions > 1)


def test_safety_mirage_data_and_the_sizes_of_the_model(released: Any, sides: Any, tmp_path: Path) -> None:
    work = tmp_path / "in"
    released.write_inputs(work, "safety_mirage", {**released.SHAPES["single"], "images": 6})
    files = {role: work / f"{role}_data.json" for role in ("forget", "retain")}
    import_files(files, work / "image", tmp_path / "data")
    data = UnlearningDataset.from_folder(tmp_path / "data")
    assert {role: len(data[role]) for role in ("forget", "retain")} == {"forget": 6, "retain": 6}
    counts = []
    for folder in (work / "hf", work / "llava", work / "llava" / "clip"):
        with safe_open(folder / "model.safetensors", "np") as weights:
            counts.append(sum(weights.get_tensor(name).size for name in weights.keys()))  # noqa: SIM118
    assert counts[0] == counts[1] + counts[2]
    assert 5.2e6 < counts[0] < 5.6e6
    assert json.loads((work / "hf" / "config.json").read_text())["image_seq_length"] == 144


def test_equal_samples_differ_in_nothing(released: Any, sides: Any, tmp_path: Path) -> None:
    """So that the draws of the two sides do not matter where their losses are compared."""
    released.write_inputs(tmp_path / "in", "safe_eraser", {**released.SHAPES["same"], "images": 3})
    records = json.loads((tmp_path / "in" / "dataset" / "all_train.json").read_text())
    texts = [[pair["question"] for pair in record["unsafe_pairs"]] for record in records if record["unsafe_pairs"]]
    assert texts == [texts[0]] * 3
    assert len(json.loads((tmp_path / "in" / "dataset" / "prompt.json").read_text())["idk"]) == 1


@pytest.mark.slow
def test_our_side_trains_a_step_on_command(released: Any, sides: Any, tmp_path: Path) -> None:
    case = released.Case("safe_eraser", "gd", overrides=("training.gradient_accumulation_steps=1",))
    work = tmp_path / "llava"
    released.write_inputs(work, case.system, {**released.SHAPES["single"], "images": 4})
    jobs = {"ours": released.job(case, "ours", work, tmp_path, workers=0)}
    with released.two_sides(jobs, {"ours": sys.executable}) as running:
        assert running["ours"].first["seconds"] > 0
        assert running["ours"].command("2")["processor_seconds"] > 0
        assert "aten::mm" in running["ours"].command("1 operators")["profile"]
        last = running["ours"].command("stop")
    assert last["memory_mb"] > 0
    assert abs(last["first_loss"]) < 10
