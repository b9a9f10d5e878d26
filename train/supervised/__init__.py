"""Supervised programs: fine-tuning and reward models, and the loop that they share."""
