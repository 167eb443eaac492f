"""A state directory looked over, repaired, backed up and restored."""
