"""Loss and gradient equal TRL's, on the same log-probabilities, for every variant that both have.

TRL's own `GRPOTrainer._compute_loss` runs on log-probabilities that are handed to it. Where torch and TRL are there
(`make parity`) it is called; elsewhere its numbers are read from tests/data/trl_losses.npz, which
`python tests/gopo_jax/test_trl.py` wrote with TRL 1.16.0 and torch 2.13.0.
"""

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from gopo_jax import policy_loss

GOLDENS = Path(__file__).parents[1] / "data" / "trl_losses.npz"
P, G, T, LONGEST = 3, 4, 6, 9
GRPO = {"aggregate": "sequence"}
# name: what TRL is told, what policy_loss is told
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({"loss_type": "grpo"}, GRPO),
    "bnpo": ({"loss_type": "bnpo"}, {"aggregate": "token_per_microbatch"}),
    "dr_grpo": ({"loss_type": "dr_grpo"}, {"aggregate": "constant", "max_length": LONGEST}),
    "dapo": ({"loss_type": "dapo", "epsilon_high": 0.28}, {"aggregate": "token", "clip_high": 0.28}),
    "gspo": ({"loss_type": "grpo", "importance_sampling_level": "sequence"}, GRPO | {"ratio": "sequence"}),
    "cispo": (
        {"loss_type": "cispo", "epsilon_high": 1.5},
        {"aggregate": "token", "surrogate": "cispo", "surrogate_options": {"clip_max": 1.5}},
    ),
    "sapo": ({"loss_type": "sapo"}, GRPO | {"surrogate": "sapo"}),
    "dual_clip": ({"loss_type": "grpo", "delta": 1.6}, GRPO | {"surrogate_options": {"dual_clip": 1.6}}),
    "grpo_k3": ({"loss_type": "grpo", "beta": 0.1}, GRPO | {"kl": "k3", "beta": 0.1}),
    "dapo_k3": ({"loss_type": "dapo", "beta": 0.1}, {"aggregate": "token", "kl": "k3", "beta": 0.1}),
    "gspo_k3": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.1},
        GRPO | {"ratio": "sequence", "kl": "k3", "beta": 0.1},
    ),
    "weights": ({"loss_type": "dapo", "correction": True, "beta": 0.1}, {"weights": True, "kl": "k3", "beta": 0.1}),
}


def batch() -> dict[str, np.ndarray]:
    """Off-policy by enough for every clip to be active; each completion has at least one token."""
    rng = np.random.default_rng(0)
    logprobs = rng.uniform(-3, -0.1, (P, G, T)).astype(np.float32)
    near = lambda spread: (logprobs + spread * rng.normal(size=logprobs.shape)).astype(np.float32)  # noqa: E731
    return {
        "logprobs": logprobs,
        "old_logprobs": near(0.5),
        "ref_logprobs": near(0.3),
        "weights": rng.uniform(0.5, 2, logprobs.shape).astype(np.float32),
        "advantages": rng.normal(size=(P, G)).astype(np.float32),
        "mask": np.arange(T) < rng.integers(1, T + 1, (P, G))[..., None],
    }


def by_trl(settings: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Loss and gradient of TRL's trainer, of which all is left out but the loss."""
    import torch
    from trl import GRPOTrainer

    data = {name: torch.tensor(array.reshape(P * G, *array.shape[2:])) for name, array in batch().items()}
    logprobs = data["logprobs"].requires_grad_()
    correction, beta = settings.get("correction", False), settings.get("beta", 0.0)
    args = SimpleNamespace(
        delta=settings.get("delta"),
        use_bias_correction_kl=False,
        sapo_temperature_pos=1.0,
        sapo_temperature_neg=1.05,
        steps_per_generation=1,
    )
    alone = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=True)
    alone.gather_for_metrics = alone.gather
    trainer = SimpleNamespace(
        args=args,
        accelerator=alone,
        model=SimpleNamespace(training=True),
        loss_type=settings["loss_type"],
        importance_sampling_level=settings.get("importance_sampling_level", "token"),
        epsilon_low=0.2,
        epsilon_high=settings.get("epsilon_high", 0.2),
        beta=beta,
        max_completion_length=LONGEST,
        current_gradient_accumulation_steps=1,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=correction,
        vllm_importance_sampling_correction=correction,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
    )
    mask, nothing = data["mask"].float(), torch.zeros(P * G, 1, dtype=torch.long)
    inputs = {
        "prompt_ids": nothing,
        "prompt_mask": nothing,
        "completion_ids": torch.zeros(P * G, T, dtype=torch.long),
        "completion_mask": mask,
        "advantages": data["advantages"],
        "old_per_token_logps": data["old_logprobs"],
        "ref_per_token_logps": data["ref_logprobs"],
        "importance_sampling_ratio": data["weights"],
        "num_items_in_batch": mask.sum(),
    }
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    return loss.detach().numpy(), logprobs.grad.numpy().reshape(P, G, T)


def by_us(settings: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    left_out = {"ref_logprobs"} - ({"ref_logprobs"} if settings.get("kl") else set())
    left_out |= set() if settings.get("weights") else {"weights"}
    data = {name: jax.numpy.asarray(array) for name, array in batch().items() if name not in left_out}
    options = {name: value for name, value in settings.items() if name != "weights"}
    return jax.value_and_grad(lambda x: policy_loss(**(data | {"logprobs": x}), **options)[0])(data["logprobs"])


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_what_trl_wrote(name: str) -> None:
    goldens = np.load(GOLDENS)
    loss, gradient = by_us(VARIANTS[name][1])
    np.testing.assert_allclose(loss, goldens[f"{name}_loss"], atol=1e-5)
    np.testing.assert_allclose(gradient, goldens[f"{name}_gradient"], atol=1e-5)
    others = [goldens[f"{other}_gradient"] for other in VARIANTS if other != name]
    assert all(np.abs(gradient - other).max() > 1e-4 for other in others)  # the variants do differ here


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", VARIANTS)
def test_equals_trl(name: str) -> None:
    pytest.importorskip("trl")
    theirs, ours = by_trl(VARIANTS[name][0]), by_us(VARIANTS[name][1])
    np.testing.assert_allclose(ours[0], theirs[0], atol=1e-5)
    np.testing.assert_allclose(ours[1], theirs[1], atol=1e-5)
    np.testing.assert_allclose(np.load(GOLDENS)[f"{name}_gradient"], theirs[1], atol=1e-6)


if __name__ == "__main__":
    found = {name: by_trl(settings) for name, (settings, _) in VARIANTS.items()}
    arrays = {f"{name}_loss": loss for name, (loss, _) in found.items()}
    np.savez_compressed(GOLDENS, **arrays, **{f"{name}_gradient": gradient for name, (_, gradient) in found.items()})
