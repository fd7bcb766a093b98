"""The result of an evaluation in memory, and its run folder."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_unlearn.config import GenerationConfig, JudgeConfig, MetricConfig, SplitConfig, Suite
from vlm_unlearn.errors import printable
from vlm_unlearn.evaluation.generate import save_suite
from vlm_unlearn.evaluation.rows import PromptSet, write_images
from vlm_unlearn.evaluation.scoring import DEFAULT_JUDGE, GradedRun, JudgeVerdicts, build_row
from vlm_unlearn.evaluation.verdicts import judge_identity
from vlm_unlearn.judging.base import Judge
from vlm_unlearn.records import Prompt, Rate, Response, Row, Summary, Verdict
from vlm_unlearn.store import EvaluationRun, digest_json, user_path, write_records


@dataclass(frozen=True)
class EvaluationPlan:
    """Everything about an evaluation besides the model's answers.

    Attributes:
        name: The model's name.
        data: The prompts with their images.
        judge: The judge.
        judge_config: The judge in the form of a suite.
        metrics: The metrics in the form of a suite, by name.
        generation: The generation settings.
        samples: The number of answers to each prompt.
    """

    name: str
    data: PromptSet
    judge: Judge = field(repr=False)
    judge_config: JudgeConfig
    metrics: dict[str, MetricConfig]
    generation: GenerationConfig
    samples: int = 1

    def suite(self, run: EvaluationRun) -> Suite:
        """Returns the evaluation as a suite that reads the prompts and the images of a run."""
        return Suite(
            model=self.name,
            splits=[
                SplitConfig(
                    name=split,
                    format="prompts",
                    file=run.prompts_file,
                    images=run.images,
                    kind=kind,
                    samples=self.samples,
                )
                for split, kind in self.data.kinds.items()
            ],
            judge=self.judge_config,
            metrics=self.metrics,
            generation=self.generation,
        )

    def identity(self, backend: dict[str, object]) -> dict[str, object]:
        """Returns the identity of the run for its manifest.

        Args:
            backend: The identity of the model and the generation settings.
        """
        return {
            "kind": "evaluate",
            **backend,
            # The name of an image contains a digest of its content.
            "prompts": digest_json([prompt.model_dump() for prompt in self.data.prompts]),
            "samples": dict.fromkeys(self.data.kinds, self.samples) if self.samples > 1 else {},
        }

    def write(self, run: EvaluationRun) -> None:
        """Writes the prompts, the images and the suite into a run folder."""
        write_images(self.data.images, run.images)
        write_records(run.prompts_file, self.data.prompts)
        save_suite(run, self.suite(run))

    def open_verdicts(self, run: EvaluationRun) -> Path:
        """Writes the judge's identity into a run folder, and returns the file for its verdicts."""
        return run.open_verdicts(self.judge.name, judge_identity(self.judge), self.judge_config.fingerprint_fields())

    def row(self, responses: Sequence[Response], verdicts: Sequence[Verdict]) -> Row:
        """Returns the rates in the form of ``summary.json``."""
        prompts = {prompt.id: prompt for prompt in self.data.prompts}
        graded = JudgeVerdicts(self.judge.name, judge_identity(self.judge), self.judge.labels, verdicts)
        run = GradedRun(self.suite(EvaluationRun("")), prompts, responses, {DEFAULT_JUDGE: graded})
        return build_row(run, self.name)


