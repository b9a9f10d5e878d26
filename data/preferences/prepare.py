"""Prepares comparisons and tokenizers from the shipped data: `python data/preferences/prepare.py runs/preferences`.

    hh     pairs: human choices between two answers to a question, unchanged
    tldr   groups of four summaries of a post: the writer's own (score 1) and those of three other posts of the same
           split (score 0)

The splits are those of the files. Tokenizers (byte-level BPE) are trained on the train splits alone.
"""

import gzip
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

from models.tokenizer import train_bpe
from train.data.rows import load_rows
from train.run.files import write_jsonl

HERE = Path(__file__).parent
SPLITS = {"train": "train", "val": "validation", "test": "test"}  # name in the files -> name of the run's file
VOCABULARY, OTHERS = 2048, 3
Row = dict[str, Any]


def main(directory: Path, tldr: Path) -> None:
    hh = read_gzip(HERE / "hh_helpful_mini.jsonl.gz")
    for split, name in SPLITS.items():
        rows = [
            {"prompt": f"{row['prompt']}\n\n", "chosen": row["chosen"], "rejected": row["rejected"]}
            for row in hh
            if row["split"] == split
        ]
        write_jsonl(directory / "hh" / f"{name}.jsonl", rows)
    train = [row for row in hh if row["split"] == "train"]
    train_bpe(
        [text for row in train for text in (row["prompt"], row["chosen"], row["rejected"])],
        directory / "hh" / "tokenizer",
        VOCABULARY,
    )
    posts = read_gzip(tldr)
    rng = np.random.default_rng(0)
    for split, name in SPLITS.items():
        split_posts = [row for row in posts if row["split"] == split]
        write_jsonl(directory / "tldr" / f"{name}.jsonl", summary_groups(split_posts, OTHERS, rng))
    train = [row for row in posts if row["split"] == "train"]
    train_bpe(
        [text for row in train for text in (row["post"], row["reference"])],
        directory / "tldr" / "tokenizer",
        VOCABULARY,
    )
    test = load_rows(str(directory / "tldr" / "test.jsonl"))
    print(f"{directory}: {len(hh)} pairs of hh, {len(posts)} posts of tldr; of the {len(test)} of the test split")
    print(f"the summary that shares most words with its post is the right one for {word_overlap_accuracy(test):.1%}")


def summary_groups(posts: list[Row], others: int, rng: np.random.Generator) -> list[Row]:
    """Returns a group for each post: its own summary, and `others` summaries of other posts."""
    rows = []
    for i, post in enumerate(posts):
        drawn = rng.choice(len(posts) - 1, others, replace=False)
        completions = [post["reference"], *(posts[j + (j >= i)]["reference"] for j in drawn)]
        prompt = f"{post['post']}\n\nTL;DR: "
        rows.append({"prompt": prompt, "completions": completions, "scores": [1, *[0] * others]})
    return rows


def word_overlap_accuracy(rows: list[Row]) -> float:
    """Returns the accuracy of choosing the summary with the largest share of words that are in the post.

    The first summary is the right one. Where k summaries tie, each is chosen with probability 1 / k. This is a baseline
    without a model.
    """

    def words(text: str) -> set[str]:
        return set(re.findall(r"[a-z']+", text.lower()))

    shares = [[len(words(c) & words(row["prompt"])) / len(words(c)) for c in row["completions"]] for row in rows]
    return float(np.mean([(share[0] == max(share)) / share.count(max(share)) for share in shares]))


def read_gzip(file: Path) -> list[Row]:
    """Reads a gzipped JSONL file."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python data/preferences/prepare.py DIRECTORY [TLDR.jsonl.gz]")
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) == 3 else HERE / "tldr_short.jsonl.gz")
