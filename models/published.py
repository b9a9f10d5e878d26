"""Configs of published models, to plan runs without their files.

The numbers are from each model's config.json on the Hub. Training and scoring always read the files.
"""

from models.config import POLICY, REWARD_MODEL, Qwen3Config

_SIZES = {  # hidden_size, intermediate_size, num_hidden_layers, num_attention_heads
    "0.6B": (1024, 3072, 28, 16),
    "1.7B": (2048, 6144, 28, 16),
    "4B": (2560, 9728, 36, 32),
    "8B": (4096, 12288, 36, 32),
    "14B": (5120, 17408, 40, 40),
    "32B": (5120, 25600, 64, 64),
}
_TIED = ("0.6B", "1.7B", "4B")

PUBLISHED: dict[str, Qwen3Config] = {
    f"{family}{size}": Qwen3Config(151_936, *shape, 8, 128, tie_word_embeddings=size in _TIED, architecture=kind)
    for size, shape in _SIZES.items()
    for family, kind in (("Qwen/Qwen3-", POLICY), ("Skywork/Skywork-Reward-V2-Qwen3-", REWARD_MODEL))
    if kind == POLICY or size in ("0.6B", "1.7B", "4B", "8B")
}
