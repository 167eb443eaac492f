"""The embedded broker, and the settings of others."""
