"""What the store answers to bad input: each row of the contract's table, and that nothing else suffers."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import pickle
import random
import shutil
import sqlite3
import subprocess
import tempfile
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from liteerresult import (
    AsyncResult,
    BaseAsyncResult,
    ContentDisallowed,
    DecodeError,
    EagerResult,
    EncodeError,
    GroupResult,
    LiteerresultError,
    NotAResultStore,
    RemoteError,
    ResultSet,
    ResultStore,
    SchemaMismatch,
    StoreBusy,
    StoreCorrupt,
    StoreError,
    TaskSetResult,
    TransitionError,
    connection,
    result_from_tuple,
    schema,
)
from liteerresult.backend import GroupCounts
from tests.support import Child, run_python

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Ids

BAD_IDS = [
    pytest.param(None, ValueError, "None", id="None"),
    pytest.param(7, TypeError, "int", id="int"),
    pytest.param(b"a", TypeError, "bytes", id="bytes"),
    pytest.param(["a"], TypeError, "list", id="list"),
    pytest.param("", ValueError, "empty", id="empty"),
    pytest.param("a\0b", ValueError, "NUL", id="NUL"),
    pytest.param("ä\0", ValueError, "NUL", id="NUL after ä"),
    pytest.param("a\ud800", ValueError, "Unicode", id="surrogate"),
]

VERBS: dict[str, Callable[[ResultStore, Any], Any]] = {
    "run_task": lambda store, bad: store.run_task(bad),
    "mark_as_started": lambda store, bad: store.mark_as_started(bad),
    "mark_as_done": lambda store, bad: store.mark_as_done(bad, 1),
    "mark_as_failure": lambda store, bad: store.mark_as_failure(bad, ValueError("x")),
    "mark_as_retry": lambda store, bad: store.mark_as_retry(bad, ValueError("x")),
    "mark_as_revoked": lambda store, bad: store.mark_as_revoked(bad),
    "update_state": lambda store, bad: store.update_state(bad, "PROGRESS", 1),
    "resubmit": lambda store, bad: store.resubmit(bad),
    "revoke": lambda store, bad: store.revoke(bad),
    "forget": lambda store, bad: store.forget(bad),
    "get_task_meta": lambda store, bad: store.get_task_meta(bad),
    "exists": lambda store, bad: store.exists(bad),
    "attempts": lambda store, bad: store.attempts(bad),
    "restore_group": lambda store, bad: store.restore_group(bad),
    "delete_group": lambda store, bad: store.delete_group(bad),
    "a group's member": lambda store, bad: store.create_group([bad], "G"),
    "AsyncResult": lambda store, bad: AsyncResult(bad, store),
    "BaseAsyncResult": lambda store, bad: BaseAsyncResult(bad, store),
    "EagerResult": lambda store, bad: EagerResult(bad, 1, "SUCCESS"),
    "TaskSetResult": lambda store, bad: TaskSetResult(bad, [], backend=store),
    "ResultSet's member": lambda store, bad: ResultSet([bad], backend=store),
    "GroupResult's member": lambda store, bad: GroupResult("G", [bad], backend=store),
    "GroupResult.restore": lambda store, bad: GroupResult.restore(bad, store),
    "ResultSet.add": lambda store, bad: ResultSet([], backend=store).add(bad),
    "setting an id": lambda store, bad: setattr(AsyncResult("a", store), "task_id", bad),
}

WITH_NONE: dict[str, Callable[[ResultStore, Any], Any]] = {
    "create_task": lambda store, bad: store.create_task(task_id=bad),
    "create_group": lambda store, bad: store.create_group([], bad),
    "GroupResult": lambda store, bad: GroupResult(bad, [], backend=store),
    "a task's parent": lambda store, bad: store.create_task(parent=bad),
    "a group's parent": lambda store, bad: store.create_group([], parent=bad),
}


def dump(path: str) -> list[Any]:
    with closing(sqlite3.connect(path)) as sql:
        return [sql.execute(f"SELECT * FROM {table}").fetchall() for table in ("tasks", "groups", "group_members")]


class TestIds:
    @pytest.mark.parametrize(("bad", "error", "word"), BAD_IDS)
    @pytest.mark.parametrize("verb", VERBS)
    def test_bad_ones_are_refused(
        self, store: ResultStore, verb: str, bad: Any, error: type[Exception], word: str
    ) -> None:
        if bad is None and verb in ("a group's member", "ResultSet's member", "GroupResult's member", "ResultSet.add"):
            error = TypeError  # it is no member at all
        with pytest.raises(error, match=word):
            VERBS[verb](store, bad)
        assert dump(store.path) == [[], [], []]

    @pytest.mark.parametrize(("bad", "error", "word"), [case for case in BAD_IDS if case.id != "None"])
    @pytest.mark.parametrize("verb", WITH_NONE)
    def test_where_none_means_a_new_one_the_others_are_refused(
        self, store: ResultStore, verb: str, bad: Any, error: type[Exception], word: str
    ) -> None:
        with pytest.raises(error, match=word):
            WITH_NONE[verb](store, bad)
        assert dump(store.path) == [[], [], []]

    @pytest.mark.parametrize(("bad", "error", "word"), BAD_IDS)
    def test_one_bad_id_of_many_spoils_all(
        self, store: ResultStore, bad: Any, error: type[Exception], word: str
    ) -> None:
        if isinstance(bad, list):
            return  # not hashable: no key of a dict
        with pytest.raises(error, match=word):
            store.mark_many_as_done({"a": 1, bad: 2})
        assert dump(store.path) == [[], [], []]

    @pytest.mark.parametrize(
        "bad", ["", "x", 7, None, (), ("a",), [1, 2, 3], ((None, None), None), (("", None), None), ((7, None), None)]
    )
    def test_tuples_that_are_no_result(self, store: ResultStore, bad: Any) -> None:
        with pytest.raises((ValueError, TypeError)):
            result_from_tuple(bad, store)

    @pytest.mark.parametrize(
        "good", ["a", " ", "ä", "𐀀", "a/b", "../x", "'; DROP TABLE tasks; --", "%", "a\nb", "x" * 5000, "None", "0"]
    )
    def test_any_other_text_is_an_id(self, store: ResultStore, good: str) -> None:
        store.create_task(task_id=good)
        store.mark_as_started(good)
        store.create_group([good], good)
        store.mark_as_done(good, 1)
        assert AsyncResult(good, store).get(timeout=0) == 1
        assert store.group_counts(good) == GroupCounts(1, 1, 0, 0, 1, 1)

    def test_a_subclass_of_str_is_its_text(self, store: ResultStore) -> None:
        class Name(str):
            __slots__ = ()

        store.mark_as_done(Name("a"), 1)
        assert store.exists("a")
        assert AsyncResult(Name("a"), store) == "a"


class TestOtherArguments:
    @pytest.mark.parametrize("bad", [None, 7, ["x"], object()])
    def test_what_is_no_failure(self, store: ResultStore, bad: Any) -> None:
        with pytest.raises(TypeError, match="exception or a text"):
            store.mark_as_failure("a", bad)
        assert not store.exists("a")

    @pytest.mark.parametrize(
        ("bad", "error"), [("done", ValueError), ("DONE", ValueError), ("", ValueError), (None, TypeError)]
    )
    def test_what_is_no_state(self, store: ResultStore, bad: Any, error: type[Exception]) -> None:
        with pytest.raises(error):
            store.update_state("a", bad)
        assert not store.exists("a")

    def test_what_is_no_parent(self, store: ResultStore) -> None:
        with pytest.raises(TypeError, match="a parent is"):
            store.create_task(parent=object())  # type: ignore[arg-type]

    @pytest.mark.parametrize("bad", [-1, float("nan"), -0.5])
    def test_what_is_no_age(self, store: ResultStore, bad: float) -> None:
        with pytest.raises(ValueError, match="not negative"):
            store.cleanup(bad)

    def test_what_is_no_option(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="yaml"):
            ResultStore(tmp_path / "x.db", serializer="yaml")
        with pytest.raises(ValueError, match="accept"):
            ResultStore(tmp_path / "x.db", serializer="pickle")
        assert list(tmp_path.iterdir()) == []

    def test_members_of_another_store_or_of_none(self, store: ResultStore, tmp_path: Path) -> None:
        with ResultStore(tmp_path / "other.db") as other, pytest.raises(ValueError, match="another store"):
            store.create_group([AsyncResult("a", other)], "G")
        with pytest.raises(ValueError, match="in no store"):
            store.create_group([EagerResult("a", 1, "SUCCESS")], "G")
        assert store.restore_group("G") is None


# Files that are not ours


def state_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def another_application(path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as sql:
        sql.execute("CREATE TABLE tasks (id, status)")
        sql.execute("INSERT INTO tasks VALUES ('theirs', 'SUCCESS')")


def with_ids_of_its_own(path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as sql:
        sql.execute("PRAGMA application_id = 1196444487")
        sql.execute("PRAGMA user_version = 1")


def with_a_version_only(path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as sql:
        sql.execute("PRAGMA user_version = 1")


def in_wal_mode(path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as sql:
        sql.execute("PRAGMA journal_mode = WAL")
        sql.execute("CREATE TABLE theirs (x)")


def killed_in_wal_mode(path: Path) -> None:
    code = """
        import os, sqlite3, sys
        sql = sqlite3.connect(sys.argv[1], isolation_level=None)
        sql.execute("PRAGMA journal_mode = WAL")
        sql.execute("CREATE TABLE theirs (x)")
        sql.execute("INSERT INTO theirs VALUES (1)")
        os.kill(os.getpid(), 9)
    """
    with Child("-c", code, path) as child:
        child.wait()
    assert Path(f"{path}-wal").stat().st_size > 0


def killed_in_wal_mode_without_shm(path: Path) -> None:
    killed_in_wal_mode(path)
    Path(f"{path}-shm").unlink()


def text(path: Path) -> None:
    path.write_text("results of last night\n" * 200)


def short_text(path: Path) -> None:
    path.write_text("x")


def zeros(path: Path) -> None:
    path.write_bytes(bytes(8192))


STRANGERS = [
    another_application,
    with_ids_of_its_own,
    with_a_version_only,
    in_wal_mode,
    killed_in_wal_mode,
    killed_in_wal_mode_without_shm,
    text,
    short_text,
    zeros,
]


class TestNotOurs:
    @pytest.mark.parametrize("make", STRANGERS)
    def test_it_is_refused_and_left_as_it_was(self, tmp_path: Path, make: Callable[[Path], None]) -> None:
        path = tmp_path / "theirs.db"
        make(path)
        before = state_of(tmp_path)
        with pytest.raises(NotAResultStore, match=str(path)) as caught:
            ResultStore(path).close()
        assert caught.value.path == str(path)
        after = state_of(tmp_path)
        assert after.keys() == before.keys()
        # The index of a WAL is memory shared by its readers, not content.
        assert {name: after[name] for name in after if not name.endswith("-shm")} == {
            name: before[name] for name in before if not name.endswith("-shm")
        }

    @pytest.mark.parametrize("mode", ["delete", "wal"])
    def test_a_newer_format(self, tmp_path: Path, mode: str) -> None:
        path = tmp_path / "results.db"
        ResultStore(path).close()
        with closing(sqlite3.connect(path, isolation_level=None)) as sql:
            sql.execute("PRAGMA user_version = 1000")
            sql.execute(f"PRAGMA journal_mode = {mode}")
        shutil.copy(path, tmp_path / "newer")
        shutil.rmtree(f"{path}-owners")
        shutil.rmtree(f"{path}-bells")
        for name in list(state_of(tmp_path)):
            if name != "newer":
                (tmp_path / name).unlink()
        before = state_of(tmp_path)
        with pytest.raises(SchemaMismatch, match="1000") as caught:
            ResultStore(tmp_path / "newer")
        assert (caught.value.found, caught.value.known) == (1000, schema.FORMAT)
        assert "install a newer one" in str(caught.value)
        assert state_of(tmp_path) == before

    def test_a_newer_format_that_only_its_wal_tells(self, tmp_path: Path) -> None:
        path = tmp_path / "results.db"
        ResultStore(path).close()
        with closing(sqlite3.connect(path, isolation_level=None)) as sql:
            sql.execute("PRAGMA user_version = 1000")
            with pytest.raises(SchemaMismatch, match="1000"):
                ResultStore(path)

    def test_another_application_goes_on(self, tmp_path: Path) -> None:
        path = tmp_path / "theirs.db"
        in_wal_mode(path)
        with closing(sqlite3.connect(path, isolation_level=None)) as sql:
            sql.execute("INSERT INTO theirs VALUES (1)")
            with pytest.raises(NotAResultStore):
                ResultStore(path)
            sql.execute("INSERT INTO theirs VALUES (2)")
        with closing(sqlite3.connect(path)) as sql:
            assert sql.execute("SELECT * FROM theirs").fetchall() == [(1,), (2,)]


# Damage


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    """Return the path of a store with 300 tasks, closed and alone."""
    path = tmp_path / "results.db"
    with ResultStore(path, durability="process-crash") as store:
        store.mark_many_as_done({f"task-{n}": "x" * 500 for n in range(300)})
        store.create_group([f"task-{n}" for n in range(300)], "G")
    return path


def root_page(path: Path, name: str) -> int:
    with closing(sqlite3.connect(path)) as sql:
        (page,) = sql.execute("SELECT rootpage FROM sqlite_schema WHERE name = ?", (name,)).fetchone()
    return int(page)


def content(path: Path) -> bytes:
    """Return the database's bytes; a WAL with content would be a change as well."""
    wal = Path(f"{path}-wal")
    assert not wal.exists() or wal.stat().st_size == 0
    return path.read_bytes()


