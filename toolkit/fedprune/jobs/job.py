"""A job: one model trained on a fleet, and every setting of how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any

from fedprune.aggregation.fold import Rule
from fedprune.core import validation
from fedprune.core.errors import ConfigError, KeyPath, value_text
from fedprune.core.settings import bounded, check_fields, choice_of
from fedprune.model.recipe import Recipe
from fedprune.runtime.precision_files import FLEET_PRECISIONS
from fedprune.updates.codecs import AUTO, DOWNLOAD_CODECS, PLAIN, Codec
from fedprune.updates.privacy import WRITTEN_SETTINGS, Privacy
from fedprune.wire.topics import check_job

SCORERS = ("ordered", "magnitude", "curvature")

# Settings that only the plain strategy reads: another one would ignore them, so that a job that has both is refused.
_PLAIN_STRATEGY_SETTINGS = ("scorer", "warmup_rounds", "rule", "server_momentum")

# Settings of a job whose updates count as they arrive, as in the equations of papers.
NO_UPDATE_LIMITS = {"move_limit": 0.0, "weight_limit": 0.0}


@dataclass(frozen=True)
class Job:
    """Settings of a job.

    Attributes:
        name: Names the job in topics and on disk: 1 to 64 letters, digits, `_`, `.` or `-`; not `.`, `..` or `-`.
        seed: Every random number of the job is keyed by it.
        rounds: How many rounds to run, at most.
        devices: A round starts when this many devices are there.
        participation: Share of the present devices that a round asks.
        over_selection: Share of devices that a round asks beyond those, to close as soon as enough have delivered.
        in_flight: How many devices of a round may have an offer at a time, while the others wait for their turn; 0 for
            all.
        deadline_s: Seconds that a round waits for updates after the offers went out.
        schedule: Another schedule than the strategy's: `kind` (`sync`, `semi-async` or `async`) and keys of
            `fedprune.jobs.schedule.Schedule`; empty for the strategy's own.
        total_bytes: Ends the job with the round in which all devices together have sent and received this many payload
            bytes; 0 for no end. (`byte_budget` limits what one device may cause in each round.)
        total_macs: The same for the MACs of their training steps, which simulations alone count; 0 for no end.
        total_hours: The same for the hours since the first round began, pauses and restarts included, in a simulation
            those of the virtual clock; 0 for no end.
        byte_budget: Payload bytes that one device may cause per round, both ways; 0 for no limit of the job's own.
        energy_budget: Joules that a round's training may take on a device beyond what it takes when idle; 0 for no
            limit. Devices whose profile has no power figures aren't limited.
        strategy: A preset's name, or a composition of your own as `package.module:function`. `plain` is what the keys
            from `density` to `server_momentum` say.
        options: The strategy's own settings.
        density: Kept share of every channel group on every device, less where its board can't hold that; 0 to let the
            planner decide per device.
        ignores_plans: Give devices what the strategy or `density` asks for, also where their boards can't hold it: for
            simulations of a paper's own setting.
        scorer: Ranks channels: `ordered`, `magnitude` or `curvature`.
        warmup_rounds: Rounds of random nested ranks before the scorer's (`curvature` learns from updates first).
        rule: `coverage` averages each coordinate over the devices that trained it; with `fill` the others count
            with the current model's value (CA-HFP, eq. 4).
        server_momentum: Momentum of the global model's moves, 0 for none.
        recipe: Local training.
        precision: Lower precisions that boards may serve at, too: offers bring the graphs.
        compression: The codec of updates: `auto` for the strategy's own, `none`, `int8`, `int4` or `top-k:SHARE`. A
            device that doesn't know it sends its updates plainly.
        compression_of: The same for single hardware profiles, by name.
        compression_down: The codec of the weights that devices are sent: `auto` for the strategy's own, `none`, `int8`
            or `int4`.
        privacy: Whether and how what boards hand in is clipped and noised.
        secure_aggregation: Boards mask what they hand in, so that the server learns only the sum of boards with the
            same channels (`docs/secure-aggregation.md`). `move_limit` is not applied then, all boards
            weigh the same, and a board counts only if at least two others have the same channels.
        weight_limit: The most samples that a device counts for, in multiples of the round's median; 0 for no limit.
        most_samples: The most samples that any device counts for; 0 for no limit.
        move_limit: The longest update, in multiples of the median of the round's updates: a longer one is shortened to
            it, and one far from their mean is shortened, too (`fedprune.coordination.limits`); 0 for no limit.
    """

    name: str = "job"
    seed: int = bounded(0, 0, 2**63 - 1)
    rounds: int = bounded(10, 1, 10**6)
    devices: int = bounded(1, 1, 10**6)
    participation: float = bounded(1.0, 0, 1, above=True)
    over_selection: float = bounded(0.0, 0, 10)
    in_flight: int = bounded(0, 0, 10**6)
    deadline_s: float = bounded(600.0, 0, 1e8, above=True)
    schedule: dict[str, Any] = field(default_factory=dict)
    total_bytes: int = bounded(0, 0, 2**62)
    total_macs: int = bounded(0, 0, 2**62)
    total_hours: float = bounded(0.0, 0, 1e6)
    byte_budget: int = bounded(0, 0, 2**50)
    energy_budget: float = bounded(0.0, 0, 1e9)
    strategy: str = "plain"
    options: dict[str, Any] = field(default_factory=dict)
    density: float = bounded(0.0, 0, 1)
    ignores_plans: bool = False
    scorer: str = choice_of("magnitude", SCORERS)
    warmup_rounds: int = bounded(0, 0, 10**6)
    rule: Rule = "coverage"
    server_momentum: float = bounded(0.0, 0, 0.999)
    recipe: Recipe = field(default_factory=Recipe)
    precision: tuple[str, ...] = ()
    compression: str = AUTO
    compression_of: dict[str, str] = field(default_factory=dict)
    compression_down: str = choice_of(AUTO, (AUTO, PLAIN, *DOWNLOAD_CODECS))
    privacy: Privacy = field(default_factory=Privacy)
    secure_aggregation: bool = False
    weight_limit: float = bounded(1.0, 1, 1e6, or_zero=True)
    most_samples: int = bounded(0, 0, 2**62)
    move_limit: float = bounded(1.5, 1, 1e6, or_zero=True)

    def __post_init__(self) -> None:
        check_fields(self, ("job",))
        for name in ("schedule", "options", "compression_of"):
            table = validation.check_mapping(("job", name), getattr(self, name))
            if not all(isinstance(k, str) for k in table):
                raise ConfigError(("job", name), expected="keys that are texts", got=value_text(list(table)))
        check_job(self.name, ("job", "name"), error=ConfigError)
        if not isinstance(self.strategy, str) or not 0 < len(self.strategy) <= 200:
            raise ConfigError(("job", "strategy"), expected="a name", got=value_text(self.strategy))
        if not isinstance(self.precision, (list, tuple)) or not set(map(str, self.precision)) <= set(FLEET_PRECISIONS):
            expected = f"a list of some of {', '.join(FLEET_PRECISIONS)}"
            raise ConfigError(("job", "precision"), expected=expected, got=value_text(self.precision))
        object.__setattr__(self, "precision", tuple(dict.fromkeys(self.precision)))
        compressions: dict[KeyPath, object] = {("job", "compression"): self.compression}
        compressions |= {("job", "compression_of", profile): value for profile, value in self.compression_of.items()}
        for path, compression in compressions.items():
            if compression != AUTO:
                Codec.parse(compression, path)
        written_elsewhere = dict.fromkeys(WRITTEN_SETTINGS, "[job.privacy], which says what it is")
        for name, right_place in (written_elsewhere | {"secure_aggregation": "secure_aggregation in [job]"}).items():
            if getattr(self.recipe, name):
                raise ConfigError(("job", "recipe", name), expected=right_place, got=getattr(self.recipe, name))
        self.privacy.private_recipe(self.training_recipe)  # what doesn't go with privacy or rounds is better known now
        self._check_plain_settings()
        # Other optimisers scale moves by their own state, so that gradients can't be computed from them.
        if self.scorer == "curvature" and self.recipe.optimizer != "sgd":
            raise ConfigError(
                "'curvature' learns gradients from how far devices' SGD moves",
                path=("job", "scorer"),
                expected="recipe.optimizer 'sgd'",
                got=repr(self.recipe.optimizer),
            )

    def _check_plain_settings(self) -> None:
        """Refuse keys of the plain strategy together with another one, which would ignore them."""
        if self.strategy == "plain":
            # All other settings of the plain strategy are keys of the job itself.
            for key in sorted(set(self.options) - {"robust"}):
                raise ConfigError("unknown to strategy 'plain'", path=("job", "options", key), expected="robust")
            return
        for f in fields(self):
            if f.name in _PLAIN_STRATEGY_SETTINGS and getattr(self, f.name) != f.default:
                raise ConfigError(
                    f"with strategy {value_text(self.strategy)}",
                    path=("job", f.name),
                    expected="only the strategy's own [job.options]",
                    got=value_text(getattr(self, f.name)),
                )

    @cached_property
    def training_recipe(self) -> Recipe:
        """The recipe with the rounds over which its learning rate falls, and whether updates are masked."""
        has_own_rounds = self.recipe.lr_schedule == "constant" or self.recipe.lr_rounds
        # A falling rate needs an end: by default that of the job, which a recipe alone doesn't know.
        rounds = self.recipe.lr_rounds if has_own_rounds else self.rounds
        return replace(self.recipe, lr_rounds=rounds, secure_aggregation=self.secure_aggregation)

    @property
    def uses_sums_only(self) -> bool:
        """Whether the server may make nothing of single updates, only of their sum: they are masked, or the noise that
        protects them is shared by all boards."""
        return self.secure_aggregation or (self.privacy.is_on and not self.privacy.is_local)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        nested = {"recipe": self.recipe.to_dict(), "privacy": self.privacy.to_dict(), "precision": list(self.precision)}
        return asdict(self) | nested

    @classmethod
    def from_dict(cls, body: Mapping[str, Any]) -> Job:
        """Read and check. Raises `ConfigError`, which names the key, for an unknown key, a wrong type or a number out
        of range."""
        values = validation.check_table(cls, body, ("job",))
        if "recipe" in values:
            values["recipe"] = Recipe.from_dict(validation.check_mapping(("job", "recipe"), values["recipe"]))
        if "privacy" in values:
            values["privacy"] = Privacy.from_dict(values["privacy"])
        return cls(**values)
