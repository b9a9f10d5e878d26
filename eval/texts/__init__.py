"""Completions of a policy: sampled, scored and measured, from JSONL to JSONL."""
