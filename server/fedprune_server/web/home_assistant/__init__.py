"""Jobs and boards in Home Assistant, by MQTT discovery: one more user of the console, at a broker of its own."""