class TestDamage:
    @pytest.mark.parametrize("table", ["tasks", "owners", "groups", "group_members"])
    def test_a_corrupt_page(self, sound: Path, table: str) -> None:
        whole = bytearray(sound.read_bytes())
        at = (root_page(sound, table) - 1) * 2048
        whole[at : at + 2048] = random.Random(7).randbytes(2048)
        sound.write_bytes(whole)
        before = content(sound)

        def use() -> None:
            with ResultStore(sound) as store:
                if table == "tasks":
                    store.create_task(task_id="new")
                else:
                    store.create_group(["task-1", "new"], "G")

        with pytest.raises(StoreCorrupt, match="the file is damaged") as caught:
            use()
        assert caught.value.path == str(sound)
        assert caught.value.sqlite_errorcode is not None
        assert caught.value.sqlite_errorcode & 0xFF == sqlite3.SQLITE_CORRUPT
        assert content(sound) == before

    @pytest.mark.parametrize("keep", [0.9, 0.5, 0.1, 2048, 4096, 3000, 1000, 512, 100])
    def test_a_truncated_file(self, sound: Path, keep: float) -> None:
        size = sound.stat().st_size
        os.truncate(sound, int(size * keep) if isinstance(keep, float) else keep)
        before = content(sound)

        def use() -> None:
            with ResultStore(sound) as store:
                for n in range(300):
                    store.get_task_meta(f"task-{n}")
                store.mark_many_as_done({f"new-{n}": "x" * 500 for n in range(300)})

        with pytest.raises(StoreCorrupt) as caught:
            use()
        assert caught.value.path == str(sound)
        assert content(sound) == before

    def test_the_rest_stays_readable(self, sound: Path) -> None:
        """A damaged table of groups does not take the tasks with it."""
        whole = bytearray(sound.read_bytes())
        at = (root_page(sound, "group_members") - 1) * 2048
        whole[at : at + 2048] = b"\xff" * 2048
        sound.write_bytes(whole)
        with ResultStore(sound) as store:
            assert store.get_task_meta("task-7").result == "x" * 500
            group = store.restore_group("G")
            assert group is not None
            with pytest.raises(StoreCorrupt):
                group.join(timeout=0)


