"""Values and exceptions as JSON text: they come back equal and of the same type, or they are refused.

Types that JSON lacks are stored as an object with one key that starts with "$" and Python's name of the type::

    {"$tuple": [1, 2]}   {"$bytes": "aGk="}   {"$datetime": "2026-01-31T12:00:00+00:00"}   {"$dict": [[1, "one"]]}

and a class of the user's, after `register_type`, as ``{"$type": "film.Frame", "value": {"number": 7}}``. A dict that
has a key like that itself is stored as pairs, so data is never mistaken for a tag. Types are compared exactly: a
subclass would come back as its base. Reading runs no code that a file names: only the functions in this file and those
given to `register_type`.
"""

from __future__ import annotations

import binascii
import datetime as dt
import json
import math
import re
import reprlib
from enum import Enum, Flag
from functools import partial
from json.encoder import encode_basestring, encode_basestring_ascii
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

from liteerresult.errors import ContentDisallowed, DecodeError, EncodeError, RemoteError
from liteerresult.exceptions import add_remote_traceback, describe, format_traceback, outline, rebuild

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

__all__ = ["Serializer", "encode_exception", "format_traceback", "register_type"]

LARGEST_BYTES = 1_000_000_000
"""The most that SQLite stores in one place (its SQLITE_MAX_LENGTH)."""

DEEPEST = 200
"""Containers inside each other. The JSON may nest three times as deep, and Python's parser gives up at about 1,000."""

T = TypeVar("T")

c_make_encoder: Any = getattr(json.encoder, "c_make_encoder", None)  # None where json is all Python

_ENCODINGS = ("json", "pickle")
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made by a class statement, not by C
_LARGEST_INT = 1 << 2048  # 617 digits; int() takes 640 however sys.set_int_max_str_digits() is set
_LEAVES = frozenset({str, bool, type(None), float})
_PAIR = re.compile("(?<=[\ud800-\udbff])(?=[\udc00-\udfff])")  # two lone surrogates; JSON's \u escapes would join them

_REMEDY = "convert it, register its class with register_type, or use serializer='pickle'"

_options: dict[str, Any] = {"check_circular": False, "allow_nan": False}  # the walk sees both to it


def _encode_of(encoder: json.JSONEncoder) -> Callable[[Any], str]:
    """
    Return what its `encode` does, in half the time.

    That makes json's encoder in C anew for each value, which takes longer than to write the usual one. How to make
    it is not documented: where it is otherwise than here, `encode` itself is returned.
    """
    write = encode_basestring_ascii if encoder.ensure_ascii else encode_basestring
    options = (encoder.key_separator, encoder.item_separator, encoder.sort_keys, encoder.skipkeys, encoder.allow_nan)
    sample = ['"\\\n\x7fä\ud800', {"key": 1.5, "b": [True, None, -7, {}]}]
    try:
        parts: Callable[[Any, int], Iterable[str]] = c_make_encoder(None, encoder.default, write, None, *options)
        if "".join(parts(sample, 0)) == encoder.encode(sample):
            return lambda value: "".join(parts(value, 0))
    except Exception:  # noqa: BLE001, S110 - whatever an unknown signature makes of it
        pass
    return encoder.encode


_dump = _encode_of(json.JSONEncoder(ensure_ascii=False, **_options))
_dump_ascii = _encode_of(json.JSONEncoder(ensure_ascii=True, **_options))
_decoder = json.JSONDecoder()

_AT_ONCE = 500
"""Rows that `decode_many` parses together."""


