"""The command line, called in this process: arguments, output, exit statuses."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import sqlite3
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner, Result

from liteerresult import ResultStore, __version__
from liteerresult.cli import main
from tests.support import ManualClock, counting_ids, run_python

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return a store with a few tasks and groups, from long ago."""
    path = tmp_path / "results.db"
    clock = ManualClock()
    with ResultStore(path, clock=clock, new_id=counting_ids(), durability="process-crash") as store:
        store.create_task("load", task_id="parent", args=("x", 1), kwargs={"deep": True})
        store.mark_as_started("parent")
        clock.advance(2)
        store.mark_as_done("parent", {"rows": 3})
        store.create_task("sum", task_id="text", parent="parent")
        store.mark_as_done("text", "two\nlines\tand \\")
        store.create_task("sum", task_id="bad", parent="parent")
        store.mark_as_retry("bad", OSError("first"))
        store.mark_as_failure("bad", ValueError("no good"))
        store.create_group(["text", "bad"], "inner")
        store.create_group(["parent", store.restore_group("inner")], "outer", parent="parent")
        store.create_task("sum", task_id="open")
        store.create_group(["text", "open"], "unready")
    return path


def call(*words: object, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], input=stdin, catch_exceptions=False)


def run(path: Path, *words: object, stdin: str | bytes | None = None) -> Result:
    return call("run", path, "--durability", "process-crash", *words, stdin=stdin)


def outputs(path: Path, group: str = "g") -> list[Any]:
    return [record["result"].get("stdout") for record in json.loads(call("join", path, group, "--json").stdout)]


# run


@pytest.mark.parametrize(
    ("words", "stdin", "expected"),
    [
        (("--", "echo", "<{}>", "{}{}", ":::", "a", "b c"), None, ["<a> aa\n", "<b c> b cb c\n"]),
        (("--", "echo", "-n", ":::", "a", "$b"), None, ["a", "$b"]),
        (("--", "{}", "x", ":::", "echo", "printf"), None, ["x\n", "x"]),
        (("--", "echo", "{}"), "a\n\nb c\n", ["a\n", "b c\n"]),
        ((), "echo a | tr a b\n\nexit 0\n", ["b\n", ""]),
        (("--", ":::", "echo $((1 + 2))"), None, ["3\n"]),
        (("--", "echo", ":::"), None, []),
        (("--", "cat", "-"), "", []),
    ],
)
def test_items_and_commands(tmp_path: Path, words: tuple[str, ...], stdin: str | None, expected: list[str]) -> None:
    result = run(tmp_path / "r.db", "--group", "g", *words, stdin=stdin)
    assert result.exit_code == 0, result.output
    assert outputs(tmp_path / "r.db") == expected
    assert result.stdout.count("done  ") == len(expected)
    assert result.stderr == f"group g: {len(expected)} done\n"


def test_a_failure_is_told_and_counted(tmp_path: Path) -> None:
    result = run(tmp_path / "r.db", "--group", "g", "--", "sh", "-c", "echo why >&2; exit {}", ":::", 0, 7)
    assert result.exit_code == 1
    assert result.stdout == "done  0\n"
    assert result.stderr.splitlines() == [
        "FAILED  7: sh -c 'echo why >&2; exit 7': exit status 7: why",
        "group g: 1 done, 1 failed",
    ]


def test_a_missing_program_is_a_failure(tmp_path: Path) -> None:
    result = run(tmp_path / "r.db", "--", "no-such-program", ":::", "a")
    assert result.exit_code == 1
    assert "FAILED  a: no-such-program a: can't be run: No such file or directory" in result.stderr


def test_run_prints_json(tmp_path: Path) -> None:
    result = run(tmp_path / "r.db", "--group", "g", "--json", "--", "printf", r"\377{}", ":::", "a", "b")
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert {record["id"] for record in records} == {"g/0", "g/1"}
    first = next(record for record in records if record["id"] == "g/0")
    assert (first["item"], first["name"], first["status"]) == ("a", "printf", "DONE")
    assert first["args"] == ["printf", r"\377a"]
    assert first["result"]["stdout"] == {"$bytes": "/2E="}


