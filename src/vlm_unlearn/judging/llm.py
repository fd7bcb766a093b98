"""A language model as a judge, on any OpenAI-compatible server or as a vision-language model on this machine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from vlm_unlearn.config import JudgeConfig
from vlm_unlearn.data.images import ImageSource
from vlm_unlearn.errors import UserError
from vlm_unlearn.generation.chat import ChatCache, ChatModel, ChatRequest, ChatResponse, complete_many
from vlm_unlearn.generation.openai_chat import OpenAIChat
from vlm_unlearn.judging import mirage_scripts, replies, rubric
from vlm_unlearn.judging.base import Answer, Judge, OnVerdict, register
from vlm_unlearn.judging.degenerate import degenerate_reason
from vlm_unlearn.judging.rubric import Grade, Rubric, load_rubric
from vlm_unlearn.metrics.answer_reading import UNFINISHED_REASONING, final_answer
from vlm_unlearn.records import Verdict
from vlm_unlearn.store import cache_folder, digest_file

# Those of the two papers.
PUBLISHED_RUBRICS = ("relevance", "relevance_original", "safety", "refusal", "meaningful", "answer_score")
MAX_RAW_LENGTH = 2000  # characters of a reply that are stored in the verdict
UNPARSED_REPLY = "the reply contains no verdict in the requested form"


@register("llm")
class LLMJudge(Judge):
    """Grades answers by a rubric, with greedy decoding. Replies are cached by model, prompt and image.

    A degenerate answer is not sent if the rubric defines its grade. A reply that cannot be parsed gives a failed
    verdict.

    With `paper_compat`, the published scripts are reproduced, including their defects. Degenerate answers are sent as
    well. Three rubrics differ further:

    - ``relevance`` and ``relevance_original``: every rewrite is judged against the first question of its group. An
      answer with a keyword of refusals is refused, and one with certain words is irrelevant, both without a call
      (`vlm_unlearn.judging.mirage_scripts`). A reply that cannot be parsed counts as irrelevant.
    - ``answer_score``: the answer and the reference are swapped in the prompt.

    Args:
        config: The judge's config. It must have a rubric and a model.
        cache: The cache of replies. None uses the shared cache, unless `config.cache` is false.

    Raises:
        UserError: The config has no model, the rubric is invalid, or the rubric has no published counting.
    """

    def __init__(self, config: JudgeConfig, cache: ChatCache | None = None) -> None:
        if config.rubric is None or config.model is None:
            raise UserError(
                "the judge llm needs a language model. Pass judge.model=MODEL, with judge.server=http://.../v1 unless "
                "the model is a folder on this machine, or judge=keyword, which detects refusals only.",
                code="missing-setting",
                field="judge.model",
            )
        self.rubric: Rubric = load_rubric(config.rubric)
        if config.paper_compat and config.rubric not in PUBLISHED_RUBRICS:
            raise UserError(
                f"the rubric {self.rubric.name} has no published counting. Use {', '.join(PUBLISHED_RUBRICS)}.",
                code="unsupported-setting",
                field="judge.paper_compat",
            )
        if self.rubric.header.conversation and not config.server:
            raise UserError(
                f"the rubric {self.rubric.name} needs a server, which applies the chat template of the guard model.",
                code="missing-setting",
                field="judge.server",
            )
        self.name = config.judge_id
        self._config = config
        self._cache = cache
        self._images = config.images and self.rubric.header.image
        self._follows_mirage_script = config.paper_compat and self.rubric.name in mirage_scripts.IRRELEVANT_WORDS
        self.labels = ("complied", "refused", "off_topic") if self._follows_mirage_script else self.rubric.labels
        self._chat = self._build_chat()  # a wrong address or folder raises now, before hours of generation

    @classmethod
    def from_config(cls, config: JudgeConfig) -> LLMJudge:
        """Returns the judge that a config describes."""
        return cls(config)

    def identity(self) -> Mapping[str, object]:
        """Returns the base identity, the rubric, the model, and the code that parses replies."""
        return {
            **super().identity(),
            "rubric": self.rubric.digest,
            "model": dict(self._chat.identity()),
            "images": self._images,
            "replies": [digest_file(Path(str(module.__file__))) for module in (rubric, replies)],
            **({"scripts": digest_file(Path(mirage_scripts.__file__))} if self._follows_mirage_script else {}),
        }

    def _build_chat(self) -> ChatModel:
        config = self._config
        if config.server:
            return OpenAIChat(
                config.server,
                str(config.model),
                config.max_tokens,
                config.concurrency,
                config.timeout,
                config.retries,
                request=config.request,
                revision=config.revision,
            )
        from vlm_unlearn.generation.local_chat import LocalChat

        return LocalChat(str(config.model), config.max_tokens, config.batch_size)

    def check_available(self) -> None:
        """Checks that the server is reachable. A model on this machine was checked when it was loaded."""
        if isinstance(self._chat, OpenAIChat):
            self._chat.check_available()

    def grade_all(self, answers: Iterable[Answer], on_verdict: OnVerdict) -> None:
        """Grades answers and calls `on_verdict` once for each, when its reply arrives.

        Raises:
            UserError: The server rejects the key or does not serve the model.
            RunError: The server cannot be reached.
        """
        pending: dict[str, Answer] = {}
        cache = self._cache or (ChatCache(cache_folder() / "replies.sqlite") if self._config.cache else None)

        def requests() -> Iterator[ChatRequest]:
            for answer in answers:
                verdict = self._verdict_without_call(answer)
                if verdict is not None:
                    on_verdict(verdict)
                    continue
                try:
                    image = answer.image() if self._images else None
                except UserError as error:
                    on_verdict(self.failed_verdict(answer, str(error)))
                    continue
                id = "/".join(map(str, answer.response.key))
                pending[id] = answer
                yield self._request(id, answer, image)

        complete_many(
            self._chat, requests(), cache, lambda reply: on_verdict(self._parse_verdict(pending.pop(reply.id), reply))
        )

    def _request(self, id: str, answer: Answer, image: ImageSource | None) -> ChatRequest:
        if not self.rubric.header.conversation:
            return ChatRequest(id, self._prompt(answer), image)
        request = ChatRequest.of_prompt(id, answer.prompt, image)
        text = final_answer(answer.response.text or "") or ""
        return replace(request, prefill=None, temperature=None, assessed_answer=text)

    def _prompt(self, answer: Answer) -> str:
        prompt, text = answer.prompt, answer.response.text or ""
        if self._follows_mirage_script:
            return self.rubric.build_prompt(prompt, text, answer.first_question)
        if self._config.paper_compat and self.rubric.name == "answer_score":
            return self.rubric.build_prompt(prompt.model_copy(update={"reference": text}), prompt.reference or "")
        return self.rubric.build_prompt(prompt, text if self._config.paper_compat else final_answer(text) or "")

    def _verdict_without_call(self, answer: Answer) -> Verdict | None:
        """Returns the verdict on an answer that is not sent to the model, or None if it is sent."""
        text = answer.response.text
        if text is None:
            return self.failed_verdict(answer, answer.response.error or "no answer")
        if not self._config.paper_compat and final_answer(text) is None:
            return self.failed_verdict(answer, UNFINISHED_REASONING)
        if self._follows_mirage_script:
            decided = mirage_scripts.grade_without_call(self.rubric.name, text)
            return None if decided is None else self._verdict(answer, *decided)
        grade = None if self._config.paper_compat else self.rubric.header.degenerate
        reason = degenerate_reason(final_answer(text) or "") if grade else None
        return self._verdict(answer, grade, reason) if grade and reason else None

    def _parse_verdict(self, answer: Answer, reply: ChatResponse) -> Verdict:
        if reply.text is None:
            # A verdict with `raw` is not requested again: a truncated reply would be truncated again.
            raw = "" if reply.finish_reason == "length" else None
            return self.failed_verdict(answer, reply.error or "no reply", raw)
        raw = reply.text if len(reply.text) <= MAX_RAW_LENGTH else reply.text[:MAX_RAW_LENGTH] + "…"
        grade = mirage_scripts.read_published_reply(reply.text) if self._follows_mirage_script else None
        grade = grade or self.rubric.parse_reply(reply.text)
        if grade is None and self._follows_mirage_script:
            grade = mirage_scripts.IRRELEVANT
        if grade is None:
            return self.failed_verdict(answer, UNPARSED_REPLY, raw).model_copy(update={"tokens": reply.tokens})
        return self._verdict(answer, grade, raw).model_copy(update={"tokens": reply.tokens})

    def _verdict(self, answer: Answer, grade: Grade, raw: str | None) -> Verdict:
        response = answer.response
        return Verdict(
            prompt_id=response.prompt_id,
            sample=response.sample,
            judge=self.name,
            label=grade.label,
            score=grade.score,
            raw=raw,
            numbers=grade.numbers,
        )
