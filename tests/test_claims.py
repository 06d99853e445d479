"""The direction of every verdict: an error must be small, a pass rate large, a difference small in size whatever its sign."""
from __future__ import annotations

import pandas as pd
import pytest

from radrepro.report.claims import add_verdicts, comparisons, headline, rows_of


def judged(table, metric, detail, *, paper="A", **ours):
    """Verdict of each model of one patient, whose values are `ours`."""
    values = pd.DataFrame([{"paper": paper, "table": table, "patient": "1", "model": m, "metric": metric, "unit": "", "detail": detail, "seed": 0, "value": v}
                           for m, v in ours.items()])
    rows = add_verdicts(rows_of(values, cohort="phantom", preset="quick"))
    return rows.set_index("model").verdict


@pytest.mark.parametrize("table, metric, detail, better, worse", [
    (2, "mae", "whole", 10.0, 12.0),
    (3, "hu_gamma", "2%2mm, gCT as reference, HU + 1000", 95.0, 90.0),
    (4, "dose_gamma", "2%2mm, gCT as reference", 95.0, 90.0),
    (5, "ctv_d95", "sCT minus gCT", -0.5, 1.0),
    (5, "ctv_d95", "sCT minus gCT", 0.5, -1.0),
    (5, "ctv_d95", "absolute difference", 0.5, 1.0),
])
def test_the_better_of_two_models_of_paper_a(table, metric, detail, better, worse):
    for fused, primary, word in ((better, worse, "trend holds"), (worse, better, "trend fails")):
        verdict = judged(table, metric, detail, fused=fused, primary=primary, mean_ct=worse)
        assert verdict["fused"].startswith(word) and verdict["primary"].startswith(word)
        assert verdict["mean_ct"] == "not in the paper"


def test_shifted_kv_is_judged_against_the_mean_ct():
    verdict = judged(2, "mae", "whole, shifted kV", fused=12.0, primary=10.0, mean_ct=14.0)
    assert verdict["fused"].startswith("trend holds")
    assert judged(2, "mae", "whole, shifted kV", fused=12.0, primary=14.0, mean_ct=10.0)["fused"].startswith("trend fails")


@pytest.mark.parametrize("metric, better, worse", [("masked_mse", 0.01, 0.02), ("mse", 0.01, 0.02), ("ms_ssim", 0.99, 0.95)])
def test_a_model_of_paper_b_is_judged_against_no_deformation(metric, better, worse):
    for mine, none, word in ((better, worse, "trend holds"), (worse, better, "trend fails")):
        assert judged(1, metric, "lung + 10 mm", paper="B", none=none, cvae_slice=mine)["cvae_slice"].startswith(word)


@pytest.mark.parametrize("table, metric, detail, sign", [(2, "mae", "whole", -1), (3, "hu_gamma", "2%2mm, gCT as reference, HU + 1000", 1),
                                                         (4, "dose_gamma", "2%2mm, gCT as reference", 1), (6, "shift_error", "unbounded, cubic", -1)])
def test_the_one_sided_p_asks_whether_the_dual_model_is_better(table, metric, detail, sign):
    gains = [1.0, 1.2, 0.9, 1.1, 1.0]  # by how much the dual model is better
    values = pd.DataFrame([{"paper": "A", "table": table, "patient": str(i), "model": m, "metric": metric, "unit": "", "detail": detail, "seed": 0,
                            "value": 50.0 + i + (sign * g if m == "fused" else 0.0)} for i, g in enumerate(gains) for m in ("fused", "primary")])
    line = comparisons(rows_of(values, cohort="phantom", preset="quick")).iloc[0]
    assert line.rival == "primary" and line.n == 5 and line.p_one_sided < 0.001 and line.p_two_sided == pytest.approx(2 * line.p_one_sided)
    assert line.mean_difference == pytest.approx(sign * sum(gains) / 5)
    assert line.ci_low <= line.mean_difference <= line.ci_high and sign * line.ci_low > 0 and sign * line.hedges_g > 0


@pytest.mark.parametrize(("paper", "table", "metric", "detail", "claim", "low", "high"), [
    ("B", 1, "outside_mse", "outside of the mask", "outside of the mask, MSE", "cvae_slice", "none"),
    ("B", 1, "masked_mse", "lung + 10 mm", "mean patient's motion", "cvae_slice", "population"),
    ("A", 2, "mae", "whole", "dual model below its primary model, MAE", "fused", "primary"),
    ("A", 2, "mae", "whole, shifted kV", "below registration_1dof, MAE, shifted kV", "fused_aligned", "registration_1dof"),
    ("A", 6, "shift_error", "unbounded, cubic", "below fused, unbounded shift error", "fused_aligned", "fused"),
    ("A", 3, "hu_gamma", "2%2mm, gCT as reference, HU + 1000", "gamma of HU", "primary", "fused"),
    ("A", 4, "dose_gamma", "2%2mm, gCT as reference", "gamma of dose", "primary", "fused"),
    ("A", 5, "ctv_d95", "absolute difference", "DVH difference| of CTV", "fused", "primary"),
    ("A", 5, "mandible_d0.03cc", "absolute difference", "DVH difference| of organs", "fused", "primary"),
])
def test_a_headline_holds_on_one_side_only(paper, table, metric, detail, claim, low, high):
    """`low` names the model with the smaller number where the claim holds."""
    for small, large, holds in ((low, high, True), (high, low, False)):
        values = pd.DataFrame([{"paper": paper, "table": table, "patient": str(i), "model": m, "metric": metric, "unit": "", "detail": detail, "seed": 0,
                                "value": v + 0.1 * i} for i in range(4) for m, v in ((small, 1.0), (large, 2.0))])
        found = headline(rows_of(values, cohort="phantom", preset="quick"))
        line = found[found.claim.str.contains(claim, regex=False)]
        assert len(line) == 1 and bool(line.holds.item()) is holds, line
        assert bool(line.reason.item()) is not holds  # a failing claim says why
