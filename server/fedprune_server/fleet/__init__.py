"""Who is in the fleet, who is there, and whom to hear."""
