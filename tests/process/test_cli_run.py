"""`liteerresult run` as a process: pipes, signals, death and taking up again."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from liteerresult import ResultStore
from liteerresult.commands import _leash
from tests.support import DEADLINE, ROOT, Child, eventually

if TYPE_CHECKING:
    from pathlib import Path

STRICT = {"PYTHONWARNINGS": "error"}


def cli(*words: object, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "liteerresult.cli", *map(str, words)],
        input=stdin, capture_output=True, timeout=DEADLINE, check=False,
        env={**os.environ, **STRICT, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def child(*words: object) -> Child:
    return Child("-m", "liteerresult.cli", *map(str, words), env=STRICT)


def states(path: Path) -> dict[str, str]:
    return {record["id"]: record["status"] for record in records(path)}


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in cli("ls", path, "--json").stdout.splitlines()]


def is_gone(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def pids(folder: Path, count: int) -> list[int]:
    """Return the process ids that *count* commands wrote to files of *folder*."""
    files = eventually(lambda: [file for file in folder.glob("pid.*") if file.read_text(encoding="ascii")])
    files = eventually(lambda: found if len(found := list(folder.glob("pid.*"))) >= count else None) or files
    return [int(eventually(lambda file=file: file.read_text(encoding="ascii").strip())) for file in files]  # type: ignore[misc]


def test_in_a_pipe(tmp_path: Path) -> None:
    result = cli(
        "run", tmp_path / "r.db", "--group", "g", "-j", 2, "--", "wc", "-c", stdin=f"{__file__}\n/nowhere\n".encode()
    )
    assert result.returncode == 1
    assert result.stdout == f"done  {__file__}\n".encode()
    failed, summary = result.stderr.decode().splitlines()
    assert failed.startswith("FAILED  /nowhere: wc -c /nowhere: exit status 1: wc: ")
    assert summary == "group g: 1 done, 1 failed"


def test_nobody_reads_the_lines(tmp_path: Path) -> None:
    """The work goes on, and the exit status is still about the work."""
    line = f'"{sys.executable}" -m liteerresult.cli run "{tmp_path}/r.db" -j 2 -- echo ::: $(seq 40) ; echo "$?" >&2'
    result = subprocess.run(
        ["bash", "-c", f"( {line} ) | head -n 1"],
        capture_output=True, timeout=DEADLINE, check=False, env={**os.environ, **STRICT, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert result.stdout.count(b"\n") == 1
    assert result.stderr.splitlines()[-1] == b"0", result.stderr
    assert result.stderr.count(b"\n") == 2, result.stderr
    assert set(states(tmp_path / "r.db").values()) == {"DONE"}


def test_nobody_reads_the_list(tmp_path: Path) -> None:
    with ResultStore(tmp_path / "r.db", durability="process-crash") as store:
        store.mark_many_as_done({f"t{number}": "x" * 1000 for number in range(500)})
    result = subprocess.run(
        ["bash", "-c", f'"{sys.executable}" -m liteerresult.cli ls "{tmp_path}/r.db" | head -n 2'],
        capture_output=True, timeout=DEADLINE, check=False, env={**os.environ, **STRICT, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert result.stdout.count(b"\n") == 2
    assert result.stderr == b""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(tmp_path: Path, number: int, status: int) -> None:
    line = f"sleep 60 & echo $! >{tmp_path}/pid.{{}}; wait"
    path = tmp_path / "r.db"
    with child("run", path, "--group", "g", "-j", 2, "--", "sh", "-c", line, ":::", 1, 2, 3, 4, 5) as running:
        commands = pids(tmp_path, 2)
        running.send_signal(number)
        assert running.wait() == status, running.report()
        assert "group g: 0 done, 2 failed, 3 revoked" in running.report()
        assert "Traceback" not in running.report()
    for pid in commands:
        eventually(lambda pid=pid: is_gone(pid))  # type: ignore[misc]
    found = records(path)
    assert [record["status"] for record in found] == ["FAILURE", "FAILURE", "REVOKED", "REVOKED", "REVOKED"]
    assert f"interrupted by {signal.Signals(number).name}" in found[0]["result"]["text"]
    assert sorted(tmp_path.glob("pid.*")) == [tmp_path / "pid.1", tmp_path / "pid.2"]
    assert cli("doctor", path).returncode == 0


def test_a_second_interrupt_does_not_wait(tmp_path: Path) -> None:
    line = f"trap '' TERM; echo $$ >{tmp_path}/pid.{{}}; while :; do sleep 1; done"
    with child("run", tmp_path / "r.db", "-j", 1, "--retries", 3, "--", "sh", "-c", line, ":::", 1, 2) as running:
        pids(tmp_path, 1)
        running.send_signal(signal.SIGINT)
        began = time.monotonic()
        time.sleep(0.2)  # two signals at one time are one signal
        running.send_signal(signal.SIGINT)
        assert running.wait() == 130, running.report()
        assert time.monotonic() - began < 3
    assert set(states(tmp_path / "r.db").values()) <= {"FAILURE", "REVOKED"}


def test_many_that_have_not_begun_are_revoked_soon(tmp_path: Path) -> None:
    line = f"echo $$ >{tmp_path}/pid.1; exec sleep 60"
    with child("run", tmp_path / "r.db", "-j", 1, "--", "sh", "-c", line, ":::", *range(500)) as running:
        pids(tmp_path, 1)
        running.send_signal(signal.SIGINT)
        began = time.monotonic()
        assert running.wait() == 130, running.report()
        assert time.monotonic() - began < 10
    counted = list(states(tmp_path / "r.db").values())
    assert (counted.count("FAILURE"), counted.count("REVOKED")) == (1, 499)


def test_killed_and_run_again(tmp_path: Path) -> None:
    """SIGKILL to the whole process group, again and again: at the end each item was finished once, and no more."""
    path, log = tmp_path / "r.db", tmp_path / "log"
    items = [str(number) for number in range(40)]
    line = f"sleep 0.02; echo {{}} >>{log}; echo result {{}}"
    words = (
        "run",
        path,
        "--durability",
        "process-crash",
        "--group",
        "g",
        "-j",
        4,
        "--",
        "sh",
        "-c",
        line,
        ":::",
        *items,
    )

    def finished() -> int:
        return len(log.read_text(encoding="ascii").split()) if log.exists() else 0

    for threshold in (5, 15, 25):
        with child(*words) as running:
            eventually(lambda threshold=threshold: finished() >= threshold)  # type: ignore[misc]
            os.killpg(running.pid, signal.SIGKILL)
            assert running.wait() == -signal.SIGKILL
    done = [name for name, status in states(path).items() if status == "DONE"]
    assert 10 <= len(done) < 40
    before = finished()
    result = cli(*words)
    assert result.returncode == 0, result.stderr
    assert f"40 done ({len(done)} of them before)".encode() in result.stderr
    # What is DONE was not run again. What a kill met between its end and its record was.
    if _leash():
        assert finished() - before == 40 - len(done)
        assert finished() <= 40 + 3 * 4
    joined = json.loads(cli("join", path, "g", "--json").stdout)
    unharmed = tmp_path / "unharmed.db"
    assert cli("run", unharmed, *words[2:]).returncode == 0
    expected = json.loads(cli("join", unharmed, "g", "--json").stdout)
    assert [record["result"] for record in joined] == [record["result"] for record in expected]
    assert [record["result"]["stdout"] for record in joined] == [f"result {item}\n" for item in items]


def test_a_second_run_of_the_group_waits_for_the_first_and_hears_of_its_death(tmp_path: Path) -> None:
    line = f"echo $$ >>{tmp_path}/pid.{{}}; exec sleep 60"
    words = ("run", tmp_path / "r.db", "--group", "g", "--", "sh", "-c", line, ":::", "1")
    with child(*words) as first:
        pids(tmp_path, 1)
        with child(*words) as interrupted:
            eventually(lambda: len(list((tmp_path / "r.db-owners").iterdir())) == 2)
            interrupted.send_signal(signal.SIGINT)
            assert interrupted.wait() == 130, interrupted.report()
            assert "group g: 0 done, 1 waiting" in interrupted.report()
        assert list(states(tmp_path / "r.db").values()) == ["STARTED"]
        with child(*words) as second:
            eventually(lambda: len(list((tmp_path / "r.db-owners").iterdir())) == 2)
            first.kill()
            assert second.wait() == 1, second.report()
            assert "WorkerLostError" in second.report()
    assert (tmp_path / "pid.1").read_text(encoding="ascii").count("\n") == 1


def test_the_bar_on_a_terminal(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "liteerresult.cli", "run", str(tmp_path / "r.db"), "--group", "g", "-j", "2",
         "--", "sh", "-c", "sleep 0.1; exit {}", ":::", "0", "0", "3"],
        stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs,
        env={**os.environ, **STRICT, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "120"},
    )  # fmt: skip
    os.close(theirs)
    text = b""
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        if select.select([ours], [], [], 0.1)[0]:
            try:
                text += os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
    os.close(ours)
    assert process.wait(DEADLINE) == 1
    assert b"3/3" in text
    assert b"\x1b[" in text
    assert b"FAILED  3: " in text
    assert b"done  " not in text
    assert b"group g: 2 done, 1 failed" in text


def test_a_wait_is_interrupted(tmp_path: Path) -> None:
    with ResultStore(tmp_path / "r.db", durability="process-crash") as store:
        store.create_task(task_id="open")
        with child("wait", tmp_path / "r.db", "missing") as waiting:
            eventually(lambda: "waiting for it" in waiting.report())
            waiting.send_signal(signal.SIGINT)
            assert waiting.wait() == 130
            assert "Traceback" not in waiting.report()
        with child("wait", tmp_path / "r.db", "late") as waiting:
            eventually(lambda: "waiting for it" in waiting.report())
            store.mark_as_done("late", "here")
            assert waiting.read_rest() == "here\n"
            assert waiting.wait() == 0
