"""A real fleet at its most talkative: figures, a JSON log, a board that was killed, a console that is in use, and no
secret in what any of them writes.
"""

import io
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedprune.core.errors import ExitCode
from fedprune_server.cli.main import main
from fedprune_server.devices.crash_store import read_crashes
from support.processes.console_operator import ANN, Operator
from support.processes.machine import free_port, listens
from support.processes.real_site import Site, job_config, write_material

pytestmark = pytest.mark.system

PASSWORD, DATABASE, S3 = "hunter2-of-the-broker", "hunter2-of-the-database", "hunter2-of-the-bucket"
ROUNDS = 6
CONFIG = job_config("leaves", rounds=ROUNDS)


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


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loud]:
    monkeypatch.setenv("FEDPRUNE_DEBUG", "1")
    write_material(tmp_path, {"north": 400, "south": 400})
    with Loud(tmp_path, tmp_path, CONFIG, ("north", "south"), 90, secure=True) as made:
        made.metrics, made.console = free_port(), free_port()
        yield made


# At every push `test_layers.py`, `test_postgresql.py`, `test_s3.py` and `test_service.py` look for secrets one by one.
@pytest.mark.soak
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
    site.wait_for(lambda: read_crashes(site.state), "north tells of its end")
    shown.append(ann.order(order="resume", job="leaves"))
    assert len(site.finish().history) == ROUNDS
    crash = read_crashes(site.state)[0]
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
        (["crashes", "--state", str(site.state)], ExitCode.OK),
        (["doctor", "--state", str(site.state), "--timeout", "1"], ExitCode.OK),
    ):
        assert main(words) in (code, code or ExitCode.FINDINGS)
        outputs.append("".join(capfd.readouterr()))

    secrets = [PASSWORD, DATABASE, S3, *ann.secrets]
    assert len(ann.secrets) >= 6  # two passwords, the form's cookie and token, the session and its token
    for name in site.devices:
        claim = (site.folder / f"{name}.claim").read_text().strip()
        secrets += [claim, claim.replace("-", "")[3:35], *[p for p in claim.split("-")[1:] if len(p) >= 8]]
    for path in [*(site.state / "identity").glob("*.key"), *site.folder.glob("*/**/*.key")]:
        lines = path.read_bytes().decode(errors="replace").splitlines()
        secrets += [line for line in lines if len(line) > 30 and "-----" not in line]
    assert len(secrets) > 10
    for output in outputs:
        for secret in secrets:
            assert secret not in output, f"a secret is in: {output[max(0, output.find(secret) - 200) :][:400]}"
