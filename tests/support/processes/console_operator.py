"""An operator who uses the console of a running server, over HTTP."""

import json
import re
import time
import urllib.error
import urllib.request
from http.cookiejar import CookieJar
from urllib.parse import urlencode

ANN, NOT_ANN = "hunter2-of-the-operator", "hunter2-of-nobody-at-all"  # her password, and one that is wrong


class Operator:
    """An operator who uses the console at a port."""

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
        match = re.search(r'name="csrf" value="([^"]+)"', self.ask("/login"))
        self.secrets.add(match[1])
        self.ask("/login", urlencode({"csrf": match[1], "name": "ann", "password": password}).encode())

    def order(self, **body: str) -> str:
        """Give an order, which the console takes."""
        headers = {"x_csrf_token": self.csrf, "content_type": "application/json"}
        answer = self.ask("/api/v1/orders", json.dumps(body).encode(), **headers)
        number = json.loads(answer).get("order")
        assert isinstance(number, int), answer
        while json.loads(outcome := self.ask(f"/api/v1/orders/{number}"))["state"] == "waiting":
            time.sleep(0.05)
        assert json.loads(outcome)["ok"], outcome
        return answer + outcome

    def come(self) -> str:
        """Log in at the second try, and pause the job; returns what the console says."""
        self.login(NOT_ANN)
        self.login(ANN)
        self.csrf = json.loads(self.ask("/api/v1/me"))["csrf"]
        self.secrets.add(self.csrf)
        return self.order(order="pause", job="leaves")

    def ready(self) -> bool:
        """Whether the console listens and has heard of its server; until then it takes no orders."""
        try:
            return json.loads(self.ask("/readyz")) == {"ready": True}
        except urllib.error.URLError:
            return False

    def online(self) -> set[str]:
        """Boards that the console shows as connected."""
        return {row["name"] for row in json.loads(self.ask("/api/v1/devices"))["items"] if row["online"]}

    def look_round(self) -> list[str]:
        """Look at everything; returns what the console says but its own tokens."""
        answers = [self.order(order="look", device="north")]
        answers += [
            self.ask(f"/api/v1/{name}") for name in ("site", "devices", "devices/north", "orders", "logs", "audit")
        ]
        audit = [(row["action"], row["outcome"]) for row in json.loads(answers[-1])["items"]]
        assert {("login", "failed"), ("login", "done")} <= set(audit)
        answers += [self.ask(page).replace(self.csrf, "") for page in ("/", "/fleet", "/devices/north", "/audit")]
        return answers
