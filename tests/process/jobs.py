"""What the workers of the tests' batches do: functions that any kind of pool can import."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liteerresult import Runner
from liteerresult.store import open_store
from tests.support import DEADLINE, eventually

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "Opaque",
    "Rerunning",
    "appear",
    "be_revoked_at_once",
    "break_at_start",
    "die_after_a_state",
    "die_once",
    "die_or_wait",
    "double",
    "fail_then_die",
    "fork_and_create",
    "hold",
    "instant",
    "keep_a_runner",
    "leave",
    "lines",
    "own_pid",
    "poison",
    "poison_beside",
    "record",
    "report_late",
    "slow_double",
]


def lines(path: str | os.PathLike[str]) -> list[str]:
    """Return the whole lines of a file; none if it is not there."""
    try:
        text = Path(path).read_text(encoding="ascii")
    except FileNotFoundError:
        return []
    return text[: text.rfind("\n") + 1].splitlines()


def note(path: str | os.PathLike[str], text: object) -> None:
    """Append a line in one write, so that no kill and no other process can part it."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(fd, f"{text}\n".encode())
    finally:
        os.close(fd)


def appear(path: str | os.PathLike[str]) -> None:
    """Wait for a file."""
    eventually(lambda: os.path.exists(path), what=f"{path} is there")


def double(x: Any) -> Any:
    return x * 2


def own_pid(_: int) -> int:
    return os.getpid()


def instant(folder: str, x: int) -> int:
    """Take microseconds, and leave word."""
    note(f"{folder}/log", x)
    return x * 2


def slow_double(x: int) -> int:
    time.sleep(0.01)  # work
    return x * 2


def record(folder: str, x: int) -> int:
    """Be a call with a side effect."""
    note(f"{folder}/log", x)
    time.sleep(0.002)  # work
    return x * x


def hold(folder: str, x: int) -> int:
    """Say that it runs, and end once the file ``go`` is there."""
    note(f"{folder}/log", x)
    appear(f"{folder}/go")
    return x * 2


def die_or_wait(folder: str, x: int) -> int:
    """Number 0 kills its worker while all the workers are at a call; the others wait for that, once."""
    note(f"{folder}/log", x)
    if x == 0:
        eventually(lambda: len(set(lines(f"{folder}/log"))) >= 2)
        Path(f"{folder}/died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    appear(f"{folder}/died")
    if lines(f"{folder}/log").count(str(x)) == 1 and x == 1:
        time.sleep(DEADLINE)  # until the pool's own SIGTERM
    return x * 2


def die_once(folder: str, x: int, deadly: int) -> int:
    """Kill the worker at the first attempt of one call."""
    note(f"{folder}/log", x)
    if x == deadly and lines(f"{folder}/log").count(str(x)) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return x * 2


def poison(folder: str, x: int, deadly: int) -> int:
    """Kill the worker at every attempt of one call."""
    note(f"{folder}/log", x)
    if x == deadly:
        os.kill(os.getpid(), signal.SIGKILL)
    return x * 2


def poison_beside(folder: str, x: int) -> int:
    """Number 0 kills its worker whenever number 1 has begun; that one ends once the file ``go`` is there."""
    note(f"{folder}/log", x)
    if x == 0:
        eventually(lambda: lines(f"{folder}/log").count("1") >= lines(f"{folder}/log").count("0"))
        os.kill(os.getpid(), signal.SIGKILL)
    appear(f"{folder}/go")
    return x * 2


def leave(folder: str, x: int, deadly: int) -> int:
    """End the worker without a signal."""
    note(f"{folder}/log", x)
    if x == deadly:
        os._exit(3)
    return x * 2


def fail_then_die(folder: str, x: int, deadly: int) -> int:
    """Fail at the first attempt, but for one call that kills its worker then."""
    note(f"{folder}/log", x)
    if x >= deadly - 20 and lines(f"{folder}/log").count(str(x)) == 1:
        if x == deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError(f"first attempt of {x}")
    return x * 2


def die_after_a_state(folder: str, path: str, x: int, deadly: int) -> int:
    """Kill the worker just after a thread, which runs in no task's context, reported for one call."""
    note(f"{folder}/log", x)
    if x == deadly:
        store = open_store(path, "process-crash")
        thread = threading.Thread(target=store.update_state, args=(f"g/{x}", "PROGRESS", 1))
        thread.start()
        thread.join()
        os.kill(os.getpid(), signal.SIGKILL)
    return x * 2


def fork_and_create(folder: str, path: str, x: int) -> int:
    """Let a forked child use the store, every tenth time."""
    note(f"{folder}/log", x)
    if x % 10 == 5:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                store = open_store(path, "process-crash")
                store.exists("anything")  # opens a connection
                commits = store._db._commits
                store.get_task_meta(f"g/{x}")
                code = int(store._db._commits != commits)  # it is not for the child to record that the call has begun
                store.create_task(task_id=f"child-{x}")
            finally:
                os._exit(code)
        if os.waitpid(pid, 0)[1] != 0:
            raise ChildProcessError(x)
    return x * 2


def be_revoked_at_once(folder: str, x: int, long: int) -> int:
    """Say that one call has begun, and let it take all day."""
    if x == long:
        Path(f"{folder}/begun").touch()
        time.sleep(DEADLINE)  # until the signal
    return x * 2


_kept: list[Runner] = []


def keep_a_runner(path: str) -> None:
    """Initialize a worker that submits calls of its own, to threads."""
    _kept.append(Runner(open_store(path, "process-crash"), ThreadPoolExecutor(1)))


def report_late(folder: str, path: str, task_id: str) -> str:
    """Report on the task once ``go`` is there, and note what came of it."""
    store = open_store(path, "process-crash")
    if os.path.exists(f"{folder}/go"):
        return "winner"
    note(f"{folder}/log", os.getpid())
    appear(f"{folder}/go")
    try:
        store.update_state(task_id, "LATE", os.getpid())
    except Exception as exc:
        note(f"{folder}/told", type(exc).__name__)
        raise
    note(f"{folder}/told", "nothing")
    return "loser"


class Opaque:
    """What JSON can't keep and pickle can."""

    def __init__(self, inside: Any) -> None:
        self.inside = inside


def break_at_start() -> None:
    """Initialize a worker, in vain."""
    raise ValueError("no worker can start")


class Rerunning(Executor):
    """As some clusters' executors are: a call whose process dies is made again in another, and nobody is told."""

    _max_workers = 1

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1)
        self.deaths = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        outer: Future[Any] = Future()
        try:
            outer.set_result(self._pool.submit(fn, *args, **kwargs).result())
        except Exception:  # noqa: BLE001 - its worker died
            self.deaths += 1
            self._pool.shutdown()
            self._pool = ProcessPoolExecutor(1)
            outer.set_result(self._pool.submit(fn, *args, **kwargs).result())
        return outer

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._pool.shutdown(wait, cancel_futures=cancel_futures)
