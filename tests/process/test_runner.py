"""`Runner` over pools of real processes that are really killed: what it costs, and what it does not."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import threading
import time
from collections import Counter
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any

import pytest

from liteerresult import (
    AsyncResult,
    GroupResult,
    LiteerresultError,
    ResultStore,
    Runner,
    TaskRevokedError,
    WorkerLostError,
    runner as runner_module,
    worker as worker_module,
)
from liteerresult.batch import plan_group
from liteerresult.liveness import parse_owner
from liteerresult.marks import Marks
from liteerresult.worker import Call, Home, run_chunk, this_host
from tests.process import jobs
from tests.support import DEADLINE, Child, eventually, run_python

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

METHODS = ["fork", "forkserver", "spawn"]

JOIN = 10
"""Seconds for a join that should not hang: less than a test has."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results.db"


@pytest.fixture
def store(path: Path) -> Iterator[ResultStore]:
    with ResultStore(path, durability="process-crash") as opened:
        yield opened


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Where calls leave what they did."""
    return str(tmp_path)


def log(folder: str) -> list[int]:
    return [int(line) for line in jobs.lines(f"{folder}/log")]


def pool(workers: int = 2, method: str = "fork", **options: Any) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, multiprocessing.get_context(method), **options)


def statuses(group: Any) -> list[str]:
    return [result.status for result in group]


# All is well


@pytest.mark.parametrize("method", METHODS)
def test_workers_record_what_they_did(store: ResultStore, method: str) -> None:
    with Runner(store, pool(method=method)) as runner:
        group = runner.map(jobs.double, range(100))
        pids = runner.map(jobs.own_pid, range(10))
        assert group.join(timeout=DEADLINE) == [2 * x for x in range(100)]
        found = set(pids.join(timeout=DEADLINE))
    assert os.getpid() not in found
    assert {parse_owner(store.get_task_meta(result.id).owner or "")[0] for result in pids} == found
    assert store.reap() == []  # the workers ended and left nothing


def test_what_worker_processes_submit_has_the_task_for_a_parent(store: ResultStore, path: Path) -> None:
    code = """
        import sys
        from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
        from liteerresult import ResultStore, Runner
        from liteerresult.store import open_store
        from tests.process.jobs import double

        def parent(path):
            store = open_store(path, "process-crash")
            store.create_task("child", task_id="child")
            with Runner(store, ThreadPoolExecutor(1)) as nested:
                return nested.map(double, [1, 2], group_id="nested").join(timeout=10)

        with ResultStore(sys.argv[1], durability="process-crash") as store:
            with Runner(store, ProcessPoolExecutor(1)) as runner:
                assert runner.map(parent, [sys.argv[1]], group_id="top").join(timeout=20) == [[2, 4]]
        """
    run_python(code, path)
    top = AsyncResult("top/0", store)
    assert AsyncResult("child", store).parent == top
    nested = GroupResult.restore("nested", backend=store)
    assert nested is not None
    assert nested.parent == top
    assert {child.id for child in top.children} >= {"child", "nested"}


@pytest.mark.parametrize("durability", ["power-loss", "process-crash"])
def test_both_durabilities(tmp_path: Path, durability: Any) -> None:
    with ResultStore(tmp_path / "r.db", durability=durability) as store, Runner(store, pool()) as runner:
        assert runner.map(jobs.double, range(50)).join(timeout=DEADLINE) == [2 * x for x in range(50)]


@pytest.mark.parametrize("retries", [0, 2])
def test_a_function_that_cannot_be_sent(store: ResultStore, retries: int) -> None:
    with Runner(store, pool()) as runner:
        group = runner.map(lambda x: x, range(5), retries=retries)
        outcomes = group.join(timeout=DEADLINE, propagate=False)
        assert runner.map(jobs.double, [1]).join(timeout=DEADLINE) == [2]  # the pool goes on
    assert statuses(group) == ["FAILURE"] * 5
    assert all("<lambda>" in str(outcome) for outcome in outcomes)


def test_a_custom_factory(store: ResultStore, folder: str) -> None:
    made: list[Executor] = []

    class Pool(ProcessPoolExecutor):
        """Another class: what only a factory can make anew."""

    def make() -> Executor:
        made.append(Pool(2))
        return made[-1]

    with Runner(store, make) as runner:
        group = runner.map(jobs.die_once, [folder] * 10, range(10), [4] * 10, retries=1)
        assert group.join(timeout=JOIN) == [2 * x for x in range(10)]
    assert len(made) == 2


def test_an_executor_of_another_class_can_not_be_made_anew(store: ResultStore, folder: str) -> None:
    class Pool(ProcessPoolExecutor):
        pass

    with Runner(store, Pool(1)) as runner:
        group = runner.map(jobs.poison, [folder] * 10, range(10), [4] * 10)
        outcomes = group.join(timeout=JOIN, propagate=False)
    assert isinstance(outcomes[4], WorkerLostError)
    assert all(isinstance(outcome, int | RuntimeError) for outcome in outcomes[:4] + outcomes[5:])


# A worker dies


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_worker_costs_its_call_alone(store: ResultStore, folder: str, method: str) -> None:
    """The pool ends the other worker too, in the middle of a call: that one is made again."""
    with Runner(store, pool(method=method)) as runner:
        before = runner._executor
        group = runner.map(jobs.die_or_wait, [folder] * 6, range(6))
        outcomes = group.join(timeout=JOIN, propagate=False)
        assert runner._executor is not before
    error = outcomes[0]
    assert isinstance(error, WorkerLostError)
    assert (error.task_id, error.started) == (group[0].id, True)
    assert error.pid is not None
    assert error.pid != os.getpid()
    assert outcomes[1:] == [2, 4, 6, 8, 10]
    assert statuses(group) == ["FAILURE"] + ["DONE"] * 5
    assert log(folder).count(0) == 1
    assert log(folder).count(1) == 2
    assert group[1].retries == 1
    assert [meta.status for meta in store.attempts(group[1].id)] == ["RETRY"]
    assert isinstance(store.attempts(group[1].id)[0].result, WorkerLostError)


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_worker_and_retries(store: ResultStore, folder: str, method: str) -> None:
    with Runner(store, pool(method=method)) as runner:
        group = runner.map(jobs.die_once, [folder] * 10, range(10), [4] * 10, retries=1)
        assert group.join(timeout=JOIN) == [2 * x for x in range(10)]
    assert group[4].retries == 1
    (attempt,) = store.attempts(group[4].id)
    assert attempt.status == "RETRY"
    assert isinstance(attempt.result, WorkerLostError)
    assert log(folder).count(4) == 2


def test_a_worker_that_leaves(store: ResultStore, folder: str) -> None:
    with Runner(store, pool()) as runner:
        group = runner.map(jobs.leave, [folder] * 10, range(10), [4] * 10)
        outcomes = group.join(timeout=JOIN, propagate=False)
    assert isinstance(outcomes.pop(4), WorkerLostError)
    assert outcomes == [2 * x for x in range(10) if x != 4]


@pytest.mark.parametrize("retries", [2, 6])
def test_a_call_that_always_kills_its_worker(store: ResultStore, folder: str, retries: int) -> None:
    """It fails after its retries; the calls that were waiting in the same pools all along are made."""
    with Runner(store, pool(), chunk_seconds=0) as runner:
        group = runner.map(jobs.poison, [folder] * 6, range(6), [2] * 6, retries=retries)
        outcomes = group.join(timeout=JOIN, propagate=False)
    assert isinstance(outcomes.pop(2), WorkerLostError)
    assert outcomes == [0, 2, 6, 8, 10]
    assert log(folder).count(2) == retries + 1
    assert group[2].retries == retries


def test_calls_that_wait_while_pools_break_are_made(store: ResultStore, folder: str) -> None:
    """The poison is first in line each time; what waits behind it in the pool is never to blame."""
    with Runner(store, pool(1), chunk_seconds=0) as runner:
        poison = runner.run_calls(jobs.poison, [((folder, 9, 9), {})], retries=8)
        others = [runner.submit(jobs.double, x) for x in range(2)]
        with pytest.raises(WorkerLostError):
            poison.join(timeout=JOIN)
        assert [other.get(timeout=JOIN, propagate=False) for other in others] == [0, 2]
    assert log(folder) == [9] * 9


def test_a_long_call_beside_one_that_kills_its_workers(store: ResultStore, folder: str) -> None:
    """It is ended by the pool each time, and begun again, however often: another is proven to be the culprit."""
    with Runner(store, pool(), chunk_seconds=0) as runner:
        group = runner.map(jobs.poison_beside, [folder] * 2, range(2), retries=6)
        with pytest.raises(WorkerLostError):
            group[0].get(timeout=JOIN)
        open(f"{folder}/go", "w").close()
        assert group[1].get(timeout=JOIN) == 2
    assert log(folder).count(0) == 7


@pytest.mark.parametrize("retries", [0, 6])
def test_a_long_call_without_retries_beside_it(store: ResultStore, folder: str, retries: int) -> None:
    with Runner(store, pool(), chunk_seconds=0) as runner:
        poison = runner.map(jobs.poison_beside, [folder], [0], retries=retries)
        long = runner.map(jobs.poison_beside, [folder], [1])
        with pytest.raises(WorkerLostError):
            poison.join(timeout=JOIN)
        open(f"{folder}/go", "w").close()
        assert long.join(timeout=JOIN) == [2]


def test_a_chunk_whose_worker_dies_after_calls_of_it_failed(store: ResultStore, folder: str) -> None:
    """Those that had been given back for their next attempt are not forgotten with the chunk's report."""
    count, deadly = 200, 120
    with Runner(store, pool(1), chunk_seconds=1) as runner:
        group = runner.map(jobs.fail_then_die, [folder] * count, range(count), [deadly] * count, retries=1)
        try:
            assert group.join(timeout=JOIN) == [2 * x for x in range(count)]
        finally:
            counts = {status: statuses(group).count(status) for status in set(statuses(group))}
            group.revoke()
            assert counts == {"DONE": count}
    assert {log(folder).count(x) for x in range(deadly - 20, count)} == {2}


