"""The rows that a run is trained and validated on."""

import dataclasses
import math
import re
from dataclasses import dataclass, field

from train.config.checks import check_at_least

_FILES = re.compile(r"^glob:|\.(jsonl|json|csv|arrow|parquet)(\.gz)?$")  # sources that are files


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """One of several sources of rows to train on."""

    source: str  # a file, glob:PATTERN, or a data set's name on the Hub
    # how often its rows are drawn, relative to the others'; null, of all sources alike: as often as it has rows
    weight: float | None = None
    columns: dict[str, str] | None = None  # instead of data.columns
    split: str | None = None  # of a Hub data set; default: data.split
    name: str | None = None  # in the metrics; default: the last part of source


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    # a file (JSON Lines, a JSON array, CSV, Arrow, parquet), glob:PATTERN, or a data set's name on the Hub; a resumed
    # run keeps its first rows. Or several, as [{source: a.jsonl, weight: 2}, {source: b.jsonl, weight: 1}]
    train: str | list[DataSource]
    validation: str | None = None  # like train: rows to validate on; default: validation_rows, or none
    test: str | None = None  # of a policy: only compared with train, so that prompts in both are known
    split: str = "train"  # of a Hub data set: the split of train
    validation_split: str = "validation"  # of a Hub data set: the split of validation
    test_split: str = "test"  # of a Hub data set: the split of test
    validation_rows: int = 0  # without validation: so many rows of train are held out to validate on
    split_seed: int = 0  # which rows are held out, and which are sampled of more than validation.prompts
    prompt_column: str = "prompt"  # text, or a list of chat messages; where the prompt alone has another name
    columns: dict[str, str] = field(default_factory=dict)  # our name -> theirs, e.g. {prompt: question}
    drop_duplicates: bool = False  # of a policy: do not train on prompts that are in validation or test
    held_out: dict[str, str] = field(default_factory=dict)  # of sft, reward: more validation sets, name -> source

    def __post_init__(self) -> None:
        check_at_least(self, 0, "validation_rows", "split_seed")
        if self.validation is not None and self.validation_rows:
            raise ValueError("data: expected validation (data of its own) or validation_rows (cut off train), not both")
        if self.prompt_column != "prompt" and "prompt" in (self.columns or {}):
            raise ValueError("data: expected prompt_column or columns.prompt, not both")
        if not isinstance(self.train, str):
            _check_sources(self.train, self.prompt_column)

    @property
    def sources(self) -> list[DataSource]:
        """The sources to train on, with their columns and splits, and names that differ."""
        given = [DataSource(source=self.train)] if isinstance(self.train, str) else self.train
        names = [source.name or _last_part(source.source) for source in given]
        numbered = [f"{name}_{i}" if names.count(name) > 1 else name for i, name in enumerate(names, 1)]
        return [
            dataclasses.replace(
                source,
                columns=(self.columns or {}) if source.columns is None else source.columns,
                split=source.split or self.split,
                name=source.name or name,
            )
            for source, name in zip(given, numbered, strict=True)
        ]

    @property
    def weights(self) -> list[float] | None:
        """The weights of the sources to train on; None: they have none."""
        weights = [source.weight for source in self.sources if source.weight is not None]
        return weights or None

    @property
    def train_text(self) -> str:
        """The sources to train on, for a message."""
        return self.train if isinstance(self.train, str) else ", ".join(source.source for source in self.train)


def _last_part(source: str) -> str:
    """Returns a source's last part without ending and pattern: data of glob:data/*.jsonl, tldr of trl-lib/tldr."""
    parts = [re.sub(r"[^\w-]+", "_", part.split(".")[0]).strip("_") for part in re.split(r"[/:]", source)]
    return next((part for part in reversed(parts) if part), "source")


def _check_sources(sources: list[DataSource], prompt_column: str) -> None:
    if not sources:
        raise ValueError("data.train: expected at least one source, got none")
    for i, source in enumerate(sources):
        if source.weight is not None and not 0 < source.weight < math.inf:
            raise ValueError(
                f"data.train[{i}].weight: expected a finite number above 0, got {source.weight}; leave out a source "
                f"that is not to be drawn"
            )
        if source.name is not None and not re.fullmatch(r"[\w.-]+", source.name):
            raise ValueError(
                f"data.train[{i}].name: expected letters, digits and any of _ . - (it stands in the metrics' names), "
                f"got {source.name!r}"
            )
        if source.split is not None and (is_file := _FILES.search(source.source)):
            raise ValueError(
                f"data.train[{i}].split: is of a data set on the Hub or a directory; {is_file.string} has no splits: "
                f"leave it out"
            )
        if prompt_column != "prompt" and "prompt" in (source.columns or {}):
            raise ValueError(f"data: expected prompt_column or data.train[{i}].columns.prompt, not both")
    without = [source.source for source in sources if source.weight is None]
    if 0 < len(without) < len(sources):
        raise ValueError(
            f"data.train: expected a weight of every source, or of none (then all rows are drawn equally often), got "
            f"none of {', '.join(without)}"
        )
    names = [source.name for source in sources if source.name]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"data.train: the sources' names must differ, got {twice!r} twice")
