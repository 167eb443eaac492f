"""Addresses of web servers that have blobs: what is taken, in one form, and what isn't."""

from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.core.errors import ProtocolError
from fedprune.wire.urls import LOOPBACK, MAX_URL, BlobUrl

pytestmark = pytest.mark.board

NAME = "ab" + "0" * 62
HOST = st.one_of(
    st.lists(st.from_regex(r"[a-z]([a-z0-9-]{0,8}[a-z0-9])?", fullmatch=True), min_size=1, max_size=4).map(".".join),
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).map(lambda address: f"[{address}]"),
)
PATH = st.lists(st.from_regex(r"[A-Za-z0-9_~-][A-Za-z0-9._~-]{0,8}", fullmatch=True), max_size=4)


@given(HOST, st.none() | st.integers(1, 65_535), PATH, st.booleans())
def test_what_is_taken_means_what_it_says(host: str, port: int | None, path: list[str], slash: bool) -> None:
    url_text = f"https://{host}" + (f":{port}" if port else "") + "".join(f"/{p}" for p in path) + "/" * slash
    url = BlobUrl.parse(url_text)
    meant = urlsplit(url_text)
    assert (url.host, url.port, url.tls) == (meant.hostname, port or 443, True)
    assert url.path == meant.path.rstrip("/")
    assert BlobUrl.parse(str(url)) == url
    assert urlsplit(str(url) + "/x").hostname == meant.hostname


@given(st.text(max_size=60) | st.text(alphabet="htps:/.@?#%[]a1-\\ \n\t", max_size=40).map(lambda t: f"https://{t}"))
def test_anything_is_taken_in_one_form_or_refused(text: str) -> None:
    try:
        url = BlobUrl.parse(text)
    except ProtocolError:
        return
    assert BlobUrl.parse(str(url)) == url
    split_url = urlsplit(str(url))
    assert split_url.username is None
    assert not split_url.query
    assert not split_url.fragment
    assert url.tls or url.host in LOOPBACK
    assert str(url).isascii()
    assert str(url).isprintable()


@pytest.mark.parametrize(
    "wrong",
    [
        "http://models.example",
        "https://user:secret@models.example",
        "https://models.example?x=1",
        "https://models.example/%2e%2e",
        "https://models.example/a/../b",
        "https://models.example:65536",
        "https://2130706433",
        "https://[fe80::1%25eth0]",
        "https://models.example/" + "a/" * MAX_URL,
    ],
)
def test_whatever_is_no_such_address_is_refused(wrong: object) -> None:
    with pytest.raises(ProtocolError) as caught:
        BlobUrl.parse(wrong)
    assert "secret" not in str(caught.value)


def test_blobs_lie_as_in_a_stores_folder() -> None:
    url = BlobUrl.parse("https://Models.example/fleet/")
    assert str(url) == "https://models.example/fleet"
    assert url.blob(NAME) == f"/fleet/ab/{NAME}"
    assert url.table(NAME) == f"/fleet/ab/{NAME}.leaves"
    assert str(BlobUrl.parse("https://models.example:443/")) == "https://models.example"
