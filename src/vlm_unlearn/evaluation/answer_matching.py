"""Matches the answers of another program to the prompts of a suite.

A key of the other program or the text of the question decides. Image, kind, record id and split choose between prompts
with the same question. The order of a file never decides, unless the user allows it.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from vlm_unlearn.data.answer_formats.base import ForeignAnswer
from vlm_unlearn.data.formats.llava import IMAGE_PLACEHOLDER
from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.records import Kind, Prompt, Response

MAX_EXAMPLES = 10  # errors that are listed for each kind
UNMATCHED = "unmatched-answer"  # the code of an answer to a prompt that the suite does not have
# The codes of answers that are never accepted, the most important first.
REJECTED = ("question-mismatch", "image-mismatch", "ambiguous-answer", "duplicate-answer")
# Fields of a prompt that an answer file of another program cannot show.
_HIDDEN_FIELDS = ("prefill", "temperature", "image_edits", "history")


class AnswerMatcher:
    """Collects the answers to the prompts of a suite.

    Args:
        prompts: The prompts.
        samples: The number of answers per prompt, by `Prompt.set`.
        keys: The prompts by the keys of the other program, by split. See `AnswerFormat.keys`.
        rewrite_of: `AnswerFormat.rewrite_of`.
        order: The ids of the prompts in the order of the data file, by split. Empty: the position decides nothing.
        other_splits: The splits of the suite that are not imported. Answers that name them are left out.

    Attributes:
        responses: The answers by `Response.key`.
        counts: The number of answers that were not accepted, by the code of their error.
        examples: The first of these errors, by their code.
        equal_to_reference: The number of answers that equal the reference answer of the data file.
        other: The number of answers to questions of splits that are not imported, by their split or kind.
        references: The number of reference answers that the other program has left in the place of an answer.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        samples: Mapping[str, int],
        keys: Mapping[str, Mapping[str, Prompt]],
        rewrite_of: Callable[[str], str | None],
        order: Mapping[str, Sequence[str]],
        other_splits: Iterable[str] = (),
    ) -> None:
        self._samples = samples
        self._keys = keys
        self._rewrite_of = rewrite_of
        self._order = order
        self._ids = {prompt.id for prompt in prompts}
        self._by_question: dict[str, list[Prompt]] = {}
        self._by_group: dict[str, list[Prompt]] = {}
        self._by_image_name: dict[str, list[Prompt]] = {}  # filled by the first error that needs it
        for prompt in prompts:
            self._by_question.setdefault(plain_question(prompt.question), []).append(prompt)
            self._by_group.setdefault(prompt.group_id, []).append(prompt)
        self._owners: dict[tuple[str, int], tuple[Path, ForeignAnswer]] = {}
        self._next_slots: dict[tuple[str, int | None], int] = {}
        self.responses: dict[tuple[str, int], Response] = {}
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[UserError]] = {}
        self.equal_to_reference = 0
        self.references = 0
        self.other = 0
        self._other_splits = frozenset(other_splits)
        self._kinds = {(split, prompt.kind) for prompt in prompts for split in (prompt.set, None)}

    def add(self, file: Path, answer: ForeignAnswer, split: str | None) -> str | None:
        """Adds an answer. One that is not accepted is counted.

        Args:
            file: The file of the answer.
            answer: The answer.
            split: The split that the user has named for the file.

        Returns:
            The split of the answer, or None if it was not accepted.
        """
        if self._is_of_other_split(answer, split):
            self.other += 1
            return None
        try:
            if split is not None and answer.split not in (None, split):
                raise _MatchError(
                    UNMATCHED, f"the answer names the split {quoted(answer.split)}, but its file is for {quoted(split)}"
                )
            candidates = self._candidates(answer, split or answer.split)
            prompt = candidates[0]
            if answer.text is not None and answer.text == prompt.reference:
                if answer.may_be_reference:
                    self.references += 1
                    return prompt.set
                self.equal_to_reference += 1
            key = self._free_slot(candidates, answer)
        except _MatchError as error:
            self.counts[error.code] += 1
            examples = self.examples.setdefault(error.code, [])
            if len(examples) < MAX_EXAMPLES:
                examples.append(UserError(str(error), code=error.code, file=file, record=answer.position()))
            return None
        self._owners[key] = file, answer
        self.responses[key] = Response(
            prompt_id=key[0],
            sample=key[1],
            text=answer.text,
            finish_reason=answer.finish_reason,
            error=answer.error,
        )
        return prompt.set

    def _is_of_other_split(self, answer: ForeignAnswer, split: str | None) -> bool:
        """Returns whether an answer itself says that it is for a split that is not imported."""
        if answer.kind is not None and (split, answer.kind) not in self._kinds:
            return True
        name = (answer.key or "").partition("/")[0] if answer.split is None else answer.split
        return split is None and name in self._other_splits

    def _candidates(self, answer: ForeignAnswer, split: str | None) -> list[Prompt]:
        """Returns the prompts that an answer belongs to. They differ in nothing but their ids.

        Raises:
            _MatchError: There is no such prompt, or the answer may belong to different prompts.
        """
        if answer.key is not None:
            return [self._prompt_of_key(answer, split)]
        if answer.question is None:
            candidates = self._by_group.get(answer.group or "", [])
            problem = f"the suite has no record with the id {quoted(answer.group)}"
        else:
            candidates = self._by_question.get(plain_question(answer.question), [])
            problem = f"the suite does not ask the question {quoted(answer.question)}"
            if not candidates and answer.image is not None:
                problem += self._other_question(answer.image, answer.kind)
        if len(candidates) > 1 or split is not None or answer.kind is not None:
            candidates = [
                prompt
                for prompt in candidates
                if (split is None or prompt.set == split) and (answer.kind is None or prompt.kind == answer.kind)
            ]
        if not candidates:
            place = f" in the split {quoted(split)}" if split is not None else ""
            kind = f" among those of the kind {answer.kind}" if answer.kind is not None else ""
            raise _MatchError(UNMATCHED, f"{problem}{place}{kind}")
        if answer.image is not None:
            images = [prompt for prompt in candidates if same_image(answer.image, prompt.image)]
            if not images:
                raise _MatchError(
                    UNMATCHED,
                    f"the suite asks {quoted(candidates[0].question)} about the image {quoted(candidates[0].image)}, "
                    f"not about {quoted(answer.image)}",
                )
            candidates = images
        if len(candidates) > 1 and answer.group is not None:
            candidates = [prompt for prompt in candidates if prompt.group_id == answer.group] or candidates
        if len(candidates) > 1:
            candidates = self._by_position(candidates, answer)
        self._check_equal(candidates)
        return candidates

    def _other_question(self, image: str, kind: Kind | None) -> str:
        """Returns the words that name a question of the suite about an image, or ``""`` if it has none."""
        if not self._by_image_name:
            for prompts in self._by_question.values():
                for prompt in filter(lambda prompt: prompt.image is not None, prompts):
                    self._by_image_name.setdefault(_image_name(prompt.image or ""), []).append(prompt)
        for prompt in self._by_image_name.get(_image_name(image), ()):
            if kind in (None, prompt.kind) and same_image(image, prompt.image):
                return f" about the image {quoted(image)}, but {quoted(prompt.question)}"
        return ""

    def _prompt_of_key(self, answer: ForeignAnswer, split: str | None) -> Prompt:
        """Returns the prompt with a key, if the answer's question and image are those of the prompt."""
        splits = list(self._keys.values()) if split is None else [self._keys.get(split, {})]
        key = answer.key or ""
        prompts = [keys[key] for keys in splits if key in keys]
        question_key = None if prompts else self._rewrite_of(key)
        if question_key is not None and any(question_key in keys for keys in splits):
            raise _MatchError(
                "question-mismatch",
                f"the suite has fewer rewrites of the question {quoted(question_key)} than the file, so the file is "
                "from other questions. Use the split with the file that the other program read.",
            )
        if not prompts or prompts[0].id not in self._ids:
            place = f" in the split {quoted(split)}" if split is not None else ""
            raise _MatchError(UNMATCHED, f"the suite has no prompt with the id {quoted(answer.key)}{place}")
        if len(prompts) > 1:
            names = ", ".join(prompt.set for prompt in prompts)
            raise _MatchError("ambiguous-answer", f"the id occurs in the splits {names}. Pass SPLIT=FILE.")
        (prompt,) = prompts
        if answer.question is not None and plain_question(answer.question) != plain_question(prompt.question):
            raise _MatchError(
                "question-mismatch",
                f"the question is {quoted(answer.question)}, but the suite asks {quoted(prompt.question)} "
                f"under the id {quoted(answer.key)}",
            )
        if answer.image is not None and not same_image(answer.image, prompt.image):
            raise _MatchError(
                "image-mismatch",
                f"the image is {quoted(answer.image)}, but the suite has {quoted(prompt.image)} "
                f"under the id {quoted(answer.key)}",
            )
        return prompt

    def _by_position(self, candidates: list[Prompt], answer: ForeignAnswer) -> list[Prompt]:
        """Returns the candidate at the answer's position in the data file, if the user allows positions."""
        if answer.number is None or not self._order:
            return candidates
        ids = {
            order[answer.number]
            for split, order in self._order.items()
            if answer.number < len(order) and any(prompt.set == split for prompt in candidates)
        }
        chosen = [prompt for prompt in candidates if prompt.id in ids]
        if not chosen:
            raise _MatchError(
                "question-mismatch",
                f"the suite has another question than {quoted(answer.question)} at the position {answer.number}, "
                "counted from 0",
            )
        return chosen

    def _check_equal(self, candidates: Sequence[Prompt]) -> None:
        """Checks that several prompts are the same, and that they have no fields that the answer cannot show."""
        first = candidates[0]
        hidden = [field for field in _HIDDEN_FIELDS if getattr(first, field) != Prompt.model_fields[field].default]
        if hidden:
            raise _MatchError(
                "ambiguous-answer",
                f"an attack of the split {quoted(first.set)} sets {hidden[0]}, which an answer file does not show. "
                "Only --format jsonl with prompt_id can name such prompts.",
            )
        if len(candidates) == 1:
            return
        if len({prompt.set for prompt in candidates}) > 1:
            splits = ", ".join(dict.fromkeys(prompt.set for prompt in candidates))
            raise _MatchError("ambiguous-answer", f"several splits ask this question: {splits}. Pass SPLIT=FILE.")
        if len({prompt.question for prompt in candidates}) > 1:  # found by the id of their record
            raise _MatchError("ambiguous-answer", "the record has several questions. Add the question to the answer.")
        if len({prompt.image for prompt in candidates}) > 1:
            raise _MatchError(
                "ambiguous-answer",
                f"the suite asks this question about {len(candidates):,} images, and the answer names none of them. "
                "If the file is in the order of the suite's data file, pass --by-position.",
            )

    def _free_slot(self, candidates: Sequence[Prompt], answer: ForeignAnswer) -> tuple[str, int]:
        """Returns the prompt id and the sample of an answer: the first that has no answer yet."""
        count = self._samples.get(candidates[0].set, 1)
        if answer.sample is not None and answer.sample >= count:
            raise _MatchError(
                UNMATCHED,
                f"the answer is sample {answer.sample + 1} of its prompt, but the split {quoted(candidates[0].set)} "
                f"has samples: {count}",
            )
        slots_per_prompt = count if answer.sample is None else 1
        pointer = candidates[0].id, answer.sample
        slot = self._next_slots.get(pointer, 0)
        while slot < len(candidates) * slots_per_prompt:
            number, sample = divmod(slot, slots_per_prompt)
            key = candidates[number].id, sample if answer.sample is None else answer.sample
            slot += 1
            if key not in self._owners:
                self._next_slots[pointer] = slot
                return key
        self._next_slots[pointer] = slot
        file, first = self._owners[candidates[0].id, answer.sample or 0]
        number_of_answers = f"{count} answers" if count > 1 else "one answer"
        raise _MatchError(
            "duplicate-answer",
            f"the prompt {quoted(candidates[0].id)} has {number_of_answers} already; the first is record "
            f"{first.position()} of {file.name}",
        )

    def missing(self, prompts: Iterable[Prompt]) -> list[tuple[str, int]]:
        """Returns the keys of the responses that no answer was found for, in the order of the prompts."""
        return [
            (prompt.id, sample)
            for prompt in prompts
            for sample in range(self._samples.get(prompt.set, 1))
            if (prompt.id, sample) not in self.responses
        ]


class _MatchError(Exception):
    """An answer that is not accepted, with the code of its error."""

    def __init__(self, code: str, problem: str) -> None:
        super().__init__(problem)
        self.code = code


def plain_question(question: str) -> str:
    """Returns a question without image placeholders, line breaks and repeated spaces, in Unicode's composed form."""
    if IMAGE_PLACEHOLDER in question:
        question = question.replace(IMAGE_PLACEHOLDER, " ")
    if not question.isascii():
        question = unicodedata.normalize("NFC", question)
    return " ".join(question.split())


def _image_name(path: str) -> str:
    return PurePosixPath(path.replace("\\", "/")).name


def same_image(name: str, image: str | None) -> bool:
    """Returns whether two paths can name the same image: one of them is the other, or its last parts.

    Args:
        name: The path in an answer file.
        image: The path of a prompt below its image folder.
    """
    if image is None or name == image:
        return name == image
    parts = PurePosixPath(name.replace("\\", "/")).parts
    image_parts = PurePosixPath(image.replace("\\", "/")).parts
    length = min(len(parts), len(image_parts))
    return length > 0 and parts[-length:] == image_parts[-length:]
