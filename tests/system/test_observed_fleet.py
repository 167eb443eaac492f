"""A real fleet at its most talkative: figures, a JSON log, a board that was killed, a console that is in use, and no
secret in what any of them writes.
"""

from __future__ import annotations

import io
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.cookiejar import CookieJar
from pathlib import Path
from urllib.parse import urlencode

import pytest
from real_site import Site, write_material

from fedprune.errors import ExitCode
from fedprune_server.cli import main
from fedprune_server.fleet.board_logs import read_logs
from machine import free_port, listens

pytestmark = pytest.mark.system

PASSWORD, DATABASE, S3 = "hunter2-of-the-broker", "hunter2-of-the-database", "hunter2-of-the-bucket"
ANN, NOT_ANN = "hunter2-of-the-operator", "hunter2-of-nobody-at-all"
ROUNDS = 6
CONFIG = f"""
[job]
name = "leaves"
rounds = {ROUNDS}
devices = 2
density = 0.5
deadline_s = 300
"""


class Loud(Site):
    """Everybody says all that there is to say."""

    metrics = 0
    console = 0

    def _url(self, port: int) -> str:
        return super()._url(port).replace("://", f"://fleet:{PASSWORD}@")

    def command(self, name: str) -> list[str]:
        if name == "server":
            more = ["--verbose", "--log-format", "json", "--metrics", str(self.metrics)]
            return [*super().command(name), *more, "--console", str(self.console)]
        return [*super().command(name), "--log-level", "debug"]


class Operator:
    """Somebody who uses the console.

    Args:
        port: The console's.
    """

    def __init__(self, port: int) -> None:
        self._at = f"http://127.0.0.1:{port}"
        self._cookies = CookieJar()
        self._browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(self._cookies))
        self.secrets = {ANN, NOT_ANN}
        self.csrf = ""

    def ask(self, path: str, body: bytes | None = None, **headers: str) -> str:
        """What the console answers, whatever its status; the cookies that it gave are noted."""
        request = urllib.request.Request(self._at + path, body, {k.replace("_", "-"): v for k, v in headers.items()})  # noqa: S310
        try:
            with self._browser.open(request, timeout=20) as answer:
                text: str = answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                text = error.read().decode()
        self.secrets |= {cookie.value for cookie in self._cookies if cookie.value}
        return text

    def login(self, password: str) -> None:
        """Fill the form in."""
        found = re.search(r'name="csrf" value="([^"]+)"', self.ask("/login"))
        assert found is not None
        self.secrets.add(found[1])
        self.ask("/login", urlencode({"csrf": found[1], "name": "ann", "password": password}).encode())

    def order(self, **body: str) -> str:
        """Give an order, which the console takes."""
        more = {"x_csrf_token": self.csrf, "content_type": "application/json"}
        said = self.ask("/api/v1/orders", json.dumps(body).encode(), **more)
        number = json.loads(said).get("order")
        assert isinstance(number, int), said
        while json.loads(outcome := self.ask(f"/api/v1/orders/{number}"))["state"] == "waiting":
            time.sleep(0.05)
        assert json.loads(outcome)["ok"], outcome
        return said + outcome

    def come(self) -> str:
        """Log in at the second try, and pause the job; returns what the console says."""
        self.login(NOT_ANN)
        self.login(ANN)
        self.csrf = json.loads(self.ask("/api/v1/me"))["csrf"]
        self.secrets.add(self.csrf)
        return self.order(order="pause", job="leaves")

    def ready(self) -> bool:
        """Whether the console has heard of its server; until then it takes no orders."""
        return json.loads(self.ask("/readyz")) == {"ready": True}

    def online(self) -> set[str]:
        """Boards that the console shows as connected."""
        return {row["name"] for row in json.loads(self.ask("/api/v1/devices"))["items"] if row["online"]}

    def look_round(self) -> list[str]:
        """Look at everything; returns what the console says but its own tokens."""
        said = [self.order(order="look", device="north")]
        said += [
            self.ask(f"/api/v1/{name}") for name in ("site", "devices", "devices/north", "orders", "logs", "audit")
        ]
        audit = [(row["action"], row["outcome"]) for row in json.loads(said[-1])["items"]]
        assert {("login", "failed"), ("login", "done")} <= set(audit)
        said += [self.ask(page).replace(self.csrf, "") for page in ("/", "/fleet", "/devices/north", "/audit")]
        return said


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loud]:
    monkeypatch.setenv("FEDPRUNE_DEBUG", "1")
    write_material(tmp_path, {"north": 400, "south": 400})
    with Loud(tmp_path, tmp_path, CONFIG, ("north", "south"), 90, secure=True) as made:
        made.metrics, made.console = free_port(), free_port()
        yield made


