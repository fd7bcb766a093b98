"""From published files to a training-set folder, in one go: read, check, inject, split, mix, write."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from vlm_unlearn.data.formats import llava, safe_eraser, vlguard
from vlm_unlearn.data.training_set import write_training_set
from vlm_unlearn.errors import RequestError
from vlm_unlearn.records import Example
from vlm_unlearn.store import digest_file, read_json


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
) -> dict[str, int]:
    """Makes a training set of VLGuard.

    Args:
        harmful_answers: JSON ``image -> answer`` whose answers replace the reference refusals of unsafe images (for unlearning).
            Without it the references stay (for mixed_sft).
        include_safe_image_unsafe: unsafe questions on safe images join the forget set.
        external: LLaVA-format file from which retain is filled up to `retain_size`, drawn and shuffled with `seed` as Safety
            Mirage's *mix* step does.

    Returns:
        how many examples each file holds, and how many pairs were left out for which reason.

    Raises:
        RequestError: what is wrong with the data; nothing is written then.
    """
    pairs = vlguard.read_pairs(file, images)
    split = vlguard.split(pairs, _answers(harmful_answers), include_safe_image_unsafe)
    retain = split.retain
    source: dict[str, object] = {"format": "vlguard", "file": file.name, "sha256": digest_file(file)}
    if harmful_answers:
        source["harmful_answers_sha256"] = digest_file(harmful_answers)
        if not split.forget:
            raise RequestError(f"{harmful_answers}: names no image of an unsafe record of {file}")
    roots = {"vlguard": images}
    if external:
        roots["llava"] = external_images or external.parent
        retain = mix(retain, llava.read_llava(external, roots["llava"]), retain_size, seed)
        source["external"] = {"file": external.name, "sha256": digest_file(external), "size": retain_size, "seed": seed}
    if split.left_out:
        source["left_out"] = split.left_out
    write_training_set(out, roots, {"forget": split.forget, "retain": retain}, source)
    return {"forget": len(split.forget), "retain": len(retain), **{f"left out ({why})": n for why, n in split.left_out.items()}}


def import_safe_eraser(file: Path, images: Path, out: Path, refusals: Path | None = None) -> dict[str, int]:
    """Makes a training set, decouple examples included, of SafeEraser's ``all_train.json`` (and ``prompt.json`` as `refusals`)."""
    forget, retain, decouple = safe_eraser.examples(safe_eraser.read_safe_eraser(file, images))
    sentences = safe_eraser.read_refusals(refusals) if refusals else []
    source = {"format": "safe_eraser", "file": file.name, "sha256": digest_file(file)}
    examples = {"forget": forget, "retain": retain, "decouple": decouple}
    write_training_set(out, {"safe_eraser": images}, examples, source, sentences)
    return {role: len(found) for role, found in examples.items()}


def mix(retain: Sequence[Example], external: Sequence[Example], size: int, seed: int) -> list[Example]:
    """Fills `retain` up to `size` with a sample of `external`, then shuffles the whole (Safety Mirage's *mix*, same draws).

    A retain set that is large enough already is only shuffled; an external set that is too small is used whole.
    """
    rng = random.Random(seed)
    missing = min(max(0, size - len(retain)), len(external))
    mixed = [*retain, *rng.sample(external, missing)]
    rng.shuffle(mixed)
    return mixed


def _answers(path: Path | None) -> dict[str, str] | None:
    if path is None:
        return None
    value = read_json(path)
    if not isinstance(value, dict) or not all(isinstance(answer, str) for answer in value.values()):
        raise RequestError(f"{path}: expected an object, image -> harmful answer")
    return value
