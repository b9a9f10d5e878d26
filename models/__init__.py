"""Networks: the Qwen3 policy and reward model, with sampling, sharding, weights, tokenizer and checkpoints."""
