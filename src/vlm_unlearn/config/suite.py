"""Suites: the questions, judges and metrics of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from vlm_unlearn import plugins
from vlm_unlearn.config.base import PluginName, Positive, Strict
from vlm_unlearn.config.judges import JudgeConfig, check_no_password
from vlm_unlearn.config.splits import SampleConfig, SplitConfig
from vlm_unlearn.errors import UserError, nearest
from vlm_unlearn.records import Label
from vlm_unlearn.store import user_path


def _expand_judge_name(value: Any) -> Any:
    """Expands a judge that is given by its name alone."""
    return {"name": value} if isinstance(value, str) else value


class MetricConfig(Strict):
    """A rate over splits, computed from the labels or the scores (0 to 1) of a judge."""

    renamed_keys: ClassVar[Mapping[str, str]] = {"cases": "splits", "group": "aggregate", "failures": "on_error"}
    renamed_values: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "aggregate": {"any": "any_per_question", "each": "per_response"},
        "on_error": {"left_out": "exclude", "not_counted_as_hits": "count_as_miss"},
    }

    splits: list[str]
    """Splits whose answers count."""
    labels: list[Label] = []
    """Labels that count as hits."""
    score: Literal["mean", "one_minus_mean"] | None = None
    """Use the mean score, or 1 minus the mean score, instead of counting labels."""
    judge: str = ""
    """One of the suite's `judges`. Empty uses the suite's `judge`."""
    aggregate: Literal["any_per_question", "per_response"] = "per_response"
    """`per_response` counts every answer.

    `any_per_question` counts a question once, as a hit if any answer to one of its rewrites or samples has the label.
    """
    on_error: Literal["exclude", "count_as_miss"] = "exclude"
    """Failed answers and verdicts. `count_as_miss` keeps them in the denominator, as published."""

    @model_validator(mode="after")
    def _check_labels_or_score(self) -> MetricConfig:
        if bool(self.labels) == (self.score is not None):
            raise UserError("needs either `labels` or a `score`", code="conflicting-settings")
        if self.score is not None and self.aggregate == "any_per_question":
            raise UserError("`aggregate: any_per_question` needs labels, not a score", code="conflicting-settings")
        return self


class GenerationConfig(Strict):
    """Generation of the model's answers."""

    backend: Annotated[str, PluginName(plugins.BACKENDS)] = "hf"
    """`hf` runs transformers locally, `vllm` runs vLLM locally, and `openai` uses an OpenAI-compatible server.

    Other names are those of plug-ins, and `FILE.py:CLASS` is a class of a file.
    """
    server: str | None = None
    """For `openai`: address of the server. The suite's `model` is the name of the model on it."""
    max_new_tokens: Positive = 256
    """Maximum length of an answer in tokens."""
    batch_size: Positive = 8
    """For `hf`: number of questions per batch."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """For `hf`: precision of the model. `auto` is bf16 on a GPU and fp32 on a CPU."""
    temperature: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Sampling temperature. 0 is greedy decoding."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the most probable tokens whose probabilities sum up to this value."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of sampling. Every answer has its own random stream."""
    image_loader: Literal["viewer", "llava"] = "viewer"
    """`viewer` opens images as image viewers show them. `llava` opens them as LLaVA's own code does."""
    concurrency: Annotated[int, Field(gt=0, le=512)] = 16
    """For `openai`: number of parallel requests."""
    timeout: Annotated[float, Field(ge=0.1, le=3600)] = 300.0
    """For `openai`: timeout of an attempt in seconds."""
    request: dict[str, Any] = {}
    """For `openai`: keys to add to each request. A null removes a key. For a plug-in: any settings."""

    @model_validator(mode="after")
    def _check_server(self) -> GenerationConfig:
        is_built_in = self.backend in plugins.BACKENDS.built_in
        if is_built_in and (self.backend == "openai") != (self.server is not None):
            raise UserError(
                "`backend: openai` needs a `server`, such as http://localhost:8000/v1, and other backends have none",
                code="conflicting-settings",
            )
        check_no_password(self.server)
        return self

    def identity(self, *settings: str) -> dict[str, Any]:
        """Returns the settings that determine a backend's answers. The default image loader is left out.

        Args:
            settings: The names of the settings that the backend uses.
        """
        # Evaluations of earlier versions do not have the key, and stay valid.
        loader = {} if self.image_loader == "viewer" else {"image_loader": self.image_loader}
        return {**self.model_dump(include=set(settings)), **loader}


class ChatConfig(Strict):
    """The settings of ``vlm-unlearn chat``, which have the names that they have in a suite."""

    generation: GenerationConfig = GenerationConfig()
    """Generation of the answers."""
    system_prompt: str | None = None
    """System message of all questions."""


class BenchmarkConfig(Strict):
    """A utility benchmark with its official files. Its metric has the name of the benchmark."""

    name: Annotated[str, PluginName(plugins.BENCHMARKS, files=False)]
    """Name of the benchmark. `vlm-unlearn benchmark list` lists them."""
    annotations: Annotated[list[Path], Field(min_length=1)]
    """The official annotation file. POPE's headline score is the mean over three files."""
    questions: Path | None = None
    """The second official file, if the benchmark has one."""
    images: Path = Path()
    """The image folder."""
    limit: Positive | None = None
    """Use only the first questions, this many, for a quick test."""
    official: bool = False
    """Score exactly as the published evaluator."""
    judge: str = ""
    """One of the suite's `judges`, for a benchmark that a language model scores (`mmvet`, `llava_bench`)."""

    @field_validator("annotations", mode="before")
    @classmethod
    def _expand_single_file(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | Path) else value


