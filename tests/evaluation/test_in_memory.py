"""evaluate() on objects in memory: rates, the state of the model, run folders, resuming, and hostile answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

from helpers import raises_code, run_in_process
from vlm_unlearn.config import GenerationConfig, JudgeConfig, load
from vlm_unlearn.config import Suite as SuiteConfig
from vlm_unlearn.data.dataset import UnlearningDataset
from vlm_unlearn.data.encoding import Turn, render
from vlm_unlearn.errors import UserError
from vlm_unlearn.evaluation import EvaluationResult, evaluate
from vlm_unlearn.evaluation.prompts import suite_prompts
from vlm_unlearn.evaluation.runner import evaluate_run
from vlm_unlearn.generation.hf import ModelBackend, weights_digest
from vlm_unlearn.judging import Judgment, judge
from vlm_unlearn.judging.keyword import KeywordJudge
from vlm_unlearn.metrics import ASR, DegenerateRate, LabelRate, MeanScore, RefusalRate
from vlm_unlearn.modeling.loader import load_model, load_processor
from vlm_unlearn.records import Prompt, Summary
from vlm_unlearn.store import read_json, read_records

SHORT = GenerationConfig(max_new_tokens=6, batch_size=4)
ROWS = [
    {"question": "what is this ?", "image": Image.new("RGB", (16, 16), (200, 10, 10)), "kind": "unsafe"},
    {"question": "what is it ?", "kind": "unsafe", "category": "tools"},
    {"question": "what is this ?", "kind": "safe", "reference": "a kite"},
]
ROWS_WITH_ANSWERS = [{"question": "what is it ?", "answer": "a kite"}]
Loaded = tuple[Any, Any]


@judge(labels=("complied", "refused"))
def by_words(question: str, answer: str) -> str:
    return "complied" if question == "what is this ?" else "refused"


@pytest.fixture
def loaded(tiny_model: Path) -> Loaded:
    return load_model(tiny_model, "fp32").eval(), load_processor(tiny_model)


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes models give certain answers, in turn."""

    def answer(*texts: str, finish_reason: str = "stop") -> None:
        def generate(model: Any, processor: Any, turns: Any, *_: Any) -> list[tuple[str, str]]:
            return [(texts[index % len(texts)], finish_reason) for index in range(len(turns))]

        monkeypatch.setattr("vlm_unlearn.generation.hf.generate_texts", generate)

    return answer


def test_evaluate_returns_rates_answers_and_verdicts(loaded: Loaded) -> None:
    result = evaluate(*loaded, ROWS, judge=by_words, generation=SHORT, name="tiny")
    assert {name: (rate.value, rate.n, rate.failed) for name, rate in result.metrics.items()} == {
        "asr": (0.5, 2, 0),
        "refusal_rate": (0.0, 1, 0),
        "degenerate_rate": (0.0, 3, 0),
    }
    assert [prompt.kind for prompt in result.prompts] == ["unsafe", "unsafe", "safe"]
    assert [verdict.label for verdict in result.verdicts] == ["complied", "refused", "complied"]
    assert result.row.categories["asr"]["tools"].value == 0.0
    frame = result.to_pandas()
    assert list(frame["id"]) == ["0", "1", "2"]
    assert list(frame["answer"]) == [response.text for response in result.responses]
    assert {"question", "reference", "label", "score", "error", "explanation"} <= set(frame.columns)
    assert "asr" in repr(result)


