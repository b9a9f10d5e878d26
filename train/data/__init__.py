"""Data in: rows, conversations, prompts and their token ids."""
