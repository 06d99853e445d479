"""The whole chain inside one process: cases, fits, evaluation, rows, verdicts, pages, at the smallest size there is."""
import numpy as np
import pandas as pd
import pytest

from radrepro.core.volume import centred_grid, like, to_tensor, volume
from radrepro.ct5d import evaluate as ct5d
from radrepro.kv2ct import evaluate as kv2ct
from radrepro.report.claims import COLUMNS, RANDOM_SHIFT_ERROR_MM, add_verdicts, headline, rows_of
from radrepro.report.tables import show, show_patients, write_headline, write_tables
from radrepro.train.presets import PRESETS, CT5DPreset, KV2CTPreset, Preset, ViTFit
from radrepro.train.runs import fan_out

TINY = Preset("tiny", "0", KV2CTPreset(8, 2, ViTFit(7, (32,), (32,), 6, 4), ViTFit(9, (32,), (32,), 6, 4), 1, 2),
              CT5DPreset((14, 16, 16), (22.0, 20.0, 22.0), 2, 0, 2, 3, 4, 2, batch=2))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("pipeline")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", TINY)
        tasks = ct5d.tasks(TINY, "phantom", "", str(out), "cpu", [0, 1]) + kv2ct.tasks(TINY, "phantom", "", str(out), "cpu", [0])
        tasks = [t for t in tasks if t.name != "A: residual curve"]
        paths = fan_out(tasks, workers=0)
        again = fan_out(tasks, workers=0)
    assert paths == again
    values = pd.concat([pd.read_csv(p) for p in paths.values() if str(p).endswith("values.csv")], ignore_index=True)
    return out, values, add_verdicts(rows_of(values, cohort="phantom", preset="tiny"))


def column(rows, **where):
    for name, value in where.items():
        rows = rows[rows[name] == value]
    return rows


def test_stages_are_shared_between_tasks(run):
    out, _, _ = run
    made = {p.parent.parent.name: len(list(p.parent.parent.iterdir())) for p in out.glob("stages/*/*/*/stage.json")}
    # two patients x (primary, secondary, matched) and the literal pair of one; two seeds x two modes; 2 patients x 2 seeds of B + 2 of A
    assert made["fit"] == 8 and made["cvae"] == 4 and made["scans"] == 2 and made["population"] == 1


def test_rows_carry_what_they_were_measured_with(run):
    _, values, rows = run
    assert list(rows.columns) == COLUMNS and rows.ours.notna().all() and set(rows.cohort) == {"phantom"}
    b = column(rows, paper="B", metric="masked_mse", detail=ct5d.MASK, model="cvae_slice")
    assert list(b.seed.unique()) == ["0 1"] and set(b.patient) == {"1", "2", "mean"} and set(b.n) == {2}
    one = column(values, paper="B", metric="masked_mse", detail=ct5d.MASK, model="cvae_slice", patient=1).value
    assert column(b, patient="1").ours.item() == pytest.approx(one.mean())
    assert column(b, patient="1").spread.item() == pytest.approx(np.std(one, ddof=1))
    shifts = column(rows, table=6, model="mean_ct", patient="1", detail="21 candidates, linear")
    assert shifts.n.item() == TINY.kv2ct.test_shifts and np.isfinite(shifts.spread.item())


def test_truth_is_best_and_what_ignores_the_trace_is_not_better_than_nothing(run):
    _, _, rows = run
    b = column(rows, paper="B", patient="mean", metric="masked_mse", detail=ct5d.MASK).set_index("model").ours
    assert b["truth"] < b["none"] and b["truth"] < b["population"]
    j = column(rows, paper="B", patient="mean", metric="foldings").set_index("model").ours
    assert j["cvae_slice"] == j["truth"] == 0
    details = set(column(rows, paper="B", model="cvae_global", metric="masked_mse").detail)
    assert details == {ct5d.MASK, ct5d.MASK + ", swapped trace", ct5d.MASK + ", z = 0"}


def test_registration_follows_the_shift_and_the_mean_ct_does_not(run):
    _, _, rows = run
    error = column(rows, table=6, patient="mean", detail="unbounded, cubic").set_index("model").ours
    assert error["registration_1dof"] < 1 < error["mean_ct"]
    capped = column(rows, table=6, detail="21 candidates, linear").ours
    assert capped.max() <= 1 and RANDOM_SHIFT_ERROR_MM == pytest.approx(11 / 21)


def test_pages_and_files(run, tmp_path):
    _, _, rows = run
    claims = headline(rows)
    assert {True, False} >= {h for h in claims.holds if h is not None} and claims.value.str.len().min() > 0
    assert claims[claims.claim.str.contains("truth")].holds.isna().all()
    paths = write_tables(rows, tmp_path, {"seconds": 1})
    text = write_headline(claims, "tiny preset, phantom cohort", tmp_path).read_text()
    assert [p.name for p in paths] == ["a_table1.csv", "a_table2.csv", "a_table6.csv", "b_table1.csv", "summary.json"]
    assert len(text.splitlines()) == len(claims) + 1
    page = show(column(rows, paper="A", table=2, patient="mean"), "Paper A, Table 2").to_html()
    assert "trend" in page and "phantom cohort" in page
    wide = show_patients(column(rows, paper="A", table=1), "Paper A, Table 1", digits=0).to_html()
    assert "21812" in wide and "21816" in wide


def test_the_residual_curve_is_a_phantoms_whatever_the_cohort(tmp_path, monkeypatch):
    monkeypatch.setattr(kv2ct, "RESIDUALS_MM", (0.0, 3.0))
    values = pd.read_csv(kv2ct.run_residuals([1], 8, str(tmp_path)))
    rows = rows_of(values, cohort="real", preset="tiny")
    assert set(rows.cohort) == {"phantom"} and rows.detail.str.contains("8 mm voxels").all()


def test_inside_and_outside_of_the_mask_are_not_confused():
    """An error of 0.1 outside of the mask alone is an outside error of 0.01 and no masked one."""
    grid = centred_grid((16, 16, 16), 5.0)
    ct = volume(np.full((16, 16, 16), 0.5, np.float32), **grid, units="1")
    mask = like(np.abs(ct.z.values)[:, None, None] < 20 + np.zeros(ct.shape), ct)
    fixed = ct5d.Scan(ct, ct.z * 0, ct.z * 0, 1)
    rows = ct5d.pair_metrics(to_tensor(ct + 0.1 * ~mask), fixed, mask)
    found = {r["metric"]: r["value"] for r in rows}
    assert found["masked_mse"] == 0 and found["outside_mse"] == pytest.approx(0.01, rel=1e-4)
    assert found["mse"] == pytest.approx(0.01 * float((~mask).mean()), rel=1e-4)
