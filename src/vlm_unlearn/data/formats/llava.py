"""LLaVA's conversation format: ``{"id", "image", "conversations": [{"from": "human", "value"}, {"from": "gpt", "value"}]}``.

So far one round a record is read, which is what general-purpose data mixed into a retain set needs.
"""

from __future__ import annotations

from pathlib import Path

from vlm_unlearn.data.formats.fields import read_objects
from vlm_unlearn.data.images import resolve_image
from vlm_unlearn.errors import RequestError
from vlm_unlearn.records import Example

IMAGE_MARK = "<image>"


def read_llava(path: Path, images: Path) -> list[Example]:
    """Single-round conversations as examples; the image mark is taken out of the question.

    Raises:
        RequestError: broken JSON (with its line), a record without its fields or with several rounds, or an image that is missing or
            outside `images`.
    """
    found = []
    for number, record in enumerate(read_objects(path, "id")):
        turns = record.objects("conversations")
        if [turn.text("from") for turn in turns] != ["human", "gpt"]:
            raise RequestError(f'{record.where}: "conversations" must be one human turn and one gpt turn')
        image = record.text("image") if record.value.get("image") is not None else None
        if image is not None:
            resolve_image(images, image, record.where)
        question = turns[0].text("value").replace(IMAGE_MARK, "").strip()
        if not question:
            raise RequestError(f"{record.where}: the human turn asks nothing")
        answer = turns[1].text("value")
        # Ids repeat in published mixtures, so the record number is part of ours.
        name = f"llava/{number}/{record.value.get('id', '')}"
        found.append(Example(id=name, image=image, question=question, answer=answer, source="llava"))
    return found
