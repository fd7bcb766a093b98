"""The commands that reproduce a report are valid, and each of them writes to a folder of its own."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from finished_runs import complies, make_run
from vlm_unlearn.config import Recipe, Suite, load
from vlm_unlearn.reporting.provenance import read_provenance, reproduction_commands
from vlm_unlearn.store import RunDirectory, write_json


def training_run(folder: Path, model: str) -> Path:
    RunDirectory(folder).open({"kind": "train"})
    recipe = Recipe.model_validate({"model": model, "data": "data", "output": str(folder), "method": "npo"})
    write_json(folder / "recipe.json", recipe.model_dump(mode="json"))
    return folder


def parsed(line: str) -> tuple[str, dict[str, Any]]:
    """Returns the command of a line and its parsed options."""
    import typer.main

    from vlm_unlearn.cli.main import app

    program, name, *words = shlex.split(line)
    assert program == "vlm-unlearn"
    return name, dict(typer.main.get_command(app).commands[name].make_context(name, words).params)


def test_reproduction_commands_use_the_outputs_of_earlier_commands(tmp_path: Path) -> None:
    """Two models of one training run, two runs with one name, a model without a run, and a name like an option."""
    trained = training_run(tmp_path / "my runs" / "npo", "base")
    other = training_run(tmp_path / "others" / "npo", "base")
    models = {"base": "base", "npo": str(trained), "NPO": str(trained / "model"), "-x /": str(other)}
    folders = [tmp_path / name / "ev" for name in "abcd"]
    runs = {
        model: make_run(folder, complies, groups=2, model=path)
        for folder, (model, path) in zip(folders, models.items(), strict=True)
    }
    lines = [parsed(line) for line in reproduction_commands(read_provenance(runs, {}))]
    outputs: list[str] = []
    evaluated: list[Path] = []
    for name, options in lines[:-1]:
        if name == "train":
            outputs.append(load(Recipe, options["recipe_file"], options["overrides"]).output.as_posix())
        else:
            assert name == "evaluate"
            model = load(Suite, options["suite_file"], options["overrides"] or []).model
            assert model in ("base", *outputs)  # an earlier command wrote it
            assert options["name"] == list(models)[len(evaluated)]
            evaluated.append(options["out"])
    assert len(outputs) == len(set(outputs)) == 2
    assert len({str(folder).lower() for folder in evaluated}) == 4
    assert all(folder.parent == Path("again/evaluations") for folder in evaluated)
    name, options = lines[-1]
    assert (name, options["runs"], options["out"]) == ("report", evaluated, Path("again/report"))