def test_a_pool_that_is_found_broken_by_submitting(store: ResultStore, folder: str) -> None:
    """
    The dispatcher may hear of a death from `submit` before it hears of it from the futures of the old pool.

    They tell of the same death: the new pool is not to be replaced on their account, nor the old one's other
    worker, ended by the pool, to be blamed.
    """

    class Pool(ProcessPoolExecutor):
        armed = True
        submitted = 0

        def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            if fn is os.getpid or not Pool.armed:
                return super().submit(fn, *args, **kwargs)
            self.submitted += 1
            if self.submitted == 3:
                Pool.armed = False
                eventually(lambda: len(set(log(folder))) == 2)
                victim = next(iter(self._processes))
                os.kill(victim, signal.SIGKILL)
                eventually(lambda: self._broken)
                jobs.appear(folder)
                open(f"{folder}/go", "w").close()
            return super().submit(fn, *args, **kwargs)

    made: list[Pool] = []

    def make() -> Executor:
        made.append(Pool(2))
        return made[-1]

    with Runner(store, make, chunk_seconds=0) as runner:
        group = runner.map(jobs.hold, [folder] * 8, range(8))
        outcomes = group.join(timeout=JOIN, propagate=False)
    assert statuses(group).count("DONE") == 7
    assert sum(isinstance(outcome, WorkerLostError) for outcome in outcomes) == 1
    assert len(made) == 2


