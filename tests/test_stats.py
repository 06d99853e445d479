"""metrics.stats: hand-derived values, invariants of a paired comparison, its edges, and the papers' own numbers."""
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from radrepro.data.manifests import read_claims
from radrepro.metrics.stats import bootstrap_interval, compare_paired, spread

# two decimals, as the papers print: sums and differences on paper are exact, in floating point they are not
columns = st.integers(3, 12).flatmap(lambda n: st.tuples(*(st.lists(st.integers(-9999, 9999).map(lambda k: k / 100),
                                                                      min_size=n, max_size=n) for _ in "ab")))


def test_the_papers_own_spread_and_p_come_out():
    table = read_claims("kv2ct_table2").set_index("patient")
    rows = table[table.index.str.fullmatch(r"\d+")]
    for column in ("mae_kv2ct_hu", "mae_primary_hu", "difference_hu"):
        s = spread(rows[column])
        assert s.n == 10 and abs(s.mean - table[column]["printed_mean"]) < 0.006
        assert abs(s.sd - table[column]["printed_sd"]) < 0.011  # printed truncated: n - 1, not n
        assert abs(np.std(rows[column]) - table[column]["printed_sd"]) > 0.1
    c = compare_paired(rows.mae_kv2ct_hu, rows.mae_primary_hu)
    assert round(c.t_one_sided_p, 5) == float(read_claims("errata").set_index("id").printed["A18"])
    assert (c.mean_difference, c.sd_difference) == pytest.approx(spread(rows.difference_hu)[:2], abs=1e-9)


def test_spread_and_interval_edges():
    assert spread([3, 3, 3]) == (3, 0, 3) and np.isnan(spread([3]).sd)
    with pytest.raises(ValueError, match="at least one value"):
        spread([np.nan])
    values = np.random.default_rng(0).normal(5, 2, 50)
    wide, narrow = bootstrap_interval(values, 1, level=0.99), bootstrap_interval(values, 1, level=0.5)
    assert wide[0] < narrow[0] < values.mean() < narrow[1] < wide[1]
    assert bootstrap_interval([4, 4, 4], 0) == (4, 4) and bootstrap_interval(values, 1) != bootstrap_interval(values, 2)


def test_a_comparison_by_hand():
    """Two degrees of freedom have a closed form: p = 1 - |t| / sqrt(2 + t^2). Signed ranks are counted on the fingers."""
    c = compare_paired([5, 1, 0], [1, 0, -2])  # 4, 1, 2
    t = (7 / 3) / math.sqrt(7 / 3 / 3)
    assert c.n == 3 and c.mean_difference == pytest.approx(7 / 3) and c.sd_difference == pytest.approx(math.sqrt(7 / 3))
    assert c.t_two_sided_p == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert c.t_one_sided_p == pytest.approx(1 - c.t_two_sided_p / 2)  # a is larger
    assert c.hedges_g == pytest.approx(math.sqrt(7 / 3) / math.sqrt(math.pi))  # J(2) = 1 / sqrt(pi)
    # 1, 2, 3, -4 times 1: ranks against are 4; of the 16 sign patterns, those with 4 or less against are {}, 1, 2, 3, 4, 12, 13
    assert compare_paired([1, 2, 3, -4], [0, 0, 0, 0]).wilcoxon_two_sided_p == pytest.approx(2 * 7 / 16)


def test_ties_and_zeros_are_seen_through_floating_point_and_stay_exact():
    """0.3 - 0.2 and 0.2 - 0.1 are one tie; 1.1 - 1.0 too; |d| all tied: 4 of 4 one way is 2 of 16, 3 of 4 is 10 of 16."""
    assert compare_paired([0.3, 0.2, 1.1, 0.9], [0.2, 0.1, 1.0, 1.0]).wilcoxon_two_sided_p == pytest.approx(10 / 16)
    one_way = compare_paired([0.3, 0.2, 1.1, 1.0], [0.2, 0.1, 1.0, 0.9])
    assert one_way.wilcoxon_two_sided_p == pytest.approx(2 / 16)
    assert one_way.sd_difference == 0 and np.isnan([one_way.t_two_sided_p, one_way.t_one_sided_p, one_way.hedges_g]).all()
    assert one_way[-3:-1] == pytest.approx((0.1, 0.1))
    with_zero = compare_paired([0.1 + 0.2, 1, 2, 3], [0.3, 0, 0, 0])  # the zero has no sign: 2 of 8 are left
    assert with_zero.n == 4 and with_zero.wilcoxon_two_sided_p == pytest.approx(2 / 8)


