"""The files of deploy/ fit each other, the program and the images that they name."""

import json
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedprune.core.toml_file import parse_toml
from fedprune_device.cli.main import build_parser as build_board_parser
from fedprune_server.cli.main import build_parser
from fedprune_server.config.environment import environment_layer, setting_variables
from fedprune_server.config.tables import parse_config
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.monitoring.health import HEALTH_FILE_VARIABLE as PULSE
from support.processes.compose_file import DEPLOY, read_compose

PINNED = re.compile(r"[\w./-]+:\d+\.\d+(\.\d+)?(-[\w.-]+)?")
ENVIRONMENT = {"FEDPRUNE_HOST": "fleet.example"}


def manifests() -> dict[tuple[str, str], dict[str, Any]]:
    """What Kubernetes is given, by kind and name."""
    folder = DEPLOY / "kubernetes"
    body = yaml.safe_load((folder / "kustomization.yaml").read_text())
    names, maps = body["resources"], body["configMapGenerator"]
    files = {file for config_map in maps for file in config_map["files"]}
    assert {*names, *files, "kustomization.yaml"} == {p.name for p in folder.iterdir()}
    documents = [p for name in names for p in yaml.safe_load_all((folder / name).read_text())]
    for config_map in maps:
        data = {file: (folder / file).read_text() for file in config_map["files"]}
        documents.append({"kind": "ConfigMap", "metadata": {"name": config_map["name"]}, "data": data})
    manifest_by_name = {(p["kind"], p["metadata"]["name"]): p for p in documents}
    assert len(manifest_by_name) == len(documents)
    return manifest_by_name


def pods() -> list[tuple[str, dict[str, Any]]]:
    return [
        (name, m["spec"]["template"]["spec"]) for (_, name), m in manifests().items() if "template" in m.get("spec", {})
    ]


def containers() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    for name, pod in pods():
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            yield name, pod, container


def check_environment(environment: dict[str, str]) -> None:
    """Every variable of ours is a setting, or one that the image is told."""
    ours = {n.removesuffix("_FILE") for n in environment if n.startswith("FEDPRUNE_")} - {
        "FEDPRUNE_HOST",
        "FEDPRUNE_SITE",
        PULSE,
    }
    assert ours <= setting_variables().keys()
    environment_layer({k: v for k, v in environment.items() if not k.endswith("_FILE")})


def test_the_commands_of_containers_are_commands_of_the_program() -> None:
    services = read_compose(ENVIRONMENT)["services"]
    script = services["prepare"]["command"][0].replace("$FEDPRUNE_SITE", "lab")
    lines = [shlex.split(line) for line in re.findall(r"fedprune-server (.*)", script)]
    lines += [services["server"]["command"]]
    lines += [c["args"] for name, _, c in containers() if name == "server" and "command" not in c]
    board, _, dockerfile = (DEPLOY / "Dockerfile").read_text().partition(" AS server\n")
    lines += [
        [w for w in re.findall(r'"([^"]+)"', line) if w != "fedprune-server"]
        for line in re.findall(r"CMD (\[.*\])", dockerfile)
    ]
    assert len(lines) == 6
    for words in lines:
        build_parser().parse_args(words)
    (words,) = re.findall(r"CMD (\[.*\])", board)
    assert build_board_parser().parse_args(json.loads(words)).patient is True


def test_the_fleets_of_both_are_valid() -> None:
    for text in (
        (DEPLOY / "fleet" / "fleet.toml").read_text(),
        manifests()["ConfigMap", "fleet"]["data"]["fleet.toml"],
    ):
        assert parse_config(parse_toml(text), Path("/etc")).job.strategy == "fedprune"


def test_a_container_may_do_little() -> None:
    for name, pod, container in containers():
        assert PINNED.fullmatch(container["image"]), name
        assert pod["enableServiceLinks"] is False  # they would make variables that look like ours
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        security = container["securityContext"]
        assert (security["allowPrivilegeEscalation"], security["readOnlyRootFilesystem"], security["capabilities"]) == (
            False,
            True,
            {"drop": ["ALL"]},
        )
        if container in pod["containers"]:
            assert {"livenessProbe", "readinessProbe"} <= container.keys()
            assert {"requests", "limits"} <= container["resources"].keys()
        check_environment({e["name"]: e["value"] for e in container.get("env", [])})


