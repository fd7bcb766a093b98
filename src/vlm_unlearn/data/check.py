"""Is a training set whole? Images that can't be used, duplicates, leakage between sets, records over the length limit."""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_unlearn.data.formats.table import Columns
from vlm_unlearn.data.images import image_size, open_image, resolve_image
from vlm_unlearn.data.near import NearQuestions, difference_hash, near_images, normalised
from vlm_unlearn.data.parallel import in_threads
from vlm_unlearn.data.reading import Entry, detect, image_roots, read_any
from vlm_unlearn.data.training_set import describe
from vlm_unlearn.errors import Problems, RequestError, shown
from vlm_unlearn.records import Example
from vlm_unlearn.store import digest_file

LISTED = 20  # examples named for each finding
OnDone = Callable[[str, int, int], None]  # stage, done, all (0: unknown)
TokenCount = Callable[[Example, Path | None], tuple[int, int]]  # tokens up to the first answer, tokens in all


@dataclass(frozen=True)
class Source:
    """A file or training-set folder to check, with the root of its images."""

    path: str | Path
    images: Path | None = None
    against: bool = False  # another file that the first is compared with, such as a test set


@dataclass
class _Questions:
    """One entry a question, in columns: 17 bytes each, so that millions fit."""

    text: array[int] = field(default_factory=lambda: array("Q"))  # digest of the normalised question
    image: array[int] = field(default_factory=lambda: array("i"))  # index of the image, -1 without one
    set: array[int] = field(default_factory=lambda: array("B"))
    record: array[int] = field(default_factory=lambda: array("I"))  # place of the example in its set


@dataclass
class _Images:
    """One entry an image path."""

    paths: list[str] = field(default_factory=list)
    indices: dict[int, int] = field(default_factory=dict)
    content: dict[int, bytes] = field(default_factory=dict)  # digest of the bytes; missing for an image that can't be used
    hashes: dict[int, int] = field(default_factory=dict)
    sizes: Counter[str] = field(default_factory=Counter)


