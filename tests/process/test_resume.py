"""A batch that is killed again and again: run the same program, and it goes on where it was."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from liteerresult import ResultStore, Runner
from tests.process import jobs
from tests.support import Child, eventually

if TYPE_CHECKING:
    from pathlib import Path

    from liteerresult.backend import TaskMeta

TASKS = int(os.environ.get("LITEERRESULT_TEST_TASKS", "150"))
"""Calls of the batch. Raise it by hand, with the kills: LITEERRESULT_TEST_TASKS=500."""

BATCH_KILLS = int(os.environ.get("LITEERRESULT_TEST_BATCH_KILLS", "4"))
"""How often the batch is killed: LITEERRESULT_TEST_BATCH_KILLS=10."""

PROGRAM = """
    import multiprocessing, sys
    from concurrent.futures import ProcessPoolExecutor
    from liteerresult import ResultStore, Runner
    from tests.process import jobs

    path, folder, what, count, method, durability = sys.argv[1:]
    with ResultStore(path, durability=durability) as store:
        pool = ProcessPoolExecutor(2, multiprocessing.get_context(method))
        with Runner(store, pool) as runner:
            group = runner.map(getattr(jobs, what), [folder] * int(count), range(int(count)), group_id="batch")
            print("submitted")
            print(sum(group.join(timeout=20)))
    """


def program(
    path: Path, folder: Path, what: str, count: int, method: str = "fork", durability: str = "power-loss"
) -> Child:
    return Child("-c", PROGRAM, path, folder, what, str(count), method, durability)


def after_the_kill(path: Path) -> dict[str, tuple[Any, ...]]:
    """Return the tasks' rows as the dead left them, once all of them are dead."""
    with ResultStore(path) as store:
        eventually(lambda: not any(store.owner_is_alive(owner) for owner in store._owners.names()))
        store.reap()
        assert store.owners() == []
        return {meta.task_id: row(meta) for meta in store.get_many([f"batch/{x}" for x in range(TASKS)])}


def row(meta: TaskMeta) -> tuple[Any, ...]:
    return (meta.status, meta.payload, meta.retries, meta.owner, meta.started_at, meta.done_at, meta.done_number)


@pytest.mark.timeout(60 + 5 * BATCH_KILLS)
@pytest.mark.parametrize(
    ("method", "durability"), [("fork", "power-loss"), ("spawn", "process-crash"), ("forkserver", "process-crash")]
)
def test_killed_and_run_again(tmp_path: Path, method: str, durability: str) -> None:
    """SIGKILL to the whole process group at random moments; what was DONE at one stays as it is and isn't run again."""
    path = tmp_path / "results.db"
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")  # noqa: T201 - shown if the test fails
    chance = random.Random(seed)
    done: dict[str, tuple[Any, ...]] = {}
    ran: Counter[str] = Counter()
    progress = []
    for _ in range(BATCH_KILLS):
        before = sum(ran.values())
        with program(path, tmp_path, "record", TASKS, method, durability) as child:
            more = chance.randrange(int(1.3 * TASKS / BATCH_KILLS))
            if more == 0:
                time.sleep(chance.random() * 0.3)  # anywhere on its way to the first call
            else:
                eventually(lambda: len(jobs.lines(tmp_path / "log")) >= min(before + more, TASKS))  # noqa: B023
                time.sleep(chance.random() * 0.005)
            os.killpg(child.pid, signal.SIGKILL)
            code = child.wait()
            assert code in (-signal.SIGKILL, 0), child.report()
            now = after_the_kill(path)
        counts = Counter(jobs.lines(tmp_path / "log"))
        for task_id, old in done.items():
            number = task_id.removeprefix("batch/")
            assert counts[number] == ran[number], f"{task_id} was DONE and ran again"
            assert now[task_id] == old
        done = {task_id: found for task_id, found in now.items() if found[0] == "DONE"}
        ran = counts
        progress.append(len(done))
    with program(path, tmp_path, "record", TASKS, method, durability) as child:
        assert child.read_line() == "submitted"
        assert child.read_line() == str(sum(x * x for x in range(TASKS)))
        assert child.wait() == 0, child.report()
    counts = Counter(jobs.lines(tmp_path / "log"))
    print(f"{method}, {durability}: DONE after each kill: {progress}; calls made: {counts.total()}")  # noqa: T201
    for task_id in done:
        number = task_id.removeprefix("batch/")
        assert counts[number] == ran[number], f"{task_id} was DONE and ran again"
    check(tmp_path, counts, done)


def check(folder: Path, counts: Counter[str], done: dict[str, tuple[Any, ...]]) -> None:
    """See that each task of the finished batch is DONE, once, and that all is as in a run that nobody harmed."""
    path = folder / "results.db"
    with ResultStore(path) as store, ResultStore(folder / "unharmed.db") as unharmed:
        group = store.restore_group("batch")
        assert group is not None
        with Runner(unharmed) as runner:
            expected = runner.map(jobs.record, [str(folder)] * TASKS, range(TASKS), group_id="batch")
        assert group.join(timeout=0) == expected.join(timeout=0)
        numbers = set()
        for x, result in enumerate(group):
            meta = store.get_task_meta(result.id)
            attempts = store.attempts(result.id)
            assert meta.status == "DONE"
            assert [attempt.retries for attempt in attempts] == list(range(meta.retries))
            assert all(attempt.status in ("FAILURE", "RETRY") for attempt in attempts)
            assert 1 <= counts[str(x)] <= meta.retries + 1
            if result.id in done:
                assert row(meta) == done[result.id]
            numbers.add(meta.done_number)
        assert len(numbers) == TASKS
        assert group.completed_count() == TASKS
        assert store.reap() == []


def test_a_finished_batch_runs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "results.db"
    for _ in range(2):
        with program(path, tmp_path, "record", 20) as child:
            assert child.read_line() == "submitted"
            assert child.read_line() == str(sum(x * x for x in range(20)))
            assert child.wait() == 0, child.report()
    assert sorted(map(int, jobs.lines(tmp_path / "log"))) == list(range(20))


@pytest.mark.parametrize("who", ["submitter", "workers too"])
def test_the_submitter_is_killed_and_the_program_run_again(tmp_path: Path, who: str) -> None:
    """Workers that outlive their submitter finish what they are at, and that is not run twice."""
    path = tmp_path / "results.db"
    with program(path, tmp_path, "hold", 12) as child:
        assert child.read_line() == "submitted"
        eventually(lambda: len(jobs.lines(tmp_path / "log")) == 2)
        if who == "submitter":
            child.kill()
        else:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        with program(path, tmp_path, "hold", 12) as again:
            assert again.read_line() == "submitted"
            (tmp_path / "go").touch()
            assert again.read_line() == str(2 * sum(range(12))), again.report()
            assert again.wait() == 0, again.report()
    counts = Counter(map(int, jobs.lines(tmp_path / "log")))
    assert set(counts) == set(range(12))
    assert sum(counts.values()) == (12 if who == "submitter" else 14)


def test_other_inputs_after_a_kill_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.db"
    with program(path, tmp_path, "hold", 12) as child:
        assert child.read_line() == "submitted"
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    for what, count in (("record", 12), ("hold", 13)):
        with program(path, tmp_path, what, count) as child:
            assert child.wait() == 1
            assert "ValueError: group 'batch' was stored with" in child.report()
    (tmp_path / "go").touch()
    with program(path, tmp_path, "hold", 12) as child:
        assert child.read_line() == "submitted"
        assert child.read_line() == str(2 * sum(range(12)))
