"""The command lines below `fedprune-server`, and `fedprune-simulate`."""
