"""A soft prompt: trained embedding vectors in the question, as an upper bound on what any prompt could do."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from tokenizers import AddedToken
from torch import Tensor, nn

from vlm_unlearn.config import Strict
from vlm_unlearn.config.base import Positive
from vlm_unlearn.data.encoding import Turn, encode_with_labels, move
from vlm_unlearn.data.processor_call import Processor
from vlm_unlearn.errors import UserError
from vlm_unlearn.losses import answer_nll
from vlm_unlearn.modeling.attention import without_cudnn_attention
from vlm_unlearn.modeling.vlm import VisionLanguageModel
from vlm_unlearn.records import Example
from vlm_unlearn.robustness.base import AttackedState, AttackTarget, ModelAttack, register


class SoftPromptOptions(Strict):
    """Options of the attack `soft_prompt`."""

    vectors: Annotated[int, Field(ge=1, le=1000)] = 5
    """Number of vectors."""
    position: Literal["before_question", "after_question"] = "after_question"
    """The place of the vectors in the first question. After the question, they precede the answer."""
    steps: Annotated[list[Positive], Field(min_length=1, default_factory=lambda: [25, 100])]
    """Numbers of steps after which the model is measured, in ascending order."""
    batch_size: Positive = 16
    """Examples per step. A smaller set is used completely in each step."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Learning rate of Adam, relative to the root mean square of the model's embeddings."""


@register("soft_prompt")
class SoftPrompt(ModelAttack):
    """Adds trained vectors to the embeddings of the question, and measures the harmful questions of the second half.

    The attack of Schwinn et al. 2024 (arXiv 2402.09063, section 3): the vectors minimize the negative log-likelihood of
    the forget examples' answers, and the weights stay as they are. The examples are those of the first half. No text
    can move the embeddings further than free vectors, which makes the attack an upper bound for prompts. Vectors can
    also teach new answers, which is why the second half is measured. The control is the model that never knew.

    The vectors start as those of random tokens. Adam replaces the paper's signed gradient descent. The vectors stand in
    for placeholder tokens, which a copy of the processor adds to the first question. Generation shares their prefixes
    as those of any token. The questions themselves do not change.

    States: ``soft_prompt/VECTORS`` after the last step, and ``soft_prompt/VECTORS/STEP`` after the others.
    """

    options_type = SoftPromptOptions

    def run(self, target: AttackTarget) -> Iterator[AttackedState]:
        """Trains, and yields the model with the soft prompt after each number of steps in `steps`."""
        options: SoftPromptOptions = self.options
        examples = target.halves.first(target.examples("forget"))
        if not examples:
            raise UserError(
                "the training set has no forget set for the attack soft_prompt.", code="no-records", field="data"
            )
        second_half = target.halves.second_groups(target.prompts)
        name = f"soft_prompt/{options.vectors}"
        vectors = initial_vectors(target.vlm, options.vectors, target.seed)
        with soft_prompt(target.vlm, vectors, options.position):
            trainer = _Trainer(target, vectors, examples, options)
            last = max(options.steps)
            for step in sorted(set(options.steps)):
                with target.vlm.frozen():
                    loss = trainer.train_until(step)
                state_name = name if step == last else f"{name}/{step}"
                yield AttackedState(state_name, group_ids=second_half, curve=name, step=step, facts={"loss": loss})


def initial_vectors(vlm: VisionLanguageModel, count: int, seed: int) -> Tensor:
    """Returns the embeddings [count, H] of random tokens in single precision, as a leaf that requires a gradient."""
    weight = vlm.base_model.get_input_embeddings().weight.detach()
    rows = torch.randint(len(weight), (count,), generator=torch.Generator().manual_seed(seed))
    vectors: Tensor = weight[rows.to(weight.device)].float().clone().requires_grad_()
    return vectors


