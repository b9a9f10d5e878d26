"""Completions of a policy: drawn, scored and measured, from JSONL to JSONL."""
