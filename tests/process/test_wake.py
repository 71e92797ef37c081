"""
Two processes that share nothing but a path: what one stores wakes the other, every time.

The fallback tick, which would hide a lost wake, is switched off. The control arms at the end show
that a wake is lost without the order "arm, then read", and without the bell.
"""

from __future__ import annotations

import os
import random
import shutil
import statistics
import subprocess
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from liteerresult import AsyncResult, ResultSet, ResultStore, TimeoutError as StoreTimeout, bell
from tests.process.puppet import Puppet, monotonic, spread
from tests.support import DEADLINE, Child, eventually, run_python

if TYPE_CHECKING:
    from pathlib import Path

ROUNDS = int(os.environ.get("LITEERRESULT_TEST_ROUNDS", "2000"))
"""Store/wait pairs, in each direction. Raise it by hand: LITEERRESULT_TEST_ROUNDS=100000."""

ROUND_LIMIT = 0.02
"""What a round may take on average, in seconds, before the test is ended."""

ECHO = """
    import random, sys, time
    from liteerresult import AsyncResult, ResultStore
    from tests.process.puppet import monotonic
    from tests.process.test_wake import gap

    path, durability, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
    store = ResultStore(path, durability=durability)
    store.fallback_tick = None
    chance = random.Random(2)
    print("open")
    for number in range(rounds):
        AsyncResult(f"ping-{number}", backend=store).get(timeout=5)
        gap(chance)
        store.mark_as_done(f"pong-{number}", monotonic())
    print(store.wakes.ticks)
    """


def gap(chance: random.Random) -> None:
    """Let a random while pass: nothing, some microseconds of work, or some hundreds of sleep."""
    kind = chance.randrange(3)
    if kind == 1:
        until = time.perf_counter() + chance.random() * 1e-4
        while time.perf_counter() < until:
            pass
    elif kind == 2:
        time.sleep(chance.random() * 5e-4)


@pytest.mark.timeout(60 + 2 * ROUNDS * ROUND_LIMIT)
@pytest.mark.parametrize("durability", ["process-crash", "power-loss"])
def test_no_wake_is_lost(tmp_path: Path, durability: str) -> None:
    path = tmp_path / "results.db"
    chance = random.Random(1)
    waits = []
    with (
        ResultStore(path, durability=durability) as store,
        Child("-c", ECHO, path, durability, str(ROUNDS)) as other,
    ):
        store.fallback_tick = None
        assert other.read_line() == "open"
        for number in range(ROUNDS):
            before = monotonic()
            store.mark_as_done(f"ping-{number}", number)
            gap(chance)
            sent = AsyncResult(f"pong-{number}", backend=store).get(timeout=5)
            now = monotonic()
            waits.append(now - sent)
            # A wait ends with a look: one that lasted to its deadline was not woken, though it has the value.
            assert now - before < 4, f"a wake was lost in round {number}"
        assert other.read_line() == "0"
        assert other.wait() == 0, other.report()
        assert store.wakes.ticks == 0
    spread(f"wake, {durability}, from before the store to the value", waits)


THREADS = 6

WRITER = """
    import random, sys
    from liteerresult import AsyncResult, ResultStore
    from tests.process.test_wake import gap

    path, threads, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    store = ResultStore(path, durability="process-crash")
    store.fallback_tick = None
    chance = random.Random(3)
    for number in range(rounds):
        for thread in chance.sample(range(threads), threads):
            AsyncResult(f"ready-{thread}-{number}", backend=store).get(timeout=5)
            gap(chance)
            store.mark_as_done(f"task-{thread}-{number}", number)
    """


