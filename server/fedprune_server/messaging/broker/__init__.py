"""The embedded broker's process, and the configuration of other brokers."""
