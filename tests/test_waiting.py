"""Waiting: whoever waits is woken in time, whoever else waits, leaves, or is interrupted.

Most tests switch the fallback tick off, so that a lost wake is a TimeoutError and is not made up for.
"""

from __future__ import annotations

import asyncio
import errno
import math
import os
import signal
import sqlite3
import threading
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, Any

import inotify_simple
import pytest

import liteerresult
from liteerresult import AsyncResult, GroupResult, ResultSet, ResultStore, WorkerLostError, bell, connection
from liteerresult.liveness import Owners
from liteerresult.waiting import READ_AT_ONCE, Deadline
from tests.support import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LIMIT = 5.0
"""A wake that takes this long, in seconds, was lost."""


@pytest.fixture(autouse=True)
def _no_wake_is_lost(store: ResultStore) -> Iterator[None]:
    """Switch the tick off for the test, and see that no wait lasted until its last look."""
    store.fallback_tick = None
    began = time.monotonic()
    yield
    assert time.monotonic() - began < LIMIT, "a wake was lost: the value was found when the time was up"


class OwnerElsewhere:
    """The owner that another process would be: its rows are in the file, its lock is held until it dies."""

    def __init__(self, store: ResultStore, *task_ids: str) -> None:
        self._owners = Owners(f"{store.path}-owners")
        self.id = self._owners.acquire()
        with closing(sqlite3.connect(store.path)) as its:
            its.execute("INSERT INTO owners (id, pid, host) VALUES (?, ?, 'here')", (self.id, os.getpid()))
            its.executemany(
                "INSERT INTO tasks (id, status, owner, started_at) VALUES (?, 'STARTED', ?, 1.5)",
                [(task_id, self.id) for task_id in task_ids],
            )
            its.commit()

    def die(self) -> None:
        self._owners.release()


def parked() -> int:
    """Return how many threads of this process wait for an event now."""
    hub = bell._hub
    return 0 if hub is None else (hub._leader is not None) + len(hub._followers)


def waiting(pool: ThreadPoolExecutor, call: Callable[..., Any], *args: Any, **options: Any) -> Future[Any]:
    """Call a function that waits in a thread of *pool*, and return once it does wait."""
    before = parked()
    future = pool.submit(call, *args, **options)
    eventually(lambda: parked() > before or future.done(), what="the wait")
    assert not future.done()
    return future


# Deadlines


@pytest.mark.parametrize("wrong", [True, False, "1", b"1", [1], object(), 1j])
def test_a_timeout_is_a_number(store: ResultStore, wrong: Any) -> None:
    store.mark_as_done("a", 1)
    with pytest.raises(TypeError):
        Deadline(wrong)
    with pytest.raises(TypeError):
        AsyncResult("pending", store).get(timeout=wrong)
    with pytest.raises(TypeError):
        ResultSet(["pending"], backend=store).join(timeout=wrong)
    with pytest.raises(TypeError):
        ResultSet(["pending"], backend=store).iterate(timeout=wrong)


def test_a_timeout_is_not_nan(store: ResultStore) -> None:
    with pytest.raises(ValueError, match="nan"):
        Deadline(math.nan)
    with pytest.raises(ValueError, match="nan"):
        AsyncResult("pending", store).get(timeout=math.nan)


@pytest.mark.parametrize("timeout", [0, -1, -0.5, -math.inf])
def test_a_deadline_that_has_passed_looks_once(store: ResultStore, timeout: float) -> None:
    store.mark_as_done("a", 1)
    assert AsyncResult("a", store).get(timeout=timeout) == 1
    with pytest.raises(liteerresult.TimeoutError):
        AsyncResult("pending", store).get(timeout=timeout)
    assert Deadline(timeout).remaining() == 0


@pytest.mark.parametrize("timeout", [None, math.inf])
def test_no_deadline(timeout: float | None) -> None:
    assert Deadline(timeout).remaining() is None


