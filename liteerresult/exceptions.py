"""Exceptions as records that JSON can hold, and back: readable in the file, and safe to read from anyone's file.

A record names a class; reading one never imports a module and never calls anything but an exception class, because the
file may be a stranger's (Celery did both: CVE-2021-23727). What can't be rebuilt under these rules is a `RemoteError`.

This module knows nothing of how values are stored: `describe` and `rebuild` are given the functions for that.
"""

from __future__ import annotations

import json
import sys
import traceback
from types import GetSetDescriptorType, MemberDescriptorType, ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from liteerresult.errors import RemoteError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["RemoteTraceback", "add_remote_traceback", "describe", "format_traceback", "outline", "rebuild"]

DEEPEST_CHAIN = 32
"""Exceptions stored one below another as cause, context or member; what lies deeper is left out."""

MOST_RECORDS = 1_000
"""Exceptions stored in one record, all causes and group members together."""

LONGEST_REPR = 10_000
"""Characters kept of the repr that stands for an argument which can't be stored."""

LONGEST_TRACEBACK = 1_000_000
"""Characters kept of a formatted traceback: a text column is to be read by people."""

_NO_REASON = "failed without a stored reason"
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made by a class statement, not by C
_MISSING = object()

T = TypeVar("T")


class RemoteTraceback(str):
    """
    The note that shows where an exception was first raised, in another process.

    A class of its own, so that recording a re-raised exception leaves it out instead of storing it once more each time.
    """

    __slots__ = ()


def _attempt(default: T, call: Callable[..., T], *args: Any) -> T:
    try:
        return call(*args)
    except BaseException:  # noqa: BLE001 - a hostile __str__ raises anything; losing a Ctrl-C here is better than the failure
        return default


def _shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"


def _is_exception(value: object) -> bool:
    return issubclass(type(value), BaseException)  # isinstance would believe a forged __class__


def _get(exc: BaseException, field: str) -> Any:
    return vars(BaseException)[field].__get__(exc)  # the C field itself, whatever the class makes of the name


def _set(exc: BaseException, field: str, value: object) -> None:
    vars(BaseException)[field].__set__(exc, value)  # not by assignment: a frozen dataclass may be an exception too


# Writing


def describe(exc: BaseException, encode: Callable[[Any], Any]) -> dict[str, Any]:
    """
    Return *exc* as a dict that JSON can hold; never raise for what *exc* does.

    Args:
        exc: The exception, with its notes, causes and members.
        encode: Turns an argument into what JSON can hold, or raises.
    """
    return _Description(encode).record(exc)


def outline(exc: BaseException) -> dict[str, Any]:
    """Return the least that can be said of *exc*, for when `describe` gives too much to store."""
    module, name = _class_name(type(exc))
    return {"type": name, "module": module, "text": _shorten(_text(exc), LONGEST_REPR), "args": []}


class _Description:
    """One walk over an exception, its causes and its members."""

    def __init__(self, encode: Callable[[Any], Any]) -> None:
        self._encode = encode
        self._open: set[int] = set()
        self._left = MOST_RECORDS

    def record(self, exc: BaseException) -> dict[str, Any]:
        """Describe one exception and what hangs below it."""
        self._left -= 1
        self._open.add(id(exc))
        module, name = _class_name(type(exc))
        args, attributes = _parts(exc)
        members = _members(exc)
        if members:
            args = (*args[:1], *args[2:])
        record: dict[str, Any] = {"type": name, "module": module, "text": _text(exc)}
        record["args"] = [self._argument(arg) for arg in args]
        more: dict[str, Any] = {
            "attributes": self._attributes(attributes),
            "notes": _notes(attributes),
            "exceptions": [self.record(member) for member in members if self._fits(member)],
        }
        record |= {key: value for key, value in more.items() if value}
        record |= self._chain(exc)
        self._open.remove(id(exc))
        return record

    def _fits(self, exc: object) -> bool:
        fits = self._left > 0 and len(self._open) < DEEPEST_CHAIN
        return fits and _is_exception(exc) and id(exc) not in self._open

    def _chain(self, exc: BaseException) -> dict[str, Any]:
        cause, context, suppress = (_get(exc, f"__{field}__") for field in ("cause", "context", "suppress_context"))
        chain: dict[str, Any] = {}
        if cause is not None and self._fits(cause):
            chain["cause"] = self.record(cause)
        if context is not None and context is cause:
            # `raise ... from` in an except block: stored once, or records would double with each link.
            chain |= {"context": "cause"} if chain else {}
        elif context is not None and self._fits(context):
            chain["context"] = self.record(context)
        if suppress != ("cause" in chain):
            chain["suppress_context"] = suppress
        return chain

    def _argument(self, value: object) -> Any:
        encoded = _attempt(_MISSING, self._encode, value)
        return _repr(value) if encoded is _MISSING else encoded

    def _attributes(self, attributes: dict[Any, Any]) -> dict[str, Any]:
        names = [name for name in attributes if type(name) is str and _is_settable(name) and name[:1] != "$"]
        encoded = {name: _attempt(_MISSING, self._encode, attributes[name]) for name in names}
        return {name: value for name, value in encoded.items() if value is not _MISSING}


