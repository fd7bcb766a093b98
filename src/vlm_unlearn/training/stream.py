"""What a run trains on, in order: a pure function of the seed and the position, so that a resumed run sees the same."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from vlm_unlearn.data.encoding import Batch, Processor, PromptMeter, Turn, encode, encode_with_labels, render
from vlm_unlearn.data.training_set import TrainingSet
from vlm_unlearn.errors import UserError
from vlm_unlearn.methods import Method, Role
from vlm_unlearn.records import Example
from vlm_unlearn.store import digest_text
from vlm_unlearn.training.packing import NO_IMAGE
from vlm_unlearn.training.references import answer_key

NLL = tuple[float, int]  # sum over the answer's tokens, and how many they are


class UnlearningStream(Dataset[dict[Role, Example]]):
    """Item `k` is ``{"forget": Example, "retain": Example, ...}``.

    The forget set is shuffled anew in each pass and its passes are laid end to end; the retain set likewise, at its own
    length. A decouple or preferred example is the one whose `pair_id` is its forget example's; a drawn refusal is a function of
    the seed and the position too.

    Args:
        group_by_image: shuffle the images, and in each the questions on it, so that a batch holds questions on few images. The sets are
            shuffled alike: forget and retain questions on one image come together as far as their numbers allow.
    """

    def __init__(
        self, training_set: TrainingSet, method: Method, length: int, seed: int, group_by_image: bool = False
    ) -> None:
        self._examples = training_set.examples
        self._refusals = training_set.refusals
        self._method = method
        self._roles = method.roles
        self._length = length
        self._seed = seed
        self._group_by_image = group_by_image
        self._orders: dict[tuple[Role, int], Sequence[int]] = {}
        self._pairs = {role: _pairs(training_set, role) for role in self._partners}

    @property
    def _partners(self) -> tuple[Role, ...]:
        """The roles whose example is another record, tied to the forget example."""
        tied = {"decouple"} | ({"preferred"} if self._method.preferred_answers == "data" else set())
        return tuple(role for role in self._roles if role in tied)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, position: int) -> dict[Role, Example]:
        forget = self._draw("forget", position)
        item: dict[Role, Example] = {"forget": forget}
        if self._method.forget_target == "refusal":
            item["forget"] = self._refused(forget, position)
        elif self._method.preferred_answers == "refusal":
            item["preferred"] = self._refused(forget, position)
        if "retain" in self._roles:
            item["retain"] = self._draw("retain", position)
        for role in self._partners:
            item[role] = self._pairs[role][str(forget.pair_id)]
        return item

    def unique_examples(self, role: Role) -> list[Example]:
        """Every different example of a role that the run will see, answers included."""
        if (
            role == "retain"
            or (role == "forget" and self._method.forget_target == "original")
            or role in self._partners
        ):
            return list(self._examples[role])
        found = {}
        for position in range(self._length):
            example = self[position][role]
            found[example.id, example.answer] = example
        return list(found.values())

    def _refused(self, forget: Example, position: int) -> Example:
        refusal = random.Random(f"{self._seed}-refusal-{position}").choice(self._refusals)
        return forget.model_copy(update={"answer": refusal})

    def _draw(self, role: Role, position: int) -> Example:
        examples = self._examples[role]
        turn, place = divmod(position, len(examples))
        if (role, turn) not in self._orders:
            self._orders = {
                key: order for key, order in self._orders.items() if key[0] != role
            }  # one pass of a role at a time
            self._orders[role, turn] = self._order(role, turn)
        return examples[self._orders[role, turn][place]]

    def _order(self, role: Role, turn: int) -> Sequence[int]:
        """The numbers of a role's examples in the order of one pass."""
        examples = self._examples[role]
        order = list(range(len(examples)))
        random.Random(f"{self._seed}-{role}-{turn}").shuffle(order)
        if (
            self._group_by_image
        ):  # an example without an image is on its own, and Python's sort keeps the order among equals
            names = [example.image or f"\0{example.id}" for example in examples]
            ranks = {name: random.Random(f"{self._seed}-image-{turn}-{name}").random() for name in names}
            order.sort(key=lambda number: ranks[names[number]])
        return order


NEEDS_PARTNERS = {
    "decouple": "prompt decoupling needs decouple.jsonl: import SafeEraser, or a table with decouple rows; or set prompt_decouple_weight=0",
    "preferred": "dpo needs preferred.jsonl; import VLGuard with --harmful-answers, a table with preferred rows, or take idk_dpo",
}


