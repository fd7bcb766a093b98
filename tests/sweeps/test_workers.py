"""Several workers on one study: kill -9, resuming, and a PostgreSQL server."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from optuna.trial import TrialState

from fork_server import ForkedProcess
from sweeps.sweep_scene import tiny_sweep
from vlm_unlearn.config import Sweep
from vlm_unlearn.sweeps.results import read_trials
from vlm_unlearn.sweeps.space import Space
from vlm_unlearn.sweeps.study import OUTCOME, open_study

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess, pytest.mark.timeout(600)]


@pytest.fixture
def sweep_file(tiny_model: Path, training_sets: dict[str, Path], world: Path, tmp_path: Path) -> tuple[Path, Sweep]:
    """A grid of eight trials, each of which takes a second or two."""
    space = {"training.learning_rate": [1e-4, 2e-4, 5e-4, 1e-3], "method.beta": [0.1, 0.5]}
    training = {"max_steps": 8, "save_steps": 2}
    sweep = tiny_sweep(tiny_model, training_sets["safe_eraser"], world, space, training=training)
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(sweep.model_dump(mode="json", exclude_unset=True)))
    return file, sweep


def start(file: Path, out: Path, *options: object) -> ForkedProcess:
    return ForkedProcess(
        ["sweep", file, "--out", out, "--json", *options],
        {**os.environ, "OMP_NUM_THREADS": "1"},
    )


def completed(sweep: Sweep, out: Path, storage: str | None = None) -> int:
    if storage is None and not (out / "study.journal").is_file():
        return 0
    study = open_study(sweep, out, storage)
    return len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))


def wait_for(count: int, sweep: Sweep, out: Path, storage: str | None = None) -> None:
    deadline = time.monotonic() + 200
    while completed(sweep, out, storage) < count:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def check_done_once(sweep: Sweep, out: Path, storage: str | None = None) -> None:
    """Checks that each combination has one complete trial, and that no trial runs or waits."""
    study, space = open_study(sweep, out, storage), Space(sweep)
    states = Counter(trial.state for trial in study.get_trials())
    assert states[TrialState.COMPLETE] == 8
    assert not states[TrialState.RUNNING]
    assert not states[TrialState.WAITING]
    trials = read_trials(study, sweep, space)
    assert [trial.state for trial in trials] == ["complete"] * 8
    expected = Counter(json.dumps(values) for values in space.grid())
    assert Counter(json.dumps(trial.params) for trial in trials) == expected
    assert len({trial.configuration for trial in trials}) == 8


def test_four_workers_of_which_two_are_killed_run_every_trial_once(
    sweep_file: tuple[Path, Sweep], tmp_path: Path
) -> None:
    file, sweep = sweep_file
    out = tmp_path / "out"
    workers = [start(file, out) for _ in range(4)]
    wait_for(1, sweep, out)
    for worker in workers[:2]:
        worker.kill()
    for worker in workers[2:]:
        output, error = worker.communicate(timeout=200)
        assert worker.wait() == 0, error
        assert len(json.loads(output)["trials"]) == 8
    check_done_once(sweep, out)
    assert {trial["state"] for trial in json.loads(output)["trials"]} == {"complete"}


def test_sweep_resumes_after_a_kill_of_everything(sweep_file: tuple[Path, Sweep], tmp_path: Path) -> None:
    file, sweep = sweep_file
    out = tmp_path / "out"
    worker = start(file, out, "--workers", 2)
    wait_for(2, sweep, out)
    worker.kill()
    deadline = time.monotonic() + 60
    running = (TrialState.RUNNING,)
    finished = completed(sweep, out)
    # The worker's processes end with it, and leave their trials running.
    while time.monotonic() < deadline and completed(sweep, out) > finished:
        time.sleep(0.2)
    with (out / "study.journal").open("ab") as journal:
        journal.write(b'{"op_code":8,"wor')  # as if it was killed in the middle of a line
    again = start(file, out)
    _, error = again.communicate(timeout=200)
    assert again.wait() == 0, error
    check_done_once(sweep, out)
    assert not open_study(sweep, out, None).get_trials(states=running)


def test_trial_whose_workers_are_killed_again_and_again_is_marked(
    sweep_file: tuple[Path, Sweep], tmp_path: Path
) -> None:
    _, sweep = sweep_file
    out = tmp_path / "out"
    from vlm_unlearn.sweeps.study import GRID, recover_trials, study_lock, take_trial

    study, space = open_study(sweep, out, None), Space(sweep)
    study.enqueue_trial(space.params_of(space.grid()[0]), user_attrs={GRID: 0})
    dead = {"machine": "another", "pid": 1, "started": 0.0}
    for attempt in range(sweep.retries + 1):
        with study_lock(out):
            taken = take_trial(study, sweep, space)
        assert taken is not None
        trial, values = taken
        assert values == space.grid()[0]
        with study_lock(out):
            recover_trials(study, sweep, space)  # it is alive
        assert len(study.get_trials(states=(TrialState.RUNNING,))) == 1
        trial.set_user_attr("worker", dead)
        trial.set_user_attr("heartbeat", time.time() - 2 * sweep.stale_after)
        for _ in range(2):  # the second call changes nothing
            with study_lock(out):
                recover_trials(study, sweep, space)
        waiting = study.get_trials(states=(TrialState.WAITING,))
        assert len(waiting) == (attempt < sweep.retries)
    last = study.get_trials()[-1]
    assert (last.state, last.user_attrs[OUTCOME]) == (TrialState.FAIL, "died")
    (trial_record,) = read_trials(study, sweep, space)
    assert (trial_record.state, trial_record.attempts) == ("failed", sweep.retries + 1)


def test_interrupted_trial_goes_back_into_the_queue(sweep_file: tuple[Path, Sweep], tmp_path: Path) -> None:
    from vlm_unlearn.sweeps.study import GRID, end_trial, recover_trials, study_lock, take_trial

    _, sweep = sweep_file
    out = tmp_path / "out"
    study, space = open_study(sweep, out, None), Space(sweep)
    study.enqueue_trial(space.params_of(space.grid()[0]), user_attrs={GRID: 0})
    for _ in range(sweep.retries + 3):
        with study_lock(out):
            taken = take_trial(study, sweep, space)
            assert taken is not None
            end_trial(study, taken[0], TrialState.FAIL, "interrupted")
            recover_trials(study, sweep, space)
    assert len(study.get_trials(states=(TrialState.WAITING,))) == 1


def test_dashboard_opens_the_study(sweep_file: tuple[Path, Sweep], tmp_path: Path) -> None:
    pytest.importorskip("optuna_dashboard")
    from optuna_dashboard import wsgi

    _, sweep = sweep_file
    study = open_study(sweep, tmp_path / "out", None)
    study.enqueue_trial({"method.beta": 0.1})
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(tmp_path / "out" / "study.journal"))
    )
    status: list[str] = []
    environment: dict[str, Any] = {
        "REQUEST_METHOD": "GET",
        "PATH_INFO": "/api/studies",
        "SERVER_NAME": "localhost",
        "SERVER_PORT": "8080",
        "wsgi.input": open(os.devnull, "rb"),  # noqa: SIM115
        "wsgi.url_scheme": "http",
    }
    body = b"".join(wsgi(storage)(environment, lambda line, _headers, *_: status.append(line)))
    assert status[0].startswith("200")
    assert json.loads(body)["study_summaries"][0]["study_name"] == "out"


@pytest.fixture(scope="module")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a PostgreSQL server of its own."""
    pytest.importorskip("psycopg", reason="needs psycopg: pip install '.[sweep]'")
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    program = shutil.which("initdb")
    binaries = programs[-1] if programs else Path(program).parent if program else None
    if binaries is None or not (binaries / "initdb").exists():
        pytest.skip("needs PostgreSQL: apt-get install postgresql")
    folder = tmp_path_factory.mktemp("postgresql")
    user: dict[str, Any] = {}
    if os.getuid() == 0:  # PostgreSQL refuses to run as root
        import pwd

        try:
            account = pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("needs the user postgres, because PostgreSQL does not run as root")
        for path in [folder, *list(folder.parents)[:3]]:
            if path != Path("/tmp") and path.owner() == "root" and path != folder:
                path.chmod(path.stat().st_mode | 0o011)
        os.chown(folder, account.pw_uid, account.pw_gid)
        user = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    data = folder / "data"
    quiet: dict[str, Any] = {"check": True, "capture_output": True, "cwd": folder, **user}
    subprocess.run([binaries / "initdb", "-D", data, "-U", "sweep", "-A", "trust", "-N"], **quiet)
    server = subprocess.Popen(
        [binaries / "postgres", "-D", data, "-p", str(port), "-k", folder, "-h", "localhost", "-F"],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        **user,
    )
    try:
        for _ in range(100):
            ready = subprocess.run(
                [binaries / "pg_isready", "-h", "localhost", "-p", str(port)], capture_output=True, check=False
            )
            if ready.returncode == 0:
                break
            time.sleep(0.1)
        subprocess.run([binaries / "createdb", "-h", "localhost", "-p", str(port), "-U", "sweep", "studies"], **quiet)
        yield f"postgresql://sweep@localhost:{port}/studies"
    finally:
        server.send_signal(signal.SIGINT)  # without waiting for the connections of the tests
        server.wait()


def test_workers_share_a_study_in_postgresql_and_resume_after_a_kill(
    sweep_file: tuple[Path, Sweep], tmp_path: Path, postgresql: str
) -> None:
    file, sweep = sweep_file
    out = tmp_path / "out"
    workers = [start(file, out, "--storage", postgresql) for _ in range(2)]
    wait_for(1, sweep, out, postgresql)
    for worker in workers:
        worker.kill()
    again = start(file, out, "--storage", postgresql)
    _, error = again.communicate(timeout=200)
    assert again.wait() == 0, error
    check_done_once(sweep, out, postgresql)
    assert not (out / "study.journal").exists()


def test_database_that_is_not_available_is_one_error(sweep_file: tuple[Path, Sweep], tmp_path: Path) -> None:
    from helpers import raises_code

    pytest.importorskip("psycopg")
    with raises_code("storage-not-available", field="--storage"):
        open_study(sweep_file[1], tmp_path / "out", "postgresql://nobody@localhost:1/none")
