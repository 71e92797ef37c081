"""Ways to make a child process of one that uses a store, and what such children do."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import subprocess
import sys
import time
import traceback
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from liteerresult import ResultStore

__all__ = ["METHODS", "beget", "fork", "inotify_instances", "reap"]

METHODS = ("os.fork", "fork", "forkserver", "spawn")

CHILD_LIMIT = 15
"""Seconds after which a child that hangs shows its tracebacks and ends."""


def fork(work: Callable[[], object]) -> int:
    """Fork a child that does *work* and ends, with 0 if it went well. Return its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        faulthandler.dump_traceback_later(CHILD_LIMIT, exit=True)
        work()
        code = 0
    except BaseException:  # noqa: BLE001 - it must not run on in the parent's code
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def reap(pid: int) -> None:
    """Wait for a child of `fork`, which has a limit of its own, and fail if it failed."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code:
        raise AssertionError(f"the forked child ended with {code}; its traceback is above")


def beget(method: str, work: Callable[..., object], *args: Any) -> int:
    """Start a child by one of `METHODS` that does *work*, a function of a module; return its pid."""
    if method == "os.fork":
        return fork(lambda: work(*args))
    process = multiprocessing.get_context(method).Process(target=work, args=args)
    process.start()
    assert process.pid is not None
    _kept.append(process)
    return process.pid


_kept: list[object] = []


def inotify_instances() -> int:
    """Count this process's inotify instances."""
    found = 0
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found += "inotify" in os.readlink(f"/proc/self/fd/{fd}")
    return found


def linger(store: ResultStore | None = None, task_id: str | None = None) -> None:
    """Tell the test that this child is there, having started a task of its own if told, and stay."""
    if store is not None and task_id is not None:
        store.mark_as_started(task_id)
    print("child", os.getpid(), flush=True)  # noqa: T201 - the pipe
    time.sleep(600)  # outlives the test: the test's end ends it


def report(store: ResultStore, task_id: str) -> None:
    """Use a store that came from the parent."""
    with store.run_task(task_id) as task:
        task.result = [os.getpid(), store.get_task_meta(task_id).owner]


def exec_lingering() -> subprocess.Popen[bytes]:
    """Start a program that inherits a descriptor of ours by ``pass_fds``, and stays."""
    reader, _ = os.pipe()
    code = "import os, time; print('child', os.getpid(), flush=True); time.sleep(600)"
    return subprocess.Popen([sys.executable, "-c", code], pass_fds=(reader,))
