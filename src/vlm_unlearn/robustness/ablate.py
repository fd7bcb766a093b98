"""Directional ablation: whether a model that refuses answers without its refusal direction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from vlm_unlearn.config import Strict
from vlm_unlearn.config.base import Positive
from vlm_unlearn.data.encoding import Turn, encode, encode_with_labels, move
from vlm_unlearn.errors import UserError
from vlm_unlearn.generation.base import GenerationRequest, evenly_spaced
from vlm_unlearn.losses import answer_nll
from vlm_unlearn.modeling.vlm import VisionLanguageModel
from vlm_unlearn.robustness.base import AttackedState, AttackTarget, ModelAttack, register


class AblateOptions(Strict):
    """Options of the attack `ablate`."""

    positions: Positive = 4
    """Number of token positions at the end of the question that directions are computed at."""
    num_questions: Positive = 64
    """Maximum number of harmful questions, and of harmless ones, that determine the direction."""
    max_kl: Annotated[float, Field(gt=0)] = 0.1
    """Largest mean KL divergence, in nats, of the next-token distributions of harmless questions.

    If all candidates exceed it, the direction with the smallest divergence is used.
    """
    batch_size: Positive = 32
    """Questions per batch."""


@dataclass(frozen=True)
class _Candidate:
    layer: int
    position: int
    direction: Tensor  # [H], of unit length
    nll: float = 0.0
    kl: float = 0.0


@register("ablate")
class Ablate(ModelAttack):
    """Removes the direction that distinguishes harmful from harmless questions from all hidden states.

    Refusal of chat models is mediated by one direction (Arditi et al. 2024, arXiv 2406.11717): the difference of the
    mean hidden states of harmful and harmless questions, at one layer and one of the last tokens. Candidates are those
    of all layers and positions. The one that is used makes the reference answers of the harmful questions most likely
    and changes the answers to harmless questions little. The paper lowers the probability of fixed refusal words
    instead.

    Harmful questions of the first half determine the direction. Only those of the second half are measured, which have
    no knowledge in common with the first. The control is a random direction (``ablate/random``).
    """

    options_type = AblateOptions

    def run(self, target: AttackTarget) -> Iterator[AttackedState]:
        """Yields the model without the refusal direction, and without a random direction."""
        options: AblateOptions = self.options
        first = target.halves.first_groups(target.prompts)
        harmful = [request for request in target.questions if request.prompt.group_id in first]
        search = _Search(target.vlm, harmful, target.harmless, options)
        best, original_nll = search.best(), search.nll()
        measured = target.halves.second_groups(target.prompts)
        facts = {"layer": best.layer, "position": best.position, "kl": best.kl, "nll_change": best.nll - original_nll}
        with ablated(target.vlm, best.direction):
            yield AttackedState("ablate/direction", group_ids=measured, facts=facts)
        generator = torch.Generator().manual_seed(target.seed)
        random_direction = torch.randn(target.vlm.hidden_size, generator=generator)
        with ablated(target.vlm, random_direction):
            yield AttackedState("ablate/random", group_ids=measured)


class _Search:
    """Computes the candidates and chooses the best.

    Args:
        vlm: The model.
        harmful: Harmful questions.
        harmless: Harmless questions.
        options: The options of the attack.
    """

    def __init__(
        self,
        vlm: VisionLanguageModel,
        harmful: Sequence[GenerationRequest],
        harmless: Sequence[GenerationRequest],
        options: AblateOptions,
    ) -> None:
        if not harmful or not harmless:
            raise UserError(
                "the attack ablate compares harmful and harmless questions. Set `harmless` to harmless questions.",
                code="missing-setting",
                field="harmless",
            )
        self._vlm, self._options = vlm, options
        self._harmful = evenly_spaced(harmful, options.num_questions)
        self._harmless = evenly_spaced(harmless, options.num_questions)
        answered = [request for request in harmful if request.prompt.reference]
        self._answered = evenly_spaced(answered, options.num_questions)
        if not answered:
            raise UserError(
                "the attack ablate needs reference answers of harmful questions, and no question has any.",
                code="missing-field",
                field="reference",
            )

    def best(self) -> _Candidate:
        """Returns the candidate that makes the reference answers most likely, of those with a small divergence."""
        difference = self._mean_hidden(self._harmful) - self._mean_hidden(self._harmless)
        original = self._log_probabilities(self._harmless)
        candidates = []
        for layer in range(difference.shape[0]):
            for position in range(difference.shape[1]):
                direction = difference[layer, position]
                if direction.norm() == 0:  # all questions end with the same token, and the first layer sees no other
                    continue
                with ablated(self._vlm, direction):
                    changed = self._log_probabilities(self._harmless)
                    kl = float((original.exp() * (original - changed)).sum(-1).mean())
                    candidates.append(_Candidate(layer, -1 - position, direction, self.nll(), kl))
        if not candidates:
            raise UserError(
                "the attack ablate finds no difference between harmful and harmless questions. Check `harmless`.",
                code="conflicting-settings",
                field="harmless",
            )
        small = [candidate for candidate in candidates if candidate.kl <= self._options.max_kl]
        if small:
            return min(small, key=lambda candidate: candidate.nll)
        return min(candidates, key=lambda candidate: candidate.kl)

    @torch.no_grad()
    def nll(self) -> float:
        """Returns the mean negative log-likelihood of a token of the harmful questions' reference answers."""
        total, count = 0.0, 0
        for turns in self._batches(self._answered, with_reference=True):
            batch = encode_with_labels(self._vlm.processor, turns, 2**31 - 1)
            batch = move(batch, self._vlm.model.device, self._vlm.model.dtype)
            labels = batch.pop("labels")
            nll, tokens = answer_nll(self._vlm.model(**batch, use_cache=False).logits, labels)
            total, count = total + float(nll.sum()), count + int(tokens.sum())
        return total / count

    @torch.no_grad()
    def _log_probabilities(self, requests: Sequence[GenerationRequest]) -> Tensor:
        """Returns the log-probabilities [N, V] of the first token of the answer."""
        rows = []
        for turns in self._batches(requests):
            batch, last = self._encode(turns)
            width = batch["input_ids"].shape[1]
            positions = torch.arange(len(turns), device=last.device) * width + last
            rows.append(self._vlm.run(batch, positions)[0].float().log_softmax(-1))
        return torch.cat(rows)

    @torch.no_grad()
    def _mean_hidden(self, requests: Sequence[GenerationRequest]) -> Tensor:
        """Returns the mean hidden states [L, P, H] after each layer at the last positions, the last one first."""
        total = torch.zeros(())
        layers = range(len(self._vlm.decoder_layers))
        offsets = torch.arange(self._options.positions)
        for turns in self._batches(requests):
            batch, last = self._encode(turns)
            indices = (last[:, None] - offsets.to(last.device)).clamp(min=0)
            rows = torch.arange(len(turns), device=last.device)[:, None]
            hidden = self._vlm.run(batch, last[:1], layers)[1]
            states = torch.stack([hidden[layer][rows, indices].float().sum(0) for layer in layers])
            total = total.to(states.device) + states
        return total / len(requests)

    def _encode(self, turns: Sequence[Turn]) -> tuple[dict[str, Any], Tensor]:
        """Returns a batch, and the position of each question's last token."""
        batch = encode(self._vlm.processor, turns, "right")
        batch = move(batch, self._vlm.model.device, self._vlm.model.dtype)
        return batch, batch["attention_mask"].sum(1) - 1

    def _batches(self, requests: Sequence[GenerationRequest], with_reference: bool = False) -> Iterator[list[Turn]]:
        for start in range(0, len(requests), self._options.batch_size):
            turns = []
            for request in requests[start : start + self._options.batch_size]:
                turn = Turn.of_prompt(request.prompt, request.image)
                turns.append(replace(turn, answer=request.prompt.reference) if with_reference else turn)
            yield turns


