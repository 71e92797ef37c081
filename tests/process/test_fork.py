"""
Forks: a child opens its own connection, owns its own tasks, hears its own events, and harms nobody.

POSIX locks are not inherited, but SQLite's memory of them is: it keeps, for each file that is open, what
locks the process holds, and a connection that a child opens to the same file believes that memory.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING

import pytest

from liteerresult import AsyncResult, ResultStore, WorkerLostError
from tests.process.forks import METHODS
from tests.process.puppet import Puppet
from tests.support import DEADLINE, Child, run_python

if TYPE_CHECKING:
    from collections.abc import Iterator

HEAD = """
    import os, random, signal, subprocess, sys, threading, time
    from liteerresult import AsyncResult, ResultStore, TimeoutError as StoreTimeout
    from tests.process import forks
    from tests.process.forks import fork, reap

    path = sys.argv[1]
    store = ResultStore(path, durability="process-crash")
    """


def script(code: str) -> str:
    """Return a child's program, which has `store` open on its first argument."""
    return dedent(HEAD) + dedent(code)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results.db"


@pytest.fixture
def store(path: Path) -> Iterator[ResultStore]:
    """Yield the test's own store: the third process."""
    with ResultStore(path, durability="process-crash") as opened:
        yield opened


def alive(pid: int) -> bool:
    """Tell whether a process runs, as opposed to being dead and not yet reaped by whoever inherited it."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except FileNotFoundError:
        return False
    return text.rpartition(") ")[2][0] not in "ZX"


# The file


def test_child_uses_the_inherited_store(path: Path, store: ResultStore) -> None:
    code = """
        store.mark_as_done("before", 1)

        def child():
            assert AsyncResult("before", store).get(timeout=0) == 1
            store.mark_as_done("from-child", 2)
            assert AsyncResult("after", store).get(timeout=10) == 3  # the parent's later commit
            store.mark_as_done("answer", 4)

        pid = fork(child)
        assert AsyncResult("from-child", store).get(timeout=10) == 2
        store.mark_as_done("after", 3)
        assert AsyncResult("answer", store).get(timeout=10) == 4
        reap(pid)
        store.mark_as_done("parent-goes-on", 5)
        """
    run_python(script(code), path)
    for task_id, value in {"before": 1, "from-child": 2, "after": 3, "answer": 4, "parent-goes-on": 5}.items():
        assert AsyncResult(task_id, store).get(timeout=0) == value


@pytest.mark.parametrize("opened_elsewhere", [False, True])
def test_commits_of_a_child_survive_the_parents_close(path: Path, opened_elsewhere: bool) -> None:
    """
    The parent is the last to close as far as the kernel's locks tell, unless the child really holds its own.

    Without them SQLite removes the WAL at the parent's close, the child goes on writing into the removed
    file, and what it was told is committed is nowhere.
    """
    code = """
        reader, writer = os.pipe()

        def child():
            store.mark_as_done("first", 1)
            print("opened")
            assert os.read(reader, 1) == b"x"
            store.mark_as_done("second", 2)
            print("written")

        store.mark_as_done("before", 0)
        pid = fork(child)
        assert sys.stdin.readline() == "close\\n"
        store.close()
        print("closed")
        assert sys.stdin.readline() == "write\\n"
        os.write(writer, b"x")
        reap(pid)
        """
    with Child("-c", script(code), path) as parent:
        assert parent.read_line() == "opened"
        parent.write_line("close")
        assert parent.read_line() == "closed"
        if opened_elsewhere:
            count = "import sqlite3, sys; print(*sqlite3.connect(sys.argv[1]).execute('SELECT count(*) FROM tasks'))"
            assert run_python(count, path) == "(2,)\n"
        parent.write_line("write")
        assert parent.read_line() == "written"
        assert parent.wait() == 0, parent.report()
    with ResultStore(path) as store:
        assert [meta.status for meta in store.get_many(["before", "first", "second"])] == ["DONE"] * 3


def test_child_holds_locks_of_its_own(path: Path, store: ResultStore) -> None:
    """What the test above needs, seen in the kernel: the child's connection has locked the database file."""
    code = """
        def locks():
            inode = os.stat(path).st_ino
            lines = open("/proc/locks").read().splitlines()
            return [line for line in lines if f" {os.getpid()} " in line and f":{inode} " in line]

        def child():
            assert store.exists("task")
            assert locks(), "the child reads and writes without any lock on the database"

        store.mark_as_done("task", 1)
        assert locks()
        reap(fork(child))
        """
    run_python(script(code), path)