class Serializer:
    """
    Turns values into what SQLite stores, and back. Thread-safe: it has no state but its settings.

    Attributes:
        encoding: Name of what `encode` writes; stored in the row.
        accept: Names of what `decode` reads.
    """

    def __init__(
        self, serializer: str = "json", accept: tuple[str, ...] = ("json",), *, _limit: int = LARGEST_BYTES
    ) -> None:
        given: object = accept
        if isinstance(given, str):  # whatever the annotation says
            raise ValueError(f"accept must be a tuple of names such as ({accept!r},), not a string")  # noqa: TRY004
        for name in (serializer, *accept):
            if name not in _ENCODINGS:
                raise ValueError(f"unknown serializer {name!r}; there are 'json' and 'pickle'")
        if serializer not in accept:
            raise ValueError(f"serializer={serializer!r} must be accepted as well: accept={(*accept, serializer)!r}")
        self.encoding = serializer
        self.accept = tuple(accept)
        self._reads_json = "json" in accept
        self._limit = _limit

    def encode(self, value: object) -> str | bytes:
        """
        Return *value* as JSON text, or as pickle bytes if that is the encoding.

        Args:
            value: A value whose every part is of a type named in design.md section 4, exactly.

        Returns:
            What `decode` turns into an equal value of the same types.

        Raises:
            EncodeError: Some part can't be stored, is circular or nested too deeply, or the whole is over 1 GB.
        """
        encoded = _to_json(value) if self.encoding == "json" else _pickle(value)
        if len(encoded) * 4 > self._limit:  # at most 4 bytes a character
            size = len(encoded.encode() if isinstance(encoded, str) else encoded)
            if size > self._limit:
                problem = f"takes {size:,} bytes; SQLite stores at most {self._limit:,} in one place"
                raise EncodeError(problem, remedy="write it to a file and return the path")
        return encoded

    def decode(self, data: object, encoding: str | None, *, task_id: str | None = None, column: str = "result") -> Any:
        """
        Return the value that a row holds.

        Args:
            data: What SQLite gave. NULL is None; a number, which only a plain SQL writer stores, is itself.
            encoding: The row's encoding; None means JSON.
            task_id: For the error.
            column: For the error.

        Raises:
            ContentDisallowed: The encoding is not among those to accept.
            DecodeError: The data is malformed, or of a type that is not registered here.
        """
        if type(data) is str and self._reads_json and (encoding == "json" or encoding is None):
            try:
                return _from_json(data)
            except Exception as exc:
                raise DecodeError(_why(exc), task_id=task_id, column=column) from exc
        if data is None:
            return None
        encoding = encoding or "json"
        self._check_accepted(encoding, self.accept, task_id, column)
        try:
            return data if isinstance(data, int | float) else _DECODERS[encoding](data)
        except Exception as exc:
            raise DecodeError(_why(exc), task_id=task_id, column=column) from exc

    def decode_many(self, rows: Sequence[tuple[object, str | None, str]]) -> list[Any]:
        """
        Return the values of many rows, each given as data, encoding and task id.

        Plain JSON is parsed in one go, which takes a third of the time.

        Raises:
            ContentDisallowed: As for `decode`.
            DecodeError: As for `decode`.
        """
        values: list[Any] = []
        for start in range(0, len(rows), _AT_ONCE):
            some = rows[start : start + _AT_ONCE]
            try:
                text = ",".join([cast("str", data) for data, encoding, _ in some if encoding == "json"])
                together = _decoder.decode(f"[{text}]") if self._reads_json and '"$' not in text else []
            except (TypeError, ValueError, RecursionError):  # not all are JSON text
                together = []
            if len(together) != len(some):
                together = [self.decode(data, encoding, task_id=task_id) for data, encoding, task_id in some]
            values += together
        return values

    def decode_exception(
        self, data: object, encoding: str | None, traceback: str | None, *, task_id: str | None = None
    ) -> BaseException:
        """
        Return a new instance of the exception that a row holds; every call makes one.

        Args:
            data: What SQLite gave: a record of `encode_exception`, or what a plain SQL writer put there.
            encoding: The row's encoding; None means JSON, which is always accepted here.
            traceback: The row's formatted traceback, shown below the exception when Python prints it.
            task_id: For the error.

        Returns:
            An exception of the stored class if that is imported here, else `RemoteError`.

        Raises:
            ContentDisallowed: The encoding is not among those to accept.
            DecodeError: The data is malformed.
        """
        encoding = encoding or "json"
        self._check_accepted(encoding, ("json", *self.accept), task_id, "result")
        try:
            exc = _read_exception(data, encoding)
        except Exception as error:
            raise DecodeError(_why(error), task_id=task_id, column="result") from error
        add_remote_traceback(exc, traceback)
        return exc

    @staticmethod
    def _check_accepted(encoding: str, accept: tuple[str, ...], task_id: str | None, column: str) -> None:
        if encoding not in _ENCODINGS:
            raise DecodeError(f"unknown encoding {encoding!r}", task_id=task_id, column=column)
        if encoding not in accept:
            problem = f"it is in {encoding!r}, which this store does not accept; open it with accept={_ENCODINGS!r}"
            raise ContentDisallowed(problem + " if you trust every writer", task_id=task_id, column=column)


