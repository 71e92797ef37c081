"""Connections and the one way to write: queue, transaction, sync.

A process has one connection per thread. Writers of this library queue on a kernel lock instead of
SQLite's sleep-and-retry; a power-loss commit is synced after that lock is released, so that the
syncs of several processes overlap. ``docs/design.md`` argues why nothing is lost that way.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import sqlite3
import sys
import threading
import time
import warnings
import weakref
from collections import deque
from threading import get_ident
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from .errors import EncodeError, NotAResultStore, StoreBusy, StoreCorrupt, StoreError
from .filesystem import check_path
from .forking import ForkGate
from .groupcommit import Batch, Statement, call_next, leave, those_waiting
from .schema import check_format, prepare

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

__all__ = ["Database", "Durability", "Refused"]

Durability = Literal["power-loss", "process-crash"]

BUSY_TIMEOUT = 5.0
"""How long to wait for a lock that another program holds, in seconds."""

CHECKPOINT_PAGES = 2000
"""The commit that brings the WAL to this many pages copies them into the database (4 MB)."""

WAL_LIMIT = 64 << 20
"""A WAL above this many bytes is warned about, and cut back to it once it can be."""

_T = TypeVar("_T")
_SYNC_AFTER_RELEASE = sys.platform == "linux"
_WAL_CHECK_EVERY = 512

_databases: weakref.WeakSet[Database] = weakref.WeakSet()
_gate = ForkGate(_databases)  # type: ignore[arg-type]  # a WeakSet is invariant
_inside = _gate.inside

_serials = itertools.count()  # tell a connection from one that had the same place in memory

# Connections of a fork that could not be prepared: using or closing them in the child would disturb the parent.
_abandoned: list[object] = []


class Refused(Exception):
    """A trigger of schema.sql aborted the statement; ``args[0]`` is its reason."""


class _Connection:
    """A thread's connection, closed when the thread ends."""

    def __init__(self, raw: sqlite3.Connection, owner: Database) -> None:
        self.raw = raw
        self.serial = next(_serials)
        self.pid = os.getpid()
        self._owner = weakref.ref(owner)

    def __del__(self, getpid: Callable[[], int] = os.getpid) -> None:  # at exit `os` may be gone already
        if self.pid != getpid():
            _abandoned.append(self.raw)
            return
        owner = self._owner()
        if owner is not None:
            owner.release(self.raw)
        else:
            self.raw.close()