def test_a_talkative_fleet_tells_no_secrets(
    site: Loud, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{ANN}\n"))
    assert main(["operators", "add", "ann", "--role", "admin", "--state", str(site.state)]) == ExitCode.OK
    site.start("server")
    site.wait_for(lambda: listens(site.port) and listens(site.console), "the server listens")
    ann = Operator(site.console)
    site.wait_for(ann.ready, "the console is ready")
    shown = [ann.come()]  # before there is a board: a job this small ends faster than somebody can look at it
    for name in site.devices:
        site.start(name)
    site.wait_for(lambda: {"north", "south"} <= ann.online(), "both boards are there")
    with urllib.request.urlopen(f"http://127.0.0.1:{site.metrics}/metrics", timeout=20) as answer:
        figures = answer.read().decode()
    assert 'fedprune_devices{job="leaves",state="working"}' in figures
    with urllib.request.urlopen(f"http://127.0.0.1:{site.metrics}/readyz", timeout=20) as answer:
        assert answer.read() == b"ok\n"
    shown += ann.look_round()
    site.kill("north")
    site.wait_for(lambda: any(r.kind == "crash" for r in read_logs(site.state)), "north tells of its end")
    shown.append(ann.order(order="resume", job="leaves"))
    assert len(site.finish().history) == ROUNDS
    crash = next(r for r in read_logs(site.state) if r.kind == "crash")
    assert (crash.device, crash.body["cause"]) == ("north", "killed")

    rows = [json.loads(line) for line in (site.folder / "server.log").read_text().splitlines()]
    assert {"leaves"} <= {r.get("job") for r in rows}
    assert any(r.get("device") == "north" and "crashed" in r["message"] for r in rows)

    folder = site.folder / "elsewhere"
    model = ["--model", str(site.material / "model.onnx"), "--state", str(folder), "--insecure", "-v"]
    outputs = [site.logs_in_full(), figures, *shown, "".join(capfd.readouterr())]
    at_s3 = f"http://key:{S3}@127.0.0.1:9"
    for key, value in {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": S3, "ENDPOINT_URL": at_s3}.items():
        monkeypatch.setenv(f"AWS_{key}", value)
    for words, code in (
        (["run", *model, "--broker", f"mqtt://fleet:{PASSWORD}@127.0.0.1:9"], ExitCode.BROKER),
        (["run", *model, "--database", f"postgresql+psycopg://u:{DATABASE}@127.0.0.1:9/x"], ExitCode.STORAGE),
        (["run", *model, "--blobs", f"s3://key:{S3}@bucket/prefix"], ExitCode.CONFIG),
        (["logs", "--state", str(site.state)], ExitCode.OK),
        (["doctor", "--state", str(site.state), "--timeout", "1"], ExitCode.OK),
    ):
        assert main(words) in (code, code or ExitCode.FOUND)
        outputs.append("".join(capfd.readouterr()))

    secrets = [PASSWORD, DATABASE, S3, *ann.secrets]
    assert len(ann.secrets) >= 6  # two passwords, the form's cookie and token, the session and its token
    for name in site.devices:
        claim = (site.folder / f"{name}.claim").read_text().strip()
        secrets += [claim, claim.replace("-", "")[3:35], *[p for p in claim.split("-")[1:] if len(p) >= 8]]
    keys = [*(site.state / "identity").glob("*.key"), *site.folder.glob("*/**/*.key")]
    for path in keys:
        lines = path.read_bytes().decode(errors="replace").splitlines()
        secrets += [line for line in lines if len(line) > 30 and "-----" not in line]
    assert len(secrets) > 10
    for output in outputs:
        for secret in secrets:
            assert secret not in output, f"a secret is in: {output[max(0, output.find(secret) - 200) :][:400]}"
