"""Laws of the losses. Every expected value is a formula, or a plain loop over completions and tokens."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gopo_jax import add_metrics, kl_penalty, listwise_loss, loss_count, policy_loss, preference_loss

P, G, T = 4, 3, 6
Data = dict[str, np.ndarray]
every_ratio = pytest.mark.parametrize("ratio", ["token", "sequence", "trajectory"])
every_aggregate = pytest.mark.parametrize("aggregate", ["token", "sequence", "constant", "token_per_microbatch"])
PENALTY = {"kl": "k3", "beta": 0.1}


def batch(*, spread: float = 0.3, seed: int = 0) -> Data:
    """An off-policy batch of P x G completions of 0 to T tokens; `spread` is how far the policies lie apart."""
    rng = np.random.default_rng(seed)
    logprobs = rng.uniform(-3, -0.1, (P, G, T)).astype(np.float32)
    lengths = rng.integers(1, T + 1, (P, G))
    lengths[0, 0], lengths[1, 2] = 0, T
    return {
        "logprobs": logprobs,
        "old_logprobs": (logprobs + spread * rng.normal(size=logprobs.shape)).astype(np.float32),
        "ref_logprobs": (logprobs + spread * rng.normal(size=logprobs.shape)).astype(np.float32),
        "advantages": rng.normal(size=(P, G)).astype(np.float32),
        "mask": np.arange(T) < lengths[..., None],
    }


def loss_of(data: Data, **options: Any) -> tuple[jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
    """policy_loss of a batch; the reference is handed over only when a KL penalty is asked for."""
    arrays = {name: jnp.asarray(array) for name, array in data.items() if name != "ref_logprobs" or options.get("kl")}
    return policy_loss(**arrays, **options)


@functools.cache
def compiled(**options: Any) -> Callable[[Data], Any]:
    def loss(logprobs: jax.Array, data: Data) -> Any:
        return loss_of(data | {"logprobs": logprobs}, **options)

    both = jax.value_and_grad(loss, has_aux=True)
    return jax.jit(lambda data: both(data["logprobs"], data))


def loss_and_gradient(data: Data, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    (loss, _), gradient = compiled(**options)(data)
    return np.asarray(loss), np.asarray(gradient)


def loss_by_loop(
    data: Data, ratio: str, aggregate: str, kl: str | None, beta: float, clip_low: float, clip_high: float
) -> tuple[float, dict[str, tuple[float, float]]]:
    names = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "ratio", "kl")
    sums, total, completions, tokens = dict.fromkeys(names, 0.0), 0.0, 0, int(data["mask"].sum())
    shares: dict[str, list[float]] = {"low": [], "high": []}  # of each completion's tokens, clipped
    for index in np.ndindex(P, G):
        length = int(data["mask"][index].sum())
        completions += length > 0
        clipped = {"low": 0.0, "high": 0.0}
        new, old, ref = (data[f"{name}logprobs"][index][:length].astype(float) for name in ("", "old_", "ref_"))
        advantage = float(data["advantages"][index])
        for t in range(length):
            weight = np.exp({"token": new[t] - old[t], "sequence": (new - old).mean()}.get(ratio, (new - old).sum()))
            surrogate = min(weight * advantage, min(max(weight, 1 - clip_low), 1 + clip_high) * advantage)
            d = new[t] - ref[t]
            penalty = {None: 0.0, "k1": d, "k2": d**2 / 2, "k3": np.exp(-d) - 1 + d}[kl]
            total += (-surrogate + beta * penalty) / (length if aggregate == "sequence" else 1)
            low = weight < 1 - clip_low and advantage < 0
            high = weight > 1 + clip_high and advantage > 0
            for name, value in zip(names, (low, high, low or high, weight, penalty), strict=True):
                sums[name] += float(value)
            clipped["low"] += low
            clipped["high"] += high
        for side in clipped if length else ():
            shares[side].append(clipped[side] / length)
    if kl is None:
        del sums["kl"]
    count = {"sequence": completions, "constant": completions * T}.get(aggregate, tokens)
    extremes = {"clip_ratio/low_min": (min(shares["low"]), 1), "clip_ratio/high_max": (max(shares["high"]), 1)}
    return total / count, {name: (value, tokens) for name, value in sums.items()} | extremes


# The policy loss and its metrics


@every_ratio
@every_aggregate
@pytest.mark.parametrize("kl", [None, "k1", "k2", "k3"])
def test_policy_loss_is_the_loop(ratio: str, aggregate: str, kl: str | None) -> None:
    options = {"ratio": ratio, "aggregate": aggregate, "kl": kl, "beta": 0.3 if kl else 0.0}
    options |= {"clip_low": 0.1, "clip_high": 0.15}
    data = batch(spread=0.8)
    loss, metrics = loss_of(data, **options)
    expected_loss, expected_metrics = loss_by_loop(data, **options)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    assert metrics.keys() == expected_metrics.keys()
    for name, pair in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], pair, rtol=1e-5, err_msg=name)
    assert min(expected_metrics[f"clip_ratio/{side}_mean"][0] for side in ("low", "high")) > 0, (
        "the clip must be active"
    )


@every_ratio
def test_compiled_is_eager(ratio: str) -> None:
    options = {"ratio": ratio, "aggregate": "sequence"} | PENALTY
    pair, _ = compiled(**options)(batch())
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), pair, loss_of(batch(), **options))


@every_ratio
def test_on_policy_the_loss_is_minus_the_mean_advantage(ratio: str) -> None:
    data = batch(spread=0.0)
    lengths, advantages = data["mask"].sum(-1), data["advantages"]
    completions = (lengths > 0).sum()
    expected = {
        "token": -(advantages * lengths).sum() / lengths.sum(),
        "token_per_microbatch": -(advantages * lengths).sum() / lengths.sum(),
        "sequence": -advantages[lengths > 0].sum() / completions,
        "constant": -(advantages * lengths).sum() / (completions * T),
    }
    for aggregate, value in expected.items():
        np.testing.assert_allclose(loss_of(data, ratio=ratio, aggregate=aggregate)[0], value, rtol=1e-5)


def test_on_policy_the_gradient_is_reinforce_and_the_clip_is_inert() -> None:
    data = batch(spread=0.0)
    expected = -data["advantages"][..., None] * data["mask"] / data["mask"].sum()
    for options in ({}, {"clip_low": 1e-3, "clip_high": 1e-3}):
        np.testing.assert_allclose(loss_and_gradient(data, **options)[1], expected, atol=1e-7)


def test_no_gradient_where_the_clip_is_active() -> None:
    data = batch()
    weight, advantages = np.exp(data["logprobs"] - data["old_logprobs"]), data["advantages"][..., None]
    clipped = ((weight > 1.2) & (advantages > 0)) | ((weight < 0.8) & (advantages < 0))
    assert (clipped & data["mask"]).any()
    np.testing.assert_array_equal(loss_and_gradient(data)[1] != 0, data["mask"] & ~clipped)


def test_only_the_trained_policy_gets_a_gradient() -> None:
    data = batch()

    def loss(others: Data) -> jax.Array:
        return loss_of(data | others, **PENALTY)[0]

    gradients = jax.jit(jax.grad(loss))({name: data[name] for name in ("old_logprobs", "ref_logprobs", "advantages")})
    assert not any(array.any() for array in gradients.values())


def test_advantages_may_be_given_per_token() -> None:
    data = batch(spread=0.0)
    per_token = np.repeat(data["advantages"][..., None], T, -1)
    np.testing.assert_array_equal(loss_of(data | {"advantages": per_token})[0], loss_of(data)[0])
    decayed = per_token / np.sqrt(np.arange(1, T + 1))
    expected = -(decayed * data["mask"]).sum() / data["mask"].sum()
    np.testing.assert_allclose(loss_of(data | {"advantages": decayed})[0], expected, rtol=1e-5)


# Masks, padding, micro-batches


def soiled(data: Data, garbage: float) -> Data:
    """The batch with garbage wherever the mask is off, and for the advantage of a completion without tokens."""
    dirty = {name: np.where(data["mask"], data[name], garbage) for name in data if name.endswith("logprobs")}
    return data | dirty | {"advantages": np.where(data["mask"].any(-1), data["advantages"], garbage)}


@every_ratio
@every_aggregate
def test_masked_is_deleted_whatever_stands_there(ratio: str, aggregate: str) -> None:
    data, options = batch(), {"ratio": ratio, "aggregate": aggregate} | PENALTY
    loss, gradient = loss_and_gradient(data, **options)
    np.testing.assert_array_equal(gradient[~data["mask"]], 0)
    for garbage in (np.nan, np.inf, -np.inf, 1e4):
        dirty_loss, dirty_gradient = loss_and_gradient(soiled(data, garbage), **options)
        np.testing.assert_array_equal(dirty_loss, loss)
        np.testing.assert_array_equal(dirty_gradient, gradient)


@every_ratio
def test_masked_is_deleted_also_without_the_compiler(ratio: str) -> None:
    """XLA turns `NaN * mask` into a selection, which would hide a missing one."""
    dirty = soiled(batch(), np.nan)
    loss = functools.partial(loss_of, ratio=ratio, aggregate="sequence", **PENALTY)
    gradient = jax.grad(lambda logprobs: loss(dirty | {"logprobs": logprobs})[0])(jnp.asarray(dirty["logprobs"]))
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(loss(dirty)[0], loss(batch())[0], rtol=1e-6)


@every_aggregate
def test_padding_and_empty_completions_change_nothing(aggregate: str) -> None:
    data, options = batch(), {"ratio": "sequence", "aggregate": aggregate} | PENALTY
    margins = {"advantages": ((0, 0), (0, 2))}
    padded = {name: np.pad(data[name], margins.get(name, ((0, 0), (0, 2), (0, 5)))) for name in data}
    expected = loss_and_gradient(data, **options)[0]
    np.testing.assert_allclose(loss_of(padded, **options, max_length=T)[0], expected, rtol=1e-6)


@every_ratio
@every_aggregate
def test_a_batch_without_tokens_gives_zero(ratio: str, aggregate: str) -> None:
    data = batch() | {"mask": np.zeros((P, G, T), bool)}
    loss, gradient = loss_and_gradient(data, ratio=ratio, aggregate=aggregate, **PENALTY)
    assert loss == 0 and not gradient.any()


@pytest.mark.parametrize("aggregate", ["token", "sequence", "constant"])
def test_micro_batches_add_up_to_the_batch(aggregate: str) -> None:
    data, options = batch(), {"ratio": "token", "aggregate": aggregate} | PENALTY
    loss, gradient = loss_and_gradient(data, **options)
    count = loss_count(jnp.asarray(data["mask"]), aggregate)
    parts = [
        loss_and_gradient({name: data[name][p : p + 1] for name in data} | {"denominator": count}, **options)
        for p in range(P)
    ]
    np.testing.assert_allclose(sum(part[0] for part in parts), loss, atol=1e-6)
    np.testing.assert_allclose(np.concatenate([part[1] for part in parts]), gradient, atol=1e-6)


def test_metrics_of_micro_batches_are_those_of_the_batch() -> None:
    data = batch(spread=0.8)
    nothing = {name: data[name][:1] for name in data} | {"mask": np.zeros((1, G, T), bool)}
    cuts = [{name: data[name][p : p + 1] for name in data} for p in range(P)]
    parts = [loss_of(part, **PENALTY)[1] for part in (nothing, *cuts)]
    whole, together = loss_of(data, **PENALTY)[1], add_metrics(*parts)
    assert whole.keys() == together.keys()
    for name, pair in whole.items():
        np.testing.assert_allclose(together[name], pair, rtol=1e-5, err_msg=name)
    assert float(add_metrics(parts[0])["clip_ratio/low_min"][1]) == 0  # nothing was there


def test_token_per_microbatch_is_the_mean_of_means_and_depends_on_the_cut() -> None:
    data = batch()
    means, lengths = [], data["mask"].sum((1, 2))
    for p in range(P):
        part = {name: data[name][p : p + 1] for name in data}
        means.append(float(loss_of(part)[0]))
        same = loss_of(part | {"denominator": np.float32(P)}, aggregate="token_per_microbatch")[0]
        np.testing.assert_allclose(same, means[-1] / P, rtol=1e-6)
    whole = float(loss_of(data, aggregate="token_per_microbatch")[0])
    np.testing.assert_allclose(whole, np.average(means, weights=lengths), rtol=1e-5)
    assert abs(whole - np.mean(means)) > 1e-3


def test_loss_count() -> None:
    mask = batch()["mask"]
    completions = mask.any(-1).sum()
    assert completions < P * G
    for kind in (bool, np.int32, np.float32):
        typed = jnp.asarray(mask.astype(kind))
        assert loss_count(typed) == loss_count(typed, "token") == mask.sum()
        assert loss_count(typed, "sequence") == completions
        assert loss_count(typed, "constant") == completions * T
        assert loss_count(typed, "constant", max_length=100) == completions * 100
        assert loss_count(typed, "token_per_microbatch") == 1


# KL estimators, by exact enumeration of what the policy samples


def divergence(logits_V: jax.Array, other_V: jax.Array) -> jax.Array:
    return jnp.sum(jax.nn.softmax(logits_V) * (jax.nn.log_softmax(logits_V) - jax.nn.log_softmax(other_V)))


def penalty(logits_V: jax.Array, ref_logits_V: jax.Array, kind: Any) -> tuple[jax.Array, jax.Array]:
    """The loss of the penalty alone when each answer is drawn exactly as often as the policy says, 1, 2, 3, 4 times."""
    tokens_B = np.repeat(np.arange(4), [1, 2, 3, 4])
    logprobs_BT, ref_BT = (jax.nn.log_softmax(x)[tokens_B, None] for x in (logits_V, ref_logits_V))
    advantages_B, mask_BT = jnp.zeros(10), jnp.ones((10, 1), bool)
    loss, metrics = policy_loss(logprobs_BT, logprobs_BT, advantages_B, mask_BT, kl=kind, ref_logprobs=ref_BT, beta=1.0)
    return loss, metrics["kl"][0] / metrics["kl"][1]


def test_k1_and_k3_are_unbiased_and_which_divergence_each_gradient_descends() -> None:
    policy, reference = jnp.log(jnp.arange(1.0, 5)), jnp.array([0.3, -0.2, 0.5, 0.1])

    @jax.jit
    def everything(policy: jax.Array, reference: jax.Array) -> Any:
        forward = jax.value_and_grad(divergence)(policy, reference)
        backward = jax.grad(divergence, argnums=1)(reference, policy)
        estimates = {k: jax.value_and_grad(penalty, has_aux=True)(policy, reference, k) for k in ("k1", "k2", "k3")}
        return forward, backward, estimates

    (kl, kl_gradient), reverse_kl_gradient, estimates = everything(policy, reference)
    for kind, expected in (("k1", jnp.zeros(4)), ("k2", kl_gradient), ("k3", reverse_kl_gradient)):
        pair, gradient = estimates[kind]
        np.testing.assert_allclose(gradient, expected, atol=1e-6)
        if kind != "k2":
            np.testing.assert_allclose(pair, (kl, kl), rtol=1e-5)


def test_kl_penalty_is_zero_for_equal_policies_and_k3_never_negative() -> None:
    data = {name: jnp.asarray(array) for name, array in batch(spread=1e-4).items()}
    for kind in ("k1", "k2", "k3"):
        np.testing.assert_array_equal(kl_penalty(data["logprobs"], data["logprobs"], kind), 0)
    assert kl_penalty(data["logprobs"], data["ref_logprobs"]).min() >= 0


# Bradley-Terry


def scores(dtype: Any = np.float32) -> tuple[jax.Array, jax.Array, jax.Array]:
    chosen, rejected, margin = np.random.default_rng(0).normal(size=(3, 2, 5)).astype(np.float32)
    rejected[0, 0] = chosen[0, 0]
    return jnp.asarray(chosen, dtype), jnp.asarray(rejected, dtype), jnp.asarray(margin, dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("center", [0.0, 0.01])
@pytest.mark.parametrize("with_margin", [False, True])
def test_preference_loss_is_bradley_terry(dtype: Any, center: float, with_margin: bool) -> None:
    chosen, rejected, margin = scores(dtype)
    loss, metrics = preference_loss(chosen, rejected, margin=margin if with_margin else None, center=center)
    c, r, m = (np.asarray(x, np.float64) for x in (chosen, rejected, margin))
    likelihood = 1 / (1 + np.exp(-(c - r - (m if with_margin else 0))))
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, (-np.log(likelihood) + center * (c + r) ** 2).mean(), rtol=1e-5)
    expected = {
        "accuracy": ((c > r) + 0.5 * (c == r)).sum(),
        "margin": (c - r).sum(),
        "mean_reward": (c + r).sum() / 2,
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], (value, c.size), rtol=1e-5, err_msg=name)


def test_preference_gradient_is_the_probability_of_the_wrong_answer() -> None:
    chosen, rejected, _ = scores()
    gradient = jax.jit(jax.grad(lambda *scores: preference_loss(*scores)[0], argnums=(0, 1)))
    towards_chosen, towards_rejected = gradient(chosen, rejected)
    expected = 1 / (1 + np.exp(np.asarray(chosen - rejected))) / chosen.size
    np.testing.assert_allclose(towards_chosen, -expected, rtol=1e-5)
    np.testing.assert_allclose(towards_rejected, expected, rtol=1e-5)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e4])
def test_masked_comparisons_are_as_if_deleted(garbage: float) -> None:
    mask = np.array([[True, False, True, True, False], [False] * 5])

    def loss(chosen: jax.Array, rejected: jax.Array, margin: jax.Array, mask: np.ndarray) -> Any:
        return preference_loss(chosen, rejected, margin=margin, center=0.1, mask=jnp.asarray(mask))

    function = jax.value_and_grad(loss, has_aux=True, argnums=(0, 1))
    pair, gradients = function(*(jnp.where(mask, array, garbage) for array in scores()), mask)
    expected, expected_gradients = function(*(array[mask] for array in scores()), np.ones(3, bool))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), pair, expected)
    for gradient, formula in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient[mask], formula, rtol=1e-5)
        np.testing.assert_array_equal(gradient[~mask], 0)
    assert function(*scores(), np.zeros((2, 5), bool))[0][0] == 0


def test_preference_loss_is_finite_far_out_and_sees_differences_only() -> None:
    chosen, rejected, _ = scores()
    np.testing.assert_allclose(
        preference_loss(chosen + 8, rejected + 8)[0], preference_loss(chosen, rejected)[0], rtol=1e-5
    )
    far, gradient = jax.jit(jax.value_and_grad(lambda c: preference_loss(c, rejected)[0]))(chosen - 1e4)
    np.testing.assert_allclose(far, (rejected - chosen).mean() + 1e4, rtol=1e-6)
    np.testing.assert_allclose(gradient, -1 / chosen.size, rtol=1e-6)


# Errors


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"old_logprobs": (2, 3)}, {}, r"old_logprobs: expected the shape of logprobs, \(2, 4\), got \(2, 3\)"),
        ({"mask": (2,)}, {}, r"mask: expected the shape of logprobs, \(2, 4\), got \(2,\)"),
        (
            {"advantages": (4,)},
            {},
            r"advantages: expected one per completion, \(2,\), or per token, \(2, 4\), got \(4,\)",
        ),
        ({"ref_logprobs": (4,)}, {"kl": "k3"}, r"ref_logprobs: expected the shape of mask, \(2, 4\), got \(4,\)"),
        ({"ref_logprobs": (2, 4)}, {}, "kl, ref_logprobs: expected both"),
        ({}, {"kl": "k3"}, "kl, ref_logprobs: expected both"),
        ({}, {"beta": 0.1}, "beta: 0.1 needs kl="),
        ({"ref_logprobs": (2, 4)}, {"kl": "k4"}, "kind: expected one of 'k1', 'k2', 'k3', got 'k4'"),
        ({}, {"ratio": "word"}, "ratio: expected one of 'token', .*, got 'word'"),
        ({}, {"aggregate": "mean"}, "aggregate: expected one of 'token', .*, got 'mean'"),
        ({}, {"aggregate": "mean", "denominator": 8.0}, "aggregate: expected one of 'token', .*, got 'mean'"),
    ],
)
def test_policy_loss_says_what_was_expected(
    change: dict[str, tuple[int, ...]], options: dict[str, Any], message: str
) -> None:
    shapes = {"logprobs": (2, 4), "old_logprobs": (2, 4), "advantages": (2,), "mask": (2, 4)} | change
    with pytest.raises(ValueError, match=message):
        policy_loss(**{name: jnp.ones(shape) for name, shape in shapes.items()}, **options)


def test_the_other_losses_say_what_was_expected() -> None:
    a, b = jnp.ones(3), jnp.ones(4)
    with pytest.raises(ValueError, match=r"ref_logprobs: expected the shape of logprobs, \(3,\), got \(4,\)"):
        kl_penalty(a, b)
    with pytest.raises(ValueError, match="kind: .* got 'kl'"):
        kl_penalty(a, a, "kl")
    with pytest.raises(ValueError, match="aggregate: .* got 'mean'"):
        loss_count(a, "mean")
    with pytest.raises(ValueError, match=r"rejected_rewards: expected the shape of chosen_rewards, \(3,\), got \(4,\)"):
        preference_loss(a, b)
    for name in ("margin", "mask"):
        with pytest.raises(ValueError, match=rf"{name}: expected the shape of chosen_rewards, \(3,\), got \(4,\)"):
            preference_loss(a, a, **{name: b})


def plackett_luce(scores: np.ndarray, targets: np.ndarray, mask: np.ndarray) -> tuple[float, int]:
    """By its words, one group at a time: (sum of the losses, groups in which anything is compared)."""
    total, groups = 0.0, 0
    for s, t, m in zip(scores, targets, mask, strict=True):
        kept = [i for i in np.flatnonzero(m)]
        groups += len({t[i] for i in kept}) > 1
        for i in kept:
            rivals = [s[j] for j in kept if t[j] < t[i]]
            total -= s[i] - np.log(np.exp(s[i]) + np.exp(rivals).sum())
    return total, groups


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_listwise_loss_is_plackett_luce(ties: bool, masked: bool) -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(6, 5)).astype(np.float32)
    orders = rng.permuted(np.tile(np.arange(5), (6, 1)), axis=1)
    targets = (orders // 2 if ties else orders).astype(np.float32)
    mask = rng.random((6, 5)) < 0.6 if masked else np.ones((6, 5), bool)
    total, groups = plackett_luce(scores, targets, mask)
    arguments = [jnp.asarray(x) for x in (np.where(mask, scores, np.nan), targets)]
    loss, gradient = jax.jit(jax.value_and_grad(lambda s: listwise_loss(s, arguments[1], jnp.asarray(mask))[0]))(
        arguments[0]
    )
    np.testing.assert_allclose(loss, total / groups, rtol=1e-5)
    assert np.isfinite(gradient).all() and not np.any(np.asarray(gradient)[~mask])


def test_without_ties_it_is_the_likelihood_of_the_order() -> None:
    """The probability of all orders of a group adds up to 1."""
    scores = jnp.array([0.3, -1.0, 2.0, 0.1])
    orders = [jnp.array(order, jnp.float32) for order in itertools.permutations(range(4))]
    likelihood = np.exp(
        -jax.jit(jax.vmap(lambda order: listwise_loss(scores[None], order[None])[0]))(jnp.stack(orders))
    )
    np.testing.assert_allclose(sum(likelihood), 1, rtol=1e-5)


def test_of_two_answers_it_is_bradley_terry() -> None:
    chosen, rejected = jax.random.normal(jax.random.key(0), (2, 7))
    listwise = lambda c, r: listwise_loss(jnp.stack([c, r], -1), jnp.tile(jnp.array([1.0, 0.0]), (7, 1)))[0]  # noqa: E731
    found = jax.jit(jax.value_and_grad(listwise, argnums=(0, 1)))(chosen, rejected)
    expected = jax.jit(jax.value_and_grad(lambda c, r: preference_loss(c, r)[0], argnums=(0, 1)))(chosen, rejected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)


def test_equal_targets_are_not_compared() -> None:
    loss, metrics = jax.jit(listwise_loss)(jnp.array([[1.0, 2.0, 3.0]]), jnp.zeros((1, 3)))
    assert loss == 0 and metrics["top_accuracy"] == (0, 0)
    scores, targets = jnp.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]), jnp.array([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    first = jax.jit(jax.grad(lambda s: listwise_loss(s, targets)[0]))
    # what the second of the tied winners scores is nothing to the first
    np.testing.assert_array_equal(first(scores)[0, 0], first(scores.at[0, 1].add(5.0))[0, 0])
    loss, metrics = jax.jit(listwise_loss)(scores, targets)
    assert metrics["top_accuracy"] == (1, 2)
    np.testing.assert_allclose(
        loss, plackett_luce(*map(np.asarray, (scores, targets)), np.ones((2, 3)))[0] / 2, rtol=1e-5
    )


def test_a_masked_answer_is_a_deleted_one_and_a_masked_group_too() -> None:
    scores, targets = jax.random.normal(jax.random.key(1), (2, 3, 4))
    mask = jnp.ones((3, 4), bool).at[:, 2].set(False)
    keep = np.array([0, 1, 3])
    loss = jax.jit(listwise_loss)
    found, expected = loss(scores, targets, mask), loss(scores[:, keep], targets[:, keep])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)
    found = loss(scores, targets, jnp.ones((3, 4), bool).at[1].set(False))
    expected = loss(scores[::2], targets[::2])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)


def test_listwise_loss_says_what_was_expected() -> None:
    a, b = jnp.ones((2, 3)), jnp.ones((2, 4))
    with pytest.raises(ValueError, match=r"targets_PG: expected the shape of scores_PG, \(2, 3\), got \(2, 4\)"):
        listwise_loss(a, b)
    with pytest.raises(ValueError, match="mask_PG: expected the shape of scores_PG"):
        listwise_loss(a, a, b > 0)
    with pytest.raises(ValueError, match="scores_PG: expected at least 2"):
        listwise_loss(a[:, :1], a[:, :1])
