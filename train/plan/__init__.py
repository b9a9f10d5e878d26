"""Look before you run: what a run's data, programs and memory would be. Trains nothing."""
