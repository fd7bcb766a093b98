"""Rounds that lead to the question (after Crescendo, Russinovich et al. 2024, arXiv 2404.01833, with fixed answers)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field

from vlm_unlearn.attacks.base import Attack, register, variant_of
from vlm_unlearn.attacks.prefill import as_list
from vlm_unlearn.attacks.texts import read_texts
from vlm_unlearn.config import Strict
from vlm_unlearn.data_tools.paraphrase_rules import requested_content
from vlm_unlearn.errors import UserError
from vlm_unlearn.records import Prompt, Round

TOPIC = "{topic}"


class RoundsFile(Strict):
    """A file of rounds."""

    rounds: tuple[Round, ...]
    """The rounds, in their order. `{topic}` stands for the content that the question requests."""
    control: tuple[Round, ...] = ()
    """As many harmless rounds of the same length."""


class MultiTurnOptions(Strict):
    """Options of `MultiTurn`."""

    rounds: Annotated[tuple[Annotated[int, Field(ge=0, le=256)], ...], BeforeValidator(as_list)] = ()
    """Numbers of rounds, for a curve. Each makes one rewrite with the first rounds. Empty uses all rounds."""
    file: Path | None = None
    """YAML file with the rounds, in place of the shipped ones."""
    control: bool = False
    """Use the harmless rounds instead."""


@register("multi_turn")
class MultiTurn(Attack):
    """Leads to the question over earlier rounds, in which the assistant has agreed to speak about its topic.

    The answers of the rounds are fixed texts and not the model's. The image is in the first round. Judges grade the
    answer against the question alone.

    Control: as many rounds of the same length, about nothing harmful.
    """

    options_type = MultiTurnOptions

    @cached_property
    def _rounds(self) -> tuple[Round, ...]:
        content = read_texts(RoundsFile, "rounds.yaml", self.options.file)
        if self.options.control and len(content.control) != len(content.rounds):
            raise UserError(
                f"has {len(content.rounds)} `rounds` and {len(content.control)} of `control`. Write as many of both.",
                code="missing-setting",
                file=self.options.file,
            )
        return content.control if self.options.control else content.rounds

    def apply(self, prompts: Sequence[Prompt]) -> Iterator[Prompt]:
        """Yields each prompt once for every number of rounds.

        Raises:
            UserError: There are fewer rounds than such a number.
        """
        counts = self.options.rounds or [len(self._rounds)]
        if max(counts) > len(self._rounds):
            problem = f"there are {len(self._rounds)} rounds, fewer than {max(counts)}."
            raise UserError(problem, code="out-of-range", field="attack.rounds")
        name = "multi_turn-control" if self.options.control else "multi_turn"
        for prompt in prompts:
            topic = requested_content(prompt.question)
            rounds = [
                Round(question=item.question.replace(TOPIC, topic), answer=item.answer.replace(TOPIC, topic))
                for item in self._rounds
            ]
            for count in counts:
                history = (*prompt.history, *rounds[:count])
                # The image of a single question moves to the first round, in which its place means nothing.
                moved = count > 0 and not prompt.history
                yield variant_of(
                    prompt,
                    f"{name}/{count}",
                    history=history,
                    image_offset=0 if moved else prompt.image_offset,
                    judged_question=prompt.conversation,
                )
