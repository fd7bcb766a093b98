"""Asks a set's questions in other words, so that their first words no longer predict refusal.

The data-side answer to Safety Mirage: each wording is given to the same share of refused and of answered questions, so that
nothing at the beginning of a question tells them apart. Fine-tuning on the result is the baseline that unlearning must beat.
"""

from __future__ import annotations

import csv
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlm_unlearn.data.audit import LabelBy, first_word, is_refused
from vlm_unlearn.data.formats import llava, safe_eraser, vlguard
from vlm_unlearn.data.formats.fields import RawRecord, read_objects
from vlm_unlearn.data.formats.table import SEPARATORS, Columns, cell_text, raw_rows, set_of, suffix
from vlm_unlearn.data.json_stream import write_lines, write_list
from vlm_unlearn.data.paraphrase_rules import WORDINGS, by_rule
from vlm_unlearn.data.prompts import fence, template
from vlm_unlearn.data.readers import detect, training_set_records
from vlm_unlearn.data.training_set import read_training_set, write_training_set
from vlm_unlearn.errors import Problems, UserError, quoted, report_problem
from vlm_unlearn.records import Example
from vlm_unlearn.store import open_atomically, read_json

# (id, question, first word) of each question -> paraphrases by id; one that is missing is made by rule
Paraphrase = Callable[[Sequence[tuple[str, str, str]]], Mapping[str, str]]


@dataclass
class Slot:
    """Where a question stands in a raw record, and what else counts: the answer, and what the file says about refusal."""

    holder: dict[str, Any]
    key: str
    question: str
    answer: str
    refused: bool | None
    prefix: str = ""  # an image mark that stays before the question
    tie: str = ""  # questions with the same tie stay the same question

    def without_holder(self) -> Slot:
        """The slot without the record around it, which would keep the whole file in memory."""
        return replace(self, holder={})


def paraphrase_request(question: str, word: str) -> str:
    """The prompt that asks a model for a paraphrase; the question is fenced."""
    return template("paraphrase").format(word=word.capitalize(), question=question, fence=fence(question, word))


def read_paraphrase(reply: str, question: str, word: str) -> str | None:
    """A model's paraphrase if it is one: a single line that begins with the word and is neither empty nor much longer."""
    text = reply.strip().strip('"').strip()
    whole = "\n" not in text and first_word(text) == word and 3 <= len(text.split()) <= 3 * len(question.split()) + 20
    return text if whole and text != question else None


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
    """Writes a copy of a data file, or of a training-set folder, with every question asked in another wording.

    Wordings are dealt to refused and answered questions in equal shares, at random. The format, the order and everything besides the
    questions stay. A decouple question stays the same as its forget question.

    Args:
        words: first words to use, out of `WORDINGS`.
        label, is_refusal: what tells refusal, as in `audit`.
        paraphrase: asks a model; without it, and where its paraphrase can't be used, the rules rewrite.
        on_done: told of the questions rewritten: done, in all.

    Returns:
        counts: questions, by_model, by_rule.

    Raises:
        UserError: an unknown word, fewer than two words, or a file that can't be read.
    """
    unknown = [word for word in words if word not in WORDINGS]
    if unknown or len(set(words)) < 2:
        what = f"no wordings for {quoted(unknown[0])}" if unknown else "two words at least are needed"
        raise UserError(f"{what}; there are {', '.join(WORDINGS)}")
    columns = columns or Columns()
    _check_form(source, out)
    slots = [slot.without_holder() for _, found in _records(source, columns, problems) for slot in found]
    if not slots:
        raise UserError(f"{source}: has no questions" + (f"; {problems.summary()}" if problems else ""))
    wordings = _deal(slots, words, seed, label, is_refusal)
    asked = [
        (str(index), slot.question, first_word(wording))
        for index, (slot, wording) in enumerate(zip(slots, wordings, strict=True))
    ]
    by_model = paraphrase(asked) if paraphrase else {}
    texts: list[str] = []
    tied: dict[tuple[str, str], str] = {}  # a pair's forget and decouple question stay one question
    counts = Counter[str]()
    for index, (slot, wording) in enumerate(zip(slots, wordings, strict=True)):
        text = by_model.get(str(index))
        counts["by_model" if text else "by_rule"] += 1
        text = text or by_rule(slot.question, wording)
        texts.append(tied.setdefault((slot.tie, slot.question), text) if slot.tie else text)
        if on_done and index % 1000 == 999:
            on_done(index + 1, len(slots))
    _write(source, out, columns, texts)
    return {"questions": len(slots), "by_model": counts["by_model"], "by_rule": counts["by_rule"]}


