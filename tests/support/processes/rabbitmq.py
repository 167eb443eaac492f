"""A cluster of three RabbitMQ nodes of a test's own, on this machine alone, which take MQTT."""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from support.processes.machine import free_port, listens

NODES = ("a", "b", "c")
"""As many as it takes for two to admit clients when one is lost."""

_SETTINGS = """\
listeners.tcp.1 = 127.0.0.1:{}
mqtt.listeners.tcp.1 = 127.0.0.1:{}
mqtt.allow_anonymous = true
log.console = true
log.file = false
load_definitions = {}
cluster_formation.peer_discovery_backend = classic_config
"""
_DEFINITIONS = {
    "vhosts": [{"name": "/"}],
    "users": [{"name": "guest", "password": "guest", "tags": ""}],
    "permissions": [{"user": "guest", "vhost": "/", "configure": ".*", "write": ".*", "read": ".*"}],
    # Else a client can't connect whose queue is at a node that is gone.
    "policies": [
        {"vhost": "/", "name": "mqtt", "pattern": "^mqtt-", "apply-to": "queues", "definition": {"ha-mode": "all"}}
    ],
}


class RabbitMQ:
    """The cluster; `ports` are those of MQTT, by node."""

    def __init__(self) -> None:
        programs = sorted(Path("/usr/lib/rabbitmq/lib").glob("rabbitmq_server-*/sbin/rabbitmq-server"))
        if not programs or shutil.which("epmd") is None:
            pytest.skip("RabbitMQ is not installed")
        self._folder = Path(tempfile.mkdtemp(prefix="fedprune-rabbit-"))
        self.ports = {node: free_port() for node in NODES}
        names = free_port()
        self._environment = os.environ | {
            "HOME": str(self._folder),
            "ERL_EPMD_PORT": str(names),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
        }
        self._names = subprocess.Popen(["epmd", "-port", str(names), "-address", "127.0.0.1"])
        cookie = self._folder / ".erlang.cookie"  # nodes that begin at once would each make one
        cookie.write_text("fedprune")
        cookie.chmod(0o400)
        (self._folder / "definitions.json").write_text(json.dumps(_DEFINITIONS))
        self._nodes = {node: self._start(programs[-1], node) for node in NODES}
        until = time.monotonic() + 120
        while not all(map(listens, self.ports.values())):
            assert time.monotonic() < until, self.logs()
            time.sleep(0.2)

    def _start(self, program: Path, node: str) -> subprocess.Popen[bytes]:
        node_folder = self._folder / node
        node_folder.mkdir()
        (node_folder / "plugins").write_text("[rabbitmq_mqtt].")
        peers = "".join(
            f"cluster_formation.classic_config.nodes.{n} = {name}@localhost\n" for n, name in enumerate(NODES)
        )
        (node_folder / "rabbitmq.conf").write_text(
            _SETTINGS.format(free_port(), self.ports[node], self._folder / "definitions.json") + peers
        )
        environment = self._environment | {
            "RABBITMQ_NODENAME": f"{node}@localhost",
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_MNESIA_BASE": str(node_folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(node_folder / "log"),
            "RABBITMQ_PID_FILE": str(node_folder / "pid"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(node_folder / "plugins"),
            "RABBITMQ_CONFIG_FILE": str(node_folder / "rabbitmq.conf"),
        }
        with (node_folder / "log.txt").open("ab") as log:
            return subprocess.Popen([program], stdout=log, stderr=log, env=environment, start_new_session=True)

    def kill(self, node: str) -> None:
        """kill -9 of a node."""
        process = self._nodes.pop(node)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def logs(self) -> str:
        return "\n".join(path.read_text()[-2000:] for path in sorted(self._folder.glob("?/log.txt")))

    def close(self) -> None:
        """End it."""
        for node in list(self._nodes):
            self.kill(node)
        self._names.kill()
        self._names.wait()
        shutil.rmtree(self._folder, ignore_errors=True)
