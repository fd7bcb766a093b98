"""A small evaluation of a model that is still in training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_unlearn.config import ProbeConfig, Suite, load
from vlm_unlearn.data.batching import Processor
from vlm_unlearn.errors import RequestError, nearest
from vlm_unlearn.evaluation.prompts import image_roots, prompts_digest, suite_prompts
from vlm_unlearn.evaluation.runner import JUDGE_LABELS, build_judge, judge_identity, metric_rates
from vlm_unlearn.generation.hf import answers
from vlm_unlearn.judging.base import grade
from vlm_unlearn.records import Prompt
from vlm_unlearn.store import digest_json


class SuiteProbe:
    """Asks the model a suite's first question groups of each case, spread over its length, and grades the answers."""

    def __init__(self, suite: Suite, processor: Processor, prompts: list[Prompt]) -> None:
        self._suite = suite
        self._processor = processor
        self._prompts = prompts
        self._judge = build_judge(suite.judge)
        self._roots = image_roots(suite)

    @property
    def digest(self) -> str:
        """Names prompts, images, judge, metrics and generation."""
        asked = prompts_digest(self._prompts, self._roots)
        counted = {name: metric.model_dump() for name, metric in self._suite.metrics.items()}
        return digest_json([asked, judge_identity(self._suite.judge), counted, self._suite.generation.model_dump()])

    def __call__(self, model: Any) -> Mapping[str, float | None]:
        """Rates by metric name; None where nothing could be scored."""
        batches = answers(model, self._processor, self._prompts, self._roots, self._suite.generation)
        found = [response for batch in batches for response in batch]
        prompts = {prompt.id: prompt for prompt in self._prompts}
        verdicts = [grade(self._judge, prompts[response.prompt_id], response) for response in found]
        return {name: rate.value for name, rate in metric_rates(prompts, verdicts, self._suite.metrics).items()}


def build_probe(config: ProbeConfig, model: str, processor: Processor) -> SuiteProbe:
    """The probe that a recipe's ``probe`` describes.

    Raises:
        RequestError: the suite or its data are broken, or a rule names a metric that the suite doesn't have.
    """
    suite = load(Suite, config.suite, values={"model": model, "root": str(config.root)})
    judge = build_judge(suite.judge).name
    for rule in ("stop_when", "abort_when", "keep_best"):
        for metric in getattr(config, rule):
            if metric not in suite.metrics:
                known = ", ".join(suite.metrics)
                raise RequestError(f'probe.{rule}: {config.suite} has no metric "{metric}"{nearest(metric, suite.metrics)}; it has {known}')
            untold = set(suite.metrics[metric].labels) - set(JUDGE_LABELS[judge])
            if untold:
                raise RequestError(f"probe.{rule}: {metric} counts {', '.join(sorted(untold))} answers, which the judge {judge} can't tell")
    return SuiteProbe(suite, processor, _spread(suite_prompts(suite), config.groups))


def _spread(prompts: list[Prompt], groups: int) -> list[Prompt]:
    """Whole groups of each case, at equal distances."""
    chosen: set[tuple[str, str]] = set()
    for case in dict.fromkeys(prompt.set for prompt in prompts):
        names = list(dict.fromkeys(prompt.group_id for prompt in prompts if prompt.set == case))
        count = min(groups, len(names))
        chosen |= {(case, names[number * len(names) // count]) for number in range(count)}
    return [prompt for prompt in prompts if (prompt.set, prompt.group_id) in chosen]
