"""`python -m eval theory`: softmax policies over a few answers, trained with the real losses, beside predictions.

1. Each case (an advantage, G, beta, an estimator of the penalty, noise of the rewards) is solved three ways: predicted
   by `gopo_jax.theory.stationary_policy`, trained by the exact expected gradient of the loss, and trained on sampled
   groups, as train/loop.py trains a network.
2. Predictions are drawn as lines against beta, G and noise, results of sampled training as dots.
3. The penalty's estimators k1, k2 and k3 are trained side by side.
4. The norms of GOPO's and GRPO's expected gradients are compared over G.

All numbers are float64, training starts from the reference, and the same settings write the same files.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eval.sheets import NONE, Sheet
from eval.texts.rows import write_json
from eval.theory.plots import theory_pictures
from eval.theory.tabular import TabularProblem, trained_exactly, training
from gopo_jax.theory import expected_advantage, expected_gradient, rlhf_policy, stationary_policy
from gopo_jax.theory.games import AdvantageName, enumerable
from train.config import check_seed
from train.console import console, progress_bar
from train.parse import parse
from train.run.files import check_out_directory, write_whole
from train.running import SetupError, setup_errors

EPSILON = 1e-4  # of `grpo_advantages`, whose standard deviation has ddof 1
STEPS_SHOWN = 200  # points of a training curve
RLHF = "RLHF's optimum"
COLUMNS = ("advantage", "group_size", "beta", "kl", "noise", "predicted", "exact", "sampled", "difference")
SHOWN = ("advantage", "G", *COLUMNS[2:-1], "apart")  # 80 letters wide


@dataclass(frozen=True, kw_only=True)
class TheoryConfig:
    """Tabular policies trained beside their predicted fixed points."""

    out: str  # the directory to write
    beta: list[float] = field(default_factory=lambda: [0.1, 0.5, 2.0])  # weights of the KL penalty, e.g. 0.1,0.5,2
    group_sizes: list[int] = field(default_factory=lambda: [2, 4, 8])  # answers per group (G)
    # standard deviations of what is added to rewards
    noise: list[float] = field(default_factory=lambda: [0.0, 1.0, 2.0, 4.0])
    at_beta: float = 0.5  # beta of the pictures over G and over noise
    at_group_size: int = 8  # G of the pictures over beta and over noise
    penalty_beta: float = 1.0  # beta of the picture of the penalty's estimators
    # the reference policy's probabilities of the answers
    reference: list[float] = field(default_factory=lambda: [0.5, 0.3, 0.15, 0.05])
    rewards: list[float] = field(default_factory=lambda: [0.0, 1.0, 0.2, 3.0])  # of the answers
    groups: int = 256  # sampled at each step
    steps: int = 2000  # steps of sampled training
    exact_steps: int = 20_000  # steps of training along the exact expectation
    sizes: list[int] = field(default_factory=lambda: [2, 3, 4, 5, 6, 8, 12, 16])  # G, each a point of the curves over G
    points: int = 17  # points of a curve over beta or noise
    problems: int = 50  # random problems in the picture of gradients
    seed: int = 0  # of sampled training and random problems

    def __post_init__(self) -> None:
        count = len(self.reference)
        if count < 2 or len(self.rewards) != count:
            raise ValueError(
                f"reference, rewards: expected a number for each of at least 2 answers, got {count} and "
                f"{len(self.rewards)}"
            )
        if min(self.reference) <= 0 or abs(sum(self.reference) - 1) > 1e-9:
            raise ValueError(f"reference: expected positive probabilities that add up to 1, got {self.reference}")
        if not all(map(math.isfinite, self.rewards)) or self.rewards.count(max(self.rewards)) != 1:
            raise ValueError(f"rewards: expected finite numbers with one highest, got {self.rewards}")
        for name in ("beta", "noise", "group_sizes", "sizes"):
            if not getattr(self, name):
                raise ValueError(f"{name}: expected at least one number, got []")
        for name, values in (("beta", self.beta), ("at_beta", [self.at_beta]), ("penalty_beta", [self.penalty_beta])):
            if not all(0 < value < math.inf for value in values):
                raise ValueError(f"{name}: expected numbers above 0, got {number_list(values)}")
        if not all(0 <= value < math.inf for value in self.noise):
            raise ValueError(f"noise: expected numbers of at least 0, got {number_list(self.noise)}")
        sizes = {"group_sizes": self.group_sizes, "sizes": self.sizes, "at_group_size": [self.at_group_size]}
        for name, size in ((name, size) for name, given in sizes.items() for size in given):
            if size < 2 or not enumerable(count, size):
                raise ValueError(
                    f"{name}: expected whole numbers from 2 for which {count} answers have few enough groups to "
                    f"enumerate, got {size}"
                )
        check_seed(self.seed)
        for name, least in (("groups", 1), ("steps", 2), ("exact_steps", 1), ("points", 2), ("problems", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")


def number_list(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


class Case(NamedTuple):
    """One training: its advantage, group size, penalty and noise."""

    advantage: AdvantageName
    group_size: int
    beta: float
    kl: str = "k3"  # the estimator in the loss; "none": no penalty
    noise: float = 0.0


def parse_theory(arguments: list[str]) -> TheoryConfig:
    return parse(TheoryConfig, arguments, "python -m eval theory")


def theory(config: TheoryConfig) -> dict[str, Any]:
    """Writes theory.json, theory.csv, theory.md and pictures to `config.out`; returns the content of theory.json.

    Raises:
      SetupError: the directory cannot be written, or no stationary policy was found.
    """
    out = Path(config.out)
    with setup_errors():
        check_out_directory(config.out, "theory.json", "theory.csv", "theory.md")
        out.mkdir(parents=True, exist_ok=True)
    with unsolved_as_setup_error(), jax.enable_x64(True), progress_bar() as bar:
        todo = cases(config)
        work = bar.add_task("theory", total=len(todo) + 2 * config.points + len(config.sizes) + config.problems)
        result: dict[str, Any] = {"settings": asdict(config) | {"out": None}}
        known = {case: predicted(config, case) for case in todo}  # first: if one does not exist, nothing is trained
        lines = predicted_curves(config, lambda: bar.advance(work))
        slopes = gradient_ratios(config, lambda: bar.advance(work))
        result |= trainings(config, known, lambda: bar.advance(work))
        for axis, curve in lines.items():
            curve["dots"] = sampled_dots(config, result["rows"], axis, list(curve["lines"]))
        result |= {"curves": lines, "gradients": slopes}
        bar.update(work, completed=bar.tasks[0].total)
    write_json(str(out / "theory.json"), result)
    write_whole(out / "theory.csv", case_sheet(result["rows"], whole=True).csv())
    sheet = case_sheet(result["rows"])
    drawn = (f"![{p.title}]({p.name}.png)\n\n{p.title}. {p.caption}\n" for p in theory_pictures(out, result))
    write_whole(out / "theory.md", "\n".join([f"# {sheet.title}\n", sheet.markdown(), *drawn]))
    console.print(sheet.rich(), sheet.note, str(out), sep="\n")
    return result


@contextmanager
def unsolved_as_setup_error() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "no stationary policy found" not in str(error):
            raise
        raise SetupError(str(error)) from error


def cases(config: TheoryConfig) -> list[Case]:
    """Distinct cases: advantages x G x beta; noise; RLHF's optimum (RLOO with k2); the estimators of the penalty."""
    all_cases: list[Case] = []
    methods: tuple[AdvantageName, AdvantageName] = ("gopo", "grpo")
    for advantage in methods:
        sizes = [*config.group_sizes, config.at_group_size]
        all_cases += [Case(advantage, G, beta) for G in config.group_sizes for beta in config.beta]
        all_cases += [Case(advantage, config.at_group_size, beta) for beta in config.beta]
        all_cases += [Case(advantage, G, config.at_beta) for G in sizes]
        all_cases += [Case(advantage, config.at_group_size, config.at_beta, noise=noise) for noise in config.noise]
    all_cases += [Case("rloo", config.at_group_size, beta, "k2") for beta in [*config.beta, config.at_beta]]
    all_cases += [Case("rloo", config.at_group_size, config.at_beta, "k2", noise) for noise in config.noise]
    all_cases += [Case("gopo", config.at_group_size, config.penalty_beta, kl) for kl in ("k3", "k2", "k1", "none")]
    all_cases += [Case("grpo", config.at_group_size, config.penalty_beta, kl) for kl in ("k3", "k2")]
    return list(dict.fromkeys(all_cases))