@given(columns)
@settings(max_examples=60, deadline=None)
def test_swapping_the_methods_flips_signs_only(ab):
    a, b = ab
    assume(len({round(x - y, 6) for x, y in zip(a, b)}) > 1)
    c, s = compare_paired(a, b), compare_paired(b, a)
    assert s.mean_difference == pytest.approx(-c.mean_difference) and s.hedges_g == pytest.approx(-c.hedges_g)
    assert s.sd_difference == pytest.approx(c.sd_difference)
    assert s.t_two_sided_p == pytest.approx(c.t_two_sided_p) and s.wilcoxon_two_sided_p == pytest.approx(c.wilcoxon_two_sided_p)
    assert s.t_one_sided_p == pytest.approx(1 - c.t_one_sided_p)
    assert (s.ci_low, s.ci_high) == pytest.approx((-c.ci_high, -c.ci_low), abs=1e-9)  # the same draws, mirrored
    assert c.t_two_sided_p == pytest.approx(2 * min(c.t_one_sided_p, 1 - c.t_one_sided_p))
    assert c.ci_low - 1e-9 <= c.mean_difference <= c.ci_high + 1e-9


@given(columns, st.integers(-3, 3), st.integers(-50, 50))
@settings(max_examples=40, deadline=None)
def test_units_and_offsets_do_not_change_a_verdict(ab, power, offset):
    a, b = (np.array(v) for v in ab)
    assume(np.ptp(np.round(a - b, 6)) > 0)
    k = 10.0**power
    c, scaled = compare_paired(a, b), compare_paired(k * (a + offset), k * (b + offset))
    pick = ("t_one_sided_p", "t_two_sided_p", "wilcoxon_two_sided_p", "hedges_g")
    assert [getattr(scaled, f) for f in pick] == pytest.approx([getattr(c, f) for f in pick], rel=1e-6)
    assert scaled.mean_difference == pytest.approx(k * c.mean_difference) and scaled.ci_low == pytest.approx(k * c.ci_low, abs=1e-9 * k)


def test_pairs_are_what_is_compared():
    """The same two columns, one of them shuffled, are another comparison: patients must not be mixed up."""
    a = np.arange(10.0)
    together, shuffled = compare_paired(a, a + 1 + 0.01 * a), compare_paired(a, np.roll(a + 1 + 0.01 * a, 3))
    assert together.mean_difference == pytest.approx(shuffled.mean_difference)
    assert together.t_two_sided_p < 1e-9 and shuffled.t_two_sided_p > 0.3


def test_edges():
    c = compare_paired([1, 2, np.nan, 4, 9], [2, 4, 1, 7, np.nan])
    assert c.n == 3 and c.mean_difference == -2 and c.t_one_sided_p == pytest.approx(c.t_two_sided_p / 2)
    same = compare_paired([1, 2, 3], [1, 2, 3])
    assert same[:3] == (3, 0, 0) and (same.ci_low, same.ci_high) == (0, 0)
    assert np.isnan([same.t_one_sided_p, same.t_two_sided_p, same.wilcoxon_two_sided_p, same.hedges_g]).all()
    with pytest.raises(ValueError, match="pair them by patient"):
        compare_paired([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="at least 3 pairs without NaN, got 2"):
        compare_paired([1, 2, np.nan], [2, 4, 5])
    with pytest.raises(ValueError, match="infinite"):
        compare_paired([1, 2, 3], [2, np.inf, 5])


def test_the_seed_and_the_level_reach_the_interval():
    a, b = np.random.default_rng(5).normal(0, 1, (2, 10))
    one, again, other, wide = (compare_paired(a, b, **k) for k in ({}, {"seed": 0}, {"seed": 1}, {"level": 0.99}))
    assert one == again and one.ci_low != other.ci_low and one[:6] == other[:6]
    assert wide.ci_low < one.ci_low < one.ci_high < wide.ci_high


def test_on_simulated_patients():
    """Normal differences with mean 0.5 sd, n = 10: nine of ten intervals hold it, g has no bias (d has 9 %), p under H0 is uniform."""
    rng = np.random.default_rng(11)
    studies = [compare_paired(d, np.zeros(10), seed=i) for i, d in enumerate(rng.normal(0.5, 1, (400, 10)))]
    held = np.mean([c.ci_low < 0.5 < c.ci_high for c in studies])
    assert 0.85 < held < 0.95  # a percentile interval of ten values is a little short
    assert np.mean([c.hedges_g for c in studies]) == pytest.approx(0.5, abs=0.04)  # sd of the mean: 0.018
    null = [compare_paired(d, np.zeros(10), seed=i) for i, d in enumerate(rng.normal(0, 1, (400, 10)))]
    for field in ("t_one_sided_p", "t_two_sided_p", "wilcoxon_two_sided_p"):
        p = np.array([getattr(c, field) for c in null])
        assert 0.02 < np.mean(p < 0.05) < 0.085 and 0.45 < p.mean() < 0.55