def test_a_pool_whose_workers_cannot_start(store: ResultStore) -> None:
    with Runner(store, pool(initializer=jobs.break_at_start)) as runner:
        group = runner.map(jobs.double, range(10))
        outcomes = group.join(timeout=JOIN, propagate=False)
    assert {type(outcome) for outcome in outcomes} <= {BrokenProcessPool, RuntimeError}
    assert statuses(group) == ["FAILURE"] * 10


def test_an_executor_that_reruns_calls_of_dead_workers_itself(store: ResultStore, folder: str) -> None:
    """The second worker finds the attempt lost and leaves it alone; somebody has to decide on it all the same."""
    with Runner(store, executor := jobs.Rerunning()) as runner:
        group = runner.map(jobs.die_once, [folder] * 5, range(5), [2] * 5, retries=1)
        try:
            assert group.join(timeout=5) == [0, 2, 4, 6, 8]
        finally:
            group.revoke()
    assert executor.deaths == 1


# A worker dies in the midst of calls that are recorded together

CALLS = 500


def whole_chunk(store: ResultStore, *arguments: list[Any], count: int = 100) -> tuple[Home, list[Call]]:
    """Record a batch, and return what makes all of it one chunk: there a Runner gets only by and by."""
    calls = list(zip(*arguments, range(count), strict=True)) if arguments else [(x,) for x in range(count)]
    plan = plan_group(store, "g", "f", [(call, {}) for call in calls], None)
    home = Home(store.path, store.options, this_host())
    return home, [Call(task_id, attempt, True, calls[position], {}) for position, task_id, attempt in plan.todo]