# Room, rights, locks


class TestNoRoom:
    def test_the_database_is_full(self, store: ResultStore) -> None:
        store.create_group(["a", "b"], "G")
        store.mark_as_done("a", "kept")
        raw = store._db.connection()
        (pages,) = raw.execute("PRAGMA page_count").fetchone()
        raw.execute(f"PRAGMA max_page_count = {pages + 2}")
        before = dump(store.path)
        with pytest.raises(StoreError, match="free some room") as caught:
            store.mark_as_done("b", "x" * 100_000)
        assert type(caught.value) is StoreError
        assert (caught.value.path, caught.value.sqlite_errorcode) == (store.path, sqlite3.SQLITE_FULL)
        assert not raw.in_transaction
        assert dump(store.path) == before
        raw.execute("PRAGMA max_page_count = 100000")
        store.mark_as_done("b", "x" * 100_000)
        assert store.group_counts("G") == GroupCounts(2, 2, 0, 0, 2, 2)

    def test_a_quota_on_file_size(self, tmp_path: Path) -> None:
        """The kernel refuses the write itself (EFBIG), as it does beyond a quota (EDQUOT)."""
        code = """
            import resource, signal, sys
            from liteerresult import ResultStore, StoreError
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            with ResultStore(sys.argv[1]) as store:
                store.mark_as_done("a", 1)
                resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
                failed = 0
                for n in range(20):
                    try:
                        store.mark_as_done(f"big-{n}", "x" * 50_000)
                    except StoreError as exc:
                        assert exc.path == store.path, exc.path
                        assert exc.sqlite_errorcode is not None
                        assert "nothing was written" in str(exc), exc
                        assert not store.exists(f"big-{n}")
                        failed += 1
                assert failed, "it had room"
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
                store.mark_as_done("b", "x" * 500_000)
                assert store.get_task_meta("b").result == "x" * 500_000
                assert store.get_task_meta("a").result == 1
                assert store._db.connection().execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            print("ok")
        """
        assert run_python(code, tmp_path / "results.db") == "ok\n"

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
    def test_a_full_disk(self) -> None:
        folder = tempfile.mkdtemp()
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], capture_output=True, check=False
        ).returncode:
            Path(folder).rmdir()
            pytest.skip("mounting is not allowed here")
        try:
            with ResultStore(f"{folder}/results.db") as store:
                store.mark_as_done("a", 1)
                ballast = Path(folder) / "ballast"
                with ballast.open("wb", buffering=0) as file, pytest.raises(OSError, match="space") as full:
                    file.writelines(itertools.repeat(b"x" * 4096))
                assert full.value.errno == errno.ENOSPC
                failures = []
                for n in range(3):
                    with pytest.raises(StoreError) as caught:
                        store.mark_as_done(f"big-{n}", "x" * 100_000)
                    failures.append(caught.value)
                    assert caught.value.path == store.path
                    assert not store.exists(f"big-{n}")
                assert all(error.sqlite_errorcode is not None for error in failures)
                assert store.get_task_meta("a").result == 1
                ballast.unlink()
                store.mark_as_done("big-0", "x" * 100_000)
                assert store.get_task_meta("big-0").result == "x" * 100_000
        finally:
            subprocess.run(["umount", folder], check=True)
            Path(folder).rmdir()


