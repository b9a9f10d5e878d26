"""A reward of your own that is slow, logs what it finds, and may hang: workers, a time limit, counted failures.

    python -m train policy --config configs/tldr/tiny_gopo.yaml --output_dir runs/custom --rewards \
      '[{function: examples.custom_reward.brevity, options: {seconds: 1}, workers: 8, timeout_s: 10, retries: 1}]'
"""

import time
from collections.abc import Callable
from typing import Any


def brevity(
    completions: list[str],
    completion: list[str],
    log_metric: Callable[[str, float], None] | None = None,
    log_columns: Callable[[str, list[Any]], None] | None = None,
    *,
    seconds: float = 0.0,
    hangs_below: int = 0,
    unknown_below: int = 0,
    **columns: Any,
) -> list[float | None]:
    """Minus the share by which a text's words differ from those of the reference, the data's column `completion`.

    Args:
      seconds: how long each call takes, as if it asked somebody.
      hangs_below: a call whose first text has fewer words than this never returns.
      unknown_below: a text of fewer words than this has no reward.
    """
    time.sleep(seconds)
    lengths = [
        (len(text.split()), max(1, len(reference.split())))
        for text, reference in zip(completions, completion, strict=True)
    ]
    if lengths[0][0] < hangs_below:
        time.sleep(1e6)
    if log_metric:
        log_metric("words", sum(words for words, _ in lengths) / len(lengths))
    if log_columns:
        log_columns("words", [words for words, _ in lengths])
    return [-abs(words - wanted) / wanted if words >= unknown_below else None for words, wanted in lengths]
