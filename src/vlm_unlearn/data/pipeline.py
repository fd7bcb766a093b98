"""Safety Mirage's data steps, file to file, same seeds and same records as its published scripts (REFERENCE: VLGuard pipeline).

Every step streams its input and writes a LLaVA-format list (`inject` a VLGuard one), atomically.
"""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from vlm_unlearn.data.formats import llava, table, vlguard
from vlm_unlearn.data.formats.fields import RawRecord, item_position, read_objects
from vlm_unlearn.data.formats.table import Columns
from vlm_unlearn.data.json_stream import Item, stream, text_at, write_list
from vlm_unlearn.data.readers import detect, read_any
from vlm_unlearn.errors import Problems, UserError, report_problem
from vlm_unlearn.store import read_json


def convert(
    source: Path,
    out: Path,
    seed: int = 0,
    columns: Columns | None = None,
    problems: Problems | None = None,
    warn: Callable[[str], None] | None = None,
) -> dict[str, int]:
    """Any supported file in LLaVA's format, or as a table where `out` ends in .jsonl, .csv or .tsv.

    A VLGuard record becomes one conversation; the two rounds of a safe image come in an order drawn with `seed`, one generator
    for the file, as published.

    LLaVA's format has no field for sets, categories and pairs; a table has.

    Args:
        warn: takes what the user should know of the result.

    Returns:
        ``{"records": ..., "turns": ...}``.
    """
    if table.suffix(out) in (".jsonl", *table.SEPARATORS):
        rows = (table.Row(entry.example, entry.set or None) for entry in read_any(source, None, columns, problems))
        count = table.write_table(out, rows, problems)
        return {"records": count, "turns": 2 * count}
    if table.suffix(out) != ".json":
        raise UserError(f"{out}: name a file that ends in .json (LLaVA), .jsonl, .csv or .tsv (tables)")
    records = (
        _conversations(source, seed, problems)
        if detect(source) == "vlguard"
        else _written(source, columns, problems, warn)
    )
    turns = 0

    def counted() -> Iterator[dict[str, Any]]:
        nonlocal turns
        for record in records:
            turns += len(record["conversations"])
            yield record

    return {"records": write_list(out, counted()), "turns": turns}


