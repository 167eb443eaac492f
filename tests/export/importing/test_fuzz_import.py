"""Damaged models are imported or refused with one of our errors."""

import numpy as np
import pytest

from fedprune.core.errors import ModelError
from fedprune_export.importing import import_onnx
from support.faults.model_mutations import damage_model
from support.nets.model_corpus import corpus

MODELS = corpus()
CASES = 400  # damaged copies of each model


def refusal(raw: bytes) -> str:
    """Why a model is not imported; empty if it is."""
    try:
        import_onnx(raw, "net")
    except ModelError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", MODELS)
def test_the_models_that_are_damaged_are_sound(name: str) -> None:
    assert refusal(MODELS[name]) == ""


@pytest.mark.parametrize("name", MODELS)
def test_a_damaged_model_is_imported_or_refused(name: str) -> None:
    refusals = {s: refusal(damage_model(MODELS[name], np.random.default_rng([s, len(name)]))) for s in range(CASES)}
    assert len({r for r in refusals.values() if r}) > 10
    assert {s: r for s, r in refusals.items() if len(r) > 1000} == {}
    assert {s: r for s, r in refusals.items() if "can't be understood" in r} == {}, "only the net below caught it"
