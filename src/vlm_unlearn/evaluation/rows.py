"""Prompts and images of an evaluation from rows in memory: dicts, a `datasets.Dataset`, a DataFrame, or prompts."""

from __future__ import annotations

import io
import math
import numbers
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from vlm_unlearn.attacks.base import Attack
from vlm_unlearn.data.formats import table
from vlm_unlearn.data.images import FORMATS, ImageReference, image_reference, image_size, open_image
from vlm_unlearn.errors import UserError, nearest, quoted
from vlm_unlearn.records import Kind, Prompt
from vlm_unlearn.store import user_path

KINDS: tuple[Kind, ...] = get_args(Kind)
MESSAGE_COLUMNS = ("messages", "conversations")
USER_ROLES, ASSISTANT_ROLES = ("user", "human"), ("assistant", "gpt")
# LLaVA's and LLaMA-Factory's placeholder for an image in a message. The image is always put before the question.
PLACEHOLDER = "<image>"
EXTENSIONS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}


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
        image = _add_image(row.image, images, root)
        return row.model_copy(update={"image": image, "rewrite": 0})
    if not isinstance(row, Mapping):
        raise UserError(f"is a {type(row).__name__}. A row must be a dict.", code="invalid-field")
    fields = {name: value for name, value in row.items() if not _is_missing(value)}
    message_column = next((column for column in MESSAGE_COLUMNS if column in fields), None)
    if message_column is not None and "question" not in fields:
        question, reference, message_images = _read_messages(fields[message_column], message_column)
    elif "question" in fields:
        question, reference, message_images = _text(fields, "question"), None, []
    else:
        suggestion = nearest("question", map(str, row))
        raise UserError(
            f"is missing{suggestion or '.'} Columns are question, image and answer, or messages and images.",
            code="missing-field",
            field="question",
        )
    image = _add_image(_only_image(fields, message_images), images, root)
    set_column = "set" if "set" in fields else "split"
    split = _text(fields, set_column) if set_column in fields else None
    # A set of a table, such as "harmless", is a kind too.
    kind = str(fields.get("kind", table.KINDS.get(table.SETS.get((split or "").lower(), ""), "unsafe")))
    if kind not in KINDS:
        raise UserError(
            f"is {quoted(kind)}{nearest(kind, KINDS)}. Kinds are {', '.join(KINDS)}.",
            code="invalid-field",
            field="kind",
        )
    id = _text(fields, "id", numbers_too=True) if "id" in fields else str(number - 1)
    return Prompt(
        id=id,
        group_id=_text(fields, "group_id", numbers_too=True) if "group_id" in fields else id,
        set=split or kind,
        kind=kind,
        image=image,
        question=question,
        reference=next((_text(fields, name) for name in ("reference", "answer") if name in fields), reference),
        category=_text(fields, "category", numbers_too=True) if "category" in fields else None,
    )


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))  # pandas has NaN for a missing text


def _text(fields: Mapping[str, Any], name: str, numbers_too: bool = False) -> str:
    value = fields[name]
    if numbers_too and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return str(int(value))
    if not isinstance(value, str):
        raise UserError(f"is a {type(value).__name__}. It must be text.", code="invalid-field", field=name)
    if not value.strip():
        raise UserError("is empty.", code="invalid-field", field=name)
    return value


def _read_messages(messages: Any, column: str) -> tuple[str, str | None, list[Any]]:
    """Returns the question, the reference answer and the images of a conversation.

    Raises:
        UserError: The conversation is broken, has several rounds, or has a system message.
    """

    def error(problem: str, code: str = "invalid-field") -> UserError:
        return UserError(problem, code=code, field=column)

    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise error("must be a list of messages.")
    turns: list[tuple[str, str]] = []
    images: list[Any] = []
    for message in messages:
        if not isinstance(message, Mapping):
            raise error("must be a list of messages with role and content.")
        role = message.get("role", message.get("from"))
        text, message_images = _read_content(message.get("content", message.get("value")), column)
        images += message_images
        turns.append((str(role), text))
    roles = [role for role, _ in turns]
    unsupported = next((role for role in roles if role not in USER_ROLES + ASSISTANT_ROLES), None)
    if unsupported is not None:
        raise error(
            f"has a message of the role {quoted(unsupported)}. Only user and assistant messages are supported.",
            "unsupported-setting",
        )
    reference = turns.pop()[1] if roles[-1] in ASSISTANT_ROLES else None
    if not turns or turns[-1][0] not in USER_ROLES:
        raise error("must end with a user message, or with one and the assistant's answer.")
    if len(turns) > 1:
        raise error(
            "has several rounds. An evaluation asks single questions, so keep the last round only.",
            "unsupported-setting",
        )
    question = turns[0][1].strip()
    if not question:
        raise error("has an empty question.")
    return question, reference or None, images


def _read_content(content: Any, column: str) -> tuple[str, list[Any]]:
    """Returns the text and the images of a message: a text, or a list of ``{"type": "text" | "image", ...}``."""
    if isinstance(content, str):
        return content.replace(PLACEHOLDER, "").strip(), []
    if not isinstance(content, Sequence):
        raise UserError("has a message without content.", code="invalid-field", field=column)
    texts, images = [], []
    for item in content:
        kind = item.get("type") if isinstance(item, Mapping) else None
        if kind == "text" and isinstance(item.get("text"), str):
            texts.append(item["text"].replace(PLACEHOLDER, ""))
        elif kind == "image":
            image = item.get("image")
            images += [] if image is None else [image]
        else:
            raise UserError(
                f"has content of the type {quoted(kind)}. Only text and image are supported.",
                code="unsupported-setting",
                field=column,
            )
    return "\n".join(text for text in texts if text).strip(), images


def _only_image(fields: Mapping[str, Any], message_images: Sequence[Any]) -> Any:
    """Returns the image of a row, from `image`, `images` or its messages, or None."""
    images = list(message_images)
    if "images" in fields:
        column = fields["images"]
        images += list(column) if isinstance(column, list | tuple) else [column]
    if "image" in fields:
        images.append(fields["image"])
    images = [image for image in images if not (_is_missing(image) or (isinstance(image, str) and not image))]
    if len(images) > 1:
        raise UserError(
            f"has {len(images)} images. A question can have one.", code="unsupported-setting", field="images"
        )
    return images[0] if images else None


def _add_image(value: Any, images: dict[str, ImageReference], root: Path | None) -> str | None:
    """Adds an image to `images`, and returns its file name.

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
        error.field = error.field or "image"
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