@pytest.mark.parametrize("timeout", [math.inf, 1e9, 1e300])
def test_a_deadline_may_be_far_away(store: ResultStore, timeout: float) -> None:
    store.fallback_tick = 0.25
    with ThreadPoolExecutor() as pool:
        waiters = [pool.submit(AsyncResult("a", store).get, timeout=timeout) for _ in range(2)]
        eventually(lambda: parked() == 2 or any(waiter.done() for waiter in waiters), what="the waits")
        store.mark_as_done("a", 1)
        assert [waiter.result(LIMIT) for waiter in waiters] == [1, 1]


def test_a_timeout_names_some_of_what_is_missing(store: ResultStore) -> None:
    names = [f"t{number}" for number in range(25)]
    with pytest.raises(liteerresult.TimeoutError, match="25 of 25") as caught:
        ResultSet(names, backend=store).join(timeout=0)
    assert caught.value.waiting_for == tuple(names[:10])


# Threads


def test_one_waiter_is_woken(store: ResultStore) -> None:
    with ThreadPoolExecutor() as pool:
        waiter = waiting(pool, AsyncResult("a", store).get, timeout=LIMIT)
        began = time.monotonic()
        store.mark_as_done("a", 1)
        assert waiter.result() == 1
        assert time.monotonic() - began < 1