def _written(
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
        mixed = ", ".join(f"{name or 'of no set'} {count}" for name, count in sets.items())
        warn(f"the sets {mixed} are mixed in one file: LLaVA's format has no field for them; .jsonl and .csv keep them")


def _conversations(source: Path, seed: int, problems: Problems | None) -> Iterator[dict[str, Any]]:
    rng = random.Random(seed)
    for raw, pairs in vlguard.read_records(source, None, problems):
        rounds = [(pair.question, pair.response) for pair in pairs]
        if len(rounds) == 2:
            rng.shuffle(rounds)
        yield llava.record(_id(raw), pairs[0].image, rounds)


def split(
    source: Path, out: Path, include_safe_image_unsafe: bool = False, problems: Problems | None = None
) -> dict[str, int]:
    """A VLGuard file as ``forget.json`` (unsafe images) and ``retain.json`` (safe questions).

    Args:
        include_safe_image_unsafe: unsafe questions on safe images join forget.
    """
    kinds = {
        "forget": {"unsafe"} | ({"safe_image_unsafe_question"} if include_safe_image_unsafe else set()),
        "retain": {"safe"},
    }

    def records(name: str) -> Iterator[dict[str, Any]]:
        for raw, found in vlguard.read_records(source, None, Problems()):
            for pair in found:
                if pair.kind in kinds[name]:
                    yield llava.record(_id(raw), pair.image, [(pair.question, pair.response)])

    # Once through the whole file to list what is broken and see that no set is empty, then once for each set: nothing is held.
    there = {pair.kind for _, found in vlguard.read_records(source, None, problems) for pair in found}
    for name, wanted in kinds.items():
        if not wanted & there:
            why = f"; {problems.summary()}" if problems else ""
            raise UserError(f"{source}: gives no {name} record; nothing was written{why}")
    return {name: write_list(out / f"{name}.json", records(name)) for name in kinds}


def inject(source: Path, answers: Path, out: Path, problems: Problems | None = None) -> dict[str, int]:
    """A VLGuard file with chosen harmful answers (``image -> answer``) in place of the responses to unsafe images.

    A record whose image has no answer is left out with a count: its refusal is nothing to unlearn. Answers whose image no unsafe
    record names are counted too.
    """
    chosen = read_answers(answers)
    counts = {"injected": 0, "kept": 0, "no harmful answer": 0}
    used: set[str] = set()

    def records() -> Iterator[object]:
        for raw, pairs in vlguard.read_records(source, None, problems):
            if pairs[0].kind != "unsafe":
                counts["kept"] += 1
                yield raw.value
            elif chosen.get(pairs[0].image, "").strip():
                counts["injected"] += 1
                used.add(pairs[0].image)
                answered = [{**pair, "response": chosen[pairs[0].image]} for pair in raw.value["instr-resp"]]
                yield {**raw.value, "instr-resp": answered}
            else:
                counts["no harmful answer"] += 1
        counts["unused answers"] = len(chosen.keys() - used)
        if not counts["injected"]:
            raise UserError(f"{answers}: names no image of an unsafe record of {source}; nothing was written")

    write_list(out, records())
    return counts


def read_answers(path: Path) -> dict[str, str]:
    """A file ``image -> answer``."""
    value = read_json(path)
    if not isinstance(value, dict) or not all(isinstance(answer, str) for answer in value.values()):
        raise UserError(f"{path}: expected an object, image -> answer")
    return value


def to_rmu(source: Path, out: Path, problems: Problems | None = None) -> dict[str, int]:
    """LLaVA's format with each answer appended to its question, a line break between (RMU's forget side); the gpt turn stays."""

    def records() -> Iterator[object]:
        for raw in read_objects(source, "id", problems):
            try:
                conversation = llava.parse(raw, empty_answers=True)
                if len(conversation.rounds) != 1:
                    raise UserError(f"{raw.where}: {len(conversation.rounds)} rounds; RMU's format has one")
            except UserError as error:
                report_problem(error, problems)
                continue
            asked, answered = raw.value["conversations"]
            yield {
                **raw.value,
                "conversations": [{**asked, "value": f"{asked['value']}\n{answered['value']}"}, answered],
            }

    return {"records": write_list(out, records())}


def mix(
    retain: Path,
    external: Path,
    out: Path,
    size: int = 2000,
    seed: int = 42,
    problems: Problems | None = None,
) -> dict[str, int]:
    """Fills a LLaVA-format retain set up to `size` with a draw from another, then shuffles the whole.

    The draw is ``random.sample`` with `seed` over the external records, as published; of a file of any size only the places
    of its records are held in memory. An external set that is too small is used whole.
    """
    if size < 1:
        raise UserError(f"size must be 1 or more, not {size}")
    kept, offered = conversation_spans(retain, problems), conversation_spans(external, problems)
    own, others = len(kept) // 2, len(offered) // 2
    order = mixed_order(own, others, size, seed)
    with retain.open("rb") as first, external.open("rb") as second:

        def text(index: int) -> str:
            known, handle, place = (kept, first, index) if index < own else (offered, second, index - own)
            return text_at(handle, known[2 * place], known[2 * place + 1])

        count = write_list(out, order, text)
    return {"records": count, "retain": own, "drawn": count - own, "external": others}


def mixed_order(own: int, others: int, size: int, seed: int) -> list[int]:
    """The order of a mixed set: indices below `own` are the retain set's, those above the external set's.

    A sample of the external records fills up to `size`, appended, the whole shuffled, all with one generator, as published. A
    retain set that is large enough already is only shuffled; an external set that is too small is used whole.
    """
    rng = random.Random(seed)
    drawn = rng.sample(range(others), min(max(0, size - own), others))
    order = [*range(own), *(own + index for index in drawn)]
    rng.shuffle(order)
    return order


def conversation_spans(path: Path, problems: Problems | None) -> array[int]:
    """Start and end byte of every record that is a conversation.

    Raises:
        UserError: there is none, or a record is broken and `problems` is None.
    """
    found = array("Q")
    for item in stream(path):
        problem = None if llava.is_complete(item.value, item.plain) else _problem(path, item)
        if problem is None:
            found.extend((item.start, item.end))
        else:
            report_problem(problem, problems)
    if not found:
        raise UserError(f"{path}: holds no conversation" + (f"; {problems.messages[0]}" if problems else ""))
    return found


def _problem(path: Path, item: Item) -> UserError | None:
    """What is wrong with a record, if anything."""
    position = partial(item_position, item, "id")
    if item.error:
        return UserError(item.error, code="invalid-json", file=path.name, record=position())
    try:
        llava.parse(RawRecord(item.value, path.name, position, item.number), empty_answers=True)  # as published: VLGuard has one
    except UserError as error:
        return error
    return None


def _id(raw: RawRecord) -> str:
    """The record's id as the file has it."""
    found = raw.value.get("id")
    return raw.value["image"] if found is None else found  # type: ignore[no-any-return]
