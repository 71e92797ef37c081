"""
Running a program as a task: its output and return code are the result.

A command runs in a session of its own, so that all it starts can be ended with it. Where util-linux's
``setpriv`` is there, the kernel kills the command when the process that runs it dies, however it dies.
(``preexec_fn`` could ask the kernel too, but is unsafe in a process with threads.)
"""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from queue import Empty
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import LiteerresultError, TransitionError
from .states import DONE
from .tasks import current_task

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from queue import SimpleQueue
    from types import FrameType

    from .backend import TaskMeta
    from .runner import Runner
    from .store import ResultStore

__all__ = ["Batch", "CommandFailed", "Commands", "signals_to"]

GRACE = 5.0
"""Seconds between asking a command to end (SIGTERM) and ending it (SIGKILL)."""

SLICE = 0.5
"""Seconds after which a thread that waits for a command looks whether it is to be ended."""

TAIL_LINES, TAIL_CHARACTERS = 10, 2000
"""How much of standard error a failure's text shows."""

NOT_EXECUTABLE, NOT_FOUND = 126, 127
"""Return codes of what could not be run, as shells have them."""

WATCHED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

LOOK_EVERY = 1.0
"""How often, in seconds, a batch looks whether its runner can still go on."""

READ_AT_ONCE = 1000
"""Tasks read by one query."""


class CommandFailed(LiteerresultError):
    """
    A command ended with another return code than 0, or was ended.

    Attributes:
        command: The program and its arguments.
        returncode: Its return code; negative: the number of the signal that ended it.
        stdout: What it wrote to standard output: text if that is UTF-8, else bytes.
        stderr: What it wrote to standard error, likewise.
        reason: Why it was ended, if it did not end by itself; else None.
    """

    def __init__(
        self,
        message: str,
        *,
        command: list[str] | None = None,
        returncode: int | None = None,
        stdout: str | bytes = "",
        stderr: str | bytes = "",
        reason: str | None = None,
    ) -> None:
        super().__init__(message)
        self.command = command
        self.returncode = returncode
        self.stdout = stdout
        self.stderr = stderr
        self.reason = reason


class Commands:
    """
    The function whose calls are commands: give it to a `Runner` over threads.

    Args:
        store: Where the tasks are that it is called for.
        timeout: Longest time for one command in seconds; None for no limit.
        grace: Seconds between SIGTERM and SIGKILL.
    """

    def __init__(self, store: ResultStore, timeout: float | None = None, grace: float = GRACE) -> None:
        self._store = store
        self._timeout = timeout
        self._grace = grace
        self._mutex = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._told: set[subprocess.Popen[bytes]] = set()
        """Of these, the ones that `stop` asked to end: if they end with 0 they did not necessarily do their work."""
        self._stopped_at: float | None = None
        self._stopped_by = ""

    def __call__(self, *command: str, item: str | None = None) -> dict[str, Any]:
        """
        Run a program to its end.

        Args:
            *command: The program and its arguments.
            item: What it is run for; kept among the task's arguments for people.

        Returns:
            ``returncode`` (0), ``stdout`` and ``stderr``: text if they are UTF-8, else bytes.

        Raises:
            CommandFailed: It ended otherwise, was ended, or could not be run.
        """
        del item
        if self._stopped_at is not None:
            self._revoke(command)
        process = _start(command)
        with self._mutex:
            self._running.add(process)
        try:
            if self._stopped_at is not None:  # meanwhile: `stop` may have missed it
                self._tell([process], signal.SIGTERM)
            out, err, reason = self._collect(process)
        except BaseException:
            _signal(process, signal.SIGKILL)
            process.wait()
            raise
        finally:
            with self._mutex:
                self._running.discard(process)
                self._told.discard(process)
        if process.returncode or reason:
            raise _failure(command, process.returncode, out, err, reason)
        return {"returncode": 0, "stdout": _text(out), "stderr": _text(err)}

    def stop(self, reason: str) -> None:
        """Ask the running commands to end, and begin no more; those that don't end are killed after the grace."""
        with self._mutex:
            if self._stopped_at is None:
                self._stopped_by, self._stopped_at = reason, time.monotonic()
        self._tell(self._running, signal.SIGTERM)

    def kill(self) -> None:
        """End the running commands at once."""
        self._tell(self._running, signal.SIGKILL)

    def _tell(self, processes: Iterable[subprocess.Popen[bytes]], number: signal.Signals) -> None:
        with self._mutex:
            self._told.update([process for process in processes if _signal(process, number)])

    def _revoke(self, command: tuple[str, ...]) -> None:
        # It counts as begun already; what it says of itself is final before its failure is recorded.
        running = current_task.get()
        if running is not None:
            with contextlib.suppress(TransitionError):
                self._store.mark_as_revoked(running.task_id, self._stopped_by)
        raise CommandFailed(f"not begun: {self._stopped_by}", command=list(command), reason=self._stopped_by)

    def _collect(self, process: subprocess.Popen[bytes]) -> tuple[bytes, bytes, str | None]:
        """Read a command's output to its end, or see to it that there is one."""
        deadline = None if self._timeout is None else time.monotonic() + self._timeout
        ending_since: float | None = None
        killed = False
        reason = None
        while True:
            now = time.monotonic()
            ends = SLICE if deadline is None or ending_since is not None else min(SLICE, max(deadline - now, 0))
            try:
                return *process.communicate(timeout=ends), self._stopped_by if process in self._told else reason
            except subprocess.TimeoutExpired as exc:
                now = time.monotonic()
                if killed:  # something that left the command's group holds its output open
                    return *_abandon(process, exc), reason
            if self._stopped_at is not None:
                ending_since, reason = self._stopped_at, self._stopped_by
            elif deadline is not None and now >= deadline and ending_since is None:
                ending_since, reason = now, f"timed out after {self._timeout:g} s"
                _signal(process, signal.SIGTERM)
            if ending_since is not None and now - ending_since >= self._grace:
                killed = True
                _signal(process, signal.SIGKILL)


