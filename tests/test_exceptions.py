"""Exceptions: what comes back from the file, what must never run because of it, and that recording never fails."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import itertools
import json
import os
import pickle
import sqlite3
import subprocess
import sys
import traceback
import types
from typing import TYPE_CHECKING, Any, Self

import pytest
from hypothesis import given, strategies as st

from liteerresult import errors, exceptions
from liteerresult.errors import DecodeError, RemoteError, WorkerLostError
from liteerresult.serialization import Serializer, encode_exception, format_traceback

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

JSON = Serializer()


def read(data: Any, remote: str | None = None) -> BaseException:
    return JSON.decode_exception(data, "json", remote, task_id="t1")


def back(exc: BaseException) -> Any:
    text = encode_exception(exc)
    text.encode()  # valid UTF-8, as SQLite needs
    json.loads(text)
    return read(text)


class KeywordOnly(Exception):
    def __init__(self, *, code: int) -> None:
        super().__init__(f"code {code}")
        self.code = code


class ManyArguments(Exception):
    def __init__(self, host: str, port: int, user: str) -> None:
        super().__init__(f"{user} at {host}:{port}")
        self.host, self.port, self.user = host, port, user


class Prefixed(Exception):
    """Called with its own text, it would make another text of it."""

    def __init__(self, code: object) -> None:
        super().__init__(f"code {code}")
        self.code = code


class Reduced(Exception):
    def __init__(self, first: int, second: int) -> None:
        super().__init__("reduced")
        self.total = first + second
        self._parts = first, second

    def __reduce__(self) -> Any:
        return type(self), self._parts


class Slotted(Exception):
    __slots__ = ("where",)


class DiskError(OSError):
    def __init__(self, *, disk: str) -> None:
        super().__init__(5, "I/O error", disk)
        self.disk = disk


class NewOnly(Exception):
    def __new__(cls, *, key: str) -> Self:
        self = super().__new__(cls, key)
        self.key = key
        return self

    key: str

    def __init__(self, *, key: str) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class FrozenError(Exception):
    code: int


class Falsy(Exception):
    def __bool__(self) -> bool:
        return False


class Outer:
    class Inner(Exception):
        pass


class CodedGroup(ExceptionGroup[Exception]):
    def __new__(cls, message: str, members: list[Exception], code: int) -> Self:
        self = super().__new__(cls, message, members)
        self.code = code
        return self

    code: int

    def __init__(self, message: str, members: list[Exception], code: int) -> None:
        pass


with_attribute = ValueError("text")
with_attribute.code = {"a": (1, 2)}  # type: ignore[attr-defined]
slotted = Slotted("x")
slotted.where = "here"  # type: ignore[attr-defined]

samples: list[BaseException] = [
    ValueError("bad", 3, None, (1, {2})),
    ValueError(),
    KeyError("k"),
    OSError(2, "No such file", "f.txt"),
    OSError(18, "cross", "a", None, "b"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"),
    UnicodeEncodeError("utf-8", "\ud800", 0, 1, "invalid"),
    SyntaxError("bad", ("f.py", 1, 2, "x =", 1, 3)),
    SystemExit(3),
    StopIteration(5),
    KeyboardInterrupt(),
    ImportError("no", name="m", path="p"),
    subprocess.CalledProcessError(3, ["a", "b"], b"out", b"err"),
    json.JSONDecodeError("bad", "doc", 1),
    with_attribute,
    slotted,
    KeywordOnly(code=5),
    ManyArguments("h", 1, "u"),
    Prefixed(7),
    Reduced(1, 2),
    DiskError(disk="sda"),
    NewOnly(key="k"),
    FrozenError(4),
    Falsy("f"),
    Outer.Inner("in"),
    ValueError("\ud800\udc00 \0 é"),
    sqlite3.OperationalError("locked"),
]


def fields_of(exc: Any) -> dict[str, Any]:
    """All that a user can see on it: attributes and the fields that C keeps."""
    names = {"args", *vars(exc), *(name for name in dir(exc) if not name.startswith("_"))} - {"__notes__"}
    return {name: getattr(exc, name, None) for name in names if not callable(getattr(exc, name, None))}


class TestRoundTrip:
    @pytest.mark.parametrize("exc", samples, ids=lambda exc: type(exc).__name__)
    def test_class_text_args_and_fields(self, exc: BaseException) -> None:
        again = back(exc)
        assert type(again) is type(exc)
        assert str(again) == str(exc)
        assert fields_of(again) == fields_of(exc)

    def test_stored_form(self) -> None:
        assert encode_exception(ValueError("bad", 3)) == (
            '{"type": "ValueError", "module": "builtins", "text": "(\'bad\', 3)", "args": ["bad", 3]}'
        )
        exc = KeywordOnly(code=5)
        exc.add_note("careful")
        exc.__cause__ = KeyError("k")
        assert json.loads(encode_exception(exc)) == {
            "type": "KeywordOnly",
            "module": __name__,
            "text": "code 5",
            "args": ["code 5"],
            "attributes": {"code": 5},
            "notes": ["careful"],
            "cause": {"type": "KeyError", "module": "builtins", "text": "'k'", "args": ["k"]},
        }

    def test_every_error_of_the_package(self) -> None:
        lost = WorkerLostError("gone")
        lost.task_id, lost.pid, lost.host, lost.since, lost.started = "t", 12, "h", 1.5, False
        busy = errors.StoreBusy("busy", path="p", sqlite_errorcode=5, sqlite_errorname="SQLITE_BUSY")
        busy.waited = 2.5
        made: list[Any] = [
            lost,
            busy,
            errors.LiteerresultError("x"),
            errors.ImproperlyConfigured("x"),
            errors.TimeoutError("late", timeout=1.5, waiting_for=("a", "b")),
            errors.TransitionError("t", "DONE", "PENDING", "final"),
            errors.TaskRevokedError(task_id="t"),
            errors.RemoteError("text", exc_module="m", exc_type="T", exc_args=(1, (2,))),
            errors.EncodeError("no", path="$.a", remedy="do"),
            errors.DecodeError("no", task_id="t", column="result"),
            errors.ContentDisallowed("no", task_id="t", column="result"),
            errors.StoreError("x", path="p"),
            errors.StoreCorrupt("x", path="p"),
            errors.NotAResultStore("x"),
            errors.SchemaMismatch("x"),
        ]
        for name in errors.__all__:  # and those that this list doesn't know
            cls = getattr(errors, name)
            exc = cls.__new__(cls, "text")
            exc.args = ("text",)
            exc.extra = (1, {2})
            made.append(exc)
        for exc in made:
            again = back(exc)
            assert (type(again), again.args, vars(again) | vars(exc)) == (type(exc), exc.args, vars(again))

    def test_a_package_error_from_plain_sql(self) -> None:
        record = {"type": "WorkerLostError", "module": "liteerresult.errors", "text": "died", "args": ["died"]}
        lost = read(json.dumps(record | {"attributes": {"task_id": "t", "pid": 12, "host": "h", "since": 1.5}}))
        assert isinstance(lost, WorkerLostError)
        assert (str(lost), lost.task_id, lost.pid, lost.host, lost.since) == ("died", "t", 12, "h", 1.5)
        assert lost.started is True

    def test_missing_keys(self) -> None:
        for data, cls, text in [
            ('{"type": "ValueError", "text": "bad"}', ValueError, "bad"),
            ('{"type": "ValueError"}', ValueError, ""),
            ('{"type": "ValueError", "args": "x", "attributes": 3, "notes": 4, "exceptions": 5}', ValueError, ""),
            ('{"type": "WorkerLostError", "module": "liteerresult.errors", "text": "x"}', WorkerLostError, "x"),
            ('{"text": "disk full"}', RemoteError, "disk full"),
        ]:
            exc = read(data)
            assert (type(exc), str(exc)) == (cls, text)

    def test_a_new_instance_each_time(self) -> None:
        text = encode_exception(ValueError([1]))
        first, second = read(text), read(text)
        assert first is not second
        assert first.args[0] is not second.args[0]

    def test_reraised_instances_do_not_grow(self) -> None:
        text = encode_exception(ValueError("x"))
        for _ in range(3):
            with pytest.raises(ValueError, match="x") as caught:
                raise read(text, "Traceback ...")
            assert len(inspect.getinnerframes(caught.value.__traceback__)) == 1  # type: ignore[arg-type]

    def test_unencodable_arguments_and_attributes(self) -> None:
        exc = ValueError("x", object)
        exc.fine, exc.lock = 1, object()  # type: ignore[attr-defined]
        again = back(exc)
        assert again.args == ("x", "<class 'object'>")
        assert vars(again) == {"fine": 1}

    def test_the_script_of_a_spawned_worker(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cls = type("ScriptError", (Exception,), {"__module__": "__mp_main__"})
        monkeypatch.setattr(sys.modules["__main__"], "ScriptError", cls, raising=False)
        assert type(back(cls("x"))) is cls


class TestChains:
    def test_cause_and_context(self) -> None:
        try:
            try:
                raise KeyError("first")  # noqa: TRY301
            except KeyError as exc:
                raise ValueError("second") from exc
        except ValueError as exc:
            again = back(exc)
        assert isinstance(again.__cause__, KeyError)
        assert again.__context__ is again.__cause__
        assert again.__suppress_context__

    @pytest.mark.parametrize("suppress", [False, True])
    def test_context_alone(self, suppress: bool) -> None:
        exc = ValueError("second")
        exc.__context__ = KeyError("first")
        exc.__suppress_context__ = suppress
        again = back(exc)
        assert isinstance(again.__context__, KeyError)
        assert again.__cause__ is None
        assert again.__suppress_context__ is suppress

    def test_cause_without_context_and_shown_context(self) -> None:
        exc = ValueError("second")
        exc.__cause__ = KeyError("first")
        exc.__suppress_context__ = False
        again = back(exc)
        assert (again.__context__, again.__suppress_context__) == (None, False)

    def test_cycles_and_long_chains_end(self) -> None:
        exc, other = ValueError("a"), KeyError("b")
        exc.__cause__, other.__cause__ = other, exc
        again = back(exc)
        assert again.__cause__.__cause__ is None
        links = [ValueError(number) for number in range(10_000)]
        for upper, lower in itertools.pairwise(links):
            upper.__cause__ = upper.__context__ = lower
        link, count = back(links[0]), 0
        while link is not None:
            link, count = link.__cause__, count + 1
        assert count == exceptions.DEEPEST_CHAIN

    def test_two_ways_down_do_not_double(self) -> None:
        """Each link reached as the cause of one and the context of another: 2 ** 30 records without the bound."""
        links = [ValueError(number) for number in range(60)]
        for upper, left, right in zip(links, links[1:], links[2:]):  # noqa: B905
            upper.__cause__, upper.__context__ = left, right
        assert encode_exception(links[0]).count('"type"') <= exceptions.MOST_RECORDS

    def test_notes(self) -> None:
        exc = ValueError("x")
        exc.add_note("one")
        exc.add_note("two\nlines")
        assert back(exc).__notes__ == ["one", "two\nlines"]
        exc.__notes__ = "odd"  # type: ignore[assignment]
        assert back(exc).__notes__ == ["'odd'"]
        exc.__notes__ = [3, "x"]  # type: ignore[list-item]
        assert back(exc).__notes__ == ["3", "x"]

    def test_groups(self) -> None:
        inner = ExceptionGroup("inner", [KeyError("k")])
        again = back(ExceptionGroup("outer", [ValueError("v"), inner]))
        assert type(again) is ExceptionGroup
        assert again.message == "outer"
        assert [type(member) for member in again.exceptions] == [ValueError, ExceptionGroup]
        assert again.exceptions[1].exceptions[0].args == ("k",)
        assert type(back(BaseExceptionGroup("b", [SystemExit(1)]))) is BaseExceptionGroup

    def test_a_group_with_a_constructor_of_its_own(self) -> None:
        again = back(CodedGroup("g", [ValueError("v")], 7))
        assert type(again) is CodedGroup
        assert (again.message, again.code, again.exceptions[0].args) == ("g", 7, ("v",))

    def test_a_huge_group_is_cut(self) -> None:
        again = back(ExceptionGroup("g", [ValueError(number) for number in range(5_000)]))
        assert len(again.exceptions) == exceptions.MOST_RECORDS - 1

    def test_a_group_that_is_not_imported_keeps_its_members(self) -> None:
        record = json.loads(encode_exception(ExceptionGroup("g", [ValueError("v")])))
        again = read(json.dumps(record | {"module": "elsewhere"}))
        assert isinstance(again, RemoteError)
        assert isinstance(again.exc_args[1][0], ValueError)


class TestRemoteTraceback:
    def test_is_printed_below_the_exception(self) -> None:
        def work() -> None:
            raise ValueError("x")

        try:
            work()
        except ValueError as exc:
            text, remote = encode_exception(exc), format_traceback(exc)
        assert "in work" in remote
        printed = "".join(traceback.format_exception(read(text, remote)))
        assert printed.startswith("ValueError: x\nRemote traceback")
        assert "in work" in printed
        assert not hasattr(read(text), "__notes__")

    def test_is_not_stored_again(self) -> None:
        """With a plain str as the note the record would grow at each hop."""
        exc: Any = ValueError("x")
        exc.add_note("mine")
        text = encode_exception(exc)
        for _ in range(3):
            exc = pickle.loads(pickle.dumps(read(text, "Traceback: there")))
            assert len(exc.__notes__) == 2
            assert encode_exception(exc) == text
        exc.__notes__[1] = str.__str__(exc.__notes__[1])  # the control
        assert encode_exception(exc) != text

    def test_causes_and_members_are_in_the_text(self) -> None:
        exc = ExceptionGroup("g", [ValueError("member")])
        exc.__cause__ = KeyError("cause")
        text = format_traceback(exc)
        assert "member" in text
        assert "cause" in text

    def test_fits_sqlite(self) -> None:
        text = format_traceback(ValueError("\ud800 \0 end"))
        text.encode()
        assert "\\ud800 \\x00 end" in text
        assert len(format_traceback(ValueError("x" * 5_000_000))) < exceptions.LONGEST_TRACEBACK + 10


class HostileText(Exception):
    def __str__(self) -> str:
        raise SystemExit(1)

    __repr__ = __str__


class HostileReduce(Exception):
    def __reduce_ex__(self, protocol: Any) -> Any:
        raise KeyboardInterrupt


class HostileAttributes(Exception):
    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(name)


class HostileArgs(Exception):
    args = property(lambda self: 1 / 0)  # type: ignore[assignment]


class HostileMeta(type):
    @property
    def __module__(cls) -> str:
        raise RuntimeError

    def __getattribute__(cls, name: str) -> Any:
        if name == "__qualname__":
            raise RuntimeError
        return super().__getattribute__(name)


class HostileClass(Exception, metaclass=HostileMeta):
    pass


class HostileString(str):
    __slots__ = ()

    def __str__(self) -> str:
        raise RuntimeError

    __repr__ = __str__


class HostileLinks(Exception):
    __cause__ = property(lambda self: 1 / 0)  # type: ignore[assignment]
    __context__ = "not an exception"  # type: ignore[assignment]
    __notes__ = property(lambda self: 1 / 0)  # type: ignore[assignment]


class HostileEquality(Exception):
    def __eq__(self, other: object) -> bool:
        raise RuntimeError

    __hash__ = None  # type: ignore[assignment]


class TestNeverFails:
    @pytest.mark.parametrize(
        "make",  # functions, because pytest itself would stumble over the instances
        [
            lambda: HostileText("x"),
            lambda: ValueError(HostileText("x")),
            lambda: HostileReduce("x"),
            lambda: HostileAttributes("x"),
            lambda: HostileArgs("x"),
            lambda: HostileClass("x"),
            lambda: ValueError(HostileString("x")),
            lambda: HostileLinks("x"),
            HostileEquality,
            lambda: ExceptionGroup("g", [HostileText("x"), HostileAttributes("y")]),
        ],
    )
    def test_hostile_exceptions(self, make: Callable[[], BaseException]) -> None:
        exc = make()
        text = encode_exception(exc)
        text.encode()
        assert type(json.loads(text)["type"]) is str
        assert issubclass(type(read(text)), BaseException)
        assert type(format_traceback(exc)) is str

    def test_size(self) -> None:
        text = encode_exception(ValueError("x" * 1000, [1]), _limit=500)
        assert json.loads(text)["args"] == []
        assert "xxx" in json.loads(text)["text"]
        assert type(read(text)) is ValueError

    def test_deep_stack(self) -> None:
        """With no stack left, at least something readable is recorded."""

        def deeper() -> str:
            try:
                return deeper()
            except RecursionError as exc:
                return encode_exception(exc)

        assert json.loads(deeper())["type"] == "RecursionError"

    @given(
        st.lists(st.text(st.characters(codec=None, exclude_categories=())) | st.binary() | st.floats() | st.integers())
    )
    def test_any_arguments(self, args: list[Any]) -> None:
        again = back(ValueError(*args))
        assert repr(again.args) == repr(tuple(args))


def record(module: str, name: str, *args: Any, **more: Any) -> str:
    return json.dumps({"type": name, "module": module, "text": "t", "args": args, **more})


class Impostor:
    """Looks like an exception class, and counts its calls."""

    made = 0

    def __init__(self, *args: Any) -> None:
        type(self).made += 1


class ImpostorError(Impostor):
    __module__ = "builtins"


def pretend(*args: Any) -> None:
    Impostor.made += 1


class Forged:
    """An instance that claims to be a class, and an exception class."""

    __class__ = type  # type: ignore[assignment]
    __mro__ = (ValueError, Exception, BaseException, object)

    def __call__(self, *args: Any) -> None:
        Impostor.made += 1


forged = Forged()


class TestOnlyImportedExceptionClasses:
    """Celery's CVE-2021-23727: a record that names os.system as its class."""

    @pytest.mark.parametrize(
        ("module", "name"),
        [
            ("os", "system"),
            ("posix", "system"),
            ("subprocess", "Popen"),
            ("subprocess", "check_output"),
            ("builtins", "eval"),
            ("builtins", "object"),
            ("builtins", "type"),
            ("builtins", "print"),
            ("os", "path.os.system"),
            ("sys", "modules"),
            ("builtins", ""),
            ("", "ValueError"),
            ("builtins", "ValueError.__init__"),
            ("builtins", "ValueError.__class__"),
            (__name__, "pretend"),
            (__name__, "Impostor"),
            (__name__, "ImpostorError"),
            (__name__, "forged"),
            (__name__, "JSON"),
            (__name__, "nothing"),
            (__name__, "Outer.Other"),
        ],
    )
    def test_nothing_is_called(self, module: str, name: str, tmp_path: Path) -> None:
        proof = tmp_path / "ran"
        before = Impostor.made, Impostor.__dict__["made"]
        again = read(record(module, name, f"touch {proof}", attributes={"x": 1}))
        assert type(again) is RemoteError
        assert (again.exc_module, again.exc_type, again.exc_args) == (module, name, (f"touch {proof}",))
        assert not proof.exists()
        assert (Impostor.made, Impostor.__dict__["made"]) == before
        assert ImpostorError.made == 0

    def test_the_control(self, tmp_path: Path) -> None:
        """The command is one that leaves the proof, had it been called."""
        os.system(f"touch {tmp_path / 'ran'}")
        assert (tmp_path / "ran").exists()

    def test_nothing_is_imported(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "not_yet_here.py").write_text("class Error(Exception): pass")
        monkeypatch.syspath_prepend(tmp_path)
        again = read(record("not_yet_here", "Error", "x"))
        assert type(again) is RemoteError
        assert str(again) == "not_yet_here.Error: t"
        assert "not_yet_here" not in sys.modules
        __import__("not_yet_here")
        assert type(read(record("not_yet_here", "Error", "x"))).__name__ == "Error"
        del sys.modules["not_yet_here"]

    def test_no_module_hook_runs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[str] = []
        module: Any = types.ModuleType("lazy_one")
        module.__getattr__ = asked.append
        monkeypatch.setitem(sys.modules, "lazy_one", module)
        monkeypatch.setitem(sys.modules, "no_module", Forged())
        assert type(read(record("lazy_one", "Error"))) is RemoteError
        assert type(read(record("no_module", "Error"))) is RemoteError
        assert asked == []
        (tmp_path / "lazy_two.py").write_text("raise SystemError('loaded')")
        spec = importlib.util.spec_from_file_location("lazy_two", tmp_path / "lazy_two.py")
        assert spec is not None
        assert spec.loader is not None
        loader = importlib.util.LazyLoader(spec.loader)
        spec.loader = loader
        lazy = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "lazy_two", lazy)
        loader.exec_module(lazy)
        assert type(read(record("lazy_two", "Error"))) is RemoteError

    def test_attributes_set_no_property_and_no_special_name(self) -> None:
        special = {"__class__": "x", "__cause__": "x", "__traceback__": "x", "__dict__": {"y": 1}, "args": [1], "ok": 2}
        again: Any = read(record("builtins", "ValueError", "t", attributes=special))
        assert (type(again), again.args, vars(again)) == (ValueError, ("t",), {"ok": 2})

    def test_an_unregistered_argument_does_not_hide_the_failure(self) -> None:
        again = read(record("builtins", "ValueError", {"$type": "film.Frame", "value": 1}))
        assert type(again) is RemoteError
        assert (again.exc_type, again.text) == ("ValueError", "t")
        assert again.exc_args == ({"$type": "film.Frame", "value": 1},)

    def test_local_classes(self) -> None:
        class LocalError(Exception):
            pass

        again = back(LocalError("x", 2))
        assert type(again) is RemoteError
        assert again.exc_type.endswith("<locals>.LocalError")
        assert again.exc_args == ("x", 2)
        assert again.text == "('x', 2)"


