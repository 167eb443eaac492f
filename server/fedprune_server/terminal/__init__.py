"""What people see on a terminal: tables, lines and progress."""
