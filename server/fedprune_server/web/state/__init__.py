"""The console's records, the messages that carry them, and orders on their way back."""
