"""A reward model as the judge: it scores each answer alone, and the higher score wins."""

from collections.abc import Sequence

from eval.judges.pairs import CompletionPair, Judgement
from eval.texts.score import score_rows
from models.sharding import Layout
from train.rewards.model import RewardModelScorer


class RewardModelJudge:
    """Judges with a run of `train reward`, RUN@STEP, a Hugging Face directory or Hub name."""

    def __init__(self, path: str, *, layout: Layout, dtype: str, max_length: int, batch_prompts: int) -> None:
        self.scorer = RewardModelScorer(
            path, layout=layout, dtype=dtype, max_length=max_length, batch_prompts=batch_prompts
        )

    def judge(self, pairs: Sequence[CompletionPair]) -> list[Judgement]:
        """Scores each distinct text of a prompt once, in sorted order: equal texts tie, swapping A and B mirrors."""
        texts: dict[object, set[str]] = {}
        prompts = {pair.key.prompt_id: pair.prompt for pair in pairs}
        for pair in pairs:
            texts.setdefault(pair.key.prompt_id, set()).update((pair.a, pair.b))
        keys = [(prompt_id, text) for prompt_id, completions in texts.items() for text in sorted(completions)]
        rows = [{"prompt": prompts[prompt_id], "completion": text} for prompt_id, text in keys]
        groups: dict[object, list[int]] = {}
        for i, (prompt_id, _) in enumerate(keys):
            groups.setdefault(prompt_id, []).append(i)
        scores = dict(zip(keys, score_rows(self.scorer, rows, list(groups.values())), strict=True))
        pair_scores = [tuple(scores[pair.key.prompt_id, text] for text in (pair.a, pair.b)) for pair in pairs]
        return [Judgement(scores=(a, b), kind="too_long" if None in (a, b) else None) for a, b in pair_scores]
