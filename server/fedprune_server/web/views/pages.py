"""The console's pages: HTML from templates, complete without scripts; scripts keep them live.

Everything that a template shows is escaped; forms and orders carry the session's token. The server publishes a device's
plan and a job's coverage only when an operator orders them, which these pages do. Handlers are plain functions, which
run in threads, because they query databases.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from fedprune.core.errors import FedpruneError, ProtocolError
from fedprune.output import chart_html
from fedprune.wire.topics import check_device
from fedprune_server.web.auth.roles import ORDER_KINDS, has_role, is_accepted
from fedprune_server.web.context import Console, session_of
from fedprune_server.web.database import MAX_AUDIT_LINES
from fedprune_server.web.parameters import filters, page_number, search_text, sort_column
from fedprune_server.web.state.fleet_view import DEVICE_FILTERS
from fedprune_server.web.state.orders import RefusedError
from fedprune_server.web.state.records import LOG_LEVELS
from fedprune_server.web.views import formatting as phrases
from fedprune_server.web.views import presentation

# Devices, lines and entries of a page: a browser on a phone lays out a hundred rows at once.
ROWS_PER_PAGE = 100

ROUNDS_PER_PAGE = 25
# How many alerts, boards and lines the overview shows: it fits on a screen.
OVERVIEW_ROWS = 8

# Details of a device that are older are ordered again when its page is opened; making them costs the server time.
DETAILS_LIFETIME_S = 15.0

COVERAGE_LIFETIME_S = 60.0
_ORDER_PAUSE_S = 2.0

_NAVIGATION = (
    ("/", "Overview"), ("/fleet", "Fleet"), ("/rounds", "Rounds"), ("/rollouts", "Rollouts"), ("/alerts", "Alerts"),
    ("/audit", "Audit"),
)  # fmt: skip


class _StaticFiles(StaticFiles):
    """Scripts and styles, which a browser revalidates each time, so that a new version is seen."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers["cache-control"] = "no-cache"
        return response


