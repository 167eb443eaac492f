"""Results of a run: its record, tables, reports and comparisons."""
