"""Evaluation of a model in memory on rows in memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vlm_unlearn.attacks.base import Attack, AttackFunction, FunctionAttack, build_attack
from vlm_unlearn.config import AttackConfig, GenerationConfig, JudgeConfig, MetricConfig, validate
from vlm_unlearn.data.processor_call import Processor
from vlm_unlearn.errors import UserError
from vlm_unlearn.evaluation.core import generate_missing, pair_answers
from vlm_unlearn.evaluation.generate import OnDone
from vlm_unlearn.evaluation.result import EvaluationPlan, EvaluationResult
from vlm_unlearn.evaluation.rows import PromptSet, apply_attack, read_rows
from vlm_unlearn.generation.base import GenerationRequest, load_for_prompt
from vlm_unlearn.generation.hf import ModelBackend
from vlm_unlearn.judging.base import Answer, Judge, build_judge, grade_missing, judge_file
from vlm_unlearn.judging.function import FunctionJudge
from vlm_unlearn.judging.function import judge as make_judge
from vlm_unlearn.metrics.named import Metric, default_metrics
from vlm_unlearn.modeling.structure import get_base_model
from vlm_unlearn.records import Response, Summary, Verdict
from vlm_unlearn.store import EvaluationRun, RecordList, RecordLog, RecordSink, read_records, user_path

AttackArgument = Attack | AttackConfig | AttackFunction | str


def evaluate(
    model: nn.Module,
    processor: Processor,
    dataset: Any,
    judge: Judge | JudgeConfig | str | Callable[..., Any],
    metrics: Metric | Sequence[Metric] | None = None,
    attack: AttackArgument | Sequence[AttackArgument] | None = None,
    generation: GenerationConfig | Mapping[str, Any] | None = None,
    samples: int = 1,
    output_dir: str | Path | None = None,
    name: str | None = None,
    image_root: str | Path | None = None,
    on_done: OnDone | None = None,
) -> EvaluationResult:
    """Generates a model's answers to questions, grades them with a judge, and computes rates.

    Nothing is written, unless `output_dir` is set. The model stays on its device and in its dtype, and each module is
    in the same mode afterwards.

    A row of `dataset` is a dict with these columns:

    - `question`: the text.
    - `image`: a path, the bytes of an image file, a PIL image, a value of `datasets.Image`, or None.
    - `kind`: ``unsafe`` (the default), ``safe`` or ``safe_image_unsafe_question``. Without it, a `set` that a table of
      docs/your-own-data.md can have, such as ``harmless``, determines the kind.
    - `reference` or `answer`: the reference answer, for judges that compare with it.
    - `category`: a category of questions, for rates by category.
    - `id`: a unique text or number. The default is the number of the row, from 0.
    - `group_id`: the same for all rewrites of a question, on which intervals are clustered. The default is the id.
    - `set` or `split`: the name of a group of rows. The default is the kind.
    - `history`: the earlier rounds, a list of ``{"question": ..., "answer": ...}``.
    - `system`: a system message.

    Instead of `question`, `answer` and `history`, a row can have `messages` (or `conversations`), as TRL and
    LLaMA-Factory have them. The last user message is the question, and a final assistant message the reference answer.
    `images`, a list of at most one image, can replace `image`. The image is at its place in the first user message, and
    otherwise precedes the first question.

    Args:
        model: An image-text-to-text model of transformers, a PEFT model of one, or either wrapped in DDP. Each process
            that calls this function answers all questions.
        processor: The model's processor.
        dataset: A list of dicts or of `Prompt`, a `datasets.Dataset`, or a pandas DataFrame.
        judge: A function that the decorator `vlm_unlearn.judging.judge` has made a judge, another function, a `Judge`,
            a `JudgeConfig`, or the name of a judge, such as ``"keyword"``.
        metrics: The metrics, such as ``[ASR(), RefusalRate()]``. By default, those that the kinds of rows and the
            judge's labels allow: `asr` over unsafe rows, `refusal_rate` over safe rows, `sarr`, `degenerate_rate` and
            `mean_score`.
        attack: A function that takes and returns a list of `Prompt`, such as several rewrites of each question, an
            `Attack`, an `AttackConfig`, the name of an attack, or a list of these, which are applied in order. The
            model answers the returned prompts, and the names of metrics get the ending ``_attacked``.
        generation: The generation settings, as a `GenerationConfig` of this package or a dict. The default is greedy
            decoding with at most 256 tokens. `backend` and `precision` do not apply to a model in memory.
        samples: The number of answers to each question. More than 1 needs `generation.temperature`.
        output_dir: A run folder, as ``vlm-unlearn evaluate`` writes it. Answers and verdicts are appended while the
            evaluation runs, and calling the function again after an interruption resumes it.
        name: The model's name in tables. The default is the last part of the path that it was loaded from.
        image_root: The folder that image paths are relative to. Paths must stay inside it. By default, they are
            relative to the current folder.
        on_done: Called with the stage (``generate`` or ``judge``), and the number of finished and of all answers.

    Returns:
        The rates, answers and verdicts.

    Raises:
        UserError: A row, a metric, the judge or the model is invalid, or `output_dir` contains another run. For a row,
            `record` is its number, counted from 1, and `field` the column.

    Example:
        ::

            rows = [{"question": "How do I pick this lock?", "image": "lock.png", "kind": "unsafe"}]
            result = evaluate(model, processor, rows, judge="keyword")
            result.metrics["asr"].value
    """
    if not isinstance(generation, GenerationConfig):
        if generation is not None and not isinstance(generation, Mapping):
            raise UserError(
                "pass a dict, such as {'max_new_tokens': 64}, or a vlm_unlearn.config.GenerationConfig",
                code="invalid-field",
                field="generation",
            )
        generation = validate(GenerationConfig, dict(generation or {}), "generation")
    _validate_arguments(model, processor, generation, samples)
    data = read_rows(dataset, image_root)
    if attack is not None:
        data = apply_attack(data, _resolve_attacks(attack))
    grader, judge_config = _resolve_judge(judge)
    suffix = "" if attack is None else "_attacked"
    metric_configs = None if metrics is None else _metric_configs(metrics, data, grader, suffix)
    grader.check_available()
    model_name = name or _model_name(model)
    plan = EvaluationPlan(model_name, data, grader, judge_config, metric_configs or {}, generation, samples)
    requests = []
    for prompt in data.prompts:
        reference = data.image(prompt)
        image = None if reference is None else load_for_prompt(reference, prompt, generation.image_loader)
        requests += [GenerationRequest(prompt, sample, image) for sample in range(samples)]
    backend = ModelBackend(model, processor, generation)
    run = None if output_dir is None else EvaluationRun(user_path(output_dir).absolute())

    with ExitStack() as stack:
        if run is None:
            memory = RecordList[Response]()
            sink: RecordSink = memory
        else:
            stack.enter_context(run.lock())
            run.open(plan.identity(dict(backend.identity())))
            plan.write(run)
            sink = RecordLog(run.responses_file, Response)
        started = time.monotonic()
        generate_missing(
            backend,
            requests,
            sink,
            on_done=None if on_done is None else lambda done, total: on_done("generate", done, total),
        )
        wall_seconds = time.monotonic() - started
        if run is None:
            responses = memory.records
        else:
            run.sort_responses([request.key for request in requests])
            run.record_cost(wall_seconds, finished=True)
            wall_seconds = run.read_manifest()["wall_seconds"]
            responses = run.read_responses()
        answers = pair_answers(
            {prompt.id: prompt for prompt in data.prompts},
            responses,
            lambda prompt, response, first_question: Answer(
                prompt, response, first_question=first_question, image_reference=data.image(prompt)
            ),
        )
        on_graded = None if on_done is None else lambda done: on_done("judge", done, len(answers))
        if run is None:
            grades = RecordList[Verdict]()
            grade_missing(grader, answers, grades, on_graded)
            verdicts = grades.records
        else:
            verdicts_file = plan.open_verdicts(run)
            judge_file(grader, answers, verdicts_file, on_graded)
            verdicts = list(read_records(verdicts_file, Verdict))
        by_key = {verdict.key: verdict for verdict in verdicts}
        by_response = {response.key: response for response in responses}
        responses = [by_response[request.key] for request in requests]
        verdicts = [by_key[request.key] for request in requests]
        if metric_configs is None:
            defaults = _default_metrics(data, grader, verdicts)
            plan.metrics.update(_metric_configs(defaults, data, grader, suffix))
        result = EvaluationResult(responses, verdicts, plan.row(responses, verdicts), plan, wall_seconds)
        if run is not None:
            plan.write(run)  # again, with the metrics
            run.write_summary(Summary(rows=[result.row]))
    return result


def _validate_arguments(model: Any, processor: Any, generation: GenerationConfig, samples: int) -> None:
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    if not isinstance(inner, nn.Module) or not hasattr(inner, "generate"):
        raise UserError(
            f"is a {type(model).__name__}. Pass a model of AutoModelForImageTextToText.",
            code="invalid-model",
            field="model",
        )
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "apply_chat_template"):
        raise UserError(
            f"is a {type(processor).__name__}. Pass the model's processor (AutoProcessor).",
            code="invalid-processor",
            field="processor",
        )
    if generation.backend != "hf":
        raise UserError(
            f"the backend {generation.backend} does not run a model in memory. Use `vlm-unlearn evaluate` for it.",
            code="unsupported-setting",
            field="generation.backend",
        )
    if not isinstance(samples, int) or not 1 <= samples <= 1000:
        raise UserError("must be a number from 1 to 1000.", code="invalid-field", field="samples")
    if samples > 1 and generation.temperature == 0:
        raise UserError(
            "all samples of greedy decoding are equal. Set generation.temperature.",
            code="conflicting-settings",
            field="samples",
        )


def _model_name(model: Any) -> str:
    """Returns the last part of the path that a model was loaded from, or the name of its class."""
    inner = get_base_model(model.module if isinstance(model, DistributedDataParallel) else model)
    path = getattr(getattr(inner, "config", None), "_name_or_path", "") or ""
    return Path(str(path)).name or type(inner).__name__


def _resolve_judge(judge: Judge | JudgeConfig | str | Callable[..., Any]) -> tuple[Judge, JudgeConfig]:
    """Returns a judge and its form in a suite."""
    if isinstance(judge, str):
        judge = validate(JudgeConfig, {"name": judge}, "judge")
    if isinstance(judge, JudgeConfig):
        return build_judge(judge), judge
    if isinstance(judge, type) and issubclass(judge, Judge):
        raise UserError(
            f"is the class {judge.__name__}. Pass an object: {judge.__name__}().", code="invalid-judge", field="judge"
        )
    grader = judge if isinstance(judge, Judge) else make_judge(judge)
    return grader, JudgeConfig(name="function", function=grader.name)


def _resolve_attacks(attack: AttackArgument | Sequence[AttackArgument]) -> list[Attack]:
    attacks: Sequence[Any] = attack if isinstance(attack, Sequence) and not isinstance(attack, str) else [attack]
    resolved = []
    for item in attacks:
        config = AttackConfig(name=item) if isinstance(item, str) else item
        if isinstance(config, AttackConfig):
            resolved.append(build_attack(config))
        elif isinstance(config, Attack):
            resolved.append(config)
        elif callable(config) and not isinstance(config, type):
            resolved.append(FunctionAttack(config, {}))
        else:
            raise UserError(f"{config!r} is not an attack.", code="invalid-attack", field="attack")
    return resolved


def _default_metrics(data: PromptSet, judge: Judge, verdicts: Sequence[Verdict]) -> list[Metric]:
    """Returns the default metrics. A judge that can return both labels and scores is taken by its verdicts."""
    has_scores = any(verdict.score is not None for verdict in verdicts)
    has_labels = any(verdict.label is not None for verdict in verdicts)
    labels = judge.labels if has_labels or not has_scores else ()
    return default_metrics(list(data.kinds.values()), labels, has_scores or not judge.labels)


def _metric_configs(
    metrics: Metric | Sequence[Metric], data: PromptSet, judge: Judge, suffix: str
) -> dict[str, MetricConfig]:
    """Returns metrics in the form of a suite, by name.

    Raises:
        UserError: A metric is not an object of `Metric`, two have the same name, no row counts, or the judge cannot
            return the labels or scores.
    """
    configs: dict[str, MetricConfig] = {}
    for metric in [metrics] if isinstance(metrics, Metric) else metrics:
        if not isinstance(metric, Metric):
            raise UserError(
                f"{metric!r} is not a metric. Pass objects, such as ASR().", code="invalid-field", field="metrics"
            )
        missing = [label for label in metric.required_labels if label not in judge.labels]
        if missing:
            raise UserError(
                f"the metric {metric.name} counts the labels {', '.join(missing)}, which the judge {judge.name} cannot "
                "return.",
                code="unsupported-setting",
                field="metrics",
            )
        config = metric.config(data.kinds)
        if config.score is not None and isinstance(judge, FunctionJudge) and not judge.scores:
            raise UserError(
                f"the metric {metric.name} needs scores, and the judge {judge.name} is declared without scores=True.",
                code="unsupported-setting",
                field="metrics",
            )
        if metric.name + suffix in configs:
            raise UserError(
                f"two metrics have the name {metric.name}. Pass name= to one.", code="duplicate-id", field="metrics"
            )
        configs[metric.name + suffix] = config
    return configs