class Checker:
    """Collects what a check needs, file after file, then reports. Memory: about 20 bytes a question, 100 an example, 300 an image."""

    def __init__(self, look_at_images: bool = True, columns: Columns | None = None, on_done: OnDone | None = None) -> None:
        self.problems = Problems()
        self._look = look_at_images
        self._columns = columns
        self._on_done = on_done or (lambda stage, done, total: None)
        self._sources: list[Source] = []
        self._sets: dict[str, int] = {}
        self._names: dict[tuple[int, str], str] = {}  # place of the source, set of the entry -> name of the set
        self._records: Counter[str] = Counter()
        self._text_only: Counter[str] = Counter()
        self._ids: dict[str, list[str]] = {}
        self._checked: set[str] = set()  # the sets of what is checked, not of what it is checked against
        self._questions = _Questions()
        self._images = _Images()
        self._lengths: dict[str, array[int]] = {}
        self._too_long: dict[str, list[str]] = {"question": [], "answer": []}
        self._too_long_count: Counter[str] = Counter()

    def add(self, source: Source, count_tokens: TokenCount | None = None, max_length: int = 0) -> None:
        """Reads one file, and looks at every image of it that was not seen before: that it is there, is one, and decodes.

        Args:
            count_tokens: tells an example's length under a processor.
            max_length: the length limit that `count_tokens` is compared with.

        Raises:
            RequestError: the file can't be read at all.
        """
        self._sources.append(source)
        roots = image_roots(source.path, source.images)
        if detect(source.path) == "training_set":
            self._compare_with_description(Path(source.path))
        work = self._new_images(source, roots, count_tokens, max_length)
        for (index, _, named), found in (
            in_threads(lambda key: _look(key[1], key[2]), work) if self._look else ((key, None) for key in work)
        ):
            if isinstance(found, str):
                self.problems.add(f"{named[1]}: {found}")
            elif found is not None:
                self._images.content[index], self._images.hashes[index], size = found
                self._images.sizes[size] += 1
        if not any(place == len(self._sources) - 1 for place, _ in self._names):
            self.problems.add(f"{source.path}: holds no record that can be read")

    def _new_images(
        self, source: Source, roots: Mapping[str, Path], count_tokens: TokenCount | None, max_length: int
    ) -> Iterator[tuple[int, Path, tuple[str, str]]]:
        """Takes note of every question, and yields each image at its first sight: index, root, (path, place)."""
        for done, (name, entry) in enumerate(self._entries(len(self._sources) - 1, self.problems)):
            example = entry.example
            number = self._records[name]
            self._records[name] += 1
            self._ids.setdefault(name, []).append(example.id)
            index = -1
            if example.image is None:
                self._text_only[name] += 1
            else:
                key = hash((roots.get(example.source), example.image))
                index = self._images.indices.setdefault(key, len(self._images.paths))
            for question in [*(turn.question for turn in example.history), example.question]:
                self._questions.text.append(_digest(normalised(question)))
                self._questions.image.append(index)
                self._questions.set.append(self._sets[name])
                self._questions.record.append(number)
            place = self._place(name, number)
            if not example.question.strip() or not example.answer.strip():
                self.problems.add(f"{place}: {'the question' if example.answer.strip() else 'the answer'} is empty")
            if index == len(self._images.paths) and example.image is not None:
                self._images.paths.append(example.image)
                if example.source in roots:
                    yield index, roots[example.source], (example.image, place)
                elif example.source == "embedded":
                    self.problems.add(f"{place}: its image is inside the table; `data import files` unpacks it, then check the folder")
                else:
                    self.problems.add(f"{place}: dataset.json names no image folder for source {shown(example.source)}")
            if count_tokens:
                self._measure(name, place, example, roots, count_tokens, max_length)
            if done % 500 == 0:
                self._on_done("records", done, 0)

    def _entries(self, place: int, problems: Problems) -> Iterator[tuple[str, Entry]]:
        """The entries of a source, each with the name of its set; names are given at their first sight."""
        source = self._sources[place]
        for entry in read_any(source.path, None, self._columns, problems):
            if (place, entry.set) not in self._names:
                self._name_set(place, source, entry.set)
            yield self._names[place, entry.set], entry

    def _name_set(self, place: int, source: Source, of_entry: str) -> None:
        """``forget``; ``test:forget`` for another file; a file without sets goes by its own name; ``test#2`` for a second of that name."""
        stem = Path(source.path).stem
        name = wanted = (f"{stem}:{of_entry}" if of_entry else stem) if source.against else of_entry or stem
        number = 1
        while name in self._sets:
            number += 1
            name = f"{wanted}#{number}"
        if len(self._sets) == 255:
            raise RequestError("more than 255 sets")
        self._sets[name] = len(self._sets)
        self._names[place, of_entry] = name
        if not source.against:
            self._checked.add(name)

    def _compare_with_description(self, folder: Path) -> None:
        """Each file of a training set is the one that its dataset.json describes."""
        for name, described in describe(folder)[1].items():
            path = folder / name
            if not path.is_file():
                self.problems.add(f"{path}: is missing; dataset.json lists it")
            elif digest_file(path) != described.get("sha256"):
                self.problems.add(f"{path}: was changed since dataset.json was written; import the set again")

    def _measure(
        self, name: str, place: str, example: Example, roots: Mapping[str, Path], count_tokens: TokenCount, max_length: int
    ) -> None:
        path = None
        if example.image is not None:
            try:
                path = resolve_image(roots[example.source], example.image, place)
                image_size(path)
            except (KeyError, RequestError):
                return  # the image's own check says so
        try:
            asked, whole = count_tokens(example, path)
        except RequestError as error:
            self.problems.add(f"{place}: {error}")
            return
        self._lengths.setdefault(name, array("I")).append(whole)
        what = "question" if asked >= max_length else "answer" if whole > max_length else ""
        if what:
            self._too_long_count[what] += 1
            if len(self._too_long[what]) < LISTED:
                self._too_long[what].append(f"{place}: {asked if what == 'question' else whole} tokens")

    def report(self) -> dict[str, Any]:
        """Everything found, as JSON. `errors` can't be trained on or contradict each other; `warnings` are for a person to judge."""
        names = list(self._sets)
        content, images = self._by_content()
        pairs = [pair for pair in itertools.combinations(names, 2) if self._checked & set(pair)]
        leaks = [found for one, other in pairs for found in self._leaks(one, other, content, images)]
        doubled = self._doubled(content)
        same_images = Counter(self._images.content.values())
        report: dict[str, Any] = {
            "sets": {name: self._describe(name) for name in names},
            "images": {
                "distinct_paths": len(self._images.paths),
                "usable": len(self._images.content) if self._look else None,
                "distinct_contents": len(same_images) if self._look else None,
                "sizes": dict(self._images.sizes.most_common(LISTED)),
                "same_content": self._same_content(same_images),
            },
            "doubled_ids": {name: self._doubled_ids(name) for name in names},
            "doubled_questions": doubled,
            "leakage": leaks,
            "lengths": {name: _quantiles(values) for name, values in self._lengths.items()},
            "too_long": {what: {"count": self._too_long_count[what], "first": found} for what, found in self._too_long.items()},
            "broken": {"count": self.problems.count, "first": self.problems.messages[:LISTED]},
        }
        report["errors"], report["warnings"] = self._judge(report)
        return report

    def _place(self, name: str, number: int) -> str:
        return f"{name}: {shown(self._ids[name][number])}"

    def _describe(self, name: str) -> dict[str, int]:
        chosen = np.frombuffer(self._questions.set, dtype=np.uint8) == self._sets[name]
        return {
            "records": self._records[name],
            "questions": int(chosen.sum()),
            "distinct_questions": len(np.unique(np.frombuffer(self._questions.text, dtype=np.uint64)[chosen])),
            "text_only": self._text_only[name],
        }

    def _by_content(self) -> tuple[NDArray[np.int64], dict[str, NDArray[np.int64]]]:
        """A number for the content behind each question (-1 without image), and the images of each set."""
        numbers: dict[bytes, int] = {}
        of_image = np.arange(len(self._images.paths), dtype=np.int64) + len(self._images.paths)
        for index, digest in self._images.content.items():
            of_image[index] = numbers.setdefault(digest, len(numbers))
        image = np.frombuffer(self._questions.image, dtype=np.int32).astype(np.int64)
        sets = np.frombuffer(self._questions.set, dtype=np.uint8)
        content = np.where(image < 0, -1, of_image[image] if len(of_image) else -1)
        members = {name: np.unique(image[(sets == number) & (image >= 0)]) for name, number in self._sets.items()}
        return content, members

    def _same_content(self, counts: Counter[bytes]) -> dict[str, Any]:
        """Paths that hold the same bytes."""
        doubled = {digest for digest, count in counts.items() if count > 1}
        groups: dict[bytes, list[str]] = {}
        for index, digest in self._images.content.items():
            if digest in doubled and (digest in groups or len(groups) < LISTED):
                groups.setdefault(digest, []).append(self._images.paths[index])
        extra = sum(counts[digest] - 1 for digest in doubled)
        return {"count": extra, "first": [paths[:LISTED] for paths in groups.values()]}

    def _doubled(self, content: NDArray[np.int64]) -> dict[str, Any]:
        """Questions asked twice of the same image within a set."""
        found: dict[str, Any] = {}
        for name, number in self._sets.items():
            chosen = np.flatnonzero(np.frombuffer(self._questions.set, dtype=np.uint8) == number)
            pairs = self._pairs(content, chosen)
            _, first, counts = np.unique(pairs, return_index=True, return_counts=True)
            again = first[counts > 1]
            records = np.frombuffer(self._questions.record, dtype=np.uint32)[chosen[again]]
            found[name] = {"count": int((counts - 1).sum()), "first": [self._place(name, record) for record in records[:LISTED]]}
        return found

    def _doubled_ids(self, name: str) -> int:
        """Within a training set, where ids must differ; in the files that sets are made of they may repeat."""
        places = {place for (place, _), known in self._names.items() if known == name}
        if not any(detect(self._sources[place].path) == "training_set" for place in places):
            return 0
        return len(self._ids[name]) - len(set(self._ids[name]))

    def _pairs(self, content: NDArray[np.int64], chosen: NDArray[np.intp]) -> NDArray[np.uint64]:
        """One number for image content and question together."""
        text = np.frombuffer(self._questions.text, dtype=np.uint64)[chosen]
        mixed = (content[chosen].astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        return text ^ mixed

    def _leaks(self, one: str, other: str, content: NDArray[np.int64], images: Mapping[str, NDArray[np.int64]]) -> Iterator[dict[str, Any]]:
        """What two sets share: the same question on the same image, the same question, the same image, and nearly so."""
        sets = np.frombuffer(self._questions.set, dtype=np.uint8)
        text = np.frombuffer(self._questions.text, dtype=np.uint64)
        records = np.frombuffer(self._questions.record, dtype=np.uint32)
        first, second = (np.flatnonzero(sets == self._sets[name]) for name in (one, other))

        def shared(what: str, left: NDArray[Any], right: NDArray[Any]) -> dict[str, Any]:
            _, at_left, at_right = np.intersect1d(left, right, return_indices=True)
            named = [
                f"{self._place(one, records[first[i]])} = {self._place(other, records[second[j]])}"
                for i, j in zip(at_left, at_right, strict=True)
            ]
            return {"sets": [one, other], "what": what, "count": len(named), "first": named[:LISTED]}

        pictured = content[first] >= 0, content[second] >= 0
        yield shared("same question, same image", self._pairs(content, first), self._pairs(content, second))
        yield shared("same question", text[first], text[second])
        left, right = (
            np.where(seen, content[chosen], -1 - side) for side, (seen, chosen) in enumerate(zip(pictured, (first, second), strict=True))
        )
        yield shared("same image", left, right)
        if self._look:
            yield self._near_images(one, other, images)
        yield self._near_questions(one, other)

    def _near_images(self, one: str, other: str, images: Mapping[str, NDArray[np.int64]]) -> dict[str, Any]:
        hashes = np.zeros(max(1, len(self._images.paths)), dtype=np.uint64)
        for index, value in self._images.hashes.items():
            hashes[index] = value
        members = {name: [index for index in images[name].tolist() if index in self._images.hashes] for name in (one, other)}
        count = 0
        listed: list[str] = []
        for left, right in near_images(hashes, members, one, other):
            if self._images.content[left] != self._images.content[right]:
                count += 1
                if len(listed) < LISTED:
                    listed.append(f"{one}: {self._images.paths[left]} ~ {other}: {self._images.paths[right]}")
        return {"sets": [one, other], "what": "near image", "count": count, "first": listed}

    def _near_questions(self, one: str, other: str) -> dict[str, Any]:
        """Distinct questions of the larger set that are near, but not equal to, one of the smaller."""
        small, large = sorted((one, other), key=lambda name: self._records[name])
        index = NearQuestions()
        known: set[int] = set()
        index.add(self._texts(small, known))
        count = 0
        listed: list[str] = []
        for left, right in index.matches(self._texts(large, known, f"near questions: {large}, {small}")):
            count += 1
            if len(listed) < LISTED:
                listed.append(f"{self._place(large, left)} ~ {self._place(small, right)}")
        return {"sets": [one, other], "what": "near question", "count": count, "first": listed}

    def _texts(self, name: str, known: set[int], stage: str = "") -> Iterator[tuple[int, str]]:
        """The questions of a set whose digest isn't known yet, read from the file again: texts are never all in memory."""
        number = -1
        place = next(place for (place, _), known_name in self._names.items() if known_name == name)
        for found, entry in self._entries(place, Problems()):
            if found != name:
                continue
            number += 1
            if stage and number % 500 == 0:
                self._on_done(stage, number, self._records[name])
            for question in [*(turn.question for turn in entry.example.history), entry.example.question]:
                text = normalised(question)
                digest = _digest(text)
                if digest not in known:
                    known.add(digest)
                    yield number, text

    def _judge(self, report: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        errors, warnings = [], []
        if self.problems:
            errors.append(f"{self.problems.count:,} broken records or images")
        if self._too_long_count["question"]:
            errors.append(f"{self._too_long_count['question']:,} questions over the length limit: they leave no room for an answer")
        if self._too_long_count["answer"]:
            warnings.append(f"{self._too_long_count['answer']:,} answers are cut at the length limit")
        for name, count in report["doubled_ids"].items():
            if count:
                errors.append(f"{count:,} ids of {name} are there twice")
        for name, doubled in report["doubled_questions"].items():
            if doubled["count"]:
                warnings.append(f"{doubled['count']:,} questions of {name} are asked twice of the same image, or both without one")
        for leak in report["leakage"]:
            one, other = leak["sets"]
            if not leak["count"] or _by_design(leak):
                continue
            line = f"{leak['count']:,} x {leak['what']} in {one} and {other}"
            contradicts = leak["what"] == "same question, same image" and {one, other} == {"forget", "retain"}
            (errors if contradicts else warnings).append(line)
        return errors, warnings


def _by_design(leak: Mapping[str, Any]) -> bool:
    """SafeEraser retains harmless questions on the forget images, and its decouple questions are the forget questions."""
    sets, what = set(leak["sets"]), leak["what"]
    return (sets == {"forget", "retain"} and what == "same image") or (sets == {"forget", "decouple"} and what.endswith("question"))


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big")


def _look(root: Path, named: tuple[str, str]) -> tuple[bytes, int, str] | str:
    """Digest, difference hash and size of an image, or what is wrong with it."""
    try:
        path = resolve_image(root, named[0], "")
        with open_image(path) as image:
            size = f"{image.width}x{image.height}"
            hashed = difference_hash(image)
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, lambda: hashlib.blake2b(digest_size=16)).digest(), hashed, size
    except RequestError as error:
        return str(error).removeprefix(": ")
    except OSError as error:
        return f"{named[0]}: {error.strerror}"


def _quantiles(values: Sequence[int]) -> dict[str, int]:
    found = np.quantile(np.asarray(values), (0, 0.5, 0.9, 0.99, 1), method="nearest")
    return dict(zip(("min", "median", "p90", "p99", "max"), (int(value) for value in found), strict=True))
