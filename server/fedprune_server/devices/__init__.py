"""The registry of boards: who is in the fleet, what they do, what they sent."""
