"""The network that a run trains, and how its prompts are rendered."""

from dataclasses import dataclass
from typing import Literal

from models.config import Qwen3Config
from models.tokenizer import tokenizer_path


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    # where the weights start: a run, RUN@STEP, a Hugging Face directory or Hub name; kept when the run goes on
    path: str | None = None
    architecture: Qwen3Config | None = None  # instead of path: this network with random weights
    tokenizer: str | None = None  # a tokenizer directory or Hub name; default: the one that belongs to path
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; products of float32 are not TF32
    param_dtype: Literal["float32", "bfloat16"] = "float32"  # of the parameters and the optimizer state
    # the backward pass recomputes: nothing; all but matmuls; whole layers
    remat: Literal["none", "dots", "full"] = "full"

    def __post_init__(self) -> None:
        if (self.path is None) == (self.architecture is None):
            raise ValueError("model: expected either path (pretrained) or architecture (random weights), not both")
        if self.path is None and self.tokenizer is None:
            raise ValueError("model.tokenizer: needed with model.architecture; give a tokenizer directory")

    @property
    def tokenizer_path(self) -> str:
        return self.tokenizer or tokenizer_path(str(self.path))


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """How prompts are rendered for the policy; a reward model reads the same messages by its own template."""

    system_prompt: str | None = None  # before the messages; null: none at all, which is not ""
    text_as_chat: bool = False  # a prompt that is plain text becomes a user's message
    enable_thinking: bool = False  # passed to the chat template
    # of a policy: a prompt whose messages end with the assistant's is the beginning of the answer, which goes on in the
    # same turn; false: it is asked without that message
    continue_final_message: bool = False
