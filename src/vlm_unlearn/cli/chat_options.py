"""Options of the commands that can use a language model, and its client."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from vlm_unlearn.cli.common import Stages, quiet_libraries
from vlm_unlearn.errors import RunError, UserError

if TYPE_CHECKING:
    from vlm_unlearn.generation.chat import ChatModel

SERVER = typer.Option(
    None,
    "--server",
    help="Address of an OpenAI-compatible server, such as http://localhost:8000/v1. Its key: OPENAI_API_KEY.",
)
MODEL = typer.Option(
    None, "--model", help="Model name on the server. Without --server, a model folder or hub name to run locally."
)
CONCURRENCY = typer.Option(16, "--concurrency", min=1, max=512, help="Number of parallel requests to the server.")
CACHE = typer.Option(True, "--cache/--no-cache", help="Reuse saved replies of the same model to the same question.")


def require_model(server: str | None, model: str | None) -> None:
    """Checks that a server comes with the name of a model.

    Raises:
        UserError: There is a server but no model.
    """
    if server and model is None:
        raise UserError("--server needs the name of a model. Pass --model.", code="missing-setting", field="--model")


def build_chat(server: str | None, model: str, concurrency: int, max_tokens: int, verbatim: bool = False) -> ChatModel:
    """Returns the language model on a server, or on this machine if `server` is None.

    Args:
        verbatim: Whether truncated and empty replies are valid. By default they are errors.
    """
    if server:
        from vlm_unlearn.generation.openai_chat import OpenAIChat

        return OpenAIChat(server, model, max_tokens, concurrency, verbatim=verbatim)
    quiet_libraries()
    from vlm_unlearn.generation.local_chat import LocalChat

    return LocalChat(model, max_tokens, verbatim=verbatim)


class ChatClient:
    """Sends questions to a language model, with a progress bar and a cache of replies.

    Args:
        verbatim: Whether truncated and empty replies are valid. By default they are errors.

    Attributes:
        requests: Number of questions that were sent to the model. Cached replies do not count.
    """

    def __init__(
        self,
        stages: Stages,
        stage: str,
        server: str | None,
        model: str,
        concurrency: int,
        cache: bool,
        max_tokens: int,
        verbatim: bool = False,
    ) -> None:
        from vlm_unlearn.generation.chat import ChatCache
        from vlm_unlearn.store import cache_folder

        self._chat = build_chat(server, model, concurrency, max_tokens, verbatim)
        self._cache = ChatCache(cache_folder() / "replies.sqlite") if cache else None
        self._stages = stages
        self._stage = stage
        self.requests = 0

    def __call__(
        self, questions: Sequence[tuple[str, str, Path | None]]
    ) -> Mapping[str, tuple[str | None, str | None]]:
        """Returns the reply and the error of each question by its id. One of the two is None.

        Args:
            questions: The id, text and image of each question.

        Raises:
            RunError: Every question failed.
        """
        from vlm_unlearn.generation.chat import ChatRequest, complete_all

        def requests() -> Iterator[ChatRequest]:
            for id, text, image in questions:
                yield ChatRequest(id, text, image)

        replies, sent = complete_all(
            self._chat, requests(), self._cache, lambda done: self._stages.update(self._stage, done, len(questions))
        )
        self.requests += sent
        errors = [reply.error for reply in replies.values() if reply.text is None]
        if errors and len(errors) == len(replies):
            raise RunError(f"all {len(errors)} questions failed ({errors[0]})", code="server-error")
        if errors:
            typer.echo(
                f"warning: {len(errors):,} of {len(replies):,} questions failed; the first error: {errors[0]}", err=True
            )
        return {id: (reply.text, reply.error) for id, reply in replies.items()}
