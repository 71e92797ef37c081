"""How the command line shows tasks and groups: as JSON, as lines for other programs, as tables on a terminal."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import os
import shlex
import shutil
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Self

import click

from .connection import Database
from .errors import DecodeError
from .states import DONE, FAILURE, REVOKED

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from rich.progress import Progress, TaskID

    from .backend import TaskMeta
    from .store import ResultStore

__all__ = [
    "GROUPS",
    "GROUP_COLUMNS",
    "Report",
    "call_text",
    "detail_pairs",
    "failure_line",
    "group_details",
    "item_text",
    "leaves",
    "link",
    "metas_of",
    "one_line",
    "pretty",
    "print_csv",
    "print_json",
    "print_line",
    "print_pairs",
    "print_table",
    "result_text",
    "seconds_text",
    "stored",
    "task_details",
    "task_record",
    "tasks_in_order",
    "time_text",
]

READ_AT_ONCE = 1000
"""Tasks read by one query."""

_LIST = """
    SELECT number, id FROM tasks
    WHERE number > :after AND (:status IS NULL OR status = :status)
    AND (:group_id IS NULL OR id IN (
        WITH RECURSIVE below (id) AS (
            VALUES (:group_id)
            UNION SELECT m.child_id FROM below
            JOIN group_members AS m ON m.group_id = below.id WHERE m.child_id IS NOT NULL
        )
        SELECT m.task_id FROM below JOIN group_members AS m ON m.group_id = below.id WHERE m.task_id IS NOT NULL))
    ORDER BY number LIMIT :page"""

_NEWEST = _LIST.replace("ORDER BY number", "ORDER BY number DESC")

GROUPS = """
    SELECT id, status, size, done, failed, revoked, waiting, created_utc || 'Z' FROM group_overview
    ORDER BY created_utc, id LIMIT :limit"""

GROUP_COLUMNS = ("id", "status", "size", "done", "failed", "revoked", "waiting", "created")


def stored(payload: object, encoding: str | None = None) -> Any:
    """Return a payload as the JSON that it is in the file; nothing is rebuilt from it, so no row can do harm."""
    if isinstance(payload, bytes):
        return f"({encoding or 'blob'}, {len(payload)} bytes)"
    if not isinstance(payload, str):
        return payload
    try:
        return json.loads(payload)
    except ValueError:  # another program wrote it
        return payload


def _arguments(meta: TaskMeta) -> tuple[list[Any], dict[str, Any]]:
    try:
        args, kwargs = meta.args, meta.kwargs
    except DecodeError:
        return [], {}
    return list(args) if isinstance(args, tuple | list) else [], dict(kwargs) if isinstance(kwargs, dict) else {}


def call_text(meta: TaskMeta) -> str:
    """Return the call of a task in one line: a command as a shell would take it."""
    args, kwargs = _arguments(meta)
    if args and all(isinstance(arg, str) for arg in args) and set(kwargs) <= {"item"}:
        return shlex.join(args)
    return ", ".join([*map(repr, args), *(f"{name}={value!r}" for name, value in kwargs.items())])


def item_text(meta: TaskMeta) -> str:
    """Return what a task was for: a command's item, else its call, else its id."""
    item = _arguments(meta)[1].get("item")
    return item if isinstance(item, str) else call_text(meta) or meta.task_id


def task_record(meta: TaskMeta) -> dict[str, Any]:
    """Return a task as what JSON can hold."""
    args, kwargs = _arguments(meta)
    return {
        "id": meta.task_id,
        "name": meta.name,
        "status": meta.status,
        "item": item_text(meta),
        "result": stored(meta.payload, meta.encoding),
        "encoding": meta.encoding,
        "traceback": meta.traceback,
        "args": args,
        "kwargs": kwargs,
        "retries": meta.retries,
        "owner": meta.owner,
        "parent": meta.parent_id,
        "created_at": meta.created_at,
        "started_at": meta.started_at,
        "done_at": meta.done_at,
    }


def failure_line(result: Any) -> str:
    """Return a stored exception in one line; of a command how it ended and the last thing it said."""
    if not isinstance(result, dict):
        return "" if result is None else one_line(result)
    lines = str(result.get("text", "")).splitlines()
    text = f"{lines[0]}: {lines[-1]}" if len(lines) > 1 else "".join(lines)
    name = result.get("type")
    return text if name == "CommandFailed" else ": ".join(str(part) for part in (name, text) if part)


