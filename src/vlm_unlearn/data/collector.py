"""Reads data files for `check`: every question, image and length once, in columns that fit millions."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vlm_unlearn.data.formats.table import Columns
from vlm_unlearn.data.images import image_size, open_image, resolve_image
from vlm_unlearn.data.near_duplicates import difference_hash, normalize_question
from vlm_unlearn.data.parallel import map_in_threads
from vlm_unlearn.data.readers import Entry, detect, image_roots, read_any
from vlm_unlearn.data.training_set import read_dataset_json
from vlm_unlearn.errors import Problems, UserError, quoted
from vlm_unlearn.records import Example
from vlm_unlearn.store import digest_file

LISTED = 20  # examples named for each finding
OnStage = Callable[[str, int, int], None]  # stage, done, all (0: unknown)
TokenCount = Callable[[Example, Path | None], tuple[int, int]]  # tokens up to the first answer, tokens in all


@dataclass(frozen=True)
class DataSource:
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
    content: dict[int, bytes] = field(
        default_factory=dict
    )  # digest of the bytes; missing for an image that can't be used
    hashes: dict[int, int] = field(default_factory=dict)
    sizes: Counter[str] = field(default_factory=Counter)


class Collector:
    """Takes in file after file. Memory: about 20 bytes a question, 100 an example, 300 an image."""

    def __init__(
        self,
        look_at_images: bool = True,
        columns: Columns | None = None,
        on_done: OnStage | None = None,
        is_refusal: Callable[[str], bool] = lambda text: False,
    ) -> None:
        self.problems = Problems()
        self._look = look_at_images
        self._columns = columns
        self._on_done = on_done or (lambda stage, done, total: None)
        self._sources: list[DataSource] = []
        self._sets: dict[str, int] = {}
        self._names: dict[tuple[int, str], str] = {}  # place of the source, set of the entry -> name of the set
        self._is_refusal = is_refusal
        self._refusals = 0  # answers of the forget set that decline
        self._text_only: Counter[str] = Counter()
        self._ids: dict[str, list[str]] = {}
        self._checked: set[str] = set()  # the sets of what is checked, not of what it is checked against
        self._questions = _Questions()
        self._images = _Images()
        self._lengths: dict[str, array[int]] = {}
        self._too_long: dict[str, list[str]] = {"question": [], "answer": []}
        self._too_long_count: Counter[str] = Counter()

    def add(self, source: DataSource, count_tokens: TokenCount | None = None, max_length: int = 0) -> None:
        """Reads one file, and looks at every image of it that was not seen before: that it is there, is one, and decodes.

        Args:
            count_tokens: tells an example's length under a processor.
            max_length: the length limit that `count_tokens` is compared with.

        Raises:
            UserError: the file can't be read at all.
        """
        self._sources.append(source)
        roots = image_roots(source.path, source.images)
        if detect(source.path) == "training_set":
            self._compare_with_description(Path(source.path))
        work = self._new_images(source, roots, count_tokens, max_length)
        for (index, _, named), found in (
            map_in_threads(lambda key: _look(key[1], key[2]), work) if self._look else ((key, None) for key in work)
        ):
            if isinstance(found, str):
                self.problems.add(UserError(f"{named[1]}: {found}"))
            elif found is not None:
                self._images.content[index], self._images.hashes[index], size = found
                self._images.sizes[size] += 1
        if not any(place == len(self._sources) - 1 for place, _ in self._names):
            self.problems.add(UserError(f"{source.path}: holds no record that can be read"))

    def _new_images(
        self, source: DataSource, roots: Mapping[str, Path], count_tokens: TokenCount | None, max_length: int
    ) -> Iterator[tuple[int, Path, tuple[str, str]]]:
        """Takes note of every question, and yields each image at its first sight: index, root, (path, place)."""
        for done, (name, entry) in enumerate(self._entries(len(self._sources) - 1, self.problems)):
            example = entry.example
            ids = self._ids.setdefault(name, [])
            number = len(ids)
            ids.append(example.id)
            index = -1
            if name == "forget" and self._is_refusal(example.answer):
                self._refusals += 1
            if example.image is None:
                self._text_only[name] += 1
            else:
                # Unlooked-at, images of one path are taken for the same.
                key = hash((roots.get(example.source) if self._look else None, example.image))
                index = self._images.indices.setdefault(key, len(self._images.paths))
            for question in [*(turn.question for turn in example.history), example.question]:
                self._questions.text.append(digest_question(normalize_question(question)))
                self._questions.image.append(index)
                self._questions.set.append(self._sets[name])
                self._questions.record.append(number)
            place = self._place(name, number)
            if not example.question.strip() or not example.answer.strip():
                self.problems.add(
                    UserError(f"{place}: {'the question' if example.answer.strip() else 'the answer'} is empty")
                )
            if index == len(self._images.paths) and example.image is not None:
                self._images.paths.append(example.image)
                if example.source in roots:
                    yield index, roots[example.source], (example.image, place)
                elif example.source == "embedded":
                    self.problems.add(
                        UserError(
                            f"{place}: its image is inside the table; `data import files` unpacks it, then check the folder"
                        )
                    )
                else:
                    self.problems.add(
                        UserError(f"{place}: dataset.json names no image folder for source {quoted(example.source)}")
                    )
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

    def _name_set(self, place: int, source: DataSource, of_entry: str) -> None:
        """``forget``; ``test:forget`` for another file; a file without sets goes by its own name; ``test#2`` for a second of that name."""
        stem = Path(source.path).stem
        name = wanted = (f"{stem}:{of_entry}" if of_entry else stem) if source.against else of_entry or stem
        number = 1
        while name in self._sets:
            number += 1
            name = f"{wanted}#{number}"
        if len(self._sets) == 255:
            raise UserError("more than 255 sets")
        self._sets[name] = len(self._sets)
        self._names[place, of_entry] = name
        if not source.against:
            self._checked.add(name)

    def _compare_with_description(self, folder: Path) -> None:
        """Each file of a training set is the one that its dataset.json describes."""
        for name, described in read_dataset_json(folder)[1].items():
            path = folder / name
            if not path.is_file():
                self.problems.add(UserError(f"{path}: is missing; dataset.json lists it"))
            elif digest_file(path) != described.get("sha256"):
                self.problems.add(
                    UserError(f"{path}: was changed since dataset.json was written; import the set again")
                )

    def _measure(
        self,
        name: str,
        place: str,
        example: Example,
        roots: Mapping[str, Path],
        count_tokens: TokenCount,
        max_length: int,
    ) -> None:
        path = None
        if example.image is not None:
            try:
                path = resolve_image(roots[example.source], example.image, place)
                image_size(path)
            except (KeyError, UserError):
                return  # the image's own check says so
        try:
            asked, whole = count_tokens(example, path)
        except UserError as error:
            self.problems.add(UserError(f"{place}: {error}"))
            return
        self._lengths.setdefault(name, array("I")).append(whole)
        what = "question" if asked >= max_length else "answer" if whole > max_length else ""
        if what:
            self._too_long_count[what] += 1
            if len(self._too_long[what]) < LISTED:
                self._too_long[what].append(f"{place}: {asked if what == 'question' else whole} tokens")

    def _place(self, name: str, number: int) -> str:
        return f"{name}: {quoted(self._ids[name][number])}"


def digest_question(text: str) -> int:
    """64 bits of a normalised question."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big")


def _look(root: Path, named: tuple[str, str]) -> tuple[bytes, int, str] | str:
    """Digest, difference hash and size of an image, or what is wrong with it."""
    try:
        path = resolve_image(root, named[0])
        with open_image(path) as image:
            size = f"{image.width}x{image.height}"
            hashed = difference_hash(image)
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, lambda: hashlib.blake2b(digest_size=16)).digest(), hashed, size
    except UserError as error:
        return str(error).removeprefix(": ")
    except OSError as error:
        return f"{named[0]}: {error.strerror}"
