"""From data files to a training-set folder, in one go: read, check, inject, split, mix, write."""

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
from vlm_unlearn.data.parallel import OnDone, map_in_threads
from vlm_unlearn.data.pipeline import mixed_order, conversation_spans, read_answers
from vlm_unlearn.data.readers import detect, read_any
from vlm_unlearn.data.training_set import PARTNERS, ROLES, write_training_set
from vlm_unlearn.errors import Problems, UserError
from vlm_unlearn.records import Example
from vlm_unlearn.store import digest_file


@dataclass(frozen=True)
class Imported:
    """What an import made: examples by role, pairs left out by reason, and the broken records, which were left out too."""

    counts: dict[str, int]
    left_out: dict[str, int] = field(default_factory=dict)
    text_only: int = 0  # examples without an image
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
) -> Imported:
    """Makes a training set of VLGuard: Safety Mirage's inject, split and mix in one go.

    Args:
        harmful_answers: JSON ``image -> answer`` whose answers replace the reference refusals of unsafe images (for unlearning).
            Without it the references stay (for mixed_sft).
        include_safe_image_unsafe: unsafe questions on safe images join the forget set.
        external: LLaVA-format file from which retain is filled up to `retain_size`, drawn and shuffled with `seed` as Safety
            Mirage's *mix* step does.
        on_done: called with (images looked at, all).

    Raises:
        UserError: no record can be used; nothing is written then.
    """
    problems = Problems()
    pairs = vlguard.read_pairs(file, images, problems)
    split = vlguard.split(pairs, read_answers(harmful_answers) if harmful_answers else None, include_safe_image_unsafe)
    retain = split.retain
    source: dict[str, object] = {"format": "vlguard", "file": file.name, "sha256": digest_file(file)}
    if harmful_answers:
        source["harmful_answers_sha256"] = digest_file(harmful_answers)
        if not split.forget and pairs:
            raise UserError(f"{harmful_answers}: names no image of an unsafe record of {file}")
    roots = {"vlguard": images}
    if external:
        roots["llava"] = external_images or external.parent
        # An image is looked for once its record is drawn: general sets are large.
        retain = mix(retain, external, retain_size, seed, problems)
        source["external"] = {"file": external.name, "sha256": digest_file(external), "size": retain_size, "seed": seed}
    examples = {"forget": split.forget, "retain": retain, "preferred": split.preferred}
    return _write(out, roots, examples, source, problems, split.left_out, on_done=on_done)


def import_safe_eraser(
    file: Path, images: Path, out: Path, refusals: Path | None = None, on_done: OnDone | None = None
) -> Imported:
    """Makes a training set, decouple examples included, of SafeEraser's ``all_train.json`` (and ``prompt.json`` as `refusals`)."""
    problems = Problems()
    sets = safe_eraser.examples(safe_eraser.read_safe_eraser(file, images, problems))
    sentences = safe_eraser.read_refusals(refusals) if refusals else []
    source: dict[str, object] = {"format": "safe_eraser", "file": file.name, "sha256": digest_file(file)}
    return _write(
        out,
        {"safe_eraser": images},
        dict(zip(safe_eraser.ROLES, sets, strict=True)),
        source,
        problems,
        {},
        sentences,
        on_done,
    )


def import_files(
    files: Mapping[str, str | Path],
    images: Path,
    out: Path,
    columns: Columns | None = None,
    refusals: Path | None = None,
    on_done: OnDone | None = None,
) -> Imported:
    """Makes a training set of your own files, one a role (``forget``, ``retain``, ``decouple``, ``preferred``), or of one table with a set
    column.

    Of a file that knows sets itself, such as VLGuard's, only the pairs of its role are taken; the others are counted.

    Args:
        files: file or `datasets` name by role; under ``""`` the table whose `columns.set` names each row's role.
        images: the image root. Images that a table itself holds are written into `out`.

    Raises:
        UserError: no record can be used; nothing is written then.
    """
    before = out.exists()
    try:
        return _import_files(files, images, out, columns, refusals, on_done)
    except UserError:
        if not before:  # images unpacked from a table
            shutil.rmtree(out, ignore_errors=True)
        raise


def _import_files(
    files: Mapping[str, str | Path],
    images: Path,
    out: Path,
    columns: Columns | None,
    refusals: Path | None,
    on_done: OnDone | None,
) -> Imported:
    problems = Problems()
    left_out: dict[str, int] = {}
    examples: dict[str, list[Example]] = {role: [] for role in ROLES}
    source: dict[str, object] = {"format": "files"}
    for role, file in files.items():
        path = Path(file)
        digest = digest_file(path) if path.is_file() else None
        source[role or "table"] = {"file": path.name, "sha256": digest}
        for name, example in _entries(role, file, images, out / "images", columns, problems):
            if name in examples:
                examples[name].append(example)
            else:
                left_out[name] = left_out.get(name, 0) + 1
    roots = {"llava": images, "table": images, "vlguard": images, "safe_eraser": images, "embedded": out / "images"}
    used = {example.source for found in examples.values() for example in found}
    sentences = safe_eraser.read_refusals(refusals) if refusals else []
    roots = {name: root for name, root in roots.items() if name in used}
    return _write(out, roots, examples, source, problems, left_out, sentences, on_done)


