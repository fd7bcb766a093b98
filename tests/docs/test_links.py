"""The documentation names what is there: files, headings, settings, recipes; and nothing of the machine it was written on."""

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
    """A page without its blocks of code."""
    return _FENCED.sub("", page.read_text(encoding="utf-8"))


def links_of(page: Path) -> list[str]:
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    return re.findall(r"\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)", text) + re.findall(r'(?:href|src)="([^"]+)"', text)


def is_generated(page: Path) -> bool:
    """Whether the site's build puts headings into a page, whose links it then checks itself."""
    return re.search(r"^(:::|<!-- generated)", page.read_text(encoding="utf-8"), re.MULTILINE) is not None


def anchors_of(page: Path) -> set[str]:
    """What a link into a page may name: its headings as GitHub makes anchors of them, and anchors of its own."""
    text, found = prose(page), set[str]()
    for heading in re.findall(r"^#{1,6}\s+(.+?)\s*#*$", text, re.MULTILINE):
        own = re.search(r"\{\s*#([\w-]+)[^}]*\}\s*$", heading)
        name = own[1] if own else anchor(heading)
        found.add(
            next(tried for tried in (name, *(f"{name}-{number}" for number in range(1, 99))) if tried not in found)
        )
    return found | set(re.findall(r'(?:id|name)="([^"]+)"', text))


def anchor(heading: str) -> str:
    said = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
    return re.sub(r"[^\w\- ]", "", said.strip().lower()).replace(" ", "-")


def test_what_the_commands_write_is_no_change_to_the_clone() -> None:
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    written = {
        name
        for page in PAGES
        for name in re.findall(r"(?:--out |output=|mkdir -p )([a-z]+)/", page.read_text(encoding="utf-8"))
    }
    assert {"data", "evaluations", "mine", "runs"} <= written
    assert not [name for name in written if f"/{name}/" not in ignored]


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in links_of(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, part = link.partition("#")
        target = (page.parent / unquote(path)).resolve() if path else page
        if not target.exists() or not target.is_relative_to(ROOT):
            broken.append(f"{link}: no such file")
        elif part and target.suffix == ".md" and not is_generated(target) and part not in anchors_of(target):
            broken.append(f"{link}: no such heading")
    assert not broken, f"{name_of(page)}: {'; '.join(broken)}"


def code_of(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_settings_are_there(page: Path) -> None:
    """Whatever stands as ``a.b=c``, or ``a.b: c``, in a sentence is a key of a recipe, a suite or a judge."""
    wrong = []
    for code in code_of(page):
        for key in settings_in(code):
            if not any(has_key(config, key.split(".")) for config in (Recipe, Suite, JudgeConfig)):
                wrong.append(f"`{code}`: no {key}")
    assert not wrong, f"{name_of(page)}: {'; '.join(wrong)}"


def settings_in(code: str) -> Iterator[str]:
    """The keys that a piece of code sets; one that begins with another program, or is an option's, sets none."""
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
    """Whether a dotted key can be set in a config; what a method's options are is the registry's to say."""
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
    return any(has_key(one, parts) for one in inner if one is not type(None))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_recipes_and_suites_are_there(page: Path) -> None:
    wrong = [name for code in code_of(page) for name in recipes_in(code) if not shipped_as(name)]
    assert not wrong, f"{name_of(page)}: no {', '.join(wrong)}"


def recipes_in(code: str) -> list[str]:
    """``safety_mirage/{npo,rmu}_7b`` names two; a ``*`` any."""
    found = []
    for word in code.split(" "):
        if re.fullmatch(rf"(recipes/)?({'|'.join(RECIPE_FOLDERS)})/[\w.{{}},*-]*[\w}}*]", word):
            pieces = [
                piece[1:-1].split(",") if piece.startswith("{") else [piece] for piece in re.split(r"(\{[^}]*\})", word)
            ]
            found += ["".join(one) for one in product(*pieces)]
    return found


def shipped_as(name: str) -> bool:
    bare = name.removeprefix("recipes/")
    return (
        any((ROOT / "recipes").glob(f"{bare}.yaml"))
        or any((ROOT / "recipes").glob(bare))
        or shipped_path(bare).is_file()
    )


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_no_page_names_a_machine(page: Path) -> None:
    named = re.findall(
        r"(?<![\w.])(?:/(?:home|root|tmp|work|Users|mnt)/\S*|[A-Z]:\\\S*)", page.read_text(encoding="utf-8")
    )
    assert not named, f"{name_of(page)}: {named}"


@pytest.mark.parametrize(
    ("key", "known"),
    [
        ("training.learning_rate", True),
        ("training.learnin_rate", False),
        ("method.beta", True),
        ("method.betta", False),
        ("trainable.lora.r", True),
        ("probe.eval_steps", True),
        ("judges.mm_vet.model", True),
        ("judges.mm_vet.modle", False),
        ("metrics.asr.group", True),
        ("sample.num_questions", True),
        ("nosuch", False),
    ],
)
def test_what_a_key_is(key: str, known: bool) -> None:
    assert any(has_key(config, key.split(".")) for config in (Recipe, Suite)) == known


def test_headings_are_anchors_as_github_makes_them() -> None:
    assert anchor("Safety Mirage: its settings and our keys") == "safety-mirage-its-settings-and-our-keys"
    assert anchor("What `judge run` does, [here](x.md) & *there*") == "what-judge-run-does-here--there"


def test_recipes_in_braces_are_each_looked_up() -> None:
    names = recipes_in("safety_mirage/{npo,rmu}_lora_{7b,13b}")
    assert len(names) == 4
    assert all(map(shipped_as, names))
    assert not shipped_as("safety_mirage/nosuch_7b")
    assert recipes_in("tests/x.py safety_mirage tiny/") == []
