"""The console's pages."""

from __future__ import annotations

from html import escape

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from fedprune_server.console.context import Console, session_of


def login_page(
    request: Request, console: Console, *, csrf: str, error: str, next_path: str, empty: bool
) -> HTMLResponse:
    """The login form.

    Args:
        request: Who asks.
        console: The console.
        csrf: What the form must repeat in the field `csrf`.
        error: What was wrong; empty at first.
        next_path: Where to go on then, for the field `next`.
        empty: Whether nobody has an account yet.
    """
    first = "<p>Nobody has an account yet: fedprune-server operators add NAME --role admin</p>" if empty else ""
    return HTMLResponse(
        f"<!doctype html><title>fedprune</title>{first}<p>{escape(error)}</p><form method=post action=/login>"
        f'<input type=hidden name=csrf value="{escape(csrf)}"><input type=hidden name=next value="{escape(next_path)}">'
        "<input name=name><input name=password type=password><button>Log in</button></form>"
    )


def install(app: FastAPI, console: Console) -> None:
    """Add the pages' routes."""

    @app.get("/")
    async def overview(request: Request) -> Response:
        return HTMLResponse(f"<!doctype html><title>fedprune</title><p>{escape(session_of(request).operator.name)}")
