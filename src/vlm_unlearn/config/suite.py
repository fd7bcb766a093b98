"""Suites: what to measure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from vlm_unlearn.config.base import Positive, Strict
from vlm_unlearn.errors import nearest
from vlm_unlearn.records import Kind, Label
from vlm_unlearn.store import user_path


class RewriteConfig(Strict):
    """The one-word attack by rules: every question becomes `num_rewrites` questions that start with `trigger`.

    `control` are paraphrases that start with neither trigger: what they change is not the trigger's doing.
    """

    renamed_keys: ClassVar[Mapping[str, str]] = {"shots": "num_rewrites"}

    trigger: Literal["what", "share", "control"]
    """The first word; `control`: neither of the two."""
    num_rewrites: Annotated[int, Field(gt=0, le=5)] = 1
    """Different rewrites of each question."""


class SplitConfig(Strict):
    """One set of prompts. Rows of a file with the same id are shots of one question, as in the published attack files."""

    name: str
    """What metrics call it."""
    format: Literal["vlguard", "safe_eraser", "table"]
    """The file's format; `table`: CSV, TSV, JSON lines, parquet with the columns question, answer and set (docs/your-own-data.md)."""
    file: Path
    """The file with the questions."""
    images: Path
    """The folder that the file's image paths are relative to."""
    kind: Kind
    """Which of the file's questions; of a table the sets forget, retain and decouple, in this order: unsafe, safe and the third."""
    rewrite: RewriteConfig | None = None
    """Attack them; null: as they are."""
    samples: Annotated[int, Field(gt=0, le=1000)] = 1
    """Answers to each prompt; more than one needs generation.temperature."""


class SampleConfig(Strict):
    """Asks a seeded part of each case: whole question groups, or `num_rows` as published, which tears a question's shots apart."""

    renamed_keys: ClassVar[Mapping[str, str]] = {"groups": "num_questions", "rows": "num_rows"}

    num_questions: Positive | None = None
    """Question groups a case."""
    num_rows: Positive | None = None
    """Rows a case, as published."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of the draw."""

    @model_validator(mode="after")
    def _one(self) -> SampleConfig:
        if (self.num_questions is None) == (self.num_rows is None):
            raise ValueError("say how many: `num_questions` (or `num_rows`, as published)")
        return self


class JudgeConfig(Strict):
    """Who grades. `llm` asks a language model by a rubric; what one of a suite's `judges` leaves open it takes from the suite's `judge`."""

    renamed_keys: ClassVar[Mapping[str, str]] = {"paper": "paper_compat"}

    name: Literal["keyword", "tiny_world", "llm", "rouge_l"]
    """`keyword` sees refusals, `llm` reads, `rouge_l` compares with references, `tiny_world` knows the demo's facts."""
    paper_compat: bool = False
    """The published counting: of keyword, of rouge_l, and of llm's rubrics after the two papers."""
    world: Path | None = None
    """For `tiny_world`: the file with the world's facts."""
    rubric: str | None = None
    """For `llm`: a shipped rubric's name or a file (`vlm-unlearn judge rubrics` lists them)."""
    model: str | None = None
    """For `llm`: the server's model; without a server, a model folder or hub name to run here."""
    server: str | None = None
    """For `llm`: address of an OpenAI-compatible server, as http://localhost:8000/v1; its key: OPENAI_API_KEY."""
    images: bool = True
    """For `llm`: whether the judge sees the image, where the rubric asks for it."""
    max_tokens: Positive = 256
    """For `llm`: the longest reply."""
    concurrency: Annotated[int, Field(gt=0, le=512)] = 16
    """For `llm` on a server: questions under way at once."""
    timeout: Annotated[float, Field(ge=0.1, le=3600)] = 60.0
    """For `llm` on a server: seconds for one try."""
    retries: Annotated[int, Field(ge=0, le=100)] = 4
    """For `llm` on a server: tries after the first."""
    request: dict[str, Any] = {}
    """For `llm` on a server: keys to add to what is sent, or with null to leave out."""
    batch_size: Positive = 8
    """For `llm` without a server: questions a batch."""
    cache: bool = True
    """For `llm`: take replies that the same model gave to the same question before."""
    revision: str = ""
    """For `llm` on a server: a name for what it runs now; another one is asked anew, whatever the cache holds."""
    input_price: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """For `llm`: of a million tokens asked, in your currency, to show the cost."""
    output_price: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """For `llm`: of a million tokens replied."""

    @model_validator(mode="after")
    def _whole(self) -> JudgeConfig:
        if (self.name == "llm") != (self.rubric is not None):
            raise ValueError("`rubric` goes with the judge llm, and llm needs one, such as four_labels")
        if self.name != "llm" and (self.model is not None or self.server is not None):
            raise ValueError(f"`model` and `server` are for the judge llm; {self.name} asks nobody")
        if self.rubric is not None and ("/" in self.rubric or self.rubric.endswith(".txt")):
            object.__setattr__(self, "rubric", str(user_path(self.rubric).absolute()))
        _no_secret_in(self.server)
        return self

    @property
    def judge_id(self) -> str:
        """Names its verdicts, in files and tables: ``keyword``, ``four_labels@Qwen--Qwen2.5-VL-7B-Instruct``."""
        paper = "-paper" if self.paper_compat else ""
        if self.rubric is None:
            return f"{self.name}{paper}"
        rubric = _file_name(Path(self.rubric).stem if "/" in self.rubric else self.rubric)
        who = "--".join((self.model or "nobody").rstrip("/").split("/")[-2:])
        return f"{rubric}{paper}{'' if self.images else '-blind'}@{_file_name(who)}"

    def fingerprint_fields(self) -> dict[str, Any]:
        """What decides its verdicts, as far as a config can tell."""
        same = {"concurrency", "timeout", "retries", "batch_size", "cache", "input_price", "output_price", "world"}
        return self.model_dump(mode="json", exclude=same)


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", text)[-60:]


