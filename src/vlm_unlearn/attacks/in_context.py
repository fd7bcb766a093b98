"""In-context examples: other questions with their answers, as earlier rounds (Anil et al. 2024, many-shot)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field

from vlm_unlearn.attacks.base import Attack, register, variant_of
from vlm_unlearn.attacks.prefill import as_list
from vlm_unlearn.attacks.texts import PairsFile, read_texts
from vlm_unlearn.config import Strict
from vlm_unlearn.data.formats.base import KINDS_OF_SETS
from vlm_unlearn.data.readers import read_any
from vlm_unlearn.data_tools.pipeline import read_answers
from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.records import Kind, Prompt, Round
from vlm_unlearn.store import user_path


class InContextOptions(Strict):
    """Options of `InContext`."""

    k: Annotated[tuple[Annotated[int, Field(ge=0, le=256)], ...], BeforeValidator(as_list)] = (4,)
    """Numbers of pairs, for a curve. Each makes one rewrite. A larger number contains the pairs of a smaller one."""
    file: Path | None = None
    """YAML file with `pairs`, or a data file or training set, of which the unsafe questions are used.

    Null takes the other questions of the split with their references. With `control`, it takes the shipped pairs, and
    the safe questions of a data file are used.
    """
    answers: Path | None = None
    """JSON file `image -> answer` or `record id -> answer`, whose answers replace those of the pairs."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the choice of pairs."""
    control: bool = False
    """Use harmless pairs instead."""


@register("in_context")
class InContext(Attack):
    """Puts k pairs of other unsafe questions and their harmful answers in front of the question, as earlier rounds.

    The pairs have no image, and the image stays with the question. No pair has the question's own text or answer, since
    it would give the answer away. The answers must be harmful ones: the references of VLGuard's test file are refusals,
    for which `answers` names others. Judges grade the answer against the question alone.

    Control: k harmless pairs. They show the effect of any earlier rounds in which every question is answered.
    """

    options_type = InContextOptions

    def apply(self, prompts: Sequence[Prompt]) -> Iterator[Prompt]:
        """Yields each prompt once for every k.

        Raises:
            UserError: There are fewer pairs than k.
        """
        pairs = self._pairs(prompts)
        name = "in_context-control" if self.options.control else "in_context"
        for prompt in prompts:
            chosen = self._choose(pairs, prompt)
            for k in self.options.k:
                yield variant_of(
                    prompt,
                    f"{name}/{k}",
                    history=(*chosen[:k], *prompt.history),
                    image_round=0 if prompt.image is None else k + prompt.image_round,
                    judged_question=prompt.conversation,
                )

    def _choose(self, pairs: Sequence[Round], prompt: Prompt) -> list[Round]:
        own_texts = {_normalize(prompt.question), _normalize(self._answer(prompt))}
        others = [pair for pair in pairs if not own_texts & {_normalize(pair.question), _normalize(pair.answer)} - {""}]
        largest = max(self.options.k)
        if len(others) < largest:
            raise UserError(
                f"there are {len(others)} pairs of other questions, fewer than k = {largest}. Pass another `file`.",
                code="out-of-range",
                record=quoted(prompt.id),
                field="attack.k",
            )
        return random.Random(f"{self.options.seed} {prompt.group_id}").sample(others, largest)

    @cached_property
    def _answers(self) -> dict[str, str] | None:
        return None if self.options.answers is None else read_answers(user_path(self.options.answers))

    def _answer(self, prompt: Prompt) -> str:
        return self._resolve(prompt.group_id, prompt.image, prompt.reference)

    def _resolve(self, id: str, image: str | None, answer: str | None) -> str:
        if self._answers is None:
            return answer or ""
        return self._answers.get(id, self._answers.get(image or "", ""))

    def _pairs(self, prompts: Sequence[Prompt]) -> list[Round]:
        """Returns the different pairs, in the order of their source."""
        file, control = self.options.file, self.options.control
        if file is None and not control:
            candidates = [(prompt.question, self._answer(prompt)) for prompt in prompts]
        elif file is None or file.suffix in (".yaml", ".yml"):
            return read_texts(PairsFile, "benign_pairs.yaml", file).pairs
        else:
            kind: Kind = "safe" if control else "unsafe"
            entries = read_any(user_path(file))
            examples = (entry.example for entry in entries if KINDS_OF_SETS.get(entry.set, kind) == kind)
            candidates = [(item.question, self._resolve(item.id, item.image, item.answer)) for item in examples]
        by_text = {_normalize(question): (question, answer) for question, answer in candidates if answer.strip()}
        return [Round(question=question, answer=answer) for question, answer in by_text.values()]


def _normalize(text: str) -> str:
    return " ".join(text.lower().split())