@pytest.mark.timeout(60 + ROUNDS * ROUND_LIMIT)
def test_no_wake_is_lost_among_threads(tmp_path: Path) -> None:
    """Threads share one inotify instance: what one of them reads for the others must reach them."""
    path = tmp_path / "results.db"
    rounds = max(ROUNDS // 10, 1)
    lost: list[str] = []

    def wait(thread: int) -> None:
        for number in range(rounds):
            store.mark_as_done(f"ready-{thread}-{number}")
            before = monotonic()
            try:
                assert AsyncResult(f"task-{thread}-{number}", backend=store).get(timeout=5) == number
            except StoreTimeout:  # the writer, and so the others, wait for this thread: one lost wake ends them all
                if not store.get_task_meta(f"task-{thread}-{number}").ready:
                    return
            # A value that was found only by the look at the deadline was slept through.
            if monotonic() - before > 4:
                lost.append(f"task-{thread}-{number} is done, and its waiter was not woken")
                return

    with ResultStore(path, durability="process-crash") as store:
        store.fallback_tick = None
        with Child("-c", WRITER, path, str(THREADS), str(rounds)) as writer:
            threads = [threading.Thread(target=wait, args=(thread,)) for thread in range(THREADS)]
            for thread in threads:
                thread.start()
            for waiter in threads:
                waiter.join(DEADLINE + rounds * ROUND_LIMIT)
            assert not any(waiter.is_alive() for waiter in threads)
        assert lost == []
        for thread in range(THREADS):
            assert store.exists(f"task-{thread}-{rounds - 1}"), writer.report()


# Writers that are not this library


def by_shell(path: Path, sql: str) -> None:
    shell = shutil.which("sqlite3")
    if shell is not None:
        subprocess.run([shell, path, sql], check=True, timeout=DEADLINE)
        return
    run_python("import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute(sys.argv[2]); c.commit()", path, sql)


def ring_by_hand(path: Path) -> None:
    fd = os.open(f"{path}-bell", os.O_WRONLY)
    os.write(fd, b"x")
    os.close(fd)


@pytest.mark.parametrize("rings", [False, True])
def test_plain_sql_wakes_a_waiter(tmp_path: Path, rings: bool) -> None:
    path = tmp_path / "results.db"
    waits = []
    with ResultStore(path, durability="process-crash") as store, Puppet(path) as waiter:
        for number in range(5):
            task = store.create_task("plain", task_id=f"task-{number}")
            ticks, events = waiter.ask("store.wakes.ticks, store.wakes.events")
            waiter.tell(f"timed(lambda: AsyncResult({task.id!r}, store).get(timeout=5))")
            time.sleep(random.random() * 0.05)  # a random gap, so that the tick is met anywhere
            sql = f"UPDATE tasks SET status = 'DONE', result = '{{\"rows\": {number}}}' WHERE id = '{task.id}'"
            by_shell(path, sql)
            committed = monotonic()
            if rings:
                ring_by_hand(path)
            ended, value = waiter.answer()
            assert value == {"rows": number}
            waits.append(ended - committed)
            ticked, heard = waiter.ask("store.wakes.ticks, store.wakes.events")
            if rings:
                assert heard > events, "the byte in the bell file was not heard"
            else:
                assert (ticked > ticks, heard) == (True, events), "who woke it, if not the tick?"
    spread("plain SQL to value" + (", with a byte in -bell" if rings else ""), waits)
    assert statistics.median(waits) < (0.1 if rings else 0.3)
    assert max(waits) < 1


@pytest.mark.parametrize("what", ["task", "group", "set"])
def test_plain_sql_wakes_a_waiter_that_has_long_seen_nothing(tmp_path: Path, what: str) -> None:
    """At a tick the rows are read only if the file has changed; here it has, by a program that knows no bell."""
    waits = []
    with ResultStore(tmp_path / "results.db", durability="process-crash") as store:
        for number in range(3):
            task = store.create_task("plain", task_id=f"task-{number}")
            group = store.create_group([task], group_id=f"group-{number}")
            result = {"task": task, "group": group, "set": ResultSet([task])}[what]
            ended: list[float] = []
            waiter = threading.Thread(target=lambda: (result.get(timeout=5), ended.append(monotonic())))  # noqa: B023
            ticks = store.wakes.ticks
            waiter.start()
            eventually(lambda: store.wakes.ticks >= ticks + 3, what="three ticks")  # noqa: B023
            time.sleep(random.random() * 0.25)  # a random gap, so that the tick is met anywhere
            by_shell(tmp_path / "results.db", f"UPDATE tasks SET status = 'DONE', result = '1' WHERE id = '{task.id}'")
            committed = monotonic()
            waiter.join(DEADLINE)
            waits.append(ended[0] - committed)
    spread("plain SQL to value, after three ticks", waits)
    assert statistics.median(waits) < 0.3
    assert max(waits) < 1


def test_plain_sql_update_of_a_done_row_is_refused_by_the_file(tmp_path: Path) -> None:
    path = tmp_path / "results.db"
    with ResultStore(path) as store:
        store.mark_as_done("task", 1)
        code = """
            import sqlite3, sys
            try:
                sqlite3.connect(sys.argv[1]).execute("UPDATE tasks SET status = 'FAILURE' WHERE id = 'task'")
            except sqlite3.IntegrityError as exc:
                print(exc)
            """
        assert "the task is final" in run_python(code, path)
        assert AsyncResult("task", store).get(timeout=0) == 1


def test_who_waits_for_other_tasks_sleeps_on(tmp_path: Path) -> None:
    """A writer would else pay for all the processes it wakes in vain. The last wait is the control: it is woken."""
    path = tmp_path / "results.db"
    with ResultStore(path) as store, Puppet(path) as waiter:
        others = [name for number in range(500) if bell.shard_of(name := f"t{number}") != bell.shard_of("mine")]
        waiter.tell("timed(lambda: AsyncResult('mine', store).get(timeout=30))")
        eventually(lambda: watches_of(waiter.pid) >= 3, what="its watch")
        for name in others:
            store.mark_as_done(name)
        store.mark_as_done("mine", 1)
        assert waiter.answer()[1] == 1
        assert waiter.ask("store.wakes.events") == 1


def watches_of(pid: int) -> int:
    """Count a process's inotify watches."""
    count = 0
    folder = f"/proc/{pid}/fdinfo"
    for name in os.listdir(folder):
        with (
            suppress(FileNotFoundError),
            open(f"{folder}/{name}", encoding="ascii") as info,
        ):  # it opens and closes some
            count += sum(line.startswith("inotify ") for line in info)
    return count


# Control arms


@pytest.mark.parametrize("order", ["arm, then read", "read, then arm"])
def test_order_of_arming_and_reading_matters(tmp_path: Path, order: str) -> None:
    """The writer commits and rings between a waiter's first two steps: only the right order hears of it."""
    path = tmp_path / "results.db"
    with ResultStore(path) as store, Puppet(path) as writer:
        lost = 0
        for number in range(20):
            task_id = f"task-{number}"
            if order == "arm, then read":
                with store.watch()._watch as watch:
                    writer.ask(f"store.mark_as_done({task_id!r})")
                    ready = store.get_task_meta(task_id).ready
                    lost += not ready and not watch.wait(0.05)
            else:
                ready = store.get_task_meta(task_id).ready
                writer.ask(f"store.mark_as_done({task_id!r})")
                with store.watch()._watch as watch:
                    lost += not ready and not watch.wait(0.05)
    assert lost == (0 if order == "arm, then read" else 20)


@pytest.mark.parametrize("rings", [True, False])
def test_without_the_bell_nobody_wakes(tmp_path: Path, rings: bool) -> None:
    path = tmp_path / "results.db"
    with ResultStore(path) as store, Puppet(path) as writer:
        store.fallback_tick = None
        if not rings:
            writer.ask("setattr(store._db, 'ring', lambda _: None)")
        waits = []
        waiter = threading.Thread(target=lambda: waits.append(AsyncResult("task", store).get(timeout=1)))
        waiter.start()
        eventually(lambda: bell._the_hub()._leader, what="it waits")
        writer.ask("store.mark_as_done('task', 1)")
        waiter.join(0.5)
        assert waiter.is_alive() is not rings
        waiter.join(DEADLINE)
        assert waits == [1]  # by the look at the deadline, if not before
        assert store.wakes.events == rings
