"""An amqtt plugin that counts the payload bytes of what is published and delivered, by channel."""

from __future__ import annotations

from typing import Any

from amqtt.mqtt.publish import PublishPacket
from amqtt.plugins.base import BasePlugin

from fedprune_server.messaging.broker.child import KINDS, kind


class TrafficPlugin(BasePlugin):  # type: ignore[misc]
    """Counts payload bytes per channel, received from publishers and delivered to subscribers."""

    def __init__(self, context: Any) -> None:
        super().__init__(context)
        self.counts = {way: dict.fromkeys(KINDS, 0) for way in ("received", "delivered")}

    async def on_mqtt_packet_received(self, *, packet: Any, session: Any = None) -> None:
        self._count("received", packet)

    async def on_mqtt_packet_sent(self, *, packet: Any, session: Any = None) -> None:
        self._count("delivered", packet)

    def _count(self, way: str, packet: Any) -> None:
        if isinstance(packet, PublishPacket):
            self.counts[way][kind(packet.topic_name or "")] += len(packet.data or b"")
