"""Step one of an evaluation (generate, judge, score): generates the model's answers to a suite's prompts.

The run folder gets prompts.jsonl, responses.jsonl (in the order of the prompts), suite.json and manifest.json.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike

from vlm_unlearn.config import Suite, apply_overrides, validate
from vlm_unlearn.distributed import ProcessGroup, process_group, world_size
from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.evaluation.core import generate_missing
from vlm_unlearn.evaluation.prompts import image_roots, prompts_digest, suite_prompts
from vlm_unlearn.generation import base
from vlm_unlearn.generation.base import Backend, GenerationRequest, build_requests, evenly_spaced
from vlm_unlearn.records import Batching, Prompt
from vlm_unlearn.store import EvaluationRun, describe_path, read_json, write_json, write_records

OnDone = Callable[[str, int, int], None]  # stage, items done, items in total
# The keys of a suite that may change after its answers have been generated.
REJUDGEABLE_KEYS = ("judge", "judges", "metrics", "paper_compat", "paper_metrics")


def generate_run(
    suite: Suite,
    run: str | PathLike[str],
    on_done: OnDone | None = None,
    verify_batching: int = 0,
    prompts: Sequence[Prompt] | None = None,
    backend: Backend | None = None,
) -> None:
    """Generates the model's answers to all prompts of a suite, into a run folder.

    The function can be called again with the same arguments. An interrupted run resumes, and a finished run generates
    failed answers again. Under torchrun or ``accelerate launch`` every process calls it: each generates some of the
    answers, and the first process writes the files of the run.

    Args:
        suite: The suite, with the model.
        run: The run folder, as a path or as an `EvaluationRun`.
        on_done: Called with the stage and the number of finished and of all answers of this process.
        verify_batching: The number of answers to generate a second time, each in a batch of its own. ``batching.json``
            reports how many of them differ.
        prompts: The prompts of the suite, if they have been read already.
        backend: The backend of the suite's model, if it has been built already. Only for a single process.

    Raises:
        UserError: The data are broken, the model cannot be loaded, or the folder contains another run.
        RunError: The server does not respond, or another process of the run has ended.
    """
    if world_size() > 1 and suite.generation.backend != "hf":
        raise UserError(
            f"the backend {suite.generation.backend} does its own batching. Start it as a single process.",
            code="unsupported-setting",
            field="generation.backend",
        )
    run = EvaluationRun(run)
    with process_group() as group:
        if group.rank == 0:
            prompts = suite_prompts(suite) if prompts is None else prompts
            backend = backend or build_backend(suite)
            _generate_as_main_process(suite, run, prompts, on_done, verify_batching, group, backend)
        elif group.broadcast(False):  # the value comes from the main process: whether answers are missing
            requests = _suite_requests(suite, suite_prompts(suite))
            _generate_missing(build_backend(suite), requests, run, group, None)
            group.wait()


def build_backend(suite: Suite) -> Backend:
    """Returns the backend that a suite's ``generation.backend`` names.

    Raises:
        UserError: The model does not exist, or the backend is not installed.
    """
    return base.build_backend(suite.model, suite.generation)


def _suite_requests(suite: Suite, prompts: Sequence[Prompt]) -> list[GenerationRequest]:
    samples = {split.name: split.samples for split in suite.splits}
    return build_requests(prompts, image_roots(suite), samples, suite.generation.image_loader)


def _generate_as_main_process(
    suite: Suite,
    run: EvaluationRun,
    prompts: Sequence[Prompt],
    on_done: OnDone | None,
    verify_batching: int,
    group: ProcessGroup,
    backend: Backend,
) -> None:
    """Opens the run folder, generates this process's share of the answers and writes the files of the run."""
    requests = _suite_requests(suite, prompts)
    identity = {
        "kind": "evaluate",
        **backend.identity(),
        "prompts": prompts_digest(prompts, image_roots(suite)),
        "samples": {split.name: split.samples for split in suite.splits if split.samples > 1},
    }
    with run.lock():
        run.open(identity)
        save_suite(run, suite)
        failed = run.failed_responses()
        if failed:
            backend.check_available()
        incomplete = bool(failed) or not run.is_finished or not _is_complete(run, requests)
        if not run.has_prompts(prompts):
            write_records(run.prompts_file, prompts)
        if incomplete:
            run.merge_shards()
        if group.broadcast(incomplete):
            with _record_wall_time(run):
                _generate_missing(backend, requests, run, group, on_done)
                group.wait()
                run.merge_shards()
                run.sort_responses([request.key for request in requests])
                if failed - run.failed_responses():  # the check has not covered the new answers
                    run.batching_file.unlink(missing_ok=True)
        if verify_batching:
            with _record_wall_time(run):
                _verify_batching(backend, requests, run, verify_batching, on_done)


