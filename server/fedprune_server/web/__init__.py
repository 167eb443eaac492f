"""The operators' console: a process of its own that shows what the server tells it, and passes operators' orders on."""
