"""Times transformers' generate and a training step in torch, on the work of `eval.speed.timed_programs`.

    python -m eval.speed.torch_step WORK.json FIGURES.json

WORK.json has `network` (a config.json of transformers), `platform` (gpu or cpu), `prompts`, `generations`, `prompt` and
`completion` (tokens of each), `microbatch_prompts`, `dtype`, `beta` and `repeats`. Weights are random. A training step
is what trainers in torch do: each completion is a row with its prompt in front, layers are recomputed in the backward
pass, the loss is GRPO's with a reference policy, and AdamW makes one update. FIGURES.json is written anew after each of
the two.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from eval.speed.timing import END_ID, median_seconds, process_peak_bytes, write_figures


def time_torch(work: dict[str, Any], report: Callable[[dict[str, float]], None]) -> dict[str, float]:
    """Returns median seconds and peak bytes of generating and of training."""
    device = {"gpu": "cuda", "cpu": "cpu"}[work["platform"]]
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} finds no GPU")
    torch.manual_seed(0)
    policy, reference = (make_policy(work["network"], work["dtype"], device) for _ in range(2))
    reference.load_state_dict(policy.state_dict())
    reference.requires_grad_(False)
    S, T, G = work["prompt"], work["completion"], work["generations"]
    prompts_PS = torch.randint(END_ID + 1, policy.config.vocab_size, (work["prompts"], S), device=device)
    prompts_BS = prompts_PS.repeat_interleave(G, 0)
    policy.eval()

    seconds, tokens_BU = median_seconds(lambda: generate_tokens(policy, prompts_BS, T), work["repeats"], synchronize)
    figures = {"sample_s": seconds, "sample_peak_bytes": torch_peak_bytes()}
    report(figures)

    policy.train()
    recompute_layers(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, weight_decay=0.0)
    advantages_B = torch.randn(len(tokens_BU), device=device)
    rows = work["microbatch_prompts"] * G
    step = lambda: training_step(policy, reference, optimizer, tokens_BU, advantages_B, T, rows, work["beta"])  # noqa: E731
    figures |= {
        "update_s": median_seconds(step, work["repeats"], synchronize)[0],
        "step_peak_bytes": torch_peak_bytes(),
    }
    report(figures)
    return figures


def make_policy(network: dict[str, Any], dtype: str, device: str) -> Any:
    """Returns a causal language model with random weights."""
    settings = {name: value for name, value in network.items() if name not in ("model_type", "architectures")}
    config = AutoConfig.for_model(network["model_type"], **settings)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation="sdpa")


def recompute_layers(policy: Any) -> None:
    """Keeps only what enters each layer for the backward pass; the method's name is of transformers' version."""
    (getattr(policy, "activation_checkpointing_enable", None) or policy.gradient_checkpointing_enable)()


def generate_tokens(policy: Any, prompts_BS: Any, T: int) -> Any:
    """Returns prompts_BS with T sampled tokens behind each, [B, S + T]."""
    return policy.generate(
        prompts_BS,
        attention_mask=torch.ones_like(prompts_BS),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_new_tokens=T,
        max_new_tokens=T,
        eos_token_id=END_ID,
        pad_token_id=0,
    )


def training_step(
    policy: Any, reference: Any, optimizer: Any, tokens_BU: Any, advantages_B: Any, T: int, rows: int, beta: float
) -> None:
    """Sums the gradients of micro-batches of `rows` rows, clips their norm, and makes one update of AdamW."""
    for tokens, advantages in zip(tokens_BU.split(rows), advantages_B.split(rows), strict=True):
        logprobs = last_logprobs(policy, tokens, T)
        with torch.no_grad():
            ref_logprobs = last_logprobs(reference, tokens, T)
        ratio = torch.exp(logprobs - logprobs.detach())
        clipped = ratio.clamp(0.8, 1.2)
        surrogate = torch.minimum(ratio * advantages[:, None], clipped * advantages[:, None])
        kl = torch.exp(ref_logprobs - logprobs) - (ref_logprobs - logprobs) - 1
        ((beta * kl - surrogate).sum() / (len(tokens_BU) * T)).backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def last_logprobs(policy: Any, tokens_BU: Any, T: int) -> Any:
    """Returns the float32 log-probabilities of the last T tokens of each row, [B, T]."""
    logits_BTV = policy(tokens_BU, use_cache=False, logits_to_keep=T + 1).logits[:, :-1]
    targets_BT = tokens_BU[:, -T:]
    # row by row: float32 logits of all rows at once would be several GiB
    return torch.stack(
        [-functional.cross_entropy(x.float(), y, reduction="none") for x, y in zip(logits_BTV, targets_BT, strict=True)]
    )


def synchronize(_: Any = None) -> None:
    """Returns when the GPU, if there is one, has done all its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def torch_peak_bytes() -> float:
    """Returns the most bytes of the GPU's memory that tensors took, and forgets them; without a GPU the process's."""
    if not torch.cuda.is_available():
        return process_peak_bytes()
    peak = float(torch.cuda.max_memory_allocated())
    torch.cuda.reset_peak_memory_stats()
    return peak


def main(work_file: str, figures_file: str) -> None:
    """Runs `time_torch` on the work in a file."""
    time_torch(json.loads(Path(work_file).read_text()), partial(write_figures, figures_file))


if __name__ == "__main__":
    main(*sys.argv[1:])
