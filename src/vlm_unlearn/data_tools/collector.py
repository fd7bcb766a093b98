"""Reads data files for `check`. Every question, image and length is stored once, in columns that fit millions."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vlm_unlearn.data.formats.base import Entry
from vlm_unlearn.data.formats.table import Columns
from vlm_unlearn.data.images import image_size, open_image, resolve_image
from vlm_unlearn.data.readers import detect, image_roots, read_any
from vlm_unlearn.data.training_set import read_dataset_json
from vlm_unlearn.data_tools.near_duplicates import difference_hash, normalize_question
from vlm_unlearn.data_tools.parallel import map_in_threads
from vlm_unlearn.errors import Problems, UserError, quoted
from vlm_unlearn.records import Example
from vlm_unlearn.store import digest_file

MAX_EXAMPLES = 20  # listed for each finding
MAX_SETS = 255  # set indices are stored in one byte
OnStage = Callable[[str, int, int], None]  # called with (stage, done, total). A total of 0 is unknown
TokenCount = Callable[[Example, Path | None], tuple[int, int]]  # returns the tokens before the first answer, and in all


@dataclass(frozen=True)
class DataSource:
    """A file or training-set folder to check, and the root folder of its images."""

    path: str | Path
    images: Path | None = None
    against: bool = False  # a file to compare the checked one with, such as a test set


@dataclass
class _Questions:
    """The columns of all questions: 17 bytes per question."""

    text: array[int] = field(default_factory=lambda: array("Q"))  # digest of the normalized question
    image: array[int] = field(default_factory=lambda: array("i"))  # index of the image, -1 without one
    set: array[int] = field(default_factory=lambda: array("B"))
    record: array[int] = field(default_factory=lambda: array("I"))  # index of the example in its set


@dataclass
class _Images:
    """The columns of all images: one entry per image path."""

    paths: list[str] = field(default_factory=list)
    indices: dict[int, int] = field(default_factory=dict)  # hash of image root and path -> index of the image
    content: dict[int, bytes] = field(default_factory=dict)  # digest of the file. Unusable images have no entry
    hashes: dict[int, int] = field(default_factory=dict)
    sizes: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class _ImageRequest:
    """An image to open: its index, its root folder and path, and the example that refers to it first."""

    index: int
    root: Path
    path: str
    file: str | Path
    record: str


class Collector:
    """Reads one file after another into columns.

    The memory use is about 20 bytes per question, 100 per example and 300 per image.

    Args:
        check_images: Whether to open the image files.
        columns: The column names of tables.
        on_done: Called with (stage, done, total). A total of 0 is unknown.
        is_refusal: Returns whether an answer is a refusal. Refusals in the forget set are counted.
    """

    def __init__(
        self,
        check_images: bool = True,
        columns: Columns | None = None,
        on_done: OnStage | None = None,
        is_refusal: Callable[[str], bool] = lambda text: False,
    ) -> None:
        self.problems = Problems()
        self._check_images = check_images
        self._columns = columns
        self._on_done = on_done or (lambda stage, done, total: None)
        self._sources: list[DataSource] = []
        self._sets: dict[str, int] = {}
        self._names: dict[tuple[int, str], str] = {}  # (index of the source, set of the entry) -> name of the set
        self._is_refusal = is_refusal
        self._refusals = 0  # answers of the forget set
        self._text_only: Counter[str] = Counter()
        self._ids: dict[str, list[str]] = {}
        self._checked: set[str] = set()  # names of the sets that do not come from an `against` source
        self._questions = _Questions()
        self._images = _Images()
        self._lengths: dict[str, array[int]] = {}
        self._too_long: dict[str, list[str]] = {"question": [], "answer": []}
        self._too_long_count: Counter[str] = Counter()

    def add(self, source: DataSource, count_tokens: TokenCount | None = None, max_length: int = 0) -> None:
        """Reads one file and opens every image that earlier files did not contain.

        Broken records and images are added to `problems`.

        Args:
            count_tokens: Returns the length of an example in tokens.
            max_length: The length limit for `count_tokens`.

        Raises:
            UserError: The file cannot be read.
        """
        self._sources.append(source)
        roots = image_roots(source.path, source.images)
        if detect(source.path) == "training_set":
            self._compare_with_description(Path(source.path))
        requests = self._collect(source, roots, count_tokens, max_length)
        if self._check_images:
            for request, result in map_in_threads(_read_image, requests):
                if isinstance(result, UserError):
                    problem = UserError(str(result), code=result.code, file=request.file, record=request.record)
                    self.problems.add(problem)
                else:
                    self._images.content[request.index], self._images.hashes[request.index], size = result
                    self._images.sizes[size] += 1
        else:
            for _ in requests:
                pass
        if not any(index == len(self._sources) - 1 for index, _ in self._names):
            self.problems.add(UserError("contains no readable record", code="no-records", file=source.path))

    def _collect(
        self, source: DataSource, roots: Mapping[str, Path], count_tokens: TokenCount | None, max_length: int
    ) -> Iterator[_ImageRequest]:
        """Adds all questions of a source to the columns and yields each image at its first occurrence."""
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
                # If the images are not opened, equal paths below different roots count as the same image.
                key = hash((roots.get(example.source) if self._check_images else None, example.image))
                index = self._images.indices.setdefault(key, len(self._images.paths))
            for question in [*(turn.question for turn in example.history), example.question]:
                self._questions.text.append(digest_question(normalize_question(question)))
                self._questions.image.append(index)
                self._questions.set.append(self._sets[name])
                self._questions.record.append(number)
            if not example.question.strip() or not example.answer.strip():
                empty, code = ("question", "empty-field") if example.answer.strip() else ("answer", "empty-answer")
                self._add_problem("must not be empty", code, source, name, number, empty)
            if index == len(self._images.paths) and example.image is not None:
                self._images.paths.append(example.image)
                if example.source in roots:
                    record = self._record(name, number)
                    yield _ImageRequest(index, roots[example.source], example.image, source.path, record)
                elif example.source == "embedded":
                    message = "the image is inside the table. Unpack it with `data import files` and check the folder."
                    self._add_problem(message, "unsupported-setting", source, name, number)
                else:
                    message = f"dataset.json names no image folder for source {quoted(example.source)}"
                    self._add_problem(message, "missing-field", source, name, number)
            if count_tokens:
                self._measure(source, name, number, example, roots, count_tokens, max_length)
            if done % 500 == 0:
                self._on_done("records", done, 0)

    def _entries(self, index: int, problems: Problems) -> Iterator[tuple[str, Entry]]:
        """Yields the entries of a source, each with the name of its set. A set is named at its first entry."""
        source = self._sources[index]
        for entry in read_any(source.path, None, self._columns, problems):
            if (index, entry.set) not in self._names:
                self._name_set(index, source, entry.set)
            yield self._names[index, entry.set], entry

    def _name_set(self, index: int, source: DataSource, entry_set: str) -> None:
        """Adds a set under a unique name.

        The name is the entry's set (``forget``), or the stem of the file if the format has no sets. A set of an
        `against` source is prefixed with the stem (``test:forget``). A second set of the same name gets a number
        (``test#2``).
        """
        stem = Path(source.path).stem
        name = base = (f"{stem}:{entry_set}" if entry_set else stem) if source.against else entry_set or stem
        number = 1
        while name in self._sets:
            number += 1
            name = f"{base}#{number}"
        if len(self._sets) == MAX_SETS:
            raise UserError(
                f"the files contain more than {MAX_SETS} sets. Check fewer files at once.", code="out-of-range"
            )
        self._sets[name] = len(self._sets)
        self._names[index, entry_set] = name
        if not source.against:
            self._checked.add(name)

    def _compare_with_description(self, training_set_dir: Path) -> None:
        """Checks that each file of a training set is the one that its dataset.json describes."""
        for name, description in read_dataset_json(training_set_dir)[1].items():
            path = training_set_dir / name
            if not path.is_file():
                message, code = "not found, but listed in dataset.json. Import the set again.", "file-not-found"
            elif digest_file(path) != description.get("sha256"):
                message, code = "was changed after dataset.json was written. Import the set again.", "file-changed"
            else:
                continue
            self.problems.add(UserError(message, code=code, file=path))

    def _measure(
        self,
        source: DataSource,
        name: str,
        number: int,
        example: Example,
        roots: Mapping[str, Path],
        count_tokens: TokenCount,
        max_length: int,
    ) -> None:
        """Stores the length of an example and lists it if it exceeds the limit."""
        path = None
        if example.image is not None:
            try:
                path = resolve_image(roots[example.source], example.image)
                image_size(path)
            except (KeyError, UserError):
                return  # reported by the check of the image itself
        try:
            prompt_tokens, total_tokens = count_tokens(example, path)
        except UserError as error:
            self._add_problem(error.message, error.code, source, name, number, error.field)
            return
        self._lengths.setdefault(name, array("I")).append(total_tokens)
        if prompt_tokens >= max_length:
            kind, tokens = "question", prompt_tokens
        elif total_tokens > max_length:
            kind, tokens = "answer", total_tokens
        else:
            return
        self._too_long_count[kind] += 1
        if len(self._too_long[kind]) < MAX_EXAMPLES:
            self._too_long[kind].append(f"{self._label(name, number)}: {tokens} tokens")

    def _label(self, name: str, number: int) -> str:
        return f"{name}: {quoted(self._ids[name][number])}"

    def _record(self, name: str, number: int) -> str:
        return f"{quoted(self._ids[name][number])} of {name}"

    def _add_problem(
        self, message: str, code: str, source: DataSource, name: str, number: int, field_name: str | None = None
    ) -> None:
        record = self._record(name, number)
        self.problems.add(UserError(message, code=code, file=source.path, record=record, field=field_name))


def digest_question(text: str) -> int:
    """Returns a 64-bit digest of a normalized question."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big")


def _read_image(request: _ImageRequest) -> tuple[bytes, int, str] | UserError:
    """Returns the digest, difference hash and size of an image, or the error that makes it unusable."""
    try:
        path = resolve_image(request.root, request.path)
        with open_image(path) as image:
            size = f"{image.width}x{image.height}"
            image_hash = difference_hash(image)
        with path.open("rb") as handle:
            digest = hashlib.file_digest(handle, lambda: hashlib.blake2b(digest_size=16)).digest()
        return digest, image_hash, size
    except UserError as error:
        return error
    except OSError as error:
        return UserError(f"image {quoted(request.path)}: {error.strerror}", code="file-unreadable")
