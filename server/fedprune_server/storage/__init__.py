"""What must survive a crash: the database, the blobs, their backups and their checks."""
