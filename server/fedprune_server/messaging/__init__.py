"""MQTT in and out: authentication, rate limits, the outbox, brokers."""
