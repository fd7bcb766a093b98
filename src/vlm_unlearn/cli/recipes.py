"""``vlm-unlearn recipes``: lists the shipped recipes and suites, and prints one as a starting point."""

from __future__ import annotations

import sys
from typing import Any

import typer

from vlm_unlearn.cli.common import JSON_OPTION, print_json
from vlm_unlearn.cli.completion import shipped_names

MODES = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}


def recipes(
    name: str = typer.Argument(
        None, metavar="NAME", help="A recipe or suite: print its YAML.", autocompletion=shipped_names
    ),
    resolved: bool = typer.Option(
        False, "--resolved", help="Merge NAME with everything that it extends into one file, without comments."
    ),
    as_json: bool = JSON_OPTION,
) -> None:
    """Lists the shipped recipes (training) and suites (measurement), or prints one as a start for your own.

    Example:

      vlm-unlearn recipes

      vlm-unlearn recipes safety_mirage/npo_lora_7b > mine.yaml
    """
    from vlm_unlearn.config import read_resolved, starter_text
    from vlm_unlearn.config import shipped_names as all_names
    from vlm_unlearn.errors import UserError

    if name is None:
        if resolved:
            raise UserError(
                "needs the name of a recipe: vlm-unlearn recipes NAME --resolved",
                code="missing-setting",
                field="--resolved",
            )
        descriptions = [_description(shipped, read_resolved(shipped)) for shipped in all_names()]
        if as_json:
            print_json(descriptions)
        else:
            _print_list(descriptions)
        return
    text = starter_text(name)
    if as_json:
        print_json(read_resolved(name))
    elif resolved:
        import yaml

        sys.stdout.write(yaml.safe_dump(read_resolved(name), sort_keys=False, allow_unicode=True, width=120))
    else:
        sys.stdout.write(text)


def _description(name: str, keys: dict[str, Any]) -> dict[str, str]:
    if "questions" in keys:
        attacks = {attack if isinstance(attack, str) else attack["name"]: None for attack in keys.get("small", [])}
        return {"name": name, "kind": "robustness suite", "about": ", ".join(attacks)}
    if "objectives" in keys:
        about = f"{', '.join(keys['space'])}; {', '.join(keys['objectives'])}"
        return {"name": name, "kind": "sweep", "about": about}
    if "method" not in keys:
        return {"name": name, "kind": "suite", "about": _metrics_and_judge(keys)}
    method = keys.get("name") or keys["method"]["name"] + ("+pd" if keys.get("prompt_decouple_weight") else "")
    trainable = keys.get("trainable", {})
    mode = MODES[trainable.get("mode", "full")] + (", SineProject" if trainable.get("projector") == "sine" else "")
    model = f" on {keys['model']}" if "model" in keys else "; pass model="
    return {"name": name, "kind": "recipe", "about": f"{method}, {mode}{model}"}


def _metrics_and_judge(keys: dict[str, Any]) -> str:
    metrics = [metric for metric, config in keys.get("metrics", {}).items() if config]
    benchmarks = [benchmark["name"] for benchmark in keys.get("benchmarks", [])]
    judge = keys.get("judge", {})
    judge_name = judge if isinstance(judge, str) else judge.get("rubric") or judge.get("name")
    return ", ".join([*metrics, *benchmarks]) + (f"; judged by {judge_name}" if judge_name else "")


def _print_list(descriptions: list[dict[str, str]]) -> None:
    from rich.table import Table

    from vlm_unlearn.cli.common import escape_markup, result_console

    console = result_console()
    for kind, usage in (
        ("recipe", "vlm-unlearn train NAME data=... output=..."),
        ("suite", "vlm-unlearn evaluate NAME model=... --out ..."),
        ("robustness suite", "vlm-unlearn robustness RUN root=... --suite NAME --out ..."),
        ("sweep", "vlm-unlearn sweep NAME overrides.data=... suite_overrides.root=... --out ..."),
    ):
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for description in descriptions:
            if description["kind"] == kind:
                table.add_row(description["name"], escape_markup(description["about"]))
        console.print(f"{kind}s: {usage}", highlight=False, markup=False)
        console.print(table)
        console.print()
    console.print(
        "To write your own: vlm-unlearn recipes NAME > mine.yaml, or `extends: NAME` in a new file.",
        highlight=False,
        markup=False,
    )