class Database:
    """
    The file: a connection for each thread, and `transact` for every change.

    Args:
        path: The database file; created if there is none.
        durability: ``"power-loss"``: what was acknowledged survives the machine going down.
            ``"process-crash"``: it survives any death of processes, and is faster.

    Raises:
        ValueError: *durability* is not one of the two, or *path* is not a file's path.
        StoreError: The path can't be used; subclasses say more closely why.
    """

    def __init__(self, path: str | os.PathLike[str], durability: Durability = "power-loss") -> None:
        if durability not in get_args(Durability):
            msg = f"durability is 'power-loss' or 'process-crash', not {durability!r}"
            raise ValueError(msg)
        self.path = check_path(path)
        self.durability = durability
        self._syncs = durability == "power-loss" and _SYNC_AFTER_RELEASE
        self.closed = False
        self.ring: Callable[[Collection[str] | None], None] = _nobody
        """Called when a change lasts, with the ids of the tasks that it is about; None: any."""
        self._warned_at = WAL_LIMIT
        self._reset()
        _databases.add(self)
        ident = get_ident()
        inner = ident in _inside
        try:
            if not inner:
                _inside.add(ident)
            if _gate.is_shut:
                _gate.wait(ident)
            with self.mapped_errors():
                check_format(self.path, BUSY_TIMEOUT)  # before anything is made beside a file that is not ours
                self.connection()
        except BaseException:
            self.close(unused=True)
            raise
        finally:
            if not inner:
                _inside.discard(ident)

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._local = threading.local()
        self._raw: set[sqlite3.Connection] = set()
        self._guard = threading.Lock()
        self._turn = threading.RLock()  # it knows whose it is; nobody takes it twice
        self._line: deque[Statement] = deque()
        self._batch: Batch | None = None
        """What the thread that has the turn commits just now for others too."""
        self._sync_turn = threading.RLock()  # a signal handler may write, too
        self._synced = 0
        self._lock_fd = -1
        self._wal_fd = -1
        self._commits = self._checked = 0
        self._unclean_fork = False
        self._sync_failed = False

    # Connections

    def connection(self) -> sqlite3.Connection:
        """Return this thread's connection, opened on first use."""
        try:
            return self._local.connection.raw  # type: ignore[no-any-return]
        except AttributeError:
            pass
        if self.closed:
            msg = f"the store {self.path} is closed"
            raise StoreError(msg, path=self.path)
        if self._unclean_fork:
            msg = f"{self.path}: this process was forked while its parent was writing; start it by spawn or forkserver"
            raise StoreError(msg, path=self.path)
        with self.mapped_errors():
            if self._lock_fd < 0:
                self._lock_fd = self.open_side_file("-lock")
            raw = self._connect()
        self._local.connection = _Connection(raw, self)
        return raw

    def _connect(self) -> sqlite3.Connection:
        raw = sqlite3.connect(
            self.path,
            timeout=BUSY_TIMEOUT,
            isolation_level=None,
            check_same_thread=False,  # close() closes the connections of all threads
            cached_statements=256,
        )
        try:
            with self.queued():
                prepare(raw, self.path)
            full = self.durability == "power-loss" and not self._syncs
            raw.execute(f"PRAGMA synchronous = {'FULL' if full else 'NORMAL'}")
            raw.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
            raw.execute(f"PRAGMA journal_size_limit = {WAL_LIMIT}")
            # Else SQLite allocates 64 KB for each statement that a trigger may abort, and the C library gives
            # them back to the system every time: up to five times the cost of the whole statement.
            raw.execute("PRAGMA temp_store = MEMORY")
            with self._guard:
                self._open_wal()
                self._raw.add(raw)
        except BaseException:
            raw.close()
            raise
        return raw

    def _open_wal(self) -> None:
        # SQLite keeps no locks on the WAL, so opening it by hand is safe (the database and -shm are
        # not). It is removed only when no connection is left anywhere: a new connection looks anew.
        path = self.path + "-wal"
        if self._wal_fd >= 0:
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(self._wal_fd), os.stat(path)):
                    return
            os.close(self._wal_fd)
            self._wal_fd = -1
        self._wal_fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._sync_folder()  # a WAL that was made anew has a new name to make last

    def open_side_file(self, suffix: str) -> int:
        """Open (create) a file beside the database, readable and writable for the same users."""
        fd = os.open(self.path + suffix, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        with contextlib.suppress(OSError):  # not our file, or no database yet
            mode = os.stat(self.path).st_mode & 0o777
            if os.fstat(fd).st_mode & 0o777 != mode:
                os.fchmod(fd, mode)
        return fd

    def _sync_folder(self) -> None:
        if self.durability == "power-loss":
            fd = os.open(os.path.dirname(self.path), os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def release(self, raw: sqlite3.Connection) -> None:
        """Close the connection of a thread that ended."""
        ident = get_ident()
        inner = ident in _inside  # the garbage collector may come by at any time
        try:
            if not inner:
                _inside.add(ident)
                if _gate.is_shut:
                    _gate.wait(ident)
            self._raw.discard(raw)
            raw.close()
        finally:
            if not inner:
                _inside.discard(ident)

    def close(self, *, unused: bool = False) -> None:
        """
        Close this process's connections, of all threads, once those that are at work have finished.

        Args:
            unused: True if no other thread can be at work: then nobody is waited for.
        """
        if self.closed:
            return
        self.closed = True
        if not unused:
            _gate.shut()
        try:
            self.before_fork()
            for fd in (self._wal_fd, self._lock_fd):
                if fd >= 0:
                    os.close(fd)
            self._wal_fd = self._lock_fd = -1
        finally:
            if not unused:
                _gate.reopen()

    def before_fork(self) -> None:
        """Close the connections of all threads; they open new ones when they next need them."""
        with self._guard:
            connections, self._raw = self._raw, set()
        self._local = threading.local()
        for raw in connections:
            raw.close()

    def after_fork_in_child(self, *, clean: bool) -> None:
        """Begin anew, without the parent's descriptors."""
        _abandoned.append((self._local, self._raw))
        # The lock belongs to the open file that parent and child now share: closing this copy
        # releases nothing, keeping it would hold the parent's lock beyond the parent's death.
        for fd in (self._wal_fd, self._lock_fd):
            if fd >= 0:
                os.close(fd)
        self._reset()
        self._unclean_fork = not clean

    # Reading

    def read(self, sql: str, parameters: Sequence[Any] | dict[str, Any] = ()) -> list[Any]:
        """Run a query to its end: an unfinished one would pin the WAL."""
        ident = get_ident()
        inner = ident in _inside
        try:
            if not inner:
                _inside.add(ident)
                if _gate.is_shut:
                    _gate.wait(ident)
            connection = self.connection()
            try:
                return connection.execute(sql, parameters).fetchall()
            except sqlite3.OperationalError as exc:
                if getattr(exc, "sqlite_errorcode", None) is not None:
                    raise
                # The module itself refused: text that is not UTF-8. It is left as bytes for the decoder to name.
                connection.text_factory = _text_or_bytes
                try:
                    return connection.execute(sql, parameters).fetchall()
                finally:
                    connection.text_factory = str
        except sqlite3.Error as exc:
            raise self.mapped(exc) from exc
        finally:
            if not inner:
                _inside.discard(ident)

    def version(self) -> tuple[int, int, int]:
        """
        Return what is another tuple than the last time in this thread if anybody has committed since.

        SQLite's ``data_version`` moves for the commits of every other connection, in this process too; the second
        number counts this connection's own. A connection that was opened anew begins anew, so it has its own first one.
        """
        ident = get_ident()
        inner = ident in _inside
        try:
            if not inner:
                _inside.add(ident)
                if _gate.is_shut:
                    _gate.wait(ident)
            ((others,),) = self.read("PRAGMA data_version")
            connection = self._local.connection
            return connection.serial, connection.raw.total_changes, others
        finally:
            if not inner:
                _inside.discard(ident)

    # Writing

    def transact(
        self,
        operation: Callable[[sqlite3.Connection], _T],
        *,
        task_ids: Collection[str] | None = None,
        durable: bool = True,
    ) -> _T:
        """
        Run *operation* in one write transaction, behind the other writers.

        Args:
            operation: Gets the connection. What it raises rolls the transaction back.
            task_ids: The tasks whose waiters are woken; None for all waiters.
            durable: False leaves the power-loss sync, and the bell, to a later `sync`.

        Raises:
            Refused: A trigger refused a change.
            StoreError: The file can't be written; nothing was changed.
        """
        started = time.monotonic()
        ident = get_ident()
        inner = ident in _inside
        try:
            if not inner:
                _inside.add(ident)
                if _gate.is_shut:
                    _gate.wait(ident)
            elif self._turn._is_owned():  # type: ignore[attr-defined]
                raise self._nested()
            connection = self.connection()
            try:
                self._begin_turn(connection)
                connection.execute("BEGIN IMMEDIATE")
                value = operation(connection)
                connection.execute("COMMIT")
                self._commits += 1
                self._end_turn()
            except BaseException:
                self._recover(connection)
                raise
            if durable:
                self._sync()
                self.ring(task_ids)
            self._check_wal()
        except sqlite3.Error as exc:
            raise self.mapped(exc, time.monotonic() - started) from exc
        finally:
            if not inner:
                _inside.discard(ident)
        return value

    def execute(self, sql: str, parameters: Sequence[Any], task_id: str) -> int:
        """
        Run one statement as `transact` would, alone (SQLite needs no BEGIN and COMMIT then) or with other threads'.

        Args:
            sql: The statement.
            parameters: Its parameters.
            task_id: The task that it changes.

        Returns:
            How many rows it changed.

        Raises:
            Refused: A trigger refused a change.
            StoreError: The file can't be written; nothing was changed.
        """
        started = time.monotonic()
        ident = get_ident()
        inner = ident in _inside
        try:
            if not inner:
                _inside.add(ident)
                if _gate.is_shut:
                    _gate.wait(ident)
            elif self._turn._is_owned():  # type: ignore[attr-defined]
                raise self._nested()
            connection = self.connection()
            try:
                self._check_turn(connection)
                if not self._turn.acquire(blocking=False):
                    return self._stand_in_line(connection, Statement(sql, parameters, task_id))
                self._queue()
                if self._line:
                    return self._lead(connection, Statement(sql, parameters, task_id))
                changed = connection.execute(sql, parameters).rowcount
                if changed and not self._syncs:
                    self.ring((task_id,))
                self._commits += 1
                self._end_turn()
            except BaseException:
                self._recover(connection)
                raise
            self._confirm(changed, task_id)
        except sqlite3.Error as exc:
            raise self.mapped(exc, time.monotonic() - started) from exc
        finally:
            if not inner:
                _inside.discard(ident)
        return changed

    def _confirm(self, changed: int, task_id: str) -> None:
        """Make what a lone statement changed last, and wake who waits for it."""
        if changed and self._syncs:
            self._sync()
            self.ring((task_id,))
        self._check_wal()

    def sync(self, task_ids: Collection[str] | None = None) -> None:
        """
        Return once every commit of this process so far survives power loss, if this store promises that, and ring.

        Args:
            task_ids: The tasks whose waiters are woken; None for all waiters.

        Raises:
            StoreError: The disk refused: the commits stand, and may be lost if the machine goes down.
        """
        ident = get_ident()
        inner = ident in _inside
        try:
            if not inner:
                _inside.add(ident)
                if _gate.is_shut:
                    _gate.wait(ident)
            self.connection()  # holds the WAL in place
            self._sync()
            self.ring(task_ids)
        finally:
            if not inner:
                _inside.discard(ident)

    def _sync(self) -> None:
        """See that all which this process has committed lasts: sync, unless another thread's sync began after it."""
        if not self._syncs:
            return
        wanted = self._commits
        with self._sync_turn:
            if self._sync_failed:
                raise self._unconfirmed()
            if self._synced >= wanted:
                return
            reached = self._commits
            try:
                os.fdatasync(self._wal_fd)
            except OSError as exc:
                # The system reports a lost write once: a later sync would succeed over the gap.
                self._sync_failed = True
                msg = f"{self.path}: committed, but the disk did not confirm it ({exc})"
                raise StoreError(msg, path=self.path) from exc
            self._synced = max(self._synced, reached)

    def _nested(self) -> StoreError:
        msg = f"{self.path}: this thread is in a write already; let signal handlers and finalizers use another thread"
        return StoreError(msg, path=self.path)

    def _unconfirmed(self) -> StoreError:
        msg = f"{self.path}: the disk did not confirm an earlier commit; see to it, then open the store anew"
        return StoreError(msg, path=self.path)

    def _check_wal(self) -> None:
        if self._commits - self._checked < _WAL_CHECK_EVERY:
            return
        self._checked = self._commits
        size = os.fstat(self._wal_fd).st_size
        if size > self._warned_at:
            self._warned_at = 2 * size
            warnings.warn(
                f"{self.path}-wal has grown to {size >> 20} MB: some reader keeps a transaction open "
                f"(an unfinished query in another program?); the file shrinks once it ends",
                RuntimeWarning,
                stacklevel=4,
            )

    # A turn: the writers' queue. Ctrl-C can come after any call, so taking and giving it back are inside one
    # `try` whose handler finds out what is held; `_check_turn` does the same for what a second Ctrl-C left.

    def _check_turn(self, connection: sqlite3.Connection | None) -> None:
        if self._turn._is_owned():  # type: ignore[attr-defined]  # what Condition uses
            self._recover(connection)

    def _begin_turn(self, connection: sqlite3.Connection | None) -> None:
        self._check_turn(connection)
        self._turn.acquire()
        self._queue()

    def _queue(self) -> None:
        fcntl.flock(self._lock_fd, fcntl.LOCK_EX)
        if self._sync_failed:
            raise self._unconfirmed()

    def _end_turn(self) -> None:
        fcntl.flock(self._lock_fd, fcntl.LOCK_UN)
        self._turn.release()
        if self._line:
            call_next(self._line)

    def _recover(self, connection: sqlite3.Connection | None) -> None:
        """Give back whatever this thread holds of a turn, and roll back what it left open."""
        if not self._turn._is_owned():  # type: ignore[attr-defined]
            return
        self._commits += 1  # there may have been one: the next sync is not to be spared
        try:
            in_transaction = connection is not None and connection.in_transaction
            if self._batch is not None:
                self._batch.interrupted(in_transaction=in_transaction)
            if connection is not None and in_transaction:
                self._roll_back(connection)
        finally:
            batch, self._batch = self._batch, None
            try:
                fcntl.flock(self._lock_fd, fcntl.LOCK_UN)
            finally:
                while self._turn._is_owned():  # type: ignore[attr-defined]
                    self._turn.release()
                if batch is not None and batch.error is not None:
                    batch.end()
                elif batch is not None:
                    batch.wake()
                call_next(self._line)

    def _roll_back(self, connection: sqlite3.Connection) -> None:
        try:
            connection.execute("ROLLBACK")
        except sqlite3.Error:  # then it is of no use any more; the next call opens another
            del self._local.connection

    @contextlib.contextmanager
    def queued(self) -> Iterator[None]:
        """Hold the writers' lock without a transaction."""
        try:
            self._begin_turn(None)
            yield
        finally:
            self._recover(None)

    # Standing in line: see `groupcommit`

    def _stand_in_line(self, connection: sqlite3.Connection, statement: Statement) -> int:
        try:
            if not self._line_up(statement):
                return self._outcome(statement)
            self._queue()
            return self._lead(connection, statement)
        except BaseException:
            statement.gone = True  # else the next leader would run it, long after its caller was told otherwise
            raise

    def _lead(self, connection: sqlite3.Connection, statement: Statement) -> int:
        """Commit *statement* and all that stand in line, by the thread that has the turn."""
        batch = self._batch = Batch(those_waiting(self._line, statement))
        batch.commit(connection)
        # No call between: who sees that it is committed must not find an older sync good enough.
        self._commits += 1
        batch.committed = True
        leave(self._line)
        self._batch = None
        try:
            self._end_turn()
            task_ids = [statement.task_id for statement in batch.statements if statement.changed]
            if task_ids:
                self._sync()
                self.ring(task_ids)
        except Exception as exc:
            batch.end(exc)
            raise
        except BaseException:  # Ctrl-C: the others see to the sync
            batch.wake()
            raise
        batch.end()
        self._check_wal()
        return self._outcome(statement)

    def _line_up(self, statement: Statement) -> bool:
        """Wait until another thread has committed *statement*; or return True, with the turn, to do it here."""
        self._line.append(statement)
        while True:
            batch = statement.batch
            if batch is not None and (batch.ended or batch.error is not None):
                return False
            if statement.waits and self._turn.acquire(blocking=False):
                if statement.waits:
                    return True
                self._turn.release()
                call_next(self._line)
            statement.park()
            batch = statement.batch
            if batch is not None and batch.committed and not batch.ended:
                # The sync takes long, or the leader was interrupted before it.
                self._sync()
                self.ring((statement.task_id,))
                return False

    def _outcome(self, statement: Statement) -> int:
        error = statement.error or (statement.batch.error if statement.batch is not None else None)
        if error is not None:
            raise error
        return statement.changed

    # Errors

    @contextlib.contextmanager
    def mapped_errors(self) -> Iterator[None]:
        """Turn driver and system errors into this package's."""
        started = time.monotonic()
        try:
            yield
        except sqlite3.Error as exc:
            raise self.mapped(exc, time.monotonic() - started) from exc
        except OSError as exc:
            if isinstance(exc, StoreError):
                raise
            msg = f"{self.path}: {exc.strerror or exc}"
            if exc.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                msg += "; a store needs to write the file and the folder it is in"
            raise StoreError(msg, path=self.path) from exc

    def mapped(self, exc: sqlite3.Error, waited: float = 0.0) -> Exception:
        """Return this package's error for a driver's, by its code."""
        code = getattr(exc, "sqlite_errorcode", None)
        name = getattr(exc, "sqlite_errorname", None)
        if code is None:  # raised by the sqlite3 module itself
            return StoreError(f"{self.path}: {exc}", path=self.path)
        if code == sqlite3.SQLITE_CONSTRAINT_TRIGGER:
            return Refused(str(exc))
        primary = code & 0xFF
        if primary == sqlite3.SQLITE_TOOBIG:
            return EncodeError(
                "the value is larger than SQLite's limit of 1 GB", remedy="store a file and record its path"
            )
        kind, advice = _KINDS.get(primary, (StoreError, ""))
        if primary == sqlite3.SQLITE_BUSY:
            advice = f"another program holds the lock; waited {waited:.1f} s"
        error = kind(
            f"{self.path}: {exc}{'; ' if advice else ''}{advice}",
            path=self.path,
            sqlite_errorcode=code,
            sqlite_errorname=name,
        )
        if isinstance(error, StoreBusy):
            error.waited = waited
        return error


_KINDS: dict[int, tuple[type[StoreError], str]] = {
    sqlite3.SQLITE_BUSY: (StoreBusy, ""),
    sqlite3.SQLITE_LOCKED: (StoreBusy, ""),
    sqlite3.SQLITE_CORRUPT: (
        StoreCorrupt,
        "the file is damaged: restore a backup, or save what is left with `sqlite3 FILE .recover`",
    ),
    sqlite3.SQLITE_NOTADB: (NotAResultStore, "it was left as it was"),
    sqlite3.SQLITE_FULL: (StoreError, "nothing was written; free some room and try again"),
    sqlite3.SQLITE_READONLY: (StoreError, "a store needs to write the file and the folder it is in"),
    sqlite3.SQLITE_CANTOPEN: (StoreError, "is the folder there, and writable?"),
    sqlite3.SQLITE_IOERR: (StoreError, "nothing was written; the disk or file system reported an error"),
}


def _nobody(_: Collection[str] | None) -> None:
    """Ring no bell."""


def _text_or_bytes(raw: bytes) -> str | bytes:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw
