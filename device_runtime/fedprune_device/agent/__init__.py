"""The loop that answers the server."""
