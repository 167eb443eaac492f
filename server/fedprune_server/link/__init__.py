"""Between the daemon and the devices: what comes in, checked, and what goes out."""