def kill_in_one_chunk(store: ResultStore, folder: str, deadly: int) -> list[str]:
    """Let a worker die at one call of a chunk, settle that, and return the statuses."""
    home, calls = whole_chunk(store, [folder] * 100)
    calls = [call._replace(args=(*call.args, deadly)) for call in calls]
    with pool(1) as executor, pytest.raises(BrokenProcessPool):
        executor.submit(run_chunk, home, jobs.poison, calls).result(DEADLINE)
    store.reap()
    return [meta.status for meta in store.get_many([f"g/{x}" for x in range(100)])]


@pytest.mark.parametrize("deadly", [0, 1, 50, 99])
def test_the_call_that_kills_is_the_one_that_is_lost(store: ResultStore, folder: str, deadly: int) -> None:
    """What ended before it is on record, or is not; what comes after it has not begun."""
    found = kill_in_one_chunk(store, folder, deadly)
    assert found.index("LOST") == deadly
    assert set(found[:deadly]) <= {"DONE", "PENDING"}
    assert set(found[deadly + 1 :]) <= {"PENDING"}
    assert found[:1] != ["PENDING"]  # the first is on record before the second begins
    assert found[:deadly] == sorted(found[:deadly])  # DONE, then PENDING
    assert log(folder) == list(range(deadly + 1))


