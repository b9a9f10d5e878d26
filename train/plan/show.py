"""`--show`: prints the first rows as the models see them, text and token ids, before any weight is read."""

from collections.abc import Mapping, Sequence

from rich.text import Text

from models.tokenizer import Tokenizer, tokenizer_path
from train.build import make_tokenizer
from train.config import PolicyConfig, RewardModelConfig, SupervisedConfig
from train.console import console, print_plain, visible
from train.data.prompts import load_prompts
from train.data.rows import Row, load_rows
from train.rewards.model import common_prefix_length
from train.running import setup_errors
from train.supervised.reward_model import encode_comparisons
from train.supervised.sft import encode_examples

STAND_IN = "(the completion)"


def show_rows(config: SupervisedConfig | RewardModelConfig | PolicyConfig, count: int) -> None:
    """Prints the first `count` rows of `data.train`, of several sources those of each.

    Raises:
      SetupError: a mistake in the config or the data.
    """
    with setup_errors():
        tokenizer = make_tokenizer(config.model, config.chat)
        ends = ", ".join(f"{i} {tokenizer.token_text(i)}" for i in tokenizer.eos_ids)
        print_plain(f"tokenizer {tokenizer.path}: a sequence ends with {ends}; padding {tokenizer.pad_id}")
        if isinstance(config, PolicyConfig):
            show_policy(config, tokenizer, count)
            return
        for source in config.data.sources:
            rows = load_rows(source.source, str(source.split), source.columns)[:count]
            show_supervised(config, rows, source.source, tokenizer)


def show_supervised(
    config: SupervisedConfig | RewardModelConfig, rows: Sequence[Row], source: str, tokenizer: Tokenizer
) -> None:
    """Prints rows as a reward model compares them, or as `train sft` learns from them."""
    if isinstance(config, RewardModelConfig):
        for i, group in enumerate(encode_comparisons(rows, tokenizer, source, config.chat), 1):
            shared = common_prefix_length(group.rows)
            for answer, score in sorted(zip(group.rows, group.scores, strict=True), key=lambda pair: -pair[1]):
                title = f"row {i}, score {score:g}, margin {group.margin:g}"
                parts = {"the same in all answers": shared, "compared, scored at the last token": len(answer)}
                show_tokens(title, answer, tokenizer, parts)
        return
    for i, (ids, prompt) in enumerate(encode_examples(rows, tokenizer, source, config.chat), 1):
        first = max(prompt, 1)  # no token predicts the first one
        show_tokens(f"row {i}, learned from token {first} on", ids, tokenizer, {"read": first, "learned": len(ids)})


def show_policy(config: PolicyConfig, tokenizer: Tokenizer, count: int) -> None:
    """Prints the first prompts as the policy and as each reward model sees them."""
    prompts, _ = load_prompts(config, tokenizer)
    first = prompts.prompts(prompts.first(count))
    for i, ids in enumerate(tokenizer.prompt_ids(first)):
        show_tokens(f"prompt {i + 1}", ids, tokenizer)
    for spec in config.all_rewards:
        if spec.model is None:
            continue
        reward_tokenizer = Tokenizer(tokenizer_path(spec.model))
        for i, ids in enumerate(reward_tokenizer.conversation_ids(first, [STAND_IN] * len(first))):
            show_tokens(f"prompt {i + 1} with its completion, as reward {spec.label} reads it", ids, reward_tokenizer)


def show_tokens(title: str, ids: Sequence[int], tokenizer: Tokenizer, parts: Mapping[str, int] | None = None) -> None:
    """Prints the text, then every id with its piece.

    Args:
      parts: name -> end of each part, for a line of its own.
    """
    console.rule(Text(visible(f"{title}: {len(ids)} tokens")), align="left")
    print_plain(tokenizer.hf.decode(ids, clean_up_tokenization_spaces=False))
    start = 0
    for name, end in (parts or {"": len(ids)}).items():
        shown = [(i, visible(tokenizer.token_text(i))) for i in ids[start:end]]
        pieces = [Text(str(i), style="dim").append(f" {text}", style="bold") for i, text in shown]
        start = end
        if pieces:
            console.print(Text(f"{name}: " if name else "").append(Text("  ").join(pieces)), highlight=False)
