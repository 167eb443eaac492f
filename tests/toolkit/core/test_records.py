"""Records: read back as they were written, and every refusal names the field."""

import json
import math
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.core import records
from fedprune.core.errors import ProtocolError
from fedprune.core.records import check_free_form, hex_text, item_count, number_range, printable_text, word_of

pytestmark = pytest.mark.board


@dataclass(frozen=True)
class Layer:
    name: Annotated[str, printable_text(20)]
    share: Annotated[float, number_range(0, 1)] | None = None


@dataclass(frozen=True)
class Net:
    count: Annotated[int, number_range(0, 100)]
    layers: Annotated[tuple[Layer, ...], item_count(3)]
    key: Annotated[str, hex_text(4)] = "00ff"
    kind: Annotated[str, word_of(("cnn", "vit"))] = "cnn"


names = st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=20)
nets = st.builds(
    Net, st.integers(0, 100), st.lists(st.builds(Layer, names, st.none() | st.floats(0, 1)), max_size=3).map(tuple)
)


def read(raw: bytes) -> Net:
    return records.decode_record(Net, raw, "net", ProtocolError)


@given(nets)
def test_what_was_written_is_what_is_read_and_unknown_keys_are_ignored(net: Net) -> None:
    raw = records.encode_record(net)
    assert read(raw) == net
    assert records.convert_record(Net, json.loads(raw) | {"newer": 1}, "net", ProtocolError) == net


@pytest.mark.parametrize(
    ("change", "place", "got"),
    [
        ({"count": 101}, "net: count", "101"),
        ({"count": True}, "net: count", "True"),
        ({"count": 1.5}, "net: count", "1.5"),
        ({"key": "00fg"}, "net: key", "'00fg'"),
        ({"key": "00ff\n"}, "net: key", "'00ff\\n'"),
        ({"kind": "cnn\n"}, "net: kind", "'cnn\\n'"),
        ({"layers": [{"name": "a\0"}]}, "net: layers[0].name", "'a\\x00'"),
        ({"layers": [{"name": "a"}, {"name": "b", "share": 2}]}, "net: layers[1].share", "2"),
        ({"layers": [{"name": "a"}] * 4}, "net: layers", "list of length 4"),
        ({"layers": [{}]}, "net: layers[0].name", "nothing"),
    ],
    ids=str,
)
def test_a_wrong_field_is_named_with_what_it_has(change: dict[str, Any], place: str, got: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        records.convert_record(Net, {"count": 1, "layers": [], **change}, "net", ProtocolError)
    assert (caught.value.what, caught.value.got) == (place, got)
    assert caught.value.expected


@given(
    st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda x: st.lists(x) | st.dictionaries(names, x))
)
def test_anything_else_is_refused_and_raises_nothing_else(value: object) -> None:
    with pytest.raises(ProtocolError):
        records.convert_record(Net, value, "net", ProtocolError)


@pytest.mark.parametrize("raw", [b"", b"{", b"[" * 100_000, b'{"count":' + b"[" * 100_000, b'\xff{"count":1}', b"1 2"])
def test_what_is_no_json_is_refused(raw: bytes) -> None:
    with pytest.raises(ProtocolError):
        read(raw)


@pytest.mark.parametrize("value", [math.nan, math.inf, {1, 2}, b"raw", "\ud800"])
def test_what_json_lacks_is_refused(value: object) -> None:
    layer = {"name": "a", "share": value} if not isinstance(value, str) else {"name": value}
    with pytest.raises(ProtocolError):
        records.convert_record(Layer, layer, "layer", ProtocolError)


def test_free_values_have_limits() -> None:
    check_free_form({"a": [{"b": 1.5, "c": None, "d": "text"}]}, "free", ProtocolError)
    nested: Any = 1
    for _ in range(9):
        nested = [nested]
    for wrong in (nested, {"a": 2**63}, {"a": "\0"}, {"\0": 1}):
        with pytest.raises(ProtocolError):
            check_free_form(wrong, "free", ProtocolError)