def _start(command: tuple[str, ...]) -> subprocess.Popen[bytes]:
    # A program that is not there is left to Popen, whose error is the better one.
    leash = _leash() if shutil.which(command[0]) else ()
    try:
        return subprocess.Popen(  # noqa: S603 - to run what the user says is the purpose
            [*leash, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as exc:
        code = NOT_FOUND if isinstance(exc, FileNotFoundError) else NOT_EXECUTABLE
        message = f"{_shown(command)}: can't be run: {exc.strerror or exc}"
        raise CommandFailed(message, command=list(command), returncode=code, reason=str(exc)) from exc


@functools.cache
def _leash() -> tuple[str, ...]:
    """Return the words before a command that let the kernel end it with the thread that began it."""
    program = shutil.which("setpriv") if sys.platform == "linux" else None
    if program is None:
        return ()
    words = (program, "--pdeathsig", "KILL", "--")
    # Busybox has a setpriv without that option.
    known = subprocess.run([*words, "true"], stdin=subprocess.DEVNULL, capture_output=True, check=False)  # noqa: S603
    return words if known.returncode == 0 else ()


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> bool:
    """Send a signal to a command and all it started, unless it was waited for: its number may be another's."""
    if process.returncode is not None:
        return False
    with contextlib.suppress(OSError):
        os.killpg(process.pid, number)
        return True
    return False


def _abandon(process: subprocess.Popen[bytes], exc: subprocess.TimeoutExpired) -> tuple[bytes, bytes]:
    process.wait()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()
    return exc.output or b"", exc.stderr or b""


def _text(data: bytes) -> str | bytes:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _shown(command: tuple[str, ...]) -> str:
    text = shlex.join(command)
    return text if len(text) <= TAIL_CHARACTERS else text[:TAIL_CHARACTERS] + " ..."


def _failure(command: tuple[str, ...], returncode: int, out: bytes, err: bytes, reason: str | None) -> CommandFailed:
    if reason is not None:
        how = reason
    elif returncode >= 0:
        how = f"exit status {returncode}"
    else:
        how = f"ended by {signal.Signals(-returncode).name if -returncode in set(signal.Signals) else -returncode}"
    lines = err[-TAIL_CHARACTERS:].decode(errors="replace").splitlines()[-TAIL_LINES:]
    return CommandFailed(
        "\n".join([f"{_shown(command)}: {how}", *lines]),
        command=list(command),
        returncode=returncode,
        stdout=_text(out),
        stderr=_text(err),
        reason=reason,
    )


# A batch of commands under way


class _Ended(NamedTuple):
    """A task is final; *old*: it was before this run."""

    meta: TaskMeta
    old: bool


class _Over(NamedTuple):
    """A thread came to its end."""

    who: str
    error: BaseException | None


@contextlib.contextmanager
def signals_to(events: SimpleQueue[Any]) -> Iterator[None]:
    """Put signals into *events* meanwhile: raised just anywhere they could leave a lock taken."""

    def put(number: int, _frame: FrameType | None) -> None:
        events.put(signal.Signals(number))

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # What is ignored stays so: nohup sets SIGHUP like that.
    before = {
        number: signal.signal(number, put) for number in WATCHED_SIGNALS if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Batch:
    """A batch under way: the main thread attends to it, one thread watches the file, one closes the runner."""

    def __init__(self, store: ResultStore, runner: Runner, commands: Commands, events: SimpleQueue[Any]) -> None:
        self._store = store
        self._runner = runner
        self._commands = commands
        self._events = events
        self._stopped = threading.Event()
        self._armed: Any = None
        self._succeeded = 0
        self.interrupted: signal.Signals | None = None
        """The signal that ended it, if one did."""
        self._error: BaseException | None = None
        self._closing = False
        self._over: set[str] = set()

    def attend(self, task_ids: list[str], known: int, show: Callable[[TaskMeta, bool], None]) -> bool:
        """
        Stay until all tasks have ended, by themselves or after a signal.

        Args:
            task_ids: The tasks.
            known: The completion number before the batch.
            show: Called with each task that ended, and whether it had before.

        Returns:
            Whether all succeeded.
        """
        watcher = self._thread("watcher", lambda: self._watch(task_ids, known))
        try:
            while not self._is_over(show):
                pass
        except BaseException:
            self._commands.stop("the run failed")
            self._runner.close(cancel=True)
            raise
        finally:
            self._stop_watching()
            watcher.join()
        self._runner.close()
        if self._error is not None:
            raise self._error
        return self._succeeded == len(task_ids)

    def _is_over(self, show: Callable[[TaskMeta, bool], None]) -> bool:
        try:
            event = self._events.get(timeout=LOOK_EVERY)
        except Empty:
            # If it can't write any more nobody will finish its tasks, and nobody else can either while we live.
            if self._runner.error is not None and not self._closing:
                self._end("the run failed")
            return False
        match event:
            case _Ended():
                self._succeeded += event.meta.status == DONE
                show(*event)
            case signal.Signals():
                if self.interrupted is not None:
                    self._commands.kill()
                self.interrupted = event
                self._end(f"interrupted by {event.name}")
            case _Over(who, error):
                self._over.add(who)
                self._error = self._error or error
                if error is not None:
                    self._end("the run failed")
                if who == "closer":
                    self._stop_watching()
        return "watcher" in self._over and (not self._closing or "closer" in self._over)

    def _end(self, reason: str) -> None:
        """End what runs and revoke what has not begun; the threads tell when that is done."""
        if not self._closing:
            self._closing = True
            self._commands.stop(reason)
            self._thread("closer", lambda: self._runner.close(cancel=True))

    def _thread(self, who: str, target: Callable[[], None]) -> threading.Thread:
        def body() -> None:
            error: BaseException | None = None
            try:
                target()
            except BaseException as exc:  # noqa: BLE001 - the main thread raises it
                error = exc
            self._events.put(_Over(who, error))

        thread = threading.Thread(target=body, name=f"liteerresult-{who}", daemon=True)
        thread.start()
        return thread

    def _stop_watching(self) -> None:
        self._stopped.set()
        if self._armed is not None:
            self._armed.fire()

    def _watch(self, task_ids: list[str], known: int) -> None:
        """Put an event for each task that is final, until all are or there is no more to come."""
        waiting = set(task_ids)
        with self._store.watch() as watch:
            self._armed = watch
            number = self._store.completion_number()
            self._look(task_ids, waiting, known)
            ended: list[str] = []
            while waiting:
                last_look = self._stopped.is_set()
                if not last_look and not ended:  # what was completed comes in pages
                    watch.wait(None)
                number, ended = self._store.completed_since(number)
                self._look([task_id for task_id in ended if task_id in waiting], waiting, known)
                if last_look and not ended:
                    return

    def _look(self, task_ids: list[str], waiting: set[str], known: int) -> None:
        for start in range(0, len(task_ids), READ_AT_ONCE):
            for meta in self._store.get_many(task_ids[start : start + READ_AT_ONCE]):
                if meta.ready:
                    waiting.discard(meta.task_id)
                    self._events.put(_Ended(meta, meta.done_number is not None and meta.done_number <= known))
