"""JSON from a network: no number in it is one that a database, an array or a clock couldn't take."""

import json

import pytest

from fedprune.core.errors import ProtocolError
from fedprune.core.json_file import decode_json
from fedprune.core.validation import MAX_INT, parse_whole
from fedprune.wire.messages import Death, parse_message

HUGE = (str(MAX_INT + 1), str(-MAX_INT - 1), "9" * 23, "-" + "9" * 23, "9" * 500)


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "9" * 5000])
def test_what_is_no_number_is_refused(word: str) -> None:
    with pytest.raises(ValueError, match="number"):
        decode_json(f'{{"a": {word}}}')


def test_other_json_is_what_it_is() -> None:
    value = {"a": [MAX_INT, -MAX_INT, 0, 1.5, None, True, "9" * 99], "b": {"c": -7}}
    assert decode_json(json.dumps(value)) == value


@pytest.mark.parametrize("number", HUGE, ids=lambda text: f"{len(text)} characters")
def test_a_message_with_such_a_number_is_refused_by_the_name_of_its_field(number: str) -> None:
    raw = Death("board", 7).to_bytes().replace(b'"session":7', f'"session":{number}'.encode())
    with pytest.raises(ProtocolError) as raised:
        parse_message(raw)
    assert "session" in raised.value.what


@pytest.mark.parametrize("text", ["", "1.5", "-1", "٣", str(MAX_INT + 1), "9" * 5000])
def test_a_number_in_an_address_is_a_plain_one(text: str) -> None:
    with pytest.raises(ProtocolError) as raised:
        parse_whole("page", text, error=ProtocolError)
    assert raised.value.what == "page"
    assert parse_whole("page", str(MAX_INT)) == MAX_INT
