"""The data of a training run: the stream of examples and the collator that encodes them.

The stream is a pure function of the seed and the position, so that a resumed run continues with the same examples.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from vlm_unlearn.data.dataset import UnlearningDataset
from vlm_unlearn.data.encoding import Batch, PromptMeter, Turn, render, token_ids
from vlm_unlearn.data.encoding_cache import TurnEncoder
from vlm_unlearn.data.images import image_key, image_size
from vlm_unlearn.data.processor_call import Processor
from vlm_unlearn.data.published_text import PUBLISHED_TURNS
from vlm_unlearn.errors import UserError
from vlm_unlearn.methods import Method, Role
from vlm_unlearn.modeling.packing import NO_IMAGE
from vlm_unlearn.records import Example
from vlm_unlearn.training.references import answer_key

GroupByImage = bool | str  # True, False or "retain"


class UnlearningStream(Dataset[dict[Role, Example]]):
    """A dataset whose item `k` is ``{"forget": Example, "retain": Example, ...}``.

    The forget set is shuffled anew in each epoch, and its epochs are concatenated. The retain set has its own
    epochs, of its own length. A decouple or preferred example is the one with the `pair_id` of the forget example.
    Random refusals are a function of the seed and the position too.

    Args:
        training_set: The examples of all roles.
        method: Determines the roles of an item and the answers of its forget and preferred examples.
        length: The number of items.
        seed: Determines the order and the refusals.
        group_by_image: True shuffles the images, and the questions within each image, so that a batch contains few
            images. Forget and retain set use the same order of images, so that questions on one image from both
            sets meet as far as their numbers allow. ``"retain"`` shuffles the forget set as always, and orders only the
            retain set: next to each forget question is a random retain question on its image if one is left in the
            epoch, and otherwise one of those that go with no forget question.

    Raises:
        UserError: The training set lacks the pairs that the method needs.
    """

    def __init__(
        self,
        training_set: UnlearningDataset,
        method: Method,
        length: int,
        seed: int,
        group_by_image: GroupByImage = False,
    ) -> None:
        self._examples = training_set
        self._refusals = training_set.refusals
        self._method = method
        self._roles = method.requirements.roles
        self._length = length
        self._seed = seed
        self._group_by_image = group_by_image
        self._orders: dict[
            tuple[Role, int], Sequence[int]
        ] = {}  # by role and epoch, only the current epoch of each role
        self._pairs = {role: _examples_by_pair_id(training_set, role) for role in self._paired_roles}

    @property
    def _paired_roles(self) -> tuple[Role, ...]:
        """The roles whose example is another record that is paired with the forget example."""
        paired = {"decouple"} | ({"preferred"} if self._method.preferred_answers == "data" else set())
        return tuple(role for role in self._roles if role in paired)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, position: int) -> dict[Role, Example]:
        forget = self._example("forget", position)
        item: dict[Role, Example] = {"forget": forget}
        if self._method.forget_target == "refusal":
            item["forget"] = self._with_refusal(forget, position)
        elif self._method.preferred_answers == "refusal":
            item["preferred"] = self._with_refusal(forget, position)
        if "retain" in self._roles:
            item["retain"] = self._example("retain", position)
        for role in self._paired_roles:
            item[role] = self._pairs[role][str(forget.pair_id)]
        return item

    def unique_examples(self, role: Role) -> list[Example]:
        """Returns all examples of a role that the run uses, once for each of their answers."""
        original_forget = role == "forget" and self._method.forget_target == "original"
        if role == "retain" or original_forget or role in self._paired_roles:
            return list(self._examples[role])
        examples = {}
        for position in range(self._length):
            example = self[position][role]
            examples[example.id, example.answer] = example
        return list(examples.values())

    def _with_refusal(self, forget: Example, position: int) -> Example:
        """Returns the forget example with a random refusal as its answer."""
        refusal = random.Random(f"{self._seed}-refusal-{position}").choice(self._refusals)
        return forget.model_copy(update={"answer": refusal})

    def _example(self, role: Role, position: int) -> Example:
        """Returns the role's own example at a position."""
        examples = self._examples[role]
        epoch, index = divmod(position, len(examples))
        if (role, epoch) not in self._orders:
            order = self._epoch_order(role, epoch)
            if self._group_by_image == "retain" and role == "retain":
                order = self._next_to_forget_images(order, epoch * len(examples))
            self._orders = {key: value for key, value in self._orders.items() if key[0] != role}
            self._orders[role, epoch] = order
        return examples[self._orders[role, epoch][index]]

    def _epoch_order(self, role: Role, epoch: int) -> Sequence[int]:
        """Returns the indices of a role's examples in the order of one epoch."""
        examples = self._examples[role]
        order = list(range(len(examples)))
        random.Random(f"{self._seed}-{role}-{epoch}").shuffle(order)
        if self._group_by_image is True:
            # An example without an image is a group of its own. The sort is stable, so questions on one image stay
            # shuffled.
            names = [example.image or f"\0{example.id}" for example in examples]
            ranks = {name: random.Random(f"{self._seed}-image-{epoch}-{name}").random() for name in names}
            order.sort(key=lambda index: ranks[names[index]])
        return order

    def _next_to_forget_images(self, order: Sequence[int], start: int) -> list[int]:
        """Returns the retain examples of an epoch, each at a position whose forget example has its image, if any.

        Args:
            order: The indices of the retain examples, shuffled.
            start: The position of the epoch's first example.
        """
        retain = self._examples["retain"]
        by_image: dict[str | None, list[int]] = {}
        for index in reversed(order):
            by_image.setdefault(retain[index].image, []).append(index)
        matched: list[int | None] = []
        for position in range(start, start + len(order)):
            image = self._example("forget", position).image
            matched.append(by_image[image].pop() if image and by_image.get(image) else None)
        used = {index for index in matched if index is not None}
        rest = iter([index for index in order if index not in used])
        return [next(rest) if index is None else index for index in matched]