def test_the_same_command_again_runs_only_what_is_not_done(tmp_path: Path) -> None:
    log, good = tmp_path / "log", tmp_path / "good"
    words = ("--group", "g", "--", "sh", "-c", f"echo {{}} >>{log}; test {{}} = a -o -e {good}", ":::", "a", "b")
    assert run(tmp_path / "r.db", *words).exit_code == 1
    good.touch()
    again = run(tmp_path / "r.db", *words)
    assert again.exit_code == 0
    assert again.stdout == "done  b\n"
    assert again.stderr == "group g: 2 done (1 of them before)\n"
    assert sorted(log.read_text(encoding="ascii").split()) == ["a", "b", "b"]


def test_changed_inputs_are_refused(tmp_path: Path) -> None:
    run(tmp_path / "r.db", "--group", "g", "--", "echo", ":::", "a", "b")
    for words in (("echo", ":::", "a", "c"), ("echo", ":::", "a"), ("printf", ":::", "a", "b")):
        result = run(tmp_path / "r.db", "--group", "g", "--", *words)
        assert result.exit_code == 2
        assert "group 'g' was stored with" in result.stderr
    assert outputs(tmp_path / "r.db") == ["a\n", "b\n"]


def test_retries(tmp_path: Path) -> None:
    line = f"test -e {tmp_path}/{{}} || {{ touch {tmp_path}/{{}}; echo not yet >&2; exit 5; }}"
    result = run(tmp_path / "r.db", "--group", "g", "--retries", 1, "--", "sh", "-c", line, ":::", "a")
    assert result.exit_code == 0, result.output
    shown = json.loads(call("show", tmp_path / "r.db", "g/0", "--json").stdout)
    assert shown["retries"] == 1
    (attempt,) = shown["attempts"]
    assert attempt["status"] == "RETRY"
    assert attempt["result"]["attributes"]["returncode"] == 5
    result = run(tmp_path / "r.db", "--retries", 2, "--name", "never", "--", "false", ":::", "a")
    assert result.exit_code == 1
    records = [json.loads(line) for line in call("ls", tmp_path / "r.db", "--json").stdout.splitlines()]
    assert [(record["name"], record["retries"]) for record in records if record["status"] == "FAILURE"] == [
        ("never", 2)
    ]


def test_a_command_may_take_so_long(tmp_path: Path) -> None:
    result = run(tmp_path / "r.db", "--timeout", 0.2, "--", "sleep", ":::", 60)
    assert result.exit_code == 1
    assert "FAILED  60: sleep 60: timed out after 0.2 s" in result.stderr


@pytest.mark.parametrize(
    "words",
    [("-j", 0), ("--timeout", 0), ("--retries", -1), ("--durability", "x"), ("--", "a", ":::", "b", ":::", "c")],
)
def test_bad_usage_of_run(tmp_path: Path, words: tuple[object, ...]) -> None:
    assert call("run", tmp_path / "r.db", *words, stdin="").exit_code == 2


def test_names_that_are_no_text(tmp_path: Path) -> None:
    result = run(tmp_path / "r.db", "--group", "g", "--", "echo", "-n", stdin=b"\xff\n")
    assert result.exit_code == 0, result.output
    assert result.stdout_bytes == b"done  \xff\n"
    assert json.loads(call("join", tmp_path / "r.db", "g", "--json").stdout)[0]["result"]["stdout"] == {
        "$bytes": "/w=="
    }


# Reading


def test_ls(path: Path) -> None:
    lines = [line.split("\t") for line in call("ls", path).stdout.splitlines()]
    assert lines[0] == ["id", "status", "name", "item", "seconds", "result"]
    assert lines[1] == ["parent", "DONE", "load", "'x', 1, deep=True", "2.000", '{"rows": 3}']
    assert lines[2] == ["text", "DONE", "sum", "text", "", "two\\nlines\\tand \\\\"]
    assert lines[3] == ["bad", "FAILURE", "sum", "bad", "", "ValueError: no good"]
    assert [line[0] for line in lines[4:]] == ["open"]


