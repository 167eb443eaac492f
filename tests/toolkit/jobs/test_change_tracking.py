"""A roll knows what has changed on it and counts by kind, whatever is done to it."""

import copy
import pickle
from collections import Counter
from dataclasses import dataclass
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from fedprune.jobs.change_tracking import TrackedDict, TrackedEntry


@dataclass
class Thing(TrackedEntry):
    colour: str
    size: int = 0

    @property
    def count_kind(self) -> str:
        return self.colour


NAMES, COLOURS = st.sampled_from("abcd"), st.sampled_from(["red", "blue"])
STEPS = st.one_of(
    st.tuples(st.just("put"), NAMES, COLOURS, st.integers(0, 2)),
    st.tuples(st.just("paint"), NAMES, COLOURS),
    st.tuples(st.just("grow"), NAMES, st.integers(0, 2)),
    st.tuples(st.sampled_from(["take", "pop", "default"]), NAMES),
    st.tuples(st.sampled_from(["clear", "settle", "merge"])),
)


@given(st.lists(STEPS, max_size=30))
def test_a_roll_does_what_a_dictionary_does_and_knows_what_has_changed(steps: list[Any]) -> None:
    roll, plain = TrackedDict[Thing](), dict[str, Thing]()
    before: dict[str, Thing] = {}
    for step in steps:
        match step:
            case "put", name, colour, size:
                roll[name] = Thing(colour, size)
                plain[name] = Thing(colour, size)
            case "paint", name, colour if name in roll:
                roll[name].colour = plain[name].colour = colour
            case "grow", name, size if name in roll:
                roll[name].size = plain[name].size = size
            case "take", name if name in roll:
                del roll[name], plain[name]
            case "pop", name:
                assert roll.pop(name, None) == plain.pop(name, None)
            case "default", name:
                assert roll.setdefault(name, Thing("red")) == plain.setdefault(name, Thing("red"))
            case ("clear",):
                roll.clear()
                plain.clear()
            case ("merge",):
                roll.update({"a": Thing("blue", 7)}, b=Thing("red", 8))
                roll |= {"c": Thing("red", 9)}
                plain |= {"a": Thing("blue", 7), "b": Thing("red", 8), "c": Thing("red", 9)}
            case ("settle",):
                roll.mark_saved()
                before = copy.deepcopy(plain)
        assert roll == plain
        counts = Counter(t.colour for t in plain.values())
        assert [roll.count("red"), roll.count("blue"), roll.count("red", "blue")] == [
            counts["red"],
            counts["blue"],
            len(plain),
        ]
        assert {n for n in (before | plain) if before.get(n) != plain.get(n)} <= roll.changed


def test_what_is_assigned_again_changes_nothing() -> None:
    roll = TrackedDict({"a": Thing("red", 1)})
    roll.mark_saved()
    counts = dict(roll.counts)
    roll["a"].colour = "red"
    roll["a"] = Thing("red", 1)
    assert not roll.changed
    assert roll.counts == counts
    roll["a"].size = True  # equal to 1, and not written alike
    assert roll.changed == {"a"}


def test_an_entry_that_has_left_its_roll_or_was_copied_changes_nothing_there() -> None:
    roll = TrackedDict({"a": Thing("red")})
    copies = [copy.copy(roll["a"]), copy.deepcopy(roll["a"]), pickle.loads(pickle.dumps(roll["a"]))]  # noqa: S301
    gone = roll.pop("a")
    roll.mark_saved()
    for thing in (gone, *copies):
        assert thing == Thing("red")
        thing.colour = "blue"
    assert not roll.changed
    assert roll.count("red", "blue") == 0