def trainings(config: TheoryConfig, known: Mapping[Case, np.ndarray], advance: Callable[[], None]) -> dict[str, Any]:
    """Trains each case; returns its row beside the known prediction, and GOPO's curves with every estimator."""
    best = int(np.argmax(config.rewards))
    rows, paths = [], {}
    shown = np.unique(np.geomspace(1, config.steps, STEPS_SHOWN).astype(int)) - 1
    for i, case in enumerate(known):
        key = jax.random.fold_in(jax.random.key(config.seed), i)
        policies_YO = np.asarray(train_by_sampling(config, case, key))
        ends = {"predicted": known[case], "exact": train_by_expectation(config, case)}
        ends["sampled"] = policies_YO[config.steps // 2 :].mean(0)
        rows.append(case_row(case, ends, best))
        if case == penalty_case(config, case.kl):
            paths[case.kl] = policies_YO[shown, best].tolist()
        advance()
    penalties = {"beta": config.penalty_beta, "steps": (shown + 1).tolist(), "paths": paths}
    fixed = {kl: known.get(penalty_case(config, kl)) for kl in ("k3", "k2")}
    penalties["fixed"] = {kl: policy_O[best].item() for kl, policy_O in fixed.items() if policy_O is not None}
    return {"rows": rows, "best": best, "penalties": penalties}


def penalty_case(config: TheoryConfig, kl: str) -> Case:
    return Case("gopo", config.at_group_size, config.penalty_beta, kl)


def case_row(case: Case, ends: dict[str, np.ndarray], best: int) -> dict[str, Any]:
    """A case's result: the best answer's probabilities, the whole policies, the largest differences."""

    def largest(name: str) -> float | None:
        return float(np.abs(ends[name] - ends["predicted"]).max()) if ends["predicted"].size else None

    probabilities = {name: float(end[best]) if end.size else None for name, end in ends.items()}
    whole = {f"{name}_policy": end.tolist() or None for name, end in ends.items()}
    differences = {"difference": largest("sampled"), "difference_exact": largest("exact")}
    return case._asdict() | probabilities | differences | whole


def predicted(config: TheoryConfig, case: Case) -> np.ndarray:
    """The stationary policy [O]; empty for k1 and for no penalty, whose only fixed points are single answers."""
    if case.kl not in ("k2", "k3"):
        return np.zeros(0)
    if case.advantage == "rloo":  # with k2, in closed form
        return np.asarray(rlhf_policy(jnp.array(config.reference), jnp.array(config.rewards), case.beta))
    return np.asarray(stationary(config, case.advantage, case.group_size, case.beta, case.noise, case.kl))


def stationary(
    config: TheoryConfig, advantage: AdvantageName, group_size: float, beta: float, noise: float = 0.0, kl: str = "k3"
) -> jax.Array:
    """The fixed point for the trained advantages: GRPO's standard deviation has ddof 1 and, without noise, EPSILON."""
    return stationary_policy(
        jnp.array(config.reference),
        jnp.array(config.rewards),
        beta=beta,
        advantage=advantage,
        group_size=group_size,
        kl="direct" if kl == "k2" else "k3",
        ddof=1,
        epsilon=0.0 if noise else EPSILON,
        noise=noise,
    )


def tabular_problem(config: TheoryConfig, case: Case) -> TabularProblem:
    return TabularProblem(jnp.array(config.reference), jnp.array(config.rewards), case.beta, case.noise)


def train_by_expectation(config: TheoryConfig, case: Case) -> np.ndarray:
    return np.asarray(
        trained_exactly(tabular_problem(config, case), **training_options(case), steps=config.exact_steps)
    )


def train_by_sampling(config: TheoryConfig, case: Case, key: jax.Array) -> jax.Array:
    return training(
        tabular_problem(config, case), key, **training_options(case), groups=config.groups, steps=config.steps
    )


def training_options(case: Case) -> dict[str, Any]:
    kl = None if case.kl == "none" else case.kl
    rate = min(1.0, 2 / case.beta)  # a heavy penalty pulls too far at 1
    return {"advantage": case.advantage, "group_size": case.group_size, "kl": kl, "learning_rate": rate}


def predicted_curves(config: TheoryConfig, advance: Callable[[], None]) -> dict[str, Any]:
    """For each picture its x, and the best answer's predicted probability of each method there."""
    best, G, beta = int(np.argmax(config.rewards)), config.at_group_size, config.at_beta
    most_noise = max(config.noise) or 1.0
    axes: dict[str, list[float]] = {
        "beta": np.geomspace(min(config.beta) / 2, max(config.beta) * 2, config.points).tolist(),
        "group_size": [float(size) for size in sorted({*config.sizes, *config.group_sizes, G})],
        "noise": np.linspace(0, most_noise, config.points).tolist(),
    }
    curves: dict[str, Any] = {}
    for axis, points in axes.items():
        lines: dict[str, list[float]] = {}
        for x in points:
            values: dict[str, Any] = {"beta": beta, "noise": 0.0, "group_size": G} | {axis: x}
            settings: Any = {"beta": values["beta"], "noise": values["noise"]}
            policies = {"GOPO": stationary(config, "gopo", G, **settings)}
            for size in dict.fromkeys([values["group_size"], *config.group_sizes[:1], math.inf]):
                if axis == "group_size" and size not in (x, math.inf):
                    continue
                name = "GRPO" if axis == "group_size" and size == x else f"GRPO, G = {size_text(size)}"
                policies[name] = stationary(config, "grpo", size, **settings)
            reference_O, rewards_O = jnp.array(config.reference), jnp.array(config.rewards)
            policies[RLHF] = rlhf_policy(reference_O, rewards_O, settings["beta"])
            for name, policy_O in policies.items():
                lines.setdefault(name, []).append(float(policy_O[best]))
            advance()
        curves[axis] = {"x": points, "lines": lines}
    return curves


def sampled_dots(
    config: TheoryConfig, rows: Sequence[dict[str, Any]], axis: str, names: Sequence[str]
) -> dict[str, list[list[float]]]:
    """Results of sampled training for a picture over `axis`: [x, probability] by the name of their line."""
    fixed = {"beta": config.at_beta, "noise": 0.0}
    kinds = {"gopo": ("k3", "GOPO"), "rloo": ("k2", RLHF), "grpo": ("k3", "GRPO")}
    points: dict[str, list[list[float]]] = {}
    for end in rows:
        kl, name = kinds[end["advantage"]]
        if axis != "group_size" and name == "GRPO":
            name = f"GRPO, G = {size_text(end['group_size'])}"
        elif axis != "group_size" and end["group_size"] != config.at_group_size:
            continue
        on_curve = all(end[key] == value for key, value in fixed.items() if key != axis)
        if on_curve and end["kl"] == kl and name in names:
            points.setdefault(name, []).append([end[axis], end["sampled"]])
    return points


def gradient_ratios(config: TheoryConfig, advance: Callable[[], None]) -> dict[str, Any]:
    """Norm of GOPO's expected gradient over GRPO's (ddof 1), by G: for the settings, and the range over random ones.

    Two limits: for a rare better answer, 2 sqrt(G) / (G - 1), which is above 1 for G < 3 + 2 sqrt(2); and the ratio of
    the root mean squares of one completion's advantages without equal rewards,
    sqrt(4 (G + 1) / (3 (G - 1)) / ((G - 1) / G)), which is above 1 for every G.
    """
    count = len(config.rewards)
    sizes = sorted(set(config.sizes))
    own_ratios = norm_ratios(jnp.array(config.reference), jnp.array(config.rewards), sizes)
    rng = np.random.default_rng(config.seed)
    random_ratios = []
    for _ in range(config.problems):
        policy_O, rewards_O = jnp.array(rng.dirichlet(np.ones(count))), jnp.array(rng.normal(size=count))
        random_ratios.append(norm_ratios(policy_O, rewards_O, sizes))
        advance()
    return {
        "group_sizes": sizes,
        "here": own_ratios,
        "lowest": np.min(random_ratios, 0).tolist(),
        "highest": np.max(random_ratios, 0).tolist(),
        "rare": [2 * math.sqrt(G) / (G - 1) for G in sizes],
        "samples": [math.sqrt(4 * (G + 1) / (3 * (G - 1)) / ((G - 1) / G)) for G in sizes],
        "rare_above_1_up_to": 3 + 2 * math.sqrt(2),
    }


def norm_ratios(policy_O: jax.Array, rewards_O: jax.Array, sizes: Sequence[int]) -> list[float]:
    def norm(advantage: AdvantageName, size: int) -> float:
        advantage_O = expected_advantage(policy_O, rewards_O, advantage=advantage, group_size=size, ddof=1)
        return float(jnp.linalg.norm(expected_gradient(policy_O, advantage_O)))

    gopo = norm("gopo", 2)  # at every G
    return [gopo / norm("grpo", size) for size in sizes]


def size_text(size: float) -> str:
    return "∞" if math.isinf(size) else f"{size:g}"


def case_sheet(rows: Sequence[dict[str, Any]], whole: bool = False) -> Sheet:
    """A table of the cases, rounded, or with all digits if `whole`."""

    def text(value: Any, digits: int) -> str:
        if value is None:
            return "" if whole else NONE
        return str(value) if whole or not isinstance(value, float) else f"{value:.{digits}f}"

    names = ("predicted", "exact", "sampled", "difference")
    cells = [
        (case["advantage"], str(case["group_size"]))
        + (f"{case['beta']:g}", case["kl"], f"{case['noise']:g}")
        + tuple(text(case[name], 4) for name in names)
        for case in rows
    ]
    return Sheet(
        "The best answer's probability in the end", COLUMNS if whole else SHOWN, cells, largest_difference(rows)
    )


def largest_difference(rows: Sequence[dict[str, Any]]) -> str:
    known = [case for case in rows if case["difference"] is not None]
    worst = max(known, key=lambda case: case["difference"])
    steered = max(case["difference_exact"] for case in known)
    return (
        f"apart: the largest difference of any answer between sampled and predicted. Largest of {len(known)} cases: "
        f"{worst['difference']:.4f} ({worst['advantage']}, G {worst['group_size']}, beta {worst['beta']:g}, "
        f"{worst['kl']}, noise {worst['noise']:g}); by exact expectation {steered:.1e}. k1 in the loss has no expected "
        f"gradient, so it and no penalty (none) have no fixed point but one answer alone."
    )
