"""The embedded broker, the programs that it can be, and the configuration of other brokers."""