class Suite(Strict):
    """An evaluation: the model, its questions, the judges of its answers, and the metrics."""

    renamed_keys: ClassVar[Mapping[str, str]] = {"cases": "splits", "paper": "paper_compat"}

    model: str
    """A model folder, hub name, adapter folder or training run.

    With `generation.backend=openai`, the name of the model on the server.
    """
    root: Path = Path()
    """Folder that the paths below are relative to."""
    splits: list[SplitConfig] = []
    """The sets of prompts."""
    benchmarks: list[BenchmarkConfig] = []
    """Utility benchmarks. Each is a metric with the benchmark's name."""
    system_prompt: str | None = None
    """System message of all questions without one, such as a safety prompt: the cheapest defense to compare with.

    Benchmarks get it too. The model's chat template must support system messages.
    """
    judge: JudgeConfig = JudgeConfig(name="keyword")
    """The judge of all splits, or only its name."""
    judges: dict[str, JudgeConfig] = {}
    """Further judges by name. Each grades the splits of the metrics that name it."""
    metrics: dict[str, MetricConfig] = {}
    """The metrics by name."""
    paper_compat: bool = False
    """Compute `paper_metrics` too: the published counting alongside the corrected one."""
    paper_metrics: dict[str, MetricConfig] = {}
    """The published counting, by the names of the corrected metrics."""
    sample: SampleConfig | None = None
    """A random sample of the questions. Null uses all questions."""
    generation: GenerationConfig = GenerationConfig()
    """Generation of the model's answers."""

    @field_validator("judge", mode="before")
    @classmethod
    def _expand_judge(cls, value: Any) -> Any:
        return _expand_judge_name(value)

    @field_validator("judges", mode="before")
    @classmethod
    def _expand_judges(cls, value: Any) -> Any:
        return {name: _expand_judge_name(judge) for name, judge in value.items()} if isinstance(value, dict) else value

    @field_validator("metrics", "paper_metrics", mode="before")
    @classmethod
    def _drop_null_metrics(cls, value: Any) -> Any:
        return (
            {name: metric for name, metric in value.items() if metric is not None} if isinstance(value, dict) else value
        )

    @model_validator(mode="after")
    def _resolve_paths(self) -> Suite:
        root = user_path(self.root)

        def set_path(config: Strict, field: str) -> None:
            object.__setattr__(config, field, (root / getattr(config, field)).absolute())
            config.model_fields_set.add(field)  # so that it is saved with the suite, also if it is a default

        for split in self.splits:
            set_path(split, "file")
            set_path(split, "images")
            for attack in split.attack:
                attack.resolve_paths(root)
        for benchmark in self.benchmarks:
            object.__setattr__(benchmark, "annotations", [(root / path).absolute() for path in benchmark.annotations])
            set_path(benchmark, "images")
            if benchmark.questions is not None:
                set_path(benchmark, "questions")
        for judge in (self.judge, *self.judges.values()):
            if judge.world is not None:
                set_path(judge, "world")
        object.__setattr__(self, "root", Path())  # the paths are absolute now
        return self

    @model_validator(mode="after")
    def _check_names(self) -> Suite:
        if not self.splits and not self.benchmarks:
            raise UserError("the suite needs `splits` or `benchmarks`", code="missing-setting")
        names = [split.name for split in self.splits]
        sets = names + [benchmark.name for benchmark in self.benchmarks]
        duplicate = next((name for name in sets if sets.count(name) > 1), None)
        if duplicate is not None:
            raise UserError(f'two splits or benchmarks have the name "{duplicate}"', code="duplicate-id")
        if self.generation.temperature == 0 and any(split.samples > 1 for split in self.splits):
            raise UserError(
                "all samples of greedy decoding are equal; set generation.temperature", code="conflicting-settings"
            )
        for metric, config in (*self.metrics.items(), *self.paper_metrics.items()):
            for split in config.splits:
                if split not in names:
                    raise UserError(
                        f'metric "{metric}" names the unknown split "{split}"{nearest(split, names)}',
                        code="unknown-name",
                    )
            if config.judge and config.judge not in self.judges:
                suggestion = nearest(config.judge, self.judges)
                raise UserError(
                    f'metric "{metric}" names the unknown judge "{config.judge}"{suggestion}', code="unknown-name"
                )
        for benchmark in self.benchmarks:
            if benchmark.judge and benchmark.judge not in self.judges:
                suggestion = nearest(benchmark.judge, self.judges)
                raise UserError(
                    f'benchmark "{benchmark.name}" names the unknown judge "{benchmark.judge}"{suggestion}',
                    code="unknown-name",
                )
        return self

    def active_metrics(self) -> list[MetricConfig]:
        """Returns the metrics to compute. Those of `paper_metrics` are included with `paper_compat` only."""
        return [*self.metrics.values(), *(self.paper_metrics.values() if self.paper_compat else ())]

    def judge_config(self, name: str) -> JudgeConfig:
        """Returns the judge that metrics refer to by a name. ``""`` is the suite's `judge`.

        If both are `llm`, the judge inherits the keys that it does not set from the suite's `judge`.
        """
        default = self.judge
        if not name:
            return default
        judge = self.judges[name]
        if {judge.name, default.name} != {"llm"}:
            return judge
        not_inherited = {"name", "rubric", "paper_compat", "world"} | judge.model_fields_set
        fields = default.model_fields_set - not_inherited
        return judge.model_copy(update={field: getattr(default, field) for field in fields})
