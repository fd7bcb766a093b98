"""The first of three steps: asks a suite's model all prompts, into a run folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vlm_unlearn.config import Suite, apply_overrides, validate
from vlm_unlearn.distributed import Team, processes, team
from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.evaluation.answers import (
    RESPONSES,
    failed_responses,
    merge_shards,
    remove_failed_responses,
    response_log,
    sort_responses,
)
from vlm_unlearn.evaluation.prompts import image_roots, prompts_digest, suite_prompts
from vlm_unlearn.generation.base import Backend, Question, ask, assign_to_processes
from vlm_unlearn.records import Batching, Prompt, Response
from vlm_unlearn.store import (
    describe_path,
    lock_run,
    open_run,
    read_json,
    read_manifest,
    read_records,
    record_cost,
    write_json,
    write_records,
)

OnDone = Callable[[str, int, int], None]  # stage, done, all
BATCHING = "batching.json"


def generate_run(suite: Suite, folder: Path, on_done: OnDone | None = None, verify_batching: int = 0) -> None:
    """Asks the suite's model all prompts; writes prompts.jsonl, responses.jsonl (in the prompts' order), suite.json, manifest.json.

    Called again after a kill it goes on; called again when done it asks anew what failed, and nothing else. Under torchrun or
    accelerate launch all processes call it, each answers its share, and the first writes the files.

    Args:
        verify_batching: how many questions are asked once more, one by one; batching.json says how many answers that changes.

    Raises:
        UserError: broken data, a model that can't be loaded, or a folder that holds another run.
        RunError: the server is gone, or another process of the run has ended.
    """
    if processes() > 1 and suite.generation.backend != "hf":
        raise UserError(f"generation.backend={suite.generation.backend} makes its own batches; start it as one process")
    with team() as together:
        if together.rank == 0:
            _lead(suite, folder, on_done, verify_batching, together)
        elif together.agree(False):  # what the first process says counts
            questions = _questions(suite, suite_prompts(suite))
            _answer_share(build_backend(suite), questions, folder, together, None)
            together.wait()


def build_backend(suite: Suite) -> Backend:
    """What answers a suite's questions.

    Raises:
        UserError: the model isn't there, or the backend isn't installed.
    """
    if suite.generation.backend == "openai":
        from vlm_unlearn.generation.server import ServerBackend

        return ServerBackend(suite.model, suite.generation)
    if suite.generation.backend == "vllm":
        from vlm_unlearn.generation.vllm import VLLMBackend

        return VLLMBackend(suite.model, suite.generation)
    from vlm_unlearn.generation.hf import HFBackend

    return HFBackend(suite.model, suite.generation)


def _questions(suite: Suite, prompts: Sequence[Prompt]) -> list[Question]:
    return ask(prompts, image_roots(suite), _samples(suite))


def _samples(suite: Suite) -> dict[str, int]:
    return {case.name: case.samples for case in suite.splits}


def _lead(suite: Suite, folder: Path, on_done: OnDone | None, verify_batching: int, together: Team) -> None:
    """What the first process does."""
    prompts = suite_prompts(suite)
    questions = _questions(suite, prompts)
    backend = build_backend(suite)
    identity = {
        "kind": "evaluate",
        **backend.identity(),
        "prompts": prompts_digest(prompts, image_roots(suite)),
        "samples": {case: samples for case, samples in _samples(suite).items() if samples > 1},
    }
    with lock_run(folder):
        open_run(folder, identity)
        save_suite(folder, suite)
        failed = failed_responses(folder)
        if failed:
            backend.look()  # where nobody is there to answer, what has been measured stays measured
            remove_failed_responses(folder, failed)
        waiting = not read_manifest(folder)["finished"] or not _whole(folder, questions)
        if waiting:
            write_records(folder / "prompts.jsonl", prompts)
            merge_shards(folder)
        if together.agree(waiting):
            with _noting_cost(folder):
                _answer_share(backend, questions, folder, together, on_done)
                together.wait()
                merge_shards(folder)
                sort_responses(folder, [question.key for question in questions])
        if verify_batching:
            with _noting_cost(folder):
                _verify(backend, questions, folder, verify_batching, on_done)


def _whole(folder: Path, questions: Sequence[Question]) -> bool:
    """Whether each question has one answer; a finished file may have lost some since, or been edited."""
    found = (
        [response.key for response in read_records(folder / RESPONSES, Response)]
        if (folder / RESPONSES).exists()
        else []
    )
    return sorted(found) == sorted(question.key for question in questions)


@contextmanager
def _noting_cost(folder: Path) -> Iterator[None]:
    started = time.monotonic()
    yield
    record_cost(folder, time.monotonic() - started, finished=True)


def _answer_share(
    backend: Backend, questions: Sequence[Question], folder: Path, together: Team, on_done: OnDone | None
) -> None:
    """Answers what this process is to answer of all that has no answer yet.

    A batch that a kill cut short is asked whole again, so that answers don't depend on where the kill fell.
    """
    file = folder / RESPONSES
    known = {response.key for response in read_records(file, Response)} if file.exists() else set()
    batches = [batch for batch in backend.batches(questions) if any(question.key not in known for question in batch)]
    share = batches[together.rank :: together.size]
    total = sum(map(len, share))
    done = 0
    with response_log(folder, together) as log:

        def take(answers: Sequence[Response]) -> None:
            nonlocal done
            log.append(answers)
            done += len(answers)
            if on_done:
                on_done("generate", done, total)

        backend.run(share, take)


def _verify(backend: Backend, questions: Sequence[Question], folder: Path, count: int, on_done: OnDone | None) -> None:
    """Asks some of the questions, spread over the suite, once more with nothing beside them, and writes batching.json."""
    together = {
        response.key: response.text
        for response in read_records(folder / RESPONSES, Response)
        if response.text is not None
    }
    chosen = assign_to_processes([question for question in questions if question.key in together], count)
    known = read_batching(folder)
    if known is not None and known.checked >= len(chosen):
        return
    checked = flipped = 0
    for response in backend.verify_batching(chosen):
        if response.text is not None:
            checked += 1
            flipped += response.text != together[response.key]
        if on_done:
            on_done("one by one", checked, len(chosen))
    write_json(folder / BATCHING, Batching(checked=checked, flipped=flipped).model_dump())


def read_batching(folder: Path) -> Batching | None:
    """What `verify_batching` found of a run, where it was asked for."""
    return (
        validate(Batching, read_json(folder / BATCHING), str(folder / BATCHING))
        if (folder / BATCHING).exists()
        else None
    )


def remarks(folder: Path) -> list[str]:
    """What is to be said of a run's answers: how many failed, and how many batching changes."""
    answers = list(read_records(folder / RESPONSES, Response))
    failed = [response for response in answers if response.error is not None]
    told = []
    if failed:
        first = quoted(failed[0].error)
        told.append(
            f"{len(failed)} of {len(answers)} answers failed, the first: {first}; the same command asks them again"
        )
    batching = read_batching(folder)
    if batching is not None:
        told.append(
            f"batching changes {batching.flipped} of {batching.checked} answers that were asked once more, one by one"
        )
    return told