def test_without_the_note_the_culprit_is_not_found(
    store: ResultStore, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control arm: nothing else tells which of the calls that are not on record it was."""
    monkeypatch.setattr(Marks, "mark", lambda *_: None)
    assert "LOST" not in kill_in_one_chunk(store, folder, 50)


@pytest.mark.parametrize("retries", [0, 1])
@pytest.mark.parametrize("deadly", [0, 1, CALLS // 2, CALLS - 1])
def test_a_worker_killed_at_one_of_many_instant_calls(
    store: ResultStore, folder: str, deadly: int, retries: int
) -> None:
    """It costs that call; what had ended just before it, and was not on record, is made again, and nothing else is."""
    with Runner(store, pool(1)) as runner:
        group = runner.map(jobs.die_once, [folder] * CALLS, range(CALLS), [deadly] * CALLS, retries=retries)
        outcomes = group.join(timeout=JOIN, propagate=False)
    if retries == 0:
        error = outcomes[deadly]
        assert isinstance(error, WorkerLostError)
        assert (error.task_id, error.started) == (group[deadly].id, True)
        outcomes[deadly] = 2 * deadly
    assert outcomes == [2 * x for x in range(CALLS)]
    assert statuses(group).count("DONE") == CALLS - (retries == 0)
    counts = Counter(log(folder))
    assert counts.pop(deadly) == 1 + retries
    again = [x for x in sorted(counts) if counts[x] > 1]
    assert set(counts.values()) <= {1, 2}
    assert again == list(range(deadly - len(again), deadly))
    metas = store.get_many([result.id for result in group])
    assert [meta.retries for meta in metas] == [int(x == deadly and retries == 1) for x in range(CALLS)]


@pytest.mark.parametrize("retries", [0, 2])
def test_an_instant_call_that_always_kills_its_worker(store: ResultStore, folder: str, retries: int) -> None:
    """Nobody waits meanwhile, who would settle the deaths: the Runner does."""
    with Runner(store, pool(2)) as runner:
        group = runner.map(jobs.poison, [folder] * CALLS, range(CALLS), [CALLS // 2] * CALLS, retries=retries)
    outcomes = group.join(timeout=0, propagate=False)
    assert isinstance(outcomes.pop(CALLS // 2), WorkerLostError)
    assert outcomes == [2 * x for x in range(CALLS) if x != CALLS // 2]
    assert statuses(group).count("DONE") == CALLS - 1
    assert log(folder).count(CALLS // 2) == retries + 1
    assert group[CALLS // 2].retries == retries


@pytest.mark.timeout(120)
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_killed_at_random_moments(store: ResultStore, folder: str, workers: int) -> None:
    """From outside, among 2,000 instant calls: what was DONE at a kill is not made again, and every value is right."""
    count, kills = 2000, 5
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")  # noqa: T201 - shown if the test fails
    chance = random.Random(seed)
    seen: list[tuple[list[int], Counter[int]]] = []
    with Runner(store, pool(workers)) as runner:
        group = runner.map(jobs.instant, [folder] * count, range(count), retries=kills)
        for _ in range(kills):
            wanted = len(log(folder)) + 1 + chance.randrange(count // kills)
            eventually(lambda: len(log(folder)) >= wanted or group.ready())  # noqa: B023 - asked here only
            time.sleep(chance.random() * 0.004)  # anywhere between two records
            done = [x for x, status in enumerate(statuses(group)) if status == "DONE"]
            seen.append((done, Counter(log(folder))))
            pid = chance.choice([*(runner._executor._processes or [0])])  # type: ignore[attr-defined]
            with contextlib.suppress(ProcessLookupError):
                if pid:
                    os.kill(pid, signal.SIGKILL)
        assert group.join(timeout=JOIN) == [2 * x for x in range(count)]
    made = Counter(log(folder))
    for done, before in seen:
        assert {x: made[x] for x in done} == {x: before[x] for x in done}
    store.reap()
    recorded = set(store.owners())
    names = {name.rpartition(".")[0] for name in os.listdir(store._owners.folder)}
    assert {name for name in names & recorded if not store.owner_is_alive(name)} == set()
    assert recorded == {store.own_owner()}


def test_workers_that_end_leave_no_files(store: ResultStore, folder: str) -> None:
    """Whether killed or not, once somebody has looked."""
    with Runner(store, pool(1)) as runner:
        group = runner.map(jobs.die_once, [folder] * 50, range(50), [25] * 50, retries=1)
        assert group.join(timeout=JOIN) == [2 * x for x in range(50)]
        live = {name.rpartition(".")[0] for name in os.listdir(store._owners.folder) if name.endswith(".running")}
        assert live
    store.reap()
    assert os.listdir(store._owners.folder) == [f"{store.own_owner()}.lock"]


@pytest.mark.parametrize("position", [0, 1, 30, 49])
def test_a_chunk_that_is_run_again_without_a_word(store: ResultStore, folder: str, position: int) -> None:
    """As `jobs.Rerunning` does, with the death among calls that were only noted: the second worker settles it."""
    home, calls = whole_chunk(store, [folder] * 50, count=50)
    calls = [call._replace(args=(*call.args, position)) for call in calls]
    with pool(1) as second:
        second.submit(run_chunk, home, jobs.double, []).result(DEADLINE)  # opening the store settles the dead, too
        with pool(1) as first, pytest.raises(BrokenProcessPool):
            first.submit(run_chunk, home, jobs.die_once, calls).result(DEADLINE)
        report = second.submit(run_chunk, home, jobs.die_once, calls).result(DEADLINE)
    assert position in report.skipped
    found = [meta.status for meta in store.get_many([f"g/{x}" for x in range(50)])]
    assert found.pop(position) == "LOST"
    assert found == ["DONE"] * 49
    assert log(folder).count(position) == 1


def test_calls_that_fork(store: ResultStore, path: Path, folder: str) -> None:
    """The child has a copy of what is not on record yet, and records none of it."""
    with Runner(store, pool(1)) as runner:
        group = runner.map(jobs.fork_and_create, [folder] * 100, [str(path)] * 100, range(100), group_id="g")
        assert group.join(timeout=JOIN) == [2 * x for x in range(100)]
    assert Counter(log(folder)) == Counter(range(100))
    assert [AsyncResult(f"child-{x}", store).parent for x in range(5, 100, 10)] == [f"g/{x}" for x in range(5, 100, 10)]
    assert store.reap() == []


# The same, found by review


def one_large_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the first chunk have half of the calls, none of it be due before its end: either depends on time, else."""

    class Large(runner_module._Batch):
        __slots__ = ()

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.size = runner_module.LARGEST_CHUNK

    monkeypatch.setattr(runner_module, "_Batch", Large)
    monkeypatch.setattr(worker_module, "FLUSH_EVERY", DEADLINE)  # a forked worker has it from here
    monkeypatch.setattr(worker_module._Flusher, "later", lambda _: None)


def test_a_call_that_dies_after_a_custom_state(
    store: ResultStore, path: Path, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No join waits for ever, whoever reported for the call before it was on record."""
    one_large_record(monkeypatch)
    with Runner(store, pool(1)) as runner:
        group = runner.map(
            jobs.die_after_a_state, [folder] * 100, [str(path)] * 100, range(100), [30] * 100, group_id="g"
        )
        try:
            outcomes = group.join(timeout=3, propagate=False)
        finally:
            group.revoke()
    assert isinstance(outcomes[30], WorkerLostError)


def test_a_worker_that_is_a_submitter_too(
    store: ResultStore, path: Path, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_large_record(monkeypatch)
    workers = pool(1, initializer=jobs.keep_a_runner, initargs=(str(path),))
    with Runner(store, workers) as runner:
        group = runner.map(jobs.poison, [folder] * 100, range(100), [30] * 100)
        outcomes = group.join(timeout=JOIN, propagate=False)
    assert isinstance(outcomes.pop(30), WorkerLostError)
    assert outcomes == [2 * x for x in range(100) if x != 30]
    assert log(folder).count(30) == 1


def test_a_call_that_is_terminated_as_soon_as_it_began(
    store: ResultStore, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_large_record(monkeypatch)
    with Runner(store, pool(1)) as runner:
        group = runner.map(jobs.be_revoked_at_once, [folder] * 100, range(100), [30] * 100)
        try:
            jobs.appear(f"{folder}/begun")
            group[30].revoke(terminate=True)
            outcomes = group.join(timeout=3, propagate=False)
        except LiteerresultError as exc:
            raise AssertionError(exc) from exc
        finally:
            group.revoke()
            for pid in runner._executor._processes or ():  # type: ignore[attr-defined]
                os.kill(pid, signal.SIGKILL)
    assert isinstance(outcomes[30], TaskRevokedError)


# loky


def test_loky(store: ResultStore) -> None:
    loky = pytest.importorskip("loky")
    with Runner(store, lambda: loky.ProcessPoolExecutor(2)) as runner:
        assert runner.map(jobs.double, range(50)).join(timeout=DEADLINE) == [2 * x for x in range(50)]


@pytest.mark.parametrize("retries", [0, 1])
def test_loky_and_a_killed_worker(store: ResultStore, folder: str, retries: int) -> None:
    loky = pytest.importorskip("loky")
    with Runner(store, lambda: loky.ProcessPoolExecutor(1)) as runner:
        group = runner.map(jobs.die_once, [folder] * 6, range(6), [2] * 6, retries=retries)
        outcomes = group.join(timeout=JOIN, propagate=False)
    if retries == 0:
        assert isinstance(outcomes[2], WorkerLostError)
        outcomes[2] = 4
    assert outcomes == [0, 2, 4, 6, 8, 10]


# Revoked


def test_a_running_task_is_terminated(store: ResultStore, folder: str) -> None:
    with Runner(store, pool()) as runner:
        group = runner.map(jobs.hold, [folder] * 8, range(8), retries=2)
        eventually(lambda: len(log(folder)) == 2)
        assert group[0].status == "STARTED"
        assert store.revoke(group[0].id, terminate=True)
        open(f"{folder}/go", "w").close()
        outcomes = group.join(timeout=JOIN, propagate=False)
    assert isinstance(outcomes[0], TaskRevokedError)
    assert outcomes[1:] == [2 * x for x in range(1, 8)]
    assert log(folder).count(0) == 1


def test_an_exception_revokes_what_waits_in_the_pool(store: ResultStore, folder: str) -> None:
    """A pool's queue can't be called back, but what stands in it has not begun."""

    def release() -> None:
        with contextlib.suppress(AssertionError):
            eventually(lambda: statuses(group)[1:] == ["REVOKED"] * 9, 3)
        open(f"{folder}/go", "w").close()

    runner = Runner(store, pool(1), chunk_seconds=0)
    group = runner.map(jobs.hold, [folder] * 10, range(10))
    releasing = threading.Thread(target=release)
    with pytest.raises(ZeroDivisionError), runner:  # noqa: PT012 - the block is what it is about
        eventually(lambda: log(folder) == [0])
        eventually(lambda: len(runner._in_flight) == 2)
        releasing.start()
        raise ZeroDivisionError
    releasing.join(DEADLINE)
    assert statuses(group) == ["DONE"] + ["REVOKED"] * 9
    assert log(folder) == [0]


# Fencing


def test_a_stopped_worker_that_was_declared_lost(store: ResultStore, path: Path, folder: str) -> None:
    """
    It is alive and holds its lock, so the store would never say so; somebody else did, in plain SQL.

    What it reports then is refused, whether the call reports or the worker does.
    """
    with Runner(store, pool(2), chunk_seconds=0) as runner:
        group = runner.map(jobs.report_late, [folder], [str(path)], ["g/0"], group_id="g")
        (pid,) = eventually(lambda: log(folder))
        os.kill(pid, signal.SIGSTOP)
        code = """
            import sqlite3, sys
            connection = sqlite3.connect(sys.argv[1])
            connection.execute("UPDATE tasks SET status = 'FAILURE', result = '\\"lost\\"' WHERE id = 'g/0'")
            connection.commit()
            """
        try:
            run_python(code, path)
            store.resubmit("g/0")
            open(f"{folder}/go", "w").close()
            before = store.get_task_meta("g/0")
            assert (before.status, before.retries) == ("PENDING", 1)
        finally:
            os.kill(pid, signal.SIGCONT)
        (told,) = eventually(lambda: jobs.lines(f"{folder}/told"))
    # The block has ended: the loser's worker has reported all that it ever will.
    assert group[0].status == "PENDING"
    with Runner(store, pool(1)) as runner:
        assert runner.map(jobs.report_late, [folder], [str(path)], ["g/0"], group_id="g").join(timeout=JOIN) == [
            "winner"
        ]
    assert (group[0].status, group[0].retries) == ("DONE", 1)
    assert told == "TransitionError"


# The submitter dies


@pytest.mark.parametrize("method", METHODS)
def test_the_submitter_dies(path: Path, store: ResultStore, folder: str, method: str) -> None:
    """A third process waits: for those that no worker will ever get, it waits no longer than for the kernel."""
    code = f"""
        import multiprocessing, sys
        from concurrent.futures import ProcessPoolExecutor
        from liteerresult import ResultStore, Runner
        from tests.process.jobs import hold

        if __name__ == "__main__":
            store = ResultStore(sys.argv[1], durability="process-crash")
            pool = ProcessPoolExecutor(1, multiprocessing.get_context({method!r}))
            with Runner(store, pool, chunk_seconds=0) as runner:
                runner.map(hold, [sys.argv[2]] * 20, range(20), group_id="g")
                print("submitted", flush=True)
        """
    with Child("-c", code, path, folder) as submitter:
        assert submitter.read_line() == "submitted"
        eventually(lambda: log(folder) == [0])
        group = store.restore_group("g")
        assert isinstance(group, GroupResult)
        assert group[0].status == "STARTED"
        submitter.kill()
        with pytest.raises(WorkerLostError):
            group.join(timeout=5)
        outcomes = [result.get(timeout=5, propagate=False) for result in list(group)[1:]]
        assert all(isinstance(outcome, WorkerLostError) for outcome in outcomes)
        assert {(outcome.started, outcome.pid) for outcome in outcomes} == {(False, submitter.pid)}
        # The worker lives and goes on with its call, and with no other.
        assert group[0].status == "STARTED"
        open(f"{folder}/go", "w").close()
        assert group[0].get(timeout=5) == 0
    with Runner(store, pool(method=method)) as runner:
        again = runner.map(jobs.hold, [folder] * 20, range(20), group_id="g")
        assert again.join(timeout=JOIN) == [2 * x for x in range(20)]
    assert sorted(log(folder)) == list(range(20))


def test_tasks_in_the_hands_of_another_live_process_are_left_alone(path: Path, store: ResultStore, folder: str) -> None:
    code = """
        import sys
        from concurrent.futures import ProcessPoolExecutor
        from liteerresult import ResultStore, Runner
        from tests.process.jobs import hold

        with ResultStore(sys.argv[1], durability="process-crash") as store:
            with Runner(store, ProcessPoolExecutor(2)) as runner:
                group = runner.map(hold, [sys.argv[2]] * 6, range(6), group_id="g")
                print("submitted")
                print(sum(group.join(timeout=20)))
        """
    with Child("-c", code, path, folder) as other:
        assert other.read_line() == "submitted"
        eventually(lambda: log(folder))
        with Runner(store, pool(1)) as runner:
            group = runner.map(jobs.hold, [folder] * 6, range(6), group_id="g")
            assert len(log(folder)) <= 2
            open(f"{folder}/go", "w").close()
            assert group.join(timeout=JOIN) == [2 * x for x in range(6)]
        assert other.read_line() == "30"
        assert other.wait() == 0, other.report()
    assert sorted(log(folder)) == list(range(6))
    assert {parse_owner(store.get_task_meta(result.id).owner or "")[0] for result in group}.isdisjoint({os.getpid()})


def test_fingerprints_are_the_same_in_every_process(tmp_path: Path) -> None:
    """Hash seeds differ, sets and the dicts made from them are iterated in other orders: the call is the same."""
    code = """
        import sys
        from concurrent.futures import ThreadPoolExecutor
        from liteerresult import ResultStore, Runner
        from tests.process.jobs import Opaque

        def work(*args, **kwargs):
            return len(args)

        names = {f"name {number}" for number in range(30)}
        calls = [
            ((names, frozenset(names), {"a": {name: {name} for name in names}}), {}),
            ((), {name.replace(" ", "_"): 1 for name in names}),
            (({(name, 1): name for name in names},), {}),
            ((Opaque(1),), {}),
            ((Opaque(1), names), {}),
            ((Opaque(sorted(names)),), {"names": names}),
            ((Opaque(names),), {}),
        ]
        store = ResultStore(sys.argv[1], durability="process-crash")
        bad = []
        with Runner(store, ThreadPoolExecutor(1)) as runner:
            for number, call in enumerate(calls):
                try:
                    runner.run_calls(work, [call], group_id=f"g{number}")
                except ValueError:
                    bad.append(number)
        print(bad)
        """
    outputs = [run_python(code, tmp_path / "r.db", env={"PYTHONHASHSEED": seed}) for seed in ("1", "2", "3")]
    assert outputs == ["[]\n"] * 3
