"""A program as a task's function: what it returns, how it fails, how it is ended."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from liteerresult import Runner, TaskRevokedError
from liteerresult.commands import CommandFailed, Commands, _leash
from liteerresult.serialization import Serializer, encode_exception
from liteerresult.store import open_store
from tests.support import DEADLINE, Child, eventually, run_python

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from liteerresult import ResultStore


def shell(commands: Commands, line: str) -> dict[str, object]:
    return commands("sh", "-c", line)


def failure_of(call: Callable[[], object]) -> CommandFailed:
    with pytest.raises(CommandFailed) as caught:
        call()
    return caught.value


def is_gone(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_the_result_is_the_output(store: ResultStore) -> None:
    assert shell(Commands(store), "echo out; echo ü >&2") == {"returncode": 0, "stdout": "out\n", "stderr": "ü\n"}


def test_output_that_is_no_text_stays_bytes(store: ResultStore) -> None:
    result = shell(Commands(store), r"printf '\377\000'; printf 'a\000b' >&2")
    assert result["stdout"] == b"\xff\0"
    assert result["stderr"] == "a\0b"


def test_output_may_be_huge(store: ResultStore) -> None:
    result = shell(Commands(store), "head -c 20000000 /dev/zero; head -c 300000 /dev/zero >&2")
    assert result["stdout"] == "\0" * 20_000_000
    assert result["stderr"] == "\0" * 300_000


def test_arguments_meet_no_shell(store: ResultStore) -> None:
    assert Commands(store)("printf", "%s", "$HOME *;")["stdout"] == "$HOME *;"


def test_there_is_nothing_to_read(store: ResultStore) -> None:
    assert Commands(store)("cat")["stdout"] == ""


def test_a_failure_says_how(store: ResultStore) -> None:
    error = failure_of(lambda: shell(Commands(store), "echo out; seq 99 >&2; exit 3"))
    assert (error.returncode, error.stdout, error.reason) == (3, "out\n", None)
    assert error.command == ["sh", "-c", "echo out; seq 99 >&2; exit 3"]
    lines = str(error).splitlines()
    assert lines[0].endswith(": exit status 3")
    assert lines[1:] == [str(number) for number in range(90, 100)]


def test_a_signal_is_named(store: ResultStore) -> None:
    error = failure_of(lambda: shell(Commands(store), "kill -SEGV $$"))
    assert error.returncode == -signal.SIGSEGV
    assert "ended by SIGSEGV" in str(error)


def test_a_failure_survives_pickling_and_storing(store: ResultStore) -> None:
    error = failure_of(lambda: shell(Commands(store), r"printf '\377'; exit 4"))
    decoded = Serializer().decode_exception(encode_exception(error), "json", None)
    for copy in (pickle.loads(pickle.dumps(error)), decoded):
        assert type(copy) is CommandFailed
        assert str(copy) == str(error)
        fields = (copy.command, copy.returncode, copy.stdout, copy.stderr, copy.reason)
        assert fields == (error.command, 4, b"\xff", "", None)


def test_a_missing_program(store: ResultStore) -> None:
    error = failure_of(lambda: Commands(store)("no-such-program", "x"))
    assert error.returncode == 127
    assert isinstance(error.__cause__, FileNotFoundError)
    assert "no-such-program x: can't be run" in str(error)


def test_a_program_that_can_not_be_executed(store: ResultStore, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no program", encoding="ascii")
    assert failure_of(lambda: Commands(store)(str(tmp_path / "text"))).returncode == 126


def test_a_timeout_ends_the_command_and_what_it_began(store: ResultStore) -> None:
    error = failure_of(lambda: shell(Commands(store, timeout=0.3), "echo first; sleep 60 & echo $!; wait"))
    first, pid = str(error.stdout).split()
    assert first == "first"
    assert error.reason == "timed out after 0.3 s"
    eventually(lambda: is_gone(int(pid)))


def test_a_command_that_does_not_care_is_killed(store: ResultStore) -> None:
    error = failure_of(
        lambda: shell(Commands(store, timeout=0.2, grace=0.1), "trap '' TERM; while :; do sleep 1; done")
    )
    assert error.returncode == -signal.SIGKILL


def test_a_command_that_ends_well_when_timed_out_has_failed(store: ResultStore) -> None:
    error = failure_of(lambda: shell(Commands(store, timeout=0.2), "trap 'exit 0' TERM; while :; do sleep 0.1; done"))
    assert (error.returncode, error.reason) == (0, "timed out after 0.2 s")


def test_what_left_the_group_and_holds_the_output_is_not_waited_for(store: ResultStore) -> None:
    line = "setsid sleep 60 & echo $!; exec sleep 60"
    error = failure_of(lambda: shell(Commands(store, timeout=0.2, grace=0.1), line))
    os.kill(int(str(error.stdout)), signal.SIGKILL)
    assert error.returncode in (-signal.SIGTERM, -signal.SIGKILL)


class Called(threading.Thread):
    """A command on a thread of its own, begun when the object is."""

    def __init__(self, commands: Commands, mark: Path, line: str) -> None:
        super().__init__(daemon=True)
        self._call = lambda: failure_of(lambda: shell(commands, f"echo $$ >{mark}; {line}"))
        self.start()
        eventually(lambda: mark.exists() and mark.read_text(encoding="ascii").endswith("\n"))

    def run(self) -> None:
        self._error = self._call()

    def error(self) -> CommandFailed:
        self.join(DEADLINE)
        return self._error


def test_stopping_ends_what_runs(store: ResultStore, tmp_path: Path) -> None:
    commands = Commands(store)
    called = Called(commands, tmp_path / "mark", "exec sleep 60")
    began = time.monotonic()
    commands.stop("interrupted")
    assert called.error().reason == "interrupted"
    assert time.monotonic() - began < 3


def test_stopping_kills_after_the_grace(store: ResultStore, tmp_path: Path) -> None:
    commands = Commands(store, grace=0.1)
    called = Called(commands, tmp_path / "mark", "trap '' TERM; while :; do sleep 1; done")
    commands.stop("interrupted")
    assert called.error().returncode == -signal.SIGKILL


def test_killing_does_not_wait(store: ResultStore, tmp_path: Path) -> None:
    commands = Commands(store)
    called = Called(commands, tmp_path / "mark", "trap '' TERM; while :; do sleep 1; done")
    commands.stop("interrupted")
    commands.kill()
    assert called.error().returncode == -signal.SIGKILL


def test_a_command_that_ends_well_when_stopped_has_failed(store: ResultStore, tmp_path: Path) -> None:
    commands = Commands(store)
    called = Called(commands, tmp_path / "mark", "trap 'exit 0' TERM; while :; do sleep 0.1; done")
    commands.stop("interrupted")
    error = called.error()
    assert (error.returncode, error.reason) == (0, "interrupted")


def test_after_stopping_none_begins(tmp_path: Path) -> None:
    with open_store(tmp_path / "results.db", "process-crash") as store:  # the one that the runner's threads open
        commands = Commands(store)
        commands.stop("interrupted")
        with Runner(store, ThreadPoolExecutor(1)) as runner:
            group = runner.map(commands, ["touch"], [str(tmp_path / "mark")])
        with pytest.raises(TaskRevokedError, match="interrupted"):
            group.join(timeout=DEADLINE)
    assert not (tmp_path / "mark").exists()


@pytest.mark.skipif(not _leash(), reason="needs the setpriv of util-linux")
def test_the_kernel_ends_a_command_whose_process_is_killed(tmp_path: Path) -> None:
    """Without `_leash` the command outlives the process: the control arm."""
    code = """
        import os, sys, threading
        from liteerresult import ResultStore, commands
        if sys.argv[2] == "control":
            commands._leash = lambda: ()
        call = commands.Commands(ResultStore(sys.argv[1]))
        mark = sys.argv[1] + "." + sys.argv[2]
        threading.Thread(target=call, args=("sh", "-c", f"echo $$ >{mark}; exec sleep 60"), daemon=True).start()
        while not os.path.exists(mark) or not open(mark).read().endswith("\\n"):
            pass
        print(open(mark).read(), flush=True)
        os.kill(os.getpid(), 9)
    """
    for arm, dies in (("leash", True), ("control", False)):
        with Child("-c", code, tmp_path / "results.db", arm) as child:
            pid = int(child.read_line())
            assert child.wait() == -signal.SIGKILL
            if dies:
                eventually(lambda pid=pid: is_gone(pid))  # type: ignore[misc]
            else:
                assert not is_gone(pid)
                os.kill(pid, signal.SIGKILL)


def test_importing_it_is_quick() -> None:
    loaded = run_python("import sys, liteerresult.commands; print(*sys.modules)").split()
    assert not {"click", "rich"} & set(loaded)
