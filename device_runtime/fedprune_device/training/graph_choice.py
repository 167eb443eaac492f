"""Which training graph of an offer a board uses: one with channels in blocks for this processor, or the standard one.

The server knows the block length that the board announced, which may have changed (onnxruntime was replaced, the card
moved to another board), so what is found here counts.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from fedprune.core.errors import ModelError
from fedprune.runtime.blocks import OFF, block_size, turned_off
from fedprune.wire.messages import Offer

_LOG = logging.getLogger("fedprune.device")


class GraphChoice:
    """Chooses, and learns from failures. With `standard`, as on a GPU, the standard graph is always used."""

    def __init__(self, *, standard: bool = False) -> None:
        self._standard = standard
        self._failed = False

    def suited(self, offer: Offer) -> Offer:
        """The offer without the graphs that this board can't use: none of them is pulled."""
        if not offer.blocked:
            return replace(offer, blocked=None)
        here = "" if self._standard else str(block_size())
        mine = {block: ref for block, ref in offer.blocked.items() if block == here}
        if not mine and not self._standard:
            none = "blocks are switched off" if turned_off() else "no blocks"
            _LOG.info(
                "round %d of job %s: its graph for blocks of %s channels is not for this processor (%s): standard "
                "operators are used",
                offer.round,
                offer.job,
                " or ".join(offer.blocked),
                f"blocks of {here}" if here != "0" else none,
            )
        return replace(offer, blocked=mine or None)

    def instead(self, offer: Offer, error: BaseException) -> Offer | None:
        """The same offer with standard operators, from now on; None if it used them, or the graph didn't fail."""
        if not offer.blocked or not (isinstance(error, ModelError) or isinstance(error.__cause__, ModelError)):
            return None
        self._standard = self._failed = True
        _LOG.warning(
            "round %d of job %s: with channels in blocks it fails (%s): trying standard operators",
            offer.round,
            offer.job,
            error,
        )
        return replace(offer, blocked=None)

    def described(self, offer: Offer) -> str:
        """In words, how a board trains for an offer that `suited` left to it; and why, where it isn't in blocks."""
        if offer.blocked:
            return f"in blocks of {next(iter(offer.blocked))} channels"
        return f"with standard operators ({self._why(offer)})"

    def _why(self, offer: Offer) -> str:
        """Reasons of the board come first: no other recipe would change them."""
        if self._standard:
            return "with channels in blocks it failed" if self._failed else "a GPU has no blocks of channels"
        if turned_off():
            return f"blocks of channels are switched off: --no-blocks or {OFF}"
        here = block_size()
        if not here:
            return "this processor has no blocks of channels"
        if offer.recipe.get("ordered_dropout"):
            return "steps of this recipe are of several widths: ordered dropout"
        return f"no graph for blocks of {here} channels was offered"
