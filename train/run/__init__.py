"""What a run leaves on disk, and the numbers in it."""
