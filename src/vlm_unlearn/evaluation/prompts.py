"""The prompts of a suite, from its cases' and its benchmarks' files."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

from vlm_unlearn.attacks.one_word import rewrite_prompts
from vlm_unlearn.benchmarks import benchmark_image_root, benchmark_prompts
from vlm_unlearn.config import SampleConfig, SplitConfig, Suite
from vlm_unlearn.data.formats import safe_eraser, table, vlguard
from vlm_unlearn.data.images import resolve_image
from vlm_unlearn.errors import UserError
from vlm_unlearn.records import Prompt
from vlm_unlearn.store import digest_file, digest_json


def split_prompts(case: SplitConfig) -> list[Prompt]:
    """One case's prompts, rewritten where it says so.

    Raises:
        UserError: the file is broken, an image is missing, or the file has no prompt of the case's kind.
    """
    found: Iterable[Prompt]
    if case.format == "vlguard":
        found = vlguard.prompts(vlguard.read_pairs(case.file, case.images), case.name, case.kind)
    elif case.format == "table":
        found = table.prompts(table.read_table(case.file, table.Columns(), case.images), case.name, case.kind)
    else:
        found = safe_eraser.prompts(safe_eraser.read_safe_eraser(case.file, case.images), case.name, case.kind)
    prompts = list(rewrite_prompts(found, case.rewrite) if case.rewrite else found)
    if not prompts:
        raise UserError(f'case "{case.name}": {case.file} has no prompts of kind "{case.kind}"')
    return prompts


def suite_prompts(suite: Suite) -> list[Prompt]:
    """All prompts of a suite, case by case, then benchmark by benchmark."""
    prompts = [prompt for case in suite.splits for prompt in _sampled(split_prompts(case), suite.sample)]
    prompts += [prompt for benchmark in suite.benchmarks for prompt in benchmark_prompts(benchmark)]
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise UserError(f'two prompts have the id "{prompt.id}"; the ids in the data file must differ')
        seen.add(prompt.id)
    return prompts


def _sampled(prompts: list[Prompt], sample: SampleConfig | None) -> list[Prompt]:
    """A case's seeded part, in file order. Cases about the same questions, as before and after an attack, give the same ones."""
    if sample is None:
        return prompts
    rng = random.Random(sample.seed)
    if sample.num_rows is not None:
        rows = rng.sample(range(len(prompts)), min(sample.num_rows, len(prompts)))
        return [prompts[row] for row in sorted(rows)]
    names = list(dict.fromkeys(prompt.group_id for prompt in prompts))
    chosen = set(rng.sample(names, min(sample.num_questions or 0, len(names))))
    return [prompt for prompt in prompts if prompt.group_id in chosen]


def image_roots(suite: Suite) -> dict[str, Path]:
    """Image root of each prompt set."""
    roots = {case.name: case.images for case in suite.splits}
    return roots | {benchmark.name: benchmark_image_root(benchmark) for benchmark in suite.benchmarks}


def prompts_digest(prompts: Iterable[Prompt], roots: dict[str, Path]) -> str:
    """SHA-256 over the prompts and the content of their images."""
    images: dict[Path, str] = {}
    parts: list[object] = []
    for prompt in prompts:
        digest = None
        if prompt.image is not None:
            path = resolve_image(roots[prompt.set], prompt.image, record=prompt.id)
            if path not in images:
                images[path] = digest_file(path)
            digest = images[path]
        parts.append([prompt.model_dump(), digest])
    return digest_json(parts)
