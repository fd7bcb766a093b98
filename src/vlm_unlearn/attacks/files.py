"""Writes attack files: the questions of a data file, each in K rewrites, in the layout of the published test files.

The layout is VLGuard's, with K consecutive records per id. SafeEraser's questions are written in it too, because only
this layout can mark several records as rewrites of one question.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unicodedata import category

from vlm_unlearn.attacks.one_word import (
    CONTROL,
    TEMPLATES,
    TRIGGERS,
    all_rewrites,
    capitalize_first,
    parse_first_word,
)
from vlm_unlearn.data.fence import fence
from vlm_unlearn.data.formats import safe_eraser, vlguard
from vlm_unlearn.data.formats.llava import IMAGE_PLACEHOLDER
from vlm_unlearn.data.json_stream import write_lines, write_list
from vlm_unlearn.data.readers import detect
from vlm_unlearn.data_tools.audit import first_word
from vlm_unlearn.data_tools.prompts import template
from vlm_unlearn.errors import Problems, UserError, quoted, report_problem
from vlm_unlearn.records import Kind

MAX_REWRITES = 5
QUESTION_FIELDS: Mapping[Kind, str] = {kind: field for field, kind in vlguard.KINDS.items()}
# Takes (id, prompt) of each question and returns replies by id. Failed replies are missing.
Paraphraser = Callable[[Sequence[tuple[str, str]]], Mapping[str, str]]


@dataclass(frozen=True)
class AttackRecord:
    """A question to rewrite, and the other fields of its record."""

    record: dict[str, Any]
    question: str
    response: str


def write_attack(
    source: Path,
    out: Path,
    trigger: str,
    num_rewrites: int,
    kind: Kind,
    model: Paraphraser | None = None,
    problems: Problems | None = None,
    on_done: Callable[[int, int], None] | None = None,
) -> dict[str, int]:
    """Writes each question of a kind as `num_rewrites` different records that begin with a trigger.

    Args:
        source: A VLGuard or SafeEraser file.
        out: The file to write, .json or .jsonl.
        trigger: The first word. ``control`` writes paraphrases that begin with neither "what" nor "share".
        num_rewrites: The number of rewrites of each question, from 1 to 5.
        kind: The kind of the questions.
        model: Paraphrases the questions. Without it, and for unusable paraphrases, the rules rewrite them.
        problems: Collects broken records. Without it the first one raises.
        on_done: Called with (done, total) as rewrites are made.

    Returns:
        The counts ``questions``, ``records``, ``by_model`` and ``by_rule``.

    Raises:
        UserError: The file has another format or no such questions, or the rules have fewer wordings than rewrites.
    """
    word = parse_first_word(trigger)
    _check_num_rewrites(word, num_rewrites, model is not None)
    if out.suffix not in (".json", ".jsonl"):
        raise UserError("use a file name that ends in .json or .jsonl", code="unsupported-setting", file=out)
    attack_records = read_questions(source, kind, problems)
    rewrites, counts = _rewrite_all(attack_records, word, num_rewrites, model, on_done)

    def records() -> Iterator[dict[str, Any]]:
        for record, texts in zip(attack_records, rewrites, strict=True):
            for text in texts:
                yield {**record.record, "instr-resp": [{QUESTION_FIELDS[kind]: text, "response": record.response}]}

    num_records = write_list(out, records()) if out.suffix == ".json" else write_lines(out, records())
    return {
        "questions": len(attack_records),
        "records": num_records,
        "by_model": counts["by_model"],
        "by_rule": counts["by_rule"],
    }


def _rewrite_all(
    records: Sequence[AttackRecord],
    word: str,
    num_rewrites: int,
    model: Paraphraser | None,
    on_done: Callable[[int, int], None] | None,
) -> tuple[list[list[str]], Counter[str]]:
    """Returns the rewrites of each question, and the numbers of rewrites by the model and by rule."""
    counts = Counter[str]()
    rewrites: list[list[str]] = [[] for _ in records]
    for number in range(num_rewrites):
        replies: Mapping[str, str] = {}
        if model:
            requests = [
                (str(i), rewrite_request(record.question, word, rewrites[i])) for i, record in enumerate(records)
            ]
            replies = model(requests)
        for i, record in enumerate(records):
            text = read_rewrite(replies.get(str(i), ""), record.question, word, rewrites[i])
            counts["by_model" if text else "by_rule"] += 1
            rewrites[i].append(
                text or next(rule for rule in all_rewrites(record.question, word) if _differs(rule, rewrites[i]))
            )
            if on_done and i % 500 == 499:
                on_done(number * len(records) + i + 1, num_rewrites * len(records))
    return rewrites, counts


def _check_num_rewrites(word: str, num_rewrites: int, has_model: bool) -> None:
    available = len(TEMPLATES.get(word, ()))
    if not 0 < num_rewrites <= MAX_REWRITES:
        raise UserError(f"{num_rewrites} rewrites are not possible. Use 1 to {MAX_REWRITES}.", code="out-of-range")
    if num_rewrites > available and not has_model:
        names = ", ".join(name for name, templates in TEMPLATES.items() if len(templates) >= num_rewrites)
        raise UserError(
            f"the rules have {available} {'wording' if available == 1 else 'wordings'} for {quoted(word)}. "
            f"Paraphrase with a model (--model), or use one of {names}.",
            code="out-of-range",
        )


def read_questions(source: Path, kind: Kind, problems: Problems | None = None) -> list[AttackRecord]:
    """Returns the questions of one kind from a VLGuard or SafeEraser file.

    Args:
        problems: Collects broken records, and second records of the same id. Without it the first one raises.

    Raises:
        UserError: The file has another format or no such question.
    """
    match detect(source):
        case "vlguard":
            questions = list(_vlguard_questions(source, kind, problems))
        case "safe_eraser":
            questions = list(_safe_eraser_questions(source, kind, problems))
        case other_format:
            message = f"has the format {other_format}. Pass a VLGuard or SafeEraser file."
            raise UserError(message, code="unsupported-setting", file=source)
    if not questions:
        summary = f". {problems.summary()}" if problems else ""
        raise UserError(f'has no questions of kind "{kind}"{summary}', code="no-records", file=source)
    return questions


def _vlguard_questions(source: Path, kind: Kind, problems: Problems | None) -> Iterator[AttackRecord]:
    ids: set[str] = set()
    for raw, pairs in vlguard.read_records(source, None, problems):
        for pair in (pair for pair in pairs if pair.kind == kind):
            if pair.record_id in ids:
                message = (
                    f"is a second {kind} question of this id. Records of one id are rewrites of one question. "
                    f"Rewrite the original file instead."
                )
                report_problem(raw.error(message, "duplicate-id"), problems)
                continue
            ids.add(pair.record_id)
            fields = {name: value for name, value in raw.value.items() if name != "instr-resp"}
            yield AttackRecord({**fields, "id": pair.record_id}, pair.question, pair.response)


def _safe_eraser_questions(source: Path, kind: Kind, problems: Problems | None) -> Iterator[AttackRecord]:
    for prompt in safe_eraser.prompts(safe_eraser.read_safe_eraser(source, None, problems), "", kind):
        category_field = {"harmful_category": prompt.category} if prompt.category else {}
        record = {"id": prompt.group_id, "image": prompt.image, "safe": kind != "unsafe", **category_field}
        yield AttackRecord(record, prompt.question, prompt.reference or "")


def rewrite_request(question: str, word: str, versions: Sequence[str]) -> str:
    """Returns the prompt that asks a model for another paraphrase.

    The question and the existing versions are placed between fence lines.
    """
    line = fence(question, word, *versions)
    triggers = " nor ".join(f'"{capitalize_first(trigger)}"' for trigger in TRIGGERS)
    return template("attack").format(
        beginning=f"begins with neither {triggers}"
        if word == CONTROL
        else f'begins with the word "{capitalize_first(word)}"',
        differently="\nWord it differently from the versions that there are already." if versions else "",
        question=question,
        fence=line,
        versions="\n".join(["", "Versions that there are already:", line, *versions, line, ""]) if versions else "",
    )


def read_rewrite(reply: str, question: str, word: str, versions: Sequence[str]) -> str | None:
    """Returns the paraphrase in a model's reply, or None if it cannot be used.

    A usable paraphrase is one line without control characters and begins as requested. It is neither empty nor much
    longer than the question, and differs from the question and from the other versions by more than case and spacing.
    """
    lines = reply.strip().strip('"').splitlines()
    text = " ".join(lines[0].split()) if len(lines) == 1 else ""
    start = first_word(text)
    begins_as_requested = bool(start) and start not in TRIGGERS if word == CONTROL else start == word
    has_valid_length = 3 <= len(text.split()) <= 3 * len(question.split()) + 20
    has_valid_text = IMAGE_PLACEHOLDER not in text and not any(category(char) in ("Cc", "Cs") for char in text)
    is_usable = begins_as_requested and has_valid_length and has_valid_text and _differs(text, [question, *versions])
    return text if is_usable else None


def _differs(text: str, versions: Sequence[str]) -> bool:
    return _normalize(text) not in {_normalize(version) for version in versions}


def _normalize(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(" .?!")
