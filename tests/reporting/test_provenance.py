"""Where numbers come from: the commands that make them again are ones that the programs take, each result in a place of its own."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from finished_runs import complies, make_run
from vlm_unlearn.config import Recipe, Suite, load
from vlm_unlearn.reporting.provenance import read_provenance, reproduction_commands
from vlm_unlearn.store import open_run, write_json


def training_run(folder: Path, model: str) -> Path:
    open_run(folder, {"kind": "train"})
    recipe = Recipe.model_validate({"model": model, "data": "data", "output": str(folder), "method": "npo"})
    write_json(folder / "recipe.json", recipe.model_dump(mode="json"))
    return folder


def parsed(line: str) -> tuple[str, dict[str, Any]]:
    """A line's command and its options, as its own parser reads them."""
    import typer.main

    from vlm_unlearn.cli.main import app

    program, name, *words = shlex.split(line)
    assert program == "vlm-unlearn"
    return name, dict(typer.main.get_command(app).commands[name].make_context(name, words).params)


def test_the_commands_train_evaluate_and_report_what_they_make(tmp_path: Path) -> None:
    """Two evaluations of one training run, two whose folders have one name, one of no training run, a name like an option."""
    trained = training_run(tmp_path / "my runs" / "npo", "base")
    other = training_run(tmp_path / "others" / "npo", "base")
    models = {"base": "base", "npo": str(trained), "NPO": str(trained / "model"), "-x /": str(other)}
    folders = [tmp_path / name / "ev" for name in "abcd"]
    runs = {
        model: make_run(folder, complies, groups=2, model=asked)
        for folder, (model, asked) in zip(folders, models.items(), strict=True)
    }
    lines = [parsed(line) for line in reproduction_commands(read_provenance(runs, {}))]
    made: list[str] = []
    evaluated: list[Path] = []
    for name, options in lines[:-1]:
        if name == "train":
            made.append(load(Recipe, options["recipe_file"], options["overrides"]).output.as_posix())
        else:
            assert name == "evaluate"
            asked = load(Suite, options["suite_file"], options["overrides"] or []).model
            assert asked in ("base", *made)  # by now it is there
            assert options["name"] == list(models)[len(evaluated)]
            evaluated.append(options["out"])
    assert len(made) == len(set(made)) == 2
    assert len({str(folder).lower() for folder in evaluated}) == 4
    assert all(folder.parent == Path("again/evaluations") for folder in evaluated)
    name, options = lines[-1]
    assert (name, options["runs"], options["out"]) == ("report", evaluated, Path("again/report"))
