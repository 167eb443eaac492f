"""What the planner counts for a board's disk is what the board counts when the offer comes."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from fedprune.blobs.blob_store import BlobStore
from fedprune.core.errors import PlanError
from fedprune.model.recipe import Recipe
from fedprune.planning.costs import costs_at, storage_bytes
from fedprune.wire.messages import Offer
from fedprune_device.network.offer_checks import check_offer
from fedprune_device.storage.state_directory import DeviceStore
from fedprune_export.bundles.inference import inference_model
from fedprune_export.importing import export_torch, import_onnx
from fedprune_export.training.step_graph import training_graph
from support.nets import small_nets as nets

pytestmark = pytest.mark.torch

LARGEST = Recipe(proximal=0.1, logit_adjustment=True, mask_absent_classes=True, balance_classes=True)


@pytest.mark.parametrize("name", ["lenet", "resnet20_bn", "concat_net"])
def test_a_planned_offer_is_within_the_storage_that_was_planned(tmp_path, name):
    model = import_onnx(export_torch(getattr(nets, name)()), name)
    costs = costs_at(model.architecture, model.architecture.sizes)
    store = BlobStore(tmp_path / "server", durable=False)
    offer = Offer(
        job="job",
        round=1,
        attempt=1,
        seed=0,
        architecture=model.architecture.digest,
        selection="0" * 64,
        widths=model.architecture.sizes,
        classes=10,
        weights=store.put(bytes(costs.wire_bytes)),
        training=store.put(training_graph(model, LARGEST.features).to_bytes()),
        inference=store.put(inference_model(model, model.architecture.sizes)),
        recipe=LARGEST.to_dict(),
    )
    needed = storage_bytes(offer.weights.size, offer.training.size, offer.inference.size)
    assert needed <= costs.storage_bytes() < 2 * needed
    with DeviceStore(tmp_path / "board") as board:
        check_offer(offer, board, profile(costs.storage_bytes()))
        with pytest.raises(PlanError, match="room"):
            check_offer(offer, board, profile(needed - 1))


def profile(budget: int) -> Any:
    return cast("Any", SimpleNamespace(storage=SimpleNamespace(budget_bytes=budget), training_memory_bytes=10**12))
