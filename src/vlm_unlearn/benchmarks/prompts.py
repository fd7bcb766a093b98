"""A benchmark's questions as prompts of a suite."""

from __future__ import annotations

from pathlib import Path

from vlm_unlearn.benchmarks.base import get_benchmark
from vlm_unlearn.benchmarks.scoring import files_by_prefix
from vlm_unlearn.config import BenchmarkConfig
from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.records import Prompt


def benchmark_prompts(config: BenchmarkConfig) -> list[Prompt]:
    """Reads the questions of a benchmark's official files, as prompts with the ids ``<benchmark>/<question id>``.

    If there are several annotation files, question ids start with the name of the file, and `limit` applies to each
    file.

    Raises:
        UserError: There is no such benchmark, or a file is broken.
    """
    benchmark = get_benchmark(config.name)
    prompts: dict[str, Prompt] = {}
    for prefix, file in files_by_prefix(benchmark, config.annotations).items():
        for question in benchmark.read_questions(file, config.questions, config.limit):
            id = f"{config.name}/{prefix}{question.id}"
            if id in prompts:
                raise UserError(f"two questions have the id {quoted(question.id)}", code="duplicate-id", file=file)
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
        files = ", ".join(map(str, config.annotations))
        raise UserError(f'the benchmark "{config.name}" has no questions', code="no-records", file=files)
    return list(prompts.values())


def benchmark_image_root(config: BenchmarkConfig) -> Path:
    """Returns the folder that the image paths of a benchmark's prompts are relative to."""
    return get_benchmark(config.name).image_root(config.images)
