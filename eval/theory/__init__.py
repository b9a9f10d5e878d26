"""Tabular policies beside their predicted fixed points; nothing imports it."""