def test_without_the_bell_the_waiter_is_not_woken(store: ResultStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control arm: it is the bell that wakes in the tests around this one."""
    with ThreadPoolExecutor() as pool:
        began = time.monotonic()
        waiter = waiting(pool, AsyncResult("a", store).get, timeout=0.3)
        with monkeypatch.context() as silence:
            silence.setattr(store._db, "ring", lambda _: None)
            store.mark_as_done("a", 1)
        assert waiter.result() == 1  # its last look found it
        assert time.monotonic() - began >= 0.3


def test_the_fallback_tick_finds_what_did_not_ring(store: ResultStore) -> None:
    """Any program may finish a task in plain SQL; it does not know of the bell."""
    store.fallback_tick = 0.25
    store.create_task(task_id="a")
    with ThreadPoolExecutor() as pool, closing(sqlite3.connect(store.path)) as shell:
        waiter = waiting(pool, AsyncResult("a", store).get, timeout=LIMIT)
        began = time.monotonic()
        shell.execute("""UPDATE tasks SET status = 'DONE', result = '{"rows": 3}' WHERE id = 'a'""")
        shell.commit()
        assert waiter.result() == {"rows": 3}
        assert time.monotonic() - began < 1  # 0.3 promised; this machine has other work


def test_twenty_waiters_for_tasks_of_their_own(store: ResultStore) -> None:
    with ThreadPoolExecutor(20) as pool:
        waiters = [pool.submit(AsyncResult(f"t{number}", store).get, timeout=LIMIT) for number in range(20)]
        eventually(lambda: parked() == 20, what="twenty waits")
        for number in reversed(range(20)):
            store.mark_as_done(f"t{number}", number)
            assert waiters[number].result() == number


def test_twenty_waiters_for_one_task(store: ResultStore) -> None:
    with ThreadPoolExecutor(20) as pool:
        waiters = [pool.submit(AsyncResult("a", store).get, timeout=LIMIT) for _ in range(20)]
        eventually(lambda: parked() == 20, what="twenty waits")
        store.mark_as_done("a", 1)
        assert [waiter.result() for waiter in waiters] == [1] * 20


def test_waiters_that_come_while_writers_write(store: ResultStore) -> None:
    """Arming, reading and waiting race the commits from every side; no wake is lost."""

    def work(number: int) -> int:
        task_id = f"t{number}"
        if number % 2:
            store.mark_as_done(f"t{number - 1}", number - 1)
            return number - 1
        return AsyncResult(task_id, store).get(timeout=LIMIT)  # type: ignore[no-any-return]

    with ThreadPoolExecutor(12) as pool:
        assert sum(pool.map(work, range(400))) == 2 * sum(range(0, 400, 2))


@pytest.mark.parametrize("followers", [1, 5])
def test_a_leader_whose_time_is_up_hands_over(store: ResultStore, followers: int) -> None:
    with ThreadPoolExecutor() as pool:
        leader = waiting(pool, AsyncResult("never", store).get, timeout=0.05)
        others = [pool.submit(AsyncResult(f"t{number}", store).get, timeout=LIMIT) for number in range(followers)]
        with pytest.raises(liteerresult.TimeoutError):
            leader.result()
        eventually(lambda: parked() == followers, what="the others' wait")
        for number, other in enumerate(others):
            store.mark_as_done(f"t{number}", number)
            assert other.result() == number


def test_a_follower_whose_time_is_up_leaves(store: ResultStore) -> None:
    with ThreadPoolExecutor() as pool:
        leader = waiting(pool, AsyncResult("a", store).get, timeout=LIMIT)
        follower = waiting(pool, AsyncResult("never", store).get, timeout=0.05)
        with pytest.raises(liteerresult.TimeoutError):
            follower.result()
        assert parked() == 1
        store.mark_as_done("a", 1)
        assert leader.result() == 1


def test_waiters_with_short_timeouts_among_others(store: ResultStore) -> None:
    """Leaders and followers come and go at every moment; the patient ones still hear the bell."""
    stop = threading.Event()

    def impatient(seed: int) -> None:
        timeout = 0.0001 * (seed + 1)
        while not stop.is_set():
            with pytest.raises(liteerresult.TimeoutError):
                AsyncResult("never", store).get(timeout=timeout)

    with ThreadPoolExecutor(16) as pool:
        noise = [pool.submit(impatient, seed) for seed in range(4)]
        try:
            for turn in range(30):
                waiters = [pool.submit(AsyncResult(f"{turn}-{n}", store).get, timeout=LIMIT) for n in range(3)]
                for n in range(3):
                    store.mark_as_done(f"{turn}-{n}", n)
                assert [waiter.result() for waiter in waiters] == [0, 1, 2]
        finally:
            stop.set()
        for thread in noise:
            thread.result()


def test_an_event_that_another_thread_read_wakes_the_leader(
    store: ResultStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leader may be anywhere before its poll() when a newcomer, or a loop, reads the event for it."""
    with store.watch():  # the hub is there
        pass
    hub = bell._hub
    assert hub is not None
    real, entered, go_on = hub._poller, threading.Event(), threading.Event()

    class SlowPoller:
        def poll(self, timeout: float | None = None) -> Any:
            entered.set()
            assert go_on.wait(LIMIT)
            return real.poll(timeout)

    with ThreadPoolExecutor() as pool:
        monkeypatch.setattr(hub, "_poller", SlowPoller())
        leader = pool.submit(AsyncResult("a", store).get, timeout=2)
        assert entered.wait(LIMIT)
        store.mark_as_done("a", 1)
        with store.watch():  # arming reads what the kernel has
            monkeypatch.setattr(hub, "_poller", real)
            began = time.monotonic()
            go_on.set()
            assert leader.result() == 1
            assert time.monotonic() - began < 1


def test_keyboard_interrupt_in_the_leader_hands_over(store: ResultStore) -> None:
    main = threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        eventually(lambda: parked() == 2, what="the leader and one more")
        signal.pthread_kill(main, signal.SIGINT)

    def follow() -> Any:
        eventually(lambda: parked() == 1, what="the leader")
        return AsyncResult("a", store).get(timeout=LIMIT)

    with ThreadPoolExecutor() as pool:
        follower = pool.submit(follow)
        interrupter = pool.submit(interrupt)
        with pytest.raises(KeyboardInterrupt):
            AsyncResult("never", store).get(timeout=LIMIT)
        interrupter.result()
        eventually(lambda: parked() == 1, what="the follower's wait")
        store.mark_as_done("a", 1)
        assert follower.result() == 1
    store.mark_as_done("never", 2)
    assert AsyncResult("never", store).get(timeout=LIMIT) == 2


def test_keyboard_interrupt_in_a_follower_leaves_the_others_waiting(store: ResultStore) -> None:
    main = threading.main_thread().ident
    assert main is not None
    with ThreadPoolExecutor() as pool:
        leader = waiting(pool, AsyncResult("a", store).get, timeout=LIMIT)
        pool.submit(lambda: eventually(lambda: parked() == 2) and signal.pthread_kill(main, signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            AsyncResult("never", store).get(timeout=LIMIT)
        assert parked() == 1
        store.mark_as_done("a", 1)
        assert leader.result() == 1


def test_an_exception_in_on_interval_hands_over(store: ResultStore) -> None:
    woken = threading.Event()

    def give_up() -> None:
        if woken.is_set():
            raise RuntimeError("enough")

    with ThreadPoolExecutor() as pool:
        first = waiting(pool, AsyncResult("never", store).get, timeout=LIMIT, on_interval=give_up)
        second = waiting(pool, AsyncResult("a", store).get, timeout=LIMIT)
        woken.set()
        store._bell.ring()
        with pytest.raises(RuntimeError, match="enough"):
            first.result()
        store.mark_as_done("a", 1)
        assert second.result() == 1


def test_what_is_completed_while_the_members_are_read_keeps_its_order(
    store: ResultStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last member is read after it was completed, one of the first before it was."""
    ids = [f"t{number}" for number in range(READ_AT_ONCE + 1)]
    read = store.get_many

    def and_go_on(asked: list[str]) -> list[Any]:
        found = read(asked)
        if len(asked) == READ_AT_ONCE:
            for task_id in ("t1", ids[-1]):
                store.mark_as_done(task_id, task_id)
        return found

    store.mark_as_done("t7", "t7")
    monkeypatch.setattr(store, "get_many", and_go_on)
    stream = store.create_group(ids).iterate(timeout=LIMIT)
    assert [next(stream) for _ in range(3)] == ["t7", "t1", ids[-1]]


def test_joins_and_iterations_in_threads(store: ResultStore) -> None:
    names = [f"t{number}" for number in range(30)]
    group = store.create_group(names)
    with ThreadPoolExecutor(6) as pool:
        joins = [pool.submit(group.join, timeout=LIMIT) for _ in range(3)]
        streams = [pool.submit(list, group.iterate(timeout=LIMIT)) for _ in range(3)]
        for name in reversed(names):
            store.mark_as_done(name, name)
        assert [join.result() for join in joins] == [names] * 3
        assert [stream.result() for stream in streams] == [names[::-1]] * 3


def test_two_stores_in_one_process_wake_each_other(store: ResultStore) -> None:
    with ResultStore(store.path, durability="process-crash") as other, ThreadPoolExecutor() as pool:
        waiter = waiting(pool, AsyncResult("a", store).get, timeout=LIMIT)
        other.mark_as_done("a", 1)
        assert waiter.result() == 1


def test_the_end_of_an_owner_wakes(store: ResultStore) -> None:
    """The kernel drops a dead process's lock and closes its file, and that closing is an event."""
    elsewhere = OwnerElsewhere(store, "a")
    with ThreadPoolExecutor() as pool:
        waiter = waiting(pool, AsyncResult("a", store).get, timeout=LIMIT)
        group = waiting(pool, GroupResult("g", ["b", "a"], backend=store).join, timeout=LIMIT)
        elsewhere.die()
        with pytest.raises(WorkerLostError) as caught:
            waiter.result()
        assert caught.value.task_id == "a"
        with pytest.raises(WorkerLostError):
            group.result()


@pytest.mark.asyncio
async def test_the_end_of_an_owner_wakes_a_coroutine(store: ResultStore) -> None:
    elsewhere = OwnerElsewhere(store, "a")

    async def coroutine() -> Any:
        return await AsyncResult("a", store)

    waiter = asyncio.create_task(coroutine())
    await asyncio.sleep(0)
    elsewhere.die()
    with pytest.raises(WorkerLostError):
        await asyncio.wait_for(waiter, LIMIT)


# The tick: a look is skipped if nothing was committed since the last one. These tests are deaf, so that
# nothing but the tick can end a wait; it is short here, and quiet some times before anything happens.

WAYS: dict[str, Callable[[ResultStore, Any], Any]] = {
    "get": lambda store, look: AsyncResult("a", store).get(timeout=LIMIT, on_interval=look),
    "join of a set": lambda store, look: ResultSet(["a"], backend=store).join(timeout=LIMIT, on_interval=look)[0],
    "join of a stored group": lambda store, look: GroupResult.stored("g", store).join(LIMIT, on_interval=look)[0],
    "iterate": lambda store, _: next(ResultSet(["a"], backend=store).iterate(timeout=LIMIT)),
    "await": lambda store, _: asyncio.run(asyncio.wait_for(AsyncResult("a", store), LIMIT)),
    "future": lambda store, _: AsyncResult("a", store).future().result(LIMIT),
}
each_way = pytest.mark.parametrize("way", WAYS)


@pytest.fixture
def deaf(store: ResultStore, monkeypatch: pytest.MonkeyPatch) -> ResultStore:
    """Return the store with a group ``g`` of one task ``a``, a short tick, and nobody who hears anything."""
    store.create_group([store.create_task(task_id="a")], group_id="g")
    store.fallback_tick = 0.02
    monkeypatch.setattr(bell._Hub, "_hear", lambda *_: None)
    return store


def quiet_ticks(store: ResultStore, count: int = 4) -> None:
    """Return after *count* more ticks."""
    before = store.wakes.ticks
    eventually(lambda: store.wakes.ticks >= before + count, what="the ticks")


def finish_in_plain_sql(store: ResultStore) -> None:
    with closing(sqlite3.connect(store.path)) as other:
        other.execute("UPDATE tasks SET status = 'DONE', result = '1' WHERE id = 'a'")
        other.commit()


@each_way
def test_a_tick_finds_what_another_connection_wrote(deaf: ResultStore, way: str) -> None:
    with ThreadPoolExecutor() as pool:
        waiter = pool.submit(WAYS[way], deaf, None)
        for turn in range(2):  # the second time after a look that was for nothing
            quiet_ticks(deaf)
            assert not waiter.done()
            deaf.mark_as_done(f"other {turn}")
        quiet_ticks(deaf)
        finish_in_plain_sql(deaf)
        assert waiter.result() == 1


@each_way
def test_a_tick_finds_what_another_thread_wrote(deaf: ResultStore, way: str) -> None:
    with ThreadPoolExecutor() as pool:
        waiter = pool.submit(WAYS[way], deaf, None)
        quiet_ticks(deaf)
        deaf.mark_as_done("a", 1)
        assert waiter.result() == 1


@pytest.mark.parametrize("way", ["get", "join of a set", "join of a stored group"])
def test_a_tick_finds_what_its_own_thread_wrote(deaf: ResultStore, way: str) -> None:
    """``data_version`` does not move for the commits of the connection that asks."""
    ticks: list[int] = []

    def write() -> None:
        ticks.append(1)
        if len(ticks) == 4:
            deaf.mark_as_done("a", 1)

    assert WAYS[way](deaf, write) == 1
    assert len(ticks) == 5


@pytest.mark.asyncio
async def test_a_tick_finds_what_another_coroutine_wrote(deaf: ResultStore) -> None:
    """All coroutines of a loop have one connection."""

    async def wait() -> Any:
        return await AsyncResult("a", deaf)

    waiter = asyncio.create_task(wait())
    await asyncio.to_thread(quiet_ticks, deaf)
    deaf.mark_as_done("a", 1)
    assert await asyncio.wait_for(waiter, LIMIT) == 1


@pytest.mark.parametrize("look", range(2, 6))
def test_a_tick_finds_what_was_written_right_after_a_look(
    deaf: ResultStore, look: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the version that the next tick compares with would be one that no look has seen."""
    real, looks = deaf.get_task_meta, []

    def slow(*args: Any) -> Any:
        meta = real(*args)
        looks.append(meta)
        if len(looks) == look:
            finish_in_plain_sql(deaf)
        else:
            deaf.mark_as_done(f"other {len(looks)}")  # or it would not look again
        return meta

    monkeypatch.setattr(deaf, "get_task_meta", slow)
    assert AsyncResult("a", deaf).get(timeout=LIMIT) == 1
    assert len(looks) > look


def test_a_tick_finds_what_was_written_when_the_connections_were_closed_for_a_fork(deaf: ResultStore) -> None:
    """A new connection counts from the start: its numbers may be those of the old one."""
    with ThreadPoolExecutor() as pool:
        waiter = pool.submit(AsyncResult("a", deaf).get, timeout=LIMIT)
        quiet_ticks(deaf)
        connection._gate.shut()
        deaf._db.before_fork()
        finish_in_plain_sql(deaf)
        connection._gate.reopen()
        assert waiter.result() == 1


@pytest.mark.parametrize("way", ["get", "join of a set", "join of a stored group"])
def test_a_quiet_tick_reads_no_row_and_calls_on_interval(
    deaf: ResultStore, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaf.mark_as_started("other")  # so there is an owner
    real, read, ticks = deaf._db.read, [], []

    def spy(sql: str, *args: Any) -> Any:
        read.append((len(ticks), sql))
        return real(sql, *args)

    monkeypatch.setattr(deaf._db, "read", spy)
    with ThreadPoolExecutor() as pool:
        waiter = pool.submit(WAYS[way], deaf, lambda: ticks.append(1))
        quiet_ticks(deaf, 20)
        last = len(ticks)
        deaf.mark_as_done("a", 1)
        assert waiter.result() == 1
    assert last > 10
    # The first call is at arming, and the first tick has nothing to compare with.
    assert {sql for tick, sql in read if 2 < tick < last} == {"PRAGMA data_version"}


@each_way
@pytest.mark.parametrize("owner", ["was there", "came while nobody heard"])
def test_a_tick_finds_the_dead_though_their_end_was_not_heard(deaf: ResultStore, way: str, owner: str) -> None:
    """Nothing in the file tells of it: the lock itself has to be tried."""
    deaf.forget("a")
    elsewhere = OwnerElsewhere(deaf, "a") if owner == "was there" else None
    with ThreadPoolExecutor() as pool:
        waiter = pool.submit(WAYS[way], deaf, None)
        quiet_ticks(deaf, 20)  # more than 0.25 s, so that it was found alive several times
        if elsewhere is None:
            elsewhere = OwnerElsewhere(deaf, "a")
            quiet_ticks(deaf, 20)
        assert not waiter.done()
        elsewhere.die()
        began = time.monotonic()
        with pytest.raises(WorkerLostError):
            waiter.result()
        assert time.monotonic() - began < 1  # 0.25 and a tick; this machine has other work


def test_a_step_that_was_broken_off_is_followed_by_a_look(store: ResultStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the broken wait had heard is told to nobody else."""

    class Broken:
        answers = iter([False, False, None])

        def wait(self, *_: Any) -> bool:
            answer = next(self.answers)
            if answer is None:
                store.mark_as_done("a", 1)
                raise KeyboardInterrupt
            return answer

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(store, "watch", Broken)
    values = ResultSet(["a"], backend=store).iterate()
    with pytest.raises(KeyboardInterrupt):
        next(values)
    assert next(values) == 1


# asyncio


@pytest.mark.asyncio
async def test_threads_and_coroutines_wait_together(store: ResultStore) -> None:
    async def coroutine(task_id: str) -> Any:
        return await AsyncResult(task_id, store)

    with ThreadPoolExecutor(10) as pool:
        threads = [pool.submit(AsyncResult(f"thread {n}", store).get, timeout=LIMIT) for n in range(10)]
        coroutines = [asyncio.create_task(coroutine(f"coroutine {n}")) for n in range(10)]
        await asyncio.sleep(0)
        for n in range(10):
            store.mark_as_done(f"thread {n}", n)
            store.mark_as_done(f"coroutine {n}", n)
            assert await asyncio.wait_for(coroutines[n], LIMIT) == n
        joined = await asyncio.wait_for(asyncio.gather(*map(asyncio.wrap_future, threads)), LIMIT)
    assert joined == list(range(10))


def test_threads_and_a_loop_race_for_the_same_events(store: ResultStore) -> None:
    """A loop that reads the event must not leave a thread in its poll(), nor the other way round."""
    turns = 150

    async def coroutine() -> None:
        for turn in range(turns):
            assert await asyncio.wait_for(AsyncResult(f"t{turn}", store), LIMIT) == turn

    def thread() -> None:
        for turn in range(turns):
            assert AsyncResult(f"t{turn}", store).get(timeout=LIMIT) == turn

    with ThreadPoolExecutor(4) as pool:
        waits = [pool.submit(thread), pool.submit(thread), pool.submit(asyncio.run, coroutine())]
        for turn in range(turns):
            eventually(lambda: parked() >= 1 or any(wait.done() for wait in waits), what="a wait")
            store.mark_as_done(f"t{turn}", turn)
        for wait in waits:
            wait.result()


def test_a_loop_in_each_of_several_threads(store: ResultStore) -> None:
    async def gather(first: int) -> list[Any]:
        return list(await asyncio.gather(*(AsyncResult(f"t{number}", store) for number in range(first, first + 5))))

    with ThreadPoolExecutor(4) as pool:
        loops = [pool.submit(asyncio.run, asyncio.wait_for(gather(5 * number), LIMIT)) for number in range(3)]
        for number in range(15):
            store.mark_as_done(f"t{number}", number)
        assert [loop.result() for loop in loops] == [list(range(5 * n, 5 * n + 5)) for n in range(3)]


@pytest.mark.asyncio
async def test_a_cancelled_coroutine_leaves_the_others_waiting(store: ResultStore) -> None:
    async def coroutine(task_id: str) -> Any:
        return await AsyncResult(task_id, store)

    given_up, patient = asyncio.create_task(coroutine("never")), asyncio.create_task(coroutine("a"))
    await asyncio.sleep(0)
    given_up.cancel()
    with pytest.raises(asyncio.CancelledError):
        await given_up
    store.mark_as_done("a", 1)
    assert await asyncio.wait_for(patient, LIMIT) == 1


@pytest.mark.asyncio
async def test_a_stream_goes_on_after_a_cancelled_step(store: ResultStore) -> None:
    values = ResultSet(["a", "b"], backend=store).iterate()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(values), 0.01)
    store.mark_as_done("b", 2)
    assert await asyncio.wait_for(anext(values), LIMIT) == 2
    store.mark_as_done("a", 1)
    assert await asyncio.wait_for(anext(values), LIMIT) == 1
    with pytest.raises(StopAsyncIteration):
        await anext(values)


# Where there are no file events


@pytest.fixture
def _no_inotify(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*args: object, **options: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(inotify_simple, "INotify", refuse)
    monkeypatch.setattr(bell, "_hub", None)
    yield
    assert bell._hub is None or bell._hub.fd is None


@pytest.mark.usefixtures("_no_inotify")
def test_polling_works_and_says_so_once(store: ResultStore) -> None:
    with warnings.catch_warnings(record=True) as said, ThreadPoolExecutor() as pool:
        warnings.simplefilter("always")
        assert bell.notification_in_use() == "polling"
        waiters = [pool.submit(AsyncResult("a", store).get, timeout=LIMIT) for _ in range(3)]
        join = pool.submit(ResultSet(["a", "b"], backend=store).join, timeout=LIMIT)
        store.mark_as_done("a", 1)
        assert [waiter.result() for waiter in waiters] == [1] * 3
        store.mark_as_done("b", 2)
        assert join.result() == [1, 2]
        with pytest.raises(liteerresult.TimeoutError):
            AsyncResult("never", store).get(timeout=0.01)
        future = AsyncResult("c", store).future()
        store.mark_as_done("c", 3)
        assert future.result(LIMIT) == 3
    assert [warning.category for warning in said] == [RuntimeWarning]
    assert "max_user_instances" in str(said[0].message)


@pytest.mark.usefixtures("_no_inotify")
@pytest.mark.asyncio
async def test_polling_works_in_asyncio(store: ResultStore) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        waiter = asyncio.ensure_future(AsyncResult("a", store))
        await asyncio.sleep(0)
        store.mark_as_done("a", 1)
        assert await asyncio.wait_for(waiter, LIMIT) == 1


@pytest.mark.usefixtures("_no_inotify")
def test_polling_notices_the_dead(store: ResultStore) -> None:
    elsewhere = OwnerElsewhere(store, "a")
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore", RuntimeWarning)
        store.fallback_tick = 0.25
        waiter = pool.submit(AsyncResult("a", store).get, timeout=LIMIT)
        elsewhere.die()
        with pytest.raises(WorkerLostError):
            waiter.result()


def test_file_events_are_in_use_here() -> None:
    assert bell.notification_in_use() == "inotify"