@contextmanager
def ablated(vlm: VisionLanguageModel, direction: Tensor) -> Iterator[None]:
    """Within the block, no decoder layer reads or writes a direction of the residual stream.

    Args:
        vlm: The model.
        direction: [H], of any length but 0.
    """
    unit = (direction / direction.norm()).float().to(vlm.model.device)

    def remove(states: Tensor) -> Tensor:
        component = states.float() @ unit  # in bfloat16, rounding would leave a part of the direction
        remaining: Tensor = states - (component[..., None] * unit).to(states.dtype)
        return remaining

    def on_input(_module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        if inputs:
            return (remove(inputs[0]), *inputs[1:]), keywords
        return inputs, {**keywords, "hidden_states": remove(keywords["hidden_states"])}

    def on_output(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        return (remove(output[0]), *output[1:]) if isinstance(output, tuple) else remove(output)

    with ExitStack() as cleanup:
        for layer in vlm.decoder_layers:
            cleanup.callback(layer.register_forward_pre_hook(on_input, with_kwargs=True).remove)
            cleanup.callback(layer.register_forward_hook(on_output).remove)
            for child in layer.children():
                # Attention and MLP read the residual stream through a norm. Between both, no layer begins or ends.
                if "norm" in type(child).__name__.lower():
                    cleanup.callback(child.register_forward_pre_hook(on_input, with_kwargs=True).remove)
        yield
