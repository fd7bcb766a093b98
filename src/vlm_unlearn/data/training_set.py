"""A training set: a folder with dataset.json, forget.jsonl, retain.jsonl, and perhaps decouple.jsonl, preferred.jsonl, refusals.json."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_unlearn.data.formats.safe_eraser import sentences
from vlm_unlearn.data.images import resolve_image
from vlm_unlearn.errors import Problems, UserError, quoted
from vlm_unlearn.records import Example
from vlm_unlearn.store import (
    describe_path,
    digest_file,
    digest_json,
    read_json,
    read_records,
    write_json,
    write_records,
    write_text,
)

ROLES = ("forget", "retain", "decouple", "preferred")
PARTNERS = ("decouple", "preferred")  # tied to a forget example each, by pair_id
FILES = (*(f"{role}.jsonl" for role in ROLES), "refusals.json", "problems.txt", "dataset.json")
DEFAULT_REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I can't assist with this request.",
    "I won't provide an answer to that.",
    "Sorry, this is something I have to decline.",
)


@dataclass(frozen=True)
class TrainingSet:
    """What a training run reads: examples by role, the image root, and refusal sentences for methods that teach refusal."""

    folder: Path
    images: Mapping[str, Path]  # image root by `Example.source`
    examples: Mapping[str, Sequence[Example]]
    refusals: Sequence[str]
    digests: Mapping[str, str] = field(default_factory=dict)

    def digest(self) -> dict[str, str]:
        """SHA-256 of every file, and one over the content of all images in the order of the examples that show them."""
        paths = dict.fromkeys(
            path for role in self.examples.values() for path in map(self.image_path, role) if path is not None
        )
        return {**self.digests, "images": digest_json([digest_file(path) for path in paths])}

    def image_path(self, example: Example) -> Path | None:
        """The example's image file, or None for a text-only pair."""
        where = f'example "{example.id}"'
        return (
            None if example.image is None else resolve_image(_root(self.images, example, where), example.image, where)
        )


def _root(images: Mapping[str, Path], example: Example, where: str) -> Path:
    if example.source not in images:
        raise UserError(f'{where}: dataset.json names no image folder for source "{example.source}"')
    return images[example.source]


def write_training_set(
    folder: Path,
    images: Mapping[str, Path],
    examples: Mapping[str, Sequence[Example]],
    source: Mapping[str, object],
    refusals: Sequence[str] = (),
    problems: Problems | None = None,
) -> None:
    """Writes a training-set folder; dataset.json comes last, so a folder without it is unfinished.

    Args:
        images: the image root of each `Example.source`; images stay where they are.
        source: where the examples came from, for dataset.json.
        problems: the broken records that were left out, for problems.txt.

    Raises:
        UserError: the forget or the retain set is empty.
    """
    for role in ("forget", "retain"):
        if not examples.get(role):
            raise UserError(f"{folder}: the {role} set is empty; nothing was written")
    for role, found in examples.items():
        _validate_unique(folder, role, "id", [example.id for example in found])
    for role in PARTNERS:
        _validate_unique(
            folder, role, "pair_id", [example.pair_id for example in examples.get(role, ()) if example.pair_id]
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; choose another output folder") from None
    _remove_files_of_before(folder)
    files: dict[str, object] = {}
    for role in ROLES:
        if examples.get(role):
            path = folder / f"{role}.jsonl"
            files[path.name] = {"count": write_records(path, examples[role]), "sha256": digest_file(path)}
    if refusals:
        write_json(folder / "refusals.json", list(refusals))
        files["refusals.json"] = {"count": len(refusals), "sha256": digest_file(folder / "refusals.json")}
    roots = {name: os.path.relpath(root.resolve(), folder.resolve()) for name, root in images.items()}
    described: dict[str, object] = {"schema": 1, "images": roots, "files": files, "source": dict(source)}
    if problems:
        described["broken_records"] = problems.count
        write_text(folder / "problems.txt", "".join(f"{message}\n" for message in problems.messages))
    write_json(folder / "dataset.json", described)


def _validate_unique(folder: Path, role: str, what: str, names: Sequence[str | None]) -> None:
    doubled = [name for name, count in Counter(names).items() if count > 1]
    if doubled:
        raise UserError(
            f"{folder}: two {role} examples have the {what} {quoted(doubled[0])}; they must differ in the data file"
        )


def _remove_files_of_before(folder: Path) -> None:
    """What an earlier import wrote here, dataset.json first: nothing of it may pass for the new set's."""
    if (folder / "dataset.json").exists():
        listed = describe(folder)[1]
        (folder / "dataset.json").unlink()
        for name in (*listed, "problems.txt"):
            if name in FILES:
                (folder / name).unlink(missing_ok=True)


def describe(folder: Path) -> tuple[dict[str, Path], dict[str, dict[str, Any]]]:
    """A training set's image roots by source, and count and SHA-256 of each of its files, as dataset.json has them.

    Raises:
        UserError: dataset.json is missing or says something else.
    """
    if not (folder / "dataset.json").is_file():
        made = "make a training set with `vlm-unlearn data import`"
        raise UserError(f"{folder}: holds no dataset.json; {made}{describe_path(folder)}")
    described = read_json(folder / "dataset.json")
    roots = described.get("images") if isinstance(described, dict) else None
    if not isinstance(roots, dict) or not all(isinstance(root, str) for root in roots.values()):
        raise UserError(f'{folder / "dataset.json"}: "images" must give the image folder of each source')
    listed = described.get("files")
    if not isinstance(listed, dict) or not {"forget.jsonl", "retain.jsonl"} <= listed.keys():
        raise UserError(f'{folder / "dataset.json"}: "files" must list forget.jsonl and retain.jsonl')
    if not all(isinstance(entry, dict) for entry in listed.values()):
        raise UserError(f'{folder / "dataset.json"}: "files" must give count and sha256 of each file')
    return {name: (folder / root).resolve() for name, root in roots.items()}, listed


def read_training_set(folder: Path) -> TrainingSet:
    """Reads and checks a training-set folder: every record parses and every image is there, inside the image root.

    Raises:
        UserError: what is wrong, with file and record.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such training-set folder; make one with `vlm-unlearn data import`")
    images, listed = describe(folder)
    examples: dict[str, list[Example]] = {}
    digests: dict[str, str] = {}
    for role in ROLES:
        if f"{role}.jsonl" in listed:
            path = folder / f"{role}.jsonl"
            examples[role] = _read_examples(path, images)
            digests[path.name] = digest_file(path)
    refusals: Sequence[str] = DEFAULT_REFUSALS
    if "refusals.json" in listed:
        refusals = sentences(read_json(folder / "refusals.json"), f"{folder / 'refusals.json'}: must be")
        digests["refusals.json"] = digest_file(folder / "refusals.json")
    return TrainingSet(folder, images, examples, refusals, digests)


def _read_examples(path: Path, images: Mapping[str, Path]) -> list[Example]:
    found = list(read_records(path, Example))
    if not found:
        raise UserError(f"{path}: the {path.stem} set is empty")
    lines: dict[str, int] = {}
    for number, example in enumerate(found, start=1):
        where = f'{path.name}: line {number} ("{example.id}")'
        if example.id in lines:
            raise UserError(f"{where}: line {lines[example.id]} has the same id")
        lines[example.id] = number
        if example.image is not None:
            resolve_image(_root(images, example, where), example.image, where)
    return found