def read_answers(folder: Path) -> tuple[dict[str, Prompt], list[Response]]:
    """A finished run's prompts by id, and its responses.

    Raises:
        UserError: the folder holds no finished generation, or its files don't belong together.
    """
    manifest = read_manifest(folder) if (folder / "manifest.json").exists() else None
    if manifest is None or not manifest["finished"]:
        raise UserError(
            f"{folder}: holds no finished answers; run `vlm-unlearn generate` first (it goes on where it stopped){describe_path(folder)}"
        )
    if not (folder / "prompts.jsonl").is_file() or not (folder / RESPONSES).is_file():
        raise UserError(f"{folder}: holds no answers of a model{describe_path(folder)}")
    prompts = {prompt.id: prompt for prompt in read_records(folder / "prompts.jsonl", Prompt)}
    responses = list(read_records(folder / RESPONSES, Response))
    samples = manifest["identity"].get("samples", {})
    if not isinstance(samples, dict) or not all(
        isinstance(count, int) and 0 < count <= 1000 for count in samples.values()
    ):
        raise UserError(f"{folder / 'manifest.json'}: is not a run's manifest; choose another folder")
    wanted = {(prompt.id, sample) for prompt in prompts.values() for sample in range(samples.get(prompt.set, 1))}
    if not prompts or len(responses) != len(wanted) or wanted != {response.key for response in responses}:
        raise UserError(
            f"{folder}: prompts.jsonl and responses.jsonl don't go together; run `vlm-unlearn generate` as before, it asks what is missing"
        )
    return prompts, responses


def save_suite(folder: Path, suite: Suite) -> None:
    """Writes what was asked for and nothing more: what a judge leaves open stays open."""
    write_json(folder / "suite.json", suite.model_dump(mode="json", exclude_unset=True))


REJUDGED = ("judge", "judges", "metrics", "paper_compat", "paper_metrics")  # what may change once the answers are there


def saved_suite(folder: Path, overrides: Sequence[str] = ()) -> Suite:
    """The suite that a run folder was made with.

    Args:
        overrides: ``key=value`` of judges and metrics; once they have worked, `save_suite` makes them the run's.

    Raises:
        UserError: there is none, or an override is of what the answers depend on.
    """
    file = folder / "suite.json"
    if not file.is_file():
        wanted = "pass a folder that `vlm-unlearn evaluate` or `generate` wrote"
        raise UserError(f"{folder}: is no evaluation (suite.json: no such file); {wanted}{describe_path(folder)}")
    value = read_json(file)
    for text in overrides:
        key = text.partition("=")[0].partition(".")[0].strip()
        if Suite.renamed_keys.get(key, key) not in REJUDGED:
            raise UserError(
                f'override "{quoted(text)[1:-1]}": the answers are there already; what can change is {", ".join(REJUDGED)}'
            )
    return validate(Suite, apply_overrides(value, overrides, Suite) if isinstance(value, dict) else value, str(file))