def _class_name(cls: type) -> tuple[str | None, str]:
    module = _attempt(None, getattr, cls, "__module__")
    name = _attempt(None, getattr, cls, "__qualname__")
    if module == "__mp_main__":
        module = "__main__"  # what a spawned worker calls the script that its parent knows as __main__
    return module if type(module) is str else None, name if type(name) is str else ""


def _text(exc: BaseException) -> str:
    return str.__str__(_attempt("<exception str() failed>", str, exc))


def _repr(value: object) -> str:
    return _shorten(str.__str__(_attempt(f"<{_class_name(type(value))[1]} object>", repr, value)), LONGEST_REPR)


def _parts(exc: BaseException) -> tuple[tuple[Any, ...], dict[Any, Any]]:
    """Return what the class is to be called with, and the instance's attributes."""
    args = _get(exc, "args")
    state: Any = _attempt(None, object.__getstate__, exc)
    parts = state if type(state) is tuple else (state,)  # (dict, slots) or dict
    attributes = {name: value for part in parts if type(part) is dict for name, value in part.items()}
    reduced: Any = _attempt((), _reduce, exc)
    if type(reduced) is tuple and reduced[:1] == (type(exc),) and type(reduced[1]) is tuple:
        # `args` alone would lose what C constructors take: the file name of OSError, the name of ImportError.
        args = reduced[1]
        attributes |= next((part for part in reduced[2:3] if type(part) is dict), {})
    return args, attributes


def _reduce(exc: BaseException) -> Any:
    return exc.__reduce_ex__(2)


def _members(exc: BaseException) -> tuple[Any, ...]:
    if not issubclass(type(exc), BaseExceptionGroup):
        return ()
    members: Any = _attempt((), getattr, exc, "exceptions")
    return members if type(members) is tuple else ()


def _notes(attributes: dict[Any, Any]) -> list[str]:
    notes = attributes.get("__notes__")
    if notes is None:
        return []
    if type(notes) not in {list, tuple}:
        return [_repr(notes)]
    kept = [note for note in notes if type(note) is not RemoteTraceback]
    return [str.__str__(note) if issubclass(type(note), str) else _repr(note) for note in kept]


def _is_settable(name: str) -> bool:
    return name != "args" and not (name.startswith("__") and name.endswith("__"))


def format_traceback(exc: BaseException) -> str:
    """
    Return what Python would print for *exc*, its causes and members included.

    Never raises. The text is valid UTF-8 without NUL, so that SQLite can store it and its shell can show it.

    Args:
        exc: The exception, as caught.
    """
    lines = _attempt([f"{_class_name(type(exc))[1]}: {_text(exc)}\n"], traceback.format_exception, exc)
    text = _shorten("".join(lines), LONGEST_TRACEBACK)
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


# Reading


def rebuild(stored: Any, decode: Callable[[Any], Any]) -> BaseException:
    """
    Return a new exception from a record, or a `RemoteError` that says what the record says.

    Args:
        stored: What the JSON text holds: a record of `describe`, or anything that a plain SQL writer put there.
        decode: Turns a stored argument into its value, or raises.
    """
    if stored is None:
        return RemoteError(_NO_REASON)
    if type(stored) is not dict or not {str} & {type(stored.get("type")), type(stored.get("text"))}:
        return RemoteError(stored if type(stored) is str else json.dumps(stored, ensure_ascii=False))
    exc = _instance(stored, decode)
    notes = [note for note in _list_in(stored, "notes") if type(note) is str]
    if notes:
        _dict_of(exc)["__notes__"] = notes
    cause = rebuild(stored["cause"], decode) if stored.get("cause") is not None else None
    context = stored.get("context")
    _set(exc, "__cause__", cause)
    if context is not None:
        _set(exc, "__context__", cause if context == "cause" else rebuild(context, decode))
    _set(exc, "__suppress_context__", stored.get("suppress_context", cause is not None) is True)
    return exc


