"""From clients' updates to the next global model."""
