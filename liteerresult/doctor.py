"""
What `liteerresult doctor` looks at. Nothing here settles, repairs or changes a row.

The file is opened below `ResultStore`, which would fail the tasks of the dead on the way.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .bell import notification_in_use
from .connection import WAL_LIMIT, Database
from .errors import LiteerresultError, StoreCorrupt
from .filesystem import file_system_of
from .liveness import Owners
from .schema import prepare

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Finding", "examine", "has_wal_reset_bug"]

Level = Literal["ok", "warning", "problem"]

MOST_SHOWN = 10
"""Ids and messages given one by one; the rest is counted."""

_SCHEMA = "SELECT type, name, sql FROM sqlite_schema WHERE sql IS NOT NULL"

# Depth is limited for a file whose groups contain themselves, which only a damaged one can.
_WRONG_COUNTS = """
    WITH RECURSIVE below (root, id, depth) AS (
        SELECT id, id, 0 FROM groups
        UNION ALL
        SELECT below.root, m.child_id, depth + 1 FROM below
        JOIN group_members AS m ON m.group_id = below.id AND m.child_id IS NOT NULL
        WHERE depth < 100
    ), leaves (root, size, done, failed, revoked) AS (
        SELECT below.root, count(*), count(*) FILTER (WHERE t.status = 'DONE'),
            count(*) FILTER (WHERE t.status = 'FAILURE'), count(*) FILTER (WHERE t.status = 'REVOKED')
        FROM below JOIN group_members AS m ON m.group_id = below.id AND m.task_id IS NOT NULL
        LEFT JOIN tasks AS t ON t.id = m.task_id
        GROUP BY below.root
    ), direct (root, members, tasks_done, groups_done) AS (
        SELECT m.group_id, count(*), count(*) FILTER (WHERE t.status = 'DONE'), count(*) FILTER (WHERE g.done = g.size)
        FROM group_members AS m LEFT JOIN tasks AS t ON t.id = m.task_id LEFT JOIN groups AS g ON g.id = m.child_id
        GROUP BY m.group_id
    )
    SELECT groups.id FROM groups LEFT JOIN leaves ON leaves.root = groups.id LEFT JOIN direct ON direct.root = groups.id
    WHERE (groups.size, groups.done, groups.failed, groups.revoked,
        groups.members, groups.tasks_done, groups.groups_done)
        IS NOT (coalesce(leaves.size, 0), coalesce(leaves.done, 0), coalesce(leaves.failed, 0),
            coalesce(leaves.revoked, 0),
            coalesce(direct.members, 0), coalesce(direct.tasks_done, 0), coalesce(direct.groups_done, 0))"""

_UNNUMBERED = """
    SELECT id FROM tasks WHERE (done_number IS NOT NULL) <> (status IN ('DONE', 'FAILURE', 'REVOKED'))"""

_STATUSES = "SELECT status, count(*) FROM tasks GROUP BY status ORDER BY status"

_OWED = "SELECT owner, id FROM tasks WHERE owner IS NOT NULL AND done_number IS NULL ORDER BY number"


@dataclass(frozen=True, slots=True)
class Finding:
    """
    What one check found.

    Attributes:
        check: The check's name.
        level: ``"ok"``, ``"warning"`` or ``"problem"``.
        text: It in words.
        data: It in figures.
    """

    check: str
    level: Level
    text: str
    data: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return it as what JSON can hold."""
        return asdict(self)


def has_wal_reset_bug(version: tuple[int, int, int]) -> bool:
    """
    Tell whether a SQLite version can corrupt a WAL when a second checkpoint races a reset.

    Versions 3.7.0 to 3.51.2 can; 3.44.6 and 3.50.7 were mended in their own series.
    """
    mended = {(3, 44): 6, (3, 50): 7}
    fixed = mended.get(version[:2])
    return (3, 7, 0) <= version <= (3, 51, 2) and not (fixed is not None and version[2] >= fixed)


def examine(path: str, *, quick: bool = False) -> list[Finding]:
    """
    Look at everything.

    Args:
        path: The database file, which exists.
        quick: Leave out that indexes agree with their tables.

    Raises:
        NotAResultStore: The file is something else.
        SchemaMismatch: It is in a newer format.
        StoreError: It can't be opened.
    """
    try:
        database = Database(path, "process-crash")
    except StoreCorrupt as exc:
        return [Finding("integrity", "problem", str(exc)), *_surroundings(path)]
    try:
        owners = Owners(f"{database.path}-owners")
        checks: dict[str, Callable[[], Iterator[Finding]]] = {
            "integrity": lambda: _integrity(database, quick),
            "schema": lambda: _schema(database),
            "tasks": lambda: _tasks(database),
            "groups": lambda: _groups(database),
            "owners": lambda: _owners(database, owners),
            "wal": lambda: _wal(database),
        }
        found = []
        for name, check in checks.items():
            try:
                found += list(check())
            except LiteerresultError as exc:
                found.append(Finding(name, "problem", str(exc)))
        return [*found, *_surroundings(database.path)]
    finally:
        database.close()


