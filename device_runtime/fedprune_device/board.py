"""The board's program: makes every part of it, in the order in which they need each other, and runs the agent."""

from __future__ import annotations

import json
import logging
import signal
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from fedprune.core.errors import ProfileError, RuntimeUnavailableError
from fedprune.planning import profile_store
from fedprune.planning.identification import identify
from fedprune.planning.probe_report import ProbeReport
from fedprune.planning.profile import HardwareProfile
from fedprune.runtime.precision_files import FLOAT32
from fedprune.wire.chunk import DEFAULT_MAX_PACKET
from fedprune.wire.fleet_messages import MAX_BOARD_AWAY_S
from fedprune.wire.link import tls_context
from fedprune.wire.messages import BoardWarning
from fedprune_device.agent.agent import Agent
from fedprune_device.agent.births import BirthBuilder
from fedprune_device.agent.offer_handler import OfferHandler
from fedprune_device.api.address import LocalAddress
from fedprune_device.api.local_interface import serve_local_interface
from fedprune_device.data.dataset import LocalData, SampleSource
from fedprune_device.data.sources import LOCAL, SampleOptions
from fedprune_device.engines.board_tier import board_tier
from fedprune_device.hardware.probe import process_memory, table_summaries
from fedprune_device.hardware.readings import condition_text, read_board_facts
from fedprune_device.hardware.runtime_process import RuntimeProcess
from fedprune_device.hardware.thermal_guard import ThermalGuard
from fedprune_device.launcher.sd_notify import extend_start
from fedprune_device.network.board_status import BoardStatus
from fedprune_device.network.connection import BoardConnection
from fedprune_device.network.downloader import Downloader
from fedprune_device.network.membership import (
    Membership,
    MembershipOptions,
    checked_urls,
    join_first,
    resolve_membership,
)
from fedprune_device.network.secure_update import SecureUpdate
from fedprune_device.network.start_failure import report_start_failure
from fedprune_device.network.update_sender import UpdateSender
from fedprune_device.network.uplink import Uplink
from fedprune_device.privacy.policy import PrivacyPolicy, read_policy
from fedprune_device.releases.installer import ReleaseInstaller
from fedprune_device.releases.release_agent import NO_LAUNCHER, ReleaseAgent, board_installer
from fedprune_device.releases.release_trial import ReleaseTrial
from fedprune_device.releases.watchdog import Watchdog
from fedprune_device.serving.reduced_precision import ReducedPrecision
from fedprune_device.storage.directory_owner import DirectoryOwner
from fedprune_device.storage.state_directory import DeviceStore
from fedprune_device.telemetry.crash_reporter import CrashReporter
from fedprune_device.telemetry.crash_reports import CrashReports, WarningLog
from fedprune_device.training.offline_training import OfflineTraining
from fedprune_device.training.round_runner import RoundRunner
from fedprune_device.training.trainer import TrainerCache

_LOG = logging.getLogger("fedprune.device")


@dataclass(frozen=True)
class AgentSettings:
    """The settings of a board's agent, and the parts that it gets from the program around it.

    Without `profile` only the disk limits what is accepted. `train_alone_s` are the seconds after which the board
    trains without its server, 0 for never. `serve_job` is the job whose models may serve, empty for any. `max_packet`
    is the size in bytes of the MQTT packets that the broker accepts, as far as is known. The server may send the board
    away for `most_away_s` seconds at a time, 0 for never. `installer` installs releases, or is the reason why none can
    be installed. By default `crashes` are those of the state directory. `status` is what other threads see of the
    agent; `stopping` ends it.
    """

    profile: HardwareProfile | None = None
    profile_name: str = ""
    probe: ProbeReport | None = None
    threads: int = 1
    cuda: bool = False
    guard: ThermalGuard | None = None
    train_alone_s: float = 0.0
    precision: str = FLOAT32
    serve_job: str = ""
    max_packet: int = DEFAULT_MAX_PACKET
    most_away_s: float = MAX_BOARD_AWAY_S
    engine: Callable[[], str] = lambda: ""
    runtime: str = ""
    web: Callable[[], ssl.SSLContext] = tls_context
    installer: ReleaseInstaller | str = NO_LAUNCHER
    trial: ReleaseTrial | None = None
    crashes: CrashReports | None = None
    warnings: Callable[[], tuple[BoardWarning, ...]] = tuple
    status: BoardStatus | None = None
    stopping: threading.Event | None = None


