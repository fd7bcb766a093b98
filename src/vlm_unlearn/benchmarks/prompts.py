"""A benchmark's questions as prompts of a suite."""

from __future__ import annotations

from pathlib import Path

from vlm_unlearn.benchmarks.base import get_benchmark
from vlm_unlearn.benchmarks.scoring import files_by_key
from vlm_unlearn.config import BenchmarkConfig
from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.records import Prompt


def benchmark_prompts(config: BenchmarkConfig) -> list[Prompt]:
    """The questions of a benchmark's official files, with LLaVA-1.5's prompts; ids are ``<benchmark>/<question id>``.

    With several annotation files, question ids begin with the file's name, and `limit` is of each.

    Raises:
        UserError: no such benchmark, or a file is broken; the record is named.
    """
    benchmark = get_benchmark(config.name)
    prompts: dict[str, Prompt] = {}
    for key, file in files_by_key(benchmark, config.annotations).items():
        for question in benchmark.read_questions(file, config.questions, config.limit):
            id = f"{config.name}/{key}{question.id}"
            if id in prompts:
                raise UserError(f"{file}: two questions have the id {quoted(question.id)}")
            prompts[id] = Prompt(
                id=id,
                group_id=question.cluster,
                set=config.name,
                kind="safe",
                image=question.image,
                question=question.text,
                reference=question.reference,
                category=question.category,
            )
    if not prompts:
        raise UserError(f'benchmark "{config.name}": {", ".join(map(str, config.annotations))} has no questions')
    return list(prompts.values())


def benchmark_image_root(config: BenchmarkConfig) -> Path:
    """What the image paths of a benchmark's prompts are relative to."""
    return get_benchmark(config.name).image_root(config.images)
