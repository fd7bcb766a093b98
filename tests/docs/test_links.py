"""Links, settings and recipes that the documentation names exist, and no page contains a path of a machine."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from urllib.parse import unquote

import pytest
from doc_pages import PAGES, ROOT, name_of
from pydantic import BaseModel

from vlm_unlearn.config import JudgeConfig, Recipe, Suite, shipped_path
from vlm_unlearn.methods import METHODS

LINKED = [*PAGES, ROOT / "CHANGELOG.md"]
RECIPE_FOLDERS = tuple(sorted(folder.name for folder in (ROOT / "recipes").iterdir() if folder.is_dir()))
_FENCED = re.compile(r"^(\s*)(```+|~~~+).*?^\s*\2", re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    """The text of a page without its code blocks."""
    return _FENCED.sub("", page.read_text(encoding="utf-8"))


def links_of(page: Path) -> list[str]:
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    return re.findall(r"\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)", text) + re.findall(r'(?:href|src)="([^"]+)"', text)


def is_generated(page: Path) -> bool:
    """Whether the build of the site generates headings of a page. The build checks links to these."""
    return re.search(r"^(:::|<!-- generated)", page.read_text(encoding="utf-8"), re.MULTILINE) is not None


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page: those that GitHub derives from headings, and explicit ones."""
    text, anchors = prose(page), set[str]()
    for heading in re.findall(r"^#{1,6}\s+(.+?)\s*#*$", text, re.MULTILINE):
        explicit = re.search(r"\{\s*#([\w-]+)[^}]*\}\s*$", heading)
        name = explicit[1] if explicit else anchor(heading)
        candidates = (name, *(f"{name}-{number}" for number in range(1, 99)))
        anchors.add(next(candidate for candidate in candidates if candidate not in anchors))
    return anchors | set(re.findall(r'(?:id|name)="([^"]+)"', text))


def anchor(heading: str) -> str:
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")


def test_outputs_of_the_documented_commands_are_ignored_by_git() -> None:
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    written = {
        name
        for page in PAGES
        for name in re.findall(r"(?:--out |output=|mkdir -p )([a-z]+)/", page.read_text(encoding="utf-8"))
    }
    assert {"data", "evaluations", "mine", "runs"} <= written
    assert not [name for name in written if f"/{name}/" not in ignored]


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    broken = []
    for link in links_of(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, heading = link.partition("#")
        target = (page.parent / unquote(path)).resolve() if path else page
        if not target.exists() or not target.is_relative_to(ROOT):
            broken.append(f"{link}: no such file")
        elif heading and target.suffix == ".md" and not is_generated(target) and heading not in anchors_of(target):
            broken.append(f"{link}: no such heading")
    assert not broken, f"{name_of(page)}: {'; '.join(broken)}"


def code_of(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_settings_in_sentences_are_config_keys(page: Path) -> None:
    """Code of the form ``a.b=c`` or ``a.b: c`` in a sentence is a key of a recipe, a suite or a judge."""
    wrong = []
    for code in code_of(page):
        for key in settings_in(code):
            if not any(has_key(config, key.split(".")) for config in (Recipe, Suite, JudgeConfig)):
                wrong.append(f"`{code}`: no {key}")
    assert not wrong, f"{name_of(page)}: {'; '.join(wrong)}"


def settings_in(code: str) -> Iterator[str]:
    """Yields the keys that a piece of inline code sets. Options and other programs set none."""
    words = code.split(" ")
    if words[0] not in ("vlm-unlearn", "evaluate", "train", "score", "generate", "judge") and not re.match(
        r"[a-z_][\w.]*=", words[0]
    ):
        single = re.fullmatch(r"([a-z_]+(?:\.[a-z_]+)+): .+", code)
        if single:
            yield single[1]
        return
    for word in words:
        key, equals, _ = word.partition("=")
        if equals and re.fullmatch(r"[a-z_]\w*(\.\w+)*", key):
            yield key


def has_key(annotation: object, parts: list[str]) -> bool:
    """Whether a dotted key is valid in a config, or is an option of a registered method."""
    if not parts:
        return True
    if (
        isinstance(annotation, type)
        and not isinstance(annotation, types.GenericAlias)
        and issubclass(annotation, BaseModel)
    ):
        if annotation.__name__ == "MethodConfig" and parts[0] not in annotation.model_fields:
            return len(parts) == 1 and any(parts[0] in method.options_type.model_fields for method in METHODS.values())
        field = annotation.model_fields.get(parts[0])
        return field is not None and has_key(field.annotation, parts[1:])
    inner = typing.get_args(annotation)
    if typing.get_origin(annotation) in (dict, list) or getattr(annotation, "__origin__", None) in (dict, list):
        return has_key(inner[-1], parts[1:]) or annotation == dict[str, typing.Any]
    return any(has_key(argument, parts) for argument in inner if argument is not type(None))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_recipes_and_suites_in_sentences_exist(page: Path) -> None:
    wrong = [name for code in code_of(page) for name in recipes_in(code) if not is_shipped(name)]
    assert not wrong, f"{name_of(page)}: no {', '.join(wrong)}"


def recipes_in(code: str) -> list[str]:
    """The recipes that inline code names. Braces name several, and ``*`` matches any."""
    names = []
    for word in code.split(" "):
        if re.fullmatch(rf"(recipes/)?({'|'.join(RECIPE_FOLDERS)})/[\w.{{}},*-]*[\w}}*]", word):
            pieces = [
                piece[1:-1].split(",") if piece.startswith("{") else [piece] for piece in re.split(r"(\{[^}]*\})", word)
            ]
            names += ["".join(choice) for choice in product(*pieces)]
    return names


def is_shipped(name: str) -> bool:
    bare = name.removeprefix("recipes/")
    return (
        any((ROOT / "recipes").glob(f"{bare}.yaml"))
        or any((ROOT / "recipes").glob(bare))
        or shipped_path(bare).is_file()
    )


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_no_page_contains_a_path_of_a_machine(page: Path) -> None:
    paths = re.findall(
        r"(?<![\w.])(?:/(?:home|root|tmp|work|Users|mnt)/\S*|[A-Z]:\\\S*)", page.read_text(encoding="utf-8")
    )
    assert not paths, f"{name_of(page)}: {paths}"


@pytest.mark.parametrize(
    ("key", "valid"),
    [
        ("training.learning_rate", True),
        ("training.learnin_rate", False),
        ("method.beta", True),
        ("method.betta", False),
        ("trainable.lora.r", True),
        ("probe.eval_steps", True),
        ("judges.mm_vet.model", True),
        ("judges.mm_vet.modle", False),
        ("metrics.asr.aggregate", True),
        ("metrics.asr.group", False),
        ("sample.num_questions", True),
        ("nosuch", False),
    ],
)
def test_has_key_resolves_dotted_keys(key: str, valid: bool) -> None:
    assert any(has_key(config, key.split(".")) for config in (Recipe, Suite)) == valid


def test_anchor_equals_the_one_of_github() -> None:
    assert anchor("Safety Mirage: its settings and our keys") == "safety-mirage-its-settings-and-our-keys"
    assert anchor("What `judge run` does, [here](x.md) & *there*") == "what-judge-run-does-here--there"


def test_recipes_in_braces_are_expanded() -> None:
    names = recipes_in("safety_mirage/{npo,rmu}_lora_{7b,13b}")
    assert len(names) == 4
    assert all(map(is_shipped, names))
    assert not is_shipped("safety_mirage/nosuch_7b")
    assert recipes_in("tests/x.py safety_mirage tiny/") == []