class Pages:
    """Draws the pages from their templates, with what every page shows: the operator, the menu, open alerts."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._order_times: dict[tuple[str, str], float] = {}
        self._order_lock = threading.Lock()
        self._templates = Environment(
            loader=PackageLoader("fedprune_server.web", "templates"),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=StrictUndefined,
            auto_reload=False,
        )
        self._templates.filters.update(phrases.FILTERS)
        self._templates.filters["local_measure"] = presentation.local_measure
        self._templates.filters["measured"] = presentation.measurements_text
        self._templates.filters["chart"] = lambda drawn: Markup(chart_html.chart_html(drawn))  # noqa: S704  # nosec B704  # the renderer escapes all names
        self._templates.filters["strip"] = lambda drawn: Markup(chart_html.strip_svg(drawn))  # noqa: S704  # nosec B704  # the renderer escapes all names
        self._templates.globals["heat_scale"] = Markup(chart_html.heat_scale())  # noqa: S704  # nosec B704  # the renderer escapes all names

    def draw(self, request: Request, name: str, status: int = 200, **values: Any) -> HTMLResponse:
        """A page for a logged-in operator: template `name`, with `values` and the values of every page."""
        session, view = session_of(request), self._console.view
        role = session.operator.role
        return self._page(
            request,
            name,
            status,
            operator=session.operator,
            csrf=session.csrf,
            may=self.allowed_orders(role),
            orders=view.accepted_orders,
            places=[p for p in _NAVIGATION if p[0] != "/audit" or has_role(role, "admin")],
            here=f"/{request.url.path.split('/')[1]}".replace("/devices", "/fleet"),
            open_alerts=view.alerts(size=1, gone=False, notes=False).total,
            silent=self._silence_text(),
            **values,
        )

    def login(self, request: Request, **values: Any) -> HTMLResponse:
        """The login form, which repeats `csrf` and names what was `wrong`; `next` is where to go afterwards."""
        return self._page(request, "login", 200, **values)

    def allowed_orders(self, role: str) -> frozenset[str]:
        """The orders that a role may give and that the server accepts."""
        accepted = self._console.view.accepted_orders
        return frozenset(k for k, o in ORDER_KINDS.items() if is_accepted(k, accepted) and has_role(role, o.role))

    def order_details(
        self,
        request: Request,
        kind: str,
        subject: str,
        current: Mapping[str, Any] | None,
        again_s: float = DETAILS_LIFETIME_S,
    ) -> bool:
        """Order the details of a device or job (`subject`) from the server, unless those published last (`current`) are
        fresh. Returns whether they can be ordered."""
        session, now = session_of(request), time.time()
        if kind not in self.allowed_orders(session.operator.role):
            return False
        is_fresh = current is not None and now - current["at"] < again_s
        with self._order_lock:
            if is_fresh or now - self._order_times.get((kind, subject), 0.0) < _ORDER_PAUSE_S:
                return True
            recent_times = {k: at for k, at in self._order_times.items() if 0 <= now - at < _ORDER_PAUSE_S}
            self._order_times = {**recent_times, (kind, subject): now}
        try:
            body = {"order": kind, "device" if kind == "look" else "job": subject}
            self._console.orders.give(session, request.state.address, body)
        except (RefusedError, FedpruneError):
            return False
        return True

    def _page(self, request: Request, name: str, status: int, **values: Any) -> HTMLResponse:
        # A browser without a login isn't told the site's name.
        site = self._console.view.site if request.state.session is not None else None
        text = self._templates.get_template(f"{name}.html").render(
            site=site, site_name=site["site"] if site else "console", now=time.time(), **values
        )
        return HTMLResponse(text, status)

    def _silence_text(self) -> str:
        view = self._console.view
        if view.is_ready:
            return ""
        if view.site is None:
            return "The server has published nothing yet."
        return f"The server has published nothing for {phrases.seconds_text(view.silent_s)}: this is how it was then."

    def answer_invalid(self, request: Request, error: Exception) -> Response:
        """The answer to parameters that are wrong."""
        if request.url.path.startswith("/api/") or request.state.session is None:
            return JSONResponse({"error": str(error)}, 422)
        return self.draw(request, "missing", 422, what=str(error))

    def answer_missing(self, request: Request, _: Exception) -> Response:
        """The answer where no route or row is found."""
        if request.url.path.startswith("/api/") or request.state.session is None:
            return JSONResponse({"error": "not found"}, 404)
        return self.draw(request, "missing", 404, what="There is no such page.")

    def routes(self) -> list[BaseRoute]:
        """Pages, scripts and styles."""
        assets = _StaticFiles(directory=Path(__file__).parents[1] / "static", packages=[("fedprune.output", "static")])
        return [*_PageRoutes(self._console, self).routes(), Mount("/static", assets, name="static")]


class _PageRoutes:
    """The handlers of the pages' routes."""

    def __init__(self, console: Console, pages: Pages) -> None:
        self._console, self._view, self._pages = console, console.view, pages

    def routes(self) -> list[Route]:
        named_by_path = self.fleet, self.rounds, self.rollouts, self.alerts, self.audit
        return [
            Route("/", self.overview),
            Route("/devices/{name}", self.device),
            *(Route(f"/{handler.__name__}", handler) for handler in named_by_path),
        ]

    def overview(self, request: Request) -> Response:
        counts = self._view.counts
        return self._pages.draw(
            request,
            "overview",
            counts=counts,
            total=sum(counts["online"].values()),
            at_work=sum(counts["state"].get(s, 0) for s in presentation.WORKING_STATES),
            jobs=presentation.job_rows(self._view.jobs),
            alerts=presentation.fold_alert_rows(self._view.alerts(size=ROWS_PER_PAGE, gone=False, notes=False).items),
            waiting=self._view.devices(size=OVERVIEW_ROWS, only={"status": "waiting"}).items,
            log=self._view.lines(size=OVERVIEW_ROWS).items,
        )

    def fleet(self, request: Request) -> Response:
        counts, only = self._view.counts, filters(request, *DEVICE_FILTERS)
        q, sort = search_text(request), sort_column(request)
        return self._pages.draw(
            request,
            "fleet",
            found=self._view.devices(page=page_number(request), size=ROWS_PER_PAGE, sort=sort, q=q, only=only),
            total=sum(counts["status"].values()),
            options={k: _filter_options(counts[k], only.get(k)) for k in DEVICE_FILTERS if k != "online"},
            only={k: only.get(k, "") for k in DEVICE_FILTERS},
            q=q,
            sort=sort,
            link=_link_maker("/fleet", {**only, "q": q, "sort": "" if sort == "name" else sort}),
        )

    def device(self, request: Request) -> Response:
        name = request.path_params["name"]
        try:
            row = self._view.device(check_device(name))
        except ProtocolError:
            row = None
        if row is None:
            return self._pages.draw(request, "missing", 404, what="The server knows no device of this name.")
        asks = self._pages.order_details(request, "look", name, self._view.details(name))
        details = self._view.details(name)
        return self._pages.draw(
            request,
            "device",
            d=row,
            asks=asks,
            details=details,
            plan=presentation.plan_row(details["plan"]) if details else None,
            figures=presentation.figure_rows(details),
            map=presentation.channel_maps(details),
            history=details["history"] if details else (),
            charts=presentation.device_charts(details["history"]) if details else [],
            reported=self._view.crashes(name),
            log=self._view.lines(size=ROWS_PER_PAGE, only={"device": name}).items,
        )

    def rounds(self, request: Request) -> Response:
        jobs = self._view.jobs
        job = self._view.job(request.query_params.get("job", "")) or (jobs[0] if jobs else None)
        name = job["name"] if job else ""
        coverage, again_s = self._view.coverage(name), COVERAGE_LIFETIME_S
        asks = job is not None and self._pages.order_details(request, "coverage", name, coverage, again_s)
        return self._pages.draw(
            request,
            "rounds",
            jobs=jobs,
            job=job,
            parts=presentation.round_progress(job) if job else None,
            charts=presentation.job_charts(presentation.rounds_of(self._view, name)),
            asks=asks,
            coverage=coverage,
            strips=presentation.coverage_strips(coverage),
            rounds=self._view.rounds(name, page=page_number(request), size=ROUNDS_PER_PAGE),
            link=_link_maker("/rounds", {"job": name if len(jobs) > 1 else ""}),
        )

    def rollouts(self, request: Request) -> Response:
        return self._pages.draw(request, "rollouts", rollouts=self._view.rollouts, releases=self._view.releases)

    def alerts(self, request: Request) -> Response:
        all_alerts = self._view.alerts(size=ROWS_PER_PAGE).items
        only, q = filters(request, "level"), search_text(request)
        level = only.get("level", "")
        return self._pages.draw(
            request,
            "alerts",
            open=presentation.fold_alert_rows(self._view.alerts(size=ROWS_PER_PAGE, gone=False).items),
            over=presentation.fold_alert_rows([a for a in all_alerts if a["gone_at"] is not None]),
            log=self._view.lines(page=page_number(request), size=ROWS_PER_PAGE, q=q, only=only),
            levels=[(text, text) for text in LOG_LEVELS],
            level=level,
            q=q,
            link=_link_maker("/alerts", {"q": q, "level": level}),
        )

    def audit(self, request: Request) -> Response:
        if not has_role(session_of(request).operator.role, "admin"):
            return self._pages.draw(request, "missing", 403, what="The audit log is shown to admins.")
        entries = self._console.audit.page(page_number(request), ROWS_PER_PAGE)
        kept, link = f"{MAX_AUDIT_LINES:,}", _link_maker("/audit", {})
        return self._pages.draw(request, "audit", entries=entries, kept=kept, link=link)


def _link_maker(path: str, current: Mapping[str, str]) -> Callable[..., str]:
    """Makes addresses like the current one with some parameters changed."""

    def address(**changes: Any) -> str:
        parameters = {k: v for k, v in {**current, **changes}.items() if v not in ("", None) and (k, v) != ("page", 1)}
        return f"{path}?{urlencode(parameters)}" if parameters else path

    return address


def _filter_options(counts: Mapping[str, int], chosen: str | None) -> list[tuple[str, str]]:
    """Values to filter by, with counts; includes a chosen value that no longer exists."""
    counts_by_value = {k: n for k, n in counts.items() if k != "None"}
    if chosen and chosen not in counts_by_value:
        counts_by_value[chosen] = 0
    return [(k, f"{phrases.state_word(k)} ({n:,})") for k, n in sorted(counts_by_value.items())]
