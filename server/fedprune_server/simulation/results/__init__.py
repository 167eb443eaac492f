"""What a run leaves: its record, tables, reports and comparisons."""
