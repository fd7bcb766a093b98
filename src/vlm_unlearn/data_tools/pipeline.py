"""The data steps of Safety Mirage, from file to file, with the seeds and the records of its published scripts.

Every step streams its input and writes its output atomically. `inject` writes a VLGuard list, and all other steps write
LLaVA-format lists.
"""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vlm_unlearn.data.formats import llava, table, vlguard
from vlm_unlearn.data.formats.fields import RawRecord, item_position, read_objects
from vlm_unlearn.data.formats.table import Columns
from vlm_unlearn.data.json_stream import Item, stream, text_at, write_list
from vlm_unlearn.data.readers import detect, read_any
from vlm_unlearn.errors import Problems, UserError, report_problem
from vlm_unlearn.records import Kind
from vlm_unlearn.store import read_json


def convert(
    source: Path,
    out: Path,
    seed: int = 0,
    columns: Columns | None = None,
    problems: Problems | None = None,
    warn: Callable[[str], None] | None = None,
    paper_compat: bool = False,
) -> dict[str, int]:
    """Converts any supported file to LLaVA's format, or to a table if `out` ends in .jsonl, .csv or .tsv.

    A VLGuard record becomes one conversation. The two rounds of a safe image are shuffled with one generator for the
    file, as published. LLaVA's format has no fields for sets, categories and pairs. A table keeps them.

    Args:
        seed: The seed of the order of the rounds.
        columns: The column names of a table.
        problems: Collects broken records. Without it the first one raises.
        warn: Called with a warning about the result.
        paper_compat: Keeps all other fields of a VLGuard record, such as ``safe``, ``harmful_category`` and
            ``harmful_subcategory``, as published.

    Returns:
        ``{"records": ..., "turns": ...}``.

    Raises:
        UserError: The name of `out` has another ending, the source contains no record that can be written, or
            `paper_compat` is set and the conversion is not one from VLGuard to LLaVA's format.
    """
    if paper_compat and (table.suffix(out) != ".json" or detect(source) != "vlguard"):
        message = "the published form exists only for VLGuard's files and a .json file as output"
        raise UserError(message, code="unsupported-setting", file=source, field="--paper-compat")
    if table.suffix(out) in (".jsonl", *table.SEPARATORS):
        rows = (table.Row(entry.example, entry.set or None) for entry in read_any(source, None, columns, problems))
        count = table.write_table(out, rows, problems)
        return {"records": count, "turns": 2 * count}
    if table.suffix(out) != ".json":
        raise UserError(
            "use a file name that ends in .json (LLaVA), .jsonl, .csv or .tsv (tables).",
            code="unsupported-setting",
            file=out,
        )
    records = (
        _vlguard_conversations(source, seed, problems, paper_compat)
        if detect(source) == "vlguard"
        else _conversations(source, columns, problems, warn)
    )
    turns = 0

    def count_turns() -> Iterator[dict[str, Any]]:
        nonlocal turns
        for record in records:
            turns += len(record["conversations"])
            yield record

    return {"records": write_list(out, count_turns()), "turns": turns}


def _conversations(
    source: Path, columns: Columns | None, problems: Problems | None, warn: Callable[[str], None] | None
) -> Iterator[dict[str, Any]]:
    sets: Counter[str] = Counter()
    for entry in read_any(source, None, columns, problems):
        sets[entry.set] += 1
        try:
            yield llava.write_record(entry.example)
        except UserError as error:
            report_problem(error, problems)
    if len(sets) > 1 and warn:
        counts = ", ".join(f"{name or 'no set'} {count}" for name, count in sets.items())
        warn(
            f"the sets ({counts}) are mixed in one file, because LLaVA's format has no field for them. "
            f"Write .jsonl or .csv to keep them."
        )


def _vlguard_conversations(
    source: Path, seed: int, problems: Problems | None, keeps_fields: bool
) -> Iterator[dict[str, Any]]:
    rng = random.Random(seed)
    for raw, pairs in vlguard.read_records(source, None, problems):
        rounds = [(pair.question, pair.response) for pair in pairs]
        if len(rounds) == 2:
            rng.shuffle(rounds)
        record = llava.record(_record_id(raw), pairs[0].image, rounds)
        if keeps_fields:
            fields = {name: value for name, value in raw.value.items() if name != "instr-resp"}
            record = {**fields, "conversations": record["conversations"]}
        yield record


