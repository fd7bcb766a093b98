"""The options of the commands that may ask a language model, and the asking."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import typer

from vlm_unlearn.cli.common import Stages, quiet_libraries

SERVER = typer.Option(
    None,
    "--server",
    help="Address of an OpenAI-compatible server, as http://localhost:8000/v1; its key: OPENAI_API_KEY.",
)
MODEL = typer.Option(
    None, "--model", help="The server's model; without --server a model folder or hub name to run here."
)
CONCURRENCY = typer.Option(16, "--concurrency", min=1, max=512, help="Questions under way at once on a server.")
CACHE = typer.Option(
    True, "--cache/--no-cache", help="Take replies that the same model gave to the same question before."
)


class Asker:
    """Asks the chosen model, with a progress bar and the cache; counts what was asked anew."""

    def __init__(
        self, stages: Stages, stage: str, server: str | None, model: str, concurrency: int, cache: bool, max_tokens: int
    ) -> None:
        from vlm_unlearn.generation.chat import ChatCache, ChatModel, OpenAIChat
        from vlm_unlearn.store import cache_folder

        self._chat: ChatModel
        if server:
            self._chat = OpenAIChat(server, model, max_tokens, concurrency)
        else:
            quiet_libraries()
            from vlm_unlearn.generation.local_chat import LocalChat

            self._chat = LocalChat(model, max_tokens)
        self._cache = ChatCache(cache_folder() / "replies.sqlite") if cache else None
        self._stages = stages
        self._stage = stage
        self.asked = 0

    def __call__(
        self, questions: Sequence[tuple[str, str, Path | None]]
    ) -> Mapping[str, tuple[str | None, str | None]]:
        """(id, text, image) -> (reply, error) by id."""
        from vlm_unlearn.errors import RunError
        from vlm_unlearn.generation.chat import ChatRequest, complete_all

        def asks() -> Iterator[ChatRequest]:
            for id, text, image in questions:
                yield ChatRequest(id, text, image)

        replies, asked = complete_all(
            self._chat, asks(), self._cache, lambda done: self._stages.update(self._stage, done, len(questions))
        )
        self.asked += asked
        errors = [reply.error for reply in replies.values() if reply.text is None]
        if errors and len(errors) == len(replies):
            raise RunError(f"not one of {len(errors)} questions was answered ({errors[0]})")
        if errors:
            typer.echo(
                f"warning: {len(errors):,} of {len(replies):,} questions were not answered; the first: {errors[0]}",
                err=True,
            )
        return {id: (reply.text, reply.error) for id, reply in replies.items()}
