"""The data of a training run, from a training-set folder or from data sets in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from vlm_unlearn.data.formats import messages
from vlm_unlearn.data.formats.fields import RawRecord
from vlm_unlearn.data.formats.safe_eraser import validate_refusals
from vlm_unlearn.data.image_paths import renamed_warning
from vlm_unlearn.data.images import ImageReference, ImageSource, image_reference, llava_image, resolve_image
from vlm_unlearn.data.rows import Row, column_names, read_rows, validate_not_streamed, value_at
from vlm_unlearn.data.training_set import (
    DEFAULT_REFUSALS,
    PAIRED_ROLES,
    ROLES,
    image_root,
    read_folder,
)
from vlm_unlearn.errors import UserError, nearest, printable, quoted
from vlm_unlearn.records import Example
from vlm_unlearn.store import (
    describe_validation_error,
    digest_file,
    digest_json,
    digest_text,
    dump_json,
    dump_record,
    user_path,
)


class UnlearningDataset(Mapping[str, Sequence[Example]]):
    """The examples of each role: forget and retain, and optionally decouple and preferred.

    Create it with `from_folder`, `from_datasets` or `from_any`. Only texts are held in memory. Images are opened when
    they are used: from their file, from the `datasets.Dataset`, or from the object in the row.

    Attributes:
        folder: The folder of the training set, or None for data in memory.
        image_roots: The image folder of each `Example.source` of a training-set folder.
        refusals: Refusal sentences, for methods that train the model to refuse.
        digests: The SHA-256 of each set and of the refusals, by file name.
    """

    def __init__(
        self,
        examples: Mapping[str, Sequence[Example]],
        refusals: Sequence[str],
        digests: Mapping[str, str],
        folder: Path | None = None,
        image_roots: Mapping[str, Path] | None = None,
        images: Mapping[str, ImageReference] | None = None,
    ) -> None:
        self.folder = folder
        self.image_roots = image_roots or {}
        self.refusals = refusals
        self._examples = examples
        self.digests = digests
        self._images = images or {}
        self._files: dict[tuple[str, str], Path] = {}  # by source and name, as training asks for a file at each step
        self.image_loader: Literal["viewer", "llava"] = "viewer"  # `llava` opens images as LLaVA's own code does

    def __getitem__(self, role: str) -> Sequence[Example]:
        return self._examples[role]

    def __iter__(self) -> Iterator[str]:
        return iter(self._examples)

    def __len__(self) -> int:
        return len(self._examples)

    def __repr__(self) -> str:
        counts = ", ".join(f"{role}: {len(examples)}" for role, examples in self.items())
        return f"{type(self).__name__}({counts})"

    @classmethod
    @renamed_warning()
    def from_folder(cls, folder: str | Path) -> UnlearningDataset:
        """Reads a training-set folder. Every record is parsed, and every image must exist inside its image root.

        Raises:
            UserError: The folder is not a training set, a record is broken, two examples have the same id, or an image
                is missing.
        """
        folder = user_path(folder)
        image_roots, examples, refusals, digests = read_folder(folder)
        return cls(examples, refusals, digests, folder, image_roots)

    @classmethod
    @renamed_warning()
    def from_datasets(
        cls, data: Any, root: str | Path | None = None, refusals: Sequence[str] | None = None
    ) -> UnlearningDataset:
        """Reads data sets in memory.

        A row has the columns ``question`` and ``answer``, or ``messages`` as in TRL, or ``conversations`` as in
        LLaMA-Factory. The columns ``image``, ``id``, ``category``, ``pair_id``, ``source`` and ``system`` are optional,
        and so is ``history``, the earlier rounds as a list of ``{"question": ..., "answer": ...}``. ``images``, a list
        of at most one image, can replace ``image``. Other columns are ignored.

        The last answer of ``messages`` or ``conversations`` is trained on. The earlier rounds are context.

        Rows without an id get their role and number, such as ``forget-1``.

        Args:
            data: A `DatasetDict` with one split per role, a `Dataset` or a list of dicts with a column ``role``, or a
                mapping of role to a `Dataset` or a list of dicts.
            root: The folder of relative image paths. Paths must stay inside it. By default, they are relative to the
                current folder.
            refusals: Refusal sentences, for methods that train the model to refuse. None uses four plain sentences.

        Raises:
            UserError: The forget or the retain set is missing, a set is empty or streamed, a column is missing, or a
                row or its image is invalid. The error contains the role, the row (counted from 1) and the column.
        """
        for table in data.values() if isinstance(data, Mapping) else (data,):
            validate_not_streamed(table)
        reader = _RowReader(None if root is None else user_path(root).resolve())
        if isinstance(data, Mapping) and list(data) == ["train"] and "role" in column_names(data["train"]):
            data = data["train"]  # `load_dataset` puts the rows of a single file into this split
        if isinstance(data, Mapping):
            for role, table in data.items():
                _validate_role(role, "data")
                for number, row in enumerate(read_rows(table, role), start=1):
                    reader.add(str(role), row, number, str(role))
                if not reader.examples.get(str(role)):
                    raise UserError(f"the {role} set is empty", code="no-records", field=str(role))
        else:
            for number, row in enumerate(read_rows(data, "data"), start=1):
                role = _role_of(row, number)
                reader.add(role, row, number, None)
        for role in ("forget", "retain"):
            if not reader.examples.get(role):
                raise UserError(
                    f"the {role} set is missing. Pass a split, a key or rows with the role {role}.",
                    code="no-records",
                    field=role,
                )
        examples = {role: reader.examples[role] for role in ROLES if role in reader.examples}
        digests = {f"{role}.jsonl": digest_text("".join(map(dump_record, rows))) for role, rows in examples.items()}
        if refusals is not None:
            refusals = validate_refusals(list(refusals), None, "refusals")
            digests["refusals.json"] = digest_text(dump_json(refusals))
        return cls(examples, refusals or DEFAULT_REFUSALS, digests, images=reader.images)

    @classmethod
    def from_any(
        cls, data: Any, root: str | Path | None = None, refusals: Sequence[str] | None = None
    ) -> UnlearningDataset:
        """Returns `data` if it is an `UnlearningDataset`, and otherwise reads it from a folder or from data sets.

        Args:
            data: An `UnlearningDataset`, the path of a training-set folder, or data that `from_datasets` accepts.
            root: As in `from_datasets`. A folder contains its own image roots.
            refusals: As in `from_datasets`. A folder contains its own refusals.

        Raises:
            UserError: An error of `from_folder` or `from_datasets`, or `root` or `refusals` is passed with data that
                has its own.
        """
        if not isinstance(data, str | Path | UnlearningDataset):
            return cls.from_datasets(data, root, refusals)
        for name, value in (("root", root), ("refusals", refusals)):
            if value is not None:
                problem = "applies only to data sets in memory. A training-set folder has its own."
                raise UserError(problem, code="conflicting-settings", field=name)
        return data if isinstance(data, UnlearningDataset) else cls.from_folder(data)

    def image(self, example: Example) -> ImageSource | None:
        """Returns the image of an example, or None if the example has no image.

        Raises:
            UserError: The image file of a training-set folder does not exist or is outside the image root.
        """
        image = self._image_source(example)
        return llava_image(image) if image is not None and self.image_loader == "llava" else image

    def _image_source(self, example: Example) -> ImageSource | None:
        """Returns the image of an example without its loader."""
        if example.image is None:
            return None
        if example.image in self._images:
            return self._images[example.image]
        key = example.source, example.image
        if key not in self._files:
            root = image_root(self.folder, self.image_roots, example)
            self._files[key] = resolve_image(root, example.image, record=quoted(example.id))
        return self._files[key]

    def fingerprint(self) -> dict[str, str]:
        """Returns the SHA-256 of each set, and one of the content of all images, in the order of the examples.

        It is equal on all machines. A set in memory has the digest of the file that a training-set folder would
        contain. It therefore equals that of the folder if ids, texts and image paths below `root` are the same. An
        image that is not a path below `root` has a name made of its digest, so that its set differs from a folder's.
        """
        images = dict.fromkeys(image for role in self.values() for image in map(self._image_identity, role) if image)
        digests = [digest_file(image) if isinstance(image, Path) else self._images[image].digest for image in images]
        return {**self.digests, "images": digest_json(digests)}

    def _image_identity(self, example: Example) -> Path | str | None:
        """Returns the name of an image in memory, or the file of an image of a folder."""
        source = self._image_source(example)
        return source.name if isinstance(source, ImageReference) else source


class _RowReader:
    """Turns rows into examples, and collects their images by name."""

    def __init__(self, root: Path | None) -> None:
        self.examples: dict[str, list[Example]] = {}
        self.images: dict[str, ImageReference] = {}
        self._root = root
        self._by_path: dict[str, str] = {}  # names of the images that rows name by a path, so that each is read once
        self._numbers: dict[tuple[str, str, str], int] = {}  # of the row, by role, column and value

    def add(self, role: str, row: Row, number: int, table: str | None) -> None:
        """Adds a row.

        Args:
            role: The role of the row.
            row: The row.
            number: The number of the row in its table, counted from 1.
            table: The name of the table in error messages.
        """
        record = RawRecord(row.value, table, partial(_position, row.value, number), number)
        examples = self.examples.setdefault(role, [])
        fields = _chat_fields(record) if messages.has_messages(row.value) else _question_fields(record)
        example_id = record.name("id") if record.value.get("id") is not None else f"{role}-{len(examples) + 1}"
        image_path = fields.pop("image")
        optional = {name: _optional_name(record, name) for name in ("category", "pair_id", "source")}
        try:
            example = Example(
                id=example_id,
                image=None if image_path is None else self._add_image(record, row, image_path),
                **fields,
                **{name: value for name, value in optional.items() if value is not None},
            )
        except ValidationError as error:
            raise record.error(describe_validation_error(error), "invalid-field") from None
        self._validate_unique(record, role, "id", example.id, number)
        if role in PAIRED_ROLES and example.pair_id:
            self._validate_unique(record, role, "pair_id", example.pair_id, number)
        examples.append(example)

    def _add_image(self, record: RawRecord, row: Row, path: tuple[str | int, ...]) -> str:
        field = messages.path_text(path)
        value = value_at(row.value, path)
        if isinstance(value, Mapping) and value.get("bytes") is None and value.get("path") is not None:
            value = value["path"]  # as `datasets.Image` stores a PIL image that was opened from a file
        if self._root is None and isinstance(value, str | Path) and "://" not in str(value):
            value = user_path(value).absolute()
        if isinstance(value, str | Path) and str(value) in self._by_path:
            return self._by_path[str(value)]
        try:
            reference = image_reference(value, self._root, row.loader(path))
        except UserError as error:
            raise record.error(error.message, error.code, field) from None
        except OSError as error:
            raise record.error(f"cannot be read: {error.strerror}", "file-unreadable", field) from None
        self.images.setdefault(reference.name, reference)
        if isinstance(value, str | Path):
            self._by_path[str(value)] = reference.name
        return reference.name

    def _validate_unique(self, record: RawRecord, role: str, column: str, value: str, number: int) -> None:
        earlier = self._numbers.setdefault((role, column, value), number)
        if earlier != number:
            raise record.error(f"has the same {column} as record {earlier}", "duplicate-id", column)


def _chat_fields(record: RawRecord) -> dict[str, Any]:
    chat = messages.parse(record)
    return {**chat._asdict(), "loss_on": "last_answer" if chat.history else "all_answers"}


def _question_fields(record: RawRecord) -> dict[str, Any]:
    missing = [name for name in ("question", "answer") if name not in record.value]
    if missing and {"prompt", "completion"} <= set(record.value):
        problem = "rows with prompt and completion are not supported. Rename the columns to question and answer."
        raise record.error(problem, "unsupported-setting", "prompt")
    if missing:
        columns = [str(name) for name in record.value]
        listed = printable(", ".join(columns)) or "none"
        raise record.error(
            f"the column is missing{nearest(missing[0], columns) or '.'} Rows need question and answer, or messages. "
            f"Found: {listed}",
            "missing-field",
            missing[0],
        )
    return {
        "question": record.text("question"),
        "answer": record.text("answer"),
        "history": messages.history_column(record),
        "system": record.optional_text("system"),
        "image": messages.image_column(record),
    }


def _optional_name(record: RawRecord, column: str) -> str | None:
    """Returns the text or the integer of an optional column as text."""
    value = record.value.get(column)
    return None if value is None or value == "" else record.name(column)


def _position(row: Mapping[str, Any], number: int) -> str:
    name = row.get("id")
    return f"{number} ({quoted(name)})" if isinstance(name, str | int) else str(number)


def _validate_role(role: object, field: str, record: str | None = None) -> None:
    if role not in ROLES:
        raise UserError(
            f"{quoted(role)} is not a role{nearest(str(role), ROLES)}. Roles are {', '.join(ROLES)}. Name the splits "
            "or keys after them, or pass one table with a column role.",
            code="unknown-role",
            record=record,
            field=field,
        )


def _role_of(row: Row, number: int) -> str:
    value = row.value.get("role")
    position = _position(row.value, number)
    if value is None:
        raise UserError(
            "the role is missing. Pass a column role, or a mapping of role to rows.",
            code="missing-field",
            record=position,
            field="role",
        )
    _validate_role(value, "role", position)
    return str(value)
