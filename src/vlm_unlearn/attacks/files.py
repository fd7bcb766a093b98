"""Writes an attack file: the questions of a data file, each K times in other words, in the layout of the published test files.

That layout is VLGuard's, with K records of one id in a row. It is the one that can say which questions are shots of one question,
so SafeEraser's questions are written in it too.
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
    capitalize_first,
    parse_first_word,
    rewrites_with_any,
)
from vlm_unlearn.data.audit import first_word
from vlm_unlearn.data.formats import safe_eraser, vlguard
from vlm_unlearn.data.formats.llava import IMAGE_PLACEHOLDER
from vlm_unlearn.data.json_stream import write_lines, write_list
from vlm_unlearn.data.prompts import fence, template
from vlm_unlearn.data.readers import detect
from vlm_unlearn.errors import Problems, UserError, quoted, report_problem
from vlm_unlearn.records import Kind

MAX_REWRITES = 5
QUESTION_FIELDS: Mapping[Kind, str] = {kind: field for field, kind in vlguard.KINDS.items()}
# (id, request) of each question -> replies by id; one that is missing didn't come
Model = Callable[[Sequence[tuple[str, str]]], Mapping[str, str]]


@dataclass(frozen=True)
class AttackRecord:
    """A question of the file, and everything of its record besides."""

    record: dict[str, Any]
    question: str
    response: str


def write_attack(
    source: Path,
    out: Path,
    trigger: str,
    shots: int,
    kind: Kind,
    model: Model | None = None,
    problems: Problems | None = None,
    on_done: Callable[[int, int], None] | None = None,
) -> dict[str, int]:
    """Writes each question of `kind` as `shots` different records that begin with `trigger`.

    Args:
        trigger: the first word; ``control`` is paraphrases that begin with neither "what" nor "share".
        model: paraphrases; without it, and where its paraphrase can't be used, the rules rewrite.
        problems: takes broken records; without it the first one raises.
        on_done: told of the questions rewritten: rewrites done, rewrites in all.

    Returns:
        counts: questions, records, by_model, by_rule.

    Raises:
        UserError: a file of another format or without such questions; more shots than the rules have wordings for the word.
    """
    word = parse_first_word(trigger)
    _check_shots(word, shots, model is not None)
    if out.suffix not in (".json", ".jsonl"):
        raise UserError(f"{out}: name a file that ends in .json or .jsonl")
    asked = read_questions(source, kind, problems)
    counts = Counter[str]()
    texts: list[list[str]] = [[] for _ in asked]
    for shot in range(shots):
        replies = (
            model([(str(i), request(one.question, word, texts[i])) for i, one in enumerate(asked)]) if model else {}
        )
        for i, one in enumerate(asked):
            text = read_rewrite(replies.get(str(i), ""), one.question, word, texts[i])
            counts["by_model" if text else "by_rule"] += 1
            texts[i].append(
                text or next(rule for rule in rewrites_with_any(one.question, word) if _differs(rule, texts[i]))
            )
            if on_done and i % 500 == 499:
                on_done(shot * len(asked) + i + 1, shots * len(asked))

    def records() -> Iterator[dict[str, Any]]:
        for one, versions in zip(asked, texts, strict=True):
            for text in versions:
                yield {**one.record, "instr-resp": [{QUESTION_FIELDS[kind]: text, "response": one.response}]}

    written = write_list(out, records()) if out.suffix == ".json" else write_lines(out, records())
    return {"questions": len(asked), "records": written, "by_model": counts["by_model"], "by_rule": counts["by_rule"]}


def _check_shots(word: str, shots: int, has_model: bool) -> None:
    known = len(TEMPLATES.get(word, ()))
    if not 0 < shots <= MAX_REWRITES:
        raise UserError(f"{shots} shots: from 1 to {MAX_REWRITES} can be made")
    if shots > known and not has_model:
        wordings = "1 wording" if known == 1 else f"{known} wordings"
        have = ", ".join(name for name, found in TEMPLATES.items() if len(found) >= shots)
        raise UserError(
            f"{quoted(word)}: the rules have {wordings} of it; let a model paraphrase (--model), or use {have}"
        )


def read_questions(source: Path, kind: Kind, problems: Problems | None = None) -> list[AttackRecord]:
    """The questions of one kind of a VLGuard or SafeEraser file.

    Raises:
        UserError: the file is of another format, or has no such question; a broken record, or a second record of one id, where
            `problems` is None.
    """
    match detect(source):
        case "vlguard":
            found = list(_of_vlguard(source, kind, problems))
        case "safe_eraser":
            found = list(_of_safe_eraser(source, kind, problems))
        case other:
            raise UserError(f"{source}: must be a VLGuard or SafeEraser file; this is one of kind {other}")
    if not found:
        raise UserError(
            f'{source}: has no questions of kind "{kind}"' + (f"; {problems.summary()}" if problems else "")
        )
    return found


def _of_vlguard(source: Path, kind: Kind, problems: Problems | None) -> Iterator[AttackRecord]:
    seen: set[str] = set()
    for raw, pairs in vlguard.read_records(source, None, problems):
        for pair in (pair for pair in pairs if pair.kind == kind):
            if pair.record_id in seen:
                where = f"{raw.where}: a second {kind} question of this id"
                report_problem(
                    UserError(
                        f"{where}; records of one id are shots of one question, so rewrite the file they come from"
                    ),
                    problems,
                )
                continue
            seen.add(pair.record_id)
            rest = {name: value for name, value in raw.value.items() if name != "instr-resp"}
            yield AttackRecord({**rest, "id": pair.record_id}, pair.question, pair.response)


def _of_safe_eraser(source: Path, kind: Kind, problems: Problems | None) -> Iterator[AttackRecord]:
    for prompt in safe_eraser.prompts(safe_eraser.read_safe_eraser(source, None, problems), "", kind):
        named = {"harmful_category": prompt.category} if prompt.category else {}
        record = {"id": prompt.group_id, "image": prompt.image, "safe": kind != "unsafe", **named}
        yield AttackRecord(record, prompt.question, prompt.reference or "")


def request(question: str, word: str, versions: Sequence[str]) -> str:
    """The prompt that asks a model for one more paraphrase; question and versions are fenced."""
    mark = fence(question, word, *versions)
    others = " nor ".join(f'"{capitalize_first(trigger)}"' for trigger in TRIGGERS)
    return template("attack").format(
        beginning=f"begins with neither {others}"
        if word == CONTROL
        else f'begins with the word "{capitalize_first(word)}"',
        differently="\nWord it differently from the versions that there are already." if versions else "",
        question=question,
        fence=mark,
        versions="\n".join(["", "Versions that there are already:", mark, *versions, mark, ""]) if versions else "",
    )


def read_rewrite(reply: str, question: str, word: str, versions: Sequence[str]) -> str | None:
    """A model's paraphrase if it can be used.

    It must be one line without control characters, begin as it was to, be neither empty nor much longer than the question, and
    differ from the question and from the other versions by more than case and spacing.
    """
    lines = reply.strip().strip('"').splitlines()
    text = " ".join(lines[0].split()) if len(lines) == 1 else ""
    begun = first_word(text)
    begins = bool(begun) and begun not in TRIGGERS if word == CONTROL else begun == word
    sized = 3 <= len(text.split()) <= 3 * len(question.split()) + 20
    whole = IMAGE_PLACEHOLDER not in text and not any(category(char) in ("Cc", "Cs") for char in text)
    return text if begins and sized and whole and _differs(text, [question, *versions]) else None


def _differs(text: str, others: Sequence[str]) -> bool:
    return _plain(text) not in {_plain(other) for other in others}


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(" .?!")