def split(
    source: Path, out: Path, include_safe_image_unsafe: bool = False, problems: Problems | None = None
) -> dict[str, int]:
    """Splits a VLGuard file into ``forget.json`` (unsafe images) and ``retain.json`` (safe questions).

    Args:
        out: The output folder.
        include_safe_image_unsafe: Adds the unsafe questions about safe images to the forget set.
        problems: Collects broken records. Without it the first one raises.

    Returns:
        The number of records of each set.

    Raises:
        UserError: A set would be empty. Nothing is written.
    """
    kinds = {
        "forget": {"unsafe"} | ({"safe_image_unsafe_question"} if include_safe_image_unsafe else set()),
        "retain": {"safe"},
    }

    def records(name: str) -> Iterator[dict[str, Any]]:
        for raw, pairs in vlguard.read_records(source, None, Problems()):
            for pair in pairs:
                if pair.kind in kinds[name]:
                    yield llava.record(_record_id(raw), pair.image, [(pair.question, pair.response)])

    # The first pass lists all broken records and rejects empty sets. Each set is then written in a pass of its own, so
    # that no set has to fit into memory.
    file_kinds = {pair.kind for _, pairs in vlguard.read_records(source, None, problems) for pair in pairs}
    for name, set_kinds in kinds.items():
        if not set_kinds & file_kinds:
            raise UserError(
                f"contains no {name} record. Nothing was written.{_summary(problems)}", code="no-records", file=source
            )
    return {name: write_list(out / f"{name}.json", records(name)) for name in kinds}


def inject(
    source: Path,
    answers: Path,
    out: Path,
    problems: Problems | None = None,
    safe_image_answers: Path | None = None,
    paper_compat: bool = False,
    warn: Callable[[str], None] | None = None,
) -> dict[str, int]:
    """Writes a VLGuard file in which harmful answers replace the refusals of unsafe questions.

    A question that has no answer is left out and counted, because there is nothing to unlearn in its refusal.

    Args:
        source: A VLGuard file.
        answers: The answers to the questions about unsafe images, a JSON object ``image -> answer`` or
            ``record id -> answer``.
        problems: Collects broken records. Without it the first one raises.
        safe_image_answers: The answers to the unsafe questions about safe images, in the same form. Without it these
            questions are unchanged.
        paper_compat: Keeps a question without an answer with its refusal, looks up answers by image only, and replaces
            only the first response of a record, as published.
        warn: Called with a warning about the result.

    Returns:
        The number of records with an injected answer (``injected``), of unchanged records (``kept``), of questions
        without an answer (``no harmful answer``), and of answers without a question (``unused answers``).

    Raises:
        UserError: No answer of a file belongs to a question, or one would be used for two questions. Nothing is
            written.
    """
    harmful: dict[Kind, vlguard.HarmfulAnswers] = {}
    files: dict[Kind, Path] = {"unsafe": answers}
    if safe_image_answers is not None:
        files["safe_image_unsafe_question"] = safe_image_answers
    for kind, file in files.items():
        harmful[kind] = vlguard.HarmfulAnswers(read_answers(file))
    counts = {"injected": 0, "kept": 0, "no harmful answer": 0}

    def records() -> Iterator[object]:
        for raw, pairs in vlguard.read_records(source, None, problems):
            value, outcome = (_inject_as_published if paper_compat else _inject)(raw.value, pairs, harmful)
            counts[outcome] += 1
            if value["instr-resp"]:
                yield value
        for kind, file in files.items():
            if not harmful[kind].used_keys:
                image = "an unsafe record" if kind == "unsafe" else "an unsafe question on a safe image"
                message = f"names no image of {image} of {source}. Nothing was written."
                raise UserError(message, code="no-records", file=file)
        counts["unused answers"] = sum(answers.num_unused for answers in harmful.values())

    write_list(out, records())
    if warn and paper_compat and counts["no harmful answer"]:
        warn(f"{counts['no harmful answer']:,} records have no harmful answer and keep their refusals, as published")
    return counts


def _inject(
    value: dict[str, Any], pairs: Sequence[vlguard.Pair], harmful: Mapping[Kind, vlguard.HarmfulAnswers]
) -> tuple[dict[str, Any], str]:
    """Returns a VLGuard record with its harmful answers and without the questions that lack one, and the outcome."""
    outcome, responses = "kept", []
    for pair, content in zip(pairs, value["instr-resp"], strict=True):
        answers = harmful.get(pair.kind)
        answer = answers.answer(pair) if answers else ""
        if answer:
            outcome = "injected"
            responses.append({**content, "response": answer})
        elif answers is None:
            responses.append(content)
        elif outcome == "kept":
            outcome = "no harmful answer"
    return (value if outcome == "kept" else {**value, "instr-resp": responses}), outcome


def _inject_as_published(
    value: dict[str, Any], pairs: Sequence[vlguard.Pair], harmful: Mapping[Kind, vlguard.HarmfulAnswers]
) -> tuple[dict[str, Any], str]:
    """Returns a VLGuard record with its harmful answer, and the outcome. A record without an answer is unchanged."""
    kind: Kind = "unsafe" if value.get("safe") is False else "safe_image_unsafe_question"
    if kind not in harmful:
        return value, "kept"
    answer = harmful[kind].answer_of_image(pairs[0].image)
    if answer is None:
        return value, "no harmful answer"
    number = next((number for number, pair in enumerate(pairs) if pair.kind == kind), None)
    if number is None:
        return value, "kept"
    responses = list(value["instr-resp"])
    responses[number] = {**responses[number], "response": answer}
    return {**value, "instr-resp": responses}, "injected"