def _deal(
    slots: Sequence[Slot], words: Sequence[str], seed: int, label: LabelBy, is_refusal: Callable[[str], bool]
) -> list[str]:
    """A wording for each question: of both kinds of questions each wording gets the same share, to within one question."""
    known = [wording for word in dict.fromkeys(words) for wording in WORDINGS[word]]
    rng = random.Random(seed)
    dealt = [""] * len(slots)
    kinds: dict[bool, list[int]] = {False: [], True: []}
    ties: set[tuple[str, str]] = set()
    for index, slot in enumerate(slots):
        if slot.tie and (slot.tie, slot.question) in ties:
            dealt[index] = known[0]  # asked as the question that it is tied to
            continue
        ties.add((slot.tie, slot.question))
        kinds[is_refused(slot.refused, slot.answer, label, is_refusal)].append(index)
    for indices in kinds.values():
        rng.shuffle(indices)
        hand: list[str] = []
        for index in indices:
            if not hand:
                hand = rng.sample(known, len(known))
            dealt[index] = hand.pop()
    return dealt


def _records(
    source: str | Path, columns: Columns, problems: Problems | None
) -> Iterator[tuple[dict[str, Any], list[Slot]]]:
    """Raw records of a file, or of the files of a training set in turn, with their questions in order."""
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
                    named = set_of(raw, columns)
                    refused = None if named is None else named == "forget"
                    slots = [
                        Slot(
                            raw.value,
                            columns.question,
                            cell_text(raw, columns.question),
                            cell_text(raw, columns.answer),
                            refused,
                        )
                    ]
        except UserError as error:
            report_problem(error, problems)
            continue
        yield raw.value, slots


def _vlguard_slots(raw: RawRecord) -> list[Slot]:
    fields = {kind: field for field, kind in vlguard.KINDS.items()}
    found = vlguard.pairs(raw)
    return [
        Slot(holder, fields[pair.kind], pair.question, pair.response, pair.kind != "safe")
        for holder, pair in zip(raw.value["instr-resp"], found, strict=True)
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
    found = []
    for number, (question, answer) in enumerate(conversation.rounds):
        mark = llava.IMAGE_PLACEHOLDER if llava.IMAGE_PLACEHOLDER in turns[2 * number]["value"] else ""
        found.append(Slot(turns[2 * number], "value", question, answer, None, prefix=mark))
    return found


def _example_slots(raw: RawRecord, name: str) -> list[Slot]:
    refused = name == "forget"
    earlier = raw.objects("history") if raw.value.get("history") else []
    pair = raw.optional_text("pair_id") if name != "retain" else None
    return [
        *(Slot(turn.value, "question", turn.text("question"), turn.text("answer"), refused) for turn in earlier),
        Slot(raw.value, "question", raw.text("question"), raw.text("answer"), refused, tie=pair or ""),
    ]


def _write(source: str | Path, out: Path, columns: Columns, texts: Sequence[str]) -> None:
    waiting = iter(texts)

    def rewritten() -> Iterator[dict[str, Any]]:
        for record, slots in _records(source, columns, Problems()):
            for slot in slots:
                slot.holder[slot.key] = slot.prefix + next(waiting)
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


def _check_form(source: str | Path, out: Path) -> None:
    """The same format comes out as goes in: a list or lines of JSON, or a table of text."""
    path, kind = Path(source), detect(source)
    if kind == "training_set":
        if out.exists() and out.samefile(path):
            raise UserError(f"{out}: is the training set itself; choose another output")
        return
    lines = (".jsonl", ".ndjson")
    if not path.is_file() or suffix(path) in (".parquet", ".arrow"):
        raise UserError(
            f"{source}: only .json, .jsonl, .csv and .tsv can be rewritten; import it, and diversify the training set"
        )
    allowed = (*SEPARATORS,) if suffix(path) in SEPARATORS else (".json", *lines)
    if suffix(out) not in allowed:
        raise UserError(f"{out}: name a file that ends in {' or '.join(allowed)}, as {path.name} is one")


def _write_training_set(source: Path, out: Path, records: Iterator[dict[str, Any]]) -> None:
    before = read_training_set(source)
    examples = {role: [Example.model_validate(next(records)) for _ in found] for role, found in before.examples.items()}
    refusals = before.refusals if "refusals.json" in before.digests else ()
    origin = {
        "format": "diversified",
        "of": read_json(source / "dataset.json").get("source"),
        "sha256": dict(before.digests),
    }
    write_training_set(out, before.images, examples, origin, refusals)