def one_line(value: Any) -> str:
    """Return a stored value in one line."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=repr)
    return " ".join(text.split())


def result_text(meta: TaskMeta) -> str:
    """Return the result of a task for people: a command's output, any other value as JSON, a failure in one line."""
    result = stored(meta.payload, meta.encoding)
    if meta.status != DONE:
        return failure_line(result)
    if isinstance(result, dict) and result.keys() == {"returncode", "stdout", "stderr"}:
        out = result["stdout"]
        return out.rstrip("\n") if isinstance(out, str) else one_line(out)
    return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=repr)


def seconds_text(meta: TaskMeta) -> str:
    """Return how long a task took."""
    if meta.done_at is None or meta.started_at is None:
        return ""
    return f"{meta.done_at - meta.started_at:.3f}"


def time_text(unix: float | None) -> str:
    """Return a stored time in UTC."""
    if unix is None:
        return ""
    return datetime.fromtimestamp(unix, UTC).isoformat(" ", "milliseconds").replace("+00:00", "Z")


def link(target: tuple[str, bool] | None) -> dict[str, Any] | None:
    """Return a stored link as what JSON can hold."""
    return None if target is None else {"id": target[0], "kind": "group" if target[1] else "task"}


def task_details(store: ResultStore, task_id: str) -> dict[str, Any]:
    """Return a task with its attempts and family."""
    meta = store.get_task_meta(task_id)
    return {
        **task_record(meta),
        "call": call_text(meta),
        "attempts": [
            {
                "attempt": attempt.retries,
                "status": attempt.status,
                "result": stored(attempt.payload, attempt.encoding),
                "traceback": attempt.traceback,
                "started_at": attempt.started_at,
                "done_at": attempt.done_at,
            }
            for attempt in store.attempts(task_id)
        ],
        "parent": link(store.parent_of(task_id)),
        "children": [link(child) for child in store.children_of(task_id)],
    }


def group_details(store: ResultStore, group_id: str) -> dict[str, Any]:
    """Return a group with its counts and members."""
    counts = store.group_counts(group_id)
    assert counts is not None  # noqa: S101 - asked before
    members = [link(member) for member in store.group_members(group_id)]
    statuses = {
        meta.task_id: meta.status for meta in store.get_many([m["id"] for m in members if m and m["kind"] == "task"])
    }
    return {
        "id": group_id,
        "kind": "group",
        "size": counts.size,
        "done": counts.done,
        "failed": counts.failed,
        "revoked": counts.revoked,
        "waiting": counts.waiting,
        "parent": link(store.parent_of(group_id)),
        "members": [{**member, "status": statuses.get(member["id"])} for member in members if member],
    }


def detail_pairs(record: dict[str, Any]) -> Iterator[tuple[str, object]]:
    """Yield what `show` prints of a task or group."""
    for name, value in record.items():
        if value is None or value in ([], {}) or name in ("args", "kwargs", "encoding"):
            continue
        match name:
            case "created_at" | "started_at" | "done_at":
                yield name.removesuffix("_at"), time_text(value)
            case "parent":
                yield name, f"{value['kind']} {value['id']}"
            case "children":
                yield name, [f"{child['kind']} {child['id']}" for child in value]
            case "members":
                yield name, [f"{member['status'] or member['kind']:<9} {member['id']}" for member in value]
            case "attempts":
                yield name, [f"{a['attempt']}  {a['status']:<8} {failure_line(a['result'])}" for a in value]
            case "result" if isinstance(value, dict) and "type" in value and record["status"] != DONE:
                yield "exception", f"{value['type']}: {value.get('text')}"
                yield "stdout", (value.get("attributes") or {}).get("stdout", "")
            case "result" if isinstance(value, dict):
                yield name, pretty(value)
            case _:
                yield name, value


def tasks_in_order(store: ResultStore, where: dict[str, Any], limit: int | None) -> Iterator[TaskMeta]:
    """Yield tasks page by page: a query that is left unfinished would keep the WAL from being emptied."""
    with contextlib.closing(Database(store.path, "process-crash")) as database:
        after = 0
        if limit is not None:
            rows = database.read(_NEWEST, {**where, "after": 0, "page": limit})
            if not rows:
                return
            after = rows[-1][0] - 1
        while rows := database.read(_LIST, {**where, "after": after, "page": READ_AT_ONCE}):
            yield from store.get_many([row[1] for row in rows])
            after = rows[-1][0]


