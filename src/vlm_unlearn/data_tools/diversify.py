"""Rewrites the questions of a data set in other wordings, so that their first words no longer predict refusal.

This is the data-side answer to Safety Mirage. Each wording is used for equal shares of the refused and of the answered
questions, so that the beginning of a question carries no information about refusal. Fine-tuning on the result is the
baseline for unlearning.
"""

from __future__ import annotations

import csv
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlm_unlearn.data.dataset import UnlearningDataset
from vlm_unlearn.data.fence import fence
from vlm_unlearn.data.formats import llava, safe_eraser, vlguard
from vlm_unlearn.data.formats.fields import RawRecord, read_objects
from vlm_unlearn.data.formats.table import SEPARATORS, Columns, cell_text, raw_rows, set_of, suffix
from vlm_unlearn.data.formats.table_rows import is_chat
from vlm_unlearn.data.formats.training_set import training_set_records
from vlm_unlearn.data.json_stream import write_lines, write_list
from vlm_unlearn.data.readers import detect
from vlm_unlearn.data.training_set import write_training_set
from vlm_unlearn.data_tools.audit import LabelBy, first_word, is_refused
from vlm_unlearn.data_tools.paraphrase_rules import WORDINGS, rephrase
from vlm_unlearn.data_tools.prompts import template
from vlm_unlearn.errors import Problems, UserError, quoted, report_problem
from vlm_unlearn.records import Example
from vlm_unlearn.store import open_atomically, read_json

# Takes (id, question, first word) of each question and returns paraphrases by id. The rules rewrite missing ones.
Paraphrase = Callable[[Sequence[tuple[str, str, str]]], Mapping[str, str]]


@dataclass
class Slot:
    """The position of a question in a raw record, and the facts that decide its wording."""

    holder: dict[str, Any]
    key: str
    question: str
    answer: str
    refused: bool | None  # the label of the file, or None if the file contains no label
    prefix: str = ""  # an image placeholder before the question
    tie: str = ""  # questions with the same tie that are equal stay equal


def paraphrase_request(question: str, word: str) -> str:
    """Returns the prompt that asks a model for a paraphrase, with the question between fence lines."""
    return template("paraphrase").format(word=word.capitalize(), question=question, fence=fence(question, word))


def read_paraphrase(reply: str, question: str, word: str) -> str | None:
    """Returns the paraphrase in a model's reply, or None if it cannot be used.

    A paraphrase is one line that begins with the word, is neither empty nor much longer than the question, and differs
    from the question.
    """
    text = reply.strip().strip('"').strip()
    is_valid = (
        "\n" not in text and first_word(text) == word and 3 <= len(text.split()) <= 3 * len(question.split()) + 20
    )
    return text if is_valid and text != question else None


def diversify(
    source: str | Path,
    out: Path,
    words: Sequence[str] = tuple(WORDINGS),
    seed: int = 0,
    label: LabelBy = "auto",
    is_refusal: Callable[[str], bool] = lambda text: False,
    columns: Columns | None = None,
    paraphrase: Paraphrase | None = None,
    problems: Problems | None = None,
    on_done: Callable[[int, int], None] | None = None,
) -> dict[str, int]:
    """Writes a copy of a data file, or of a training-set folder, in which every question has another wording.

    Refused and answered questions get random wordings in equal shares. The format, the order and all other content
    stay. A decouple question stays equal to its forget question.

    Args:
        source: The data file or training-set folder.
        out: The file to write, in the same format, or a folder for a training set.
        words: The first words to use, from `WORDINGS`.
        seed: The seed of the wordings.
        label, is_refusal: How refused questions are recognized, as in `labeled_questions`.
        columns: The column names of a table.
        paraphrase: Asks a model for paraphrases. Without it, and for unusable paraphrases, the rules rewrite the
            questions. problems: Collects broken records. Without it the first one raises. on_done: Called with (done,
            total) as questions are rewritten.

    Returns:
        The counts ``questions``, ``by_model`` and ``by_rule``.

    Raises:
        UserError: A word is unknown, there are fewer than two words, or the file cannot be read or has no questions.
    """
    unknown = [word for word in words if word not in WORDINGS]
    if unknown or len(set(words)) < 2:
        problem = f"there are no wordings for {quoted(unknown[0])}" if unknown else "two words or more are needed"
        message = f"{problem}. Use {', '.join(WORDINGS)}."
        raise UserError(message, code="unknown-name" if unknown else "out-of-range", field="--words")
    columns = columns or Columns()
    _check_output_format(source, out)
    # Without `holder`, which would keep the entire file in memory.
    slots = [
        replace(slot, holder={}) for _, record_slots in _records(source, columns, problems) for slot in record_slots
    ]
    if not slots:
        summary = f". {problems.summary()}" if problems else ""
        raise UserError(f"has no questions{summary}", code="no-records", file=source)
    wordings = _assign_wordings(slots, words, seed, label, is_refusal)
    texts, counts = _rewrite(slots, wordings, paraphrase, on_done)
    _write(source, out, columns, texts)
    return {"questions": len(slots), "by_model": counts["by_model"], "by_rule": counts["by_rule"]}


