"""The lab's numbers: laws of comparisons and intervals, files that give everything again, pictures of what there is."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from eval.lab.cells import METHODS, PARTS, Cell, CellOutcome
from eval.lab.plots import difference_picture, lab_pictures
from eval.lab.results import SeedRow, Tables, by_cell, estimate, over_seeds, pairwise_win_rate, reached, summarize
from eval.lab.tables import CURVES, RESULTS, TABLE, read, sheet, write
from eval.pictures import Picture, Studio

N, P, G = 3, 4, 5
STEPS = np.array([0, 10, 20])


def make(
    method: str,
    curve_NM: np.ndarray | None = None,
    *,
    data: int = 0,
    seeds: Sequence[int] = range(N),
    kl_NM: np.ndarray | None = None,
    **cell: object,
) -> CellOutcome:
    """A cell whose mean gold and proxy are `curve_NM` exactly, or random."""
    rng = np.random.default_rng(data)
    shape = (len(seeds), len(STEPS))
    noise = rng.normal(size=(*shape, P, G))
    noise -= noise.mean((2, 3), keepdims=True)
    gold_NM = rng.normal(size=shape) if curve_NM is None else curve_NM
    kl_NM = np.broadcast_to(STEPS / 2.0, shape) if kl_NM is None else kl_NM
    gold = gold_NM[..., None, None] + noise
    about = {"learning_rate": 1e-3, "beta": 0.1, "seeds": list(seeds), "proxy_accuracy": [0.75] * len(seeds)}
    return CellOutcome(
        Cell(method, **cell),  # type: ignore[arg-type]
        about | {"versions": {"python": "3", "jax": "0"}},
        STEPS,
        proxy_NMPG=2 * gold,
        gold_NMPG=gold,
        length_NMPG=np.full((*shape, P, G), 7.0),
        kl_NMPG=np.broadcast_to(kl_NM[..., None, None], (*shape, P, G)),
        training={"rank_length": rng.normal(size=(len(seeds), 6))},
    )


def rows_of(method: str, *outcomes: CellOutcome) -> list[SeedRow]:
    return [row for row in summarize(outcomes, "test").rows if row.method == method]


def part(name: str, seeds: int = 2) -> Tables:
    cells = PARTS[name]
    made = [
        make(cell.method, data=i, seeds=range(seeds), group_size=cell.group_size, noise=cell.noise,
             distortion=cell.distortion, regime=cell.regime)
        for i, cell in enumerate(cells)
    ]  # fmt: skip
    return summarize(made, f"lab {name}")


# comparisons


def test_swapping_two_methods_mirrors_differences_and_win_rate() -> None:
    one, other = make("gopo", data=1), make("grpo", data=2)
    there = rows_of("gopo", one, other)
    back = rows_of("gopo", other._replace(cell=Cell("gopo")), one._replace(cell=Cell("grpo")))
    for a, b in zip(there, back, strict=True):
        assert a.gold_difference == -b.gold_difference != 0
        assert a.proxy_difference == -b.proxy_difference
        assert a.gold_at_kl_difference == -b.gold_at_kl_difference
        assert a.win_rate + b.win_rate == pytest.approx(1, abs=2e-5)  # each is rounded
    assert len({row.win_rate for row in there} - {0.5}) > 1


def test_identical_cells_differ_by_nothing() -> None:
    one = make("gopo")
    for row in rows_of("gopo", one, one._replace(cell=Cell("grpo"))):
        assert (row.gold_difference, row.proxy_difference, row.gold_at_kl_difference, row.win_rate) == (0, 0, 0, 0.5)


def test_the_win_rate_is_that_of_all_pairs_with_ties_one_half() -> None:
    a_NPG = np.array([[[0.0, 1.0], [5.0, 5.0]]])
    b_NPG = np.array([[[0.0, 2.0], [1.0, 2.0]]])
    assert pairwise_win_rate(a_NPG, b_NPG) == (1.5 / 4 + 1) / 2
    assert np.isnan(pairwise_win_rate(np.where(a_NPG == 1, math.nan, a_NPG), b_NPG))
    with pytest.raises(ValueError, match="same seeds and prompts"):
        pairwise_win_rate(a_NPG[:, :1], b_NPG)


def test_seeds_are_paired_by_their_numbers_not_by_their_places() -> None:
    curve_NM = np.array([[0, 1, 2], [0, 2, 4], [0, 3, 6.0]])
    baseline = make("grpo", curve_NM, seeds=(5, 6, 7))
    rows = rows_of("gopo", make("gopo", curve_NM[::-1] + [0, 0, 1], seeds=(7, 6, 9)), baseline)
    assert [row.gold_difference for row in rows[:2]] == [1, 1]
    assert math.isnan(rows[2].gold_difference) and math.isnan(rows[2].steps_to_gold)
    assert [row.compared_at for row in rows] == [20, 20, 0]
    assert estimate(rows, "gold_difference").seeds == 2


def test_a_straight_curve_reaches_the_target_where_the_line_does() -> None:
    slopes_N = np.array([2.0, 4.0, 0.5])
    rows = rows_of("gopo", make("gopo", slopes_N[:, None] * STEPS), make("grpo", np.ones((N, 1)) * STEPS))
    assert [row.steps_to_gold for row in rows] == [20 / 2, 20 / 4, math.inf]  # the target is 20 at step 20
    assert [row.steps_to_proxy for row in rows] == [20 / 2, 20 / 4, math.inf]
    assert reached(rows, "steps_to_gold") == (10, 2, 3)


def test_cells_of_other_lengths_are_compared_at_the_last_common_step() -> None:
    long = make("gopo", np.ones((N, 1)) * STEPS)
    short = make("grpo", np.ones((N, 1)) * STEPS)
    cut = {name: getattr(short, name)[:, :2] for name in ("proxy_NMPG", "gold_NMPG", "length_NMPG", "kl_NMPG")}
    short = short._replace(steps_M=STEPS[:2], **cut)
    assert [(row.gold_difference, row.gold, row.last_step) for row in rows_of("gopo", long, short)] == [(0, 20, 20)] * N


def test_without_the_baseline_there_are_numbers_but_no_comparison() -> None:
    tables = summarize([make("gopo"), make("rloo")], "test")
    assert all(math.isnan(row.win_rate) and math.isnan(row.steps_to_gold) for row in tables.rows)
    assert all(math.isfinite(row.gold) for row in tables.rows)
    first = dict(zip(sheet(tables).columns, sheet(tables).rows[0], strict=True))
    assert first["gold − grpo"] == first["win rate"] == first["steps to grpo's gold"] == "–"
    assert "±" in first["gold reward"]


# a cell alone


def test_peak_and_over_optimisation() -> None:
    rows = rows_of("grpo", make("grpo", np.array([[1, 4, 3], [1, 2, 5], [6, 2, 5.0]])))
    assert [(row.gold_peak, row.peak_step, row.over_optimisation) for row in rows] == [
        (4, 10, 1),
        (5, 20, 0),
        (6, 0, 1),
    ]
    assert [(row.gold_gain, row.proxy_gain, row.gain_gap) for row in rows] == [(2, 4, 2), (4, 8, 4), (-1, -2, -1)]


def test_gold_at_the_smaller_final_kl_of_the_two() -> None:
    curve_NM, ones_N1 = np.array([[0, 10, 12.0]]) * np.ones((N, 1)), np.ones((N, 1))
    far, near = make("gopo", curve_NM, kl_NM=ones_N1 * [0, 4, 8]), make("grpo", curve_NM, kl_NM=ones_N1 * [0, 1, 2])
    elsewhere = make("rloo", curve_NM, kl_NM=ones_N1 * [0, 0.5, 1], noise=0.3)
    found = by_cell(summarize([far, near, elsewhere], "test").rows)
    assert [(row.common_kl, row.gold_at_kl) for row in found[Cell("gopo")]] == [(2, 5)] * N  # half the way to 10
    assert [(row.gold_at_kl, row.gold_at_kl_difference) for row in found[Cell("grpo")]] == [(12, 0)] * N
    assert [row.gold_at_kl_difference for row in found[Cell("gopo")]] == [5 - 12] * N
    third = make("rloo", curve_NM, kl_NM=ones_N1 * [0, 0.5, 1])
    more = by_cell(summarize([far, near, third], "test").rows)
    assert more[Cell("gopo")] == found[Cell("gopo")], "whatever other methods are there"


def test_steps_without_a_correlation_are_left_out_of_its_mean() -> None:
    one = make("grpo")
    values_NY = np.array([[0.5, math.nan, 0.25], [math.nan] * 3, [1, 1, 1]])
    values = [row.rank_length for row in rows_of("grpo", one._replace(training={"rank_length": values_NY}))]
    assert values == [0.375, pytest.approx(math.nan, nan_ok=True), 1]


# intervals


def test_the_interval_is_students() -> None:
    values = np.array([1.0, 2.0, 4.0, 9.0])  # mean 4, s^2 = (9 + 4 + 0 + 25) / 3
    found = over_seeds(values)
    assert found.mean == 4 and found.seeds == 4
    assert found.half == pytest.approx(3.182446 * math.sqrt(38 / 3) / 2, rel=1e-6)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))


def test_more_prompts_with_the_same_seed_means_leave_the_interval() -> None:
    one = make("grpo")
    twice = {name: np.concatenate([getattr(one, name)] * 2, 2) for name in ("proxy_NMPG", "gold_NMPG", "kl_NMPG")}
    narrow = estimate(rows_of("grpo", one._replace(**twice)), "gold")
    assert narrow == estimate(rows_of("grpo", one), "gold") and narrow.half > 0


def test_a_single_seed_has_no_interval_and_says_so() -> None:
    assert math.isnan(over_seeds([1.5]).half) and over_seeds([1.5]).mean == 1.5
    shown = sheet(part("default", seeds=1))
    assert "no interval" in shown.note and not any("±" in cell or "[" in cell for row in shown.rows for cell in row)


def test_a_seed_that_diverged_is_not_hidden() -> None:
    curve_NM = np.array([[0, 1, 2], [0, 2, math.nan], [0, 3, 6.0]])
    rows = rows_of("gopo", make("gopo", curve_NM, kl_NM=curve_NM), make("grpo"))
    assert [math.isnan(row.win_rate) for row in rows] == [False, True, False]
    for name in ("gold", "gold_difference", "win_rate", "kl"):
        assert math.isnan(estimate(rows, name).mean) and estimate(rows, name).seeds == N
    assert [row.common_kl for row in rows] == [2, 10, 6]  # the other method's, where this one has none


# refused


def test_what_cannot_be_summarized_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one cell"):
        summarize([], "test")
    with pytest.raises(ValueError, match="gopo_g8.* once"):
        summarize([make("gopo"), make("gopo")], "test")
    with pytest.raises(ValueError, match=r"gold_NMPG: expected \[3 seeds, 3 evaluations"):
        summarize([make("gopo")._replace(gold_NMPG=np.zeros((N, 2, P, G)))], "test")


# files


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.lab.plots.lab_pictures", lambda *_: ([], []))


def test_the_files_hold_all_that_table_and_pictures_are_made_of(tmp_path: Path) -> None:
    tables = part("default")
    write(tables, tmp_path)
    again = read(tmp_path)
    np.testing.assert_equal(again.rows, tables.rows)  # NaN equals NaN there
    np.testing.assert_equal(again.curves, tables.curves)
    assert again[:3] == tables[:3] == ("lab default", (0, 1), "python 3, jax 0")
    assert sheet(again) == sheet(tables)
    text = (tmp_path / TABLE).read_text()
    assert sheet(tables).markdown() in text
    for name in ("reward_steps", "reward_kl", "differences", "effects"):
        assert f"(pictures/{name}.png)" in text
        assert (tmp_path / "pictures" / f"{name}.png").is_file() and (tmp_path / "pictures" / f"{name}.svg").is_file()


@pytest.mark.usefixtures("undrawn")
def test_files_that_are_read_and_written_again_are_the_same(tmp_path: Path) -> None:
    write(part("full"), tmp_path / "one")
    write(read(tmp_path / "one"), tmp_path / "other")
    for name in (RESULTS, CURVES, TABLE):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


@pytest.mark.usefixtures("undrawn")
def test_nan_and_infinity_survive_the_files(tmp_path: Path) -> None:
    slow, fast = np.ones((N, 1)) * STEPS / 2, np.ones((N, 1)) * STEPS
    tables = summarize([make("gopo", slow), make("grpo", fast), make("rloo", noise=0.3)], "a\nb")
    write(tables, tmp_path)
    rows = read(tmp_path).rows
    assert [row.steps_to_gold for row in rows if row.method == "gopo"] == [math.inf] * N
    assert all(math.isnan(row.steps_to_gold) for row in rows if row.method == "rloo")
    assert "not reached (0 of 3)" in (tmp_path / TABLE).read_text()


def test_files_of_another_form_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=RESULTS):
        read(tmp_path)
    (tmp_path / RESULTS).write_text("# command: x\nmethod,golden\n")
    with pytest.raises(ValueError, match=r"results\.csv: expected the columns of SeedRow.*golden"):
        read(tmp_path)


# pictures


def test_other_data_is_another_picture_and_the_same_data_the_same(tmp_path: Path) -> None:
    cells = by_cell(part("default").rows)
    other = {cell: [row._replace(gold_difference=row.seed + 1) for row in rows] for cell, rows in cells.items()}
    svgs = []
    for i, given in enumerate((cells, cells, other)):
        picture = difference_picture(Studio(tmp_path / str(i), METHODS), given)
        assert isinstance(picture, Picture) and "methods dr_grpo, rloo" in picture.caption
        svgs.append((tmp_path / str(i) / "differences.svg").read_text())
    assert svgs[0] == svgs[1] != svgs[2]


@pytest.mark.slow
def test_the_whole_grid_has_every_picture_and_leaves_nothing_out(tmp_path: Path) -> None:
    pictures, left_out = lab_pictures(tmp_path, part("full"))
    names = ["reward_steps", "reward_kl", "differences", "distortions", "effects"]
    assert [picture.name for picture in pictures] == names
    assert left_out == [] and not any("Left out" in picture.caption for picture in pictures)
    for picture in pictures:
        there = METHODS[:3] if picture.name == "reward_kl" else METHODS  # in equal_rms RLOO is Dr. GRPO
        assert all(f"<!-- {method} -->" in picture.svg for method in there if method != "grpo"), picture.name


def test_one_cell_alone_is_enough(tmp_path: Path) -> None:
    pictures, left_out = lab_pictures(tmp_path, summarize([make("gopo", seeds=(0,))], "test"))
    assert [picture.name for picture in pictures] == ["reward_steps", "reward_kl"]
    assert all("A single seed: no intervals" in picture.caption for picture in pictures)
    assert len(left_out) == 3
