"""What a server is told: its file of settings, addresses in it, and where two sets of settings differ."""
