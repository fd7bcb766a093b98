"""Creates training sets from data files: reads, validates, injects answers, splits, mixes and writes in one step."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from vlm_unlearn.data.formats import llava, safe_eraser, table, vlguard
from vlm_unlearn.data.formats.fields import RawRecord
from vlm_unlearn.data.formats.table import Columns
from vlm_unlearn.data.images import open_image, resolve_image
from vlm_unlearn.data.json_stream import text_at
from vlm_unlearn.data.readers import detect, read_any
from vlm_unlearn.data.training_set import PAIRED_ROLES, ROLES, IsRefusal, validate_forget_answers, write_training_set
from vlm_unlearn.data_tools.parallel import OnDone, map_in_threads
from vlm_unlearn.data_tools.pipeline import conversation_spans, mixed_order, read_answers
from vlm_unlearn.errors import Problems, UserError, quoted
from vlm_unlearn.records import Example
from vlm_unlearn.store import digest_file


@dataclass(frozen=True)
class ImportResult:
    """The result of an import.

    Attributes:
        counts: The number of examples of each role.
        left_out: The number of pairs that were left out, by reason.
        text_only: The number of examples without an image.
        problems: The broken records, which were left out too.
    """

    counts: dict[str, int]
    left_out: dict[str, int] = field(default_factory=dict)
    text_only: int = 0
    problems: Problems = field(default_factory=Problems)


def import_vlguard(
    file: Path,
    images: Path,
    out: Path,
    harmful_answers: Path | None = None,
    include_safe_image_unsafe: bool = False,
    external: Path | None = None,
    external_images: Path | None = None,
    retain_size: int = 2000,
    seed: int = 42,
    on_done: OnDone | None = None,
    safe_image_answers: Path | None = None,
    is_refusal: IsRefusal | None = None,
) -> ImportResult:
    """Creates a training set from VLGuard (the steps *inject*, *split* and *mix* of Safety Mirage).

    Args:
        file: VLGuard's ``train.json``.
        images: The image root.
        out: The folder of the training set.
        harmful_answers: JSON ``image -> answer`` or ``record id -> answer``. The answers replace the reference
            refusals of unsafe images, for unlearning. Without it the reference refusals stay, for mixed_sft.
        include_safe_image_unsafe: Adds the unsafe questions about safe images to the forget set. Without
            `safe_image_answers` they keep their reference refusals.
        external: A file in LLaVA's format from which the retain set is filled up to `retain_size`. The records are
            sampled and shuffled with `seed`, as in Safety Mirage's step *mix*.
        external_images: The image root of `external`. None uses the folder of `external`.
        retain_size: The size of the retain set with `external`.
        seed: The seed for `external`.
        on_done: Called with the number of images that have been checked, and the number of all images.
        safe_image_answers: JSON ``image -> answer`` or ``record id -> answer``. The answers to the unsafe questions
            about safe images, which are added to the forget set.
        is_refusal: Returns whether an answer is a refusal. None accepts any forget answers.

    Raises:
        UserError: No record is valid, a file cannot be read, or too many forget answers are refusals. Nothing is
            written.
    """
    problems = Problems()
    pairs = vlguard.read_pairs(file, images, problems)
    try:
        answers = read_answers(harmful_answers) if harmful_answers else None
        safe_answers = read_answers(safe_image_answers) if safe_image_answers else None
        split = vlguard.split(pairs, answers, include_safe_image_unsafe, safe_answers)
    except UserError as error:
        error.file = error.file or harmful_answers or safe_image_answers
        raise
    retain = split.retain
    source: dict[str, object] = {"format": "vlguard", "file": file.name, "sha256": digest_file(file)}
    if harmful_answers:
        source["harmful_answers_sha256"] = digest_file(harmful_answers)
        if pairs and not any(example.id.endswith("/unsafe") for example in split.forget):
            raise UserError(f"contains no image of an unsafe record of {file}", code="no-records", file=harmful_answers)
    if safe_image_answers:
        source["safe_image_answers_sha256"] = digest_file(safe_image_answers)
        if pairs and not any(example.id.endswith("/safe_image_unsafe_question") for example in split.forget):
            message = f"contains no image of an unsafe question on a safe image of {file}"
            raise UserError(message, code="no-records", file=safe_image_answers)
    roots = {"vlguard": images}
    if external:
        roots["llava"] = external_images or external.parent
        # Only the images of sampled records are checked, because general datasets are large.
        retain = mix(retain, external, retain_size, seed, problems)
        source["external"] = {"file": external.name, "sha256": digest_file(external), "size": retain_size, "seed": seed}
    examples = {"forget": split.forget, "retain": retain, "preferred": split.preferred}
    return _write(out, roots, examples, source, problems, split.left_out, on_done=on_done, is_refusal=is_refusal)


def import_safe_eraser(
    file: Path,
    images: Path,
    out: Path,
    refusals: Path | None = None,
    on_done: OnDone | None = None,
    is_refusal: IsRefusal | None = None,
) -> ImportResult:
    """Creates a training set from SafeEraser, including the decouple examples.

    Args:
        file: SafeEraser's ``all_train.json``.
        images: The image root.
        out: The folder of the training set.
        refusals: SafeEraser's ``prompt.json``.
        on_done: Called with the number of images that have been checked, and the number of all images.
        is_refusal: Returns whether an answer is a refusal. None accepts any forget answers.

    Raises:
        UserError: No record is valid, a file cannot be read, or too many forget answers are refusals. Nothing is
            written.
    """
    problems = Problems()
    sets = safe_eraser.examples(safe_eraser.read_safe_eraser(file, images, problems))
    sentences = safe_eraser.read_refusals(refusals) if refusals else []
    source: dict[str, object] = {"format": "safe_eraser", "file": file.name, "sha256": digest_file(file)}
    examples = dict(zip(safe_eraser.ROLES, sets, strict=True))
    return _write(out, {"safe_eraser": images}, examples, source, problems, {}, sentences, on_done, is_refusal)


def import_files(
    files: Mapping[str, str | Path],
    images: Path,
    out: Path,
    columns: Columns | None = None,
    refusals: Path | None = None,
    on_done: OnDone | None = None,
    format_name: str | None = None,
    is_refusal: IsRefusal | None = None,
) -> ImportResult:
    """Creates a training set from files in any supported format.

    Pass one file per role (``forget``, ``retain``, ``decouple``, ``preferred``), or a table with a set column. If a
    file has sets, as VLGuard's files do, only the pairs of the file's role are used. The others are counted.

    Args:
        files: The file or `datasets` name of each role. A table with a set column has the key ``""``.
        images: The image root. Images that are stored inside a table are written to `out`.
        out: The folder of the training set.
        columns: The names of a table's columns.
        refusals: SafeEraser's ``prompt.json``.
        on_done: Called with the number of images that have been checked, and the number of all images.
        format_name: The name of the files' format, such as that of a plug-in. None detects the format of each file.
        is_refusal: Returns whether an answer is a refusal. None accepts any forget answers.

    Raises:
        UserError: No record is valid, a file cannot be read, or too many forget answers are refusals. Nothing is
            written.
    """
    existed = out.exists()
    try:
        return _import_files(files, images, out, columns, refusals, on_done, format_name, is_refusal)
    except UserError:
        if not existed:  # images from a table may have been written
            shutil.rmtree(out, ignore_errors=True)
        raise


def _import_files(
    files: Mapping[str, str | Path],
    images: Path,
    out: Path,
    columns: Columns | None,
    refusals: Path | None,
    on_done: OnDone | None,
    format_name: str | None,
    is_refusal: IsRefusal | None,
) -> ImportResult:
    problems = Problems()
    left_out: dict[str, int] = {}
    examples: dict[str, list[Example]] = {role: [] for role in ROLES}
    source: dict[str, object] = {"format": "files"}
    for role, file in files.items():
        path = Path(file)
        digest = digest_file(path) if path.is_file() else None
        source[role or "table"] = {"file": path.name, "sha256": digest}
        for name, example in _entries(role, file, images, out / "images", columns, problems, format_name):
            if name in examples:
                examples[name].append(example)
            else:
                left_out[name] = left_out.get(name, 0) + 1
    used_sources = {example.source for role_examples in examples.values() for example in role_examples}
    names = ["llava", "table", "vlguard", "safe_eraser", "embedded"]
    roots = dict.fromkeys([*names, *sorted(used_sources - set(names))], images) | {"embedded": out / "images"}
    sentences = safe_eraser.read_refusals(refusals) if refusals else []
    roots = {name: root for name, root in roots.items() if name in used_sources}
    return _write(out, roots, examples, source, problems, left_out, sentences, on_done, is_refusal)


def _entries(
    role: str,
    file: str | Path,
    images: Path,
    embedded: Path,
    columns: Columns | None,
    problems: Problems,
    format_name: str | None,
) -> Iterable[tuple[str, Example]]:
    """Yields each example with its role, or with the reason to leave it out if it belongs to another set."""
    kind = format_name or detect(file)
    if kind == "training_set":
        raise UserError(
            "is a training set already. Pass the data files from which it was created.",
            code="unsupported-setting",
            file=file,
        )
    if kind == "table":
        columns = columns or Columns()
        if not role:  # the set column determines the roles
            columns = replace(columns, required=columns.required | {"set"})
        for row in table.read_table(file, columns, images, problems, embedded):
            yield _role_of(role, row.set, file), row.example
        return
    if not role and format_name is None:
        raise UserError(
            "only tables have a set column. Pass the files as --forget and --retain.",
            code="unsupported-setting",
            file=file,
        )
    for entry in read_any(file, images, columns, problems, kind):
        yield _role_of(role, entry.set, file), entry.example


def _role_of(role: str, entry_set: str | None, file: str | Path) -> str:
    """Returns `role` if the entry has no set or the same set, and otherwise the reason to leave it out."""
    if not role:
        return str(entry_set)
    return role if entry_set in (None, "", role) else f"{entry_set} pairs of {Path(file).name}"


def _write(
    out: Path,
    roots: Mapping[str, Path],
    examples: Mapping[str, Sequence[Example]],
    source: dict[str, object],
    problems: Problems,
    left_out: dict[str, int],
    refusals: Sequence[str] = (),
    on_done: OnDone | None = None,
    is_refusal: IsRefusal | None = None,
) -> ImportResult:
    """Opens every image once, leaves out the examples whose image is not valid, and writes the training set."""
    for root in roots.values():
        if not root.is_dir():
            raise UserError("no such image folder", code="not-a-folder", file=root)
    image_errors = _image_errors(roots, examples, on_done)
    valid = {
        role: _with_valid_image(_with_unique_ids(role_examples), image_errors, problems)
        for role, role_examples in examples.items()
    }
    for role, role_examples in valid.items():
        valid[role] = [example for example in role_examples if example.answer.strip()]
        empty = len(role_examples) - len(valid[role])
        if empty:
            left_out = {**left_out, "empty answer": left_out.get("empty answer", 0) + empty}
    left_out = {**left_out, **_drop_incomplete_pairs(valid)}
    for role in ("forget", "retain", *(role for role in PAIRED_ROLES if examples.get(role))):
        if not valid.get(role):
            reasons = "".join(f" Left out: {count} {reason}." for reason, count in left_out.items())
            skipped = f" {problems.summary()}" if problems else ""
            raise UserError(
                f"the {role} set is empty. Nothing was written.{reasons}{skipped}", code="no-records", file=out
            )
    if is_refusal:
        validate_forget_answers(
            valid["forget"],
            is_refusal,
            "Replace them by harmful answers (import vlguard: --harmful-answers), or pass --accept-refusals for "
            "methods that train the model to refuse, such as mixed_sft. Nothing was written.",
            out,
        )
    if left_out:
        source["left_out"] = left_out
    write_training_set(out, roots, valid, source, refusals, problems)
    text_only = sum(example.image is None for role_examples in valid.values() for example in role_examples)
    counts = {role: len(role_examples) for role, role_examples in valid.items() if role_examples}
    return ImportResult(counts, left_out, text_only, problems)


def _image_errors(
    roots: Mapping[str, Path], examples: Mapping[str, Sequence[Example]], on_done: OnDone | None
) -> dict[tuple[str, str], UserError]:
    """Decodes every image once. Returns the error of each image that is not valid, by source and path."""
    images = dict.fromkeys(
        (example.source, example.image)
        for role_examples in examples.values()
        for example in role_examples
        if example.image
    )

    def image_error(key: tuple[str, str]) -> UserError | None:
        source, image = key
        try:
            open_image(resolve_image(roots[source], image)).close()
        except UserError as error:
            return error
        return None

    return {key: error for key, error in map_in_threads(image_error, images, on_done) if error}


def _with_valid_image(
    examples: Sequence[Example], image_errors: Mapping[tuple[str, str], UserError], problems: Problems
) -> list[Example]:
    valid = []
    for example in examples:
        error = image_errors.get((example.source, example.image or ""))
        if error:
            problems.add(UserError(str(error), code=error.code, record=quoted(example.id)))
        else:
            valid.append(example)
    return valid


def _with_unique_ids(examples: Sequence[Example]) -> list[Example]:
    """Makes the ids of examples unique, except those of VLGuard and SafeEraser. Ids repeat in published mixtures."""
    counts: Counter[str] = Counter()
    unique = []
    for example in examples:
        if example.source not in ("vlguard", "safe_eraser"):
            name = f"{example.source}/{example.id}"
            counts[name] += 1
            example = example.model_copy(update={"id": name if counts[name] == 1 else f"{name}#{counts[name]}"})
        unique.append(example)
    return unique


def _drop_incomplete_pairs(examples: dict[str, list[Example]]) -> dict[str, int]:
    """Drops, in place, examples whose counterpart is missing or broken.

    With a decouple set, forget and decouple examples need each other, unless a forget example has no `pair_id`. A
    preferred answer needs its forget example. A forget example does not need a preferred answer, because only dpo uses
    them.

    Returns:
        The number of dropped examples under the reason, or nothing.
    """
    total = sum(map(len, examples.values()))
    pair_ids = {
        role: {example.pair_id for example in role_examples} - {None} for role, role_examples in examples.items()
    }
    if examples.get("decouple"):
        complete = pair_ids["forget"] & pair_ids["decouple"]
        examples["forget"] = [
            example for example in examples["forget"] if example.pair_id is None or example.pair_id in complete
        ]
        examples["decouple"] = [example for example in examples["decouple"] if example.pair_id in complete]
    forget_ids = {example.pair_id for example in examples["forget"]} - {None}
    if examples.get("preferred"):
        examples["preferred"] = [example for example in examples["preferred"] if example.pair_id in forget_ids]
    dropped = total - sum(map(len, examples.values()))
    return {"pair without its other half": dropped} if dropped else {}


def mix(retain: Sequence[Example], external: Path, size: int, seed: int, problems: Problems) -> list[Example]:
    """Fills `retain` up to `size` from a file in LLaVA's format and shuffles the result.

    The sample is that of Safety Mirage's step *mix* with the same seed. The file can have any size.
    """
    spans = conversation_spans(external, problems)
    mixed = []
    with external.open("rb") as handle:
        for index in mixed_order(len(retain), len(spans) // 2, size, seed):
            if index < len(retain):
                mixed.append(retain[index])
                continue
            number = index - len(retain)
            value = json.loads(text_at(handle, spans[2 * number], spans[2 * number + 1]))
            position = partial("{} (of the valid conversations)".format, number + 1)
            raw = RawRecord(value, external.name, position, number)
            mixed.append(llava.example(llava.parse(raw, empty_answers=True), number))
    return mixed
