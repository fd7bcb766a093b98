"""The wrong kind of folder or file: the error names the kind that it is, and the fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from finished_runs import complies, make_run
from helpers import error_code, run_in_process
from vlm_unlearn.store import RunDirectory, describe_path, write_json


@pytest.fixture
def paths(training_sets: dict[str, Path], tiny_model: Path, world: Path, tmp_path: Path) -> dict[str, Path]:
    """A folder of each kind and some files, by name."""
    train, demo = tmp_path / "runs" / "npo", tmp_path / "demo"
    for folder, kind in ((train, "train"), (demo, "demo")):
        RunDirectory(folder).open({"kind": kind})
        RunDirectory(folder).record_cost(1.0, finished=True)
    write_json(train / "recipe.json", {})
    base = make_run(tmp_path / "base", complies)
    evaluation = tmp_path / "evaluation"
    base.rename(evaluation)
    manifest = evaluation / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"identity": {', '"identity": {"kind": "evaluate",'))
    typo, empty = tmp_path / "typo.yaml", tmp_path / "empty.yaml"
    typo.write_text("methd: npo\n")
    empty.write_text("")
    files = {"world": world, "typo": typo, "empty": empty, "gone": tmp_path / "gone"}
    return {
        "train": train,
        "demo": demo,
        "evaluation": evaluation,
        "model": tiny_model,
        "data": training_sets["harmful"],
        **files,
    }


@pytest.mark.parametrize(
    ("line", "tokens"),
    [
        ("score {train}", ["training run", "`vlm-unlearn evaluate SUITE model={train} --out DIR`"]),
        ("compare {evaluation} {train}", ["training run"]),
        ("compare {demo} {evaluation}", ["demo"]),
        ("judge run {data}", ["training set", "data="]),
        ("judge run {gone}", ["does not exist"]),
        ("export {evaluation} --out {gone}", ["run-not-found", "evaluation"]),
        ("export {model} --out {gone}", ["run-not-found", "model folder", "model="]),
        ("train {train}", ["file-unreadable", "training run"]),
        ("train tiny/npo model={model} data={train} output={gone}", ["dataset.json"]),
        ("train suites/tiny data={data} output={gone}", ["wrong-config", "`vlm-unlearn evaluate`"]),
        ("evaluate tiny/npo model={model} --out {gone}", ["wrong-config", "`vlm-unlearn train`"]),
        ("evaluate suites/tiny model={demo} root={world} --out {gone}", ["demo"]),
        ("data audit {train}", ["training run"]),
        ("train {typo}", ["unknown-key", "methd", '"method"']),
        ("train {empty}", ["invalid-yaml"]),
        ("train npo", ["file-not-found", '"tiny/npo"']),
        ("train npo_lora_7b.yaml", ["file-not-found", '"safety_mirage/npo_lora_7b"']),
        ("evaluate specificity --out {gone}", ["file-not-found", '"suites/specificity"']),
    ],
)
def test_wrong_path_is_one_line_with_a_fix(paths: dict[str, Path], line: str, tokens: list[str]) -> None:
    done = run_in_process(*(word.format_map(paths) for word in line.split()))
    errors = [text for text in done.stderr.splitlines() if text.startswith("vlm-unlearn: ")]
    assert (done.returncode, done.stdout, len(errors)) == (2, "", 1)
    assert not [token for token in tokens if token.format_map(paths) not in errors[0]], errors[0]
    assert error_code(done)
    assert not paths["gone"].exists()


def test_path_of_an_unknown_kind_gets_no_hint(tmp_path: Path) -> None:
    assert describe_path(tmp_path) == ""
    (tmp_path / "manifest.json").write_text("[]")
    assert describe_path(tmp_path) == ""
