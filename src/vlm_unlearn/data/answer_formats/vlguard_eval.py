"""The answers of Safety Mirage's ``VLGuard_eval.py``: one JSON object, ``{"Ads_1": "answer", ...}``.

The script reads a VLGuard file (``--metaDir``), asks the questions of one kind (``--dataset``) in file order, and
writes ``OUTPUT_DIR/DATASET/ENGINE.json``. Of several records with the same id, the rewrites of one question, the first
has the id as its key, and the next ones ``ID_1``, ``ID_2`` and so on. A key that is in use already gets the next free
number. The file contains no questions. Its answers are therefore matched by id only, and the user names the split.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from vlm_unlearn.config import SplitConfig
from vlm_unlearn.data.answer_formats.base import AnswerFormat, ForeignAnswer, no_answers, register
from vlm_unlearn.data.formats.fields import RawRecord
from vlm_unlearn.data.json_stream import Item, members
from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.records import Kind, Prompt
from vlm_unlearn.store import read_json

DATASETS: dict[str, Kind] = {
    "unsafes": "unsafe",
    "safe_safes": "safe",
    "safe_unsafes": "safe_image_unsafe_question",
}
MAX_METRICS_BYTES = 1 << 20
METRICS_KEYS = {"engine", "dataset", "asr"}  # of the file ENGINE_metrics.json next to the answers


@register("vlguard_eval")
class VLGuardEval(AnswerFormat):
    """The answer files of ``VLGuard_eval.py``, one per split."""

    needs_split = True

    def answers(self, path: Path) -> Iterator[ForeignAnswer]:
        metrics_keys = set(METRICS_KEYS)
        for item in members(path):
            key, text = item.value
            metrics_keys.discard(key)
            if not metrics_keys:
                fix = f"It holds the script's rates. Pass {path.stem.removesuffix('_metrics')}.json, next to it."
                raise no_answers(path, fix)
            position = partial(_position, item)
            record = RawRecord({key: text}, path.name, position, item.number)
            yield ForeignAnswer(position, record.text(key, empty=True), key=key)

    def keys(self, prompts: Sequence[Prompt]) -> Mapping[str, Prompt]:
        """Returns the prompts by the keys that the script gives them, in the order in which it asks them."""
        keys: dict[str, Prompt] = {}
        numbers: dict[str, int] = {}  # the next suffix to try, by id
        for prompt in prompts:
            key, number = prompt.group_id, numbers.get(prompt.group_id, 1)
            while key in keys:
                key = f"{prompt.group_id}_{number}"
                number += 1
            numbers[prompt.group_id] = number
            keys[key] = prompt
        return keys

    def rewrite_of(self, key: str) -> str | None:
        question, _, number = key.rpartition("_")
        return question if question and number.isdecimal() else None

    def validate_split(self, path: Path, split: SplitConfig) -> None:
        """Checks that the script can have asked the questions of a split.

        Raises:
            UserError: The split has an attack, whose questions are in no file that the script reads, or the file is in
                the folder of another kind or case of questions, or next to a metrics file of another kind.
        """
        if split.attacks:
            raise UserError(
                f"the suite makes the questions of the split {quoted(split.name)} by rules, and VLGuard_eval.py asks "
                "those of a file. Use a suite that reads the file of --metaDir, such as "
                "suites/safety_mirage_released_attack.",
                code="question-mismatch",
                file=path,
            )
        folder, is_attack_file = path.absolute().parent.parent.name, "shot" in split.file.stem
        if (folder == "jailbreak" and split.file.name == "test.json") or (folder == "normal" and is_attack_file):
            raise UserError(
                f"is in the folder {folder}, but the questions of the split {quoted(split.name)} are those of "
                f"{split.file.name}. Name another split.",
                code="question-mismatch",
                file=path,
            )
        dataset = _dataset(path)
        kind = DATASETS.get(dataset)
        if kind is not None and kind != split.kind:
            raise UserError(
                f"contains answers of the script's dataset {dataset}, whose questions are of the kind {kind}, but the "
                f"split {quoted(split.name)} has the kind {split.kind}. Name another split.",
                code="question-mismatch",
                file=path,
            )


def _dataset(path: Path) -> str:
    """Returns the ``--dataset`` of an answer file: that of the metrics file next to it, or the name of its folder."""
    metrics = path.with_name(f"{path.stem}_metrics.json")
    if metrics.is_file() and metrics.stat().st_size < MAX_METRICS_BYTES:
        with suppress(UserError):
            value = read_json(metrics)
            if isinstance(value, dict) and value.get("dataset") in DATASETS:
                return str(value["dataset"])
    return path.absolute().parent.name


def _position(item: Item) -> str:
    return f"{item.number + 1} (line {item.line}, {quoted(item.value[0])})"