def _some(names: list[str]) -> str:
    more = len(names) - MOST_SHOWN
    return ", ".join(names[:MOST_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _integrity(database: Database, quick: bool) -> Iterator[Finding]:
    pragma = "quick_check" if quick else "integrity_check"
    messages = [row[0] for row in database.read(f"PRAGMA {pragma}({MOST_SHOWN})")]
    if messages == ["ok"]:
        yield Finding("integrity", "ok", f"{pragma}: ok")
    else:
        advice = "restore a backup, or save what is left with `sqlite3 FILE .recover`"
        yield Finding("integrity", "problem", f"{pragma}: {'; '.join(messages)}; {advice}", {"messages": messages})


def _schema(database: Database) -> Iterator[Finding]:
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as fresh:
        prepare(fresh, ":memory:")
        expected = {row[:2]: row[2] for row in fresh.execute(_SCHEMA)}
    found = {row[:2]: row[2] for row in database.read(_SCHEMA) if not row[1].startswith("sqlite_")}
    missing = [" ".join(key) for key in expected if key not in found]
    changed = [" ".join(key) for key, sql in expected.items() if key in found and found[key] != sql]
    added = [" ".join(key) for key in found if key not in expected]
    if missing:
        yield Finding("schema", "problem", f"missing: {_some(missing)}", {"missing": missing})
    if changed:
        yield Finding("schema", "problem", f"not as in schema.sql: {_some(changed)}", {"changed": changed})
    if added:
        yield Finding("schema", "warning", f"added by someone: {_some(added)}", {"added": added})
    if not (missing or changed or added):
        yield Finding("schema", "ok", "as in schema.sql")


def _tasks(database: Database) -> Iterator[Finding]:
    counts = dict(database.read(_STATUSES))
    wrong = [row[0] for row in database.read(_UNNUMBERED)]
    if wrong:
        text = f"{len(wrong)} tasks whose status and completion number contradict each other: {_some(wrong)}"
        yield Finding("tasks", "problem", text, {"tasks": wrong})
    text = ", ".join(f"{count} {status}" for status, count in counts.items()) or "none"
    yield Finding("tasks", "ok", text, {"counts": counts})


def _groups(database: Database) -> Iterator[Finding]:
    total = database.read("SELECT count(*) FROM groups")[0][0]
    wrong = [row[0] for row in database.read(_WRONG_COUNTS)]
    if wrong:
        text = f"{len(wrong)} of {total} groups are counted wrong: {_some(wrong)}"
        yield Finding("groups", "problem", text, {"groups": wrong})
    else:
        yield Finding("groups", "ok", f"{total} groups, counts recomputed and equal", {"groups": total})


def _owners(database: Database, owners: Owners) -> Iterator[Finding]:
    recorded = [row[0] for row in database.read("SELECT id FROM owners ORDER BY started_at")]
    owed: dict[str, list[str]] = {}
    for owner, task_id in database.read(_OWED):
        owed.setdefault(owner, []).append(task_id)
    alive = {owner: owners.is_alive(owner) for owner in {*recorded, *owed}}
    living = [owner for owner in alive if alive[owner]]
    dead = [owner for owner in alive if not alive[owner]]
    orphans = [task_id for owner in dead for task_id in owed.get(owner, ())]
    if orphans:
        text = (
            f"{len(orphans)} tasks of processes that are dead: {_some(orphans)}; "
            "`liteerresult reap`, and whoever waits or opens the store, fails them"
        )
        yield Finding("orphans", "problem", text, {"tasks": orphans})
    else:
        yield Finding("orphans", "ok", "no task is owned by a dead process")
    working = Counter({owner: len(owed.get(owner, ())) for owner in living})
    text = f"{len(living)} alive, {len(dead)} dead"
    if living:
        text += f"; alive: {_some([f'{owner} ({count} tasks)' for owner, count in working.items()])}"
    yield Finding("owners", "ok", text, {"alive": dict(working), "dead": dead})


def _wal(database: Database) -> Iterator[Finding]:
    size = os.stat(database.path + "-wal").st_size
    connection = database.connection()
    try:
        # Two checkpoints at once are what the bug that `_sqlite` tells of needs.
        with database.queued():  # a checkpoint can't run inside `transact`
            busy, log, checkpointed = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    except sqlite3.Error as exc:
        raise database.mapped(exc) from exc
    data = {"bytes": size, "frames": log, "checkpointed": checkpointed, "busy": bool(busy)}
    text = f"{size:,} bytes"
    if busy or checkpointed < log:
        held = f"{log - checkpointed} of {log} pages can't be copied into the database"
        text += f"; {held}: a program keeps a transaction open (an unfinished query?)"
        yield Finding("wal", "warning", text, data)
    elif size > WAL_LIMIT:
        yield Finding("wal", "warning", f"{text}: large; nothing holds it now, so it will shrink with use", data)
    else:
        yield Finding("wal", "ok", f"{text}, held by no reader", data)


def _surroundings(path: str) -> Iterator[Finding]:
    yield from _sqlite()
    kind = file_system_of(os.path.dirname(path))
    yield Finding("file system", "ok", kind or "unknown", {"kind": kind})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        way = notification_in_use()
    limits = {name: _inotify_limit(name) for name in ("max_user_instances", "max_user_watches")}
    text = ", ".join([way, *(f"{name} {value}" for name, value in limits.items() if value is not None)])
    text += "".join(f"; {warning.message}" for warning in caught)
    yield Finding("notification", "warning" if caught else "ok", text, {"in_use": way, **limits})


def _sqlite() -> Iterator[Finding]:
    version = sqlite3.sqlite_version
    major, minor, patch = sqlite3.sqlite_version_info[:3]
    data = {"version": version}
    if has_wal_reset_bug((major, minor, patch)):
        text = (
            f"{version} can damage a WAL when two checkpoints meet (mended in 3.51.3, 3.50.7 and 3.44.6); "
            "small risk here: this library's writers checkpoint one at a time, so only another program's "
            "checkpoint could be the second"
        )
        yield Finding("sqlite", "warning", text, data)
    else:
        yield Finding("sqlite", "ok", version, data)


def _inotify_limit(name: str) -> int | None:
    try:
        return int(Path("/proc/sys/fs/inotify", name).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
