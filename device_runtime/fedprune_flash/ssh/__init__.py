"""Installation over the network: inventory, progress, one board after the other."""
