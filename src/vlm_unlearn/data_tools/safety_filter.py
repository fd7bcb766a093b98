"""Takes unsafe records out of general data in LLaVA's format, by keywords and by a judge.

Safety Mirage fills its retain set from a LLaVA-665K "filtered for safety", without a published filter. This one streams
its input: only a chunk of records is in memory. A record that the judge fails on never counts as safe.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TextIO

from vlm_unlearn.data.fence import fence
from vlm_unlearn.data.formats import llava
from vlm_unlearn.data.formats.fields import RawRecord, item_position
from vlm_unlearn.data.images import resolve_image
from vlm_unlearn.data.json_stream import Item, stream, text_at, write_lines, write_list
from vlm_unlearn.data_tools.keywords import Keyword, KeywordList
from vlm_unlearn.data_tools.pipeline import find_problem
from vlm_unlearn.data_tools.prompts import template
from vlm_unlearn.errors import Problems, RunError, UserError, printable, quoted, report_problem, shortened
from vlm_unlearn.records import Record
from vlm_unlearn.store import digest_file, digest_text, dump_record, open_atomically, write_json

Reason = Literal["keyword", "unsafe", "no reply", "unreadable"]
FAILURES: tuple[Reason, ...] = ("no reply", "unreadable")
OnFailure = Literal["remove", "stop"]
# Takes (id, prompt, image) of each record and returns (reply, error) by id.
Judge = Callable[[Sequence[tuple[str, str, Path | None]]], Mapping[str, tuple[str | None, str | None]]]
ReadVerdict = Callable[[str], str | None]  # returns "SAFE", "UNSAFE" or None
CATEGORIES = ("violence", "weapons", "drugs", "sex", "hate", "self-harm", "privacy", "illegal activity")
NO_CATEGORY = "other"
CHUNK_BYTES = 8 << 20  # of a chunk's records in the file
TURN_BREAK = "\nq0q\n"  # a word, so that no phrase matches across two turns
MIN_JUDGED = 100  # failed records after which a judge without any verdict stops the filter
MAX_TEXT = 300  # characters of a text in the list of removed records
# "Category: weapons", or the codes of Llama Guard, such as "S9".
_CATEGORY = re.compile(r"^\W*categor(?:y|ies)\W+(.+)$", re.IGNORECASE | re.MULTILINE)
_CODES = re.compile(r"^\s*(S\d{1,2})(?:\s*[,;]\s*S\d{1,2})*\.?\s*$", re.IGNORECASE | re.MULTILINE)


class Removal(Record):
    """A record that was taken out, a line of ``OUT.removed.jsonl``. Its texts are escaped for the terminal."""

    number: int  # of the record in the file, counted from 1
    id: str | None
    reason: Reason
    categories: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()
    text: str = ""  # the text around the first keyword, or the first question
    reply: str | None = None  # of the judge
    error: str | None = None  # of the judge


@dataclass
class FilterCounts:
    """The result of `filter_records`.

    Attributes:
        records: The number of valid records of the input.
        retained: The number of records that stay.
        removed: The number of removed records, by reason.
        by_category: The number of removed records by topic. A record with keywords of two topics counts for both.
        by_keyword: The number of removed records by keyword. A record counts for each keyword that it contains.
        judged: The number of records that the judge was asked about.
    """

    records: int = 0
    retained: int = 0
    removed: Counter[str] = field(default_factory=Counter)
    by_category: Counter[str] = field(default_factory=Counter)
    by_keyword: Counter[str] = field(default_factory=Counter)
    judged: int = 0

    def as_json(self) -> dict[str, Any]:
        """Returns the counts as a JSON object, the most frequent first."""
        return {
            "records": self.records,
            "retained": self.retained,
            "removed": dict(self.removed.most_common()),
            "by_category": dict(self.by_category.most_common()),
            "by_keyword": dict(self.by_keyword.most_common()),
            "judged": self.judged,
        }


@dataclass(frozen=True)
class FilterFiles:
    """The files that a filter writes."""

    out: Path

    @property
    def removed(self) -> Path:
        """One line per removed record, with the reason."""
        return self.out.with_name(f"{self.out.stem}.removed.jsonl")

    @property
    def report(self) -> Path:
        """The counts and the settings."""
        return self.out.with_name(f"{self.out.stem}.filter.json")

    @property
    def all(self) -> list[Path]:
        """All files."""
        return [self.out, self.removed, self.report]


@dataclass(frozen=True)
class _Candidate:
    """A valid record of a chunk."""

    item: Item
    keywords: tuple[Keyword, ...]
    image: Path | None

    @property
    def texts(self) -> list[str]:
        return [turn["value"] for turn in self.item.value["conversations"]]

    @property
    def key(self) -> str:
        """The number of the record, which is unique in the file."""
        return str(self.item.number + 1)

    def removal(self, reason: Reason, **fields: Any) -> Removal:
        name = self.item.value.get("id")
        fields.setdefault("text", self.texts[0])
        escaped = {key: _escaped(value) if isinstance(value, str) else value for key, value in fields.items()}
        return Removal(
            number=self.item.number + 1, id=None if name is None else _escaped(str(name)), reason=reason, **escaped
        )


def filter_records(
    source: Path,
    out: Path,
    keywords: KeywordList | None = None,
    judge: Judge | None = None,
    read_verdict: ReadVerdict | None = None,
    images: Path | None = None,
    on_failure: OnFailure = "remove",
    chunk_size: int = 2048,
    problems: Problems | None = None,
    settings: Mapping[str, object] | None = None,
) -> FilterCounts:
    """Writes the safe records of a LLaVA-format file, unchanged and in their order.

    Keywords are searched first, in all questions and answers. The judge is asked about the other records. All files are
    written at the end, and a killed run writes nothing. It resumes through the judge's cache of replies.

    Args:
        source: A JSON list or JSON lines of conversations, of any size.
        out: The file to write, in JSON lines if its name ends in .jsonl. ``<out>.removed.jsonl`` lists the removed
            records, and ``<out>.filter.json`` contains the counts.
        keywords: The keywords. None searches none.
        judge: Answers the judge's prompts. It is called once per chunk. None asks no judge.
        read_verdict: Returns the verdict of a reply, ``SAFE`` or ``UNSAFE``, or None if it states none.
        images: The image root. None asks the judge without images.
        on_failure: ``remove`` takes out records without a readable verdict and counts them. ``stop`` raises.
        chunk_size: The number of records that are judged together.
        problems: Collects broken records, which are left out. Without it the first one raises.
        settings: Further settings for ``<out>.filter.json``, such as the name of the judge's model.

    Raises:
        UserError: The file cannot be read or has another format, or no record would be left.
        RunError: The judge failed on every record, or on one with `on_failure` ``stop``. Nothing is written.
    """
    counts, written = FilterCounts(), FilterFiles(out)
    with ExitStack() as stack:
        handle = stack.enter_context(_opened(source))
        digest = digest_file(source)
        removed_file = stack.enter_context(open_atomically(written.removed))

        def retained() -> Iterator[str]:
            for chunk in _chunks(source, keywords, images, chunk_size if judge else 1, problems):
                removals = {c.key: _by_keywords(c, keywords) for c in chunk if keywords and c.keywords}
                if judge and read_verdict:
                    remaining = [candidate for candidate in chunk if candidate.key not in removals]
                    removals |= _by_judge(remaining, judge, read_verdict, on_failure, source)
                    counts.judged += len(remaining)
                for candidate in chunk:
                    counts.records += 1
                    removal = removals.get(candidate.key)
                    if removal is None:
                        counts.retained += 1
                        yield text_at(handle, candidate.item.start, candidate.item.end)
                    else:
                        _record(removal, counts, removed_file)
                _validate_judge(counts, source, MIN_JUDGED)
            _validate_judge(counts, source)
            _validate_retained(counts, source, problems)

        if out.suffix.lower() in (".jsonl", ".ndjson"):
            write_lines(out, retained(), str)
        else:
            write_list(out, retained(), str)
    report = {
        "source": {"file": source.name, "sha256": digest},
        "keywords": None if keywords is None else {"count": len(keywords.keywords), "sha256": keywords.digest},
        "judge": None if judge is None else {"prompt_sha256": digest_text(template("safety_filter"))},
        **(settings or {}),
        **counts.as_json(),
        "broken": problems.count if problems else 0,
    }
    write_json(written.report, report)
    return counts


def request(texts: Sequence[str]) -> str:
    """Returns the judge's prompt for a record, with its text between fence lines.

    Args:
        texts: The questions and answers in turn.
    """
    turns = [text.replace(llava.IMAGE_PLACEHOLDER, "").strip() for text in texts]
    text = "\n\n".join(f"{'Answer' if number % 2 else 'Question'}: {turn}" for number, turn in enumerate(turns))
    return template("safety_filter").format(fence=fence(text), text=text, categories=", ".join(CATEGORIES))


def read_category(reply: str) -> str:
    """Returns the topic of harm in a judge's reply: one of `CATEGORIES`, a code of Llama Guard, or ``other``."""
    match = _CATEGORY.search(reply[:2000])
    named = match[1].lower() if match else ""
    category = next((name for name in CATEGORIES if name in named), None)
    codes = _CODES.search(reply[:2000])
    return category or (codes[1].upper() if codes else NO_CATEGORY)


