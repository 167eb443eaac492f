"""One module for each experiment tracker, called as the setting `track` and the extra call it."""