def _entries(
    role: str, file: str | Path, images: Path, embedded: Path, columns: Columns | None, problems: Problems
) -> Iterable[tuple[str, Example]]:
    """Role and example of each entry; in place of the role what is said of an entry that is of another set of the file."""
    kind = detect(file)
    if kind == "training_set":
        raise UserError(f"{file}: is a training set already; pass the data files it was made of")
    if kind == "table":
        columns = columns or Columns()
        if not role:  # its rows must say where they belong
            columns = replace(columns, named=columns.named | {"set"})
        for row in table.read_table(file, columns, images, problems, embedded):
            yield _role_of(role, row.set, file), row.example
        return
    if not role:
        raise UserError(f"{file}: only a table has a set column; pass the files as --forget and --retain")
    for entry in read_any(file, images, columns, problems):
        yield _role_of(role, entry.set, file), entry.example


def _role_of(role: str, own_set: str | None, file: str | Path) -> str:
    """The role that a file was given for, where its entry is of no set or of that one."""
    if not role:
        return str(own_set)
    return role if own_set in (None, "", role) else f"{own_set} pairs of {Path(file).name}"


def _write(
    out: Path,
    roots: Mapping[str, Path],
    examples: Mapping[str, Sequence[Example]],
    source: dict[str, object],
    problems: Problems,
    left_out: dict[str, int],
    refusals: Sequence[str] = (),
    on_done: OnDone | None = None,
) -> Imported:
    """Looks at every image once, leaves out the examples whose image can't be used, and writes the rest."""
    for root in roots.values():
        if not root.is_dir():
            raise UserError(f"{root}: no such folder of images")
    bad = _unusable_images(roots, examples, on_done)
    whole = {role: _with_usable_image(_with_own_ids(found), bad, problems) for role, found in examples.items()}
    for role, found in whole.items():
        whole[role] = [example for example in found if example.answer.strip()]
        if len(whole[role]) < len(found):
            left_out = {**left_out, "empty answer": left_out.get("empty answer", 0) + len(found) - len(whole[role])}
    left_out = {**left_out, **_drop_half_pairs(whole)}
    for role in ("forget", "retain", *(partner for partner in PARTNERS if examples.get(partner))):
        if not whole.get(role):
            why = "".join(
                [f"; left out: {count} {what}" for what, count in left_out.items()]
                + [f"; {problems.summary()}"] * bool(problems)
            )
            raise UserError(f"{out}: the {role} set is empty; nothing was written{why}")
    if left_out:
        source["left_out"] = left_out
    write_training_set(out, roots, whole, source, refusals, problems)
    text_only = sum(example.image is None for found in whole.values() for example in found)
    return Imported({role: len(found) for role, found in whole.items() if found}, left_out, text_only, problems)


def _unusable_images(
    roots: Mapping[str, Path], examples: Mapping[str, Sequence[Example]], on_done: OnDone | None
) -> dict[tuple[str, str], str]:
    """What is wrong with each image that can't be trained on, by source and path; every image is decoded once."""
    named = dict.fromkeys(
        (example.source, example.image) for found in examples.values() for example in found if example.image
    )
    wanted = [(source, image) for source, image in named if image]

    def look(key: tuple[str, str]) -> str:
        source, image = key
        try:
            open_image(resolve_image(roots[source], image, source)).close()
        except UserError as error:
            return str(error).removeprefix(f"{source}: ")
        return ""

    return {key: problem for key, problem in map_in_threads(look, wanted, on_done) if problem}


def _with_usable_image(
    examples: Sequence[Example], bad: Mapping[tuple[str, str], str], problems: Problems
) -> list[Example]:
    good = []
    for example in examples:
        problem = bad.get((example.source, example.image or ""))
        if problem:
            problems.add(UserError(f'example "{example.id}": {problem}'))
        else:
            good.append(example)
    return good


def _with_own_ids(examples: Sequence[Example]) -> list[Example]:
    """Examples of general data with ids made different: they repeat in published mixtures."""
    seen: Counter[str] = Counter()
    found = []
    for example in examples:
        if example.source not in ("vlguard", "safe_eraser"):
            name = f"{example.source}/{example.id}"
            seen[name] += 1
            example = example.model_copy(update={"id": name if seen[name] == 1 else f"{name}#{seen[name]}"})
        found.append(example)
    return found


def _drop_half_pairs(whole: dict[str, list[Example]]) -> dict[str, int]:
    """Leaves out, in place, forget and decouple examples whose other half is missing or broken, and preferred answers to no question.

    A forget example without a `pair_id` has no other half to miss; one without a preferred answer stays, since dpo alone wants it.
    """
    before = sum(map(len, whole.values()))
    pairs = {role: {example.pair_id for example in found} - {None} for role, found in whole.items()}
    if whole.get("decouple"):
        both = pairs["forget"] & pairs["decouple"]
        whole["forget"] = [example for example in whole["forget"] if example.pair_id is None or example.pair_id in both]
        whole["decouple"] = [example for example in whole["decouple"] if example.pair_id in both]
    asked = {example.pair_id for example in whole["forget"]} - {None}
    if whole.get("preferred"):
        whole["preferred"] = [example for example in whole["preferred"] if example.pair_id in asked]
    dropped = before - sum(map(len, whole.values()))
    return {"pair without its other half": dropped} if dropped else {}


def mix(retain: Sequence[Example], external: Path, size: int, seed: int, problems: Problems) -> list[Example]:
    """Fills `retain` up to `size` from a LLaVA-format file of any size, then shuffles the whole (Safety Mirage's *mix*, same draws)."""
    offered = conversation_spans(external, problems)
    mixed = []
    with external.open("rb") as handle:
        for index in mixed_order(len(retain), len(offered) // 2, size, seed):
            if index < len(retain):
                mixed.append(retain[index])
                continue
            place = index - len(retain)
            value = json.loads(text_at(handle, offered[2 * place], offered[2 * place + 1]))
            where = partial("{}: conversation {}".format, external.name, place)
            mixed.append(llava.example(llava.parse(RawRecord(value, where, place), empty_answers=True), place))
    return mixed