def kustomize(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """What kubectl makes of a folder, by kind and name; of a name that a digest makes unique, the name alone."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=False)
    if "patch.StrategicMerge" in done.stderr:
        pytest.skip("kubectl is older than 1.21, and its kustomize takes no patch with a target")
    assert done.returncode == 0, done.stderr
    documents = list(yaml.safe_load_all(done.stdout))
    manifest_by_name = {(p["kind"], re.sub(r"-[a-z0-9]{10}$", "", p["metadata"]["name"])): p for p in documents}
    assert len(manifest_by_name) == len(documents)
    return manifest_by_name


def elsewhere(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The page's fleet, whose broker, database and bucket are elsewhere."""
    shutil.copytree(DEPLOY / "kubernetes", folder / "fedprune" / "deploy" / "kubernetes")
    own_folder = folder / "own"
    own_folder.mkdir()
    page = (DEPLOY.parent / "docs" / "deploy.md").read_text()
    kustomization, changes = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (own_folder / "kustomization.yaml").write_text(kustomization)
    (own_folder / "changes.yaml").write_text(changes)
    (own_folder / "fleet.toml").write_text('[job]\nname = "leaves"\n')
    return kustomize(own_folder)


@pytest.mark.soak
def test_kubectl_takes_them() -> None:
    assert kustomize(DEPLOY / "kubernetes").keys() == manifests().keys()


@pytest.mark.soak  # its package is of 108 MB
def test_the_schemas_of_kubernetes_know_every_word(tmp_path: Path) -> None:
    schemas = pytest.importorskip("kubernetes_validate")
    for manifest in [*kustomize(DEPLOY / "kubernetes").values(), *elsewhere(tmp_path).values()]:
        for version in ("1.28", schemas.latest_version()):
            schemas.validate(manifest, version, strict=True)
    policy = manifests()["NetworkPolicy", "server"]
    wrong = {**policy, "spec": {**policy["spec"], "policyType": ["Egress"]}}
    with pytest.raises(schemas.ValidationError):
        schemas.validate(wrong, version, strict=True)


@pytest.mark.parametrize("file", ["Dockerfile", "balena/Dockerfile.template"])
def test_hadolint_finds_nothing(file: str) -> None:
    hadolint = shutil.which("hadolint", path=sysconfig.get_path("scripts")) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([hadolint, str(DEPLOY / file)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_first_pod_takes_the_identity_of_the_secret_and_later_ones_leave_it(tmp_path: Path) -> None:
    if shutil.which("flock") is None:
        pytest.skip("flock is not installed")
    (script,) = (c["args"][0] for _, _, c in containers() if c["name"] == "identity")
    IdentityFolder.make(tmp_path / "made", "lab").close()
    volume = tmp_path / "volume"
    volume.mkdir()
    script = script.replace("/run/identity", str(tmp_path / "made" / "identity"))
    command = ["sh", "-ec", script.replace("/var/lib/fedprune", str(volume))]
    subprocess.run(command, check=True)
    with IdentityFolder(volume) as identity:
        assert identity.site == "lab"
        identity.make_claim("attic", 60)
    before = {p.name: p.read_bytes() for p in (volume / "identity").iterdir()}
    assert {p.stat().st_mode & 0o77 for p in [volume / "identity", *(volume / "identity").iterdir()]} == {0}
    subprocess.run(command, check=True)
    assert {p.name: p.read_bytes() for p in (volume / "identity").iterdir()} == before


def test_the_secrets_are_made_once(tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir(mode=0o755)  # somebody made it before
    command = ["sh", str(DEPLOY / "secrets.sh"), str(tmp_path / "secrets")]
    subprocess.run(command, check=True)
    password = (tmp_path / "secrets" / "database-password").read_text()
    assert re.fullmatch(r"[0-9a-f]{48}", password)
    url = tmp_path / "secrets" / "database-url"
    assert url.read_text() == f"postgresql+psycopg://fedprune:{password}@database/fedprune"
    url.unlink()
    url.write_text("postgresql+psycopg://elsewhere/fleet")  # a database that the operator has already
    subprocess.run(command, check=True)
    assert (tmp_path / "secrets" / "database-password").read_text() == password
    assert url.read_text() == "postgresql+psycopg://elsewhere/fleet"
    assert (tmp_path / "secrets").stat().st_mode & 0o777 == 0o700
