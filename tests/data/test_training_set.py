"""Training sets: complete when written, validated when read, and loadable with `datasets`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import raises_code
from vlm_unlearn.data.dataset import UnlearningDataset
from vlm_unlearn.data.formats.table import Columns
from vlm_unlearn.data.readers import detect
from vlm_unlearn.data_tools.importers import import_files, import_safe_eraser, import_vlguard
from vlm_unlearn.judging.keyword import corrected_refusal
from vlm_unlearn.records import Example


def test_training_set_round_trip(training_sets: dict[str, Path]) -> None:
    training_set = UnlearningDataset.from_folder(training_sets["safe_eraser"])
    assert {role: len(examples) for role, examples in training_set.items()} == {
        "forget": 24,
        "retain": 48,
        "decouple": 24,
    }
    assert len(training_set.refusals) == 4
    described = json.loads((training_sets["safe_eraser"] / "dataset.json").read_text())
    assert described["files"]["forget.jsonl"]["count"] == 24
    assert not Path(described["images"]["safe_eraser"]).is_absolute()
    assert all(training_set.image(example) for example in training_set["forget"])


def test_training_set_loads_with_datasets(training_sets: dict[str, Path], tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.load_dataset(
        "json", data_files=str(training_sets["harmful"] / "forget.jsonl"), cache_dir=str(tmp_path)
    )["train"]
    written_if_set = {"system", "image_offset", "loss_on"}
    assert set(Example.model_fields) - written_if_set == set(table.column_names)


def test_import_with_empty_forget_set_writes_nothing(world: Path, tmp_path: Path) -> None:
    answers = tmp_path / "answers.json"
    answers.write_text("{}")
    vlguard = world / "vlguard"
    with raises_code("no-records", file=answers):
        import_vlguard(vlguard / "train.json", vlguard / "train", tmp_path / "out", answers)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("refusals", "accepted"), [(1, True), (2, False)])
def test_import_accepts_5_percent_of_refusals(tmp_path: Path, refusals: int, accepted: bool) -> None:
    texts = ["I cannot help with that."] * refusals + ["Mix both and wait."] * (20 - refusals)
    rows = [{"question": f"How {number}?", "answer": text, "set": "forget"} for number, text in enumerate(texts)]
    rows.append({"question": "What?", "answer": "I cannot help with that.", "set": "retain"})
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def is_refusal(text: str) -> bool:
        return corrected_refusal(text) is not None

    def imported(check: Callable[[str], bool] | None) -> dict[str, int]:
        return import_files({"": file}, tmp_path, tmp_path / "out", Columns(set="set"), is_refusal=check).counts

    if accepted:
        assert imported(is_refusal) == {"forget": 20, "retain": 1}
    else:
        with raises_code("forget-refusals", file=tmp_path / "out") as caught:
            imported(is_refusal)
        assert "--accept-refusals" in str(caught.value)
        assert "2 of 20" in str(caught.value)
        assert not (tmp_path / "out").exists()
    assert imported(None) == {"forget": 20, "retain": 1}


def test_read_training_set_broken_raises(training_sets: dict[str, Path], tmp_path: Path) -> None:
    def broken(name: str) -> Path:
        return Path(shutil.copytree(training_sets["harmful"], tmp_path / name))

    with raises_code("file-not-found", file=tmp_path / "gone"):
        UnlearningDataset.from_folder(tmp_path / "gone")
    folder = broken("empty")
    (folder / "forget.jsonl").write_text("")
    with raises_code("no-records", file=folder / "forget.jsonl"):
        UnlearningDataset.from_folder(folder)
    folder = broken("image")
    described = json.loads((folder / "dataset.json").read_text())
    described["images"]["vlguard"] = str(tmp_path)
    (folder / "dataset.json").write_text(json.dumps(described))
    with raises_code("image-not-found", file="forget.jsonl") as caught:
        UnlearningDataset.from_folder(folder)
    assert str(caught.value.record).startswith('1 ("')


def test_import_removes_files_of_earlier_import(world: Path, tmp_path: Path) -> None:
    eraser, vlguard = world / "safe_eraser", world / "vlguard"
    import_safe_eraser(eraser / "all_train.json", eraser, tmp_path / "out", eraser / "prompt.json")
    import_vlguard(vlguard / "train.json", vlguard / "train", tmp_path / "out")
    assert UnlearningDataset.from_folder(tmp_path / "out").keys() == {"forget", "retain"}


def test_read_training_set_duplicate_id_raises(training_sets: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(training_sets["harmful"], tmp_path / "duplicate"))
    line = (folder / "retain.jsonl").read_text().splitlines(keepends=True)[0]
    with (folder / "retain.jsonl").open("a") as file:
        file.write(line)
    described = (folder / "dataset.json").read_text()
    roots = {
        name: str((training_sets["harmful"] / root).resolve()) for name, root in json.loads(described)["images"].items()
    }
    (folder / "dataset.json").write_text(json.dumps({**json.loads(described), "images": roots}))
    with raises_code("duplicate-id", file="retain.jsonl", field="id") as caught:
        UnlearningDataset.from_folder(folder)
    assert "record 1" in caught.value.message


def test_detect_unfinished_import_raises(training_sets: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(training_sets["harmful"], tmp_path / "unfinished"))
    (folder / "dataset.json").unlink()
    with raises_code("run-unfinished", file=folder):
        detect(folder)
