"""The server's loop, and one runner per job."""
