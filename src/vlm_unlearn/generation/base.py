"""Generation requests and the protocol of the backends that answer them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeVar

from vlm_unlearn import plugins
from vlm_unlearn.config import GenerationConfig
from vlm_unlearn.data.image_edits import edited_image
from vlm_unlearn.data.images import ImageSource, llava_image, resolve_image
from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.plugins import Registry
from vlm_unlearn.records import Prompt, Response
from vlm_unlearn.store import digest_json

Item = TypeVar("Item")
ResponseKey = tuple[str, int]  # prompt id and sample index
OnResponses = Callable[[Sequence[Response]], None]


@dataclass(frozen=True)
class GenerationRequest:
    """One generation request: a prompt, the sample index, and the image."""

    prompt: Prompt
    sample: int = 0
    image: ImageSource | None = None

    @property
    def key(self) -> ResponseKey:
        """The key of the response to this request."""
        return self.prompt.id, self.sample


# Fields of a prompt that a backend of another package may not know. It would silently answer another prompt.
PROMPT_FIELDS = frozenset({"image_round", "prefill", "temperature"})


class Backend(Protocol):
    """Generates one model's responses to requests.

    A backend that honors fields of `PROMPT_FIELDS` has an attribute `prompt_fields` with their names. Without it,
    prompts that have such a field are an error.
    """

    def identity(self) -> Mapping[str, object]:
        """Returns everything that determines a response besides the request, as `model` and `generation`."""

    def make_batches(self, requests: Sequence[GenerationRequest]) -> list[list[GenerationRequest]]:
        """Splits requests into batches, which are generated and written together. Depends on `requests` only."""

    def check_available(self) -> None:
        """Checks that the backend is reachable before existing results are discarded.

        Raises:
            UserError: The request cannot succeed, for example because a server rejects the API key.
            RunError: The backend is not reachable.
        """

    def run(self, batches: Iterable[Sequence[GenerationRequest]], on_responses: OnResponses) -> None:
        """Generates all responses and calls `on_responses` with each group of them until every request has one."""

    def run_one_by_one(self, requests: Sequence[GenerationRequest]) -> Iterator[Response]:
        """Yields the responses to requests that each run without any other request in the batch."""


# A backend is a class, or a function, that takes the suite's `model` and a `GenerationConfig`.
BACKENDS: Registry[Callable[[str, GenerationConfig], Backend]] = plugins.BACKENDS


def build_backend(model: str, config: GenerationConfig) -> Backend:
    """Returns the backend that ``generation.backend`` names, for a model.

    Raises:
        UserError: The model does not exist, or the backend is not installed.
    """
    backend = BACKENDS.load(config.backend, "generation.backend")
    if not callable(backend):
        raise plugins.invalid_plugin("backend", config.backend, backend, "a class", "generation.backend")
    return backend(model, config)


def check_prompt_fields(backend: Backend, requests: Sequence[GenerationRequest]) -> None:
    """Checks that a backend honors all fields of the prompts.

    Raises:
        UserError: The backend does not declare a field that a prompt has.
    """
    for field in sorted(PROMPT_FIELDS - getattr(backend, "prompt_fields", frozenset())):
        default = Prompt.model_fields[field].default
        if any(getattr(request.prompt, field) != default for request in requests):
            raise UserError(
                f"the backend {type(backend).__name__} does not declare `{field}` in its `prompt_fields`, but prompts "
                "have this field. Use another backend, or leave the attack out.",
                code="unsupported-setting",
                field="generation.backend",
            )


def build_requests(
    prompts: Sequence[Prompt],
    images: Mapping[str, Path],
    samples: Mapping[str, int],
    image_loader: Literal["viewer", "llava"] = "viewer",
) -> list[GenerationRequest]:
    """Returns the requests for all prompts. The samples of a prompt follow each other.

    Args:
        prompts: The prompts, in the order of the requests.
        images: The image folder of each prompt set, by `Prompt.set`.
        samples: The number of responses per prompt, by `Prompt.set`. The default is 1.
        image_loader: The setting of `GenerationConfig`.

    Raises:
        UserError: An image is missing.
    """
    requests = []
    for prompt in prompts:
        image: ImageSource | None = None
        if prompt.image is not None:
            image = resolve_image(images[prompt.set], prompt.image, record=prompt.id)
            image = load_for_prompt(image, prompt, image_loader)
        requests += [GenerationRequest(prompt, sample, image) for sample in range(samples.get(prompt.set, 1))]
    return requests


def load_for_prompt(image: ImageSource, prompt: Prompt, image_loader: Literal["viewer", "llava"]) -> ImageSource:
    """Returns the image of a prompt as the model gets it: opened by the loader, and with the edits of the prompt.

    Args:
        image: The image that `prompt.image` names.
        prompt: The prompt.
        image_loader: The setting of `GenerationConfig`.
    """
    return edited_image(llava_image(image) if image_loader == "llava" else image, prompt.image_edits)


def prompt_temperature(prompt: Prompt, config: GenerationConfig) -> float:
    """Returns the sampling temperature of the answers to a prompt: that of the prompt, or else that of the suite."""
    return config.temperature if prompt.temperature is None else prompt.temperature


def failed_response(request: GenerationRequest, error: Exception) -> Response:
    """Returns the response to a request that the model's processor rejects, with the reason and the image."""
    reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {quoted(error, 300)}"
    image = f" of the image {quoted(request.prompt.image)}" if request.prompt.image is not None else ""
    message = f"the processor rejects the question{image}: {reason}"
    return Response(prompt_id=request.prompt.id, sample=request.sample, error=message)


def sampling_seed(seed: int, request: GenerationRequest) -> int:
    """Returns the seed of one response's random stream.

    It depends on `seed` and the request's key only, so that other requests and their order do not change a response.
    It has 31 bits because some servers accept no more.
    """
    return int(digest_json([seed, *request.key])[:8], 16) >> 1


def split_into_batches(items: Sequence[Item], size: int) -> list[list[Item]]:
    """Splits a sequence into consecutive batches of `size`."""
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def evenly_spaced(items: Sequence[Item], count: int) -> list[Item]:
    """Returns `count` items at equal distances, or all items if there are fewer."""
    count = min(count, len(items))
    return [items[number * len(items) // count] for number in range(count)]
