"""Networks and what belongs to a network: Qwen3, its reward model, sampling, weights, tokenizer, checkpoints."""
