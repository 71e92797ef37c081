"""Transactions, the writers' queue, durability, threads, and what driver errors become."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest

from liteerresult import EncodeError, NotAResultStore, ResultStore, StoreBusy, StoreCorrupt, StoreError, connection
from liteerresult.connection import Database, Refused
from tests.support import DEADLINE, Child, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = Database(tmp_path / "results.db", "process-crash")
    yield opened
    opened.close()


def insert(task_id: str, status: str = "PENDING") -> Any:
    return lambda raw: raw.execute("INSERT INTO tasks (id, status) VALUES (?, ?)", (task_id, status)).rowcount


def ids(database: Database) -> list[str]:
    return [row[0] for row in database.read("SELECT id FROM tasks ORDER BY id")]


class TestVersion:
    def test_stays_while_nobody_commits(self, database: Database) -> None:
        database.transact(insert("a"))
        before = database.version()
        assert ids(database) == ["a"]
        with closing(sqlite3.connect(database.path)) as other:
            assert other.execute("SELECT id FROM tasks").fetchall() == [("a",)]
        assert database.version() == before

    @pytest.mark.parametrize("who", ["this thread", "another thread", "another program"])
    def test_moves_with_each_commit(self, database: Database, who: str) -> None:
        seen = {database.version()}
        for number in range(10):
            if who == "this thread":
                database.transact(insert(f"{number}"))
            elif who == "another thread":
                with ThreadPoolExecutor() as pool:
                    pool.submit(database.transact, insert(f"{number}")).result()
            else:
                with closing(sqlite3.connect(database.path)) as other:
                    insert(f"{number}")(other)
                    other.commit()
            seen.add(database.version())
        assert len(seen) == 11

    def test_moves_with_a_new_connection(self, database: Database) -> None:
        seen = set()
        for _ in range(10):
            seen.add(database.version())
            database.before_fork()
        assert len(seen) == 10


class TestTransact:
    def test_commits_and_returns_the_value(self, database: Database) -> None:
        assert database.transact(insert("a")) == 1
        assert ids(database) == ["a"]
        with closing(sqlite3.connect(database.path)) as other:
            assert other.execute("SELECT id FROM tasks").fetchall() == [("a",)]

    @pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(1), GeneratorExit()])
    def test_rolls_back_what_raises(self, database: Database, error: BaseException) -> None:
        def operation(raw: sqlite3.Connection) -> None:
            insert("a")(raw)
            raise error

        with pytest.raises(type(error)) as caught:
            database.transact(operation)
        assert caught.value is error
        assert ids(database) == []
        assert database.transact(insert("b")) == 1  # neither lock nor transaction is left
        assert ids(database) == ["b"]

    def test_the_operation_runs_in_a_write_transaction(self, database: Database) -> None:
        def operation(raw: sqlite3.Connection) -> bool:
            with (
                closing(sqlite3.connect(database.path, timeout=0)) as other,
                pytest.raises(sqlite3.OperationalError) as caught,
            ):
                other.execute("BEGIN IMMEDIATE")
            assert caught.value.sqlite_errorcode == sqlite3.SQLITE_BUSY
            return raw.in_transaction

        assert database.transact(operation)

    def test_an_operation_that_rolled_back_itself(self, database: Database) -> None:
        """SQLite itself does on some errors: the second ROLLBACK must not hide the cause."""

        def operation(raw: sqlite3.Connection) -> None:
            raw.execute("ROLLBACK")
            raise ValueError("cause")

        with pytest.raises(ValueError, match="cause"):
            database.transact(operation)

    def test_refused(self, database: Database) -> None:
        database.transact(insert("a", "DONE"))
        with pytest.raises(Refused, match="the task is final") as caught:
            database.transact(lambda raw: raw.execute("UPDATE tasks SET status = 'FAILURE'"))
        assert caught.value.args[0].startswith("the task is final")
        assert isinstance(caught.value.__cause__, sqlite3.IntegrityError)
        assert not isinstance(caught.value, StoreError)

    def test_a_statement_before_the_refused_one_is_undone(self, database: Database) -> None:
        database.transact(insert("a", "DONE"))

        def operation(raw: sqlite3.Connection) -> None:
            insert("b")(raw)
            raw.execute("UPDATE tasks SET status = 'FAILURE' WHERE id = 'a'")

        with pytest.raises(Refused):
            database.transact(operation)
        assert ids(database) == ["a"]

    def test_other_constraints_are_store_errors(self, database: Database) -> None:
        with pytest.raises(StoreError) as caught:
            database.transact(insert(""))
        assert caught.value.sqlite_errorname == "SQLITE_CONSTRAINT_CHECK"
        assert caught.value.path == database.path

    def test_wrong_sql(self, database: Database) -> None:
        with pytest.raises(StoreError, match="no such table"):
            database.read("SELECT * FROM absent")
        with pytest.raises(StoreError, match="no such table"):
            database.transact(lambda raw: raw.execute("SELECT * FROM absent"))


class TestMapping:
    @pytest.mark.parametrize(
        ("name", "kind", "words"),
        [
            ("SQLITE_BUSY", StoreBusy, "another program holds the lock; waited 2.5 s"),
            ("SQLITE_BUSY_SNAPSHOT", StoreBusy, "waited 2.5 s"),
            ("SQLITE_BUSY_RECOVERY", StoreBusy, "waited 2.5 s"),
            ("SQLITE_LOCKED", StoreBusy, ""),
            ("SQLITE_CORRUPT", StoreCorrupt, "restore a backup"),
            ("SQLITE_CORRUPT_INDEX", StoreCorrupt, "restore a backup"),
            ("SQLITE_NOTADB", NotAResultStore, "left as it was"),
            ("SQLITE_FULL", StoreError, "free some room"),
            ("SQLITE_READONLY", StoreError, "needs to write the file and the folder"),
            ("SQLITE_READONLY_DIRECTORY", StoreError, "needs to write the file and the folder"),
            ("SQLITE_READONLY_DBMOVED", StoreError, ""),
            ("SQLITE_CANTOPEN", StoreError, "is the folder there, and writable"),
            ("SQLITE_IOERR", StoreError, "nothing was written"),
            ("SQLITE_IOERR_WRITE", StoreError, "nothing was written"),
            ("SQLITE_ERROR", StoreError, ""),
            ("SQLITE_CONSTRAINT_UNIQUE", StoreError, ""),
            ("SQLITE_PERM", StoreError, ""),
        ],
    )
    def test_by_code(self, database: Database, name: str, kind: type[StoreError], words: str) -> None:
        exc = sqlite3.OperationalError("in SQLite's words")
        exc.sqlite_errorcode, exc.sqlite_errorname = getattr(sqlite3, name), name
        error = database.mapped(exc, 2.5)
        assert type(error) is kind
        assert words in str(error)
        assert database.path in str(error)
        assert "in SQLite's words" in str(error)
        assert (error.path, error.sqlite_errorcode, error.sqlite_errorname) == (
            database.path,
            getattr(sqlite3, name),
            name,
        )
        if isinstance(error, StoreBusy):
            assert error.waited == 2.5

    def test_the_words_do_not_matter(self, database: Database) -> None:
        exc = sqlite3.OperationalError("database is locked")
        exc.sqlite_errorcode, exc.sqlite_errorname = sqlite3.SQLITE_FULL, "SQLITE_FULL"
        assert type(database.mapped(exc)) is StoreError

    def test_too_big(self, database: Database) -> None:
        database.connection().setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 10_000)
        with pytest.raises(EncodeError, match=r"larger than SQLite's limit.*record its path") as caught:
            database.transact(
                lambda raw: raw.execute("INSERT INTO tasks (id, result) VALUES ('a', ?)", ("x" * 20_000,))
            )
        assert caught.value.remedy
        assert ids(database) == []

    def test_a_refusing_trigger(self, database: Database) -> None:
        exc = sqlite3.IntegrityError("reason")
        exc.sqlite_errorcode, exc.sqlite_errorname = sqlite3.SQLITE_CONSTRAINT_TRIGGER, "SQLITE_CONSTRAINT_TRIGGER"
        error = database.mapped(exc)
        assert isinstance(error, Refused)
        assert error.args == ("reason",)

    def test_errors_of_the_module_itself(self, database: Database) -> None:
        error = database.mapped(sqlite3.ProgrammingError("Cannot operate"))
        assert type(error) is StoreError
        assert error.sqlite_errorcode is None

    @pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EPERM])
    def test_permissions(self, database: Database, code: int) -> None:
        with (
            pytest.raises(StoreError, match="needs to write the file and the folder") as caught,
            database.mapped_errors(),
        ):
            raise OSError(code, os.strerror(code))
        assert caught.value.path == database.path

    def test_other_system_errors(self, database: Database) -> None:
        with pytest.raises(StoreError, match=os.strerror(errno.ENOSPC)), database.mapped_errors():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def test_busy_by_another_program(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(connection, "BUSY_TIMEOUT", 0.1)
        database = Database(tmp_path / "results.db", "process-crash")
        with closing(database), closing(sqlite3.connect(database.path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(StoreBusy, match="another program holds the lock") as caught:
                database.transact(insert("a"))
            assert 0.1 <= caught.value.waited < DEADLINE
            other.execute("ROLLBACK")
            database.transact(insert("a"))
            assert ids(database) == ["a"]

    def test_a_disk_that_does_not_confirm(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The commit stands: the error says that it may be lost with the machine."""
        database = Database(tmp_path / "results.db", "power-loss")
        with closing(database):

            def fails(fd: int) -> None:
                raise OSError(errno.EIO, "broken")

            if not database._syncs:
                pytest.skip("no fdatasync here")
            monkeypatch.setattr(os, "fdatasync", fails)
            with pytest.raises(StoreError, match="committed, but the disk did not confirm"):
                database.transact(insert("a"))
            monkeypatch.undo()
            assert ids(database) == ["a"]


