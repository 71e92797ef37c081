"""The file's format: made from ``schema.sql``, recognised, and brought up to date."""

from __future__ import annotations

import os
import sqlite3
from typing import TYPE_CHECKING

from .errors import NotAResultStore, SchemaMismatch, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import sqlite_utils

    Migrations = Mapping[int, Callable[["sqlite_utils.Database"], None]]

__all__ = ["APPLICATION_ID", "FORMAT", "check_format", "prepare"]

APPLICATION_ID = 0x6C657272
"""``PRAGMA application_id`` of a store: "lerr"."""

FORMAT = 1
"""``PRAGMA user_version`` that this code writes."""

OLDEST_SQLITE = (3, 38, 0)

MIGRATIONS: Migrations = {}
"""For each older format, the step to the next one. Format 1 is the first."""


def check_format(path: str, timeout: float = 5.0) -> bool:
    """
    Tell whether there is a store at *path*, without changing a byte of what is there.

    Args:
        path: The file.
        timeout: How long to wait for another program's lock, in seconds.

    Returns:
        False if there is no file, or an empty one.

    Raises:
        NotAResultStore: It is something else.
        SchemaMismatch: It is in a newer format.
    """
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        msg = f"SQLite {sqlite3.sqlite_version} is too old: a store needs 3.38.0 or newer"
        raise StoreError(msg, path=path)
    has_wal = os.path.exists(path + "-wal")
    try:
        size = os.stat(path).st_size
    except FileNotFoundError:
        return False
    if size == 0 and not has_wal:
        return False
    if size == 1:  # SQLite would take it for an empty database
        msg = f"{path} is not a SQLite database; it was left as it was"
        raise NotAResultStore(msg, path=path)
    # "immutable" looks at the file alone and leaves nothing beside it; what matters is seldom in the WAL only.
    try:
        if _look(path, "immutable=1", timeout) or not has_wal:
            return True
    except sqlite3.DatabaseError:
        if not has_wal:
            raise
    application, found = _wal_header(path)
    if application is None:
        return False
    if application != APPLICATION_ID:
        msg = f"{path} is a SQLite database of another application; it was left as it was"
        raise NotAResultStore(msg, path=path)
    return found > 0


def _wal_header(path: str) -> tuple[int | None, int]:
    """
    Return application_id and user_version as the WAL's newest first page has them; None if it has none.

    SQLite itself would leave a -shm file beside the WAL. Reading the WAL by hand is safe, unlike the
    database: SQLite keeps no locks on it.

    Source:
        "WAL File Format" and "The Database Header" in SQLite's file format documentation.
    """
    found: tuple[int | None, int] = (None, 0)
    with open(path + "-wal", "rb") as wal:
        header = wal.read(32)
        if len(header) < 32:  # noqa: PLR2004 - the size of the header
            return found
        page_size, salts = int.from_bytes(header[8:12], "big"), header[16:24]
        while len(frame := wal.read(24)) == 24 and frame[8:16] == salts:  # noqa: PLR2004 - the size of a frame's header
            page = wal.read(page_size)
            if frame[:4] == b"\0\0\0\1" and len(page) == page_size:
                found = int.from_bytes(page[68:72], "big"), int.from_bytes(page[60:64], "big")
    return found


def _look(path: str, mode: str, timeout: float) -> int:
    # What SQLite's URIs need; urllib would take longer to import than all of this to run.
    name = path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    raw = sqlite3.connect(f"file:{name}?{mode}", uri=True, isolation_level=None, timeout=timeout)
    try:
        return _identify(raw, path)
    finally:
        raw.close()


def _identify(raw: sqlite3.Connection, path: str) -> int:
    """Return the format of the open file, 0 for a new one; refuse any that is not ours to use."""
    (application,) = raw.execute("PRAGMA application_id").fetchone()
    (found,) = raw.execute("PRAGMA user_version").fetchone()
    if application == APPLICATION_ID:
        if found > FORMAT:
            msg = f"{path} is in format {found}, this liteerresult knows formats up to {FORMAT}: install a newer one"
            error = SchemaMismatch(msg, path=path)
            error.found, error.known = found, FORMAT
            raise error
        return int(found)
    (tables,) = raw.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if application or found or tables:
        msg = f"{path} is a SQLite database of another application; it was left as it was"
        raise NotAResultStore(msg, path=path)
    return 0


def prepare(raw: sqlite3.Connection, path: str, migrations: Migrations = MIGRATIONS, target: int = FORMAT) -> None:
    """
    Make the open file a store of the current format, in one transaction: wholly or not at all.

    The caller holds the writers' lock. A file that is up to date is only read.
    """
    found = _identify(raw, path)
    if found == target:
        return
    if found == 0:
        raw.execute("PRAGMA page_size = 2048")
        raw.execute("PRAGMA journal_mode = WAL")  # can't be changed inside a transaction
    raw.execute("BEGIN IMMEDIATE")
    try:
        found = _identify(raw, path)
        if found == 0:
            for statement in _statements():
                raw.execute(statement)
        else:
            _migrate(raw, path, found, migrations, target)
        raw.execute("COMMIT")
    except BaseException:
        if raw.in_transaction:
            raw.execute("ROLLBACK")
        raise


def _statements() -> list[str]:
    """Return the statements of schema.sql; ``executescript`` would commit before it starts."""
    from importlib import resources

    text = resources.files(__package__).joinpath("schema.sql").read_text(encoding="utf-8")
    statements, current = [], ""
    for line in text.splitlines(keepends=True):
        if line.startswith("--") and not current:
            continue
        current += line
        if sqlite3.complete_statement(current):
            if current.strip():
                statements.append(current.strip())
            current = ""
    return statements


def _migrate(raw: sqlite3.Connection, path: str, found: int, migrations: Migrations, target: int) -> None:
    import sqlite_utils  # 70 ms, and needed once in a file's life

    for version in range(found, target):
        if version not in migrations:
            msg = f"{path} is in format {version}, which this liteerresult can't bring to format {target}"
            error = SchemaMismatch(msg, path=path)
            error.found, error.known = found, target
            raise error
        # Inside our transaction its atomic() nests as a savepoint and commits nothing.
        migrations[version](sqlite_utils.Database(raw, execute_plugins=False, recursive_triggers=False))
    raw.execute(f"PRAGMA user_version = {target}")
