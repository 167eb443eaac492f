"""How many leaves a chunk may hold on its way here: what this side was told, or finds the broker to let through.

A broker with a lower limit drops a chunk without a word, or drops the connection of who sent it. So where chunks of
several leaves were asked for and nothing came, chunks of fewer are asked for. Where nothing comes then either, the size
was not the reason.
"""

from __future__ import annotations

from fedprune.wire.chunk import MAX_PACKET, leaves_per_chunk


class ChunkLimit:
    """What is known of it; shared by all that comes through one broker.

    Args:
        max_packet: Bytes of an MQTT packet that the broker lets through, as far as is known.

    Attributes:
        leaves: Leaves that a chunk may hold.

    Raises:
        ProtocolError: Not even one leaf fits into a packet.
    """

    def __init__(self, max_packet: int = MAX_PACKET) -> None:
        self.leaves = self._told = leaves_per_chunk(max_packet)
        self._proven = 0

    @property
    def wanted(self) -> int | None:
        """What a want says of it; None where the sender knows without."""
        return self.leaves if self.leaves < leaves_per_chunk(MAX_PACKET) else None

    def arrived(self, leaves: int) -> None:
        """A chunk of so many leaves came through."""
        self._proven = max(self._proven, leaves)

    def silent(self) -> None:
        """Several leaves were asked for, and nothing came."""
        if self._proven >= self.leaves:
            return  # such chunks have come through: something else is the matter
        self.leaves = max(self.leaves // 2, self._proven) if self.leaves > 1 else self._told
