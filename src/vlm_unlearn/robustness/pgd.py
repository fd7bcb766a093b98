"""Perturbation of the image by projected gradient descent, for each image and for all images at once."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from vlm_unlearn.config import Strict
from vlm_unlearn.config.base import Positive
from vlm_unlearn.data.encoding import Turn, encode, encode_with_labels, move, render, token_ids
from vlm_unlearn.data.images import ImageSource, image_reference
from vlm_unlearn.data.processor_call import Processor
from vlm_unlearn.errors import UserError
from vlm_unlearn.generation.base import GenerationRequest
from vlm_unlearn.losses import IGNORED, answer_mask
from vlm_unlearn.modeling.attention import without_cudnn_attention
from vlm_unlearn.modeling.vlm import VisionLanguageModel
from vlm_unlearn.records import Example
from vlm_unlearn.robustness.base import AttackedState, AttackTarget, ModelAttack, register

MAX_LEVEL = 255
Epsilons = list[Annotated[int, Field(ge=1, le=MAX_LEVEL)]]


class PGDOptions(Strict):
    """Options of the attack `pgd`. Sizes are in levels of 8-bit images: 8 stands for 8/255."""

    target: Literal["reference", "affirmative"] = "reference"
    """The answer that the perturbation makes likely.

    `reference` is the harmful answer itself. It is an upper bound: a perturbation might also write an answer into the
    image that the model never knew, which the model that never knew shows. `universal` uses the reference answers of
    the first half only. `affirmative` is a fixed beginning, the same for every question.
    """
    affirmative: Annotated[str, Field(min_length=1)] = "Sure, here is"
    """The beginning of an answer for `target: affirmative`."""
    epsilons: Annotated[Epsilons, Field(default_factory=lambda: [8, 16])]
    """Largest changes of a pixel's color, for a perturbation of each image."""
    universal: Annotated[Epsilons, Field(default_factory=lambda: [16])]
    """Largest changes of a pixel's color, for one perturbation of all images. It is trained on the first half."""
    random: Annotated[Epsilons, Field(default_factory=lambda: [16])]
    """Sizes of the random perturbations, which are the control."""
    steps: Annotated[int, Field(ge=1, le=10_000)] = 40
    """Steps for each image."""
    universal_steps: Annotated[int, Field(ge=1, le=100_000)] = 100
    """Steps for all images at once."""
    step_size: Annotated[int, Field(ge=1, le=MAX_LEVEL)] = 2
    """Change of a color in one step."""
    batch_size: Positive = 16
    """Images per batch."""


@register("pgd")
class PGD(ModelAttack):
    """Changes every pixel a little, so that a harmful answer becomes likely.

    Projected gradient descent (Madry et al. 2018, arXiv 1706.06083, section 2.1): from a random start,
    ``x <- clip(x - step_size * sign(gradient), original - epsilon, original + epsilon)``, where the gradient is that of
    the answer's negative log-likelihood. Qi et al. 2024 (arXiv 2306.13213) open aligned models with it. All sizes are
    integers, so that every iterate is an 8-bit image. The most likely iterate of each image is used.

    The perturbation is added to the image at the size of the vision tower, after the processor's resizing and
    cropping, which are not differentiated. The processor must therefore leave images of that size unchanged, as those
    of families with one fixed size do (LLaVA-1.5, InternVL, PaliGemma, Gemma 3, InstructBLIP). Pixtral and Mistral 3
    are supported if all images get the same size. Families whose processors make crops, tiles or patches are not
    (LLaVA-NeXT, LLaVA-OneVision, Qwen-VL, Llama 3.2 Vision, Idefics 3, SmolVLM). Questions without an image are left
    as they are.

    States: ``pgd/EPSILON`` for each image, ``pgd/universal/EPSILON`` for all images, measured on the second half, and
    the control ``pgd/random/EPSILON``, where every color changes by epsilon in a random direction. With
    ``target: affirmative`` the names begin with ``pgd/affirmative``.
    """

    options_type = PGDOptions

    def run(self, target: AttackTarget) -> Iterator[AttackedState]:
        """Yields the questions with perturbed images."""
        options: PGDOptions = self.options
        name = "pgd" if options.target == "reference" else f"pgd/{options.target}"
        search = _Search(target, options)
        for epsilon in options.epsilons:
            with target.vlm.frozen():
                requests, nll = search.perturb_each(epsilon)
            yield AttackedState(f"{name}/{epsilon}", requests, facts={"nll": nll})
        second_half = target.halves.second_groups(target.prompts)
        for epsilon in options.universal:
            with target.vlm.frozen():
                perturbation, nll = search.universal_perturbation(epsilon)
            requests = search.perturb_all(perturbation)
            yield AttackedState(f"{name}/universal/{epsilon}", requests, second_half, facts={"nll": nll})
        for epsilon in options.random:
            yield AttackedState(f"{name}/random/{epsilon}", search.perturb_randomly(epsilon))


