"""``vlm-unlearn recipes``: what is shipped to train and to measure by, and a copy to start one's own from."""

from __future__ import annotations

import sys
from typing import Any

import typer

from vlm_unlearn.cli.common import JSON_OPTION, print_json
from vlm_unlearn.cli.completion import shipped_names

MODES = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}


def recipes(
    name: str = typer.Argument(None, metavar="NAME", help="One of them: print its YAML.", autocompletion=shipped_names),
    resolved: bool = typer.Option(
        False, "--resolved", help="With everything that NAME extends, in one file; without comments."
    ),
    as_json: bool = JSON_OPTION,
) -> None:
    """Lists the shipped recipes (what to train) and suites (what to measure); prints one to start your own from.

    Example:

      vlm-unlearn recipes

      vlm-unlearn recipes safety_mirage/npo_lora_7b > mine.yaml
    """
    from vlm_unlearn.config import read_resolved as read
    from vlm_unlearn.config import shipped_names as all_names
    from vlm_unlearn.config import starter_text
    from vlm_unlearn.errors import UserError

    if name is None:
        if resolved:
            raise UserError("--resolved is of one recipe: vlm-unlearn recipes NAME --resolved")
        found = [_described(one, read(one)) for one in all_names()]
        if as_json:
            print_json(found)
        else:
            _list(found)
        return
    text = starter_text(name)
    if as_json:
        print_json(read(name))
    elif resolved:
        import yaml

        sys.stdout.write(yaml.safe_dump(read(name), sort_keys=False, allow_unicode=True, width=120))
    else:
        sys.stdout.write(text)


def _described(name: str, keys: dict[str, Any]) -> dict[str, str]:
    if "method" not in keys:
        return {"name": name, "kind": "suite", "about": _measures(keys)}
    pd = "+pd" if keys.get("prompt_decouple_weight") else ""
    trains = keys.get("trainable", {})
    mode = MODES[trains.get("mode", "full")] + (", SineProject" if trains.get("projector") == "sine" else "")
    model = f" on {keys['model']}" if "model" in keys else "; pass model="
    return {"name": name, "kind": "recipe", "about": f"{keys['method']['name']}{pd}, {mode}{model}"}


def _measures(keys: dict[str, Any]) -> str:
    """What a suite counts, and who grades."""
    metrics = [metric for metric, config in keys.get("metrics", {}).items() if config]
    benchmarks = [benchmark["name"] for benchmark in keys.get("benchmarks", [])]
    judge = keys.get("judge", {})
    grades = judge if isinstance(judge, str) else judge.get("rubric") or judge.get("name")
    return ", ".join([*metrics, *benchmarks]) + (f"; judged by {grades}" if grades else "")


def _list(found: list[dict[str, str]]) -> None:
    from rich.table import Table

    from vlm_unlearn.cli.common import plain, result_console

    console = result_console()
    for kind, use in (
        ("recipe", "vlm-unlearn train NAME data=... output=..."),
        ("suite", "vlm-unlearn evaluate NAME model=... --out ..."),
    ):
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for one in found:
            if one["kind"] == kind:
                table.add_row(one["name"], plain(one["about"]))
        console.print(f"{kind}s: {use}", highlight=False, markup=False)
        console.print(table)
        console.print()
    console.print(
        "Yours: vlm-unlearn recipes NAME > mine.yaml, or `extends: NAME` in a file of your own.",
        highlight=False,
        markup=False,
    )
