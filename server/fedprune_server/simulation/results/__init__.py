"""What a run leaves: its record, reports and comparisons."""
