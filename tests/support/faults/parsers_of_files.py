"""Parsers of files that a card or a copy may have damaged: models, settings, states, data sets, wheels."""

import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from fedprune.coordination import State
from fedprune.core import tensorfile
from fedprune.core.errors import ConfigError, ReleaseError, StorageError
from fedprune.core.records import decode_record, encode_record
from fedprune.core.toml_file import read_toml
from fedprune.jobs.state import DeviceTask, JobDevice
from fedprune.model.architecture import Architecture
from fedprune.model.nested_widths import TensorAxes, axes_json
from fedprune.model.selection import Selection
from fedprune.planning.profile import HardwareProfile
from fedprune.planning.profile_store import shipped_profiles_folder
from fedprune.releases.rollout import Rollout
from fedprune.releases.rollout_plan import RolloutPlan
from fedprune.releases.wheels import parse_wheel_name, wheel_requirements
from fedprune.runtime.bundle import open_bundle
from fedprune.runtime.tensorrt_config import EnginePlan
from fedprune_export.checks.labelled_file import read_labelled_data as read_labelled
from fedprune_server.config.setting import read_table
from fedprune_server.config.tables import parse_config
from fedprune_server.simulation.datasets.image_files import read_image_folder
from fedprune_server.simulation.datasets.npz_files import read_npz
from fedprune_server.simulation.fleet.fleet_tables import SimulationSettings
from fedprune_server.simulation.network_model import Availability, DropOuts, read_weather
from fedprune_server.simulation.results.record import Record
from fedprune_server.simulation.sweep import read_sweep
from fedprune_server.storage.s3.bucket import Owner
from support.fakes.opened_job import read_config
from support.fakes.runtime_releases import make_wheel
from support.fakes.tiny_job import ARCHITECTURE, JOB
from support.fakes.tiny_wheels import wheel
from support.faults.parser_target import Target, as_file, as_object, as_text, json_seeds, scratch

FLEET = b"""
[model]
path = "model.onnx"
input_shape = [1, 3, 8, 8]

[job]
name = "attic"
rounds = 20
devices = 3
density = 0.5
deadline_s = 600.0
[job.recipe]
epochs = 2
lr = 0.05

[server]
state = "state"
broker = "mqtts://broker.example:8883"
site = "lab"
max_devices = 100

[[devices]]
name = "a"
profile = "raspberry-pi-5"

[links]
up = 1e6
"""

SWEEP = b"""
config = "fleet.toml"
seeds = [0, 1]
[[runs]]
name = "one"
job = { rounds = 3 }
[[runs]]
name = "two"
seeds = [5]
"""

_FILES = 2 * 2**20  # bytes that numpy's, Pillow's and zipfile's machinery may take for any file


@cache
def file_targets() -> tuple[Target, ...]:
    """All of them."""
    return (*_descriptions(), *_settings(), *_states(), *_data_sets(), *_wheels())


def _descriptions() -> tuple[Target, ...]:
    selection = Selection.of(ARCHITECTURE, (4,))
    sound = ARCHITECTURE.to_json().encode()
    axes = axes_json(ARCHITECTURE).encode()
    folder = _bundle(selection)
    manifest = (folder / "manifest.json").read_bytes()

    def read_bundle(raw: bytes) -> object:
        (folder / "manifest.json").write_bytes(raw)
        return open_bundle(folder)

    return (
        Target("file.architecture", Architecture.from_json, (sound,), text=True, share=2),
        Target(
            "file.selection",
            lambda raw: Selection.from_json(raw, ARCHITECTURE),
            (selection.to_json().encode(), Selection.of(ARCHITECTURE, (8,)).to_json().encode()),
            text=True,
            share=2,
        ),
        Target("file.tensor axes", as_text(TensorAxes.from_json), (axes,), text=True),
        Target("file.engine plan", EnginePlan.from_json, (EnginePlan().to_json().encode(),), text=True, share=2),
        Target("file.bundle manifest", read_bundle, (manifest,), text=True, constant=_FILES, share=0.2),
    )