def encode_exception(exc: BaseException, *, _limit: int = LARGEST_BYTES) -> str:
    """
    Return *exc* as JSON text; never fail.

    Arguments that can't be stored become their repr text, attributes that can't are left out.

    Args:
        exc: The exception, with its notes, causes and group members.

    Source:
        celery.backends.base, ``Backend.prepare_exception``.
    """
    try:
        text = _valid_text(describe(exc, lambda value: _Walk().plain(value)))
        if len(text) * 4 <= _limit or len(text.encode()) <= _limit:
            return text
    except BaseException:  # noqa: BLE001, S110 - a hostile exception; its failure must be recorded all the same
        pass
    return _valid_text(outline(exc))


@overload
def register_type(
    cls: type[T],
    *,
    name: str | None = None,
    encode: Callable[[T], Any] | None = None,
    decode: Callable[[Any], T] | None = None,
) -> type[T]: ...
@overload
def register_type(
    cls: None = None,
    *,
    name: str | None = None,
    encode: Callable[[Any], Any] | None = None,
    decode: Callable[[Any], Any] | None = None,
) -> Callable[[type[T]], type[T]]: ...
def register_type(
    cls: type[T] | None = None,
    *,
    name: str | None = None,
    encode: Callable[[Any], Any] | None = None,
    decode: Callable[[Any], Any] | None = None,
) -> type[T] | Callable[[type[T]], type[T]]:
    """
    Let instances of *cls* be stored as values; also a decorator, with or without arguments.

    An Enum is stored by the name of its member, a dataclass or a named tuple by its fields. Readers need to have
    registered it too, under the same name.

    Args:
        cls: The class. Its subclasses are not included.
        name: What is written to the file; by default module and qualified name. Registering a second name keeps the
            first one readable.
        encode: Turns an instance into any value that can be stored. Needed for other classes.
        decode: Turns that value into an equal instance.

    Raises:
        TypeError: Not a class, or one that needs *encode* and *decode*.
        ValueError: Only one of the two is given, another class has the name, or the class needs no registration.

    Source:
        kombu.utils.json, ``register_type``.
    """
    if cls is None:
        return lambda cls: register_type(cls, name=name, encode=encode, decode=decode)
    if not isinstance(cls, type):
        raise TypeError(f"register_type needs a class, not {cls!r}")
    if cls.__module__.partition(".")[0] in _LATE_MODULES:
        _load_late_forms()
    if cls in _LEAVES or cls in {int, list, dict} or (cls in _FORMS and cls not in _registered):
        raise ValueError(f"{_type_name(cls)} can be stored as it is")
    if (encode is None) != (decode is None):
        raise ValueError("give both encode and decode, or neither")
    name = name or _type_name(cls)
    holder = _by_name.get(name, (cls,))[0]
    if _type_name(holder) != _type_name(cls):  # a reloaded module may replace its own class
        raise ValueError(f"{_type_name(holder)} is registered as {name!r}; give {_type_name(cls)} another name=")
    forms = (encode, decode) if encode is not None and decode is not None else _own_forms(cls)
    _by_name[name] = (cls, forms[1])
    _registered.add(cls)
    _FORMS[cls] = lambda walk, value: {"$type": name, "value": walk.parts(value, forms[0])}
    return cls


# Writing


def _to_json(value: object) -> str:
    kind = type(value)
    if kind is int and -_LARGEST_INT < value < _LARGEST_INT:  # type: ignore[operator]
        return str(value)
    if value is None:
        return "null"
    try:
        # The usual value needs no tag and no copy: look at the types, dump, then look for keys like a tag in the text.
        if _is_plain(value, DEEPEST):
            text = _dump(value)
            if '"$' not in text and (text.isascii() or _is_valid(text)):
                return text
    except (ValueError, RecursionError):
        pass  # NaN, or too deep: the walk can tell
    try:
        return _valid_text(_Walk().plain(value))
    except RecursionError as exc:
        raise EncodeError("nested too deeply", remedy="flatten it, or use serializer='pickle'") from exc


def _is_plain(value: Any, room: int) -> bool:
    """Tell whether JSON has all of these types. NaN, lone surrogates and keys that start with "$" are seen later."""
    kind = type(value)
    if kind is dict:
        for key in value:
            if type(key) is not str:
                return False
        value = value.values()
    elif kind is not list:
        return kind in _LEAVES or (kind is int and -_LARGEST_INT < value < _LARGEST_INT)
    if room == 0:
        return False
    for item in value:
        kind = type(item)
        if kind in _LEAVES or (kind is int and -_LARGEST_INT < item < _LARGEST_INT):
            continue
        if (kind is not dict and kind is not list) or not _is_plain(item, room - 1):
            return False
    return True


