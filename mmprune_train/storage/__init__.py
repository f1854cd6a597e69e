"""What lies on disk: files and folders that are whole or not there, checksums of those that are read back, what a run
records of itself, files that users name, and the cache of what the package index gives."""