def metas_of(store: ResultStore, task_ids: list[str]) -> Iterator[TaskMeta]:
    """Yield the rows of tasks in the order asked."""
    for start in range(0, len(task_ids), READ_AT_ONCE):
        yield from store.get_many(task_ids[start : start + READ_AT_ONCE])


def leaves(store: ResultStore, group_id: str) -> Iterator[str]:
    """Yield the ids of a group's tasks in their order, those of nested groups included."""
    for member, is_group in store.group_members(group_id):
        if is_group:
            yield from leaves(store, member)
        else:
            yield member


# Printing


def print_json(value: Any) -> None:
    """Print *value* as JSON, on one line."""
    click.echo(json.dumps(value, ensure_ascii=False, default=repr).encode("utf-8", "surrogateescape"))


def print_csv(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows as CSV with a header."""
    for row in (columns, *rows):
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(row)
        _write(line.getvalue())


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    r"""Print rows: as a table on a terminal; else a line each under a header, tabs between, a newline inside as \n."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(*columns)
        for row in rows:
            table.add_row(*(Text(_cut(str(cell))) for cell in row))
        Console(highlight=False).print(table)
        return
    for row in (columns, *rows):
        _write("\t".join(_escaped(str(cell)) for cell in row) + "\n")


def print_pairs(pairs: Iterable[tuple[str, object]]) -> None:
    """Print names and values, a line each; lists, and the lines of a longer text, go below the name."""
    for name, value in pairs:
        lines = list(value) if isinstance(value, list) else str(value).splitlines()
        if len(lines) > 1 or isinstance(value, list):
            _write(f"{name}:\n" + "".join(f"    {line}\n" for line in lines))
        elif lines:
            _write(f"{name:<12}{lines[0]}\n")


def _write(text: str) -> None:
    # Names of files need not be text: what came in as bytes goes out as the same bytes.
    click.echo(text.encode("utf-8", "surrogateescape"), nl=False)


def print_line(text: str, *, err: bool = False) -> None:
    """Print one line."""
    click.echo(text.encode("utf-8", "surrogateescape"), err=err)


def pretty(value: Any) -> str:
    """Return a stored value as indented JSON."""
    return json.dumps(value, ensure_ascii=False, default=repr, indent=2)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")


def _cut(text: str) -> str:
    width = shutil.get_terminal_size().columns * 4
    return text if len(text) <= width else text[:width] + " ..."


class Report:
    """Tells what ended: a bar on a terminal, else a line each."""

    def __init__(self, group_id: str, total: int, as_json: bool) -> None:
        self._group_id = group_id
        self._total = total
        self._json = as_json
        self._counts = {DONE: 0, FAILURE: 0, REVOKED: 0}
        self._before = 0
        self._quiet = False
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        if sys.stdout.isatty() and not self._json:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(highlight=False))
            self._task = self._bar.add_task(self._group_id, total=self._total)
            self._bar.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        waiting = self._total - sum(self._counts.values())
        parts = [f"{self._counts[DONE]} done" + (f" ({self._before} of them before)" if self._before else "")]
        others = {"failed": self._counts[FAILURE], "revoked": self._counts[REVOKED], "waiting": waiting}
        parts += [f"{count} {word}" for word, count in others.items() if count]
        click.echo(f"group {self._group_id}: {', '.join(parts)}", err=True)

    def show(self, meta: TaskMeta, old: bool) -> None:
        """Tell of one task that ended; nothing of an *old* one, that had before."""
        self._counts[meta.status] += 1
        self._before += old
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task)
        if not old and not self._quiet:
            try:
                self._tell(meta)
            except OSError as exc:
                # `| head` has seen enough; the work goes on, and the file has the rest.
                if exc.errno != errno.EPIPE:
                    raise
                self._silence()

    def _tell(self, meta: TaskMeta) -> None:
        if self._json:
            print_json(task_record(meta))
            return
        item = one_line(item_text(meta))
        if meta.status == DONE:
            if self._bar is None:
                print_line(f"done  {item}")
            return
        if meta.status == REVOKED:
            return  # counted in the last line
        line = f"FAILED  {item}: {failure_line(stored(meta.payload, meta.encoding))}"
        if self._bar is not None:
            self._bar.console.print(line.encode(errors="replace").decode(), markup=False, soft_wrap=True)
        else:
            print_line(line, err=True)

    def _silence(self) -> None:
        self._quiet = True
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