class TestDurability:
    @pytest.mark.parametrize("value", ["", "POWER-LOSS", "full", None, 1, ("power-loss",)])
    def test_others_are_refused(self, tmp_path: Path, value: Any) -> None:
        with pytest.raises(ValueError, match="'power-loss' or 'process-crash', not"):
            Database(tmp_path / "results.db", value)
        with pytest.raises(ValueError, match="'power-loss' or 'process-crash', not"):
            ResultStore(tmp_path / "results.db", durability=value)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("durability", ["power-loss", "process-crash"])
    def test_a_commit_is_synced_if_promised(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durability: Any
    ) -> None:
        synced: list[str] = []
        sync = os.fdatasync

        def spy(fd: int) -> None:
            synced.append(os.readlink(f"/proc/self/fd/{fd}"))
            sync(fd)

        database = Database(tmp_path / "results.db", durability)
        with closing(database):
            (level,) = database.connection().execute("PRAGMA synchronous").fetchone()
            if durability == "power-loss" and not database._syncs:
                assert level == 2  # FULL, where the sync can't be left for later
                return
            assert level == 1
            if not os.path.isdir("/proc/self/fd"):
                return
            monkeypatch.setattr(os, "fdatasync", spy)
            database.transact(insert("a"))
            assert synced == ([database.path + "-wal"] if durability == "power-loss" else [])
            synced.clear()
            database.transact(insert("b"), durable=False)
            assert synced == []
            database.sync()
            assert len(synced) == (durability == "power-loss")

    def test_a_refused_change_is_not_synced(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        database = Database(tmp_path / "results.db", "power-loss")
        with closing(database):
            database.transact(insert("a", "DONE"))
            monkeypatch.setattr(os, "fdatasync", lambda fd: pytest.fail("synced"), raising=False)
            with pytest.raises(Refused):
                database.transact(insert("a"))

    def test_the_sync_comes_after_the_queue_is_free(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """That is what lets the syncs of several processes overlap."""
        database = Database(tmp_path / "results.db", "power-loss")
        with closing(database):
            if not database._syncs:
                pytest.skip("no fdatasync here")
            seen = []

            def spy(fd: int) -> None:
                with open(database.path + "-lock", "rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                seen.append(fd)

            monkeypatch.setattr(os, "fdatasync", spy)
            database.transact(insert("a"))
            assert seen

    def test_the_wal_synced_is_the_one_in_use(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """SQLite removes the WAL when the last connection closes, and makes another: it is that one to sync."""
        first = Database(tmp_path / "results.db", "power-loss")
        if not first._syncs:
            first.close()
            pytest.skip("no fdatasync here")

        def in_thread(database: Database, task_id: str) -> None:
            thread = threading.Thread(target=lambda: database.transact(insert(task_id)))
            thread.start()
            thread.join(DEADLINE)

        with closing(first):
            raw = first.connection()
            raw.close()  # as if this thread had ended: no connection is left, and the WAL is gone
            first._raw.discard(raw)
            assert not os.path.exists(first.path + "-wal")
            del first._local.connection
            synced: list[bool] = []
            monkeypatch.setattr(
                os, "fdatasync", lambda fd: synced.append(os.path.samestat(os.fstat(fd), os.stat(first.path + "-wal")))
            )
            in_thread(first, "a")
            first.transact(insert("b"))
            assert synced == [True, True]


def turn_is_free(database: Database) -> bool:
    if not database._turn.acquire(blocking=False):
        return False
    database._turn.release()
    return True


class TestQueue:
    def test_who_holds_the_lock_keeps_writers_out(self, database: Database) -> None:
        with open(database.path + "-lock", "rb") as file, ThreadPoolExecutor(1) as pool:
            fcntl.flock(file, fcntl.LOCK_EX)
            write = pool.submit(database.transact, insert("a"))
            eventually(lambda: not turn_is_free(database), what="the writer in the queue")
            assert ids(database) == []  # readers don't queue
            assert not write.done()
            fcntl.flock(file, fcntl.LOCK_UN)
            assert write.result(DEADLINE) == 1
        assert ids(database) == ["a"]

    def test_the_lock_is_held_during_a_transaction_only(self, database: Database) -> None:
        with open(database.path + "-lock", "rb") as file:

            def operation(raw: sqlite3.Connection) -> None:
                with pytest.raises(BlockingIOError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

            database.transact(operation)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(file, fcntl.LOCK_UN)
            with pytest.raises(Refused):
                database.transact(lambda raw: raw.execute("INSERT INTO groups (id) SELECT 'G' UNION ALL SELECT 'G'"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def test_another_process_queues_too(self, database: Database) -> None:
        code = """
            import sys
            from liteerresult.connection import Database
            database = Database(sys.argv[1], "process-crash")
            print("ready")
            input()
            database.transact(lambda raw: raw.execute("INSERT INTO tasks (id) VALUES ('child')"))
            print("done")
            database.close()
        """
        with Child("-c", code, database.path) as child:
            assert child.read_line() == "ready"

            def operation(raw: sqlite3.Connection) -> None:
                child.write_line()
                waits = f"/proc/{child.pid}/wchan"
                if os.path.exists(waits):
                    eventually(lambda: is_blocked(child.pid), what="the child in the queue")
                assert not child._readable(0)
                insert("parent")(raw)

            database.transact(operation)
            assert child.read_line() == "done"
            assert child.wait() == 0
        assert ids(database) == ["child", "parent"]
        numbers = dict(database.read("SELECT id, number FROM tasks"))
        assert numbers["parent"] < numbers["child"]

    def test_threads_write_in_turn(self, database: Database) -> None:
        inside: list[int] = []

        def operation(raw: sqlite3.Connection) -> None:
            inside.append(1)
            assert len(inside) == 1
            raw.execute("INSERT INTO tasks (id) VALUES (?)", (os.urandom(8).hex(),))
            inside.pop()

        with ThreadPoolExecutor(8) as pool:
            for future in [pool.submit(database.transact, operation) for _ in range(200)]:
                future.result(DEADLINE)
        assert len(ids(database)) == 200


def is_blocked(pid: int) -> bool:
    with open(f"/proc/{pid}/syscall", "rb") as file:
        try:
            return file.read().split()[0] in (b"73", b"32", b"143")  # flock, by architecture
        except (OSError, IndexError):
            return False


class TestThreads:
    def test_one_connection_each(self, database: Database) -> None:
        barrier = threading.Barrier(4)

        def own() -> tuple[int, bool]:
            barrier.wait(DEADLINE)
            same = database.connection() is database.connection()
            number = id(database.connection())
            barrier.wait(DEADLINE)
            return number, same

        with ThreadPoolExecutor(4) as pool:
            found = [future.result(DEADLINE) for future in [pool.submit(own) for _ in range(4)]]
        assert all(same for _, same in found)
        assert len({number for number, _ in found} | {id(database.connection())}) == 5

    def test_a_thread_s_connection_goes_with_it(self, database: Database) -> None:
        for _ in range(5):
            thread = threading.Thread(target=ids, args=(database,))
            thread.start()
            thread.join(DEADLINE)
        assert database._raw == {database.connection()}

    def test_close_closes_those_of_all_threads(self, database: Database) -> None:
        begun, closed = threading.Event(), threading.Event()

        def reader() -> Exception | None:
            raw = database.connection()
            begun.set()
            closed.wait(DEADLINE)
            with pytest.raises(sqlite3.ProgrammingError):
                raw.execute("SELECT 1")
            try:
                ids(database)
            except StoreError as exc:
                return exc
            return None

        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(reader)
            assert begun.wait(DEADLINE)
            database.close()
            closed.set()
            assert "is closed" in str(future.result(DEADLINE))


class TestClosed:
    def test_says_so(self, database: Database) -> None:
        database.close()
        database.close()
        for use in (database.connection, lambda: ids(database), lambda: database.transact(insert("a"))):
            with pytest.raises(StoreError, match="is closed") as caught:
                use()
            assert caught.value.path == database.path

    def test_leaves_no_descriptor(self, tmp_path: Path) -> None:
        if not os.path.isdir("/proc/self/fd"):
            pytest.skip("counts by /proc")

        for durability in ("power-loss", "process-crash"):
            database = Database(tmp_path / "results.db", durability)
            database.transact(insert(durability))
            assert open_files(tmp_path)
            database.close()
            assert not open_files(tmp_path)

    def test_a_store_that_could_not_be_opened_leaves_none_either(self, tmp_path: Path) -> None:
        if not os.path.isdir("/proc/self/fd"):
            pytest.skip("counts by /proc")
        path = tmp_path / "results.db"
        Database(path).close()
        with closing(sqlite3.connect(path)) as raw:
            (page,) = raw.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'owners'").fetchone()
        whole = bytearray(path.read_bytes())
        whole[(page - 1) * 2048 : page * 2048] = b"\xff" * 2048
        path.write_bytes(whole)
        for _ in range(2):
            with pytest.raises(StoreCorrupt):
                ResultStore(path)
        assert not open_files(tmp_path)


def open_files(folder: Path) -> list[str]:
    links = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
    return [link for link in links if str(folder) in link]


class TestGrowth:
    @pytest.fixture
    def small(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
        monkeypatch.setattr(connection, "WAL_LIMIT", 200_000)
        monkeypatch.setattr(connection, "CHECKPOINT_PAGES", 20)
        monkeypatch.setattr(connection, "_WAL_CHECK_EVERY", 4)
        database = Database(tmp_path / "results.db", "process-crash")
        yield database
        database.close()

    @staticmethod
    def write(database: Database, times: int) -> None:
        for _ in range(times):
            database.transact(
                lambda raw: raw.execute(
                    "INSERT INTO tasks (id, result) VALUES (?, ?)", (os.urandom(8).hex(), "x" * 20_000)
                )
            )

    def test_a_reader_that_pins_the_wal_is_warned_about(self, small: Database) -> None:
        with closing(sqlite3.connect(small.path, isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM tasks").fetchall()
            with pytest.warns(RuntimeWarning, match="some reader keeps a transaction open"):
                self.write(small, 40)
            reader.execute("ROLLBACK")
        self.write(small, 40)
        assert os.stat(small.path + "-wal").st_size <= 400_000 + 100_000

    def test_it_is_not_repeated_at_every_commit(self, small: Database) -> None:
        with closing(sqlite3.connect(small.path, isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM tasks").fetchall()
            with pytest.warns(RuntimeWarning) as caught:
                self.write(small, 80)
        assert 1 <= len(caught) <= 3

    def test_nobody_is_warned_without_such_a_reader(self, small: Database) -> None:
        self.write(small, 80)  # a warning would be an error here
        assert os.stat(small.path + "-wal").st_size <= 400_000
