"""What the console knows, the messages that bring it there, and orders on their way back."""
