"""A newcomer's mistakes: the wrong kind of folder or file is told by what it is, with what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from finished_runs import complies, make_run
from vlm_unlearn.cli import main as cli
from vlm_unlearn.store import describe_path, open_run, record_cost, write_json


@pytest.fixture
def places(training_sets: dict[str, Path], tiny_model: Path, world: Path, tmp_path: Path) -> dict[str, Path]:
    """A folder of each kind, by name, and some files."""
    train, demo = tmp_path / "runs" / "npo", tmp_path / "demo"
    for folder, kind in ((train, "train"), (demo, "demo")):
        open_run(folder, {"kind": kind})
        record_cost(folder, 1.0, finished=True)
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
    ("line", "message"),
    [
        ("score {train}", "it is a training run: `vlm-unlearn evaluate SUITE model={train} --out DIR` evaluates it"),
        ("compare {evaluation} {train}", "it is a training run"),
        ("compare {demo} {evaluation}", "it is a demo: its training runs are in its folder runs"),
        ("judge run {data}", "it is a training set, for train's data="),
        ("judge run {gone}", "there is nothing of that name"),
        ("export {evaluation} --out {gone}", "is no folder that `vlm-unlearn train` wrote; it is an evaluation"),
        ("export {model} --out {gone}", "it is a model folder, for model="),
        ("train {train}", "Is a directory; it is a training run"),
        ("train tiny/npo model={model} data={train} output={gone}", "no dataset.json"),
        ("train suites/tiny data={data} output={gone}", "is a suite, for `vlm-unlearn evaluate`"),
        ("evaluate tiny/npo model={model} --out {gone}", "is a recipe, for `vlm-unlearn train`"),
        ("evaluate suites/tiny model={demo} root={world} --out {gone}", "it is a demo"),
        ("data audit {train}", "it is a training run"),
        ("train {typo}", 'unknown key "methd"; did you mean "method"?'),
        ("train {empty}", "expected keys and values"),
        ("train npo", 'did you mean "tiny/npo"?'),
        ("train npo_lora_7b.yaml", 'did you mean "safety_mirage/npo_lora_7b"?'),
        ("evaluate specificity --out {gone}", 'did you mean "suites/specificity"?'),
    ],
)
def test_each_is_one_line_that_helps(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    places: dict[str, Path],
    line: str,
    message: str,
) -> None:
    monkeypatch.setattr("sys.argv", ["vlm-unlearn", *(word.format_map(places) for word in line.split())])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    told = [text for text in err.splitlines() if text.startswith("vlm-unlearn: ")]
    assert (ended.value.code, out, len(told)) == (2, "", 1)
    assert message.format_map(places) in told[0]
    assert not places["gone"].exists()


def test_what_cannot_be_told_is_left_out(tmp_path: Path) -> None:
    assert describe_path(tmp_path) == ""
    (tmp_path / "manifest.json").write_text("[]")
    assert describe_path(tmp_path) == ""
