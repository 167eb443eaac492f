"""Reads the parameters of requests, and checks them before a database is read: queries, path segments and forms."""

from __future__ import annotations

from urllib.parse import parse_qs

from starlette.requests import Request

from fedprune.core.errors import ProtocolError
from fedprune.core.validation import check_word, parse_whole
from fedprune_server.web.state.record_page import MAX_PAGE_SIZE
from fedprune_server.web.state.records import DEVICE_STATES, LOG_LEVELS, MEMBER_STATUSES
from fedprune_server.web.state.status_writer import SORT_COLUMNS

MAX_SEARCH_LENGTH = 100
# The login form has four fields; parsing many takes time before anybody is logged in.
_MAX_FORM_FIELDS = 20
_YES_NO = ("yes", "no")
_FILTER_VALUES = {
    "state": DEVICE_STATES, "status": MEMBER_STATUSES, "online": _YES_NO, "gone": _YES_NO, "level": LOG_LEVELS,
}  # fmt: skip
_SORTS = (*SORT_COLUMNS, *(f"-{column}" for column in SORT_COLUMNS))


def page_number(request: Request) -> int:
    """The number of the requested page, from 1. Raises `ProtocolError` for anything else."""
    return parse_whole("page", request.query_params.get("page", "1"), 1, error=ProtocolError)


def paging(request: Request, size: int = 50) -> dict[str, int]:
    """The page, and its rows, by default `size`. Raises `ProtocolError` for text, or for a number out of range."""
    rows = parse_whole("size", request.query_params.get("size", str(size)), 1, MAX_PAGE_SIZE, error=ProtocolError)
    return {"page": page_number(request), "size": rows}


def sort_column(request: Request) -> str:
    """The column to sort by, after a minus for descending order. Raises `ProtocolError` for an unknown column."""
    return check_word("sort", request.query_params.get("sort", "name"), _SORTS, error=ProtocolError)


def search_text(request: Request) -> str:
    return request.query_params.get("q", "").strip()[:MAX_SEARCH_LENGTH]


def filters(request: Request, *names: str) -> dict[str, str]:
    """The filters that a request sets. Raises `ProtocolError` for an unknown value."""
    values = {name: value for name in names if (value := request.query_params.get(name))}
    for name, value in values.items():
        check_word(name, value, _FILTER_VALUES.get(name, (value,)), error=ProtocolError)
    return values


def order_number(request: Request) -> int:
    """The number in the path of an order. Raises `ProtocolError` for anything else."""
    return parse_whole("number", request.path_params["number"], error=ProtocolError)


async def form_fields(request: Request) -> dict[str, str]:
    """The fields of a form; none where the body is no form. Raises `ProtocolError` if there are too many."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/x-www-form-urlencoded":
        return {}
    body = (await request.body()).decode("utf-8", "replace")
    try:
        fields = parse_qs(body, keep_blank_values=True, max_num_fields=_MAX_FORM_FIELDS)
    except ValueError as error:
        raise ProtocolError("form", expected=f"at most {_MAX_FORM_FIELDS} fields", got="more") from error
    return {name: values[0] for name, values in fields.items()}
