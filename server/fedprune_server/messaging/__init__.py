"""MQTT in and out: connection, signatures, rate limits, outbox, other servers, embedded broker.

Not here: what a message means to a job (`engine.message_handler`).
"""
