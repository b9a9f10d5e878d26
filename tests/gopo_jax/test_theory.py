"""Expected advantages against enumeration in numpy, stationary policies against their equations and closed forms."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gopo_jax import gopo_advantages, grpo_advantages, theory
from gopo_jax.theory import games

INFINITE = float("inf")


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def advantages(name: str, rewards_G: np.ndarray, ddof: int, epsilon: float) -> np.ndarray:
    """The formulas once more, in numpy."""
    size = len(rewards_G)
    apart = rewards_G - rewards_G.mean() if np.ptp(rewards_G) else np.zeros(size)
    if name == "gopo":
        better = (rewards_G > rewards_G[:, None]).sum(1)
        equal = (rewards_G == rewards_G[:, None]).sum(1)
        return 2 - 4 * (better + (equal - 1) / 2) / (size - 1)
    if name == "grpo":
        spread = rewards_G.std(ddof=ddof) + epsilon
        return apart / spread if spread else apart
    return apart * (size / (size - 1) if name == "rloo" else 1)


def enumerated(
    name: str, policy_O: np.ndarray, rewards_O: np.ndarray, size: int, ddof: int, epsilon: float
) -> tuple[np.ndarray, float]:
    """E[A | o] and E[A^2] over every ordered group."""
    mean_O, square = np.zeros(len(policy_O)), 0.0
    for first in range(len(policy_O)):
        for others in itertools.product(range(len(policy_O)), repeat=size - 1):
            advantage = advantages(name, rewards_O[[first, *others]], ddof, epsilon)[0]
            chance = math.prod(policy_O[list(others)])
            mean_O[first] += chance * advantage
            square += policy_O[first] * chance * advantage**2
    return mean_O, square


def instance(seed: int) -> tuple[np.ndarray, np.ndarray, int]:
    """A random policy, rewards (every other time with ties), a group size."""
    rng = np.random.default_rng(seed)
    count = 3 + seed % 2
    rewards_O = rng.normal(size=count) if seed % 2 else rng.integers(0, 3, count).astype(float)
    return rng.dirichlet(np.ones(count)), rewards_O, 3 + seed % 2


@pytest.mark.parametrize("name", games.ADVANTAGE_NAMES)
@pytest.mark.parametrize(("ddof", "epsilon"), [(0, 0.0), (1, 1e-4)])
def test_expectations_are_those_of_every_group(name: Any, ddof: int, epsilon: float) -> None:
    for seed in range(4):
        policy_O, rewards_O, size = instance(seed)
        mean_O, square = enumerated(name, policy_O, rewards_O, size, ddof, epsilon)
        settings: Any = {"advantage": name, "group_size": size, "ddof": ddof, "epsilon": epsilon}
        np.testing.assert_allclose(theory.expected_advantage(policy_O, rewards_O, **settings), mean_O, atol=1e-10)
        np.testing.assert_allclose(theory.second_moment(policy_O, rewards_O, **settings), square, atol=1e-10)


@pytest.mark.parametrize("seed", range(4))
def test_gopo_expects_the_same_at_every_group_size_and_grpo_does_not(seed: int) -> None:
    policy_O, rewards_O, _ = instance(2 * seed + 1)

    def at(name: Any, size: float) -> np.ndarray:
        return np.asarray(theory.expected_advantage(policy_O, rewards_O, advantage=name, group_size=size))

    for size in (3, 4, 5, 6):
        assert (at("gopo", size) == at("gopo", 2)).all()
        np.testing.assert_allclose(at("gopo", 2), enumerated("gopo", policy_O, rewards_O, size, 0, 0)[0], atol=1e-10)
        assert np.abs(at("grpo", size) - at("grpo", 2)).max() > 1e-3 or (len(policy_O) == 2 and size == 3)
    np.testing.assert_allclose(at("gopo", 2), 2 * at("grpo", 2), atol=1e-12)


@pytest.mark.parametrize("size", [2, 3, 6])
def test_second_moments_without_ties(size: int) -> None:
    """With many answers ties are rare; corrected for the groups that have them, the formulas are exact."""
    rewards_O = np.array([0.3, -1.2, 2.0, 0.9])
    policy_O = np.full(4, 0.25)
    without = theory.second_moment(policy_O, rewards_O, advantage="grpo", group_size=size, ddof=1)
    same = 4 * 0.25**size  # the chance of a group without spread
    np.testing.assert_allclose(without, (size - 1) / size * (1 - same), rtol=1e-12)
    groups_PG = np.array(list(itertools.permutations([0.3, -1.2, 2.0, 0.9, -7.0, 0.31], size)))  # all are distinct
    gopo_P = jnp.square(gopo_advantages(groups_PG)).mean(-1)
    np.testing.assert_allclose(gopo_P, 4 * (size + 1) / (3 * (size - 1)), rtol=1e-12)
    grpo_P = jnp.square(grpo_advantages(groups_PG, epsilon=0.0)).mean(-1)
    np.testing.assert_allclose(grpo_P, (size - 1) / size, rtol=1e-12)


def test_the_limit_of_a_large_group() -> None:
    policy_O, rewards_O = np.array([0.2, 0.3, 0.5]), np.array([1.0, 0.0, -0.4])
    limit_O = theory.expected_advantage(policy_O, rewards_O, advantage="grpo", group_size=INFINITE)
    far = [
        float(jnp.abs(theory.expected_advantage(policy_O, rewards_O, advantage="grpo", group_size=g) - limit_O).max())
        for g in (4, 16, 64)
    ]
    assert far[0] > far[1] > far[2] and far[2] < 0.05


@pytest.mark.parametrize("kl", ["k3", "direct"])
@pytest.mark.parametrize(("name", "size"), [("gopo", 8), ("grpo", 2), ("grpo", 4), ("rloo", 3), ("dr_grpo", 3)])
def test_a_stationary_policy_satisfies_its_equation(name: Any, size: int, kl: Any) -> None:
    policy_O, rewards_O, _ = instance(3)
    for beta in (0.04, 0.5, 2.0):
        x_O = theory.stationary_policy(policy_O, rewards_O, beta=beta, advantage=name, group_size=size, kl=kl)
        advantage_O = theory.expected_advantage(x_O, rewards_O, advantage=name, group_size=size)
        assert abs(float(x_O @ advantage_O)) < 1e-12
        if kl == "k3":
            np.testing.assert_allclose(x_O * (1 - advantage_O / beta), policy_O, atol=1e-12)
        else:
            np.testing.assert_allclose(x_O, jax.nn.softmax(jnp.log(policy_O) + advantage_O / beta), atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_gopos_fixed_point_is_that_of_grpo_in_pairs_at_half_of_beta(seed: int) -> None:
    policy_O, rewards_O, _ = instance(seed)
    gopo_O = theory.stationary_policy(policy_O, rewards_O, beta=0.3, advantage="gopo", group_size=8)
    for beta, ddof in ((0.15, 0), (0.3 / (2 * math.sqrt(2)), 1)):
        grpo_O = theory.stationary_policy(policy_O, rewards_O, beta=beta, advantage="grpo", group_size=2, ddof=ddof)
        np.testing.assert_allclose(gopo_O, grpo_O, atol=1e-10)


def test_only_the_order_of_the_rewards_matters_to_gopo() -> None:
    policy_O, rewards_O, _ = instance(1)
    settings: Any = {"beta": 0.5, "group_size": 4}
    same = [theory.stationary_policy(policy_O, r, advantage="gopo", **settings) for r in (rewards_O, np.exp(rewards_O))]
    assert (same[0] == same[1]).all()
    other = [
        theory.stationary_policy(policy_O, r, advantage="grpo", **settings) for r in (rewards_O, np.exp(rewards_O))
    ]
    assert float(jnp.abs(other[0] - other[1]).max()) > 1e-3


@pytest.mark.parametrize("beta", [0.05, 0.7, 3.0])
@pytest.mark.parametrize("reference", [0.05, 0.5, 0.8])
def test_closed_forms_of_two_answers(reference: float, beta: float) -> None:
    policy_O = np.array([reference, 1 - reference])
    for margin in (-0.6, 0.0, 0.3, 1.0):
        preference_OO = np.array([[0.5, (1 + margin) / 2], [(1 - margin) / 2, 0.5]])
        x_O = theory.stationary_policy(policy_O, beta=beta, advantage="gopo", group_size=8, preference_OO=preference_OO)
        np.testing.assert_allclose(x_O[0], theory.binary_gopo_policy(reference, margin, beta), atol=1e-10)
    x_O = theory.stationary_policy(policy_O, np.array([1.0, 0.0]), beta=beta, advantage="grpo", group_size=INFINITE)
    np.testing.assert_allclose(x_O[0], theory.binary_grpo_policy(reference, beta), atol=1e-10)


@pytest.mark.parametrize("rare", [1e-6, 1e-9])
def test_a_rare_better_answer_is_found_wherever_the_policy_turns_to_it(rare: float) -> None:
    """Small entries: the policy jumps from almost none of the answer to almost all of it as beta falls below 2 or 1."""
    policy_O, rewards_O = np.array([1 - rare, rare]), np.array([0.0, 1.0])
    for beta in (0.01, 0.05, 0.5, 1.9, 2.0, 2.1, 5.0):
        x_O = theory.stationary_policy(policy_O, rewards_O, beta=beta, advantage="gopo", group_size=100)
        np.testing.assert_allclose(x_O[1], theory.binary_gopo_policy(rare, 1, beta), rtol=1e-9)
        x_O = theory.stationary_policy(policy_O, rewards_O, beta=beta, advantage="grpo", group_size=INFINITE)
        np.testing.assert_allclose(x_O[1], theory.binary_grpo_policy(rare, beta), rtol=1e-9)
    for beta in (0.05, 0.6):
        x_O = theory.stationary_policy(policy_O, rewards_O, beta=beta, advantage="grpo", group_size=5)
        advantage_O = theory.expected_advantage(x_O, rewards_O, advantage="grpo", group_size=5)
        np.testing.assert_allclose(x_O * (1 - advantage_O / beta), policy_O, atol=1e-12)


@pytest.mark.parametrize("rare", [3e-3, 1e-4])
def test_float32_is_solved_in_float64(rare: float) -> None:
    with jax.enable_x64(False):
        for beta in (0.05, 0.5, 1.0):
            x_O = theory.stationary_policy([1 - rare, rare], [0.0, 1.0], beta=beta, advantage="gopo", group_size=4)
            assert x_O.dtype == jnp.float32
            np.testing.assert_allclose(x_O[1], theory.binary_gopo_policy(rare, 1, beta), rtol=1e-4)


def test_a_reference_of_rounded_thirds_is_a_distribution() -> None:
    third_O = [0.3333333333] * 3
    x_O = theory.stationary_policy(third_O, [0.0, 1.0, 2.0], beta=0.5, advantage="gopo", group_size=4)
    exact_O = theory.stationary_policy([1 / 3] * 3, [0.0, 1.0, 2.0], beta=0.5, advantage="gopo", group_size=4)
    np.testing.assert_allclose(x_O, exact_O, rtol=1e-12)


@pytest.mark.parametrize("rewards", [[0.0, 1000.0], [0.0, 1e6, 999_999.97]])
def test_wide_rewards_are_what_rlhf_asks_for(rewards: list[float]) -> None:
    """Probabilities underflow; what is left is compared."""
    even_O = np.full(len(rewards), 1 / len(rewards))
    x_O = theory.stationary_policy(even_O, rewards, beta=0.05, kl="direct", advantage="rloo", group_size=4)
    np.testing.assert_allclose(x_O, theory.rlhf_policy(even_O, rewards, 0.05), rtol=1e-7, atol=1e-300)


@pytest.mark.parametrize(("size", "epsilon"), [(3, 0.0), (INFINITE, 0.0), (3, 0.5), (INFINITE, 0.5)])
def test_grpos_scale_neither_overflows_nor_underflows(size: float, epsilon: float) -> None:
    policy_O, rewards_O = np.array([0.2, 0.3, 0.5]), np.array([0.0, 1.0, 0.4])

    def at(scale: float) -> jax.Array:
        options: Any = {"advantage": "grpo", "group_size": size, "epsilon": epsilon * scale}
        return theory.expected_advantage(policy_O, scale * rewards_O, **options)

    expected_O = at(1.0)
    for scale in (1e200, 1e-200):
        np.testing.assert_allclose(at(scale), expected_O, rtol=1e-12)
    with jax.enable_x64(False):
        for scale in (1e20, 1e-24):
            np.testing.assert_allclose(at(scale), expected_O, rtol=1e-5)


@pytest.mark.parametrize("size", [5, INFINITE])
def test_equal_rewards_have_no_advantage(size: float) -> None:
    for seed in range(20):
        policy_O = np.random.default_rng(seed).dirichlet(np.ones(4))
        found_O = theory.expected_advantage(policy_O, [0.3] * 4, advantage="grpo", group_size=size)
        assert (found_O == 0).all()


@pytest.mark.parametrize(("name", "share"), [("rloo", 1.0), ("dr_grpo", 0.75)])
def test_without_scale_and_with_direct_kl_it_is_what_rlhf_asks_for(name: Any, share: float) -> None:
    policy_O, rewards_O, _ = instance(5)
    x_O = theory.stationary_policy(policy_O, rewards_O, beta=0.3, advantage=name, group_size=4, kl="direct")
    np.testing.assert_allclose(x_O, theory.rlhf_policy(policy_O, rewards_O, 0.3 / share), atol=1e-10)


def test_a_preference_that_goes_in_a_circle_leaves_the_reference() -> None:
    """Rock, scissors, paper: no answer is better, so the equilibrium of the uniform reference is uniform."""
    circle_OO = np.array([[0.5, 1, 0], [0, 0.5, 1], [1, 0, 0.5]])
    uniform_O = np.full(3, 1 / 3)
    settings: Any = {"beta": 0.01, "advantage": "gopo", "group_size": 4, "preference_OO": circle_OO}
    np.testing.assert_allclose(theory.stationary_policy(uniform_O, **settings), uniform_O, atol=1e-12)
    x_O = theory.stationary_policy(np.array([0.6, 0.3, 0.1]), kl="direct", **settings)
    np.testing.assert_allclose(x_O, uniform_O, atol=0.02)  # almost without a penalty: the game's own equilibrium


def test_rewards_are_a_preference_that_is_sure() -> None:
    policy_O, rewards_O, _ = instance(4)
    apart_OO = rewards_O[:, None] - rewards_O
    sure_OO = np.where(apart_OO == 0, 0.5, apart_OO > 0)
    for name, size in (("gopo", 5), ("grpo", 2)):
        settings: Any = {"advantage": name, "group_size": size}
        np.testing.assert_allclose(
            theory.expected_advantage(policy_O, preference_OO=sure_OO, **settings),
            theory.expected_advantage(policy_O, rewards_O, **settings),
            atol=1e-12,
        )


def test_the_gradient_is_that_of_the_tabular_policy() -> None:
    policy_O, rewards_O, _ = instance(1)
    advantage_O = theory.expected_advantage(policy_O, rewards_O, advantage="gopo", group_size=4)
    expected_O = jax.grad(lambda logits_O: jax.nn.softmax(logits_O) @ advantage_O)(jnp.log(policy_O))
    np.testing.assert_allclose(theory.expected_gradient(policy_O, advantage_O), expected_O, atol=1e-12)


def test_what_does_not_exist_is_an_error() -> None:
    """GRPO, infinite group, direct KL, small beta: P grows as one answer takes over; no policy is stationary."""
    half_O, rewards_O = np.array([0.5, 0.5]), np.array([1.0, 0.0])
    settings: Any = {"advantage": "grpo", "group_size": INFINITE, "kl": "direct"}
    with pytest.raises(
        RuntimeError, match=r"no stationary policy found.*residual of .*float64.*smallest entry 5.0e-01"
    ):
        theory.stationary_policy(half_O, rewards_O, beta=0.1, **settings)
    assert theory.stationary_policy(half_O, rewards_O, beta=4.0, **settings)[0] > 0.5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"beta": 0.0}, "every policy that gives one answer alone"),
        ({"reference_O": [0.5, 0.6]}, "add up to 1"),
        ({"reference_O": [1.0, 0.0]}, "positive"),
        ({"group_size": 1}, "at least 2"),
        ({"group_size": 2.5}, "whole number"),
        ({"advantage": "ppo"}, "one of"),
        ({"kl": "k1"}, "one of"),
        ({"rewards_O": None}, "one of rewards_O and preference_OO"),
        ({"rewards_O": [1.0, 0.0, 0.0]}, "shape"),
        ({"rewards_O": [1.0, math.nan]}, "finite"),
        ({"ddof": 2}, "one of"),
        ({"epsilon": -1.0}, "at least 0"),
        ({"preference_OO": [[0.5, 1], [0, 0.5]]}, "both"),
        ({"rewards_O": None, "preference_OO": [[0.5, 1], [1, 0.5]]}, "mirror"),
        ({"rewards_O": None, "preference_OO": [[0.5]]}, "shape"),
        (
            {"rewards_O": None, "preference_OO": [[0.5, 1], [0, 0.5]], "advantage": "grpo", "group_size": 4},
            "group_size 2",
        ),
        ({"advantage": "grpo", "group_size": 3_000_000}, "to enumerate"),
        ({"advantage": "grpo", "group_size": 100_000}, "to enumerate"),  # few groups, but each is large
        ({"group_size": "4"}, "group_size: expected a number"),
        ({"beta": np.ones(2)}, "beta: expected a number"),
        ({"beta": math.nan}, "beta: expected a positive"),
        ({"noise": None}, "noise: expected a number"),
        ({"epsilon": "x"}, "epsilon: expected a number"),
        ({"rewards_O": ["a", "b"]}, "rewards_O: expected an array"),
    ],
)
def test_mistakes_are_refused(change: dict[str, Any], words: str) -> None:
    given: dict[str, Any] = {"reference_O": [0.5, 0.5], "rewards_O": [1.0, 0.0], "beta": 0.1, "advantage": "gopo"}
    with pytest.raises(ValueError, match=words):
        theory.stationary_policy(**{**given, "group_size": 4, **change})


def test_mistakes_elsewhere_are_refused() -> None:
    half_O = np.array([0.5, 0.5])
    for reference in (0.0, 1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="reference: expected a probability"):
            theory.binary_gopo_policy(reference, 1.0, 0.5)
        with pytest.raises(ValueError, match="reference: expected a probability"):
            theory.binary_grpo_policy(reference, 0.5)
    with pytest.raises(ValueError, match="margin: expected"):
        theory.binary_gopo_policy(0.5, 1.1, 0.5)
    for beta in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match="beta: expected a positive"):
            theory.binary_gopo_policy(0.5, 1.0, beta)
        with pytest.raises(ValueError, match="beta: expected a positive"):
            theory.binary_grpo_policy(0.5, beta)
        with pytest.raises(ValueError, match="beta: expected a positive"):
            theory.rlhf_policy(half_O, [0.0, 1.0], beta)
    missing: Any = None
    with pytest.raises(ValueError, match="rewards_O: expected an array of numbers, got None"):
        theory.second_moment(half_O, missing, advantage="grpo", group_size=2)