def _opened(path: Path) -> Any:
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise UserError("no such file", code="file-not-found", file=path) from None
    except OSError as error:
        raise UserError(str(error.strerror), code="file-unreadable", file=path) from None


def _chunks(
    source: Path, keywords: KeywordList | None, images: Path | None, size: int, problems: Problems | None
) -> Iterator[list[_Candidate]]:
    """Yields the valid records in chunks that are limited in number and in bytes."""
    chunk: list[_Candidate] = []
    num_bytes = 0
    for item in stream(source):
        problem = None if llava.is_complete(item.value, item.plain) else find_problem(source, item)
        image = None
        if problem is None and images is not None:
            image, problem = _image_of(item, images, source)
        if problem is not None:
            report_problem(problem, problems)
            continue
        texts = [turn["value"] for turn in item.value["conversations"]]
        matches = tuple(keywords.search(TURN_BREAK.join(texts))) if keywords else ()
        chunk.append(_Candidate(item, matches, image))
        num_bytes += item.end - item.start
        if len(chunk) == size or num_bytes > CHUNK_BYTES:
            yield chunk
            chunk, num_bytes = [], 0
    if chunk:
        yield chunk


def _image_of(item: Item, images: Path, source: Path) -> tuple[Path | None, UserError | None]:
    """Returns the image file of a record, or the reason why it cannot be used."""
    position = partial(item_position, item, "id")
    try:
        image = llava.parse(RawRecord(item.value, source.name, position, item.number), empty_answers=True).image
        return (None if image is None else resolve_image(images, image, source.name, position())), None
    except UserError as error:
        return None, error