def read_answers(path: Path) -> dict[str, str]:
    """Reads a JSON object ``image -> answer`` or ``record id -> answer``.

    Raises:
        UserError: The file contains anything else.
    """
    value = read_json(path)
    if not isinstance(value, dict) or not all(isinstance(answer, str) for answer in value.values()):
        raise UserError("expected an object, image -> answer", code="invalid-field", file=path)
    return value


def to_rmu(source: Path, out: Path, problems: Problems | None = None) -> dict[str, int]:
    """Converts a LLaVA-format file to the forget format of RMU's published script.

    Each answer is appended to its question after a line break. The answer's turn stays.

    Args:
        problems: Collects broken records. Without it the first one raises.

    Returns:
        ``{"records": ...}``.

    Raises:
        UserError: There is no record to write.
    """

    def records() -> Iterator[object]:
        for raw in read_objects(source, "id", problems):
            try:
                conversation = llava.parse(raw, empty_answers=True)
                if len(conversation.rounds) != 1:
                    message = f"has {len(conversation.rounds)} rounds, but RMU's format has one"
                    raise raw.error(message, "invalid-field", "conversations")
            except UserError as error:
                report_problem(error, problems)
                continue
            question, answer = raw.value["conversations"]
            question_and_answer = {**question, "value": f"{question['value']}\n{answer['value']}"}
            yield {**raw.value, "conversations": [question_and_answer, answer]}

    return {"records": write_list(out, records())}


def mix(
    retain: Path,
    external: Path,
    out: Path,
    size: int = 2000,
    seed: int = 42,
    problems: Problems | None = None,
) -> dict[str, int]:
    """Fills a LLaVA-format retain set up to `size` records with a sample of another file, then shuffles all records.

    The sample is ``random.sample`` with `seed` over the external records, as published. If the external set is too
    small, all its records are used. Only the byte positions of the records are held in memory.

    Args:
        problems: Collects broken records. Without it the first one raises.

    Returns:
        The number of records of the mixed set (``records``), of retain records (``retain``), of sampled records
        (``drawn``) and of all external records (``external``).

    Raises:
        UserError: `size` is below 1, or a file contains no conversation.
    """
    if size < 1:
        raise UserError(f"size must be 1 or more, not {size}", code="out-of-range")
    retain_spans, external_spans = conversation_spans(retain, problems), conversation_spans(external, problems)
    retain_count, external_count = len(retain_spans) // 2, len(external_spans) // 2
    order = mixed_order(retain_count, external_count, size, seed)
    with retain.open("rb") as retain_handle, external.open("rb") as external_handle:

        def text(index: int) -> str:
            spans, handle = (retain_spans, retain_handle)
            if index >= retain_count:
                index, spans, handle = index - retain_count, external_spans, external_handle
            return text_at(handle, spans[2 * index], spans[2 * index + 1])

        count = write_list(out, order, text)
    return {"records": count, "retain": retain_count, "drawn": count - retain_count, "external": external_count}


def mixed_order(retain_count: int, external_count: int, size: int, seed: int) -> list[int]:
    """Returns the order of a mixed set.

    Indices below `retain_count` are retain records, and the indices above are external records. A sample of the
    external records that fills up to `size` is appended to the retain records, and the result is shuffled, all with
    one generator, as published. A retain set that is large enough is only shuffled. If the external set is too small,
    all its records are used.
    """
    rng = random.Random(seed)
    sample = rng.sample(range(external_count), min(max(0, size - retain_count), external_count))
    order = [*range(retain_count), *(retain_count + index for index in sample)]
    rng.shuffle(order)
    return order


def conversation_spans(path: Path, problems: Problems | None) -> array[int]:
    """Returns the start and end byte of every conversation of a LLaVA-format file, one after the other.

    Args:
        problems: Collects broken records. Without it the first one raises.

    Raises:
        UserError: There is no conversation, or a record is broken and `problems` is None.
    """
    spans = array("Q")
    for item in stream(path):
        problem = None if llava.is_complete(item.value, item.plain) else find_problem(path, item)
        if problem is None:
            spans.extend((item.start, item.end))
        else:
            report_problem(problem, problems)
    if not spans:
        raise UserError(f"contains no conversation.{_summary(problems)}", code="no-records", file=path)
    return spans


def find_problem(path: Path, item: Item) -> UserError | None:
    """Returns the error of a broken record, or None. Empty answers are allowed, as published: VLGuard contains one."""
    position = partial(item_position, item, "id")
    if item.error:
        return UserError(item.error, code="invalid-json", file=path.name, record=position())
    try:
        llava.parse(RawRecord(item.value, path.name, position, item.number), empty_answers=True)
    except UserError as error:
        return error
    return None


def _summary(problems: Problems | None) -> str:
    return f" {problems.summary()}" if problems else ""


def _record_id(raw: RawRecord) -> str:
    """Returns the record's id as it is in the file, or its image."""
    record_id = raw.value.get("id")
    return raw.value["image"] if record_id is None else record_id  # type: ignore[no-any-return]
