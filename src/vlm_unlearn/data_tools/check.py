"""Checks training sets for unusable images, duplicates, leakage between sets, and records over the length limit."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_unlearn.data.readers import detect
from vlm_unlearn.data_tools.collector import MAX_EXAMPLES, Collector, DataSource, TokenCount, digest_question
from vlm_unlearn.data_tools.near_duplicates import NearQuestions, near_images, normalize_question
from vlm_unlearn.errors import Problems

__all__ = ["Checker", "DataSource", "TokenCount"]


class Checker(Collector):
    """Checks data files. `add` reads a file, and `report` returns the findings about all files."""

    def report(self) -> dict[str, Any]:
        """Returns all findings as a JSON document.

        `errors` lists records that cannot be trained on or that contradict each other. `warnings` lists findings that a
        person must judge.
        """
        names = list(self._sets)
        content, images = self._by_content()
        pairs = [pair for pair in itertools.combinations(names, 2) if self._checked & set(pair)]
        leaks = [leak for left_set, right_set in pairs for leak in self._leaks(left_set, right_set, content, images)]
        for leak in leaks:
            leak["by_design"] = _by_design(leak)
        path_counts = Counter(self._images.content.values())
        report: dict[str, Any] = {
            "sets": {name: self._set_counts(name) for name in names},
            "images": {
                "distinct_paths": len(self._images.paths),
                "usable": len(self._images.content) if self._check_images else None,
                "distinct_contents": len(path_counts) if self._check_images else None,
                "sizes": dict(self._images.sizes.most_common(MAX_EXAMPLES)),
                "same_content": self._same_content(path_counts),
            },
            "doubled_ids": {name: self._count_duplicate_ids(name) for name in names},
            "doubled_questions": self._duplicate_questions(content),
            "leakage": leaks,
            "lengths": {name: _quantiles(values) for name, values in self._lengths.items()},
            "too_long": {
                kind: {"count": self._too_long_count[kind], "first": examples}
                for kind, examples in self._too_long.items()
            },
            "broken": {"count": self.problems.count, "first": self.problems.messages[:MAX_EXAMPLES]},
        }
        report["errors"], report["warnings"] = self._summarize(report)
        return report

    def _set_counts(self, name: str) -> dict[str, int]:
        in_set = np.frombuffer(self._questions.set, dtype=np.uint8) == self._sets[name]
        return {
            "records": len(self._ids[name]),
            "questions": int(in_set.sum()),
            "distinct_questions": len(np.unique(np.frombuffer(self._questions.text, dtype=np.uint64)[in_set])),
            "text_only": self._text_only[name],
        }

    def _by_content(self) -> tuple[NDArray[np.int64], dict[str, NDArray[np.int64]]]:
        """Returns a number for the image content of each question [Q] (-1 without image), and the images of each set.

        Paths with the same bytes get the same number. An image that could not be read gets a number of its own.
        """
        numbers: dict[bytes, int] = {}
        content_of_image = np.arange(len(self._images.paths), dtype=np.int64) + len(self._images.paths)
        for index, digest in self._images.content.items():
            content_of_image[index] = numbers.setdefault(digest, len(numbers))
        image = np.frombuffer(self._questions.image, dtype=np.int32).astype(np.int64)
        sets = np.frombuffer(self._questions.set, dtype=np.uint8)
        content = np.where(image < 0, -1, content_of_image[image] if len(content_of_image) else -1)
        members = {name: np.unique(image[(sets == number) & (image >= 0)]) for name, number in self._sets.items()}
        return content, members

    def _same_content(self, path_counts: Counter[bytes]) -> dict[str, Any]:
        """Returns the groups of paths whose files contain the same bytes."""
        duplicates = {digest for digest, count in path_counts.items() if count > 1}
        groups: dict[bytes, list[str]] = {}
        for index, digest in self._images.content.items():
            if digest in duplicates and (digest in groups or len(groups) < MAX_EXAMPLES):
                groups.setdefault(digest, []).append(self._images.paths[index])
        surplus = sum(path_counts[digest] - 1 for digest in duplicates)
        return {"count": surplus, "first": [paths[:MAX_EXAMPLES] for paths in groups.values()]}

    def _duplicate_questions(self, content: NDArray[np.int64]) -> dict[str, Any]:
        """Returns, for each set, the questions that occur more than once with the same image."""
        duplicates: dict[str, Any] = {}
        for name, number in self._sets.items():
            questions = np.flatnonzero(np.frombuffer(self._questions.set, dtype=np.uint8) == number)
            pairs = self._question_image_digests(content, questions)
            _, first_index, counts = np.unique(pairs, return_index=True, return_counts=True)
            repeated = first_index[counts > 1]
            records = np.frombuffer(self._questions.record, dtype=np.uint32)[questions[repeated]]
            duplicates[name] = {
                "count": int((counts - 1).sum()),
                "first": [self._label(name, record) for record in records[:MAX_EXAMPLES]],
            }
        return duplicates

    def _count_duplicate_ids(self, name: str) -> int:
        """Returns the number of surplus ids. Only the ids of training-set folders must differ."""
        sources = {index for (index, _), set_name in self._names.items() if set_name == name}
        if not any(detect(self._sources[index].path) == "training_set" for index in sources):
            return 0
        return len(self._ids[name]) - len(set(self._ids[name]))

    def _question_image_digests(self, content: NDArray[np.int64], questions: NDArray[np.intp]) -> NDArray[np.uint64]:
        """Returns one number for each question [Q] that combines its text with its image content."""
        text = np.frombuffer(self._questions.text, dtype=np.uint64)[questions]
        mixed = (content[questions].astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        return text ^ mixed

    def _leaks(
        self, left_set: str, right_set: str, content: NDArray[np.int64], images: Mapping[str, NDArray[np.int64]]
    ) -> Iterator[dict[str, Any]]:
        """Yields the overlap of two sets: equal questions and images, and near-duplicates of both."""
        sets = np.frombuffer(self._questions.set, dtype=np.uint8)
        text = np.frombuffer(self._questions.text, dtype=np.uint64)
        records = np.frombuffer(self._questions.record, dtype=np.uint32)
        left, right = (np.flatnonzero(sets == self._sets[name]) for name in (left_set, right_set))

        def overlap(kind: str, left_values: NDArray[Any], right_values: NDArray[Any]) -> dict[str, Any]:
            _, in_left, in_right = np.intersect1d(left_values, right_values, return_indices=True)
            examples = [
                f"{self._label(left_set, records[left[i]])} = {self._label(right_set, records[right[j]])}"
                for i, j in zip(in_left[:MAX_EXAMPLES], in_right[:MAX_EXAMPLES], strict=True)
            ]
            return {"sets": [left_set, right_set], "what": kind, "count": len(in_left), "first": examples}

        yield overlap(
            "same question, same image",
            self._question_image_digests(content, left),
            self._question_image_digests(content, right),
        )
        yield overlap("same question", text[left], text[right])
        # Questions without an image get a different value on each side, so that they do not count as the same image.
        left_images = np.where(content[left] >= 0, content[left], -1)
        right_images = np.where(content[right] >= 0, content[right], -2)
        yield overlap("same image", left_images, right_images)
        if self._check_images:
            yield self._near_images(left_set, right_set, images)
        yield self._near_questions(left_set, right_set)

    def _near_images(self, left_set: str, right_set: str, images: Mapping[str, NDArray[np.int64]]) -> dict[str, Any]:
        hashes = np.zeros(max(1, len(self._images.paths)), dtype=np.uint64)
        for index, value in self._images.hashes.items():
            hashes[index] = value
        members = {
            name: [index for index in images[name].tolist() if index in self._images.hashes]
            for name in (left_set, right_set)
        }
        count = 0
        examples: list[str] = []
        for left, right in near_images(hashes, members, left_set, right_set):
            if self._images.content[left] != self._images.content[right]:
                count += 1
                if len(examples) < MAX_EXAMPLES:
                    examples.append(
                        f"{left_set}: {self._images.paths[left]} ~ {right_set}: {self._images.paths[right]}"
                    )
        return {"sets": [left_set, right_set], "what": "near image", "count": count, "first": examples}

    def _near_questions(self, left_set: str, right_set: str) -> dict[str, Any]:
        """Counts distinct questions of the larger set that are similar, but not equal, to one of the smaller set."""
        small, large = sorted((left_set, right_set), key=lambda name: len(self._ids[name]))
        index = NearQuestions()
        digests: set[int] = set()
        index.add(self._new_questions(small, digests))
        count = 0
        examples: list[str] = []
        stage = f"near questions: {large}, {small}"
        for large_record, small_record in index.matches(self._new_questions(large, digests, stage)):
            count += 1
            if len(examples) < MAX_EXAMPLES:
                examples.append(f"{self._label(large, large_record)} ~ {self._label(small, small_record)}")
        return {"sets": [left_set, right_set], "what": "near question", "count": count, "first": examples}

    def _new_questions(self, name: str, digests: set[int], stage: str = "") -> Iterator[tuple[int, str]]:
        """Yields ``(record, normalized question)`` for each question of a set that is not in `digests`, and adds it.

        The file is read again, because the texts of a large file do not fit into memory.
        """
        number = -1
        source = next(index for (index, _), set_name in self._names.items() if set_name == name)
        for entry_set, entry in self._entries(source, Problems()):
            if entry_set != name:
                continue
            number += 1
            if stage and number % 500 == 0:
                self._on_done(stage, number, len(self._ids[name]))
            for question in [*(turn.question for turn in entry.example.history), entry.example.question]:
                text = normalize_question(question)
                digest = digest_question(text)
                if digest not in digests:
                    digests.add(digest)
                    yield number, text

    def _summarize(self, report: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        """Returns the lines of `errors` and of `warnings`."""
        errors, warnings = [], []
        if self.problems:
            errors.append(f"{self.problems.count:,} broken records or images")
        if self._too_long_count["question"]:
            count = self._too_long_count["question"]
            errors.append(f"{count:,} questions over the length limit: they leave no room for an answer")
        if self._refusals:
            warnings.append(
                f"{self._refusals:,} of {len(self._ids['forget']):,} forget answers decline. "
                f"This is right for safety fine-tuning, but npo and rmu would unlearn the refusals"
            )
        if self._too_long_count["answer"]:
            warnings.append(f"{self._too_long_count['answer']:,} answers are truncated at the length limit")
        for name, count in report["doubled_ids"].items():
            if count:
                errors.append(f"{count:,} duplicate ids in {name}")
        for name, duplicates in report["doubled_questions"].items():
            if duplicates["count"]:
                warnings.append(
                    f"{duplicates['count']:,} duplicate questions in {name}: same question, same image or none"
                )
        for leak in report["leakage"]:
            left_set, right_set = leak["sets"]
            if not leak["count"] or leak["by_design"]:
                continue
            line = f"{leak['count']:,} x {leak['what']} in {left_set} and {right_set}"
            # Forget and retain contradict each other in such a case, and a test set no longer measures generalization.
            is_error = leak["what"] == "same question, same image" and (
                {left_set, right_set} == {"forget", "retain"} or not {left_set, right_set} <= self._checked
            )
            (errors if is_error else warnings).append(line)
        return errors, warnings


def _by_design(leak: Mapping[str, Any]) -> bool:
    """Returns whether the formats cause an overlap.

    SafeEraser's retain set contains harmless questions on the forget images. Decouple and preferred examples repeat the
    forget questions.
    """
    sets, kind = set(leak["sets"]), leak["what"]
    if "preferred" in sets:
        return sets != {"preferred", "retain"} or kind == "same image"
    return (sets == {"forget", "retain"} and kind == "same image") or (
        sets == {"forget", "decouple"} and kind.endswith("question")
    )


def _quantiles(values: Sequence[int]) -> dict[str, int]:
    quantiles = np.quantile(np.asarray(values), (0, 0.5, 0.9, 0.99, 1), method="nearest")
    return dict(zip(("min", "median", "p90", "p99", "max"), (int(value) for value in quantiles), strict=True))
