"""Values: what the encoder takes comes back equal and of the same types at every depth; all else is refused by path."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime as dt
import decimal
import enum
import functools
import json
import math
import pathlib
import pickle
import sqlite3
import sys
import uuid
import zoneinfo
from typing import Any, Generic, NamedTuple, TypeVar

import pytest
from hypothesis import example, given, settings, strategies as st

from liteerresult import serialization
from liteerresult.errors import ContentDisallowed, DecodeError, EncodeError
from liteerresult.serialization import DEEPEST, Serializer, register_type

JSON = Serializer()
PICKLE = Serializer("pickle", ("json", "pickle"))


@register_type
class Color(enum.Enum):
    RED = 1
    CRIMSON = 1  # noqa: PIE796 - an alias
    BLUE = (2, "b")


@register_type(name="test.Access")
class Access(enum.Flag):
    NONE = 0
    READ = 1
    WRITE = 2
    BOTH = 3
    RUN = 4


@register_type
class Level(enum.IntEnum):
    LOW = 1


@register_type
@dataclasses.dataclass
class Point:
    x: Any
    y: Any = 0
    norm: Any = dataclasses.field(init=False, default=None)

    def __post_init__(self) -> None:
        self.norm = (self.x, self.y)

    @functools.cached_property
    def swapped(self) -> tuple[Any, Any]:
        return self.y, self.x


@register_type
@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    a: Any
    b: Any = dataclasses.field(default_factory=list)


@register_type
class Pair(NamedTuple):
    left: Any
    right: Any


class Ratio:
    def __init__(self, top: int, bottom: int) -> None:
        self.top, self.bottom = top, bottom

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ratio) and (self.top, self.bottom) == (other.top, other.bottom)

    def __hash__(self) -> int:
        return hash((self.top, self.bottom))


register_type(Ratio, encode=lambda ratio: (ratio.top, ratio.bottom), decode=lambda parts: Ratio(*parts))


def same(a: Any, b: Any) -> bool:  # noqa: C901, PLR0911, PLR0912 - one line for each type
    """Equal, of the same types at every depth; NaN is NaN and -0.0 is not 0.0."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return len(a) == len(b) and all(same(k, m) and same(v, w) for (k, v), (m, w) in zip(a.items(), b.items()))  # noqa: B905
    if isinstance(a, set | frozenset):
        left = list(b)
        for x in a:
            match = next((i for i, y in enumerate(left) if same(x, y)), None)
            if match is None:
                return False
            del left[match]
        return not left
    if isinstance(a, decimal.Decimal):
        return a.as_tuple() == b.as_tuple()
    if isinstance(a, dt.datetime | dt.time):
        return a.replace(tzinfo=None) == b.replace(tzinfo=None) and a.fold == b.fold and same(a.tzinfo, b.tzinfo)
    if isinstance(a, dt.timezone):
        return a == b and a.tzname(None) == b.tzname(None)
    if isinstance(a, pathlib.PurePath):
        return str(a) == str(b)
    if dataclasses.is_dataclass(a):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    return bool(a == b)


def back(value: Any) -> Any:
    text = JSON.encode(value)
    assert isinstance(text, str)
    json.loads(text)
    text.encode()  # valid UTF-8, as SQLite needs
    return JSON.decode(text, "json")