MISSING_PAIRS = {
    "decouple": "prompt decoupling needs the role decouple. Import SafeEraser or a table with decouple rows, "
    "or set prompt_decouple_weight=0.",
    "preferred": "dpo needs the role preferred. Import VLGuard with --harmful-answers or a table with preferred rows, "
    "or use method=idk_dpo.",
}


def _examples_by_pair_id(training_set: UnlearningDataset, role: Role) -> dict[str, Example]:
    """Returns the examples of a paired role by `pair_id`, one for each forget example.

    Raises:
        UserError: The set has no such examples, one is missing, or a preferred example has a different question
            than its forget example.
    """
    folder, paired_examples = training_set.folder, training_set.get(role)
    if not paired_examples:
        raise UserError(MISSING_PAIRS[role], code="missing-pairs", file=folder)
    by_pair_id = {str(example.pair_id): example for example in paired_examples if example.pair_id}
    for forget in training_set["forget"]:
        if forget.pair_id is None or forget.pair_id not in by_pair_id:
            fix = "Import VLGuard without --include-safe-image-unsafe, or use method=idk_dpo."
            raise UserError(
                f"no {role} example has the pair_id of this forget example."
                + (f" {fix}" if role == "preferred" else ""),
                code="missing-pairs",
                file=folder,
                record=forget.id,
                field="pair_id",
            )
        paired = by_pair_id[forget.pair_id]
        if role == "preferred" and (paired.question != forget.question or paired.image != forget.image):
            raise UserError(
                "this preferred example must have the same question and image as its forget example.",
                code="pair-mismatch",
                file=folder,
                record=paired.id,
            )
    return by_pair_id