class ImageLevels:
    """Converts between images of 8-bit levels and the pixel values that the vision tower gets.

    Args:
        processor: The processor of the model.
    """

    def __init__(self, processor: Processor) -> None:
        self._processor = processor
        settings = processor.image_processor
        normalized = getattr(settings, "do_normalize", True)
        mean, std = (settings.image_mean, settings.image_std) if normalized else ([0.0] * 3, [1.0] * 3)
        self._mean, self._std = (torch.tensor(list(value)).view(-1, 1, 1) for value in (mean, std))
        self._scale = settings.rescale_factor if getattr(settings, "do_rescale", True) else 1.0

    def values(self, levels: Tensor) -> Tensor:
        """Returns the pixel values of levels [..., 3, H, W]."""
        mean, std = self._mean.to(levels.device), self._std.to(levels.device)
        return (levels * self._scale - mean) / std

    def read(self, image: ImageSource) -> Tensor:
        """Returns the levels [3, H, W] of an image at the size of the vision tower, as uint8.

        Raises:
            UserError: The processor makes no image of one size, or changes images of that size.
        """
        pixels = self._process(image)
        if pixels.dim() != 4 or pixels.shape[:2] != (1, 3):
            raise self.unsupported(f"it makes pixel values of the shape {list(pixels.shape)}")
        return ((pixels[0] * self._std + self._mean) / self._scale).round().clamp(0, MAX_LEVEL).to(torch.uint8)

    def check_exact(self, levels: Tensor) -> None:
        """Checks that the processor leaves an image [3, H, W] unchanged.

        Raises:
            UserError: It does not.
        """
        pixels = self._process(self.image(levels))
        expected = self.values(levels)[None]
        level = self._scale / float(self._std.max())
        if pixels.shape != expected.shape or float((pixels - expected).abs().max()) > 0.05 * level:
            raise self.unsupported("it changes images that have the size of the vision tower")

    def image(self, levels: Tensor) -> ImageSource:
        """Returns levels [3, H, W] as an image in memory."""
        return image_reference(levels.to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy())

    def unsupported(self, reason: str) -> UserError:
        """Returns the error that the attack does not support the model's family."""
        return UserError(
            f"the attack pgd does not support {type(self._processor).__name__}: {reason}. It needs a processor that "
            "resizes every image to one fixed size. Leave the attack out of the suite.",
            code="unsupported-family",
        )

    def _process(self, image: ImageSource) -> Tensor:
        return encode(self._processor, [Turn("image", image, "image", None)], "right")["pixel_values"].float()


@dataclass(frozen=True)
class _Texts:
    """Encoded questions with target answers, without their images.

    Attributes:
        inputs: The inputs of the model except for ``pixel_values``.
        positions: [N], the flattened positions that predict an answer token.
        tokens: [N], the answer tokens.
        rows: [N], the question of each position.
        count: The number of questions.
    """

    inputs: Mapping[str, Tensor]
    positions: Tensor
    tokens: Tensor
    rows: Tensor
    count: int


