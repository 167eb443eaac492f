"""One connection to an MQTT broker: reconnection, subscriptions, bounded inbox and outbox."""