DROP = """
    import os, sys
    import filelock, liteerresult
    from liteerresult import *
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    def attempt(use):
        try:
            use()
        except StoreError as exc:
            assert exc.path == sys.argv[1], exc.path
            print(type(exc).__name__, "needs to write" in str(exc))
        else:
            print("no error")
"""


@pytest.fixture
def public() -> Iterator[Path]:
    """Yield a folder that other users can reach."""
    folder = Path(tempfile.mkdtemp())
    if any(not parent.stat().st_mode & 0o001 for parent in folder.parents):
        folder.rmdir()
        pytest.skip("other users can't reach the folder for temporary files")
    folder.chmod(0o755)
    yield folder
    for path in folder.rglob("*"):
        path.chmod(0o755)
    folder.chmod(0o755)
    shutil.rmtree(folder)


class TestReadOnly:
    def test_a_folder_without_a_store(self, public: Path) -> None:
        public.chmod(0o555)
        assert (
            run_python(DROP + "    attempt(lambda: ResultStore(sys.argv[1]))\n", public / "results.db")
            == "StoreError True\n"
        )
        assert list(public.iterdir()) == []

    def test_a_store_in_a_read_only_folder(self, public: Path) -> None:
        with ResultStore(public / "results.db") as store:
            store.mark_as_done("a", 1)
        before = (public / "results.db").read_bytes()
        for path in public.rglob("*"):
            path.chmod(0o555 if path.is_dir() else 0o444)
        public.chmod(0o555)
        assert (
            run_python(DROP + "    attempt(lambda: ResultStore(sys.argv[1]))\n", public / "results.db")
            == "StoreError True\n"
        )
        public.chmod(0o755)
        assert (public / "results.db").read_bytes() == before

    def test_a_read_only_file(self, public: Path) -> None:
        with ResultStore(public / "results.db") as store:
            store.mark_as_done("a", 1)
        (public / "results.db").chmod(0o444)
        public.chmod(0o777)
        for path in public.iterdir():
            if path.name != "results.db":
                path.chmod(0o777)
        before = (public / "results.db").read_bytes()
        code = DROP + "    attempt(lambda: ResultStore(sys.argv[1]).mark_as_done('b', 2))\n"
        assert run_python(code, public / "results.db") == "StoreError True\n"
        assert (public / "results.db").read_bytes() == before

    def test_an_unreadable_file(self, public: Path) -> None:
        ResultStore(public / "results.db").close()
        (public / "results.db").chmod(0o000)
        assert run_python(DROP + "    attempt(lambda: ResultStore(sys.argv[1]))\n", public / "results.db").startswith(
            "StoreError"
        )

    def test_a_folder_that_can_not_be_entered(self, public: Path) -> None:
        (public / "closed").mkdir()
        (public / "closed").chmod(0o000)
        code = DROP + "    attempt(lambda: ResultStore(sys.argv[1]))\n"
        assert run_python(code, public / "closed" / "results.db").startswith("StoreError")


