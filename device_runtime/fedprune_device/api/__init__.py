"""The local interface for applications beside the agent."""
