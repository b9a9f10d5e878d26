"""How arrays are split over devices, and which programs run there."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    data: int = -1  # devices over which prompts are split; -1: all that are left
    fsdp: int = 1  # devices over which parameters are split, and prompts too
    tensor: int = 1  # devices over which attention heads, the MLP and the vocabulary are split
    rules: dict[str, list[str]] = field(default_factory=dict)  # overrides of models.sharding.RULES
    sampling_copy: bool = True  # sample from whole weights in model.dtype; false: gather each layer for every token
    # how sampling runs the layers: scanned (as CPUs want it), unrolled, kernels (unrolled, attention by kernels for
    # GPUs or TPUs); auto: kernels where the heads allow it, else unrolled; on CPUs and without a sampling copy scanned
    decoding: Literal["auto", "scanned", "unrolled", "kernels"] = "auto"
    # attention of whole rows, where prompts are computed, completions scored and gradients taken: xla, or kernels that
    # keep no scores in memory, for GPUs and TPUs; auto: kernels where they can, see docs/speed.md
    attention: Literal["auto", "xla", "kernels"] = "auto"

    def __post_init__(self) -> None:
        if self.decoding in ("unrolled", "kernels") and not self.sampling_copy:
            raise ValueError(f"mesh.decoding: {self.decoding} needs a copy; expected mesh.sampling_copy: true with it")
