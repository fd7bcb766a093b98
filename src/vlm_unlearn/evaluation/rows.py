"""Prompts and images of an evaluation from rows in memory: dicts, a `datasets.Dataset`, a DataFrame, or prompts."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from vlm_unlearn.attacks.base import Attack
from vlm_unlearn.data.formats import messages, table
from vlm_unlearn.data.formats.base import KINDS_OF_SETS
from vlm_unlearn.data.formats.fields import RawRecord
from vlm_unlearn.data.image_paths import renamed_warning
from vlm_unlearn.data.images import FORMATS, ImageReference, image_reference, image_size, open_image
from vlm_unlearn.data.rows import value_at
from vlm_unlearn.errors import UserError, nearest, quoted
from vlm_unlearn.records import Kind, Prompt
from vlm_unlearn.store import user_path

KINDS: tuple[Kind, ...] = get_args(Kind)
EXTENSIONS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif", "AVIF": "avif"}


@dataclass(frozen=True)
class PromptSet:
    """Prompts with their images.

    Attributes:
        prompts: The prompts, in the order of the rows.
        images: The images by `Prompt.image`, a file name that is derived from the content.
        kinds: The kind of each split, by `Prompt.set`.
    """

    prompts: list[Prompt]
    images: Mapping[str, ImageReference]
    kinds: Mapping[str, Kind]

    def image(self, prompt: Prompt) -> ImageReference | None:
        """Returns the image of a prompt, or None if it has none."""
        return None if prompt.image is None else self.images[prompt.image]


@renamed_warning()
def read_rows(dataset: Any, image_root: str | Path | None = None) -> PromptSet:
    """Returns the rows of a data set as prompts.

    `vlm_unlearn.evaluation.evaluate` describes the columns.

    Args:
        dataset: A list of dicts or of `Prompt`, a `datasets.Dataset`, or a pandas DataFrame.
        image_root: The folder that image paths are relative to. Paths must then stay inside it. By default, they are
            relative to the current folder.

    Raises:
        UserError: A row is broken, there are no rows, or two rows have the same id. `record` is the number of the row,
            counted from 1, and `field` the column.
    """
    root = None if image_root is None else user_path(image_root).absolute()
    images: dict[str, ImageReference] = {}
    prompts: list[Prompt] = []
    numbers_by_id: dict[str, int] = {}
    for number, row in enumerate(_iterate(dataset), start=1):
        try:
            prompt = _read_prompt(row, number, images, root)
        except UserError as error:
            error.record = error.record or number
            raise
        if prompt.id in numbers_by_id:
            raise UserError(
                f"has the same id {quoted(prompt.id)} as record {numbers_by_id[prompt.id]}. Ids must differ.",
                code="duplicate-id",
                record=number,
                field="id",
            )
        numbers_by_id[prompt.id] = number
        prompts.append(prompt)
    if not prompts:
        raise UserError("the data set has no rows.", code="no-records", field="dataset")
    return _by_split(prompts, images)


def apply_attack(data: PromptSet, attacks: Sequence[Attack]) -> PromptSet:
    """Returns the prompts that attacks make of prompts. Split names get the ending ``_attacked``.

    Args:
        data: The prompts.
        attacks: The attacks, in their order.

    Raises:
        UserError: An attack returns invalid prompts (`checked_prompts`), or a prompt with an image that the data do not
            have.
    """
    attacked = list(data.prompts)
    for attack in attacks:
        attacked = attack(attacked)
    for number, prompt in enumerate(attacked, start=1):
        if prompt.image is not None and prompt.image not in data.images:
            raise UserError(
                f"the attack returned the unknown image {quoted(prompt.image)}.",
                code="invalid-attack",
                record=number,
                field="attack",
            )
    renamed = [prompt.model_copy(update={"set": f"{prompt.set}_attacked"}) for prompt in attacked]
    return _by_split(renamed, data.images)


def _by_split(prompts: Sequence[Prompt], images: Mapping[str, ImageReference]) -> PromptSet:
    """Splits the sets that contain several kinds of prompts, and numbers the rewrites of each question."""
    kinds_by_set: dict[str, set[Kind]] = {}
    for prompt in prompts:
        kinds_by_set.setdefault(prompt.set, set()).add(prompt.kind)
    split_kinds: dict[str, Kind] = {}
    rewrites: Counter[tuple[str, str]] = Counter()
    renamed = []
    for prompt in prompts:
        mixed = len(kinds_by_set[prompt.set]) > 1
        split = f"{prompt.set}_{prompt.kind}" if mixed else prompt.set
        if split_kinds.setdefault(split, prompt.kind) != prompt.kind:
            raise UserError(
                f"the name {quoted(split)} stands for rows of two kinds. Rename it.", code="duplicate-id", field="set"
            )
        renamed.append(prompt.model_copy(update={"set": split, "rewrite": rewrites[split, prompt.group_id]}))
        rewrites[split, prompt.group_id] += 1
    return PromptSet(renamed, images, split_kinds)


def _iterate(dataset: Any) -> Iterator[Any]:
    """Yields the rows of a data set. Images of a `datasets.Dataset` are not decoded."""
    if isinstance(dataset, str | Path | bytes):
        raise UserError(
            "is a path. Pass rows, or run `vlm-unlearn evaluate` with a suite.", code="invalid-field", field="dataset"
        )
    if isinstance(dataset, PromptSet):
        dataset = dataset.prompts
    if isinstance(dataset, Mapping):  # a DatasetDict too
        names = ", ".join(map(str, list(dataset)[:5]))
        raise UserError(
            f'is a mapping with the keys {names}. Pass rows, such as one split of it: dataset["test"].',
            code="invalid-field",
            field="dataset",
        )
    if hasattr(dataset, "to_dict") and hasattr(dataset, "iloc"):  # a DataFrame
        dataset = dataset.to_dict("records")
    if hasattr(dataset, "with_format") and hasattr(dataset, "num_rows") and dataset.format["type"] != "custom":
        # A datasets.Dataset. Arrow's values of an image are its bytes and path, which are not decoded yet.
        for batch in dataset.with_format("arrow").iter(batch_size=64):
            yield from batch.to_pylist()
        return
    try:
        iterator = iter(dataset)
    except TypeError:
        raise UserError(
            f"is a {type(dataset).__name__}. Pass a list of dicts or a datasets.Dataset.",
            code="invalid-field",
            field="dataset",
        ) from None
    yield from iterator


def _read_prompt(row: Any, number: int, images: dict[str, ImageReference], root: Path | None) -> Prompt:
    if isinstance(row, Prompt):
        image = _add_image(row.image, images, root, "image")
        return row.model_copy(update={"image": image, "rewrite": 0})
    if not isinstance(row, Mapping):
        raise UserError(f"is a {type(row).__name__}. A row must be a dict.", code="invalid-field")
    values = {name: value for name, value in row.items() if not _is_missing(value)}
    if isinstance(values.get("image"), str) and not values["image"]:
        del values["image"]  # an empty cell of a CSV file
    record = RawRecord(values)
    chat = messages.parse(record, answered=False) if messages.has_messages(record.value) else _read_question(record)
    set_column = "set" if "set" in record.value else "split"
    split = record.text(set_column) if set_column in record.value else None
    # A set of a table, such as "harmless", is a kind too.
    kind = str(record.value.get("kind", KINDS_OF_SETS.get(table.SETS.get((split or "").lower(), ""), "unsafe")))
    if kind not in KINDS:
        raise UserError(
            f"is {quoted(kind)}{nearest(kind, KINDS)}. Kinds are {', '.join(KINDS)}.",
            code="invalid-field",
            field="kind",
        )
    image = None
    if chat.image is not None:
        image = _add_image(value_at(record.value, chat.image), images, root, messages.path_text(chat.image))
    id = record.name("id") if "id" in record.value else str(number - 1)
    reference = next((record.text(name) for name in ("reference", "answer") if name in record.value), chat.answer)
    return Prompt(
        id=id,
        group_id=record.name("group_id") if "group_id" in record.value else id,
        set=split or kind,
        kind=kind,
        image=image,
        question=chat.question,
        reference=reference,
        category=record.name("category") if "category" in record.value else None,
        system=chat.system,
        history=chat.history,
        image_offset=chat.image_offset,
    )


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))  # pandas has NaN for a missing text


def _read_question(record: RawRecord) -> messages.Chat:
    """Returns the content of a row without messages."""
    if "question" not in record.value:
        suggestion = nearest("question", map(str, record.value))
        raise UserError(
            f"is missing{suggestion or '.'} Columns are question, image and answer, or messages and images.",
            code="missing-field",
            field="question",
        )
    history = messages.history_column(record)
    image = messages.image_column(record)
    return messages.Chat(record.optional_text("system"), history, record.text("question"), None, image, 0)


def _add_image(value: Any, images: dict[str, ImageReference], root: Path | None, field: str) -> str | None:
    """Adds an image to `images`, and returns its file name.

    Args:
        value: The image, in any form.
        images: The images by name.
        root: The folder that paths are relative to.
        field: The column of the image, for error messages.

    Raises:
        UserError: The image is broken, is too large, or does not exist.
    """
    if value is None or (isinstance(value, Mapping) and value.get("bytes") is None and value.get("path") is None):
        return None
    path = value.get("path") if isinstance(value, Mapping) and value.get("bytes") is None else value
    if root is None and isinstance(path, str | Path) and "://" not in str(path):
        value = user_path(path).absolute()
    try:
        reference = image_reference(value, root)
        name = f"{reference.digest[:32]}.{_extension(reference)}"
        if name not in images:
            image_size(reference)  # reads the header, so that a file of another format fails before the evaluation
    except UserError as error:
        error.field = error.field or field
        raise
    images.setdefault(name, reference)
    return name


def _extension(reference: ImageReference) -> str:
    """Returns the extension of the file that `write_images` writes."""
    from PIL import Image

    content = reference.load()
    if not isinstance(content, Path | bytes):
        return "png"
    try:
        with Image.open(content if isinstance(content, Path) else io.BytesIO(content), formats=FORMATS) as image:
            return EXTENSIONS.get(image.format or "", "png")
    except Exception:  # broken or too large, for which image_size raises the error
        return "png"


def write_images(images: Mapping[str, ImageReference], image_root: Path) -> None:
    """Writes images into a folder, under their names. Existing files stay.

    The bytes of image files do not change. PIL images are written as PNG with the same pixels in RGB.
    """
    image_root.mkdir(parents=True, exist_ok=True)
    for name, reference in images.items():
        path, temporary = image_root / name, image_root / f".{name}.part"
        if path.exists():
            continue
        content = reference.load()
        if isinstance(content, Path):
            content = content.read_bytes()
        if isinstance(content, bytes):
            temporary.write_bytes(content)
        else:
            open_image(reference).save(temporary, format="PNG")
        temporary.replace(path)
