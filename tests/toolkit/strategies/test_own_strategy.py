"""A strategy of a user's own that fails, or answers nonsense, is told so by file and line."""

import importlib
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from fedprune.coordination import make_coordinator
from fedprune.core.errors import (
    BundleError,
    ConfigError,
    ExitCode,
    ProtocolError,
    StorageError,
    StrategyError,
    did_you_mean,
)
from fedprune.jobs.job import Job
from fedprune.jobs.state import JobDevice, State
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection
from fedprune.strategies import Strategy, compose
from fedprune.strategies.allocation import Fleet
from fedprune.strategies.values import Cut, Scene, Turn
from fedprune.updates.privacy import Privacy
from support.fakes.strategy_rounds import NET, Play, identical
from support.fakes.strategy_rounds import Device as Part
from support.nets.drawn_models import model

SOURCE = '''
"""A user's file."""
from fedprune.core.errors import BundleError, ProtocolError, StorageError
from fedprune.strategies.importance.scoring import magnitude_scores, rank_channels
from fedprune.strategies import Strategy
from fedprune.strategies.aggregators import Mean
from fedprune.strategies.values import Ranking, RoundClosing, Submodel
import numpy as np

class Aggregator(Mean):
    pass

class Made(Strategy):
    def rank(self, scene):
        return Ranking(rank_channels(magnitude_scores(scene.architecture, scene.model)))

PARTS = {}

def made(job):
    return Made(inputs="updates", **{"aggregator": Aggregator(), **PARTS})
'''


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Writes somebody's module, `mine.py`, with these lines at its end, and imports it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def write(extra_source: str) -> ModuleType:
        (tmp_path / "mine.py").write_text(SOURCE + extra_source)
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)  # which knows files by their second
        sys.modules.pop("mine", None)
        importlib.invalidate_caches()
        return importlib.import_module("mine")

    yield write
    sys.modules.pop("mine", None)


def strategy() -> Strategy:
    return compose(Job(strategy="mine:made"))


def scene() -> Scene:
    return Scene(NET, 0, 1, model(NET, 0))


def cut() -> Cut:
    return Cut(scene(), Turn(0, 1, "a", NET.sizes), Selection.full(NET))


def line_of(text: str) -> int:
    return next(n for n, line in enumerate(Path("mine.py").read_text().splitlines(), 1) if text in line)


def override_source(kind: str, method: str, body: str, arguments: str = "*a, **k") -> str:
    return f"\ndef changed(self, {arguments}):\n    {body}  # here\n{kind}.{method} = changed\n"


ASKED: dict[str, Callable[[Strategy], object]] = {
    "Made.begin": lambda s: s.begin(NET, model(NET, 0)),
    "Made.start_core": lambda s: s.start_core(scene(), NET.sizes),
    "Made.rank": lambda s: s.rank(scene()),
    "Made.learn": lambda s: s.learn(scene(), s.aggregator.fold(scene(), evidence=False), lambda: iter(())),
    "Made.extract": lambda s: s.extract(cut()),
    "Made.recipe": lambda s: s.recipe(Recipe(), cut().turn),
    "Made.close": lambda s: s.close(s.aggregator.fold(scene(), evidence=False), scene(), 1.0, lambda: iter(())),
    "Aggregator.fold": lambda s: s.aggregator.fold(scene(), evidence=False),
    "Aggregator.close": lambda s: s.close(s.aggregator.fold(scene(), evidence=False), scene(), 1.0, lambda: iter(())),
}


def strategy_error(mine: Any, name: str, body: str) -> StrategyError:
    """What is said of a strategy in which one method has another body."""
    kind, _, method = name.partition(".")
    mine(override_source(kind, method, body))
    with pytest.raises(StrategyError) as caught:
        ASKED[name](strategy())
    return caught.value