@contextmanager
def soft_prompt(vlm: VisionLanguageModel, vectors: Tensor, position: str) -> Iterator[None]:
    """Within the block, the first question of every turn contains the vectors.

    Args:
        vlm: The model. Its processor is replaced by a copy within the block.
        vectors: [N, H], the vectors.
        position: ``before_question`` or ``after_question``.
    """
    original = vlm.processor
    processor, first_id = _with_placeholders(original, len(vectors), position)
    embeddings: nn.Module = vlm.base_model.get_input_embeddings()
    pending: list[Tensor] = []  # the token ids of the running call

    def on_input(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        pending.append(inputs[0])
        return (inputs[0].masked_fill(inputs[0] >= first_id, 0), *inputs[1:])

    def on_output(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        ids = pending.pop()
        replaced = vectors[(ids - first_id).clamp(0, len(vectors) - 1)].to(output.dtype)
        return torch.where((ids >= first_id)[..., None], replaced, output)

    with ExitStack() as cleanup:
        vlm.processor = processor
        cleanup.callback(setattr, vlm, "processor", original)
        cleanup.callback(embeddings.register_forward_pre_hook(on_input).remove)
        cleanup.callback(embeddings.register_forward_hook(on_output).remove)
        yield


def _with_placeholders(processor: Processor, count: int, position: str) -> tuple[Processor, int]:
    """Returns a copy of a processor that adds `count` new tokens to first questions, and the id of the first token."""
    processor = copy.deepcopy(processor)
    tokenizer = processor.tokenizer
    first_id = len(tokenizer)
    # Not special, since special tokens in questions become text.
    tokens = [f"<|soft_prompt_{index}|>" for index in range(count)]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    if tokenizer.convert_tokens_to_ids(tokens) != list(range(first_id, first_id + count)):
        raise UserError(
            f"{type(tokenizer).__name__} cannot be extended by tokens for the attack soft_prompt. Leave the attack out "
            "of the suite.",
            code="unsupported-family",
        )
    placeholders = "".join(tokens)
    apply_chat_template = processor.apply_chat_template

    def apply_with_placeholders(messages: Sequence[Mapping[str, Any]], **options: Any) -> Any:
        messages = copy.deepcopy(list(messages))
        question = next(message for message in messages if message["role"] == "user")
        text = next(part for part in reversed(question["content"]) if part["type"] == "text")
        texts = (placeholders, text["text"]) if position == "before_question" else (text["text"], placeholders)
        text["text"] = "".join(texts)
        return apply_chat_template(messages, **options)

    processor.apply_chat_template = apply_with_placeholders
    return processor, first_id


class _Trainer:
    """Trains the vectors of a soft prompt, which is in effect, with Adam.

    Args:
        target: The model under attack.
        vectors: [N, H], the vectors. They are changed in place.
        examples: The training examples.
        options: The options of the attack.
    """

    def __init__(
        self, target: AttackTarget, vectors: Tensor, examples: Sequence[Example], options: SoftPromptOptions
    ) -> None:
        self._target = target
        self._vectors = vectors
        self._examples = list(examples)
        self._size = min(options.batch_size, len(examples))
        self._rng = random.Random(f"soft-prompt-{target.seed}")
        self._queue: list[Example] = []
        self._step = 0
        self._loss = 0.0
        weight = target.vlm.base_model.get_input_embeddings().weight.detach()
        scale = float(weight.float().square().mean().sqrt())
        self._optimizer = torch.optim.Adam([vectors], lr=options.learning_rate * scale)

    def train_until(self, step: int) -> float:
        """Trains up to a step and returns the last loss."""
        while self._step < step:
            self._loss = self._train_step()
            self._step += 1
        return self._loss

    @without_cudnn_attention()
    def _train_step(self) -> float:
        if len(self._queue) < self._size:
            self._queue += self._rng.sample(self._examples, len(self._examples))
        batch, self._queue = self._queue[: self._size], self._queue[self._size :]
        turns = [Turn.of_example(example, self._target.image(example)) for example in batch]
        model = self._target.vlm.base_model
        encoded = move(encode_with_labels(self._target.vlm.processor, turns, 2**31 - 1), model.device, model.dtype)
        labels = encoded.pop("labels")
        nll, tokens = answer_nll(model(**encoded, use_cache=False).logits, labels)
        loss = nll.sum() / tokens.sum()
        self._optimizer.zero_grad()
        torch.autograd.backward(loss)
        self._optimizer.step()
        return float(loss.detach())
