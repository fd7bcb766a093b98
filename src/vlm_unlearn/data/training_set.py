"""Reads and writes training sets.

A training set is a folder with ``dataset.json``, ``forget.jsonl`` and ``retain.jsonl``, and optionally
``decouple.jsonl``, ``preferred.jsonl`` and ``refusals.json``.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_unlearn.data.formats.safe_eraser import validate_refusals
from vlm_unlearn.data.images import resolve_image
from vlm_unlearn.errors import Problems, UserError, quoted
from vlm_unlearn.records import Example
from vlm_unlearn.store import (
    describe_path,
    digest_file,
    read_json,
    read_records,
    record_outputs,
    validate_not_overwriting,
    validate_outputs,
    write_json,
    write_records,
    write_text,
)

ROLES = ("forget", "retain", "decouple", "preferred")
PAIRED_ROLES = ("decouple", "preferred")  # `pair_id` ties each of their examples to a forget example
FILES = (*(f"{role}.jsonl" for role in ROLES), "refusals.json", "problems.txt", "dataset.json")
DEFAULT_REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I can't assist with this request.",
    "I won't provide an answer to that.",
    "Sorry, this is something I have to decline.",
)


MAX_REFUSALS = 0.05  # share of the forget answers above which unlearning them would unlearn refusing
IsRefusal = Callable[[str], bool]


def validate_forget_answers(
    examples: Sequence[Example], is_refusal: IsRefusal, fix: str, file: Path | None = None
) -> None:
    """Checks that the answers of a forget set are harmful answers and not refusals.

    Unlearning refusals makes a model more harmful. The usual cause is that the harmful answers were not injected.

    Args:
        examples: The forget set.
        is_refusal: Returns whether an answer is a refusal.
        fix: The end of the error message, which says how to fix the data or to accept them.
        file: The data, for the error.

    Raises:
        UserError: More than `MAX_REFUSALS` of the answers are refusals.
    """
    refusals = [example.id for example in examples if is_refusal(example.answer)]
    if len(refusals) > MAX_REFUSALS * len(examples):
        raise UserError(
            f"{len(refusals):,} of {len(examples):,} forget answers are refusals, such as that of "
            f"{quoted(refusals[0])}. {fix}",
            code="forget-refusals",
            file=file,
        )


def image_root(training_set_dir: Path | None, images: Mapping[str, Path], example: Example) -> Path:
    """Returns the image root of an example's source.

    Raises:
        UserError: The training set contains no image root for the source.
    """
    if example.source not in images:
        raise UserError(
            f"contains no image folder for the source {quoted(example.source)} of example {quoted(example.id)}",
            code="missing-field",
            file=None if training_set_dir is None else training_set_dir / "dataset.json",
            field="images",
        )
    return images[example.source]


def write_training_set(
    output_dir: Path,
    images: Mapping[str, Path],
    examples: Mapping[str, Sequence[Example]],
    source: Mapping[str, object],
    refusals: Sequence[str] = (),
    problems: Problems | None = None,
) -> None:
    """Writes a training set. ``dataset.json`` is written last, so that a folder without it is incomplete.

    Args:
        output_dir: The output folder. Files of an earlier training set in it are removed.
        images: The image root of each `Example.source`. Images are not copied.
        examples: The examples of each role.
        source: The origin of the examples, for ``dataset.json``.
        refusals: Refusal sentences, for methods that train the model to refuse.
        problems: The broken records that were left out, for ``problems.txt``.

    Raises:
        UserError: The forget or the retain set is empty, two examples have the same id, or the folder cannot be
        created.
    """
    for role in ("forget", "retain"):
        if not examples.get(role):
            raise UserError(f"the {role} set is empty. Nothing was written.", code="no-records", file=output_dir)
    for role, role_examples in examples.items():
        _validate_unique(output_dir, role, "id", [example.id for example in role_examples])
    for role in PAIRED_ROLES:
        pair_ids = [example.pair_id for example in examples.get(role, ()) if example.pair_id]
        _validate_unique(output_dir, role, "pair_id", pair_ids)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{error.strerror}. Choose another output folder.", code="output-not-writable", file=output_dir
        ) from None
    _remove_earlier_set(output_dir)
    files: dict[str, object] = {}
    for role in ROLES:
        if examples.get(role):
            path = output_dir / f"{role}.jsonl"
            files[path.name] = {"count": write_records(path, examples[role]), "sha256": digest_file(path)}
            record_outputs([path])  # after a kill, the next command may replace it although there is no dataset.json
    if refusals:
        write_json(output_dir / "refusals.json", list(refusals))
        record_outputs([output_dir / "refusals.json"])
        files["refusals.json"] = {"count": len(refusals), "sha256": digest_file(output_dir / "refusals.json")}
    roots = {name: os.path.relpath(root.resolve(), output_dir.resolve()) for name, root in images.items()}
    description: dict[str, object] = {"schema": 1, "images": roots, "files": files, "source": dict(source)}
    if problems:
        description["broken_records"] = problems.count
        write_text(output_dir / "problems.txt", "".join(f"{message}\n" for message in problems.messages))
        record_outputs([output_dir / "problems.txt"])
    write_json(output_dir / "dataset.json", description)


def _validate_unique(output_dir: Path, role: str, name: str, values: Sequence[str | None]) -> None:
    duplicates = [value for value, count in Counter(values).items() if count > 1]
    if duplicates:
        raise UserError(
            f"two {role} examples have the {name} {quoted(duplicates[0])}. Make them unique in the data file.",
            code="duplicate-id",
            file=output_dir,
            field=name,
        )


def _remove_earlier_set(output_dir: Path) -> None:
    """Removes the files of an earlier training set, so that none of them can pass for a file of the new one."""
    if (output_dir / "dataset.json").exists():
        listed = read_dataset_json(output_dir)[1]
        (output_dir / "dataset.json").unlink()
        for name in (*listed, "problems.txt"):
            if name in FILES:
                (output_dir / name).unlink(missing_ok=True)


def validate_training_set_outputs(
    output_dir: Path, inputs: Iterable[str | Path | None], overwrite: bool = False
) -> None:
    """Checks that a command may write a training set into a folder. It may replace an earlier training set.

    Args:
        output_dir: The folder.
        inputs: The files and folders that the command reads.
        overwrite: Whether other files with the names of a training set's files may be replaced.

    Raises:
        UserError: A file of the training set would replace an input or a file of somebody else.
    """
    files = [output_dir / name for name in FILES]
    validate_not_overwriting(files, inputs)
    if not (output_dir / "dataset.json").exists():
        validate_outputs(files, [], overwrite)
        return
    try:
        read_dataset_json(output_dir)
    except UserError as error:
        raise UserError(
            f"is not of a training set ({error.message}). Choose another output folder.",
            code="output-exists",
            file=output_dir / "dataset.json",
        ) from None


def read_dataset_json(training_set_dir: Path) -> tuple[dict[str, Path], dict[str, dict[str, Any]]]:
    """Reads the ``dataset.json`` of a training set.

    Returns:
        The image root of each source, and the count and the SHA-256 of each file.

    Raises:
        UserError: ``dataset.json`` is missing or invalid.
    """
    path = training_set_dir / "dataset.json"
    if not path.is_file():
        raise UserError(
            "is not a training set, because it contains no dataset.json. Create a training set with "
            f"`vlm-unlearn data import`{describe_path(training_set_dir)}",
            code="file-not-found",
            file=training_set_dir,
        )
    description = read_json(path)
    roots = description.get("images") if isinstance(description, dict) else None
    if not isinstance(roots, dict) or not all(isinstance(root, str) for root in roots.values()):
        problem = "must contain the image folder of each source"
        raise UserError(problem, code="invalid-field", file=path, field="images")
    listed = description.get("files")
    if not isinstance(listed, dict) or not {"forget.jsonl", "retain.jsonl"} <= listed.keys():
        raise UserError("must list forget.jsonl and retain.jsonl", code="invalid-field", file=path, field="files")
    if not all(isinstance(entry, dict) for entry in listed.values()):
        problem = "must contain the count and the sha256 of each file"
        raise UserError(problem, code="invalid-field", file=path, field="files")
    return {name: (training_set_dir / root).resolve() for name, root in roots.items()}, listed


def read_folder(
    training_set_dir: Path,
) -> tuple[dict[str, Path], dict[str, list[Example]], Sequence[str], dict[str, str]]:
    """Reads the files of a training set, for `UnlearningDataset.from_folder`.

    Returns:
        The image root of each source, the examples of each role, the refusals, and the SHA-256 of each file.

    Raises:
        UserError: The folder is not a training set, a record is broken, two examples have the same id, or an image is
            missing.
    """
    if not training_set_dir.is_dir():
        raise UserError(
            "no such training set. Create one with `vlm-unlearn data import`.",
            code="file-not-found",
            file=training_set_dir,
        )
    images, listed = read_dataset_json(training_set_dir)
    examples: dict[str, list[Example]] = {}
    digests: dict[str, str] = {}
    for role in ROLES:
        if f"{role}.jsonl" in listed:
            path = training_set_dir / f"{role}.jsonl"
            examples[role] = _read_examples(path, images)
            digests[path.name] = digest_file(path)
    refusals: Sequence[str] = DEFAULT_REFUSALS
    path = training_set_dir / "refusals.json"
    if path.name in listed:
        refusals = validate_refusals(read_json(path), path)
        digests[path.name] = digest_file(path)
    return images, examples, refusals, digests


def _read_examples(path: Path, images: Mapping[str, Path]) -> list[Example]:
    examples = list(read_records(path, Example))
    if not examples:
        raise UserError(f"the {path.stem} set is empty", code="no-records", file=path)
    number_by_id: dict[str, int] = {}
    for number, example in enumerate(examples, start=1):
        position = f"{number} ({quoted(example.id)})"
        if example.id in number_by_id:
            raise UserError(
                f"has the same id as record {number_by_id[example.id]}",
                code="duplicate-id",
                file=path.name,
                record=position,
                field="id",
            )
        number_by_id[example.id] = number
        if example.image is not None:
            resolve_image(image_root(path.parent, images, example), example.image, path.name, position)
    return examples