class TestPlainSql:
    @pytest.mark.parametrize(
        ("data", "text"),
        [
            (None, "failed without a stored reason"),
            ("null", "failed without a stored reason"),
            ('"disk full"', "disk full"),
            ("5", "5"),
            (5, "5"),
            (1.5, "1.5"),
            ("[1, 2]", "[1, 2]"),
            ('{"error": "é"}', '{"error": "é"}'),
            ('{"type": 3}', '{"type": 3}'),
            ('{"$tuple": [1]}', '{"$tuple": [1]}'),
            (b'"bytes"', "bytes"),
        ],
    )
    def test_anything_is_a_remote_error(self, data: Any, text: str) -> None:
        for encoding in ("json", None):
            again = JSON.decode_exception(data, encoding, "Traceback: there")
            assert type(again) is RemoteError
            assert str(again) == text
            assert "there" in again.__notes__[-1]

    @pytest.mark.parametrize("data", ["disk full", "", "{", b"\xff", "[" * 100_000, '{"type":"E","cause":' * 5_000])
    def test_malformed(self, data: Any) -> None:
        with pytest.raises(DecodeError) as caught:
            read(data)
        assert (caught.value.task_id, caught.value.column) == ("t1", "result")

    def test_a_cause_in_words(self) -> None:
        again = read(record("builtins", "ValueError", cause="the disk", notes=["n", 3]))
        assert type(again.__cause__) is RemoteError
        assert str(again.__cause__) == "the disk"
        assert again.__notes__ == ["n"]

    @given(
        st.recursive(
            st.none() | st.integers() | st.text(),
            lambda inner: (
                st.lists(inner)
                | st.dictionaries(
                    st.sampled_from(
                        [
                            "type",
                            "module",
                            "text",
                            "args",
                            "attributes",
                            "notes",
                            "cause",
                            "context",
                            "exceptions",
                            "$set",
                        ]
                    )
                    | st.text(),
                    inner,
                )
            ),
        )
    )
    def test_any_json_is_some_exception(self, plain: Any) -> None:
        assert isinstance(read(json.dumps(plain)), BaseException)

    def test_pickled_exceptions(self) -> None:
        both = Serializer("pickle", ("pickle",))
        assert type(both.decode_exception(pickle.dumps(KeyError("k")), "pickle", "tb")) is KeyError
        assert str(both.decode_exception(pickle.dumps(3), "pickle", None)) == "3"
        assert type(both.decode_exception(encode_exception(KeyError("k")), "json", None)) is KeyError