def _rewrite(
    slots: Sequence[Slot],
    wordings: Sequence[str],
    paraphrase: Paraphrase | None,
    on_done: Callable[[int, int], None] | None,
) -> tuple[list[str], Counter[str]]:
    """Returns the new text of each question, and the numbers of texts by a model and by rule."""
    requests = [
        (str(index), slot.question, first_word(wording))
        for index, (slot, wording) in enumerate(zip(slots, wordings, strict=True))
    ]
    paraphrases = paraphrase(requests) if paraphrase else {}
    texts: list[str] = []
    text_of_tie: dict[tuple[str, str], str] = {}
    counts = Counter[str]()
    for index, (slot, wording) in enumerate(zip(slots, wordings, strict=True)):
        text = paraphrases.get(str(index))
        counts["by_model" if text else "by_rule"] += 1
        text = text or rephrase(slot.question, wording)
        texts.append(text_of_tie.setdefault((slot.tie, slot.question), text) if slot.tie else text)
        if on_done and index % 1000 == 999:
            on_done(index + 1, len(slots))
    return texts, counts


def _assign_wordings(
    slots: Sequence[Slot], words: Sequence[str], seed: int, label: LabelBy, is_refusal: Callable[[str], bool]
) -> list[str]:
    """Returns a wording for each question.

    Among the refused questions all wordings are equally frequent, to within one question, and so they are among the
    answered questions.
    """
    wordings = [wording for word in dict.fromkeys(words) for wording in WORDINGS[word]]
    rng = random.Random(seed)
    assigned = [""] * len(slots)
    indices_by_label: dict[bool, list[int]] = {False: [], True: []}
    ties: set[tuple[str, str]] = set()
    for index, slot in enumerate(slots):
        if slot.tie and (slot.tie, slot.question) in ties:
            assigned[index] = wordings[0]  # not used: the question gets the text of the question that it is tied to
            continue
        ties.add((slot.tie, slot.question))
        indices_by_label[is_refused(slot.refused, slot.answer, label, is_refusal)].append(index)
    for indices in indices_by_label.values():
        rng.shuffle(indices)
        remaining: list[str] = []
        for index in indices:
            if not remaining:
                remaining = rng.sample(wordings, len(wordings))
            assigned[index] = remaining.pop()
    return assigned


def _records(
    source: str | Path, columns: Columns, problems: Problems | None
) -> Iterator[tuple[dict[str, Any], list[Slot]]]:
    """Yields the raw records of a file, or of all files of a training set, with their questions in order."""
    path = Path(source)
    kind = detect(source)
    if kind == "training_set":
        for name, raw in training_set_records(path, problems):
            yield raw.value, _example_slots(raw, name)
        return
    records = raw_rows(source, columns, problems) if kind == "table" else read_objects(path, "id", problems)
    for raw in records:
        try:
            match kind:
                case "vlguard":
                    slots = _vlguard_slots(raw)
                case "safe_eraser":
                    slots = _safe_eraser_slots(raw)
                case "llava":
                    slots = _llava_slots(raw)
                case _:
                    if is_chat(raw, columns):
                        problem = "rows of messages are not supported. Pass a table of questions or LLaVA's format."
                        raise raw.error(problem, "unsupported-setting", "messages")
                    row_set = set_of(raw, columns)
                    refused = None if row_set is None else row_set == "forget"
                    question, answer = cell_text(raw, columns.question), cell_text(raw, columns.answer)
                    slots = [Slot(raw.value, columns.question, question, answer, refused)]
        except UserError as error:
            report_problem(error, problems)
            continue
        yield raw.value, slots