@pytest.mark.parametrize(
    ("words", "ids"),
    [
        (("--status", "failure"), ["bad"]),
        (("--status", "SUCCESS"), ["parent", "text"]),
        (("--group", "outer"), ["parent", "text", "bad"]),
        (("--group", "inner", "--status", "DONE"), ["text"]),
        (("--limit", 2), ["bad", "open"]),
        (("--limit", 9, "--status", "REVOKED"), []),
    ],
)
def test_ls_selects(path: Path, words: tuple[object, ...], ids: list[str]) -> None:
    result = call("ls", path, "--json", *words)
    assert [json.loads(line)["id"] for line in result.stdout.splitlines()] == ids


def test_ls_goes_page_by_page(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("liteerresult.tables.READ_AT_ONCE", 1)
    assert len(call("ls", path).stdout.splitlines()) == 5


def test_ls_groups(path: Path) -> None:
    records = [json.loads(line) for line in call("ls", path, "--groups", "--json").stdout.splitlines()]
    assert {record["id"]: (record["status"], record["size"], record["waiting"]) for record in records} == {
        "inner": ("FAILURE", 2, 0),
        "outer": ("FAILURE", 3, 0),
        "unready": ("WAITING", 2, 1),
    }
    assert len(call("ls", path, "--groups", "--limit", 1).stdout.splitlines()) == 2


def test_show_a_task(path: Path) -> None:
    shown = json.loads(call("show", path, "bad", "--json").stdout)
    assert (shown["status"], shown["retries"]) == ("FAILURE", 1)
    assert shown["parent"] == {"id": "parent", "kind": "task"}
    assert shown["result"]["text"] == "no good"
    assert [attempt["result"]["text"] for attempt in shown["attempts"]] == ["first"]
    text = call("show", path, "bad").stdout
    assert "exception   ValueError: no good\n" in text
    assert "attempts:\n    0  RETRY    OSError: first\n" in text
    parent = call("show", path, "parent").stdout
    assert "call        'x', 1, deep=True\n" in parent
    assert (
        "children:\n    task text\n    task bad\n    group outer\n" in parent
        or "children:\n    group outer\n" in parent
    )


def test_show_a_group(path: Path) -> None:
    shown = json.loads(call("show", path, "outer", "--json").stdout)
    assert (shown["size"], shown["done"], shown["failed"], shown["waiting"]) == (3, 2, 1, 0)
    assert shown["members"] == [
        {"id": "parent", "kind": "task", "status": "DONE"},
        {"id": "inner", "kind": "group", "status": None},
    ]
    assert "members:\n    DONE      parent\n    group     inner\n" in call("show", path, "outer").stdout


def test_wait(path: Path) -> None:
    result = call("wait", path, "text")
    assert (result.exit_code, result.stdout) == (0, "two\nlines\tand \\\n")
    assert call("wait", path, "parent").stdout == '{"rows": 3}\n'
    result = call("wait", path, "bad")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "FAILURE ValueError: no good\n")
    result = call("wait", path, "bad", "--json")
    assert (result.exit_code, json.loads(result.stdout)["status"]) == (1, "FAILURE")
    result = call("wait", path, "open", "--timeout", 0)
    assert (result.exit_code, result.stderr) == (124, "liteerresult: task 'open' is not ready after 0 s\n")
    result = call("wait", path, "unknown", "--timeout", "0.01")
    assert result.exit_code == 124
    assert "no task 'unknown' yet" in result.stderr
    assert call("wait", path, "outer").exit_code == 2


def test_join(path: Path) -> None:
    result = call("join", path, "outer")
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        "item\tstatus\tresult",
        "'x', 1, deep=True\tDONE\t{\"rows\": 3}",
        "text\tDONE\ttwo\\nlines\\tand \\\\",
        "bad\tFAILURE\tValueError: no good",
    ]
    result = call("join", path, "outer", "--format", "json")
    assert [record["id"] for record in json.loads(result.stdout)] == ["parent", "text", "bad"]
    rows = list(csv.reader(io.StringIO(call("join", path, "inner", "--format", "csv").stdout)))
    assert rows == [
        ["item", "status", "result"],
        ["text", "DONE", "two\nlines\tand \\"],
        ["bad", "FAILURE", "ValueError: no good"],
    ]
    result = call("join", path, "unready", "--timeout", "0.01")
    assert (result.exit_code, result.stdout) == (124, "")
    assert "1 tasks are not ready" in result.stderr