def _pairs(training_set: TrainingSet, role: Role) -> dict[str, Example]:
    partners = training_set.examples.get(role)
    if not partners:
        raise UserError(f"{training_set.folder}: {NEEDS_PARTNERS[role]}")
    pairs = {str(example.pair_id): example for example in partners if example.pair_id}
    for example in training_set.examples["forget"]:
        if example.pair_id is None or example.pair_id not in pairs:
            mend = (
                "; import VLGuard without --include-safe-image-unsafe, or take idk_dpo" if role == "preferred" else ""
            )
            raise UserError(
                f'{training_set.folder}: forget example "{example.id}" has no {role} example with its pair_id{mend}'
            )
        other = pairs[example.pair_id]
        if role == "preferred" and (other.question != example.question or other.image != example.image):
            raise UserError(
                f'{training_set.folder}: preferred example "{other.id}" asks something else than its forget example'
            )
    return pairs


class UnlearningCollator:
    """Encodes stream items into ``{"forget": {...}, "retain": {...}}``, each with every key the processor made.

    A role whose reference NLLs are cached also gets ``reference_nll_sum`` and ``reference_tokens``, both [B].
    """

    def __init__(
        self,
        processor: Processor,
        training_set: TrainingSet,
        method: Method,
        max_length: int,
        reference: Mapping[Role, Mapping[str, NLL]],
    ) -> None:
        self._processor = processor
        self._training_set = training_set
        self._roles = method.roles
        self._method = method
        self._one_turn = method.append_answer_to_prompt
        self._max_length = max_length
        self._reference = reference

    def __call__(self, items: Sequence[Mapping[Role, Example]]) -> dict[Role, Batch] | UserError:
        """The batch; in a process that loads data, also the error there is, since one raised there comes with all its traceback."""
        try:
            return {role: self.encode(role, [item[role] for item in items]) for role in items[0]}
        except UserError as error:
            if get_worker_info() is None:
                raise
            return error

    def encode(self, role: Role, examples: Sequence[Example]) -> Batch:
        """One role's batch."""
        turns = [self._full_turn(role, example) for example in examples]
        if role == "forget" and self._one_turn:
            return {**encode(self._processor, turns, padding_side="right"), "images": _image_keys(turns)}
        batch = encode_with_labels(self._processor, turns, self._max_length)
        batch["images"] = _image_keys(turns)
        if role in self._reference:
            values = [self._reference[role][answer_key(example)] for example in examples]
            batch["reference_nll_sum"] = torch.tensor([nll for nll, _ in values])
            batch["reference_tokens"] = torch.tensor([tokens for _, tokens in values])
        return batch

    def check_lengths(self) -> None:
        """Looks at every example that the method draws on.

        Raises:
            UserError: a question with its image leaves no room for an answer, or is no image; the record is named.
        """
        meter = PromptMeter(self._processor)
        if "refusal" in (self._method.forget_target, self._method.preferred_answers):
            for sentence in self._training_set.refusals:
                render(self._processor, Turn(f"refusals.json: {sentence[:40]}", None, "question", sentence))
        for role in self._roles:
            for example in self._training_set.examples.get(role, ()):  # drawn refusals go with the forget questions
                turn = self._full_turn(role, example)
                whole = role == "forget" and self._one_turn  # nothing comes after, so that the limit itself is allowed
                tokens = meter.total_tokens(turn) if whole else meter.prompt_tokens(turn)
                if tokens > self._max_length or (tokens == self._max_length and not whole):
                    what = "question, image and answer" if whole else "question and image"
                    raise UserError(
                        f'example "{example.id}": {what} take {tokens} tokens, max_length is {self._max_length}; '
                        f"raise training.max_length (an image is never cut)"
                    )

    def _full_turn(self, role: Role, example: Example) -> Turn:
        """Question and answer as the role trains on them."""
        if role == "forget" and self._one_turn:
            return self._turn(example, f"{example.question}\n{example.answer}", None)
        return self._turn(example, example.question, example.answer)

    def _turn(self, example: Example, question: str, answer: str | None) -> Turn:
        history = tuple((turn.question, turn.answer) for turn in example.history)
        return Turn(example.id, self._training_set.image_path(example), question, answer, history)


def _image_keys(turns: Sequence[Turn]) -> Tensor:
    """[B] a number for each image file, `NO_IMAGE` for none."""
    return torch.tensor(
        [NO_IMAGE if turn.image is None else int(digest_text(str(turn.image))[:15], 16) for turn in turns]
    )
