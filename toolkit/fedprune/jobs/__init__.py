"""What a job is: settings, schedule, and the state that the coordinator keeps of it."""
