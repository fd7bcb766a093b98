"""The folder of an evaluation: the names of its files, and its answers."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from filelock import FileLock, Timeout

from vlm_unlearn.errors import UserError
from vlm_unlearn.records import Prompt, Response, Summary, Verdict
from vlm_unlearn.store.files import RecordLog, RecordSink, read_json, read_records, write_json, write_records
from vlm_unlearn.store.retry_log import RetryLog
from vlm_unlearn.store.run_directory import RunDirectory, describe_path

SUMMARY = "summary.json"  # the rates of one model or several, in an evaluation, a demo or a report
VERDICTS = "verdicts-"  # the file names of verdicts begin with it; the judge's id follows


class EvaluationRun(RunDirectory):
    """The folder of an evaluation, a benchmark or an attack search: its answers, verdicts and rates.

    Args:
        path: The run folder. It can be missing.

    Attributes:
        prompts_file: The prompts.
        responses_file: The model's answers. In a finished run, they are in the order of the prompts.
        suite_file: The suite.
        batching_file: The result of the batching check, if it was run.
        summary_file: The rates.
        images: The folder of the images of an evaluation in memory.
        predictions_file: The answers to a benchmark.
        submission_file: The answers to a benchmark in the format of its official server.
        search_file: The report of an attack search.
        search_plot_file: The picture of an attack search.
    """

    JUDGE_IDENTITY: ClassVar = "judge-{}.json"  # everything that determines the verdicts of the judge with this id

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self.prompts_file = self.path / "prompts.jsonl"
        self.responses_file = self.path / "responses.jsonl"
        self.suite_file = self.path / "suite.json"
        self.batching_file = self.path / "batching.json"
        self.summary_file = self.path / SUMMARY
        self.images = self.path / "images"
        self.predictions_file = self.path / "predictions.jsonl"
        self.submission_file = self.path / "submission.json"
        self.search_file = self.path / "search.json"
        self.search_plot_file = self.path / "search.png"
        self._shards = self.path / "parts"  # one answer file per process, until the main process merges them

    def verdicts_file(self, judge_id: str) -> Path:
        """Returns the path of a judge's verdicts."""
        return self.path / f"{VERDICTS}{judge_id}.jsonl"

    def judge_identity_file(self, judge_id: str) -> Path:
        """Returns the path of the file that contains everything that determines a judge's verdicts."""
        return self.path / self.JUDGE_IDENTITY.format(judge_id)

    def verdicts_files(self) -> dict[str, Path]:
        """Returns the existing files of verdicts by judge id, sorted by name."""
        files = sorted(self.path.glob(f"{VERDICTS}*.jsonl"))
        return {file.stem.removeprefix(VERDICTS): file for file in files}

    def read_verdicts(self, judge_id: str) -> list[Verdict]:
        """Returns the verdicts of a judge.

        Raises:
            UserError: The file is missing or damaged. The message contains the command that grades the answers again.
        """
        try:
            return list(read_records(self.verdicts_file(judge_id), Verdict))
        except UserError as error:
            command = f"vlm-unlearn judge run {shlex.quote(str(self.path))}"
            raise error.with_fix(
                f"Delete this line and run `{command}` with this judge, which grades the answer again."
            ) from None

    def open_verdicts(self, judge_id: str, identity: Mapping[str, object], config: Mapping[str, object]) -> Path:
        """Writes a judge's identity file, and returns the path of the judge's verdicts.

        If the judge has changed since its earlier verdicts, they are moved to before-verdicts-<judge id>.jsonl. This
        process must have locked the folder.

        Args:
            judge_id: The judge's name in file names.
            identity: Everything that determines the verdicts.
            config: The judge's settings. A change of a setting that `identity` does not contain keeps the verdicts.
        """
        verdicts_file, identity_file = self.verdicts_file(judge_id), self.judge_identity_file(judge_id)
        earlier = read_json(identity_file) if identity_file.exists() else None
        if not isinstance(earlier, dict) or {**earlier, "config": None} != {**identity, "config": None}:
            for file in (verdicts_file, identity_file):
                if file.exists():
                    file.replace(file.with_name(f"before-{file.name}"))
        write_json(identity_file, {**identity, "config": config})
        return verdicts_file

    def write_summary(self, summary: Summary) -> None:
        """Writes the rates."""
        write_json(self.summary_file, summary.model_dump())

    def read_answers(self) -> tuple[dict[str, Prompt], list[Response]]:
        """Reads the prompts, by id, and the responses of a finished run.

        Raises:
            UserError: The folder does not contain a finished run, or its files do not match.
        """
        if not self.is_finished:
            raise UserError(
                f"the folder contains no finished answers{describe_path(self.path)}. "
                "Run `vlm-unlearn generate` first; it resumes an interrupted run.",
                code="run-unfinished",
                file=self.path,
            )
        if not self.responses_file.is_file():
            raise UserError(
                f"the folder contains no answers of a model{describe_path(self.path)}",
                code="run-not-found",
                file=self.path,
            )
        all_prompts = self.read_prompts()
        prompts = {prompt.id: prompt for prompt in all_prompts}
        responses = self.read_responses()
        samples = self.read_manifest()["identity"].get("samples", {})
        if not isinstance(samples, dict) or not all(
            isinstance(count, int) and 0 < count <= 1000 for count in samples.values()
        ):
            raise UserError(
                "the file is not the manifest of an evaluation. Choose another folder.",
                code="invalid-field",
                file=self.manifest_file,
                field="samples",
            )
        expected_keys = {
            (prompt.id, sample) for prompt in prompts.values() for sample in range(samples.get(prompt.set, 1))
        }
        keys = {response.key for response in responses}
        if (
            not prompts
            or len(prompts) != len(all_prompts)
            or len(responses) != len(expected_keys)
            or keys != expected_keys
        ):
            raise UserError(
                f"{self.prompts_file.name} and {self.responses_file.name} do not match. {self._repair_hint()}",
                code="run-mismatch",
                file=self.path,
            )
        return prompts, responses

    def read_prompts(self) -> list[Prompt]:
        """Returns the prompts.

        Raises:
            UserError: The file is missing or damaged. The message contains the command that writes it again.
        """
        try:
            return list(read_records(self.prompts_file, Prompt))
        except UserError as error:
            raise error.with_fix(self._repair_hint()) from None

    def has_prompts(self, prompts: Sequence[Prompt]) -> bool:
        """Returns whether the file of prompts contains exactly these prompts."""
        try:
            return self.read_prompts() == list(prompts)
        except UserError:
            return False

    def read_responses(self) -> list[Response]:
        """Returns the answers that were saved until now, also of an unfinished run.

        Raises:
            UserError: The file is damaged. The message contains the command that generates a lost answer again.
        """
        if not self.responses_file.exists():
            return []
        try:
            return list(read_records(self.responses_file, Response))
        except UserError as error:
            raise error.with_fix(f"Delete this line. {self._repair_hint()}") from None

    def _repair_hint(self) -> str:
        """Returns a sentence with the command that writes the prompts again and generates missing answers."""
        again = "It writes the prompts again and generates the missing answers."
        try:
            if "imported" in self.read_manifest()["identity"]:
                return "Run the same `vlm-unlearn import-answers` command again. It writes all of its files again."
        except UserError:  # no manifest
            pass
        try:
            suite = read_json(self.suite_file)
            splits = suite["splits"] if isinstance(suite, dict) else []
            in_memory = bool(splits) and all(split["file"] == str(self.prompts_file) for split in splits)
        except (UserError, KeyError, TypeError):  # no suite, or not one that this program has written
            return f"Run the command that wrote this folder again as before. {again}"
        if in_memory:
            return f"Call evaluate(..., output_dir={str(self.path)!r}) again as before. {again}"
        suite_file, folder = (shlex.quote(str(path)) for path in (self.suite_file, self.path))
        return f"Run `vlm-unlearn generate {suite_file} --out {folder}`. {again}"

    @contextmanager
    def response_log(self, rank: int, num_processes: int) -> Iterator[RecordSink]:
        """Opens the file to which a process appends its answers.

        A single process writes to the run's answer file, in which the failed answers stay until they are replaced. Each
        of several processes writes to a shard.

        Raises:
            UserError: A process of an earlier start still writes to the shard.
        """
        if num_processes == 1:
            responses = RetryLog(self.responses_file, Response, self.failed_responses())
            try:
                yield responses
            finally:
                responses.merge()
            return
        shard = self._shards / f"{rank}.jsonl"
        shard.parent.mkdir(exist_ok=True)
        with self._lock_shard(shard):
            yield RecordLog(shard, Response)

    def merge_shards(self) -> None:
        """Moves the answers of all shards to the run's answer file, in which they replace failed answers.

        If the process is killed, the next call completes the merge without lost or duplicate answers.

        Raises:
            UserError: A process of an earlier start still writes to a shard.
        """
        log = RetryLog(self.responses_file, Response, self.failed_responses())
        for shard in sorted({file.with_suffix(".jsonl") for file in self._shards.glob("*.*")}):
            with self._lock_shard(shard):
                if shard.exists():
                    RecordLog(shard, Response)  # drops a half-written last line
                    log.append(read_records(shard, Response))
        log.merge()
        shutil.rmtree(self._shards, ignore_errors=True)

    @contextmanager
    def _lock_shard(self, shard: Path) -> Iterator[None]:
        try:
            with FileLock(shard.with_suffix(".lock"), timeout=0):
                yield
        except Timeout:
            raise UserError(
                "another process is writing answers to this folder. Stop it, or wait until it has finished.",
                code="run-locked",
                file=self.path,
            ) from None

    def sort_responses(self, keys: Sequence[tuple[str, int]]) -> None:
        """Rewrites the answer file in the order of `keys`, which are `Response.key`, if it has another order."""
        saved = self.read_responses()
        if [response.key for response in saved] != list(keys):
            responses = {response.key: response for response in saved}
            write_records(self.responses_file, [responses[key] for key in keys])

    def failed_responses(self) -> set[tuple[str, int]]:
        """Returns the keys of the failed answers."""
        if self.responses_file.exists():
            RecordLog(self.responses_file, Response)  # drops a half-written last line
        return {response.key for response in self.read_responses() if response.error is not None}