class TestLocked:
    def test_past_the_timeout(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(connection, "BUSY_TIMEOUT", 0.15)
        with (
            ResultStore(tmp_path / "results.db") as store,
            closing(sqlite3.connect(store.path, isolation_level=None)) as other,
        ):
            store.create_task(task_id="a")
            other.execute("BEGIN IMMEDIATE")
            verbs: list[Callable[[], Any]] = [
                lambda: store.mark_as_done("a", 1),
                lambda: store.create_task(task_id="b"),
                lambda: store.mark_many_as_done({"a": 1, "b": 2}),
                lambda: store.create_group(["a"], "G"),
            ]
            for verb in verbs:
                with pytest.raises(StoreBusy, match=r"another program holds the lock; waited 0\.[12]") as caught:
                    verb()
                assert 0.15 <= caught.value.waited < 10
                assert caught.value.path == store.path
            assert store.get_task_meta("a").status == "PENDING"  # reading goes on
            other.execute("ROLLBACK")
            store.mark_as_done("a", 1)
            assert store.get_task_meta("a").result == 1

    def test_within_the_timeout_it_waits(self, tmp_path: Path) -> None:
        code = """
            import sqlite3, sys
            sql = sqlite3.connect(sys.argv[1], isolation_level=None)
            sql.execute("BEGIN IMMEDIATE")
            sql.execute("INSERT INTO tasks (id) VALUES ('theirs')")
            print("locked")
            input()
            sql.execute("COMMIT")
            sql.close()
        """
        with ResultStore(tmp_path / "results.db") as store, Child("-c", code, store.path) as child:
            assert child.read_line() == "locked"
            child.write_line()
            store.mark_as_done("a", 1)
            child.wait()
            assert store.exists("theirs")
            assert store.exists("a")

    def test_opening_a_file_that_another_program_keeps_to_itself(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(connection, "BUSY_TIMEOUT", 0.1)
        ResultStore(tmp_path / "results.db").close()
        with closing(sqlite3.connect(tmp_path / "results.db", isolation_level=None)) as other:
            other.execute("PRAGMA locking_mode = EXCLUSIVE")
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(StoreBusy) as caught:
                ResultStore(tmp_path / "results.db")
            assert caught.value.waited < 3, "longer than BUSY_TIMEOUT"


# Values


class Unknown:
    pass


UNENCODABLE = [
    (Unknown(), "$"),
    ([1, Unknown()], "$[1]"),
    ({"rows": [0, 1, 2, {"blob": Unknown()}]}, "$.rows[3].blob"),
    (lambda: None, "$"),
]


class TestValues:
    @pytest.mark.parametrize(("value", "path"), UNENCODABLE)
    def test_what_can_not_be_stored(self, store: ResultStore, value: Any, path: str) -> None:
        store.create_group(["a", "b"], "G")
        with pytest.raises(EncodeError) as caught:
            store.mark_as_done("a", value)
        assert caught.value.path == path
        assert caught.value.remedy
        assert caught.value.remedy in str(caught.value)
        stored = AsyncResult("a", store)
        assert stored.status == "FAILURE"
        with pytest.raises(EncodeError) as raised:
            stored.get(timeout=0)
        assert raised.value.path == path
        assert store.group_counts("G") == GroupCounts(2, 0, 1, 0, 2, 0)

    def test_in_a_block(self, store: ResultStore) -> None:
        with pytest.raises(EncodeError), store.run_task("a") as task:
            task.result = {"x": Unknown()}
        assert store.get_task_meta("a").status == "FAILURE"
        assert isinstance(store.get_task_meta("a").result, EncodeError)

    def test_among_many_nothing_changes(self, store: ResultStore) -> None:
        with pytest.raises(EncodeError):
            store.mark_many_as_done({"a": 1, "b": Unknown()})
        assert dump(store.path)[0] == []

    def test_in_the_meta_of_a_state_nothing_changes(self, store: ResultStore) -> None:
        store.create_task(task_id="a")
        with pytest.raises(EncodeError):
            store.update_state("a", "PROGRESS", Unknown())
        assert store.get_task_meta("a").status == "PENDING"

    def test_among_the_arguments(self, store: ResultStore) -> None:
        with pytest.raises(EncodeError):
            store.create_task(task_id="a", args=(Unknown(),))
        assert not store.exists("a")

    def test_it_does_not_overwrite_a_final_task(self, store: ResultStore) -> None:
        store.mark_as_done("a", 1)
        with pytest.raises(TransitionError):
            store.mark_as_done("a", Unknown())
        assert store.get_task_meta("a").result == 1

    def test_too_large_for_the_serializer(self, store: ResultStore, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(store._serializer, "_limit", 10_000)
        with pytest.raises(EncodeError, match=r"takes 20,00. bytes"):
            store.mark_as_done("a", "x" * 20_000)
        assert isinstance(store.get_task_meta("a").result, EncodeError)
        assert store.get_task_meta("a").status == "FAILURE"

    def test_too_large_for_sqlite(self, store: ResultStore) -> None:
        """The row has other columns too, and a build of SQLite may allow less: then SQLite says it first."""
        store.create_task(task_id="a")
        raw = store._db.connection()
        usual = raw.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 10_000)
        try:
            with pytest.raises(EncodeError, match="larger than SQLite's limit"):
                store.mark_as_done("a", "x" * 20_000)
            with pytest.raises(EncodeError, match="larger than SQLite's limit"):
                store.update_state("b", "PROGRESS", "x" * 20_000)
        finally:
            raw.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, usual)
        assert not store.exists("b")
        assert store.get_task_meta("a").status == "FAILURE"
        assert isinstance(store.get_task_meta("a").result, EncodeError)


MALFORMED = [
    pytest.param("'{\"rows\": '", None, id="half of a JSON text"),
    pytest.param("''", None, id="empty text"),
    pytest.param("'done'", None, id="bare word"),
    pytest.param("'{\"$nosuch\": [1]}'", "json", id="unknown tag"),
    pytest.param('\'{"$date": "yesterday"}\'', "json", id="tag with a wrong value"),
    pytest.param("'{\"$tuple\": 5}'", "json", id="tag with a wrong type"),
    pytest.param("'[NaN'", "json", id="nan and no end"),
    pytest.param("'1'", "yaml", id="unknown encoding"),
    pytest.param("x'ff00'", None, id="blob without an encoding"),
    pytest.param("'" + "[" * 100_000 + "'", "json", id="nested too deep"),
]


class TestMalformedRows:
    @pytest.fixture
    def sql(self, store: ResultStore) -> Iterator[sqlite3.Connection]:
        store.mark_as_done("good", [1])
        with closing(sqlite3.connect(store.path, isolation_level=None)) as opened:
            yield opened

    @pytest.mark.parametrize(("value", "encoding"), MALFORMED)
    def test_its_own_get_fails_and_no_other(
        self, store: ResultStore, sql: sqlite3.Connection, value: str, encoding: str | None
    ) -> None:
        sql.execute(
            f"""INSERT INTO tasks (id, status, result, encoding, done_at, done_number)
            VALUES ('bad', 'DONE', {value}, ?, 5.0, (SELECT done_number FROM next_completion))""",
            (encoding,),
        )
        bad = AsyncResult("bad", store)
        for read in (lambda: bad.get(timeout=0), lambda: bad.result, lambda: bad.info, bad.maybe_throw):
            with pytest.raises(DecodeError, match="task 'bad', column result") as caught:
                read()
            assert (caught.value.task_id, caught.value.column) == ("bad", "result")
        # Status, times and counts stay readable.
        assert (bad.status, bad.ready(), bad.successful()) == ("DONE", True, True)
        assert bad.date_done is not None
        group = store.create_group(["good", "bad"], "G")
        assert (group.ready(), group.completed_count()) == (True, 2)
        assert AsyncResult("good", store).get(timeout=0) == [1]
        assert [meta.status for meta in store.get_many(["bad", "good"])] == ["DONE", "DONE"]
        assert sql.execute("SELECT count(*) FROM task_overview").fetchone() == (2,)
        values = iter(group.iterate(timeout=0))
        assert next(values) == [1]
        with pytest.raises(DecodeError):
            next(values)

    @pytest.mark.parametrize(
        "value",
        [
            "'{\"type\": '",
            "x'ff00'",
            "'{\"$nosuch\": 1}'",
            "'[1, 2]'",
            "'{\"type\": 5}'",
            "'{}'",
            "7",
            "NULL",
            "'\"disk full\"'",
        ],
    )
    def test_a_failure_raises_something_of_this_package(
        self, store: ResultStore, sql: sqlite3.Connection, value: str
    ) -> None:
        sql.execute(f"INSERT INTO tasks (id, status, result) VALUES ('bad', 'FAILURE', {value})")
        with pytest.raises((DecodeError, RemoteError)):
            AsyncResult("bad", store).get(timeout=0)
        with pytest.raises((DecodeError, RemoteError)):
            store.create_group(["good", "bad"], "G").join(timeout=0)

    @pytest.mark.parametrize("column", ["args", "kwargs"])
    @pytest.mark.parametrize("value", ["'['", "x'00'", "'{\"$nosuch\": 1}'"])
    def test_malformed_arguments(self, store: ResultStore, sql: sqlite3.Connection, column: str, value: str) -> None:
        sql.execute(f"INSERT INTO tasks (id, status, result, {column}) VALUES ('bad', 'DONE', '1', {value})")
        bad = AsyncResult("bad", store)
        with pytest.raises(DecodeError, match=f"column {column}") as caught:
            getattr(bad, column)
        assert (caught.value.task_id, caught.value.column) == ("bad", column)
        assert bad.get(timeout=0) == 1

    def test_a_pickle_is_not_opened(self, store: ResultStore, sql: sqlite3.Connection, tmp_path: Path) -> None:
        class Bomb:
            def __reduce__(self) -> Any:
                return os.mkdir, (str(tmp_path / "exploded"),)

        for task_id, status in (("bad", "DONE"), ("failed", "FAILURE"), ("custom", "PROGRESS"), ("again", "RETRY")):
            sql.execute(
                "INSERT INTO tasks (id, status, result, encoding) VALUES (?, ?, ?, 'pickle')",
                (task_id, status, pickle.dumps(Bomb())),
            )
            with pytest.raises(ContentDisallowed, match=r"accept=") as caught:
                _ = AsyncResult(task_id, store).result
            assert (caught.value.task_id, caught.value.column) == (task_id, "result")
            assert AsyncResult(task_id, store).status == status
        with pytest.raises(ContentDisallowed):
            AsyncResult("bad", store).get(timeout=0)
        group = store.create_group(["good", "bad"], "G")
        assert group.successful()
        assert sql.execute("SELECT result FROM task_overview WHERE id = 'bad'").fetchone()[0].startswith("(pickle, ")
        assert not (tmp_path / "exploded").exists()

    def test_text_that_is_not_utf_8(self, store: ResultStore, sql: sqlite3.Connection) -> None:
        sql.execute("INSERT INTO tasks (id, status, result) VALUES ('bad', 'DONE', CAST(x'22ff22' AS TEXT))")
        store.create_group(["good", "bad"], "G")
        with pytest.raises(DecodeError) as caught:
            AsyncResult("bad", store).get(timeout=0)
        assert (caught.value.task_id, caught.value.column) == ("bad", "result")
        assert AsyncResult("bad", store).status == "DONE"
        assert [meta.status for meta in store.get_many(["good", "bad"])] == ["DONE", "DONE"]

    def test_times_beyond_the_calendar(self, store: ResultStore, sql: sqlite3.Connection) -> None:
        sql.execute("INSERT INTO tasks (id, status, result, done_at) VALUES ('bad', 'DONE', '1', 1e300)")
        bad = AsyncResult("bad", store)
        assert bad.get(timeout=0) == 1
        with contextlib.suppress(LiteerresultError):
            assert bad.date_done is None
        assert sql.execute("SELECT done_utc FROM task_overview WHERE id = 'bad'").fetchone() == (None,)


# Transitions

FINISHED: dict[str, Callable[[ResultStore], Any]] = {
    "DONE": lambda store: store.mark_as_done("a", "first"),
    "FAILURE": lambda store: store.mark_as_failure("a", ValueError("first")),
    "REVOKED": lambda store: store.mark_as_revoked("a", "first"),
}

REPORTS: dict[str, Callable[[ResultStore], Any]] = {
    "create": lambda store: store.create_task(task_id="a"),
    "STARTED": lambda store: store.mark_as_started("a"),
    "run": lambda store: store.run_task("a").__enter__(),
    "DONE": lambda store: store.mark_as_done("a", "second"),
    "many": lambda store: store.mark_many_as_done({"b": 1, "a": "second"}),
    "FAILURE": lambda store: store.mark_as_failure("a", ValueError("second")),
    "REVOKED": lambda store: store.mark_as_revoked("a", "second"),
    "RETRY": lambda store: store.mark_as_retry("a", ValueError("second")),
    "PROGRESS": lambda store: store.update_state("a", "PROGRESS", 1),
}

NAMES = {"create": "PENDING", "run": "STARTED", "many": "DONE"}


class TestTransitions:
    @pytest.mark.parametrize("late", REPORTS)
    @pytest.mark.parametrize("first", FINISHED)
    def test_a_final_status_stays(self, store: ResultStore, clock: Any, first: str, late: str) -> None:
        FINISHED[first](store)
        clock.advance(1)
        before = dump(store.path)
        with pytest.raises(TransitionError, match=f"task 'a' can't go from {first}") as caught:
            REPORTS[late](store)
        error = caught.value
        assert (error.task_id, error.from_status, error.to_status) == ("a", first, NAMES.get(late, late))
        assert error.reason in str(error)
        assert dump(store.path) == before

    @pytest.mark.parametrize("first", FINISHED)
    def test_revoke_of_what_is_final_says_no(self, store: ResultStore, first: str) -> None:
        FINISHED[first](store)
        assert store.revoke("a") is False
        assert store.get_task_meta("a").status == first

    @pytest.mark.parametrize("status", ["PENDING", "STARTED", "RETRY", "PROGRESS", "DONE", None])
    def test_resubmit_of_what_has_not_failed(self, store: ResultStore, status: str | None) -> None:
        if status is not None:
            with closing(sqlite3.connect(store.path, isolation_level=None)) as sql:
                sql.execute("INSERT INTO tasks (id, status) VALUES ('a', ?)", (status,))
        before = dump(store.path)
        with pytest.raises(TransitionError) as caught:
            store.resubmit("a")
        assert (caught.value.task_id, caught.value.from_status, caught.value.to_status) == ("a", status, "PENDING")
        assert dump(store.path) == before

    def test_a_second_start(self, store: ResultStore) -> None:
        store.mark_as_started("a")
        with ResultStore(store.path) as other:
            for starter in (store, other):
                with pytest.raises(TransitionError, match="runs it") as caught:
                    starter.mark_as_started("a")
                assert (caught.value.from_status, caught.value.to_status) == ("STARTED", "STARTED")

    @pytest.mark.parametrize("first", FINISHED)
    @pytest.mark.parametrize("status", ["PENDING", "STARTED", "RETRY", "PROGRESS", "DONE", "FAILURE", "REVOKED"])
    def test_by_sql_it_is_aborted_with_the_reason(self, store: ResultStore, first: str, status: str) -> None:
        FINISHED[first](store)
        before = dump(store.path)
        with closing(sqlite3.connect(store.path, isolation_level=None)) as sql:
            with pytest.raises(sqlite3.IntegrityError, match="the task is final") as caught:
                sql.execute("UPDATE tasks SET status = ?, result = '\"second\"' WHERE id = 'a'", (status,))
            assert caught.value.sqlite_errorname == "SQLITE_CONSTRAINT_TRIGGER"
        assert dump(store.path) == before
