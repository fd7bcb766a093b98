"""The steps that every evaluation shares, in memory and with a folder: generate, judge, rate.

Records go to a `RecordSink`: a `RecordLog` is a file, with which a killed evaluation resumes, and a `RecordList` is in
memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from vlm_unlearn.generation.base import Backend, GenerationRequest, check_prompt_fields
from vlm_unlearn.judging.base import Answer
from vlm_unlearn.records import Prompt, Response
from vlm_unlearn.store import RecordSink


def generate_missing(
    backend: Backend,
    requests: Sequence[GenerationRequest],
    sink: RecordSink,
    answered: Iterable[tuple[str, int]] = (),
    on_done: Callable[[int, int], None] | None = None,
    rank: int = 0,
    num_processes: int = 1,
) -> None:
    """Generates the missing responses, and appends them to `sink`.

    A batch with at least one missing response is generated completely. Every response then comes from the same batch as
    in an uninterrupted run, wherever the run was killed.

    Args:
        backend: The model.
        requests: All requests of the evaluation.
        sink: The responses, in a file or in memory.
        answered: The keys of the responses that exist elsewhere, in addition to those in `sink`.
        on_done: Called with the number of generated responses and of those that this process generates.
        rank: The number of this process. Batches are distributed over processes.
        num_processes: The number of processes.

    Raises:
        UserError: The backend does not honor a field of a prompt.
    """
    check_prompt_fields(backend, requests)
    existing = set(answered) | sink.keys
    batches = [
        batch for batch in backend.make_batches(requests) if any(request.key not in existing for request in batch)
    ][rank::num_processes]
    total = sum(map(len, batches))
    done = 0

    def append(responses: Sequence[Response]) -> None:
        nonlocal done
        sink.append(responses)
        done += len(responses)
        if on_done:
            on_done(done, total)

    backend.run(batches, append)


def pair_answers(
    prompts: Mapping[str, Prompt], responses: Iterable[Response], build: Callable[[Prompt, Response, str], Answer]
) -> list[Answer]:
    """Returns the responses as a judge receives them.

    Args:
        prompts: The prompts by id.
        responses: The responses.
        build: Returns the answer for a prompt, a response, and the first rewrite of the prompt's question.
    """
    first_rewrites: dict[tuple[str, str], Prompt] = {}
    for prompt in prompts.values():
        question = (prompt.set, prompt.group_id)
        if question not in first_rewrites or prompt.rewrite < first_rewrites[question].rewrite:
            first_rewrites[question] = prompt
    answers = []
    for response in responses:
        prompt = prompts[response.prompt_id]
        first = first_rewrites[prompt.set, prompt.group_id]
        answers.append(build(prompt, response, first.judged_question or first.question))
    return answers
