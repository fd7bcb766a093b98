"""Training-set folders: written whole, checked on reading, loadable with datasets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from vlm_unlearn.data.importers import import_safe_eraser, import_vlguard
from vlm_unlearn.data.training_set import read_training_set
from vlm_unlearn.errors import UserError
from vlm_unlearn.records import Example


def test_what_is_written_is_read(training_sets: dict[str, Path]) -> None:
    found = read_training_set(training_sets["safe_eraser"])
    assert {role: len(examples) for role, examples in found.examples.items()} == {
        "forget": 24,
        "retain": 48,
        "decouple": 24,
    }
    assert len(found.refusals) == 4
    described = json.loads((training_sets["safe_eraser"] / "dataset.json").read_text())
    assert described["files"]["forget.jsonl"]["count"] == 24
    assert not Path(described["images"]["safe_eraser"]).is_absolute()
    assert all(found.image_path(example) for example in found.examples["forget"])


def test_it_loads_with_datasets(training_sets: dict[str, Path], tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.load_dataset(
        "json", data_files=str(training_sets["harmful"] / "forget.jsonl"), cache_dir=str(tmp_path)
    )["train"]
    assert set(Example.model_fields) == set(table.column_names)


def test_an_empty_forget_set_writes_nothing(world: Path, tmp_path: Path) -> None:
    answers = tmp_path / "answers.json"
    answers.write_text("{}")
    vlguard = world / "vlguard"
    with pytest.raises(UserError, match="names no image of an unsafe record"):
        import_vlguard(vlguard / "train.json", vlguard / "train", tmp_path / "out", answers)
    assert not (tmp_path / "out").exists()


def test_reading_names_what_is_wrong(training_sets: dict[str, Path], tmp_path: Path) -> None:
    def broken(name: str) -> Path:
        return Path(shutil.copytree(training_sets["harmful"], tmp_path / name))

    with pytest.raises(UserError, match="no such training-set folder"):
        read_training_set(tmp_path / "gone")
    folder = broken("empty")
    (folder / "forget.jsonl").write_text("")
    with pytest.raises(UserError, match=r"forget\.jsonl: the forget set is empty"):
        read_training_set(folder)
    folder = broken("image")
    described = json.loads((folder / "dataset.json").read_text())
    described["images"]["vlguard"] = str(tmp_path)
    (folder / "dataset.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=r'forget\.jsonl: line 1 \(".*"\): image ".*" not found'):
        read_training_set(folder)


def test_importing_again_leaves_nothing_of_before(world: Path, tmp_path: Path) -> None:
    eraser, vlguard = world / "safe_eraser", world / "vlguard"
    import_safe_eraser(eraser / "all_train.json", eraser, tmp_path / "out", eraser / "prompt.json")
    import_vlguard(vlguard / "train.json", vlguard / "train", tmp_path / "out")
    assert read_training_set(tmp_path / "out").examples.keys() == {"forget", "retain"}


def test_doubled_ids_are_refused(training_sets: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(training_sets["harmful"], tmp_path / "doubled"))
    line = (folder / "retain.jsonl").read_text().splitlines(keepends=True)[0]
    with (folder / "retain.jsonl").open("a") as file:
        file.write(line)
    described = (folder / "dataset.json").read_text()
    roots = {
        name: str((training_sets["harmful"] / root).resolve()) for name, root in json.loads(described)["images"].items()
    }
    (folder / "dataset.json").write_text(json.dumps({**json.loads(described), "images": roots}))
    with pytest.raises(UserError, match=r"retain\.jsonl: line \d+ .*: line 1 has the same id"):
        read_training_set(folder)


def test_an_import_that_was_cut_short_says_so(training_sets: dict[str, Path], tmp_path: Path) -> None:
    from vlm_unlearn.data.readers import detect

    folder = Path(shutil.copytree(training_sets["harmful"], tmp_path / "cut"))
    (folder / "dataset.json").unlink()
    with pytest.raises(UserError, match="its import was cut short"):
        detect(folder)
