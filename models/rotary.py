"""The frequencies of rotary embedding, by what a config says of positions beyond the trained length."""

import math

import numpy as np

from models.config import Qwen3Config


def rotary_frequencies(config: Qwen3Config) -> tuple[np.ndarray, float]:
    """Returns the angle per position of each of the E/2 rotary pairs, and a factor of cosines and sines.

        theta^(-2i/E), divided by `factor` with linear scaling; with yarn (see `yarn_frequencies`) between the two

    Computed in numpy, like transformers does: an accelerator's power function is less exact, and at position 40,000 a
    frequency's last bit is a visible angle.
    """
    E = config.head_dim
    wavelengths = (config.rope_theta ** (np.arange(0, E, 2, dtype=np.float32) / np.float32(E))).astype(np.float32)
    frequencies, scaling = np.float32(1) / wavelengths, config.rope_scaling
    if scaling is None:
        return frequencies, 1.0
    if scaling.rope_type == "linear":
        return frequencies / np.float32(scaling.factor), 1.0
    return yarn_frequencies(config, wavelengths)


def yarn_frequencies(config: Qwen3Config, wavelengths: np.ndarray) -> tuple[np.ndarray, float]:
    """Returns frequencies and attention factor of yarn (Peng et al., https://arxiv.org/abs/2309.00071, section 3.4).

    Pairs that turn more than beta_fast times within the trained length keep their frequency. Pairs that turn less
    than beta_slow times have it divided by `factor`. A linear ramp interpolates between them.
    """
    scaling, E = config.rope_scaling, config.head_dim
    assert scaling is not None
    trained = scaling.original_max_position_embeddings or config.max_position_embeddings

    def pair_that_turns(times: float) -> float:
        return E * math.log(trained / (times * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    def growth(weight: float) -> float:
        return 0.1 * weight * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0

    first, last = pair_that_turns(scaling.beta_fast or 32), pair_that_turns(scaling.beta_slow or 1)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, E - 1)
    width = last - first if last != first else 0.001
    ramp = np.clip((np.arange(E // 2, dtype=np.float32) - np.float32(first)) / np.float32(width), 0, 1)
    frequencies, stretched = 1 / wavelengths, 1 / (np.float32(scaling.factor) * wavelengths)
    factor = scaling.attention_factor
    if factor is None and scaling.mscale and scaling.mscale_all_dim:
        factor = growth(scaling.mscale) / growth(scaling.mscale_all_dim)
    elif factor is None:
        factor = growth(1)
    return (stretched * ramp + frequencies * (1 - ramp)).astype(np.float32), factor
