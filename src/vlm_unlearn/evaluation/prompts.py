"""Prompts of a suite, read from the files of its splits and benchmarks."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

from vlm_unlearn.attacks.base import apply_attacks
from vlm_unlearn.benchmarks import benchmark_image_root, benchmark_prompts
from vlm_unlearn.config import SampleConfig, SplitConfig, Suite
from vlm_unlearn.data.formats.base import get_format
from vlm_unlearn.data.images import resolve_image
from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.records import Prompt
from vlm_unlearn.store import digest_file, digest_json


def split_prompts(split: SplitConfig) -> list[Prompt]:
    """Reads the prompts of one split, and applies its attacks.

    Raises:
        UserError: The file is broken, an image is missing, or the file has no prompt of the split's kind.
    """
    originals = get_format(split.format, "format").prompts(split.file, split.images, split.name, split.kind)
    prompts = apply_attacks(originals, split.attacks)
    if not prompts:
        raise UserError(
            f'the split "{split.name}" has no prompts: the file contains none of kind "{split.kind}".',
            code="no-records",
            file=split.file,
        )
    return prompts


def suite_prompts(suite: Suite) -> list[Prompt]:
    """Reads all prompts of a suite: the splits in order, then the benchmarks in order, with the system prompt.

    Raises:
        UserError: A file is broken, an image is missing, or two prompts have the same id.
    """
    prompts = [prompt for split in suite.splits for prompt in _sample(split_prompts(split), suite.sample)]
    prompts += [prompt for benchmark in suite.benchmarks for prompt in benchmark_prompts(benchmark)]
    ids: set[str] = set()
    for prompt in prompts:
        if prompt.id in ids:
            raise UserError(
                f"two prompts have the id {quoted(prompt.id)}. The ids in the data file must differ.",
                code="duplicate-id",
            )
        ids.add(prompt.id)
    if suite.system_prompt is None:
        return prompts
    return [
        prompt if prompt.system is not None else prompt.model_copy(update={"system": suite.system_prompt})
        for prompt in prompts
    ]


def _sample(prompts: list[Prompt], sample: SampleConfig | None) -> list[Prompt]:
    """Returns a seeded sample of a split's prompts, in file order.

    Splits with the same questions, such as those before and after an attack, give the same sample of questions.
    """
    if sample is None:
        return prompts
    rows = drawn_rows(len(prompts), sample)
    if rows is not None:
        return [prompts[row] for row in sorted(rows)]
    rng = random.Random(sample.seed)
    group_ids = list(dict.fromkeys(prompt.group_id for prompt in prompts))
    sampled_ids = set(rng.sample(group_ids, min(sample.num_questions or 0, len(group_ids))))
    return [prompt for prompt in prompts if prompt.group_id in sampled_ids]


def drawn_rows(count: int, sample: SampleConfig) -> list[int] | None:
    """Returns the rows that ``sample.num_rows`` draws, in the order of the draw, or None if it samples questions.

    Safety Mirage's ``VLGuard_eval.py --max_questions N --seed S`` draws the same rows in the same order.

    Args:
        count: The number of rows.
        sample: The size and the seed of the sample.
    """
    if sample.num_rows is None:
        return None
    return random.Random(sample.seed).sample(range(count), min(sample.num_rows, count))


def image_roots(suite: Suite) -> dict[str, Path]:
    """Returns the image folder of each split and benchmark, by its name (`Prompt.set`)."""
    roots = {split.name: split.images for split in suite.splits}
    return roots | {benchmark.name: benchmark_image_root(benchmark) for benchmark in suite.benchmarks}


def prompts_digest(prompts: Iterable[Prompt], roots: dict[str, Path]) -> str:
    """Returns a SHA-256 digest over prompts and the contents of their images, as hexadecimal.

    Args:
        prompts: The prompts.
        roots: The image folder of each prompt set, as `image_roots` returns it.

    Raises:
        UserError: An image is missing or outside its folder.
    """
    image_digests: dict[tuple[Path, str], str] = {}
    entries: list[object] = []
    for prompt in prompts:
        image_digest = None
        if prompt.image is not None:
            image = roots[prompt.set], prompt.image
            if image not in image_digests:  # the rewrites of a question have the same image
                image_digests[image] = digest_file(resolve_image(*image, record=prompt.id))
            image_digest = image_digests[image]
        entries.append([prompt.model_dump(), image_digest])
    return digest_json(entries)