def _no_secret_in(server: str | None) -> None:
    if server is not None and "@" in server.partition("://")[2].partition("/")[0]:
        raise ValueError(
            "a server's address holds no user and password, which would stand in files; the key goes into OPENAI_API_KEY"
        )


def _judge_from(value: Any) -> Any:
    """A judge as a suite may write it: its name alone will do."""
    return {"name": value} if isinstance(value, str) else value


class MetricConfig(Strict):
    """A rate over cases, out of a judge's labels or its scores (0 to 1)."""

    renamed_keys: ClassVar[Mapping[str, str]] = {"cases": "splits", "group": "aggregate", "failures": "on_error"}
    renamed_values: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "aggregate": {"any": "any_per_question", "each": "per_response"},
        "on_error": {"left_out": "exclude", "not_counted_as_hits": "count_as_miss"},
    }

    splits: list[str]
    """The cases whose answers it counts."""
    labels: list[Label] = []
    """The labels that count."""
    score: Literal["mean", "one_minus_mean"] | None = None
    """Instead of labels: the mean score, or what is missing to 1."""
    judge: str = ""
    """One of the suite's `judges`; empty: its `judge`."""
    aggregate: Literal["any_per_question", "per_response"] = "per_response"
    """`any_per_question`: a question counts once, as soon as one of its shots or samples has the label; `per_response`: every answer counts."""
    on_error: Literal["exclude", "count_as_miss"] = "exclude"
    """Answers and verdicts that failed; `count_as_miss` keeps them in the denominator, as published."""

    @model_validator(mode="after")
    def _one_kind(self) -> MetricConfig:
        if bool(self.labels) == (self.score is not None):
            raise ValueError("counts either `labels` or a `score`")
        if self.score is not None and self.aggregate == "any_per_question":
            raise ValueError("`aggregate: any_per_question` is for labels")
        return self


class GenerationConfig(Strict):
    """How the model answers. Temperature 0 is greedy decoding."""

    backend: Literal["hf", "openai", "vllm"] = "hf"
    """Who answers: transformers here, any OpenAI-compatible server, or vLLM here."""
    server: str | None = None
    """For `openai`: its address; the suite's `model` is the name it serves."""
    max_new_tokens: Positive = 256
    """The longest answer, in tokens."""
    batch_size: Positive = 8
    """For `hf`: questions a batch."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """For `hf`; `auto`: bf16 on a GPU, fp32 on a CPU."""
    temperature: Annotated[float, Field(ge=0, le=100)] = 0.0
    """0: greedy decoding; above: answers are drawn."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draws from the likeliest tokens that hold this share of the probability."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of sampling; every answer has a stream of its own."""
    concurrency: Annotated[int, Field(gt=0, le=512)] = 16
    """For `openai`: questions under way at once."""
    timeout: Annotated[float, Field(ge=0.1, le=3600)] = 300.0
    """For `openai`: seconds for one try."""
    request: dict[str, Any] = {}
    """For `openai`: keys to add to what is sent, or with null to leave out."""

    @model_validator(mode="after")
    def _server(self) -> GenerationConfig:
        if (self.backend == "openai") != (self.server is not None):
            raise ValueError("`server` goes with `backend: openai`, which needs one, such as http://localhost:8000/v1")
        _no_secret_in(self.server)
        return self


class BenchmarkConfig(Strict):
    """A utility benchmark from its official files; its metric has its name."""

    name: str
    """The benchmark; `vlm-unlearn benchmark list` names them."""
    annotations: Annotated[list[Path], Field(min_length=1)]
    """Its official annotation file; POPE's headline is the mean of three."""
    questions: Path | None = None
    """The second official file, where it has one."""
    images: Path = Path()
    """Its image folder."""
    limit: Positive | None = None
    """The first so many questions, to try it out."""
    official: bool = False
    """Count exactly as the published evaluator."""
    judge: str = ""
    """Of one that a language model scores (`mmvet`): one of the suite's `judges`."""

    @field_validator("annotations", mode="before")
    @classmethod
    def _one_file(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | Path) else value


