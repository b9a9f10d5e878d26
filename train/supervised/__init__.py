"""Trains by supervision: fine-tuning, reward models, and the loop that they share."""
