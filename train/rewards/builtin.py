"""Built-in rewards: functions f(prompts, completions, **columns) -> list[float | None], TRL's signature.

Keyword-only parameters are settings and come from `options` in the config; every other name is a column of the data.
None means unscorable. docs/rewards.md has all rewards in one table. Only `rouge` needs more than the standard library.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from train.rewards.words import RougeTokenizer, spaced_words

LENGTH_UNITS: dict[str, Callable[[str], list[str]]] = {"words": spaced_words, "characters": list}
# One block of thoughts at the very beginning, and no other such tag after it.
THINK_PATTERN = r"<think>((?!</?think>).)*</think>((?!</?think>).)*"


def length(
    prompts: Sequence[Any],
    completions: Sequence[str],
    *,
    target: int = 100,
    unit: str = "words",
    ceiling: bool = False,
    **columns: Any,
) -> list[float | None]:
    """Penalizes the distance of a completion's length n from a target.

    r = -|n - target| / target; with `ceiling`, which allows any shorter length, r = -max(0, n - target) / target.

    Args:
      target: the target length; with `ceiling` the greatest length without a penalty.
      unit: "words" (separated by white space; in scripts without it every character, see `train.rewards.words`) or
        "characters".
    """
    _check_option("length", "target", target, 1)
    if unit not in LENGTH_UNITS:
        raise ValueError(f"length: unit: expected one of {', '.join(LENGTH_UNITS)}, got {unit!r}")
    excess = [len(LENGTH_UNITS[unit](text)) - target for text in completions]
    return [-(max(0, n) if ceiling else abs(n)) / target for n in excess]


def format_match(
    prompts: Sequence[Any], completions: Sequence[str], *, pattern: str = THINK_PATTERN, **columns: Any
) -> list[float | None]:
    """Returns 1 for a completion that matches a pattern from its first to its last character, else 0.

    Args:
      pattern: a regular expression of `re` in which "." is any character, line ends too. Default: thoughts between
        <think> and </think>, then the answer, as TRL's think_format_reward requires.
    """
    try:
        form = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"format_match: pattern: not a regular expression ({error}): {pattern!r}") from error
    return [float(form.fullmatch(text) is not None) for text in completions]


def repetition_penalty(
    prompts: Sequence[Any], completions: Sequence[str], *, ngram: int = 3, max_penalty: float = 1.0, **columns: Any
) -> list[float | None]:
    """Penalizes the share of a completion's n-grams that are repetitions.

    r = -(1 - distinct / all) * max_penalty over the n-grams of its lower-cased words; 0 if it has fewer than n words.

    References:
      Yeo et al., Demystifying Long Chain-of-Thought Reasoning in LLMs, https://arxiv.org/abs/2502.03373, appendix C;
      open-r1's repetition penalty is the same with a negative max_penalty.
    """
    _check_option("repetition_penalty", "ngram", ngram, 1)
    _check_option("repetition_penalty", "max_penalty", max_penalty, 0)

    def penalty(text: str) -> float:
        words = spaced_words(text.lower())
        grams = [tuple(words[i : i + ngram]) for i in range(len(words) - ngram + 1)]
        return (len(set(grams)) / len(grams) - 1) * max_penalty if grams else 0.0

    return [penalty(text) for text in completions]


def soft_overlong_punishment(
    prompts: Sequence[Any],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    *,
    max_completion_length: int,
    cache: int,
    **columns: Any,
) -> list[float | None]:
    """Penalizes completions that come near their limit of tokens, or reach it.

    With n tokens, l = max_completion_length and c = cache:
    r = 0 for n <= l - c;  r = (l - c - n) / c for l - c < n <= l;  r = -1 for n > l.

    Args:
      completion_ids: the tokens of each completion, the end-of-text token included.

    References:
      Yu et al., DAPO, https://arxiv.org/abs/2503.14476, equation 13; TRL's get_soft_overlong_punishment.
    """
    if not 0 < cache <= max_completion_length:
        raise ValueError(
            f"soft_overlong_punishment: cache: expected a number of tokens from 1 to max_completion_length = "
            f"{max_completion_length}, got {cache}"
        )
    _check_option("soft_overlong_punishment", "max_completion_length", max_completion_length, 1)
    room = [max_completion_length - cache - len(ids) for ids in completion_ids]
    return [max(-1.0, min(0, n) / cache) for n in room]


def rouge(
    prompts: Sequence[Any],
    completions: Sequence[str],
    *,
    rouge_type: str = "rougeL",
    reference_column: str = "completion",
    **columns: Sequence[str | None],
) -> list[float | None]:
    """Returns ROUGE's F-measure against a reference text: 2 p r / (p + r), of the overlap's precision p and recall r.

    Args:
      rouge_type: rouge1 to rouge9 (n-grams), rougeL (longest common subsequence), or rougeLsum (line by line).
      reference_column: the column with the references; the reward is None where one is missing or has no word.

    References:
      Lin, ROUGE: A Package for Automatic Evaluation of Summaries, https://aclanthology.org/W04-1013, computed by
      the package rouge-score without stemming, on words of any script (`train.rewards.words`).
    """
    from rouge_score.rouge_scorer import RougeScorer

    if not re.fullmatch("rouge([1-9]|L|Lsum)", rouge_type):
        raise ValueError(f"rouge: rouge_type: expected rouge1 to rouge9, rougeL or rougeLsum, got {rouge_type!r}")
    if reference_column not in columns:
        raise ValueError(
            f"rouge: reference_column: there is no column {reference_column!r}; the columns are "
            f"{', '.join(sorted(columns.keys() - {'completion_ids'})) or '(none)'}; name the right one in the "
            f"reward's options"
        )
    tokenizer = RougeTokenizer()
    scorer = RougeScorer([rouge_type], tokenizer=tokenizer)

    def f_measure(reference: str | None, text: str) -> float | None:
        if reference is None:
            return None
        if not isinstance(reference, str):
            raise ValueError(
                f"rouge: reference_column: expected texts in the column {reference_column!r}, got "
                f"{type(reference).__name__} {str(reference)[:80]!r}"
            )
        if not tokenizer.tokenize(reference):
            return None
        # Equal overlaps are to tie: 2 p r / (p + r) of other p and r may differ from an equal one in its last bit.
        return round(scorer.score(target=reference, prediction=text)[rouge_type].fmeasure, 12)

    return [f_measure(*pair) for pair in zip(columns[reference_column], completions, strict=True)]


def _check_option(function: str, option: str, value: float, least: float) -> None:
    if not value >= least:
        raise ValueError(f"{function}: {option}: expected at least {least}, got {value}")
    if value == math.inf:
        raise ValueError(f"{function}: {option}: expected a finite number, got {value}")
