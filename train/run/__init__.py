"""A run's directory on disk, and the metrics that are logged to it."""
