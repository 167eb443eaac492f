"""Worker processes that receive updates in the server's place."""