def _vlguard_slots(raw: RawRecord) -> list[Slot]:
    fields = {kind: field for field, kind in vlguard.KINDS.items()}
    pairs = vlguard.pairs(raw)  # validates the record
    return [
        Slot(holder, fields[pair.kind], pair.question, pair.response, pair.kind != "safe")
        for holder, pair in zip(raw.value["instr-resp"], pairs, strict=True)
    ]


def _safe_eraser_slots(raw: RawRecord) -> list[Slot]:
    record = safe_eraser.parse(raw)
    unsafe = zip(raw.value["unsafe_pairs"], record.unsafe, strict=True)
    harmless = zip(
        (name for name in safe_eraser.HARMLESS_PAIRS if raw.value.get(name) is not None), record.harmless, strict=True
    )
    return [
        *(Slot(holder, "question", pair.question, pair.harmful_answer, True) for holder, pair in unsafe),
        *(Slot(raw.value[name], "Question", question, answer, False) for name, (question, answer) in harmless),
    ]


def _llava_slots(raw: RawRecord) -> list[Slot]:
    conversation = llava.parse(raw)
    turns = raw.value["conversations"]
    slots = []
    for number, (question, answer) in enumerate(conversation.rounds):
        prefix = llava.IMAGE_PLACEHOLDER if llava.IMAGE_PLACEHOLDER in turns[2 * number]["value"] else ""
        slots.append(Slot(turns[2 * number], "value", question, answer, None, prefix))
    return slots


def _example_slots(raw: RawRecord, name: str) -> list[Slot]:
    refused = name == "forget"
    earlier = raw.objects("history") if raw.value.get("history") else []
    pair = raw.optional_text("pair_id") if name != "retain" else None
    return [
        *(Slot(turn.value, "question", turn.text("question"), turn.text("answer"), refused) for turn in earlier),
        Slot(raw.value, "question", raw.text("question"), raw.text("answer"), refused, tie=pair or ""),
    ]


def _write(source: str | Path, out: Path, columns: Columns, texts: Sequence[str]) -> None:
    """Writes the records of a file with new questions, given in the order of `_records`."""
    remaining = iter(texts)

    def rewritten() -> Iterator[dict[str, Any]]:
        for record, slots in _records(source, columns, Problems()):
            for slot in slots:
                slot.holder[slot.key] = slot.prefix + next(remaining)
            yield record

    path = Path(source)
    kind = detect(source)
    if kind == "training_set":
        _write_training_set(path, out, rewritten())
    elif suffix(out) in SEPARATORS:
        rows = list(rewritten())
        header = list(dict.fromkeys(column for row in rows for column in row))
        with open_atomically(out) as handle:
            writer = csv.DictWriter(handle, header, delimiter=SEPARATORS[suffix(out)])
            writer.writeheader()
            writer.writerows(rows)
    elif suffix(out) == ".json":
        write_list(out, rewritten())
    else:
        write_lines(out, rewritten())


def _check_output_format(source: str | Path, out: Path) -> None:
    """Checks that the output has the format of the source: JSON, delimited text, or another training-set folder."""
    path = Path(source)
    if detect(source) == "training_set":
        if out.exists() and out.samefile(path):
            raise UserError("is the training set itself. Choose another output.", code="output-exists", file=out)
        return
    if not path.is_file() or suffix(path) in (".parquet", ".arrow"):
        message = "only .json, .jsonl, .csv and .tsv can be rewritten. Import the file and diversify the training set."
        raise UserError(message, code="unsupported-setting", file=source)
    allowed = (*SEPARATORS,) if suffix(path) in SEPARATORS else (".json", ".jsonl", ".ndjson")
    if suffix(out) not in allowed:
        message = f"use a file name that ends in {' or '.join(allowed)}, the format of {path.name}"
        raise UserError(message, code="unsupported-setting", file=out)


def _write_training_set(source: Path, out: Path, records: Iterator[dict[str, Any]]) -> None:
    original = UnlearningDataset.from_folder(source)
    examples = {
        role: [Example.model_validate(next(records)) for _ in role_examples] for role, role_examples in original.items()
    }
    refusals = original.refusals if "refusals.json" in original.digests else ()
    origin = {
        "format": "diversified",
        "of": read_json(source / "dataset.json").get("source"),
        "sha256": dict(original.digests),
    }
    write_training_set(out, original.image_roots, examples, origin, refusals)
