"""The config of `train export`."""

import re
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """`train export`: a Hugging Face directory of a policy or a reward model, or its adapters alone."""

    checkpoint: str  # a run (its newest step) or RUN@STEP; a Hugging Face directory or Hub name works too
    out: str  # a directory that is not there yet, or empty
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the written weights; auto: as they are stored
    max_shard_size: str = "5GB"  # weights above this are split over several files
    adapters: bool = False  # of a run with lora.rank: the adapters alone, as PEFT loads them; false: merged

    def __post_init__(self) -> None:
        _ = self.max_shard_bytes

    @property
    def max_shard_bytes(self) -> int:
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(GB|MB|KB|)", self.max_shard_size.strip(), re.IGNORECASE)
        size = float(match[1]) * {"GB": 1e9, "MB": 1e6, "KB": 1e3, "": 1}[match[2].upper()] if match else 0
        if size < 1:
            raise ValueError(f"max_shard_size: expected a size such as 5GB or 500MB, got {self.max_shard_size!r}")
        return int(size)