def _bundle(selection: Selection) -> Path:
    """A bundle whose graphs nobody loads."""
    from fedprune.runtime.bundle import ARCHITECTURE as NAMED
    from fedprune.runtime.bundle import FILES, FORMAT, SUBMODEL, WEIGHTS

    folder = scratch() / "bundle"
    folder.mkdir(exist_ok=True)
    tensors = {n: np.zeros(s, np.float32) for n, s in selection.shapes().items()}
    contents = {
        NAMED: ARCHITECTURE.to_json().encode(),
        SUBMODEL: selection.to_json().encode(),
        WEIGHTS: tensorfile.encode(tensors),
        "engine.json": EnginePlan().to_json().encode(),
    }
    files = {}
    for name in (*FILES, "engine.json"):
        data = contents.get(name, b"graph")
        (folder / name).write_bytes(data)
        files[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    body = {
        "format": FORMAT, "files": files, "recipe": JOB.recipe.to_dict(), "class_names": ["a", "b", "c"],
        "target": "raspberry-pi-5", "selection": selection.digest, "architecture": ARCHITECTURE.digest,
        "widths": list(selection.widths), "classes": 3,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(body))
    return folder


def _settings() -> tuple[Target, ...]:
    folder = scratch() / "settings"
    folder.mkdir(exist_ok=True)
    (folder / "fleet.toml").write_bytes(_plain(FLEET))
    profile = (shipped_profiles_folder() / "raspberry-pi-5.toml").read_bytes()
    weather = {
        "weather": {"like": "pr-fl"},
        "availability": {},
        "dropouts": {"away_s": 5.0},
        "simulation": {"densities": [0.5]},
    }

    def sky(body: dict[str, Any]) -> object:
        tables = {"dropouts": DropOuts, "availability": Availability, "simulation": SimulationSettings}
        return [read_weather(body), *(read_table(kind, body.get(t, {}), (t,)) for t, kind in tables.items())]

    owner = encode_record(Owner("5" * 32, "attic"))
    return (
        Target(
            "settings.toml",
            as_file(lambda p: read_toml(p, ConfigError), "any.toml"),
            (FLEET, SWEEP),
            text=True,
            factor=200,
            share=0.5,
        ),
        Target(
            "settings.fleet",
            as_file(read_config, "settings/read.toml"),
            (_plain(FLEET),),
            text=True,
            factor=200,
            share=0.5,
        ),
        Target(
            "settings.tables",
            as_object(lambda b: parse_config(b, folder)),
            json_seeds({"job": JOB.to_dict(), "server": {"site": "lab", "keep": 3}}),
            text=True,
        ),
        Target("file.bucket's owner", lambda raw: decode_record(Owner, raw, "it", StorageError), (owner,), text=True),
        Target(
            "settings.sweep",
            as_file(read_sweep, "settings/sweep.toml"),
            (SWEEP,),
            text=True,
            factor=200,
            constant=_FILES,
            share=0.2,
        ),
        Target(
            "settings.profile",
            as_file(HardwareProfile.from_toml, "board.toml"),
            (profile,),
            text=True,
            factor=200,
            share=0.3,
        ),
        Target("settings.weather", as_object(sky), json_seeds(weather, {}), text=True),
    )


def _plain(text: bytes) -> bytes:
    """A server's file, without a simulation's tables."""
    return text.partition(b"[[devices]]")[0]


def _states() -> tuple[Target, ...]:
    device = JobDevice(1, True, {"name": "x"}, None, 3)
    task = DeviceTask(1, (4,), 0.5, offer={"weights": {"sha256": "0" * 64}})
    state = State(model="0" * 64, devices={"a": device}, tasks={"a": task}).to_json().encode()
    rollout = Rollout.for_boards(RolloutPlan("7"), ["a", "b"]).to_dict()
    record = Record("a run", JOB.to_dict(), (("w", 8),), (), ())
    return (
        Target("state.job", as_text(State.from_json), (state,), text=True, share=2),
        Target("state.rollout", as_object(Rollout.from_dict), json_seeds(rollout), text=True),
        Target("state.record of a run", as_text(Record.from_json), (record.to_json().encode(),), text=True),
    )


def npz(save: Callable[..., None] = np.savez_compressed, **arrays: Any) -> bytes:
    """An `.npz` file."""
    file = io.BytesIO()
    save(file, **arrays)
    return file.getvalue()


def picture(kind: str, mode: str = "RGB", size: tuple[int, int] = (8, 8)) -> bytes:
    """A small image."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)).convert(mode).save(file, kind)
    return file.getvalue()


def _data_sets() -> tuple[Target, ...]:
    x, y = np.zeros((4, 3, 8, 8), np.float32), np.arange(4)
    sets = npz(x=x, y=y), npz(np.savez, x_train=x, y_train=y, x_test=x, y_test=y), npz(np.savez, x=x, y=y, owner=y)
    labelled = npz(x=np.zeros((2, *ARCHITECTURE.input_shape), np.float32), y=np.array([0, 1]))
    images = scratch() / "images"
    (images / "cat").mkdir(parents=True, exist_ok=True)

    def folder_of_images(raw: bytes) -> object:
        (images / "cat" / "one.png").write_bytes(raw)
        return read_image_folder(images)

    return (
        Target("data.npz", as_file(read_npz, "set.npz"), sets, factor=2200, constant=_FILES, share=0.2),
        Target(
            "data.image folder",
            folder_of_images,
            (picture("PNG"), picture("JPEG"), picture("GIF"), picture("BMP"), picture("PPM"), picture("WEBP")),
            constant=128 * 2**20,
            share=0.3,
        ),
        Target(
            "data.labelled",
            as_file(lambda p: read_labelled(p, ARCHITECTURE, np.float32), "labelled.npz"),
            (labelled,),
            factor=2200,
            constant=_FILES,
            share=0.2,
        ),
    )


def zip_bytes(names: dict[str, bytes]) -> bytes:
    """A zip archive."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in names.items():
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return file.getvalue()


def _wheels() -> tuple[Target, ...]:
    from fedprune_device.releases.wheel import Wheel

    wheel_bytes = wheel(scratch() / "wheels", "fedprune", requires=["numpy>=1"]).read_bytes()
    small = make_wheel(scratch() / "small.whl", {"app/__init__.py": "x = 1\n" * 50, "app-1.dist-info/METADATA": "a"})
    seeds = (wheel_bytes, small.read_bytes())

    def unpack_wheel(path: Path) -> object:
        folder = scratch() / "slot"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        wheel_file = Wheel(path, "it.whl")
        if wheel_file.size > 2**20:
            return None  # whoever unpacks looks at the room first
        done = list(wheel_file.unpack(folder))
        inside = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
        if inside != {path for path, _, _ in done}:
            raise ValueError(f"files {inside}")
        return done

    return (
        Target("wheel.unpacked", as_file(unpack_wheel, "one.whl"), seeds, factor=2200, constant=_FILES, share=0.2),
        Target(
            "wheel.metadata",
            as_file(lambda p: wheel_requirements(p, ReleaseError), "two.whl"),
            seeds,
            factor=2200,
            constant=8 * 2**20,
            share=0.2,
        ),
        Target(
            "wheel.file name",
            lambda raw: parse_wheel_name(Path(raw.decode("utf-8", "replace").replace("\0", "") or "x"), ReleaseError),
            (b"fedprune-0.1.0-cp311-cp311-manylinux_2_17_aarch64.whl", b"a-1-py3-none-any.whl"),
            text=True,
        ),
    )
