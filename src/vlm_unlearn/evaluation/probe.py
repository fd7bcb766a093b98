"""A small evaluation of a model that is still in training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_unlearn.config import ProbeConfig, Suite, load
from vlm_unlearn.data.encoding import Processor
from vlm_unlearn.errors import UserError, nearest
from vlm_unlearn.evaluation.prompts import image_roots, prompts_digest, suite_prompts
from vlm_unlearn.evaluation.scoring import metric_rate
from vlm_unlearn.evaluation.verdicts import build_judge
from vlm_unlearn.generation.hf import generate_responses
from vlm_unlearn.judging.base import Answer, OfflineJudge
from vlm_unlearn.records import Prompt
from vlm_unlearn.store import digest_json


class SuiteProbe:
    """Asks the model a suite's first question groups of each case, spread over its length, and grades the answers."""

    def __init__(self, suite: Suite, processor: Processor, prompts: list[Prompt]) -> None:
        self._suite = suite
        self._processor = processor
        self._prompts = prompts
        self._judge = _offline(suite)
        self._roots = image_roots(suite)

    @property
    def digest(self) -> str:
        """Names prompts, images, judge, metrics and generation."""
        asked = prompts_digest(self._prompts, self._roots)
        counted = {name: metric.model_dump() for name, metric in self._suite.metrics.items()}
        return digest_json([asked, self._judge.identity(), counted, self._suite.generation.model_dump()])

    def __call__(self, model: Any) -> Mapping[str, float | None]:
        """Rates by metric name; None where nothing could be scored."""
        samples = {case.name: case.samples for case in self._suite.splits}
        batches = generate_responses(
            model, self._processor, self._prompts, self._roots, self._suite.generation, samples
        )
        found = [response for batch in batches for response in batch]
        prompts = {prompt.id: prompt for prompt in self._prompts}
        verdicts = [self._judge.verdict(Answer(prompts[response.prompt_id], response)) for response in found]
        metrics = self._suite.metrics.items()
        return {
            name: metric_rate(prompts, verdicts, metric, self._judge.labels).value
            for name, metric in metrics
            if not metric.judge
        }


def build_probe(config: ProbeConfig, model: str, processor: Processor) -> SuiteProbe:
    """The probe that a recipe's ``probe`` describes.

    Raises:
        UserError: the suite or its data are broken, or a rule names a metric that the suite doesn't have.
    """
    suite = load(Suite, config.suite, values={"model": model, "root": str(config.root)})
    suite = suite.model_copy(update={"benchmarks": []})  # a probe is quick, and grades cases only
    judge = _offline(suite)
    for rule in ("stop_when", "abort_when", "keep_best"):
        for metric in getattr(config, rule):
            if metric not in suite.metrics:
                known = ", ".join(suite.metrics)
                raise UserError(
                    f'probe.{rule}: {config.suite} has no metric "{metric}"{nearest(metric, suite.metrics)}; it has {known}'
                )
            if suite.metrics[metric].judge:
                raise UserError(
                    f"probe.{rule}: {metric} has a judge of its own, which a probe doesn't ask; name one of the suite's judge"
                )
            untold = set(suite.metrics[metric].labels) - set(judge.labels)
            if untold:
                raise UserError(
                    f"probe.{rule}: {metric} counts {', '.join(sorted(untold))} answers, which the judge {judge.name} can't tell"
                )
    return SuiteProbe(suite, processor, _spread(suite_prompts(suite), config.num_questions))


def _offline(suite: Suite) -> OfflineJudge:
    judge = build_judge(suite.judge)
    if not isinstance(judge, OfflineJudge):
        raise UserError(
            f"probe: the judge {judge.name} would stop the training to ask a language model; use judge=keyword"
        )
    return judge


def _spread(prompts: list[Prompt], groups: int) -> list[Prompt]:
    """Whole groups of each case, at equal distances."""
    chosen: set[tuple[str, str]] = set()
    for case in dict.fromkeys(prompt.set for prompt in prompts):
        names = list(dict.fromkeys(prompt.group_id for prompt in prompts if prompt.set == case))
        count = min(groups, len(names))
        chosen |= {(case, names[number * len(names) // count]) for number in range(count)}
    return [prompt for prompt in prompts if (prompt.set, prompt.group_id) in chosen]