class _Search:
    """Searches for perturbations.

    Args:
        target: The model under attack.
        options: The options of the attack.
    """

    def __init__(self, target: AttackTarget, options: PGDOptions) -> None:
        self._target, self._options = target, options
        self._vlm: VisionLanguageModel = target.vlm
        self._pixels = ImageLevels(target.vlm.processor)
        self._generator = torch.Generator().manual_seed(target.seed)
        images = dict.fromkeys(request.image for request in target.questions if request.image is not None)
        self._levels = {image: self._pixels.read(image) for image in images}
        if not self._levels:
            raise UserError("no question has an image for the attack pgd.", code="no-records", field="questions")
        self._pixels.check_exact(next(iter(self._levels.values())))
        self._shape = next(iter(self._levels.values())).shape
        if any(levels.shape != self._shape for levels in self._levels.values()):
            raise self._pixels.unsupported("the size of its images varies")

    def perturb_each(self, epsilon: int) -> tuple[list[GenerationRequest], float]:
        """Returns the questions with images that are perturbed one by one, and the mean NLL of the target answers."""
        perturbed: dict[ImageSource, ImageSource] = {}
        total, count = 0.0, 0
        all_images: list[Any] = list(self._levels)
        for start in range(0, len(all_images), self._options.batch_size):
            images = all_images[start : start + self._options.batch_size]
            requests = [request for request in self._target.questions if request.image in images]
            texts = self._encode([_turn(request, self._answer(request.prompt.reference)) for request in requests])
            owners = torch.tensor([images.index(request.image) for request in requests], device=texts.rows.device)
            original = torch.stack([self._levels[image] for image in images]).float()
            levels, nll = self._descend(texts, owners, original, epsilon)
            perturbed |= {image: self._pixels.image(level) for image, level in zip(images, levels, strict=True)}
            total, count = total + nll, count + len(requests)
        return self._with_images(perturbed), total / count

    def universal_perturbation(self, epsilon: int) -> tuple[Tensor, float]:
        """Returns one perturbation [3, H, W] for all images, and the mean NLL in the last step."""
        pairs = [
            (example, image)
            for example in self._target.halves.first(self._target.examples("forget"))
            if (image := self._target.image(example)) is not None
        ]
        if not pairs:
            raise UserError("no forget example has an image for the attack pgd.", code="no-records", field="data")
        size = min(self._options.batch_size, len(pairs))
        sampler = random.Random(f"pgd-{self._target.seed}")
        levels: dict[ImageSource, Tensor] = {}
        current = self._random_levels(self._shape, epsilon)
        queue: list[tuple[Example, ImageSource]] = []
        mean = 0.0
        for _ in range(self._options.universal_steps):
            if len(queue) < size:
                queue += sampler.sample(pairs, len(pairs))
            batch, queue = queue[:size], queue[size:]
            for _, image in batch:
                if image not in levels:
                    levels[image] = self._pixels.read(image)
            turns = [
                replace(Turn.of_example(example, image), answer=self._answer(example.answer), loss_on="last_answer")
                for example, image in batch
            ]
            images = torch.stack([levels[image] for _, image in batch])
            perturbation = current.clone().requires_grad_()
            nll = self._nll(self._encode(turns), (images + perturbation).clamp(0, MAX_LEVEL))
            (gradient,) = torch.autograd.grad(nll.sum(), perturbation)
            current = (current - self._options.step_size * gradient.sign()).clamp(-epsilon, epsilon)
            mean = float(nll.detach().mean())
        return current, mean

    def perturb_all(self, perturbation: Tensor) -> list[GenerationRequest]:
        """Returns the questions with one perturbation [3, H, W] added to every image."""
        return self._with_images(
            {
                image: self._pixels.image((levels + perturbation).clamp(0, MAX_LEVEL))
                for image, levels in self._levels.items()
            }
        )

    def perturb_randomly(self, epsilon: int) -> list[GenerationRequest]:
        """Returns the questions with images whose colors change by `epsilon` in random directions."""
        generator = torch.Generator().manual_seed(self._target.seed)
        return self._with_images(
            {
                image: self._pixels.image(
                    (levels + epsilon * (2 * torch.randint(2, levels.shape, generator=generator) - 1)).clamp(
                        0, MAX_LEVEL
                    )
                )
                for image, levels in self._levels.items()
            }
        )

    def _answer(self, reference: str | None) -> str:
        if self._options.target == "affirmative":
            return self._options.affirmative
        if reference is None:
            raise UserError(
                "a question has no reference answer for the attack pgd. Set target: affirmative.",
                code="missing-reference",
                field="target",
            )
        return reference

    def _encode(self, turns: Sequence[Turn]) -> _Texts:
        encoded = encode_with_labels(self._vlm.processor, turns, 2**31 - 1)
        labels = encoded.pop("labels")
        if self._options.target == "affirmative":
            for row, turn in enumerate(turns):
                # The answer must continue after this beginning, so that its closing tokens are no target.
                answer_positions = (labels[row] != IGNORED).nonzero()[:, 0]
                closing = _num_closing_tokens(self._vlm.processor, turn)
                labels[row, answer_positions[len(answer_positions) - closing :]] = IGNORED
        encoded.pop("pixel_values")
        positions = answer_mask(labels).flatten().nonzero()[:, 0]
        device = self._vlm.base_model.device
        return _Texts(
            move(encoded, device, self._vlm.base_model.dtype),
            positions.to(device),
            labels.flatten()[positions + 1].to(device),
            (positions // labels.shape[1]).to(device),
            len(turns),
        )

    @without_cudnn_attention()
    def _nll(self, texts: _Texts, levels: Tensor) -> Tensor:
        """Returns the NLL [B] per answer token of each question, about images of levels [B, 3, H, W]."""
        model = self._vlm.base_model
        pixels = self._pixels.values(levels).to(model.device, model.dtype)
        logits, _ = self._vlm.run({**texts.inputs, "pixel_values": pixels}, texts.positions)
        nll = F.cross_entropy(logits.float(), texts.tokens, reduction="none")
        total = torch.zeros(texts.count, device=nll.device).index_add(0, texts.rows, nll)
        return total / torch.bincount(texts.rows, minlength=texts.count)

    def _descend(self, texts: _Texts, owners: Tensor, original: Tensor, epsilon: int) -> tuple[Tensor, float]:
        """Returns the best levels [I, 3, H, W] within `epsilon` of the originals, and the sum of the questions' NLL.

        Args:
            texts: B questions.
            owners: [B], the index of each question's image.
            original: [I, 3, H, W], the levels of the images.
            epsilon: The largest change.
        """
        low, high = (original - epsilon).clamp(min=0), (original + epsilon).clamp(max=MAX_LEVEL)
        current = (original + self._random_levels(original.shape, epsilon)).clamp(0, MAX_LEVEL)
        best, best_nll = original.clone(), torch.full((len(original),), torch.inf)
        for step in range(self._options.steps + 1):
            levels = current.clone().requires_grad_()
            nll = self._nll(texts, levels[owners.to(levels.device)])
            image_nll = torch.zeros(len(original)).index_add(0, owners.cpu(), nll.detach().cpu())
            better = image_nll < best_nll
            best[better], best_nll[better] = current[better], image_nll[better]
            if step < self._options.steps:
                # Each image's loss depends on that image alone, so that the sum has all gradients.
                (gradient,) = torch.autograd.grad(nll.sum(), levels)
                current = (current - self._options.step_size * gradient.sign()).clamp(low, high)
        return best, float(best_nll.sum())

    def _random_levels(self, shape: Sequence[int], epsilon: int) -> Tensor:
        return torch.randint(-epsilon, epsilon + 1, tuple(shape), generator=self._generator).float()

    def _with_images(self, images: Mapping[ImageSource, ImageSource]) -> list[GenerationRequest]:
        return [
            request if request.image is None else replace(request, image=images[request.image])
            for request in self._target.questions
        ]


def _turn(request: GenerationRequest, answer: str) -> Turn:
    return replace(Turn.of_prompt(request.prompt, request.image), answer=answer, loss_on="last_answer")


def _num_closing_tokens(processor: Processor, turn: Turn) -> int:
    """Returns the number of tokens that end a turn after the text of its answer."""
    text, answer = render(processor, turn).text, (turn.answer or "").strip()
    until_answer = text[: text.rindex(answer) + len(answer)]
    return len(token_ids(processor, text)) - len(token_ids(processor, until_answer))