def _is_valid(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _valid_text(plain: object) -> str:
    """Dump so that SQLite takes it: lone surrogates have no UTF-8, so they are escaped."""
    text = _dump(plain)
    return text if text.isascii() or _is_valid(text) else _dump_ascii(plain)


class _Walk:
    """One walk over a value that needs tags, or is to be refused; it knows where it is."""

    def __init__(self) -> None:
        self._path: list[tuple[Callable[[Any], str], Any]] = []
        self._open: set[int] = set()

    def plain(self, value: Any) -> Any:
        """Return *value* in types that JSON has."""
        form = _FORMS.get(type(value))
        if form is None:
            _load_late_forms()
            form = _FORMS.get(type(value))
        if form is None:
            problem = f"{_type_name(type(value))} can't be stored so that it comes back the same"
            raise self.error(problem, _remedy(value))
        return form(self, value)

    def each(self, owner: object, step: Callable[[Any], str], members: Iterable[tuple[Any, Any]]) -> list[Any]:
        """Return the *members* of *owner* in types that JSON has; *step* shows the first of each pair in the path."""
        if id(owner) in self._open:
            raise self.error("circular reference", "refer to it by an id, or use serializer='pickle'")
        if len(self._open) >= DEEPEST:
            raise self.error(f"nested more than {DEEPEST} deep", "flatten it, or use serializer='pickle'")
        self._open.add(id(owner))
        encoded = []
        for key, member in members:
            self._path.append((step, key))
            encoded.append(self.plain(member))
            self._path.pop()
        self._open.remove(id(owner))
        return encoded

    def parts(self, value: Any, encode: Callable[[Any], Any]) -> Any:
        """Return an instance of a registered class in types that JSON has."""
        try:
            stored = encode(value)
        except Exception as exc:
            problem = f"{_type_name(type(value))} is registered, but its encode failed: {exc!r}"
            raise self.error(problem, "mend it, or use serializer='pickle'") from exc
        return self.each(value, _no_step, [(None, stored)])[0]

    def error(self, problem: str, remedy: str) -> EncodeError:
        """Return the error for the place where the walk is."""
        return EncodeError(problem, path="$" + "".join(step(key) for step, key in self._path), remedy=remedy)


def _no_step(_: object) -> str:
    return ""


def _index_step(index: int) -> str:
    return f"[{index}]"


def _key_step(key: object) -> str:
    if type(key) is not str:
        return f"[{_short(key)}]"
    return f".{key}" if key.isidentifier() else f"[{json.dumps(key, ensure_ascii=False)}]"


def _name_step(key: object) -> str:
    return f"[{_short(key)}]~"  # the key itself, in the notation of JSONPath Plus


def _element_step(element: object) -> str:
    return f"{{{_short(element)}}}"


def _short(value: object) -> str:
    try:
        return reprlib.repr(value)
    except Exception:  # noqa: BLE001 - a hostile __repr__ must not hide what is wrong
        return f"<{type(value).__name__}>"


def _type_name(cls: type) -> str:
    module = "__main__" if cls.__module__ == "__mp_main__" else cls.__module__  # a spawned worker's name for it
    return cls.__qualname__ if module == "builtins" else f"{module}.{cls.__qualname__}"


def _remedy(value: object) -> str:
    kind = type(value)
    for method in ("tolist",) if hasattr(kind, "__len__") else ("item", "tolist"):
        if hasattr(kind, method):
            return f"convert it with .{method}(), register its class with register_type, or use serializer='pickle'"
    return _REMEDY


def _form_of_str(_: _Walk, value: str) -> Any:
    pieces = _PAIR.split(value) if not value.isascii() else ()
    return {"$str": pieces} if len(pieces) > 1 else value


def _form_of_int(_: _Walk, value: int) -> Any:
    return value if -_LARGEST_INT < value < _LARGEST_INT else {"$int": hex(value)}


def _form_of_float(_: _Walk, value: float) -> Any:
    return value if math.isfinite(value) else {"$float": repr(value)}


def _form_of_list(walk: _Walk, value: list[Any]) -> Any:
    return walk.each(value, _index_step, enumerate(value))


def _form_of_tuple(walk: _Walk, value: tuple[Any, ...]) -> Any:
    return {"$tuple": walk.each(value, _index_step, enumerate(value))}


def _form_of_set(walk: _Walk, value: set[Any] | frozenset[Any]) -> Any:
    return {f"${type(value).__name__}": walk.each(value, _element_step, zip(value, value, strict=True))}


def _form_of_dict(walk: _Walk, value: dict[Any, Any]) -> Any:
    items = walk.each(value, _key_step, value.items())
    if all(type(key) is str and key[:1] != "$" and not _PAIR.search(key) for key in value):
        return dict(zip(value, items, strict=True))
    keys = walk.each(value, _name_step, zip(value, value, strict=True))
    return {"$dict": [[key, item] for key, item in zip(keys, items, strict=True)]}


def _form_of_bytes(_: _Walk, value: bytes | bytearray) -> Any:
    return {f"${type(value).__name__}": binascii.b2a_base64(value, newline=False).decode()}


def _form_of_complex(walk: _Walk, value: complex) -> Any:
    return {"$complex": [walk.plain(value.real), walk.plain(value.imag)]}


def _form_of_timedelta(_: _Walk, value: dt.timedelta) -> Any:
    return {"$timedelta": [value.days, value.seconds, value.microseconds]}


def _form_of_timezone(walk: _Walk, value: dt.timezone) -> Any:
    named = [] if _is_unnamed(value) else [walk.plain(value.tzname(None))]
    return {"$timezone": [walk.plain(value.utcoffset(None)), *named]}


def _is_unnamed(zone: dt.timezone) -> bool:
    return zone.tzname(None) == dt.timezone(zone.utcoffset(None)).tzname(None)


def _form_of_zoneinfo(walk: _Walk, value: Any) -> Any:
    if value.key is None:
        raise walk.error("a ZoneInfo without a key can't be stored", "use ZoneInfo(key)")
    return {"$ZoneInfo": walk.plain(value.key)}


def _form_of_date(_: _Walk, value: dt.date) -> Any:
    return {"$date": value.isoformat()}


def _form_of_datetime(walk: _Walk, value: dt.datetime | dt.time) -> Any:
    zone = value.tzinfo
    # The text has the offset in any case, for people and for SQLite's functions; a named zone is more than that.
    in_text = zone is None or (type(zone) is dt.timezone and _is_unnamed(zone))
    if type(zone) is dt.timezone and zone.utcoffset(None).microseconds:
        in_text = False  # Python 3.11 reads +00:00:00.000001 as UTC
    more = {} if in_text else {"tz": walk.each(value, _key_step, [("tzinfo", zone)])[0]}
    more |= {"fold": 1} if value.fold else {}
    return {f"${type(value).__name__}": value.isoformat()} | more


def _form_of_text(_: _Walk, value: object) -> Any:
    return {f"${type(value).__name__}": str(value)}


def _form_of_path(walk: _Walk, value: Any) -> Any:
    text = str(value)
    if type(value)(text) != value:  # PureWindowsPath("./c:x") before Python 3.12
        raise walk.error(f"the text of {value!r} is another path", "use serializer='pickle'")
    return {f"${type(value).__name__}": walk.plain(text)}


_FORMS: dict[type, Callable[[_Walk, Any], Any]] = {
    type(None): lambda _, value: value,
    bool: lambda _, value: value,
    str: _form_of_str,
    int: _form_of_int,
    float: _form_of_float,
    list: _form_of_list,
    dict: _form_of_dict,
    tuple: _form_of_tuple,
    set: _form_of_set,
    frozenset: _form_of_set,
    bytes: _form_of_bytes,
    bytearray: _form_of_bytes,
    complex: _form_of_complex,
    dt.date: _form_of_date,
    dt.datetime: _form_of_datetime,
    dt.time: _form_of_datetime,
    dt.timedelta: _form_of_timedelta,
    dt.timezone: _form_of_timezone,
}
"""How a type is written. Subclasses are other types."""


# Reading


def _from_json(text: str) -> Any:
    if '"$' in text:
        return _tag_decoder.decode(text)
    if text[:1].isspace():
        return _decoder.decode(text)
    value, end = _decoder.raw_decode(text)  # a third of the time of decode(), which looks for spaces around
    return value if end == len(text) else _decoder.decode(text)


def _as_text(data: object) -> str:
    if isinstance(data, bytes):
        return data.decode()
    if not isinstance(data, str):
        raise TypeError(f"{type(data).__name__} is not JSON text")
    return data


def _pickle(value: object) -> bytes:
    import pickle

    try:
        return pickle.dumps(value, protocol=5)
    except Exception as exc:
        raise EncodeError(f"can't be pickled: {exc}", remedy="convert it to plain types") from exc


def _unpickle(data: object) -> Any:
    import pickle

    if not isinstance(data, bytes):
        raise TypeError(f"{type(data).__name__} is not a pickle")
    return pickle.loads(data)  # noqa: S301 - the user accepted it


_DECODERS: dict[str, Callable[[object], Any]] = {"json": lambda data: _from_json(_as_text(data)), "pickle": _unpickle}


def _why(exc: Exception) -> str:
    if isinstance(exc, json.JSONDecodeError):
        return f"not JSON: {exc}"
    return str(exc) if isinstance(exc, _TagError) else f"{type(exc).__name__}: {exc}"


def _read_exception(data: object, encoding: str) -> BaseException:
    if encoding == "pickle" and data is not None:
        value = _unpickle(data)
        return value if isinstance(value, BaseException) else RemoteError(repr(value))
    if data is None or isinstance(data, int | float):
        return rebuild(data, _revive)
    # The tags are read argument by argument, so that one that can't be read doesn't hide the failure.
    return rebuild(_decoder.decode(_as_text(data)), _revive)


def _revive(plain: Any) -> Any:
    if type(plain) is list:
        return [_revive(item) for item in plain]
    if type(plain) is dict:
        return _read_tag({key: _revive(value) for key, value in plain.items()})
    return plain


class _TagError(ValueError):
    """A tag that can't be read; the text is for the reader of DecodeError."""


def _read_tag(stored: dict[str, Any]) -> Any:
    tag = next((key for key in stored if key[:1] == "$"), None)
    if tag is None:
        return stored
    if tag not in _READERS:
        _load_late_forms()
    reader = _READERS.get(tag)
    if reader is None:
        raise _TagError(f"unknown tag {tag!r}; a dict with such a key is stored as pairs under '$dict'")
    payload = stored.pop(tag)
    try:
        return reader(payload, **stored)
    except _TagError:
        raise
    except Exception as exc:
        raise _TagError(f"malformed {tag!r}: {exc}") from exc


_tag_decoder = json.JSONDecoder(object_hook=_read_tag)


def _checked(payload: Any, kind: type[T]) -> T:
    if type(payload) is not kind:
        raise TypeError(f"needs {kind.__name__}, has {type(payload).__name__}")
    return payload


def _read_type(name: object, *, value: Any) -> Any:
    if name not in _by_name:
        raise _TagError(f"type {name!r} is not registered here; call register_type(cls, name={name!r}) before reading")
    cls, decode = _by_name[_checked(name, str)]
    try:
        return decode(value)
    except Exception as exc:
        raise _TagError(f"can't make {_type_name(cls)} of what is stored: {exc!r}") from exc


def _read_text(cls: Callable[[str], T], text: str, /) -> T:
    return cls(_checked(text, str))


def _read_float(text: str) -> float:
    if text not in {"nan", "inf", "-inf"}:
        raise ValueError(f"{text!r} is not nan, inf or -inf")
    return float(text)


def _read_bytes(text: str) -> bytes:
    return binascii.a2b_base64(_checked(text, str), strict_mode=True)


def _read_complex(parts: list[float]) -> complex:
    real, imag = _checked(parts, list)
    return complex(_checked(real, float), _checked(imag, float))


def _read_datetime(text: str, *, tz: dt.tzinfo | None = None, fold: int = 0) -> dt.datetime:
    value = dt.datetime.fromisoformat(text)
    return value.replace(tzinfo=tz if tz is not None else value.tzinfo, fold=fold)


def _read_time(text: str, *, tz: dt.tzinfo | None = None, fold: int = 0) -> dt.time:
    value = dt.time.fromisoformat(text)
    return value.replace(tzinfo=tz if tz is not None else value.tzinfo, fold=fold)


_READERS: dict[str, Callable[..., Any]] = {
    "$type": _read_type,
    "$str": lambda pieces: "".join(_checked(pieces, list)),
    "$int": lambda text: int(_checked(text, str), 16),
    "$float": _read_float,
    "$dict": lambda pairs: dict(_checked(pair, list) for pair in _checked(pairs, list)),
    "$tuple": lambda items: tuple(_checked(items, list)),
    "$set": lambda items: set(_checked(items, list)),
    "$frozenset": lambda items: frozenset(_checked(items, list)),
    "$bytes": _read_bytes,
    "$bytearray": lambda text: bytearray(_read_bytes(text)),
    "$complex": _read_complex,
    "$date": dt.date.fromisoformat,
    "$datetime": _read_datetime,
    "$time": _read_time,
    "$timedelta": lambda parts: dt.timedelta(*_checked(parts, list)),
    "$timezone": lambda parts: dt.timezone(*_checked(parts, list)),
}
"""How a tag is read: a function of what the tag holds, with the object's other keys as keywords."""


_LATE_MODULES = frozenset({"decimal", "pathlib", "uuid", "zoneinfo"})


def _load_late_forms() -> None:
    """Add the types whose modules take longer to import than all the rest here; a fixed list, whatever a file says."""
    import decimal
    import pathlib
    import uuid
    import zoneinfo

    _FORMS.setdefault(zoneinfo.ZoneInfo, _form_of_zoneinfo)
    _READERS.setdefault("$ZoneInfo", partial(_read_text, zoneinfo.ZoneInfo))  # it refuses keys that leave its folders
    for cls in (decimal.Decimal, uuid.UUID):
        _FORMS.setdefault(cls, _form_of_text)
        _READERS.setdefault(f"${cls.__name__}", partial(_read_text, cls))
    for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"):
        path = getattr(pathlib, name)
        _FORMS.setdefault(path, _form_of_path)
        _READERS.setdefault(f"${name}", partial(_read_text, path))


# Registered classes

_by_name: dict[str, tuple[type, Callable[[Any], Any]]] = {}
_registered: set[type] = set()


def _own_forms(cls: Any) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    if issubclass(cls, Enum):
        return _enum_forms(cls)
    if issubclass(cls, tuple) and hasattr(cls, "_fields") and hasattr(cls, "_make"):
        return list, lambda stored: cls._make(_checked(stored, list))
    if "__dataclass_fields__" in vars(cls) and all(base is object or _is_python(base) for base in cls.__mro__):
        return _dataclass_forms(cls)
    raise TypeError(f"{_type_name(cls)} is not an Enum, dataclass or named tuple: give encode= and decode=")


def _is_python(cls: type) -> bool:
    return bool(cls.__flags__ & _HEAP_TYPE)  # a base written in C keeps state that is not in any field


def _enum_forms(cls: type[Enum]) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    def parts(member: Any) -> Any:
        if member._name_ in cls.__members__:
            return member._name_
        if isinstance(member, Flag):
            return member._value_
        raise ValueError(f"{member!r} is not one of its members")

    def make(stored: Any) -> Any:
        if type(stored) is int and issubclass(cls, Flag):
            return cls(stored)
        if stored not in cls.__members__:
            raise ValueError(f"it has no member {stored!r}")
        return cls.__members__[stored]

    return parts, make


def _dataclass_forms(cls: Any) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    from dataclasses import MISSING, fields
    from functools import cached_property

    names = {field.name for field in fields(cls)}

    def parts(value: Any) -> Any:
        state: Any = object.__getstate__(value)
        attributes = {name for part in (state if type(state) is tuple else (state,)) if part for name in part}
        for name in attributes - names - {"__orig_class__"}:
            if not isinstance(getattr(cls, name, None), cached_property):
                raise ValueError(f"its attribute {name!r} is not a field and would be lost")  # noqa: TRY004
        return {field.name: getattr(value, field.name) for field in fields(cls)}

    def make(stored: Any) -> Any:
        unknown = _checked(stored, dict).keys() - names
        if unknown:
            raise ValueError(f"it has no field {min(unknown)!r}")
        value = object.__new__(cls)
        for field in fields(cls):
            if field.name in stored:
                item = stored[field.name]
            elif field.default_factory is not MISSING:
                item = field.default_factory()
            elif field.default is not MISSING:
                item = field.default
            else:
                raise ValueError(f"its field {field.name!r} is not stored")
            object.__setattr__(value, field.name, item)  # past a frozen class, and without running __post_init__ again
        return value

    return parts, make
