"""Questions to one model, one after the other, with the settings of an evaluation."""

from __future__ import annotations

from pathlib import Path

from vlm_unlearn.config import GenerationConfig
from vlm_unlearn.data.images import ImageSource, image_size
from vlm_unlearn.errors import UserError
from vlm_unlearn.generation.base import Backend, GenerationRequest, build_backend, load_for_prompt
from vlm_unlearn.records import Prompt, Response, Round


class Conversation:
    """Asks one model questions about an image.

    Args:
        model: A model folder, hub name, adapter folder or training run. With another backend, its name there.
        config: The generation settings.
        system: The system message, or None.
        keeps_rounds: Whether a question follows the earlier rounds. By default each question stands alone.

    Attributes:
        model: The model, as passed.
        rounds: The earlier rounds that the next question follows.

    Raises:
        UserError: The model does not exist, or the backend is not installed.
    """

    def __init__(
        self, model: str, config: GenerationConfig, system: str | None = None, keeps_rounds: bool = False
    ) -> None:
        self.model = model
        self.rounds: list[Round] = []
        self._config = config
        self._system = system
        self._keeps_rounds = keeps_rounds
        self._backend: Backend = build_backend(model, config)
        self._num_questions = 0

    def restart(self) -> None:
        """Forgets the earlier rounds."""
        self.rounds.clear()

    def ask(self, question: str, image: Path | None = None) -> Response:
        """Returns the model's answer, or a response with an error.

        Args:
            question: The question.
            image: The image of the conversation. It stands before the first question.
        """
        self._num_questions += 1
        prompt = Prompt(
            id=str(self._num_questions),
            group_id=str(self._num_questions),
            set="chat",
            kind="unsafe",
            image=None if image is None else image.name,
            question=question,
            history=tuple(self.rounds),
            system=self._system,
        )
        source: ImageSource | None = None
        if image is not None:
            source = load_for_prompt(image, prompt, self._config.image_loader)
        responses: list[Response] = []
        batches = self._backend.make_batches([GenerationRequest(prompt, 0, source)])
        self._backend.run(batches, responses.extend)
        (response,) = responses
        # A chat template has no place for an empty answer.
        if self._keeps_rounds and response.text is not None and response.text.strip():
            self.rounds.append(Round(question=question, answer=response.text))
        return response


def validate_image(path: Path) -> Path:
    """Returns the path of an image after checking that it can be opened.

    Raises:
        UserError: There is no such file, or it is not an image.
    """
    if not path.is_file():
        raise UserError("no such image file. Check the path.", code="image-not-found", file=path)
    image_size(path)
    return path
