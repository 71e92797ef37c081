"""What tests share: time and ids under their control, and child processes that are always reaped.

Nothing here waits without a deadline, and a deadline that passes says where everyone stood.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import os
import select
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["DEADLINE", "ROOT", "Child", "ManualClock", "counting_ids", "eventually", "run_python"]

ROOT = Path(__file__).resolve().parents[1]
"""The checkout: children can import `tests` from here, and `liteerresult` as this process does."""

DEADLINE = 30.0
"""Seconds that any wait takes at most unless told otherwise: half of pytest's limit, so that ours speaks first."""

T = TypeVar("T")


class ManualClock:
    """A clock that moves when told to. Its two readings are far apart, so mixing them shows at once."""

    def __init__(self, unix: float = 1_700_000_000.0, monotonic: float = 1_000.0) -> None:
        self._unix = unix
        self._monotonic = monotonic

    def time(self) -> float:
        """Return Unix seconds."""
        return self._unix

    def monotonic(self) -> float:
        """Return seconds that never run backwards."""
        return self._monotonic

    def advance(self, seconds: float) -> None:
        """Let *seconds* pass, on both readings."""
        self._unix += seconds
        self._monotonic += seconds


def counting_ids(prefix: str = "id-") -> Callable[[], str]:
    """Return a function that answers prefix1, prefix2, ... in turn, from any thread."""
    numbers = itertools.count(1)
    return lambda: f"{prefix}{next(numbers)}"


def eventually(predicate: Callable[[], T], timeout: float = DEADLINE, *, what: str = "the condition") -> T:
    """
    Return the first true answer of *predicate*, asked again and again with short pauses.

    Args:
        predicate: What to ask. An exception that it raises ends the wait.
        timeout: Longest wait in seconds.
        what: What is waited for, in the words of the failure.

    Raises:
        AssertionError: *timeout* passed first; with the tracebacks of all threads.
    """
    deadline = time.monotonic() + timeout
    pause = 0.001
    while not (answer := predicate()):
        if time.monotonic() >= deadline:
            raise AssertionError(f"{what} did not come true in {timeout} s, last answer {answer!r}\n{_own_stacks()}")
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)
    return answer


def _own_stacks() -> str:
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        return file.read()


class Child:
    """
    A Python child process that never outlives its ``with`` block, nor do its own children.

    A wait that passes its deadline aborts the child under faulthandler and fails with the tracebacks of its threads.

    >>> with Child("-c", "print(input())") as child:
    ...     child.write_line("hello")
    ...     assert child.read_line() == "hello"
    ...     assert child.wait() == 0

    Args:
        arguments: As for the interpreter: ``"-c", code, *args`` (*code* may be indented), ``"-m", module, *args``
            or ``script, *args``.
        env: Variables to set besides those of this process.
        cwd: Where it runs; here, unless given.

    Attributes:
        pid: Its process id.
    """

    def __init__(
        self, *arguments: str | os.PathLike[str], env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> None:
        words = [os.fspath(argument) for argument in arguments]
        if words[0] == "-c":
            words[1] = textwrap.dedent(words[1])
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self._buffer = b""
        self._eof = False
        self._process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-u", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **(env or {})},
            cwd=cwd,
            start_new_session=True,  # a group of its own, so that its children can be ended with it
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self.pid = self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill what is left of the child and of its children, and reap it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._stdin, self._stdout, self._stderr):
            with contextlib.suppress(BrokenPipeError):
                stream.close()

    def write_line(self, text: str = "") -> None:
        """Send one line to the child's standard input."""
        self._stdin.write(text.encode() + b"\n")
        self._stdin.flush()

    def read_line(self, timeout: float = DEADLINE) -> str:
        """Return the child's next line of output, or fail with its standard error if it ends first or is late."""
        deadline = time.monotonic() + timeout
        while b"\n" not in self._buffer:
            if self._eof:
                raise AssertionError(f"the child ended before it wrote a line\n{self.report()}")
            self._pump(deadline, "a line")
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode()

    def read_rest(self, timeout: float = DEADLINE) -> str:
        """Wait for the child's end and return the output that was not read yet."""
        self.wait(timeout)
        text, self._buffer = self._buffer.decode(), b""
        return text

    def wait(self, timeout: float = DEADLINE) -> int:
        """Wait for the child's end and return its exit code, which is negative if a signal ended it."""
        deadline = time.monotonic() + timeout
        # Its output is read meanwhile, lest it block on a full pipe; the short steps are for a grandchild
        # that holds the pipe open after the child's end.
        while self._process.poll() is None:
            if self._eof:
                try:
                    self._process.wait(max(deadline - time.monotonic(), 0))
                except subprocess.TimeoutExpired:
                    self._abort("its end")
            else:
                self._pump(deadline, "its end", step=0.02)
        while not self._eof and self._readable(0):
            self._read()
        return self._process.returncode

    def kill(self) -> None:
        """End the child by SIGKILL, and reap it. Its own children are left alone until `close`."""
        self._process.kill()
        self._process.wait()

    def send_signal(self, number: int) -> None:
        """Send a signal to the child, not to its children."""
        self._process.send_signal(number)

    def stop(self) -> None:
        """Freeze the child by SIGSTOP, and return once it is frozen."""
        self.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def cont(self) -> None:
        """Let a frozen child go on."""
        self.send_signal(signal.SIGCONT)

    def report(self) -> str:
        """Return what the child wrote to standard error so far, and how it ended if it did."""
        descriptor = self._stderr.fileno()
        # Not seek and read: the child shares this offset and would go on writing there.
        text = os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode(errors="replace")
        return f"child {self.pid}, exit code {self._process.poll()}, standard error:\n{text}"

    def _readable(self, timeout: float) -> bool:
        return bool(select.select([self._stdout], [], [], timeout)[0])

    def _read(self) -> None:
        chunk = os.read(self._stdout.fileno(), 65_536)
        self._buffer += chunk
        self._eof = not chunk

    def _pump(self, deadline: float, awaited: str, step: float = DEADLINE) -> None:
        left = deadline - time.monotonic()
        if self._readable(min(max(left, 0), step)):
            self._read()
        elif left <= 0:
            self._abort(awaited)

    def _abort(self, awaited: str) -> None:
        self._process.send_signal(signal.SIGABRT)
        self._process.send_signal(signal.SIGCONT)  # a frozen child would never hear of it
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        raise AssertionError(f"waited in vain for the child: {awaited} did not come\n{self.report()}")


def run_python(
    code: str, *args: str | os.PathLike[str], timeout: float = DEADLINE, env: Mapping[str, str] | None = None
) -> str:
    """
    Run *code* in a child process to its end and return what it printed.

    Raises:
        AssertionError: It failed, or *timeout* seconds passed first; with its standard error.
    """
    with Child("-c", code, *args, env=env) as child:
        output = child.read_rest(timeout)
        assert child.wait() == 0, child.report()
        return output