def test_values_that_this_store_does_not_accept_are_shown_as_such(tmp_path: Path) -> None:
    path = tmp_path / "r.db"
    with ResultStore(path, serializer="pickle", accept=("json", "pickle")) as store:
        store.mark_as_done("p", {1, 2})
    assert "(pickle, " in call("ls", path).stdout
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as raw:
        raw.execute("INSERT INTO tasks (id, status, result, args) VALUES ('q', 'DONE', '{broken', '{broken')")
    assert call("wait", path, "q").stdout == "{broken\n"


# Changing


def test_reap(path: Path) -> None:
    run_python(
        "import sys, os, liteerresult as l; l.ResultStore(sys.argv[1]).mark_as_started('open'); os._exit(0)", path
    )
    result = call("reap", path)
    assert (result.exit_code, result.stdout) == (0, "open\n")
    assert json.loads(call("reap", path, "--json").stdout) == []
    assert json.loads(call("show", path, "open", "--json").stdout)["result"]["type"] == "WorkerLostError"


def test_cleanup(path: Path) -> None:
    days = timedelta(days=100_000)
    assert call("cleanup", path, f"{days.days}d").stdout == "0 deleted\n"
    call("revoke", path, "open")
    assert json.loads(call("cleanup", path, "--json", "12h").stdout) == {"deleted": 2}
    assert call("cleanup", path, "soon").exit_code == 2


def test_revoke_and_resubmit(path: Path) -> None:
    assert call("revoke", path, "open").stdout == "revoked open\n"
    result = call("revoke", path, "open")
    assert (result.exit_code, result.stderr) == (1, "liteerresult: 'open' is final already\n")
    assert call("resubmit", path, "open").stdout == "resubmitted open\n"
    assert call("revoke", path, "unready", "--terminate").exit_code == 0
    result = call("resubmit", path, "text")
    assert result.exit_code == 2
    assert result.stderr == "liteerresult: task 'text' can't go from DONE to PENDING: DONE never changes\n"


# What all have in common

READING: list[tuple[str, ...]] = [
    *[("ls",), ("reap",), ("doctor",), ("cleanup", "7d")],
    *[(command, "x") for command in ("show", "wait", "join", "revoke", "resubmit")],
]


@pytest.mark.parametrize("words", READING, ids=lambda words: words[0])
def test_a_file_that_is_not_there_is_not_made(tmp_path: Path, words: tuple[str, ...]) -> None:
    command, *arguments = words
    assert call(command, tmp_path / "r.db", *arguments).exit_code == 2
    (tmp_path / "empty.db").touch()
    result = call(command, tmp_path / "empty.db", *arguments)
    assert result.exit_code == 2
    assert "is empty: not a result store" in result.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["empty.db"]


@pytest.mark.parametrize("words", [*READING, ("run", "--", "echo", ":::", "x")], ids=lambda words: words[0])
def test_another_file_is_refused_in_one_line(tmp_path: Path, words: tuple[str, ...]) -> None:
    other = tmp_path / "other.db"
    with contextlib.closing(sqlite3.connect(other, isolation_level=None)) as raw:
        raw.execute("CREATE TABLE mine (x)")
    command, *arguments = words
    result = call(command, other, *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("liteerresult: ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", ["show", "join", "revoke", "resubmit"])
def test_an_unknown_id_is_an_error(path: Path, command: str) -> None:
    result = call(command, path, "unknown")
    assert result.exit_code == 2
    assert "'unknown'" in result.stderr
    assert call("ls", path, "--group", "unknown").exit_code == 2


def test_the_version() -> None:
    assert call("--version").stdout == f"main, version {__version__}\n"