def test_evaluate_puts_earlier_rounds_into_the_chat(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model gets the text that it would be trained on, and the saved prompts are the same conversation."""
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this ?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a kite"}]},
        {"role": "user", "content": [{"type": "text", "text": "what colour ?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    ]
    row = {"messages": chat, "images": [ROWS[0]["image"]]}
    example = UnlearningDataset.from_datasets({"forget": [row], "retain": ROWS_WITH_ANSWERS})["forget"][0]
    texts: list[str] = []

    def generate(model: Any, processor: Any, turns: Any, *_: Any) -> list[tuple[str, str]]:
        texts.extend(render(processor, turn).text for turn in turns)
        return [("red", "stop")] * len(turns)

    monkeypatch.setattr("vlm_unlearn.generation.hf.generate_texts", generate)
    result = evaluate(*loaded, [row, ROWS[0]], judge=by_words, generation=SHORT)
    trained = render(loaded[1], Turn.of_example(example, Path("image.png")))
    assert trained.before_answer[-1] in texts
    assert result.prompts[0].reference == "red"
    result.save(tmp_path / "run")
    saved = list(read_records(tmp_path / "run" / "prompts.jsonl", Prompt))
    assert saved == result.prompts
    assert [len(prompt.history) for prompt in saved] == [1, 0]
    assert "history" not in (tmp_path / "run" / "prompts.jsonl").read_text().splitlines()[1]


def test_evaluate_writes_nothing(loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("VLM_UNLEARN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    evaluate(*loaded, ROWS, judge=by_words, generation=SHORT)
    assert [path.name for path in tmp_path.rglob("*")] == ["work"]


def test_images_in_memory_give_the_answers_of_files(loaded: Loaded, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    for number in range(3):
        path = tmp_path / f"{number}.png"
        Image.effect_noise((20, 20), 90).convert("RGB").save(path)
        rows += [{"question": "what is this ?", "image": form} for form in (path, path.read_bytes(), Image.open(path))]
    texts = [response.text for response in evaluate(*loaded, rows, judge=by_words, generation=SHORT).responses]
    assert texts == [texts[3 * (index // 3)] for index in range(9)]


@pytest.mark.parametrize("wrap", ["plain", "peft", "checkpointing"])
def test_evaluate_restores_the_model(loaded: Loaded, wrap: str) -> None:
    model, processor = loaded
    expected = [response.text for response in evaluate(*loaded, ROWS, judge=by_words, generation=SHORT).responses]
    if wrap == "peft":
        config = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5)  # starts as the base model
        model = get_peft_model(model, config)
    elif wrap == "checkpointing":
        model.gradient_checkpointing_enable()
        model.config.use_cache = model.config.get_text_config().use_cache = False
    model.train()
    frozen = next(module for name, module in model.named_modules() if name.endswith("vision_tower"))
    frozen.eval()
    modes = [module.training for module in model.modules()]
    state = weights_digest(model, processor), str(model.config)
    result = evaluate(model, processor, ROWS, judge=by_words, generation=SHORT)
    assert [response.text for response in result.responses] == expected
    assert [module.training for module in model.modules()] == modes
    assert (weights_digest(model, processor), str(model.config)) == state
    assert all(parameter.grad is None for parameter in model.parameters())


def test_evaluate_restores_the_model_after_an_error(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = loaded
    model.train()

    def fail(*args: object) -> None:
        assert not model.training
        raise UserError("no answer", code="test-error")

    monkeypatch.setattr("vlm_unlearn.generation.hf.generate_batch", fail)
    with raises_code("test-error"):
        evaluate(model, processor, [{"question": "what ?"}], judge=by_words, generation=SHORT)
    assert model.training


def test_evaluate_takes_a_ddp_model(loaded: Loaded, tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = torch.nn.parallel.DistributedDataParallel(loaded[0])
        assert evaluate(model, loaded[1], ROWS, judge=by_words, generation=SHORT).metrics["asr"].value == 0.5
    finally:
        torch.distributed.destroy_process_group()


def test_weights_digest_covers_weights_and_adapters(loaded: Loaded) -> None:
    model, processor = loaded
    digests = {weights_digest(model, processor)}
    with torch.no_grad():
        model.get_output_embeddings().weight[0, 0] += 1e-3
    digests.add(weights_digest(model, processor))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    digests.add(weights_digest(adapted, processor))
    with adapted.disable_adapter():
        digests.add(weights_digest(adapted, processor))
    assert len(digests) == 4


def test_default_metrics_depend_on_kinds_and_labels(loaded: Loaded, answering: Callable[..., None]) -> None:
    answering("So it is.")
    rows = [*ROWS, {"question": "how ?", "kind": "safe_image_unsafe_question"}]

    def names(judge: Any, rows: list[dict[str, Any]] = rows) -> list[str]:
        return list(evaluate(*loaded, rows, judge=judge).metrics)

    assert names(by_words) == ["asr", "refusal_rate", "degenerate_rate", "refusal_rate_safe_image"]
    assert names(by_words, rows[:1]) == ["asr", "degenerate_rate"]
    assert names("keyword", rows[2:3]) == ["refusal_rate", "degenerate_rate"]
    assert names(lambda question, answer: 0.5, rows[:1]) == ["mean_score"]
    kinds = ["mean_score_unsafe", "mean_score_safe", "mean_score_safe_image_unsafe_question"]
    assert names(judge(scores=True)(lambda question, answer: 0.5)) == kinds
    assert names(lambda question, answer: "off_topic") == ["asr", "refusal_rate", "sarr", "degenerate_rate"]
    assert names(JudgeConfig(name="keyword", paper_compat=True), rows[:1]) == ["asr"]
    assert names(KeywordJudge(), rows[:1]) == ["asr", "degenerate_rate"]


def test_metrics_are_objects(loaded: Loaded, answering: Callable[..., None]) -> None:
    answering("So it is.")
    rows = [{"question": f"how {number} ?", "group_id": number // 2} for number in range(4)]
    grades = iter(["complied", "refused", "refused", None])
    metrics = [
        ASR(),
        LabelRate(("refused",), kind="unsafe", on_error="count_as_miss", name="refused"),
        LabelRate("refused", name="refused_only"),
    ]
    grader = judge(labels=("complied", "refused"))(lambda question, answer: next(grades))
    rates = evaluate(*loaded, rows, judge=grader, metrics=metrics).metrics
    assert {name: (rate.value, rate.n, rate.failed) for name, rate in rates.items()} == {
        "asr": (1.0, 1, 1),  # the question with a failed verdict is left out
        "refused": (0.5, 4, 1),
        "refused_only": (pytest.approx(2 / 3), 3, 1),
    }
    assert list(evaluate(*loaded, rows, judge="keyword", metrics=ASR()).metrics) == ["asr"]


@pytest.mark.parametrize(
    ("metrics", "code"),
    [
        ([RefusalRate()], "no-records"),
        ([MeanScore()], "unsupported-setting"),
        ([LabelRate(("off_topic",))], "unsupported-setting"),
        ([ASR(), ASR()], "duplicate-id"),
        (["asr"], "invalid-field"),
        ([ASR], "invalid-field"),
    ],
)
def test_metrics_that_cannot_be_measured_are_errors(loaded: Loaded, metrics: Any, code: str) -> None:
    with raises_code(code, field="metrics"):
        evaluate(*loaded, ROWS[:2], judge=by_words, metrics=metrics)


def test_invalid_labels_of_metrics_are_errors() -> None:
    for labels, code in ((("harmful",), "unknown-name"), ((), "missing-setting")):
        with raises_code(code, field="labels"):
            LabelRate(labels)  # type: ignore[arg-type]


def test_attacked_metrics_have_names_of_their_own(loaded: Loaded, answering: Callable[..., None]) -> None:
    answering("So it is.", "I'm sorry, I can't.")

    def rewrite(prompts: list[Prompt]) -> Iterator[Prompt]:
        for prompt in prompts:
            for word in ("Share", "What"):
                yield prompt.model_copy(update={"id": f"{prompt.id}/{word}", "question": f"{word} {prompt.question}"})

    result = evaluate(*loaded, ROWS[1:2], judge="keyword", attack=rewrite)
    assert result.metrics["asr_attacked"].value == 1.0  # one of the two rewrites
    assert result.metrics["asr_attacked"].n == 1
    assert [prompt.question for prompt in result.prompts] == ["Share what is it ?", "What what is it ?"]
    assert [rate.value for rate in result.row.rewrites["asr_attacked"]] == [1.0, 1.0]


def test_samples_need_a_temperature(loaded: Loaded) -> None:
    with raises_code("conflicting-settings", field="samples"):
        evaluate(*loaded, ROWS, judge=by_words, samples=2)
    sampling = SHORT.model_copy(update={"temperature": 1.0})
    result = evaluate(*loaded, ROWS, judge=by_words, generation=sampling, samples=3)
    assert [response.key for response in result.responses] == [
        (str(id), sample) for id in range(3) for sample in range(3)
    ]
    assert result.metrics["asr"].n == 2


def test_failures_are_counted_and_never_safe(loaded: Loaded, answering: Callable[..., None]) -> None:
    answering("So it is.", finish_reason="length")

    @judge(labels=("complied", "refused"))
    def breaks(question: str, answer: str) -> str:
        if question == "what is it ?":
            raise RuntimeError("<b>boom</b>")
        return "complied"

    result = evaluate(*loaded, ROWS[:2], judge=breaks)
    asr = result.metrics["asr"]
    assert (asr.value, asr.n, asr.failed) == (1.0, 1, 1)
    assert list(result.to_pandas()["error"].isna()) == [True, False]
    assert len(result.notes) == 2  # truncated answers, failed verdicts
    nothing = evaluate(*loaded, ROWS[:2], judge=judge(labels=("refused", "complied"))(lambda question, answer: None))
    assert (nothing.metrics["asr"].value, nothing.metrics["asr"].failed) == (None, 2)
    assert "no value" in repr(nothing)


def test_empty_answers_are_degenerate_or_failed(loaded: Loaded, answering: Callable[..., None]) -> None:
    answering("")
    safe = judge(labels=("complied", "refused"))(lambda question, answer: "refused")
    result = evaluate(*loaded, ROWS[2:], judge=safe)
    assert (result.metrics["refusal_rate"].value, result.metrics["degenerate_rate"].value) == (0.0, 1.0)
    harm = evaluate(*loaded, ROWS[:2], judge=judge(scores=True)(lambda question, answer: 0.0))
    assert (harm.metrics["mean_score"].value, harm.metrics["mean_score"].failed) == (None, 2)


def test_results_escape_html(loaded: Loaded, answering: Callable[..., None]) -> None:
    answering("<script>alert(1)</script> it is.")
    grader = judge(labels=("refused",))(lambda question, answer: f"<i>{answer}")
    html = evaluate(*loaded, ROWS[:1], judge=grader, metrics=[DegenerateRate(name="<b>x")], name="<u>m")._repr_html_()
    assert not any(tag in html for tag in ("<script", "<b>x", "<u>m", "<i>"))
    assert "&lt;u&gt;m" in html


@pytest.mark.parametrize(
    ("arguments", "code", "field"),
    [
        ({"model": "runs/npo"}, "invalid-model", "model"),
        ({"model": torch.nn.Linear(1, 1)}, "invalid-model", "model"),
        ({"processor": object()}, "invalid-processor", "processor"),
        ({"generation": GenerationConfig(backend="vllm")}, "unsupported-setting", "generation.backend"),
        ({"samples": 0}, "invalid-field", "samples"),
        ({"judge": KeywordJudge}, "invalid-judge", "judge"),
        ({"judge": 3}, "invalid-judge", "judge"),
        ({"dataset": "test.csv"}, "invalid-field", "dataset"),
    ],
)
def test_invalid_arguments_are_errors(loaded: Loaded, arguments: Any, code: str, field: str) -> None:
    valid = {"model": loaded[0], "processor": loaded[1], "dataset": ROWS, "judge": by_words}
    with raises_code(code, field=field):
        evaluate(**{**valid, **arguments})


def test_unknown_judges_are_errors(loaded: Loaded) -> None:
    for name in ("keywrod", "llm", "function"):
        with pytest.raises(ValueError, match="judge"):
            evaluate(*loaded, ROWS, judge=name)


def test_saved_results_work_with_the_commands(
    loaded: Loaded, tiny_model: Path, tmp_path: Path, empty_plots: None
) -> None:
    first = evaluate(*loaded, ROWS, judge=by_words, generation=SHORT, name="first").save(tmp_path / "first")
    (loaded[0].get_output_embeddings().weight.data).mul_(-1)
    second = evaluate(*loaded, ROWS, judge=by_words, generation=SHORT, name="second")
    second.save(tmp_path / "second")
    files = {path.name: path.read_bytes() for path in (tmp_path / "second").iterdir() if path.is_file()}
    second.save(tmp_path / "second")  # again
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "second").iterdir() if path.is_file()}
    with raises_code("run-mismatch"):
        second.save(first)
    assert Summary.model_validate(read_json(first / "summary.json")).rows[0].model == "first"
    for command in (
        ["compare", first, tmp_path / "second"],
        ["report", first, tmp_path / "second", "--out", tmp_path / "report"],
        ["score", first],
        ["judge", "run", first, "name=keyword"],
    ):
        done = run_in_process(*command)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "report" / "report.html").is_file()
    # The saved suite evaluates another model on the same prompts and images.
    suite = load(SuiteConfig, first / "suite.json", [f"model={tiny_model}", "judge=keyword"])
    assert [prompt.image for prompt in suite_prompts(suite)] == [prompt.image for prompt in second.prompts]
    row = evaluate_run(suite, tmp_path / "again", "again")
    assert row.metrics["asr"].n == 2
    answers = [json.loads(line)["text"] for line in (first / "responses.jsonl").read_text().splitlines()]
    assert answers == [
        json.loads(line)["text"] for line in (tmp_path / "again/responses.jsonl").read_text().splitlines()
    ]


class KilledError(Exception):
    pass


def run_interrupted(loaded: Loaded, folder: Path, monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
    """Starts an evaluation and ends it after some batches."""
    with monkeypatch.context() as patch:
        original, count = ModelBackend.run, 0

        def run(backend: ModelBackend, batch_list: Any, on_responses: Any) -> None:
            def stop(responses: Any) -> None:
                nonlocal count
                on_responses(responses)
                count += 1
                if count == batches:
                    raise KilledError

            original(backend, batch_list, stop)

        patch.setattr(ModelBackend, "run", run)
        with pytest.raises(KilledError):
            evaluate(*loaded, ROWS, judge=by_words, generation=ONE_BY_ONE, output_dir=folder)


ONE_BY_ONE = SHORT.model_copy(update={"batch_size": 1})


def test_output_dir_resumes(loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = evaluate(*loaded, ROWS, judge=by_words, generation=ONE_BY_ONE)
    run_interrupted(loaded, tmp_path / "run", monkeypatch, 2)
    assert len((tmp_path / "run" / "responses.jsonl").read_text().splitlines()) == 2
    generated: list[int] = []

    def resume() -> EvaluationResult:
        return evaluate(
            *loaded,
            ROWS,
            judge=by_words,
            generation=ONE_BY_ONE,
            output_dir=tmp_path / "run",
            on_done=lambda stage, done, total: generated.append(total) if stage == "generate" else None,
        )

    result = resume()
    assert generated == [1]
    assert (result.responses, result.verdicts, result.row) == (expected.responses, expected.verdicts, expected.row)
    files = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.suffix == ".jsonl"}
    assert resume().row == expected.row
    assert generated == [1]
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.suffix == ".jsonl"}


def test_output_dir_of_another_evaluation_is_an_error(loaded: Loaded, tmp_path: Path) -> None:
    evaluate(*loaded, ROWS, judge=by_words, generation=SHORT, output_dir=tmp_path / "run")
    with raises_code("run-mismatch"):
        evaluate(*loaded, ROWS[:2], judge=by_words, generation=SHORT, output_dir=tmp_path / "run")
    with torch.no_grad():
        loaded[0].get_output_embeddings().weight[0, 0] += 1e-3
    with raises_code("run-mismatch"):
        evaluate(*loaded, ROWS, judge=by_words, generation=SHORT, output_dir=tmp_path / "run")


def test_output_dir_reuses_verdicts_of_the_same_judge_only(loaded: Loaded, tmp_path: Path) -> None:
    calls: list[str] = []

    def grade(source: str, version: str | None = None) -> None:
        names: dict[str, Any] = {"calls": calls, "Judgment": Judgment}
        exec(source, names)
        grader = judge(labels=("complied", "refused"), version=version)(names["f"])
        evaluate(*loaded, ROWS, judge=grader, generation=SHORT, output_dir=tmp_path / "run")

    source = "def f(question, answer):\n    calls.append(question)\n    return Judgment('refused')\n"
    for version, count in (("1", 3), ("1", 3), ("2", 6), (None, 9), (None, 12)):  # no source: never reused
        grade(source, version)
        assert len(calls) == count
    assert (tmp_path / "run" / "before-verdicts-f.jsonl").is_file()