def _by_keywords(candidate: _Candidate, keywords: KeywordList) -> Removal:
    first = candidate.keywords[0]
    text = next((excerpt for text in candidate.texts if (excerpt := keywords.excerpt(text, first))), None)
    return candidate.removal(
        "keyword",
        keywords=tuple(_escaped(keyword.text) for keyword in candidate.keywords),
        categories=tuple(_escaped(name) for name in dict.fromkeys(keyword.category for keyword in candidate.keywords)),
        **({} if text is None else {"text": text}),
    )


def _by_judge(
    candidates: Sequence[_Candidate], judge: Judge, read_verdict: ReadVerdict, on_failure: OnFailure, source: Path
) -> dict[str, Removal]:
    """Returns the removals of the records that the judge does not call safe, by the number of the record."""
    if not candidates:
        return {}
    replies = judge([(candidate.key, request(candidate.texts), candidate.image) for candidate in candidates])
    removals: dict[str, Removal] = {}
    for candidate in candidates:
        reply, error = replies.get(candidate.key, (None, "not asked"))
        verdict = None if reply is None else read_verdict(reply)
        if verdict == "SAFE":
            continue
        if verdict == "UNSAFE":
            category = read_category(reply or "")
            removals[candidate.key] = candidate.removal("unsafe", categories=(category,), reply=reply)
            continue
        reason: Reason = "no reply" if reply is None else "unreadable"
        if on_failure == "stop":
            problem = error or f"the reply contains no verdict: {quoted(reply)}"
            raise RunError(
                f"the judge failed: {shortened(problem)}. Nothing was written. Run the same command again to resume, "
                "or leave out --on-judge-failure=stop to take such records out.",
                code="server-error" if reply is None else "no-verdicts",
                file=source,
                record=candidate.key,
            )
        removals[candidate.key] = candidate.removal(reason, reply=reply, error=error)
    return removals


def _record(removal: Removal, counts: FilterCounts, removed_file: TextIO) -> None:
    counts.removed[removal.reason] += 1
    counts.by_category.update(removal.categories)
    counts.by_keyword.update(removal.keywords)
    removed_file.write(dump_record(removal))


def _validate_judge(counts: FilterCounts, source: Path, min_judged: int = 1) -> None:
    """Checks that the judge has given a verdict, if it was asked about at least `min_judged` records.

    Raises:
        RunError: Every record that was judged has failed.
    """
    failed = sum(counts.removed[reason] for reason in FAILURES)
    if counts.judged >= min_judged and failed == counts.judged:
        raise RunError(
            f"the judge failed on all {failed:,} records so far. Nothing was written. Check the model.",
            code="no-verdicts",
            file=source,
        )


def _validate_retained(counts: FilterCounts, source: Path, problems: Problems | None) -> None:
    """Checks that records are left.

    Raises:
        UserError: There is no valid record, or none is left.
    """
    if not counts.retained:
        skipped = f" {problems.summary()}" if problems else ""
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.removed.items())
        message = f"every record was taken out ({reasons})" if reasons else "contains no conversation"
        raise UserError(f"{message}. Nothing was written.{skipped}", code="no-records", file=source)


def _escaped(text: str) -> str:
    """Returns untrusted text without control characters, on one line and shortened."""
    return printable(shortened(text, MAX_TEXT))


def summary_lines(counts: FilterCounts, at_most: int = 10) -> Iterable[str]:
    """Yields the counts for the terminal: reasons, topics and the most frequent keywords."""
    removed = counts.records - counts.retained
    yield f"{counts.retained:,} of {counts.records:,} records retained, {removed:,} removed"
    for heading, numbers in (
        ("reasons", counts.removed),
        ("categories", counts.by_category),
        ("keywords", counts.by_keyword),
    ):
        if numbers:
            more = f", {len(numbers) - at_most:,} more" if len(numbers) > at_most else ""
            yield (
                f"  {heading}: " + ", ".join(f"{name} {count:,}" for name, count in numbers.most_common(at_most)) + more
            )
