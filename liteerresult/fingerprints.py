"""What identifies a call, so that a resumed batch can tell the same calls from others."""

from __future__ import annotations

import functools
import io
import json
from typing import TYPE_CHECKING, Any

from .errors import EncodeError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["call_name", "fingerprint", "unfold"]


def call_name(function: Callable[..., Any]) -> str:
    """Return what to call a call of *function*: its module and qualified name."""
    inner = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    name = getattr(inner, "__qualname__", None) or type(inner).__qualname__
    return f"{getattr(inner, '__module__', None) or type(inner).__module__}.{name}"


def _canonical(stored: Any) -> Any:
    """Sort what has no order of its own: sets are iterated differently in every process."""
    if isinstance(stored, dict):
        result = {key: _canonical(value) for key, value in stored.items()}
        for tag in ("$set", "$frozenset"):
            if tag in result and isinstance(result[tag], list):
                result[tag].sort(key=lambda element: json.dumps(element, sort_keys=True))
        if isinstance(result.get("$dict"), list):
            result["$dict"].sort(key=lambda pair: json.dumps(pair, sort_keys=True))
        return result
    if isinstance(stored, list):
        return [_canonical(element) for element in stored]
    return stored


def fingerprint(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], encode: Callable[[Any], Any]
) -> tuple[str, Any, Any]:
    """
    Identify a call by its function's name and its arguments.

    Arguments that JSON can't keep are identified by their pickle, and shown by their `repr`.

    Returns:
        The fingerprint, and the encoded args and kwargs.
    """
    try:
        items = encode(list(args))  # a list needs no tag, and is written faster than a tuple
        encoded = f'{{"$tuple": {items}}}', encode(kwargs) if kwargs else "{}"
        identity = f"[{encoded[0]}, {encoded[1]}]"
        if kwargs or "{" in items:
            identity = json.dumps([_canonical(json.loads(part)) for part in encoded], sort_keys=True)
        raw = identity.encode()
    except EncodeError:
        encoded = (
            encode(tuple(_shown(value, encode) for value in args)),
            encode({k: _shown(v, encode) for k, v in kwargs.items()}),
        )
        try:
            raw = _canonical_pickle((args, kwargs))
        except Exception:  # noqa: BLE001 - anything may be raised by what can't be pickled
            raw = "\n".join(encoded).encode()
    digest = _digest_of(name).copy()
    digest.update(raw)
    return digest.hexdigest(), *encoded


@functools.lru_cache(maxsize=16)
def _digest_of(name: str) -> Any:
    from hashlib import blake2b

    return blake2b(name.encode() + b"\0", digest_size=16)


@functools.cache
def _pickler() -> Any:
    """Return a pickler that writes equal values alike: sets and dicts sorted, whichever of them are one object."""
    import pickle

    base: Any = pickle._Pickler  # the one in Python can be taught

    def save_set(self: Any, value: Any) -> None:
        self.write(type(value).__name__.encode() + b"{" + b",".join(sorted(map(_canonical_pickle, value))) + b"}")

    def save_dict(self: Any, value: Any) -> None:
        self.write(b"dict{" + b",".join(sorted(_canonical_pickle(pair) for pair in value.items())) + b"}")

    dispatch = {**base.dispatch, set: save_set, frozenset: save_set, dict: save_dict}
    return type("CanonicalPickler", (base,), {"dispatch": dispatch})


def _canonical_pickle(value: Any) -> bytes:
    """Identify a value; what it returns is not to be loaded."""
    file = io.BytesIO()
    pickler = _pickler()(file, protocol=4)
    pickler.fast = True  # no references to what came before
    pickler.dump(value)
    return file.getvalue()


def unfold(function: Callable[..., Any], calls: Sequence[Any]) -> Sequence[Any]:
    """Return the calls with what a partial function brings."""
    while isinstance(function, functools.partial):
        partial, function = function, function.func
        calls = [((*partial.args, *args), {**partial.keywords, **kwargs}) for args, kwargs in calls]
    return calls


def _shown(value: Any, encode: Callable[[Any], Any]) -> Any:
    try:
        encode(value)
    except EncodeError:
        return repr(value)
    return value
