"""Encodes examples as model inputs: chat template, images, and labels on answer tokens only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlm_unlearn.data.images import ImageReference, ImageSource, image_size, open_image
from vlm_unlearn.data.processor_call import (
    Processor,
    apply_chat_template,
    call_processor,
    needs_special_tokens,
    panics_as_errors,
    requires_image,
    validate_resized_image,
)
from vlm_unlearn.data.special_tokens import break_tokens, special_tokens
from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.losses import IGNORED
from vlm_unlearn.records import Example, LossOn, Prompt

if TYPE_CHECKING:
    from PIL import Image

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Turn:
    """One question that can be encoded.

    Attributes:
        id: The id of the example, for error messages.
        image: The image file, or a reference. It belongs to the round `image_round`.
        question: The question.
        answer: The answer. None leaves the answer to the model.
        history: The earlier rounds of question and answer.
        system: The system message.
        image_offset: The number of characters before the image, in the question of its round.
        loss_on: The answers with labels.
        image_round: The round with the image, counted from 0. The last round is the question.
        prefill: The beginning of the answer, which the model continues. Only without an answer.
        rendering: The text of the turn, if it is not that of the chat template (see `published_text`).
    """

    id: str
    image: ImageSource | None
    question: str
    answer: str | None
    history: tuple[tuple[str, str], ...] = ()
    system: str | None = None
    image_offset: int = 0
    loss_on: LossOn = "all_answers"
    image_round: int = 0
    prefill: str | None = None
    rendering: Rendering | None = None

    @classmethod
    def of_example(cls, example: Example, image: ImageSource | None) -> Turn:
        """Returns the question and the answer of an example.

        Args:
            example: The example.
            image: The image of the example.
        """
        return cls(
            id=example.id,
            image=image,
            question=example.question,
            answer=example.answer,
            history=tuple((turn.question, turn.answer) for turn in example.history),
            system=example.system,
            image_offset=example.image_offset,
            loss_on=example.loss_on,
        )

    @classmethod
    def of_prompt(cls, prompt: Prompt, image: ImageSource | None) -> Turn:
        """Returns the question of a prompt, without an answer.

        Args:
            prompt: The prompt.
            image: The image of the prompt.
        """
        return cls(
            id=prompt.id,
            image=image,
            question=prompt.question,
            answer=None,
            history=tuple((turn.question, turn.answer) for turn in prompt.history),
            system=prompt.system,
            image_offset=prompt.image_offset,
            image_round=prompt.image_round,
            prefill=prompt.prefill,
        )


@dataclass(frozen=True)
class Rendering:
    """The text of a turn in the chat template, up to and including each answer. Each text is a prefix of the next.

    Each answer ends with the closing token of the template. If the template has none, as LLaVA-1.5's, the answer ends
    with the end-of-sequence token.

    Attributes:
        before_answer: The text up to the answer of each round.
        with_answer: The text including the answer of each round. It is one item shorter than `before_answer` if the
            last answer is left to the model.
        with_prefill: The text up to and including the prefilled beginning of the last answer, if there is one.
        labels_by_length: Whether the labels of an answer start after as many tokens as the text before it has. By
            default they start at the first token that differs from this text.

    Example:
        One round in LLaVA-1.5's template: ``before_answer = ("USER: <image>\\nWhat is it? ASSISTANT:",)`` and
        ``with_answer = ("USER: <image>\\nWhat is it? ASSISTANT: A cat.</s>",)``.
    """

    before_answer: tuple[str, ...]
    with_answer: tuple[str, ...]
    with_prefill: str | None = None
    labels_by_length: bool = False

    @property
    def text(self) -> str:
        """The complete text."""
        if self.with_prefill is not None:
            return self.with_prefill
        return self.with_answer[-1] if len(self.with_answer) == len(self.before_answer) else self.before_answer[-1]


def render(processor: Processor, turn: Turn) -> Rendering:
    """Applies the chat template to a turn and its history.

    Special tokens and image placeholders in its texts are neutralized: they become text.

    Raises:
        UserError: An answer is empty, the template fails, or it does not support the system message or the prefill.
    """
    if turn.rendering is not None:
        return turn.rendering
    turn = neutralized(turn, special_tokens(processor))
    rounds = [*turn.history, (turn.question, turn.answer)]
    messages: list[dict[str, Any]] = []
    if turn.system is not None:
        messages.append({"role": "system", "content": [{"type": "text", "text": turn.system}]})
    before_answer: list[str] = []
    with_answer: list[str] = []
    for number, (question, answer) in enumerate(rounds):
        content = [{"type": "text", "text": question}]
        if turn.image is not None and number == turn.image_round:
            texts = question[: turn.image_offset], question[turn.image_offset :]
            prefix, suffix = ([{"type": "text", "text": text}] if text else [] for text in texts)
            content = [*prefix, {"type": "image"}, *suffix]
        messages.append({"role": "user", "content": content})
        before_answer.append(apply_chat_template(processor, messages, turn.id, add_generation_prompt=True))
        if answer is not None:
            text = answer.strip()
            if not text:
                raise UserError("the answer is empty", code="empty-answer", record=quoted(turn.id))
            messages.append({"role": "assistant", "content": [{"type": "text", "text": text}]})
            # Some templates (LLaVA-1.5's) end a turn with a space. Trained on, it would teach the model to continue
            # after its answer.
            rendered = apply_chat_template(processor, messages, turn.id).rstrip()
            closing = (
                processor.tokenizer.eos_token if rendered.endswith(text) else ""
            )  # no closing token in the template
            with_answer.append(rendered + closing)
            messages[-1] = {"role": "assistant", "content": [{"type": "text", "text": text + closing}]}
    if turn.system is not None and turn.system.strip() not in before_answer[0]:
        problem = "the chat template of the model drops the system message. Put it into the question."
        raise UserError(problem, code="unsupported-setting", record=quoted(turn.id))
    with_prefill = None
    if turn.answer is None and turn.prefill is not None:
        with_prefill = _render_prefill(processor, messages, turn)
    return Rendering(tuple(before_answer), tuple(with_answer), with_prefill)


def _render_prefill(processor: Processor, messages: Sequence[dict[str, Any]], turn: Turn) -> str:
    """Returns the text of messages and of the beginning of the answer, which stays open."""
    prefill = turn.prefill or ""
    message = {"role": "assistant", "content": [{"type": "text", "text": prefill}]}
    problem = "the chat template of the model does not continue an answer. Evaluate it without a prefill."
    try:
        text: str = processor.apply_chat_template([*messages, message], continue_final_message=True, tokenize=False)
    except Exception as error:  # of the template, or of transformers if the template drops the message
        raise UserError(problem, code="unsupported-setting", record=quoted(turn.id)) from error
    if not text.rstrip().endswith(prefill.strip()):
        raise UserError(problem, code="unsupported-setting", record=quoted(turn.id))
    return text


def neutralized(turn: Turn, tokens: Sequence[str]) -> Turn:
    """Returns a turn whose texts contain none of certain tokens."""
    texts = [turn.system or "", turn.question, turn.answer or "", turn.prefill or ""]
    texts += [text for texts in turn.history for text in texts]
    joined = "\0".join(texts)
    if not any(char in joined for char in {token[0] for token in tokens}) or not any(
        token in joined for token in tokens
    ):
        return turn
    questions = [*(question for question, _ in turn.history), turn.question]
    with_image = questions[turn.image_round]
    before_image = break_tokens(with_image[: turn.image_offset], tokens)
    questions = [break_tokens(question, tokens) for question in questions]
    questions[turn.image_round] = before_image + break_tokens(with_image[turn.image_offset :], tokens)
    answers = [break_tokens(answer, tokens) for _, answer in turn.history]
    return replace(
        turn,
        question=questions[-1],
        answer=None if turn.answer is None else break_tokens(turn.answer, tokens),
        history=tuple(zip(questions, answers, strict=False)),
        system=None if turn.system is None else break_tokens(turn.system, tokens),
        image_offset=len(before_image),
        prefill=None if turn.prefill is None else break_tokens(turn.prefill, tokens),
    )


@panics_as_errors()
def encode(
    processor: Processor,
    turns: Sequence[Turn],
    padding_side: str,
    opener: Callable[[ImageSource], Image.Image] | None = None,
) -> Batch:
    """Encodes turns without labels.

    Args:
        processor: The processor of the model.
        turns: The turns, one per row of the batch.
        padding_side: ``left`` for generation, ``right`` for hidden states.
        opener: Opens the images. None is `open_image`.

    Returns:
        Every tensor of the processor. ``input_ids`` and ``attention_mask`` are [B, S].

    Raises:
        UserError: Only some turns have an image, and the family does not support that in one batch (mllama).
    """
    renderings = [render(processor, turn) for turn in turns]
    prompts = [_prompt(rendering, turn) for rendering, turn in zip(renderings, turns, strict=True)]
    return _process(processor, [rendering.text for rendering in renderings], prompts, turns, padding_side, opener)


@panics_as_errors()
def encode_with_labels(
    processor: Processor,
    turns: Sequence[Turn],
    max_length: int,
    opener: Callable[[ImageSource], Image.Image] | None = None,
) -> Batch:
    """Encodes questions and answers with labels on the tokens of the answers that `Turn.loss_on` names.

    The answer tokens are located by comparing the tokens of the text before and after each answer. Sequences longer
    than `max_length` are truncated at the end.

    Args:
        processor: The processor of the model.
        turns: The turns, one per row of the batch.
        max_length: The maximum number of tokens, including image tokens.
        opener: Opens the images. None is `open_image`.

    Returns:
        Every tensor of the processor, padded on the right, and ``labels`` [B, S], which are -100 outside of answers.

    Raises:
        UserError: A question with its image tokens leaves no room for an answer, or an error of `encode` occurs.
    """
    renderings = [render(processor, turn) for turn in turns]
    encoded = [_answer_spans(processor, *item) for item in zip(turns, renderings, strict=True)]
    prompts = [_prompt(rendering, turn) for rendering, turn in zip(renderings, turns, strict=True)]
    batch = _process(processor, [rendering.text for rendering in renderings], prompts, turns, "right", opener)
    batch["labels"] = torch.full_like(batch["input_ids"], IGNORED)
    longest = 0
    for row, (turn, (ids, spans)) in enumerate(zip(turns, encoded, strict=True)):
        end = int(batch["attention_mask"][row].sum())
        shift = end - len(ids)  # the number of image tokens that the processor inserted, all before the first answer
        first_start = spans[0][0]
        labeled_spans = spans if turn.loss_on == "all_answers" else spans[-1:]
        answer_start = labeled_spans[0][0]
        if batch["input_ids"][row, first_start + shift : end].tolist() != ids[first_start:]:
            raise UserError(
                "the answer is not at the end of the encoded text. This chat template is not supported.",
                code="unsupported-family",
                record=quoted(turn.id),
            )
        if answer_start + shift >= max_length:
            raise UserError(
                f"question and image have {answer_start + shift} tokens, but max_length is {max_length}. "
                "Images are never truncated. Increase training.max_length.",
                code="question-too-long",
                record=quoted(turn.id),
            )
        for start, stop in labeled_spans:
            batch["labels"][row, start + shift : stop + shift] = torch.tensor(ids[start:stop])
        longest = max(longest, min(end, max_length))
    return _truncate(batch, longest)


def _answer_spans(processor: Processor, turn: Turn, rendering: Rendering) -> tuple[list[int], list[tuple[int, int]]]:
    """Returns the tokens of a rendered turn, and the token spans of the answers, including their closing tokens."""

    def tokenize(text: str) -> list[int]:
        ids: list[int] = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    ids = tokenize(rendering.text)
    spans = [
        (
            len(tokenize(prompt)) if rendering.labels_by_length else _common_prefix_length(tokenize(prompt), ids),
            len(ids) if completed == rendering.text else _common_prefix_length(tokenize(completed), ids),
        )
        for prompt, completed in zip(rendering.before_answer, rendering.with_answer, strict=True)
    ]
    if any(start >= stop for start, stop in spans):
        raise UserError("an answer has no tokens", code="empty-answer", record=quoted(turn.id))
    return ids, spans


def _prompt(rendering: Rendering, turn: Turn) -> str:
    """Returns the text before the first answer with labels, or the complete text if the last answer is open."""
    first_answer = turn.loss_on == "all_answers" and turn.answer is not None
    return rendering.before_answer[0 if first_answer else -1]


def _common_prefix_length(prefix: Sequence[int], ids: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(prefix, ids, strict=False)) if a != b), min(len(prefix), len(ids)))


class PromptMeter:
    """Counts the tokens of turns, including image tokens.

    The number of image tokens depends only on the size of an image, so that one image of each size is processed.
    """

    def __init__(self, processor: Processor) -> None:
        self._processor = processor
        self._image_tokens: dict[tuple[int, int], int] = {}

    def prompt_tokens(self, turn: Turn) -> int:
        """Returns the number of tokens before the first answer with labels."""
        with _naming_record(turn), panics_as_errors():
            return self._count(turn, _prompt(render(self._processor, turn), turn))

    def total_tokens(self, turn: Turn) -> int:
        """Returns the number of all tokens, including answers."""
        with _naming_record(turn), panics_as_errors():
            return self._count(turn, render(self._processor, turn).text)

    def _count(self, turn: Turn, text: str) -> int:
        count = len(token_ids(self._processor, text))
        if turn.image is None:
            return count
        with _naming_record(turn):
            size = image_size(turn.image)
        if size not in self._image_tokens:
            question = Turn(turn.id, turn.image, turn.question, None)
            text_tokens = len(token_ids(self._processor, render(self._processor, question).text))
            try:
                encoded = encode(self._processor, [question], padding_side="right")
            except UserError:
                raise
            except Exception as error:  # of the processor, such as for an extreme aspect ratio
                name = turn.image.name if isinstance(turn.image, ImageReference) else turn.image
                raise UserError(
                    f"the processor rejects the image {quoted(name)}, which has {size[0]} x {size[1]} pixels: "
                    f"{type(error).__name__}: {quoted(error, 300)}",
                    code="invalid-image",
                    record=quoted(turn.id),
                ) from error
            self._image_tokens[size] = encoded["input_ids"].shape[1] - text_tokens
        return count + self._image_tokens[size]


def token_ids(processor: Processor, text: str) -> list[int]:
    """Returns the tokens of a rendered turn. An image placeholder is not expanded."""
    ids: list[int] = processor.tokenizer(text, add_special_tokens=needs_special_tokens(processor, text))["input_ids"]
    return ids


def _process(
    processor: Processor,
    texts: list[str],
    prompts: list[str],
    turns: Sequence[Turn],
    padding_side: str,
    opener: Callable[[ImageSource], Image.Image] | None,
) -> Batch:
    # A turn without an image gets an empty list, because idefics3, smolvlm and gemma3 expect one list per text.
    opened: dict[ImageSource, Any] = {}
    for turn in turns:
        if turn.image is not None and turn.image not in opened:
            with _naming_record(turn):
                opened[turn.image] = image = (opener or open_image)(turn.image)
                validate_resized_image(processor, *image.size)
    images = [[opened[turn.image]] if turn.image is not None else [] for turn in turns]
    if requires_image(processor) and not all(images):
        text_only = next(turn.id for turn in turns if turn.image is None)
        raise UserError(
            f"has no image, and a {type(processor).__name__} needs one in every sample. Add an image, or leave it out.",
            code="unsupported-setting",
            record=quoted(text_only),
        )
    encoded = call_processor(processor, texts, prompts, images, padding_side)
    if "cross_attention_mask" in encoded and not all(images):
        # Without any image the cross-attention layers are skipped. In a mixed batch, rows without an image would attend
        # to empty tiles and silently give other answers.
        text_only = next(turn.id for turn in turns if turn.image is None)
        raise UserError(
            f"has no image, but others of its batch do. {type(processor).__name__} does not support both in one "
            "batch. Use images in all examples of the set or in none, or a batch size of 1.",
            code="unsupported-setting",
            record=quoted(text_only),
        )
    return encoded


@contextmanager
def _naming_record(turn: Turn) -> Iterator[None]:
    """Adds the id of the turn to an error about its image."""
    try:
        yield
    except UserError as error:
        error.record = error.record or quoted(turn.id)
        raise


def _truncate(batch: Batch, length: int) -> Batch:
    """Truncates every token-aligned tensor [B, S, ...] to `length` positions. Image-aligned tensors are not changed."""
    rows, width = batch["input_ids"].shape
    return {
        key: value[:, :length]
        if value.dim() >= 2
        and value.shape[0] == rows
        and value.shape[1] == width
        and not key.startswith(("pixel_values", "qformer_"))
        else value
        for key, value in batch.items()
    }


def move(batch: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> Batch:
    """Moves a batch to a device and converts the floating-point tensors of the processor to the dtype of the model.

    The keys of answers stay where they are, since only the CPU looks them up.
    """
    return {
        key: value if key == "answer_keys" else value.to(device, dtype if value.is_floating_point() else value.dtype)
        for key, value in batch.items()
    }