def add_remote_traceback(exc: BaseException, text: str | None) -> None:
    """
    Make Python print *text* below *exc*.

    Args:
        exc: The exception that is to be raised again.
        text: The formatted traceback from the process that raised it first; None or empty adds nothing.
    """
    if not text:
        return
    indented = text.rstrip("\n").replace("\n", "\n  ")
    notes = _dict_of(exc).get("__notes__", ())
    kept = [note for note in notes if type(note) is not RemoteTraceback] if type(notes) is list else []
    note = RemoteTraceback(f"Remote traceback, from the process that ran the task:\n  {indented}")
    _dict_of(exc)["__notes__"] = [*kept, note]


def _dict_of(exc: BaseException) -> dict[str, Any]:
    space: dict[str, Any] = object.__getattribute__(exc, "__dict__")
    return space


def _list_in(stored: dict[str, Any], key: str) -> list[Any]:
    value = stored.get(key)
    return value if type(value) is list else []


def _instance(stored: dict[str, Any], decode: Callable[[Any], Any]) -> BaseException:
    name, module, text = stored.get("type"), stored.get("module", "builtins"), stored.get("text")
    text = text if type(text) is str else ""
    args = tuple(_list_in(stored, "args") if "args" in stored or not text else [text])
    attributes = stored.get("attributes")
    attributes = attributes if type(attributes) is dict else {}
    cls = _find_class(module, name)
    try:
        args = tuple(decode(arg) for arg in args)
        attributes = {name: decode(value) for name, value in attributes.items()}
    except Exception:  # noqa: BLE001 - an argument's type isn't registered here; the failure must be readable all the same
        cls = None
    members = [rebuild(member, decode) for member in _list_in(stored, "exceptions")]
    if members:
        args = (*(args[:1] or (text,)), members, *args[1:])
    if cls is not None:
        exc = _construct(cls, args, attributes)
        exc = exc if exc is not None else _restore(cls, args, attributes)
        if exc is not None:
            return exc
    module = module if type(module) is str and name is not None else None
    return RemoteError(text, exc_module=module, exc_type=name if type(name) is str else None, exc_args=args)


def _find_class(module: object, qualname: object) -> type[BaseException] | None:
    """Look a class up without running any code: neither imports nor a module's own __getattr__, which may import."""
    if type(module) is not str or type(qualname) is not str:
        return None
    found: Any = sys.modules.get(module)
    if not issubclass(type(found), ModuleType):
        return None
    space = object.__getattribute__(found, "__dict__")  # vars() would wake a lazily loaded module
    for part in qualname.split("."):
        found = space.get(part)
        if not issubclass(type(found), type):
            return None
        space = type.__getattribute__(found, "__dict__")
    return found if issubclass(found, BaseException) else None


def _construct(cls: type[BaseException], args: tuple[Any, ...], attributes: dict[str, Any]) -> BaseException | None:
    """Call the class, if that gives the exception that was stored."""
    try:
        exc = cls(*args)
        if not isinstance(exc, cls):
            return None
        # `__init__(self, code)` that calls super().__init__(f"code {code}") would make "code code 5" of "code 5".
        same = _has_args(exc, args)
    except Exception:  # noqa: BLE001 - a constructor that wants other arguments; _restore does without it
        return None
    if not same:
        return None
    _set_attributes(exc, attributes)
    return exc


def _has_args(exc: BaseException, args: tuple[Any, ...]) -> bool:
    return _parts(exc)[0] == args


def _restore(cls: type[BaseException], args: tuple[Any, ...], attributes: dict[str, Any]) -> BaseException | None:
    """Make an instance without the class's own __init__, from its parts."""
    base: Any = next(base for base in cls.__mro__ if not base.__flags__ & _HEAP_TYPE)
    for new in (cls.__new__, base.__new__):
        try:
            exc = new(cls, *args)
        except Exception:  # noqa: BLE001, S112 - the next one may do
            continue
        if type(exc) is not cls:
            continue
        # The built-in ancestor keeps fields in C (UnicodeError.object, SystemExit.code) that only its __init__ sets.
        _attempt(None, base.__init__, exc, *args)
        if not _attempt(False, _has_args, exc, args):
            _set(exc, "args", args)
        _set_attributes(exc, attributes)
        return exc
    return None


def _set_attributes(exc: BaseException, attributes: dict[str, Any]) -> None:
    """Set fields past the class's properties and __setattr__: the file decides on the names."""
    space = _dict_of(exc)
    for name, value in attributes.items():
        if not _is_settable(name):
            continue
        holder = next((vars(base)[name] for base in type(exc).__mro__ if name in vars(base)), None)
        if isinstance(holder, MemberDescriptorType | GetSetDescriptorType):
            _attempt(None, holder.__set__, exc, value)
        else:
            space[name] = value