@dataclass(frozen=True)
class EvaluationResult:
    """The answers of a model, the verdicts on them, and the rates.

    Attributes:
        responses: The model's answers.
        verdicts: One verdict per answer, in the order of `responses`.
        row: The rates in the form of ``summary.json``, with the rates of categories and rewrites.
        plan: The prompts, judge and settings of the evaluation.
        wall_seconds: The time that generation took, in seconds.
    """

    responses: list[Response]
    verdicts: list[Verdict]
    row: Row
    plan: EvaluationPlan = field(repr=False)
    wall_seconds: float = 0.0

    @property
    def metrics(self) -> dict[str, Rate]:
        """The rates by the name of the metric. A rate has `value`, `low`, `high`, `n` and `failed`."""
        return self.row.metrics

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts, after the attack if there was one."""
        return self.plan.data.prompts

    @property
    def notes(self) -> list[str]:
        """Sentences about answers and verdicts that limit the rates: failed, truncated and degenerate ones."""
        total = len(self.responses)
        counts = {
            "answers have no text": sum(response.text is None for response in self.responses),
            f"answers are truncated at {self.plan.generation.max_new_tokens} tokens": sum(
                response.finish_reason == "length" for response in self.responses
            ),
            "answers are degenerate": sum(verdict.label == "degenerate" for verdict in self.verdicts),
        }
        notes = [f"{count:,} of {total:,} {text}" for text, count in counts.items() if count]
        errors = [verdict.error or "" for verdict in self.verdicts if verdict.label is None and verdict.score is None]
        if errors:
            notes.append(f"{len(errors):,} of {total:,} verdicts failed (the first: {errors[0]})")
        return notes

    def to_pandas(self) -> Any:
        """Returns a `pandas.DataFrame` with one row per answer.

        The columns are `id`, `sample`, `group_id`, `variant`, `set`, `kind`, `category`, `image`, `question`,
        `reference`, `prefill`, `answer`, `finish_reason`, `label`, `score`, `explanation` and `error`. `variant` is
        that of an attack. `image` is the name of the image's file. `answer` follows `prefill`. `error` is the error of
        the answer or the verdict.
        """
        import pandas

        prompts = {prompt.id: prompt for prompt in self.prompts}
        rows = []
        for response, verdict in zip(self.responses, self.verdicts, strict=True):
            prompt = prompts[response.prompt_id]
            rows.append(
                {
                    "id": prompt.id,
                    "sample": response.sample,
                    "group_id": prompt.group_id,
                    "variant": prompt.variant,
                    "set": prompt.set,
                    "kind": prompt.kind,
                    "category": prompt.category,
                    "image": prompt.image,
                    "question": prompt.question,
                    "reference": prompt.reference,
                    "prefill": prompt.prefill,
                    "answer": response.text,
                    "finish_reason": response.finish_reason,
                    "label": verdict.label,
                    "score": verdict.score,
                    "explanation": verdict.raw,
                    "error": response.error or verdict.error,
                }
            )
        return pandas.DataFrame(rows)

    def save(self, output_dir: str | Path) -> Path:
        """Writes the run folder that ``vlm-unlearn evaluate`` would write, for `report`, `compare` and `score`.

        Images are written to its folder ``images``. Saving the same result again changes nothing.

        Args:
            output_dir: The run folder.

        Returns:
            The folder.

        Raises:
            UserError: The folder contains another run or other files.
        """
        run = EvaluationRun(user_path(output_dir).absolute())
        generation = self.plan.generation.model_dump(include={"max_new_tokens", "batch_size", "temperature", "seed"})
        answers = digest_json([response.model_dump() for response in self.responses])
        backend: dict[str, object] = {"model": "in memory", "generation": generation, "answers": answers}
        with run.lock():
            run.open(self.plan.identity(backend))
            self.plan.write(run)
            write_records(run.responses_file, self.responses)
            write_records(self.plan.open_verdicts(run), self.verdicts)
            run.write_summary(Summary(rows=[self.row]))
            if not run.is_finished:
                run.record_cost(self.wall_seconds, finished=True)
        return run.path

    def __repr__(self) -> str:
        width = max(map(len, self.metrics), default=0)
        lines = [f"{name:<{width}}  {_describe(rate)}" for name, rate in self.metrics.items()]
        heading = f"{self.row.model}, judged by {self.row.judge}: {len(self.responses):,} answers"
        return "\n".join(map(printable, [heading, *lines, *(f"note: {note}" for note in self.notes)]))

    def _repr_html_(self) -> str:
        """Returns a table for notebooks. All texts are escaped."""
        cells = "".join(
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(_describe(rate))}</td></tr>"
            for name, rate in self.metrics.items()
        )
        heading = html.escape(f"{self.row.model}, judged by {self.row.judge}: {len(self.responses):,} answers")
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        return f"<p>{heading}</p><table>{cells}</table>{notes}"


def _describe(rate: Rate) -> str:
    """Returns ``"37.5 % [12.1, 67.4], n = 8"``."""
    if rate.value is None or rate.low is None or rate.high is None:
        text = "no value"
    else:
        text = f"{100 * rate.value:.1f} % [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"
    return f"{text}, n = {rate.n:,}" + (f", {rate.failed:,} failed" if rate.failed else "")