def _is_complete(run: EvaluationRun, requests: Sequence[GenerationRequest]) -> bool:
    """Returns whether each request has exactly one answer. The file of a finished run may have been edited since."""
    keys = [response.key for response in run.read_responses()]
    return sorted(keys) == sorted(request.key for request in requests)


@contextmanager
def _record_wall_time(run: EvaluationRun) -> Iterator[None]:
    """Adds the time that the block takes to the run's manifest, and marks the run finished."""
    started = time.monotonic()
    yield
    run.record_cost(time.monotonic() - started, finished=True)


def _generate_missing(
    backend: Backend,
    requests: Sequence[GenerationRequest],
    run: EvaluationRun,
    group: ProcessGroup,
    on_done: OnDone | None,
) -> None:
    """Generates this process's share of the missing answers."""
    answered = {response.key for response in run.read_responses() if response.error is None}
    with run.response_log(group.rank, group.size) as log:
        generate_missing(
            backend,
            requests,
            log,
            answered,
            None if on_done is None else lambda done, total: on_done("generate", done, total),
            group.rank,
            group.size,
        )


def _verify_batching(
    backend: Backend, requests: Sequence[GenerationRequest], run: EvaluationRun, count: int, on_done: OnDone | None
) -> None:
    """Generates some answers again in batches of one, and writes how many of them differ to batching.json."""
    batched_texts = {response.key: response.text for response in run.read_responses() if response.text is not None}
    selected = evenly_spaced([request for request in requests if request.key in batched_texts], count)
    earlier = read_batching(run)
    if earlier is not None and earlier.checked >= len(selected):
        return
    checked = flipped = 0
    for response in backend.run_one_by_one(selected):
        if response.text is not None:
            checked += 1
            flipped += response.text != batched_texts[response.key]
        if on_done:
            on_done("one by one", checked, len(selected))
    write_json(run.batching_file, Batching(checked=checked, flipped=flipped).model_dump())


def read_batching(run: EvaluationRun) -> Batching | None:
    """Returns the result of a run's batching check, or None if it was not run."""
    file = run.batching_file
    return validate(Batching, read_json(file), str(file)) if file.exists() else None


def generation_notes(run: str | PathLike[str]) -> list[str]:
    """Returns sentences for the user about a run's answers: how many failed, and how many change with batching."""
    run = EvaluationRun(run)
    responses = run.read_responses()
    failed = [response for response in responses if response.error is not None]
    notes = []
    if failed:
        notes.append(
            f"{len(failed)} of {len(responses)} answers failed (the first: {quoted(failed[0].error)}). "
            "Run the same command again to retry them."
        )
    batching = read_batching(run)
    if batching is not None:
        notes.append(
            f"Batching changes {batching.flipped} of {batching.checked} answers that were generated again one by one."
        )
    return notes


def save_suite(run: EvaluationRun, suite: Suite) -> None:
    """Writes the explicitly set keys of a suite to ``suite.json``.

    Defaults are not written, because a judge takes its unset keys from the suite's default judge.
    """
    write_json(run.suite_file, suite.model_dump(mode="json", exclude_unset=True))


def saved_suite(run: str | PathLike[str], overrides: Sequence[str] = ()) -> Suite:
    """Reads the suite of a run folder.

    Args:
        run: The run folder, as a path or as an `EvaluationRun`.
        overrides: ``key=value`` for judges and metrics (`REJUDGEABLE_KEYS`). They are not written to the run:
            `save_suite` does that, once judging with them has succeeded.

    Raises:
        UserError: The folder contains no suite, or an override would change the answers.
    """
    run = EvaluationRun(run)
    file = run.suite_file
    if not file.is_file():
        raise UserError(
            f"not an evaluation, {file.name} is missing{describe_path(run.path)}. "
            "Pass a folder that `vlm-unlearn evaluate` or `generate` has written.",
            code="run-not-found",
            file=run.path,
        )
    value = read_json(file)
    for override in overrides:
        key = override.partition("=")[0].partition(".")[0].strip()
        if Suite.renamed_keys.get(key, key) not in REJUDGEABLE_KEYS:
            raise UserError(
                f"the override {quoted(override)} would change answers that have been generated already. "
                f"Only these keys can change: {', '.join(REJUDGEABLE_KEYS)}.",
                code="invalid-override",
                field=quoted(key)[1:-1],
            )
    return validate(Suite, apply_overrides(value, overrides, Suite) if isinstance(value, dict) else value, str(file))
