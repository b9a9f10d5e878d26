"""Prepares the demo's data from the review sentences: `python data/reviews/prepare.py runs/demo`.

Duplicate sentences are dropped; the others are split:

    held out  700   prompts, their first three words: 500 to train on, 200 to validate on
    half A   ~1,140  supervised training, and pairs for the reward model that the policy is trained against
    half B   ~1,140  supervised training, and pairs for the judge, which no policy is trained against

A pair is a positive sentence (chosen) and a negative one (rejected) of the same half. The reward models' accuracy is
measured on pairs of held-out sentences. A tokenizer (byte-level BPE) is trained on the two halves.
"""

import gzip
import json
import sys
from pathlib import Path

import numpy as np

from models.tokenizer import train_bpe
from train.run.files import write_jsonl

SOURCE = Path(__file__).with_name("sentiment_labelled_sentences.jsonl.gz")
HELD_OUT, VALIDATION_PROMPTS, PROMPT_WORDS, VOCABULARY = 700, 200, 3, 2048
Sentence = dict[str, str | int]


def main(directory: Path) -> None:
    if (directory / "tokenizer" / "tokenizer.json").is_file():
        print(f"{directory}: data and tokenizer are there")
        return
    with gzip.open(SOURCE, "rt", encoding="utf-8") as lines:
        sentences = list({row["text"]: row for row in map(json.loads, lines)}.values())
    rng = np.random.default_rng(0)
    order = rng.permutation(len(sentences))
    shuffled = [sentences[i] for i in order]
    # a prompt of three words leaves at least two words of the sentence
    long = [s for s in shuffled if len(s["text"].split()) >= PROMPT_WORDS + 2]
    held_out = long[:HELD_OUT]
    held_out_texts = {s["text"] for s in held_out}
    rest = [s for s in shuffled if s["text"] not in held_out_texts]
    half_a, half_b = rest[: len(rest) // 2], rest[len(rest) // 2 :]

    prompts = [{"prompt": " ".join(s["text"].split()[:PROMPT_WORDS])} for s in held_out]
    tables = {
        "sft_train": [{"text": s["text"]} for s in rest],
        "sft_validation": [{"text": s["text"]} for s in held_out],
        "reward_train": pairs(half_a, 8, rng),
        "judge_train": pairs(half_b, 8, rng),
        "pairs_validation": pairs(held_out, 2, rng),
        "prompts_train": prompts[VALIDATION_PROMPTS:],
        "prompts_validation": prompts[:VALIDATION_PROMPTS],
    }
    for name, rows in tables.items():
        write_jsonl(directory / "data" / f"{name}.jsonl", rows)
    train_bpe([s["text"] for s in rest], directory / "tokenizer", VOCABULARY)
    counts = ", ".join(f"{name} {len(rows)}" for name, rows in tables.items())
    print(f"{directory}: {len(sentences)} sentences -> {counts}; tokenizer of {VOCABULARY} tokens")


def pairs(sentences: list[Sentence], partners: int, rng: np.random.Generator) -> list[Sentence]:
    """Returns pairs of each positive sentence (chosen) with `partners` random negative ones (rejected)."""
    positive = [s["text"] for s in sentences if s["label"] == 1]
    negative = [s["text"] for s in sentences if s["label"] == 0]
    return [
        {"chosen": chosen, "rejected": negative[i]}
        for chosen in positive
        for i in rng.choice(len(negative), partners, replace=False)
    ]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python data/reviews/prepare.py DIRECTORY")
    main(Path(sys.argv[1]))