def test_fork_while_threads_write_and_wait(path: Path, store: ResultStore) -> None:
    """The lock of a thread that is not there any more, in the child, must not be waited for."""
    code = """
        stop = False
        failures = []

        def write(name):
            number = 0
            try:
                while not stop:
                    store.mark_as_done(f"{name}-{number}", number)
                    assert store.exists(f"{name}-{number}")
                    number += 1
            except BaseException as exc:
                failures.append(exc)
                raise
            counts[name] = number

        def wait(name):
            while not stop:
                try:
                    AsyncResult("never", store).get(timeout=0.01)
                except StoreTimeout:
                    pass

        def child(number):
            assert AsyncResult("first", store).get(timeout=5) == 0
            store.mark_as_done(f"child-{number}", number)
            with store.run_task(f"ran-{number}") as task:
                task.result = number
            try:
                AsyncResult("never", store).get(timeout=0.005)
            except StoreTimeout:
                pass

        counts = {}
        store.mark_as_done("first", 0)
        threads = [threading.Thread(target=write, args=(f"w{n}",)) for n in range(2)]
        threads += [threading.Thread(target=wait, args=(f"r{n}",)) for n in range(3)]
        for thread in threads:
            thread.start()
        try:
            for number in range(40):
                time.sleep(random.random() * 0.003)  # a random gap
                reap(fork(lambda: child(number)))
        finally:
            stop = True
            for thread in threads:
                thread.join()
        assert not failures
        print(counts["w0"], counts["w1"])
        """
    counts = run_python(script(code), path, timeout=50).split()
    for name, count in enumerate(map(int, counts)):
        assert count
        assert all(meta.status == "DONE" for meta in store.get_many([f"w{name}-{number}" for number in range(count)]))
    for number in range(40):
        assert AsyncResult(f"child-{number}", store).get(timeout=0) == number
        assert AsyncResult(f"ran-{number}", store).get(timeout=0) == number
    assert store._db.read("PRAGMA integrity_check") == [("ok",)]


@pytest.mark.parametrize("method", METHODS)
def test_store_travels_to_a_child(path: Path, store: ResultStore, method: str) -> None:
    code = """
        if __name__ == "__main__":
            store.mark_as_started("parents")
            pid = forks.beget(sys.argv[2], forks.report, store, "childs")
            child, owner = AsyncResult("childs", store).get(timeout=20)
            assert child == pid != os.getpid()
            assert owner != store._owners.own
            assert owner.startswith(f"{child}@")
            store.mark_as_done("parents", owner)
            for process in forks._kept:
                process.join(20)
                assert process.exitcode == 0
            if sys.argv[2] == "os.fork":
                reap(pid)
        """
    run_python(script(code), path, method)
    assert AsyncResult("parents", store).get(timeout=0) != store.get_task_meta("parents").owner
    assert store.reap() == []
    assert store.owners() == []


# Life and death


@pytest.mark.parametrize("method", [*METHODS, "exec with pass_fds"])
def test_child_that_outlives_its_parent_does_not_keep_it_alive(path: Path, store: ResultStore, method: str) -> None:
    code = """
        if __name__ == "__main__":
            store.mark_as_started("task")
            if sys.argv[2] in forks.METHODS:
                forks.beget(sys.argv[2], forks.linger)
            else:
                forks.exec_lingering()
            time.sleep(600)  # until it is killed
        """
    with Child("-c", script(code), path, method) as parent:
        word, pid = parent.read_line().split()
        assert word == "child"
        before = time.monotonic()
        parent.kill()
        with pytest.raises(WorkerLostError) as caught:
            AsyncResult("task", store).get(timeout=10)
        assert time.monotonic() - before < 1
        assert alive(int(pid)), "it was to outlive its parent"
        assert caught.value.pid == parent.pid
        assert store.get_task_meta("task").status == "FAILURE"


@pytest.mark.parametrize("method", METHODS)
def test_child_owns_the_tasks_that_it_starts(path: Path, store: ResultStore, method: str) -> None:
    code = """
        if __name__ == "__main__":
            store.mark_as_started("parents")
            forks.beget(sys.argv[2], forks.linger, store, "childs")
            sys.stdin.readline()
            store.mark_as_done("parents", 1)
        """
    with Child("-c", script(code), path, method) as parent:
        _, pid = parent.read_line().split()
        owners = [store.get_task_meta(task_id).owner or "" for task_id in ("parents", "childs")]
        assert [owner.partition("@")[0] for owner in owners] == [str(parent.pid), pid]
        os.kill(int(pid), 9)
        with pytest.raises(WorkerLostError) as caught:
            AsyncResult("childs", store).get(timeout=10)
        assert caught.value.pid == int(pid)
        assert store.reap() == []
        assert store.get_task_meta("parents").status == "STARTED"
        parent.write_line()
        assert AsyncResult("parents", store).get(timeout=10) == 1


def test_end_of_a_forked_child_leaves_the_parents_ownership(path: Path, store: ResultStore) -> None:
    """Neither its exit, nor its garbage collection, nor its own close of the store drops the parent's lock."""
    code = """
        import gc

        def child():
            global store
            store.mark_as_done("childs", 1)
            store.close()
            del store
            gc.collect()

        store.mark_as_started("parents")
        reap(fork(child))
        if not os.fork():
            sys.exit()  # an ordinary exit, with all that Python does then
        os.wait()
        print("forked")
        sys.stdin.readline()
        store.mark_as_done("parents", 2)
        """
    with Child("-c", script(code), path) as parent:
        assert parent.read_line() == "forked"
        assert store.reap() == []
        assert store.get_task_meta("parents").status == "STARTED"
        parent.write_line()
        assert AsyncResult("parents", store).get(timeout=10) == 2
        assert parent.wait() == 0, parent.report()