@pytest.mark.parametrize("name", ASKED)
def test_a_slip_is_named_by_strategy_method_file_and_line(mine: Any, name: str) -> None:
    error = strategy_error(mine, name, "return ().items()")
    text = str(error)
    role = "aggregator " if name.startswith("Aggregator") else ""
    assert f"strategy mine:made: {role}{name} failed at mine.py:{line_of('# here')} (AttributeError: " in text
    assert "'tuple' object has no attribute 'items'" in text
    assert error.exit_code == ExitCode.CONFIG


@pytest.mark.parametrize("name", ASKED)
def test_an_answer_of_another_type_is_named_too(mine: Any, name: str) -> None:
    text = str(strategy_error(mine, name, "return 5"))
    assert f"{name} at mine.py:{line_of('def changed')}: answer: expected a" in text
    assert "got 5" in text


WRONG = [
    ("Made.begin", "{n: v * np.float32('nan') for n, v in a[1].items()}"),
    ("Made.start_core", "({'head.bias': np.ones(3, np.float32)}, {})"),
    ("Made.start_core", "(a[0].model, {'ranks': {'x': 3}})"),
    ("Made.rank", "Ranking((np.arange(5), np.arange(4)))"),
    ("Made.learn", "{'velocity': {'x': 3}}"),
    ("Made.extract", "Submodel(a[0].selection, {'head.bias': np.ones(3)})"),
    ("Made.extract", "Submodel(a[0].selection, a[0].scene.model, [])"),
    ("Made.extract", "Submodel(a[0].selection, a[0].scene.model, drift={'head.bias': np.ones(3)})"),
    ("Made.extract", "Submodel(a[0].selection, a[0].scene.model, drift={'head.bias': np.full(3, np.nan, np.float32)})"),
    ("Aggregator.close", "RoundClosing(a[1].model, {'x': 1})"),
]


@pytest.mark.parametrize(("name", "answer"), WRONG)
def test_answers_are_checked_for_their_shape(mine: Any, name: str, answer: str) -> None:
    assert "answer" in str(strategy_error(mine, name, f"return {answer}"))


def test_a_slip_below_is_named_at_the_users_own_line(mine: Any) -> None:
    mine(override_source("Made", "rank", "return Ranking(rank_channels([np.full(3, np.nan)]))"))
    with pytest.raises(StrategyError, match=r"mine.py:\d+ .*NaN"):
        ASKED["Made.rank"](strategy())


def test_a_method_with_other_arguments_is_named_where_it_is_defined(mine: Any) -> None:
    mine(override_source("Made", "rank", "return None", arguments=""))
    with pytest.raises(StrategyError) as caught:
        ASKED["Made.rank"](strategy())
    assert f"failed at mine.py:{line_of('def changed')} (TypeError" in str(caught.value)


@pytest.mark.parametrize(
    ("extra_source", "what"),
    [
        ("PARTS['allocator'] = 3", "allocator"),
        ("PARTS['core'] = 0.75", "core"),
        ("PARTS['aggregator'] = Aggregator(weighting=1)", "weighting"),
        ("def made(job): return 5", "Strategy, got int"),
        ("def made(job): return job.nothing", r"mine.py:\d+"),
    ],
)
def test_what_is_no_whole_strategy_is_said_at_the_start(mine: Any, extra_source: str, what: str) -> None:
    mine(f"\n{extra_source}\n")
    with pytest.raises(ConfigError, match=what):
        strategy()


def test_a_recipe_that_reads_widths_is_asked_for_privacy_with_those_of_the_jobs_model(mine: Any) -> None:
    job = Job(strategy="mine:made", privacy=Privacy(1.0, 1.0))
    for setting, index, refusal in (("epochs", 1, ""), ("epochs", 9, "Made.recipe"), ("patience", 1, "patience")):
        body = f"return type(a[0])(**vars(a[0]) | {{'{setting}': a[1].widths[{index}]}})"
        mine(override_source("Made", "recipe", body))
        compose(job)
        with pytest.raises(ConfigError, match=refusal) if refusal else nullcontext():
            make_coordinator(job, NET, State(model=""))
        with pytest.raises(ConfigError, match="composition of your own"):
            compose(Job(strategy="mine:made", secure_aggregation=True))


