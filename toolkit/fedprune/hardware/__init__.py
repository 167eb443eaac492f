"""Hardware profiles, probe reports, and which profile fits a board."""