texts = st.text(st.characters(codec=None, exclude_categories=()), max_size=12) | st.sampled_from(
    ["$tuple", "$", '"$x', "\ud83d\ude00", "\udc00\ud800", "\0", "", "naïve", "a b", "😀"]
)
offsets = st.timedeltas(min_value=dt.timedelta(hours=-23, minutes=-59), max_value=dt.timedelta(hours=23, minutes=59))
fixed_zones = st.builds(dt.timezone, offsets) | st.builds(dt.timezone, offsets, texts) | st.just(dt.UTC)
zones = st.none() | fixed_zones | st.sampled_from(["Europe/Berlin", "UTC", "America/New_York"]).map(zoneinfo.ZoneInfo)
folds = st.sampled_from([0, 1])
paths = st.builds(
    lambda cls, parts: cls(*parts),
    st.sampled_from([pathlib.Path, pathlib.PurePosixPath]),
    st.lists(st.text(max_size=5).filter(lambda text: "\0" not in text), max_size=3),
)
windows_paths = st.builds(
    pathlib.PureWindowsPath, st.sampled_from(["C:/a/b", "//host/share/x", "a\\b", "", "C:x", "..\\é"])
)
all_leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.builds(lambda power, more: -(2**power) + more, st.sampled_from([2048, 2126, 10_000]), st.integers(-1, 1)),
    st.builds(lambda power, more: 2**power + more, st.sampled_from([2048, 2126, 10_000]), st.integers(-1, 1)),
    st.floats(),
    texts,
    st.binary(max_size=8),
    st.complex_numbers(),
    st.dates(),
    st.builds(lambda value, zone, fold: value.replace(tzinfo=zone, fold=fold), st.datetimes(), zones, folds),
    st.builds(lambda value, zone, fold: value.replace(tzinfo=zone, fold=fold), st.times(), zones, folds),
    st.timedeltas(),
    zones,
    st.decimals(),
    st.sampled_from(["sNaN12", "-sNaN", "NaN7", "1E+999999", "-0E-5", "0.10", "-Infinity"]).map(decimal.Decimal),
    st.uuids(),
    paths,
    windows_paths,
    st.sampled_from([*Color, *Level, Access.READ, Access.BOTH, Access.NONE, Access.READ | Access.RUN]),
)


@st.composite
def leaves(draw: st.DrawFn) -> Any:
    return draw(all_leaves)  # one name: Hypothesis refuses the pages that the whole would fill in a report


def is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:  # a signaling NaN has no hash either
        return False
    return True


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    hashable = inner.filter(is_hashable)
    return st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(texts, inner, max_size=4),
        st.dictionaries(hashable, inner, max_size=4),
        st.sets(hashable, max_size=4),
        st.frozensets(hashable, max_size=4),
        st.binary(max_size=4).map(bytearray),
        st.builds(Point, inner, inner),
        st.builds(Frozen, inner, inner),
        st.builds(Pair, inner, inner),
    )


values = st.recursive(leaves(), containers, max_leaves=12)


class Opaque:
    pass


class Hostile:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


class MyInt(int):
    pass


class MyFloat(float):
    def item(self) -> float:
        return float(self)


class MyArray(list[int]):
    def tolist(self) -> list[int]:
        return list(self)


class Unregistered(enum.IntEnum):
    ONE = 1


class Plain(NamedTuple):
    x: int


refused = st.sampled_from(
    [
        Opaque(),
        Hostile(),
        MyInt(3),
        MyFloat(1),
        MyArray([1]),
        Unregistered.ONE,
        Plain(1),
        collections.OrderedDict(a=1),
        collections.defaultdict(list),
        range(3),
        object,
        len,
        memoryview(b""),
        ValueError("x"),
        iter(()),
        dt.tzinfo(),
    ]
)

# Each way to put a value into another, with the step that the path must show.
wraps: list[tuple[Any, str]] = [
    (lambda x: [0, x], "[1]"),
    (lambda x: (x,), "[0]"),
    (lambda x: {"blob": x}, ".blob"),
    (lambda x: {"a b": x}, '["a b"]'),
    (lambda x: {'q"\n': x}, '["q\\"\\n"]'),
    (lambda x: {"$tuple": x}, '["$tuple"]'),
    (lambda x: {7: x}, "[7]"),
    (lambda x: {(1, "k"): x}, "[(1, 'k')]"),
    (lambda x: Point(1, [x]), ".y[0]"),
    (lambda x: Frozen(a={"deep": x}), ".a.deep"),
    (lambda x: Pair(1, x), "[1]"),
]