# Hearing


def test_many_threads_use_one_inotify_instance_and_a_child_has_its_own(path: Path) -> None:
    code = """
        from liteerresult import bell

        def wait(number):
            assert AsyncResult(f"task-{number}", store).get(timeout=20) == number

        def child():
            assert forks.inotify_instances() == 0, "the inherited one is still open"
            try:
                AsyncResult("never", store).get(timeout=0.1)
            except StoreTimeout:
                pass
            assert forks.inotify_instances() == 1

        store.fallback_tick = None
        threads = [threading.Thread(target=wait, args=(number,)) for number in range(50)]
        for thread in threads:
            thread.start()
        hub = bell._the_hub()
        while not (hub._leader and len(hub._followers) == 49):
            time.sleep(0.001)
        assert forks.inotify_instances() == 1
        try:
            reap(fork(child))
        finally:
            for number in range(50):
                store.mark_as_done(f"task-{number}", number)
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
        assert forks.inotify_instances() == 1
        print(store.wakes.ticks)
        """
    assert run_python(script(code), path) == "0\n"


def test_waiting_child_does_not_take_the_parents_events(path: Path, store: ResultStore) -> None:
    """An inherited instance would share its queue: each event would reach one of the two."""
    code = """
        store.fallback_tick = None

        def ping_pong(hear, say, rounds):
            for number in range(rounds):
                assert AsyncResult(f"{hear}-{number}", store).get(timeout=5) == number
                store.mark_as_done(f"{say}-{number}", number)

        store.mark_as_done("warm", 1)
        try:
            AsyncResult("never", store).get(timeout=0.1)
        except StoreTimeout:
            pass
        before = time.monotonic()
        pid = fork(lambda: ping_pong("to-child", "to-parent", 200))
        store.mark_as_done("to-child-0", 0)
        for number in range(200):
            assert AsyncResult(f"to-parent-{number}", store).get(timeout=5) == number
            if number < 199:
                store.mark_as_done(f"to-child-{number + 1}", number + 1)
        reap(pid)
        assert time.monotonic() - before < 4
        """
    run_python(script(code), path)


def test_inherited_watch_is_harmless(path: Path) -> None:
    code = """
        def child():
            watch.close()
            assert store.exists("task")

        store.mark_as_done("task", 1)
        with store.watch() as watch:
            reap(fork(child))
            other = ResultStore(path)
            other.mark_as_done("other", 1)
            watch.wait(5)
            assert store.wakes.events == 1
        """
    run_python(script(code), path)


@pytest.mark.parametrize("parents_thread", ["is starting", "waits"])
def test_futures_work_in_a_child(path: Path, parents_thread: str) -> None:
    """
    The parent's thread that completes its futures is not there in the child.

    If it imports something when the fork comes, the lock of that import stays taken in the child for ever.
    """
    code = """
        from liteerresult import bell

        def child():
            future = AsyncResult("later", store).future()
            store.mark_as_done("later", 7)
            assert future.result(5) == 7

        first = AsyncResult("first", store).future()
        while sys.argv[2] == "waits" and not (bell._hub and bell._hub._leader):
            time.sleep(0.001)
        reap(fork(child))
        store.mark_as_done("first", 1)
        assert first.result(5) == 1
        """
    run_python(script(code), path, parents_thread)


def test_child_is_woken_by_others(path: Path, store: ResultStore) -> None:
    code = """
        def child():
            store.fallback_tick = None
            print("ready")
            assert AsyncResult("task", store).get(timeout=5) == 1

        reap(fork(child))
        """
    with Child("-c", script(code), path) as parent, Puppet(path) as writer:
        assert parent.read_line() == "ready"
        before = time.monotonic()
        writer.ask("store.mark_as_done('task', 1)")
        assert parent.wait(DEADLINE) == 0, parent.report()
        assert time.monotonic() - before < 4


def test_fork_while_another_thread_opens_a_store(tmp_path: Path) -> None:
    """A connection that is being opened is as harmful to inherit as an open one: the child's commits vanished."""
    said = run_python(
        """
        import os, sys, threading, time, warnings
        from liteerresult import ResultStore

        warnings.simplefilter("ignore", DeprecationWarning)  # fork with threads is the point
        path = sys.argv[1]
        store = ResultStore(path, durability="process-crash")

        def open_and_close():
            while True:
                ResultStore(path, durability="process-crash").close()

        threading.Thread(target=open_and_close, daemon=True).start()
        ends = time.monotonic() + 2
        forks = bad = 0
        while time.monotonic() < ends:
            forks += 1
            pid = os.fork()
            if not pid:
                try:
                    store.create_task(task_id=f"t{forks}")
                    os._exit(0)
                finally:
                    os._exit(1)
            _, status = os.waitpid(pid, 0)
            bad += status != 0 or not store.exists(f"t{forks}")
        print(forks > 0, bad, flush=True)
        os._exit(0)
        """,
        tmp_path / "results.db",
    )
    assert said == "True 0\n"