class UnlearningCollator:
    """Encodes stream items into ``{"forget": {...}, "retain": {...}}``, with all tensors that the processor returns.

    Each batch also contains ``images`` [B], a key for each image, and ``answer_keys`` [B], by which cached
    reference values are found.

    Args:
        processor: The model's processor.
        training_set: Contains the images of the examples.
        method: Determines the roles, and whether a forget answer is appended to its prompt.
        max_length: The maximum number of tokens of a sample. Longer answers are truncated.
    """

    def __init__(
        self,
        processor: Processor,
        training_set: UnlearningDataset,
        method: Method,
        max_length: int,
    ) -> None:
        self._processor = processor
        self._training_set = training_set
        self._method = method
        self._max_length = max_length
        self._encoder = TurnEncoder(processor, max_length)

    def __call__(self, items: Sequence[Mapping[Role, Example]]) -> dict[Role, Batch] | UserError:
        """Collates a batch.

        In DataLoader workers, errors are returned rather than raised so that the main process can re-raise them without
        the worker's traceback.
        """
        try:
            roles = dict.fromkeys(role for item in items for role in item)  # not all items have all roles
            return {role: self.encode(role, [item[role] for item in items if role in item]) for role in roles}
        except UserError as error:
            if get_worker_info() is None:
                raise
            return error

    def encode(self, role: Role, examples: Sequence[Example]) -> Batch:
        """Returns the batch of one role."""
        turns = [self._turn(role, example) for example in examples]
        encoder = self._encoder
        batch = encoder.encode(turns) if self._answer_in_prompt(role) else encoder.encode_with_labels(turns)
        batch["images"] = _image_keys(turns)
        batch["answer_keys"] = torch.tensor([answer_key(example) for example in examples])
        return batch

    def check_lengths(self) -> None:
        """Validates the length of every example that the method uses, and the refusals.

        Raises:
            UserError: A question with its image leaves no room for an answer, or an image or a text is invalid.
        """
        meter = PromptMeter(self._processor)
        if "refusal" in (self._method.forget_target, self._method.preferred_answers):
            for sentence in self._training_set.refusals:
                render(self._processor, Turn(f"refusals.json: {sentence[:40]}", None, "question", sentence))
        for role in self._method.requirements.roles:
            for example in self._training_set.get(role, ()):  # none for refusals as preferred answers
                turn = self._turn(role, example)
                if self._answer_in_prompt(role):
                    content, tokens, limit = "question, image and answer", meter.total_tokens(turn), self._max_length
                else:
                    content, tokens, limit = "question and image", meter.prompt_tokens(turn), self._max_length - 1
                if tokens > limit:
                    raise UserError(
                        f"{content} take {tokens} tokens, but max_length is {self._max_length}. "
                        "Raise training.max_length. Images are never truncated.",
                        code="question-too-long",
                        file=self._training_set.folder,
                        record=example.id,
                    )

    def longest_sample(self, role: Role, candidates: int = 32) -> tuple[int, int]:
        """Returns the number of tokens of a role's longest sample, and of its longest answer.

        Only the samples with the longest texts, the longest answers and the largest images are tokenized.

        Args:
            role: The role.
            candidates: The number of samples of each of these three kinds.

        Raises:
            UserError: An image or a text is invalid.
        """
        examples = self._training_set.get(role) or self._training_set["forget"]  # none for refusals as answers
        answers = {"forget": self._method.forget_target, "preferred": self._method.preferred_answers}
        if answers.get(role) == "refusal":
            refusal = max(self._training_set.refusals, key=lambda text: len(token_ids(self._processor, text)))
            examples = [example.model_copy(update={"answer": refusal}) for example in examples]
        images = {example.image: example for example in examples if example.image is not None}
        longest = heapq.nlargest(candidates, examples, key=_count_characters)
        longest += heapq.nlargest(candidates, examples, key=lambda example: len(example.answer))
        longest += heapq.nlargest(candidates, images.values(), key=self._count_pixels)
        meter = PromptMeter(self._processor)
        tokens = answer_tokens = 0
        for example in longest:
            turn = self._turn(role, example)
            total = min(meter.total_tokens(turn), self._max_length)
            tokens = max(tokens, total)
            answer_tokens = max(answer_tokens, total - meter.prompt_tokens(turn))
        return tokens, answer_tokens

    def _count_pixels(self, example: Example) -> int:
        image = self._training_set.image(example)
        return 0 if image is None else math.prod(image_size(image))

    def _answer_in_prompt(self, role: Role) -> bool:
        return role == "forget" and self._method.append_answer_to_prompt

    def _turn(self, role: Role, example: Example) -> Turn:
        """Returns the question and answer on which the role trains."""
        turn = Turn.of_example(example, self._training_set.image(example))
        code = self._method.reproduced_code
        if self._answer_in_prompt(role):  # Safety Mirage's released code keeps the assistant's turn
            answer = example.answer if code else None
            turn = replace(turn, question=f"{example.question}\n{example.answer}", answer=answer)
        return PUBLISHED_TURNS[code](turn, self._processor) if code else turn


def _count_characters(example: Example) -> int:
    """Returns the number of characters of an example's texts."""
    turns = [(turn.question, turn.answer) for turn in example.history]
    return sum(len(text) for turn in (*turns, (example.question, example.answer)) for text in turn)


def _image_keys(turns: Sequence[Turn]) -> Tensor:
    """Returns [B], a number for each image, `NO_IMAGE` for none."""
    return torch.tensor([NO_IMAGE if turn.image is None else int(image_key(turn.image)[:15], 16) for turn in turns])