class TestValues:
    @settings(max_examples=400, deadline=None)
    @given(values)
    @example([0.0, -0.0, math.nan, math.inf, -math.inf])
    @example({"$tuple": [1]})
    @example({"a": {"$dict": [[1, 2]]}, 1: True})
    @example({1: "int", "1": "str", 1.5: "float", None: "none", (1,): "tuple", False: "bool"})
    @example("\ud800\udc00 is not 𐀀")
    @example(dt.datetime(2024, 10, 27, 2, 30, fold=1, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin")))
    @example([True, 1, 1.0, "1", b"1"])
    @example(dt.datetime(2000, 1, 1, tzinfo=dt.timezone(dt.timedelta(microseconds=1))))
    @example(dt.time(1, tzinfo=dt.timezone(-dt.timedelta(microseconds=1))))
    def test_comes_back_the_same(self, value: Any) -> None:
        assert same(back(value), value)

    @given(values)
    def test_encoding_leaves_the_value_alone(self, value: Any) -> None:
        before = pickle.dumps(value)
        JSON.encode(value)
        assert pickle.dumps(value) == before

    def test_same_can_fail(self) -> None:
        """The oracle of these tests sees what == does not."""
        assert not same([1], [True])
        assert not same({1: 2}, {1.0: 2})
        assert not same(0.0, -0.0)
        assert not same((1,), [1])
        assert not same({1}, {True})

    @pytest.mark.parametrize(
        ("value", "text"),
        [
            ({"rows": 3}, '{"rows": 3}'),
            (None, "null"),
            (True, "true"),
            (12, "12"),
            ("é", '"é"'),
            ("\ud800", '"\\ud800"'),
            ((1, "a"), '{"$tuple": [1, "a"]}'),
            ({7}, '{"$set": [7]}'),
            (frozenset({7}), '{"$frozenset": [7]}'),
            (b"hi", '{"$bytes": "aGk="}'),
            (bytearray(b"hi"), '{"$bytearray": "aGk="}'),
            ({1: "a"}, '{"$dict": [[1, "a"]]}'),
            ({"$x": 1}, '{"$dict": [["$x", 1]]}'),
            (math.nan, '{"$float": "nan"}'),
            (2**2048, json.dumps({"$int": hex(2**2048)})),
            ("\ud800\udc00", '{"$str": ["\\ud800", "\\udc00"]}'),
            (dt.datetime(2026, 1, 31, 12, tzinfo=dt.UTC), '{"$datetime": "2026-01-31T12:00:00+00:00"}'),
            (
                dt.datetime(2026, 1, 31, 12, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin")),
                '{"$datetime": "2026-01-31T12:00:00+01:00", "tz": {"$ZoneInfo": "Europe/Berlin"}}',
            ),
            (
                dt.timezone(dt.timedelta(hours=1), "CET"),
                '{"$timezone": [{"$timedelta": [0, 3600, 0]}, "CET"]}',
            ),
            (dt.time(12, 30, fold=1), '{"$time": "12:30:00", "fold": 1}'),
            (dt.date(2026, 1, 31), '{"$date": "2026-01-31"}'),
            (dt.timedelta(1, 2, 3), '{"$timedelta": [1, 2, 3]}'),
            (decimal.Decimal("1.50"), '{"$Decimal": "1.50"}'),
            (uuid.UUID(int=1), '{"$UUID": "00000000-0000-0000-0000-000000000001"}'),
            (1 - 0.5j, '{"$complex": [1.0, -0.5]}'),
            (pathlib.PurePosixPath("/a"), '{"$PurePosixPath": "/a"}'),
            (Access.READ | Access.RUN, '{"$type": "test.Access", "value": 5}'),
            (Access.BOTH, '{"$type": "test.Access", "value": "BOTH"}'),
        ],
    )
    def test_stored_form(self, value: Any, text: str) -> None:
        assert JSON.encode(value) == text
        assert same(JSON.decode(text, None), value)

    def test_a_writers_int_limit_makes_no_difference(self) -> None:
        old = sys.get_int_max_str_digits()
        try:
            sys.set_int_max_str_digits(0)
            text = JSON.encode([10**5000, 10**616])
            sys.set_int_max_str_digits(640)
            assert JSON.decode(text, "json") == [10**5000, 10**616]
        finally:
            sys.set_int_max_str_digits(old)

    def test_sqlite_takes_every_text(self) -> None:
        with sqlite3.connect(":memory:") as db:
            text = JSON.encode({"a": "\ud800", "\udc00": ["\ud800\udc00", "😀"]})
            stored = db.execute("SELECT ?, json_valid(?)", (text, text)).fetchone()
        db.close()
        assert stored == (text, 1)

    @pytest.mark.parametrize("ensure_ascii", [True, False])
    @pytest.mark.parametrize(
        "make",
        [
            None,
            lambda: None,
            lambda *_: lambda value, level: ("{}",),
            lambda *_: lambda value, level: 3,
            "as it is",
        ],
    )
    def test_whatever_python_has_of_an_encoder_the_text_is_the_same(
        self, monkeypatch: pytest.MonkeyPatch, make: Any, ensure_ascii: bool
    ) -> None:
        if make != "as it is":
            monkeypatch.setattr(serialization, "c_make_encoder", make)
        encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, check_circular=False, allow_nan=False)
        dump = serialization._encode_of(encoder)
        for value in ({"a": [1, 2.5, None, True]}, "\x00\x7f\ud800ä\n", -0.0, [], {}, [[{}]], 10**400):
            assert dump(value) == encoder.encode(value)
        with pytest.raises(ValueError, match="Out of range"):
            dump([math.nan])

    def test_usual_values_are_neither_copied_nor_tagged(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The store's hot path counts on it: without the short way each would cost three times as much."""
        monkeypatch.setattr(serialization, "_Walk", None)
        for value in (None, 3, 1.5, "é", [1, [2.5, "x"]], {"rows": 3, "more": {"a": [None, True]}}):
            assert same(back(value), value)
        for value in ((1,), {"a": math.nan}, {"$x": 1}, {1: 2}, "\ud800"):
            with pytest.raises(TypeError, match="'NoneType' object is not callable"):
                JSON.encode(value)


class TestRefusals:
    @given(refused, st.lists(st.sampled_from(wraps), max_size=6))
    def test_names_the_path(self, bad: Any, around: list[tuple[Any, str]]) -> None:
        value, path = bad, ""
        for wrap, step in around:
            value, path = wrap(value), step + path
        with pytest.raises(EncodeError) as caught:
            JSON.encode(value)
        # A Point stores norm as well, but y comes first.
        assert caught.value.path == "$" + path
        assert "register_type" in caught.value.remedy
        assert "serializer='pickle'" in caught.value.remedy

    def test_the_path_of_the_design(self) -> None:
        with pytest.raises(EncodeError, match=r"^\$\.rows\[3\]\.blob: ") as caught:
            JSON.encode({"rows": [1, 2, 3, {"blob": Opaque()}]})
        assert "Opaque" in str(caught.value)

    def test_a_key_a_set_element_and_a_time_zone(self) -> None:
        bad = Plain(1)
        for value, path in [
            ({"m": {bad: 1}}, "$.m[Plain(x=1)]~"),
            ({"m": {(1, bad): 1}}, "$.m[(1, Plain(x=1))]~[1]"),
            ({"s": {bad}}, "$.s{Plain(x=1)}"),
            ({"when": dt.datetime(2026, 1, 1, tzinfo=type("Zone", (dt.tzinfo,), {})())}, "$.when.tzinfo"),
        ]:
            with pytest.raises(EncodeError) as caught:
                JSON.encode(value)
            assert caught.value.path == path

    def test_an_unprintable_key(self) -> None:
        with pytest.raises(EncodeError) as caught:
            JSON.encode({Hostile(): 1})
        assert "Hostile" in caught.value.path

    @pytest.mark.parametrize(("value", "method"), [(MyFloat(1), ".item()"), (MyArray([1]), ".tolist()")])
    def test_remedy_for_numbers_of_other_libraries(self, value: Any, method: str) -> None:
        with pytest.raises(EncodeError) as caught:
            JSON.encode(value)
        assert method in caught.value.remedy

    def test_circular(self) -> None:
        value: dict[str, Any] = {"list": [1]}
        value["list"].append(value)
        with pytest.raises(EncodeError, match="circular") as caught:
            JSON.encode(value)
        assert caught.value.path == "$.list[1]"
        point = Point(1)
        point.y = {"me": point}
        with pytest.raises(EncodeError, match="circular"):
            JSON.encode(point)

    def test_a_shared_part_is_not_circular(self) -> None:
        part = [1]
        assert back([part, (part,), part]) == [[1], ([1],), [1]]

    @pytest.mark.parametrize("wrap", [lambda x: [x], lambda x: {"k": x}, lambda x: (x,), lambda x: {1: x}])
    def test_depth(self, wrap: Any) -> None:
        value: Any = 1
        for _ in range(DEEPEST):
            value = wrap(value)
        assert same(back(value), value)
        with pytest.raises(EncodeError, match="nested"):
            JSON.encode(wrap(value))
        for _ in range(100_000):
            value = wrap(value)
        with pytest.raises(EncodeError, match="nested"):
            JSON.encode(value)
        while type(value) in {list, tuple, dict}:  # freed level by level: the interpreter's own way recurses
            value = next(iter(value.values())) if type(value) is dict else value[0]

    def test_size(self) -> None:
        small = Serializer(_limit=100)
        assert small.encode("x" * 98) == '"' + "x" * 98 + '"'
        assert small.encode("é" * 49) == '"' + "é" * 49 + '"'
        for value in ("x" * 99, "é" * 50, ["x" * 50, "y" * 50]):
            with pytest.raises(EncodeError, match="bytes; SQLite"):
                small.encode(value)
        with pytest.raises(EncodeError, match="bytes; SQLite"):
            Serializer("pickle", ("pickle",), _limit=100).encode("x" * 100)

    def test_zone_without_a_key(self) -> None:
        with open(next(iter(zoneinfo.TZPATH)) + "/UTC", "rb") as file:
            zone = zoneinfo.ZoneInfo.from_file(file)
        with pytest.raises(EncodeError, match="without a key"):
            JSON.encode([zone])


class TestReading:
    @pytest.mark.parametrize(
        "text",
        [
            "",
            "{",
            "nonsense",
            "[1] 2",
            " ",
            '{"$unknown": 1}',
            '{"$tuple": 1}',
            '{"$tuple": [], "more": 1}',
            '{"$tuple": [], "$set": []}',
            '{"$set": [[1]]}',
            '{"$dict": [[[], 1]]}',
            '{"$dict": [1]}',
            '{"$bytes": "not base64!"}',
            '{"$bytes": "aG!k="}',
            '{"$bytes": 3}',
            '{"$int": 5}',
            '{"$float": "1.5"}',
            '{"$float": []}',
            '{"$str": "x"}',
            '{"$complex": [1.0]}',
            '{"$complex": [1, "x"]}',
            '{"$datetime": "yesterday"}',
            '{"$datetime": "2026-01-01T00:00:00", "tz": "UTC"}',
            '{"$datetime": "2026-01-01T00:00:00", "fold": 2}',
            '{"$timedelta": [1e400]}',
            '{"$timezone": [1]}',
            '{"$ZoneInfo": "Nowhere/Nothing"}',
            '{"$ZoneInfo": "../../etc/passwd"}',
            '{"$Decimal": "x"}',
            '{"$Decimal": "1", "cls": "x"}',
            '{"$UUID": []}',
            '{"$PosixPath": 1}',
            '{"$type": "os.system", "value": "true"}',
            '{"$type": ["test.Access"], "value": 1}',
            '{"$type": "test.Access"}',
            '{"$type": "test.Access", "value": "GONE"}',
            '{"$type": "test.Access", "value": true}',
            '{"$type": "test_serialization.Point", "value": 3}',
            "[" * 100_000,
            '[{"$tuple": ' * 50_000,
            "1" * 5000,
        ],
    )
    def test_malformed(self, text: str) -> None:
        with pytest.raises(DecodeError) as caught:
            JSON.decode(text, "json", task_id="t1", column="args")
        assert (caught.value.task_id, caught.value.column) == ("t1", "args")
        assert "'t1', column args: " in str(caught.value)
        assert caught.value.__cause__ is not None

    def test_what_plain_sql_writers_store(self) -> None:
        assert JSON.decode(None, "json") is None
        assert JSON.decode(None, "pickle") is None
        assert same(JSON.decode(3, None), 3)
        assert same(JSON.decode(1.5, "json"), 1.5)
        assert JSON.decode('\n {"rows":3} \n', None) == {"rows": 3}
        assert JSON.decode('{"rows":3}\n', None) == {"rows": 3}
        assert JSON.decode(b'{"rows": [null]}', None) == {"rows": [None]}
        assert math.isnan(JSON.decode("NaN", None))
        for data in (b"\xff", b"\x80\x04N.", [1]):
            with pytest.raises(DecodeError):
                JSON.decode(data, None)

    def test_an_unregistered_type_names_the_remedy(self) -> None:
        with pytest.raises(DecodeError, match=r"call register_type\(cls, name='film.Frame'\)"):
            JSON.decode('[{"$type": "film.Frame", "value": {}}]', "json")

    def test_reading_imports_nothing_that_a_file_names(self) -> None:
        before = set(sys.modules)
        for text in ('{"$type": "antigravity.x", "value": 1}', '{"$ZoneInfo": "antigravity"}', '{"$antigravity": 1}'):
            with pytest.raises(DecodeError):
                JSON.decode(text, "json")
        assert not [name for name in set(sys.modules) - before if "antigravity" in name]

    @given(st.text() | st.binary() | st.integers() | st.floats() | st.none())
    def test_any_data_decodes_or_is_a_decode_error(self, data: Any) -> None:
        for encoding in ("json", None, "other"):
            with contextlib.suppress(DecodeError):
                JSON.decode(data, encoding)

    @given(
        st.recursive(st.none() | st.integers() | texts, lambda inner: st.lists(inner) | st.dictionaries(texts, inner))
    )
    def test_any_json_decodes_or_is_a_decode_error(self, plain: Any) -> None:
        with contextlib.suppress(DecodeError):
            JSON.decode(json.dumps(plain), "json")


class TestEncodings:
    @pytest.mark.parametrize(
        ("serializer", "accept", "text"),
        [
            ("yaml", ("json",), "unknown serializer 'yaml'"),
            ("json", ("json", "yaml"), "unknown serializer 'yaml'"),
            ("pickle", ("json",), "must be accepted as well"),
            ("json", (), "must be accepted as well"),
            ("json", "json", "not a string"),
        ],
    )
    def test_settings(self, serializer: str, accept: Any, text: str) -> None:
        with pytest.raises(ValueError, match=text):
            Serializer(serializer, accept)

    def test_pickle_is_opt_in(self) -> None:
        data = PICKLE.encode(Opaque)
        assert isinstance(data, bytes)
        assert PICKLE.encoding == "pickle"
        assert PICKLE.decode(data, "pickle") is Opaque
        assert PICKLE.decode('{"rows": 3}', "json") == {"rows": 3}
        with pytest.raises(ContentDisallowed, match="'pickle'") as caught:
            JSON.decode(data, "pickle", task_id="t")
        assert caught.value.task_id == "t"
        with pytest.raises(ContentDisallowed):
            Serializer("pickle", ("pickle",)).decode("1", None)
        with pytest.raises(DecodeError, match="unknown encoding 'yaml'"):
            PICKLE.decode(data, "yaml")

    def test_a_refused_pickle_runs_nothing(self) -> None:
        ran: list[int] = []

        class Bomb:
            def __reduce__(self) -> Any:
                return _explode, ()

        globals()["_ran"] = ran
        data = pickle.dumps(Bomb())
        for read in (JSON.decode, lambda data, encoding: JSON.decode_exception(data, encoding, None)):
            with pytest.raises(ContentDisallowed):
                read(data, "pickle")
        assert ran == []
        PICKLE.decode(data, "pickle")  # the control: it would have
        assert ran == [1]

    def test_what_pickle_can_not_do(self) -> None:
        with pytest.raises(EncodeError, match="pickled"):
            PICKLE.encode(lambda: None)
        for data in (b"rubbish", "text", 'null"'):
            with pytest.raises(DecodeError):
                PICKLE.decode(data, "pickle")


_ran: list[int] = []


def _explode() -> int:
    _ran.append(1)
    return 1


Item = TypeVar("Item")


class TestRegistration:
    def test_a_readable_form(self) -> None:
        text = JSON.encode(Point(1, "b"))
        assert text == f'{{"$type": "{__name__}.Point", "value": {{"x": 1, "y": "b", "norm": {{"$tuple": [1, "b"]}}}}}}'

    def test_own_functions(self) -> None:
        assert back({"r": [Ratio(1, 2)], Ratio(3, 4): 5}) == {"r": [Ratio(1, 2)], Ratio(3, 4): 5}

    def test_a_failing_own_function(self) -> None:
        class Moody:
            pass

        def fail(_: Any) -> Any:
            raise RuntimeError("not today")

        register_type(Moody, name="moody", encode=fail, decode=fail)
        with pytest.raises(EncodeError, match="not today") as caught:
            JSON.encode([Moody()])
        assert caught.value.path == "$[0]"
        with pytest.raises(DecodeError, match="not today"):
            JSON.decode('{"$type": "moody", "value": 1}', "json")

    def test_an_own_function_that_goes_round(self) -> None:
        class Loop:
            pass

        register_type(Loop, encode=lambda loop: [loop], decode=lambda parts: parts)
        with pytest.raises(EncodeError, match="circular"):
            JSON.encode(Loop())
        register_type(Loop, encode=lambda _: Loop(), decode=lambda parts: parts)
        with pytest.raises(EncodeError, match="nested"):
            JSON.encode(Loop())

    def test_subclasses_are_other_types(self) -> None:
        class Point3(Point):
            pass

        with pytest.raises(EncodeError, match="Point3"):
            JSON.encode(Point3(1))

    def test_dataclass_state_that_no_field_holds(self) -> None:
        point = Point(1, 2)
        assert point.swapped == (2, 1)  # cached in the instance; made again when asked for
        assert back(point) == point
        point.extra = 1  # type: ignore[attr-defined]
        with pytest.raises(EncodeError, match="'extra' is not a field"):
            JSON.encode(point)
        with pytest.raises(TypeError, match="encode="):
            register_type(dataclasses.make_dataclass("Listy", ["x"], bases=(list,)))

    def test_generic_dataclass(self) -> None:
        @register_type
        @dataclasses.dataclass
        class Box(Generic[Item]):
            item: Item

        assert back(Box[int](3)) == Box(3)

    def test_fields_change_between_versions(self) -> None:
        name = f"{__name__}.Frozen"
        assert JSON.decode(json.dumps({"$type": name, "value": {"a": 1}}), None) == Frozen(1, [])
        with pytest.raises(DecodeError, match="'a' is not stored"):
            JSON.decode(json.dumps({"$type": name, "value": {"b": 1}}), None)
        with pytest.raises(DecodeError, match="no field 'c'"):
            JSON.decode(json.dumps({"$type": name, "value": {"a": 1, "c": 1}}), None)

    def test_a_second_name_keeps_the_first(self) -> None:
        cls = enum.Enum("Mood", "GOOD BAD")
        register_type(cls, name="old.Mood")
        old = JSON.encode(cls.GOOD)
        register_type(cls, name="new.Mood")
        assert JSON.encode(cls.GOOD) == '{"$type": "new.Mood", "value": "GOOD"}'
        assert JSON.decode(old, "json") is cls.GOOD

    def test_names_are_taken_once(self) -> None:
        first, again = (type("Reloaded", (), {}) for _ in range(2))
        for cls in (first, again):  # as importlib.reload and notebooks do
            register_type(cls, encode=lambda _: None, decode=lambda _, cls=cls: cls())
        assert type(back(first())) is again
        with pytest.raises(ValueError, match=r"Reloaded is registered as .*; give .*Opaque another name="):
            register_type(Opaque, name=f"{__name__}.Reloaded", encode=lambda _: None, decode=lambda _: None)

    @pytest.mark.parametrize("cls", [int, str, bool, list, dict, tuple, float, decimal.Decimal, dt.datetime, uuid.UUID])
    def test_built_in_forms_stay(self, cls: type) -> None:
        with pytest.raises(ValueError, match="as it is"):
            register_type(cls, encode=str, decode=cls)

    def test_misuse(self) -> None:
        with pytest.raises(TypeError, match="needs a class"):
            register_type(Point(1))  # type: ignore[call-overload]
        with pytest.raises(TypeError, match="encode="):
            register_type(Opaque)
        with pytest.raises(ValueError, match="both"):
            register_type(Opaque, encode=str)
