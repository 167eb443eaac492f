"""Who a server is, and whom it has let in."""
