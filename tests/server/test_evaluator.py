"""Measuring models: which sessions stay open, and on what nothing can be measured."""

from __future__ import annotations

import gc
import weakref

import pytest

from fedprune.architecture import widths_at
from fedprune_export.imported import Model
from fedprune_export.importing import import_onnx
from fedprune_server.digits import digits_model
from fedprune_server.evaluator import Sessions


@pytest.fixture(scope="module")
def model() -> Model:
    return import_onnx(digits_model(), "digits")


def test_only_the_sessions_that_were_asked_for_last_stay_open(model: Model) -> None:
    sessions = Sessions(model, most=3)
    sizes = model.architecture.sizes
    whole = sessions.at(sizes)
    opened = []
    for last in range(1, 6):  # a strategy that chooses anew in every round
        opened.append(weakref.ref(sessions.at((*sizes[:-1], last))))
        assert sessions.at(sizes) is whole
    gc.collect()
    assert [found() is not None for found in opened] == [False, False, False, True, True]


def test_what_every_round_measures_is_opened_once(model: Model) -> None:
    widths = [widths_at(model.architecture, d) for d in (1.0, 0.5, 0.25)]
    sessions = Sessions(model, most=3)
    first = [sessions.at(w) for w in widths]
    assert all(sessions.at(w) is session for _ in range(2) for w, session in zip(widths, first, strict=True))
