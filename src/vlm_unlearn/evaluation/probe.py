"""A small evaluation of a model during training, for a recipe's ``probe``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_unlearn.config import ProbeConfig, Suite, load
from vlm_unlearn.data.processor_call import Processor
from vlm_unlearn.errors import UserError, nearest
from vlm_unlearn.evaluation.core import generate_missing, pair_answers
from vlm_unlearn.evaluation.prompts import image_roots, prompts_digest, suite_prompts
from vlm_unlearn.evaluation.scoring import metric_rate
from vlm_unlearn.generation.base import build_requests, evenly_spaced
from vlm_unlearn.generation.hf import ModelBackend
from vlm_unlearn.judging.base import Answer, OfflineJudge, build_judge, grade_missing
from vlm_unlearn.plugins import PROBES
from vlm_unlearn.records import Prompt, Response, Verdict
from vlm_unlearn.store import RecordList, digest_json


class SuiteProbe:
    """Generates answers to some prompts of a suite, grades them with the suite's judge and returns the rates.

    Args:
        suite: The suite. Its judge must not be a language model.
        processor: The processor of the model in training.
        prompts: The prompts, usually a part of the suite's.

    Raises:
        UserError: The suite's judge is a language model.
    """

    def __init__(self, suite: Suite, processor: Processor, prompts: list[Prompt]) -> None:
        self._suite = suite
        self._processor = processor
        self._prompts = prompts
        self._judge = _build_offline_judge(suite)
        self._roots = image_roots(suite)

    @property
    def digest(self) -> str:
        """A digest of everything that determines the rates: prompts, images, judge, metrics and generation settings."""
        prompts = prompts_digest(self._prompts, self._roots)
        metrics = {name: metric.model_dump() for name, metric in self._suite.metrics.items()}
        return digest_json([prompts, self._judge.identity(), metrics, self._suite.generation.model_dump()])

    def __call__(self, model: Any) -> Mapping[str, float | None]:
        """Returns the rates of a model by metric name. A rate is None if no answer could be scored."""
        samples = {split.name: split.samples for split in self._suite.splits}
        requests = build_requests(self._prompts, self._roots, samples, self._suite.generation.image_loader)
        responses, verdicts = RecordList[Response](), RecordList[Verdict]()
        generate_missing(ModelBackend(model, self._processor, self._suite.generation), requests, responses)
        prompts = {prompt.id: prompt for prompt in self._prompts}
        answers = pair_answers(
            prompts,
            responses.records,
            lambda prompt, response, first_question: Answer(prompt, response, self._roots[prompt.set], first_question),
        )
        grade_missing(self._judge, answers, verdicts)
        return {
            name: metric_rate(prompts, verdicts.records, metric, self._judge.labels).value
            for name, metric in self._suite.metrics.items()
            if not metric.judge
        }


@PROBES.register("suite")
def build_probe(config: ProbeConfig, model: str, processor: Processor) -> SuiteProbe:
    """Returns the probe that a recipe's ``probe`` describes.

    Args:
        config: The probe's settings.
        model: The model in training, as the suite's `model`.
        processor: The processor of the model.

    Raises:
        UserError: The suite or its data are broken, or a rule (`stop_when`, `abort_when`, `keep_best`) names a metric
            that the suite does not have or that the suite's judge cannot measure.
    """
    suite = load(Suite, config.suite, values={"model": model, "root": str(config.root)})
    suite = suite.model_copy(update={"benchmarks": []})  # a probe has to be fast, so it covers the splits only
    judge = _build_offline_judge(suite)
    for rule in ("stop_when", "abort_when", "keep_best"):
        for metric in getattr(config, rule):
            _validate_metric(metric, suite, judge, str(config.suite), f"probe.{rule}")
    return SuiteProbe(suite, processor, _sample_questions(suite_prompts(suite), config.num_questions))


def _validate_metric(metric: str, suite: Suite, judge: OfflineJudge, suite_name: str, key: str) -> None:
    """Raises an error if a probe cannot measure a metric.

    Args:
        metric: The metric's name.
        suite: The probe's suite.
        judge: The suite's judge.
        suite_name: The suite as the recipe names it, for error messages.
        key: The recipe's key that names the metric, for error messages.
    """
    if metric not in suite.metrics:
        raise UserError(
            f'{suite_name} has no metric "{metric}"{nearest(metric, suite.metrics) or "."} '
            f"Its metrics are {', '.join(suite.metrics)}.",
            code="unknown-name",
            field=key,
        )
    if suite.metrics[metric].judge:
        raise UserError(
            f"{metric} is graded by one of the suite's `judges`, and a probe uses only its `judge`. "
            "Name another metric.",
            code="unsupported-setting",
            field=key,
        )
    unavailable_labels = set(suite.metrics[metric].labels) - set(judge.labels)
    if unavailable_labels:
        raise UserError(
            f"{metric} counts the labels {', '.join(sorted(unavailable_labels))}, which the judge {judge.name} "
            "does not return. Name another metric or another judge.",
            code="unsupported-setting",
            field=key,
        )


def _build_offline_judge(suite: Suite) -> OfflineJudge:
    judge = build_judge(suite.judge)
    if not isinstance(judge, OfflineJudge):
        raise UserError(
            f"the judge {judge.name} is a language model, and training would wait for its replies. Use judge=keyword.",
            code="unsupported-setting",
            field="probe.suite",
        )
    return judge


def _sample_questions(prompts: list[Prompt], num_questions: int) -> list[Prompt]:
    """Returns all prompts of `num_questions` evenly spaced questions of each split."""
    sampled: set[tuple[str, str]] = set()
    for split in dict.fromkeys(prompt.set for prompt in prompts):
        group_ids = list(dict.fromkeys(prompt.group_id for prompt in prompts if prompt.set == split))
        sampled |= {(split, group_id) for group_id in evenly_spaced(group_ids, num_questions)}
    return [prompt for prompt in prompts if (prompt.set, prompt.group_id) in sampled]