ALLOCATOR = """
from fedprune.strategies.allocation import Allocator as AllocatorBase
class Allocator(AllocatorBase):
    def admit(self, fleet, name, known):
        fleet.state.devices[name].widths = (6, 9)
    def open(self, fleet):
        pass
    def learn(self, fleet, name, task, seconds):
        return fleet.nothing
    def review(self, fleet, metrics):
        return False
    def done(self, fleet):
        return np.bool_(False)
PARTS['allocator'] = Allocator()
"""


def test_an_allocator_is_looked_at_too(mine: Any) -> None:
    mine(ALLOCATOR)
    allocator = strategy().allocator
    assert allocator is not None
    fleet = Fleet(Job(), NET, State(model="", devices={"a": JobDevice(1, True, {}, None, 10)}))
    with pytest.raises(StrategyError, match=r"admit .*mine.py:\d+: .*widths"):
        allocator.admit(fleet, "a", None)
    with pytest.raises(StrategyError, match=r"open .*mine.py:\d+: .*None"):
        allocator.open(fleet)
    with pytest.raises(StrategyError, match=r"learn .*mine.py:\d+"):
        allocator.learn(fleet, "a", SimpleNamespace(), 1.0)  # type: ignore[arg-type]
    assert not allocator.done(fleet)


def test_a_file_that_is_not_there_or_has_another_name_says_what_to_do(mine: Any) -> None:
    mine("")
    for strategy, meant_by_it in (("nowhere:made", "nowhere"), ("mine:mad", "'made'"), ("mine.made", "'mine:made'")):
        with pytest.raises(ConfigError, match=meant_by_it) as caught:
            compose(Job(strategy=strategy))
        assert caught.value.path == ("job", "strategy")


def test_what_is_not_the_strategys_fault_stays_what_it_is(mine: Any) -> None:
    def unreadable_updates() -> Iterator[Any]:
        raise BundleError("an update that can't be read")
        yield

    mine(override_source("Made", "learn", "return {} if list(a[2]()) else {}"))
    composed = strategy()
    fold = composed.aggregator.fold(scene(), evidence=False)
    with pytest.raises(BundleError, match="an update"):
        composed.learn(scene(), fold, unreadable_updates)
    mine(override_source("Made", "reconstruct", "raise ProtocolError('this update is odd')"))
    with pytest.raises(ProtocolError, match="odd"):
        strategy().reconstruct(SimpleNamespace())  # type: ignore[arg-type]
    mine(override_source("Made", "rank", "raise StorageError('a blob is lost')"))
    with pytest.raises(StorageError):
        ASKED["Made.rank"](strategy())


def test_a_good_strategy_does_what_it_did_without_checks(mine: Any) -> None:
    mine("")
    devices = {"a": Part(NET.sizes), "b": Part((3, 2))}
    job = Job(scorer="magnitude", warmup_rounds=0)
    watched, bare = (Play(s, model(NET, 0), devices).play(2) for s in (strategy(), compose(job)))
    assert identical(watched, bare)


@pytest.mark.parametrize(
    ("method", "flag"), [("extract", "is_device_independent"), ("reconstruct", "has_plain_reconstruction")]
)
def test_what_a_method_of_ones_own_does_is_not_taken_for_the_shipped_one(mine: Any, method: str, flag: str) -> None:
    mine("")
    assert getattr(strategy(), flag) is True
    mine(override_source("Made", method, "return None"))
    assert getattr(strategy(), flag) is False


def test_names_that_were_meant() -> None:
    assert did_you_mean("fedprun", ["fedavg", "fedprune"]) == " (did you mean 'fedprune'?)"
    assert did_you_mean("FedAvg", ["fedavg", "fedprune"]) == " (did you mean 'fedavg'?)"
    assert did_you_mean("learning_rate", ["epochs", "lr"]) == " (did you mean 'lr'?)"
    assert did_you_mean(3, ["epochs", "lr"]) == ""
    assert did_you_mean("xyzzy", ["epochs", "lr"]) == ""
    assert did_you_mean("a" * 10_000, ["a" * 9_999]) == ""
