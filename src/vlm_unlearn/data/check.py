"""Is a training set whole? Images that can't be used, duplicates, leakage between sets, records over the length limit."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_unlearn.data.collector import LISTED, Collector, DataSource, TokenCount, digest_question
from vlm_unlearn.data.near_duplicates import NearQuestions, near_images, normalize_question
from vlm_unlearn.data.readers import detect
from vlm_unlearn.errors import Problems

__all__ = ["Checker", "DataSource", "TokenCount"]


class Checker(Collector):
    """Takes in files with `add`, then tells what it found with `report`."""

    def report(self) -> dict[str, Any]:
        """Everything found, as JSON. `errors` can't be trained on or contradict each other; `warnings` are for a person to judge."""
        names = list(self._sets)
        content, images = self._by_content()
        pairs = [pair for pair in itertools.combinations(names, 2) if self._checked & set(pair)]
        leaks = [found for one, other in pairs for found in self._leaks(one, other, content, images)]
        for leak in leaks:
            leak["by_design"] = _by_design(leak)
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
            "too_long": {
                what: {"count": self._too_long_count[what], "first": found} for what, found in self._too_long.items()
            },
            "broken": {"count": self.problems.count, "first": self.problems.messages[:LISTED]},
        }
        report["errors"], report["warnings"] = self._judge(report)
        return report

    def _describe(self, name: str) -> dict[str, int]:
        chosen = np.frombuffer(self._questions.set, dtype=np.uint8) == self._sets[name]
        return {
            "records": len(self._ids[name]),
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
            found[name] = {
                "count": int((counts - 1).sum()),
                "first": [self._place(name, record) for record in records[:LISTED]],
            }
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

    def _leaks(
        self, one: str, other: str, content: NDArray[np.int64], images: Mapping[str, NDArray[np.int64]]
    ) -> Iterator[dict[str, Any]]:
        """What two sets share: the same question on the same image, the same question, the same image, and nearly so."""
        sets = np.frombuffer(self._questions.set, dtype=np.uint8)
        text = np.frombuffer(self._questions.text, dtype=np.uint64)
        records = np.frombuffer(self._questions.record, dtype=np.uint32)
        first, second = (np.flatnonzero(sets == self._sets[name]) for name in (one, other))

        def shared(what: str, left: NDArray[Any], right: NDArray[Any]) -> dict[str, Any]:
            _, at_left, at_right = np.intersect1d(left, right, return_indices=True)
            named = [
                f"{self._place(one, records[first[i]])} = {self._place(other, records[second[j]])}"
                for i, j in zip(at_left[:LISTED], at_right[:LISTED], strict=True)
            ]
            return {"sets": [one, other], "what": what, "count": len(at_left), "first": named}

        pictured = content[first] >= 0, content[second] >= 0
        yield shared("same question, same image", self._pairs(content, first), self._pairs(content, second))
        yield shared("same question", text[first], text[second])
        left, right = (
            np.where(seen, content[chosen], -1 - side)
            for side, (seen, chosen) in enumerate(zip(pictured, (first, second), strict=True))
        )
        yield shared("same image", left, right)
        if self._look:
            yield self._near_images(one, other, images)
        yield self._near_questions(one, other)

    def _near_images(self, one: str, other: str, images: Mapping[str, NDArray[np.int64]]) -> dict[str, Any]:
        hashes = np.zeros(max(1, len(self._images.paths)), dtype=np.uint64)
        for index, value in self._images.hashes.items():
            hashes[index] = value
        members = {
            name: [index for index in images[name].tolist() if index in self._images.hashes] for name in (one, other)
        }
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
        small, large = sorted((one, other), key=lambda name: len(self._ids[name]))
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
                self._on_done(stage, number, len(self._ids[name]))
            for question in [*(turn.question for turn in entry.example.history), entry.example.question]:
                text = normalize_question(question)
                digest = digest_question(text)
                if digest not in known:
                    known.add(digest)
                    yield number, text

    def _judge(self, report: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        errors, warnings = [], []
        if self.problems:
            errors.append(f"{self.problems.count:,} broken records or images")
        if self._too_long_count["question"]:
            errors.append(
                f"{self._too_long_count['question']:,} questions over the length limit: they leave no room for an answer"
            )
        if self._refusals:
            warnings.append(
                f"{self._refusals:,} of {len(self._ids['forget']):,} forget answers decline: right for safety fine-tuning, but npo and rmu "
                f"would unlearn refusing"
            )
        if self._too_long_count["answer"]:
            warnings.append(f"{self._too_long_count['answer']:,} answers are cut at the length limit")
        for name, count in report["doubled_ids"].items():
            if count:
                errors.append(f"{count:,} ids of {name} are there twice")
        for name, doubled in report["doubled_questions"].items():
            if doubled["count"]:
                warnings.append(
                    f"{doubled['count']:,} questions of {name} are asked twice of the same image, or both without one"
                )
        for leak in report["leakage"]:
            one, other = leak["sets"]
            if not leak["count"] or leak["by_design"]:
                continue
            line = f"{leak['count']:,} x {leak['what']} in {one} and {other}"
            # Within a set's own files a contradiction, in a test set the test itself.
            contradicts = leak["what"] == "same question, same image" and (
                {one, other} == {"forget", "retain"} or not {one, other} <= self._checked
            )
            (errors if contradicts else warnings).append(line)
        return errors, warnings


def _by_design(leak: Mapping[str, Any]) -> bool:
    """SafeEraser retains harmless questions on the forget images; decouple and preferred questions are the forget questions."""
    sets, what = set(leak["sets"]), leak["what"]
    if "preferred" in sets:
        return sets != {"preferred", "retain"} or what == "same image"
    return (sets == {"forget", "retain"} and what == "same image") or (
        sets == {"forget", "decouple"} and what.endswith("question")
    )


def _quantiles(values: Sequence[int]) -> dict[str, int]:
    found = np.quantile(np.asarray(values), (0, 0.5, 0.9, 0.99, 1), method="nearest")
    return dict(zip(("min", "median", "p90", "p99", "max"), (int(value) for value in found), strict=True))