class Suite(Strict):
    """What to measure on a model."""

    renamed_keys: ClassVar[Mapping[str, str]] = {"cases": "splits", "paper": "paper_compat"}

    model: str
    """A model folder, hub name, adapter folder or training run; a server's model with generation.backend=openai."""
    root: Path = Path()
    """What the paths below are relative to."""
    splits: list[SplitConfig] = []
    """The sets of questions."""
    benchmarks: list[BenchmarkConfig] = []
    """Utility benchmarks, each a metric of its name."""
    judge: JudgeConfig = JudgeConfig(name="keyword")
    """Grades every case; its name alone will do."""
    judges: dict[str, JudgeConfig] = {}
    """Further judges, by the names that metrics call them; each grades the cases of its metrics."""
    metrics: dict[str, MetricConfig] = {}
    """The rates, by name."""
    paper_compat: bool = False
    """Measure `paper_metrics` too: the published counting beside the corrected one."""
    paper_metrics: dict[str, MetricConfig] = {}
    """The published counting, by the names of the metrics it stands beside."""
    sample: SampleConfig | None = None
    """Asks a seeded part only; null: everything."""
    generation: GenerationConfig = GenerationConfig()
    """How the model answers."""

    @field_validator("judge", mode="before")
    @classmethod
    def _short_judge(cls, value: Any) -> Any:
        return _judge_from(value)

    @field_validator("judges", mode="before")
    @classmethod
    def _short_judges(cls, value: Any) -> Any:
        return {name: _judge_from(judge) for name, judge in value.items()} if isinstance(value, dict) else value

    @field_validator("metrics", "paper_metrics", mode="before")
    @classmethod
    def _without_those_left_out(cls, value: Any) -> Any:
        return (
            {name: metric for name, metric in value.items() if metric is not None} if isinstance(value, dict) else value
        )

    @model_validator(mode="after")
    def _paths_below_root(self) -> Suite:
        root = user_path(self.root)

        def set_path(owner: Strict, field: str) -> None:
            object.__setattr__(owner, field, (root / getattr(owner, field)).absolute())
            owner.model_fields_set.add(field)  # written with the suite, whoever set it

        for case in self.splits:
            set_path(case, "file")
            set_path(case, "images")
        for benchmark in self.benchmarks:
            object.__setattr__(benchmark, "annotations", [(root / path).absolute() for path in benchmark.annotations])
            set_path(benchmark, "images")
            if benchmark.questions is not None:
                set_path(benchmark, "questions")
        for judge in (self.judge, *self.judges.values()):
            if judge.world is not None:
                set_path(judge, "world")
        object.__setattr__(self, "root", Path())  # resolved, once
        return self

    @model_validator(mode="after")
    def _whole(self) -> Suite:
        if not self.splits and not self.benchmarks:
            raise ValueError("measures nothing; it needs cases or benchmarks")
        names = [case.name for case in self.splits]
        sets = names + [benchmark.name for benchmark in self.benchmarks]
        twice = next((name for name in sets if sets.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f'two cases or benchmarks have the name "{twice}"')
        if self.generation.temperature == 0 and any(case.samples > 1 for case in self.splits):
            raise ValueError("several samples of a greedy answer are all the same; set generation.temperature")
        for metric, config in (*self.metrics.items(), *self.paper_metrics.items()):
            for case in config.splits:
                if case not in names:
                    raise ValueError(
                        f'metric "{metric}" names the case "{case}", which is not there{nearest(case, names)}'
                    )
            if config.judge and config.judge not in self.judges:
                raise ValueError(
                    f'metric "{metric}" names the judge "{config.judge}"{nearest(config.judge, self.judges)}'
                )
        for benchmark in self.benchmarks:
            if benchmark.judge and benchmark.judge not in self.judges:
                raise ValueError(
                    f'benchmark "{benchmark.name}" names the judge "{benchmark.judge}"{nearest(benchmark.judge, self.judges)}'
                )
        return self

    def active_metrics(self) -> list[MetricConfig]:
        """The metrics that are asked for: the published counting's with `paper_compat` only."""
        return [*self.metrics.values(), *(self.paper_metrics.values() if self.paper_compat else ())]

    def judge_config(self, name: str) -> JudgeConfig:
        """The judge that metrics call by a name; `""` is the suite's own.

        One that asks a language model takes what it leaves open from the suite's own, if that does too.
        """
        own = self.judge
        if not name:
            return own
        judge = self.judges[name]
        if {judge.name, own.name} != {"llm"}:
            return judge
        kept = {"name", "rubric", "paper_compat", "world"} | judge.model_fields_set
        return judge.model_copy(update={field: getattr(own, field) for field in own.model_fields_set - kept})