def build_agent(
    connection: BoardConnection,
    store: DeviceStore,
    data: SampleSource,
    settings: AgentSettings,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> Agent:
    """Make an agent; `clock` is monotonic, in seconds."""
    device, profile, blobs, slots = connection.device, settings.profile, store.blobs, store.slots
    slots.allowed_job = settings.serve_job
    uplink = Uplink(connection, settings.status)
    sender = UpdateSender(connection, uplink, blobs, settings.max_packet, settings.web)
    trainer = TrainerCache(settings.threads, cuda=settings.cuda)
    lowering = ReducedPrecision(settings.precision, settings.threads)
    states, noise = store.local_states, store.privacy.draw
    runner = RoundRunner(device, blobs, slots, data, trainer, states=states, lowering=lowering, noise=noise)
    offline = RoundRunner(device, blobs, slots, data, trainer, lowering=lowering)
    offers = OfferHandler(
        store,
        Downloader(blobs, connection, uplink, settings.max_packet, settings.web),
        uplink,
        sender,
        runner,
        OfflineTraining(store, offline, settings.train_alone_s),
        SecureUpdate(connection, uplink, blobs),
        profile=profile,
        guard=settings.guard,
    )
    name = settings.profile_name or ("" if profile is None else profile.name)
    return Agent(
        connection,
        store,
        BirthBuilder(
            connection,
            data,
            name,
            settings.probe,
            settings.engine,
            runtime=settings.runtime,
            may_leave=settings.most_away_s > 0,
            warnings=settings.warnings,
        ),
        uplink,
        sender,
        offers,
        releases=ReleaseAgent(connection, settings.installer),
        crashes=CrashReporter(connection, settings.crashes or CrashReports(store.root)),
        watchdog=Watchdog(settings.trial),
        stopping=settings.stopping or threading.Event(),
        max_away_s=settings.most_away_s,
        clock=clock,
    )


@dataclass(frozen=True)
class BoardConfig:
    """The options of `fedprune-device run`; `train_alone` and `away` are in hours, temperatures in °C."""

    membership: MembershipOptions
    samples: SampleOptions
    local: str | None
    privacy: Path | None
    profile: str | None
    tier: str | None
    engine_plan: Path | None
    threads: int
    pause_above: float
    resume_below: float
    train_alone: float
    away: float
    serve: str
    serve_job: str | None
    max_packet: int
    no_probe: bool
    patient: bool
    until_finished: bool


def run_board(config: BoardConfig) -> None:
    """Take part in a fleet until the agent ends (`fedprune-device run`)."""
    connecting = threading.Event()
    with RuntimeProcess() as runtime:
        try:
            _run_board(config, runtime, connecting)
        except Exception as error:
            # Of a release on trial the launcher reports what went wrong, once the earlier one runs again.
            if not connecting.is_set() and ReleaseTrial.current() is None:
                report_start_failure(config.membership, error, config.profile or "", config.privacy)
            raise


def _run_board(config: BoardConfig, runtime: RuntimeProcess, connecting: threading.Event) -> None:
    """Set `connecting` before the board connects; until then the server can't know what goes wrong."""
    member_options, sample_options = config.membership, config.samples
    state, device = member_options.state, member_options.device
    checked_urls(member_options)
    policy = read_policy(config.privacy)
    guard = ThermalGuard(config.pause_above, config.resume_below)
    trial = _checked_trial(runtime, state / "serving")
    profile = _find_profile(config.profile)
    accelerator = board_tier(config.tier, config.engine_plan, profile)
    address = LocalAddress.from_option(config.local, state)
    selector = None if address is None else accelerator.selector(state)
    stopping, status = threading.Event(), BoardStatus()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    owner = DirectoryOwner(device, member_options.site)
    with ExitStack() as stack, _ignore_stopped_children(stopping):
        # Before the state directory is locked and written: an error in the user's data is reported first.
        fixed_data = None if sample_options.data == LOCAL else sample_options.open(state, stack)
        store = _open_store(stack, state, owner, policy)
        crashes = CrashReports(state, withholds_text=lambda: store.privacy.is_private)
        warnings = WarningLog(withholds_text=lambda: store.privacy.is_private)
        stack.enter_context(warnings.watch_log())  # before the last crash is looked for, which is a warning
        stack.enter_context(crashes.watch_run())
        data = sample_options.open(state, stack) if fixed_data is None else fixed_data
        version = runtime.check()  # in a child process before this one loads it: a broken onnxruntime ends its process
        # With an engine onnxruntime stays on the processor: the reference of its check must not share its faults.
        cuda = accelerator.cuda and selector is None
        stack.enter_context(
            serve_local_interface(address, state, sample_options, data, status.to_dict, cuda=cuda, selector=selector)
        )
        member = resolve_membership(member_options)
        if config.no_probe or (member.identity is not None and not member.identity.has_joined):
            runtime.close()  # joining may take days, and the child process needs memory
        if not _join_fleet(member, owner, stopping, patient=config.patient):
            return
        connection = member.connect(store.next_session)
        probe = None if config.no_probe else _probe(config, runtime, data, cuda=accelerator.cuda)
        runtime.close()
        _LOG.info("board: %s", condition_text())
        settings = AgentSettings(
            profile,
            probe=probe,
            threads=config.threads,
            cuda=accelerator.cuda,
            guard=guard,
            train_alone_s=3600 * config.train_alone,
            precision=config.serve,
            serve_job=config.serve_job or "",
            max_packet=config.max_packet,
            most_away_s=3600 * config.away,
            engine=lambda: "" if selector is None else selector.status,
            runtime=version,
            web=member.web_context,
            installer=board_installer(member.identity),
            trial=trial,
            crashes=crashes,
            warnings=warnings.report,
            status=status,
            stopping=stopping,
        )
        agent = build_agent(connection, store, data, settings)
        if not stopping.is_set():
            connecting.set()
            connection.link.start(patient=config.patient)
            stack.callback(connection.link.close)
            # Only now: a start that fails must not give the state directory to a mistyped device name.
            owner.claim(state)
            stack.enter_context(member.renewal_task(connection.link) or nullcontext())
            agent.run(config.until_finished)


def _open_store(stack: ExitStack, state: Path, owner: DirectoryOwner, policy: PrivacyPolicy | None) -> DeviceStore:
    store = stack.enter_context(DeviceStore(state, owner=owner))
    store.apply_policy(policy)
    if store.privacy.is_private:
        _LOG.info("privacy: %s", store.privacy.describe())
    return store


def _join_fleet(member: Membership, owner: DirectoryOwner, stopping: threading.Event, *, patient: bool) -> bool:
    """Join, if the board hasn't yet; False if it was stopped meanwhile."""
    with extend_start("waiting to join the fleet"):
        if not join_first(member, patient=patient, stopped=stopping):
            return False
    if member.identity is not None:
        owner.claim(member.options.state)
    return True


def _checked_trial(runtime: RuntimeProcess, serving: Path) -> ReleaseTrial | None:
    """The trial under way, if this process is one, after the checks of a new release that need no broker."""
    trial = ReleaseTrial.current()
    if trial is None:
        return None

    def check_health() -> None:
        runtime.check_model(serving)
        trial.check_packages()

    trial.check(check_health)
    return trial


def _probe(config: BoardConfig, runtime: RuntimeProcess, data: SampleSource, *, cuda: bool) -> ProbeReport:
    _LOG.info("measuring this board, which takes 10 to 30 s")
    report = runtime.probe(config.threads, memory_file=config.membership.state / "layer_times.json", cuda=cuda)
    # The probe reports this process without its samples, because the planner adds the samples' memory itself.
    sample_bytes = data.memory_bytes if isinstance(data, LocalData) else 0
    process_bytes = process_memory()
    report = replace(report, process_bytes=None if process_bytes is None else max(process_bytes - sample_bytes, 2**20))
    _LOG.info("probe: %s", json.dumps(report.to_dict() | table_summaries(report)))
    return report


@contextmanager
def _ignore_stopped_children(stopping: threading.Event) -> Iterator[None]:
    """End the body without an error where the service manager's stop signal ended a child process of a check, too."""
    try:
        yield
    except RuntimeUnavailableError:
        if not stopping.is_set():
            raise


def _find_profile(name: str | None) -> HardwareProfile | None:
    if name:
        return profile_store.find_profile(name)
    try:
        identification = identify(read_board_facts())
    except ProfileError as error:
        _LOG.warning("no hardware profile fits this board, so that only its disk limits what it accepts: %s", error)
        return None
    _LOG.info("profile: %s", identification.describe())
    return identification.profile
