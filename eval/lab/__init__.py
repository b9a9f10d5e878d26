"""A controlled study of ranked rewards; nothing imports it."""
