"""What lies on disk: files and folders that are whole or not there, locks on them, checksums of those that are read
back, what a run records of itself, files that users name, the cache of what the package index gives, and secrets, which
no file holds."""
