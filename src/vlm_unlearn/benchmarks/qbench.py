"""Q-Bench's LLVisionQA (Wu et al. 2023, arXiv 2309.14181): multiple choice about low-level properties of images.

`qbench_zh` is the same in Chinese.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from vlm_unlearn.benchmarks.base import Benchmark, BenchmarkQuestion, QuestionScore, register
from vlm_unlearn.benchmarks.official_files import entries, entries_by_id, record, require_answers, text_list
from vlm_unlearn.metrics.option_reading import read_option
from vlm_unlearn.store import read_json

TYPES = ("yes-or-no", "what", "how")
CONCERNS = ("distortion", "other", "in-context distortion", "in-context other")


@register(
    "qbench",
    "llvisionqa_dev.json of the LLVisionQA-QBench download; llvisionqa_test.json has no answers",
    "the download's images_llvisionqa/, under the names in the file",
)
class QBench(Benchmark):
    """Share of questions with the right option, over all questions, by question type and by concern.

    The evaluation scripts of Q-Bench's authors, which `official` follows, take an answer as right if the letter of the
    right option is anywhere in it. A question's id is the name of its image.
    """

    instruction: ClassVar[str] = "Choose between one of the options as follows:"

    def read_questions(
        self, annotations: Path, questions: Path | None, limit: int | None = None
    ) -> list[BenchmarkQuestion]:
        benchmark_questions = []
        for id, truth in list(_read_entries(annotations).items())[:limit]:
            options = (f"{letter}. {text}" for letter, text in truth["options"].items())
            text = "\n".join((truth["question"], self.instruction, *options))
            benchmark_questions.append(BenchmarkQuestion(id, text, id, id, truth["answer"], truth["subsets"][0]))
        return benchmark_questions

    def read_truths(self, annotations: Path, questions: Path | None) -> Mapping[str, Any]:
        truths = _read_entries(annotations)
        require_answers([{"answer": 1} for truth in truths.values() if truth["answer"]], annotations, "answer")
        for id, truth in truths.items():
            if truth["answer"] is None:
                entry = record(annotations, id, truth)
                raise entry.error("must be one of the candidates", "invalid-field", "correct_ans")
        return truths

    def score_answer(self, id: str, truth: Any, text: str, official: bool) -> QuestionScore:
        option = read_option(text, truth["options"])
        is_right = truth["answer"] in text if official else option == truth["answer"]
        return QuestionScore(id, float(is_right), id, truth["subsets"], unparsed=not official and option is None)

    def submission(self, answers: Mapping[str, str | None]) -> object | None:
        return [{"img_path": id, "response": text or ""} for id, text in answers.items()]


@register(
    "qbench_zh",
    "质衡-问答-验证集.json of the LLVisionQA-QBench download; 质衡-问答-测试集.json has no answers",
    "the download's images_llvisionqa/, under the names in the file",
)
class QBenchZH(QBench):
    """The Chinese questions of Q-Bench, scored as `qbench`."""

    instruction = "在下列选项中选择一个:"


def _read_entries(annotations: Path) -> dict[str, dict[str, Any]]:
    questions = entries(read_json(annotations), annotations, "img_path", "candidates")
    truths = {}
    for id, question in entries_by_id(questions, annotations, "img_path").items():
        entry = record(annotations, id, question)
        candidates, answer = text_list(entry, "candidates"), entry.optional_text("correct_ans")
        if not 2 <= len(candidates) <= 26:
            raise entry.error("must be a list of 2 to 26 texts", "invalid-field", "candidates")
        if len(set(candidates)) < len(candidates):
            raise entry.error("contains a text twice", "invalid-field", "candidates")
        options = dict(zip(string.ascii_uppercase, candidates, strict=False))
        letters = [letter for letter, text in options.items() if text.strip() == answer]
        if answer is not None and not letters:
            raise entry.error("must be one of the candidates", "invalid-field", "correct_ans")
        truths[id] = {
            "question": entry.text("question"),
            "options": options,
            "answer": letters[0] if letters else None,
            "subsets": (_name(question.get("type"), TYPES), _name(question.get("concern"), CONCERNS)),
        }
    return truths


def _name(value: Any, names: tuple[str, ...]) -> str:
    is_index = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(names)
    return names[value] if is_index else "unknown" if value is None else str(value)[:60]
