"""The whole chain inside one process: cases, fits, evaluation, rows, verdicts, pages, at the smallest size there is."""
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from radrepro.core.volume import centred_grid, like, read_zarr, to_tensor, volume
from radrepro.ct5d import stages as ct5d
from radrepro.ct5d.evaluate import MASK, Pair, pair_metrics, wrong_traces
from radrepro.data.headneck import phantom_patient
from radrepro.data.thorax import Scan
from radrepro.dose.dvh import dose_indices
from radrepro.kv2ct import dosimetry
from radrepro.kv2ct import evaluate as kv2ct
from radrepro.report.claims import COLUMNS, RANDOM_SHIFT_ERROR_MM, add_verdicts, headline, rows_of
from radrepro.report.tables import show, show_patients, write_headline, write_tables
from radrepro.train.presets import PRESETS, CT5DPreset, DiffusionFit, KV2CTPreset, Preset, ViTFit
from radrepro.train.runs import fan_out

TINY = Preset("tiny", "0", KV2CTPreset(8, 2, ViTFit(7, (32,), (32,), 6, 4), ViTFit(9, (32,), (32,), 6, 4), 1, 2, 1, 2, 16.0, 8.0, 15, False),
              CT5DPreset((14, 16, 16), (22.0, 20.0, 22.0), 2, 0, 2, 5, 4, 2, DiffusionFit(3, 3, ddim_steps=2), batch=2))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("pipeline")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", TINY)
        tasks = ct5d.tasks(TINY, "phantom", "", str(out), "cpu", [0, 1]) + kv2ct.tasks(TINY, "phantom", "", str(out), "cpu", [0])
        tasks += dosimetry.dose_tasks(TINY, "phantom", "", str(out), "cpu", [0])
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
    # two patients x (primary, secondary, matched, two aligned) and the literal pair of one; two seeds x an autoencoder, four models; one set of scans a patient
    assert made["fit"] == 12 and made["models"] == 10 and made["scans"] == 2 and made["population"] == 1


def test_rows_carry_what_they_were_measured_with(run):
    _, values, rows = run
    assert list(rows.columns) == COLUMNS and rows.ours.notna().all() and set(rows.cohort) == {"phantom"}
    b = column(rows, paper="B", metric="masked_mse", detail=MASK, model="cvae_slice")
    assert list(b.seed.unique()) == ["0 1"] and set(b.patient) == {"1", "2", "mean"} and set(b.n) == {2}
    one = column(values, paper="B", metric="masked_mse", detail=MASK, model="cvae_slice", patient=1).value
    assert column(b, patient="1").ours.item() == pytest.approx(one.mean())
    assert column(b, patient="1").spread.item() == pytest.approx(np.std(one, ddof=1))
    shifts = column(rows, table=6, model="mean_ct", patient="1", detail="21 candidates, linear")
    assert shifts.n.item() == TINY.kv2ct.test_shifts and np.isfinite(shifts.spread.item())


def test_truth_is_best_and_what_ignores_the_trace_is_not_better_than_nothing(run):
    _, _, rows = run
    b = column(rows, paper="B", patient="mean", metric="masked_mse", detail=MASK).set_index("model").ours
    assert b["truth"] < b["none"] and b["truth"] < b["population"]
    j = column(rows, paper="B", patient="mean", metric="foldings").set_index("model").ours
    assert j["cvae_slice"] == j["truth"] == 0
    details = set(column(rows, paper="B", model="cvae_global", metric="masked_mse").detail)
    assert details == {MASK, MASK + ", z = 0"} | {f"{MASK}, {wrong} trace" for wrong in ("swapped", "zero", "mean", "reversed")}
    tre = column(rows, paper="B", patient="mean", metric="tre").set_index("model").ours
    assert tre["truth"] < 0.01 < tre["none"] and tre["population"] < tre["none"]


def test_registration_follows_the_shift_and_the_mean_ct_does_not(run):
    _, _, rows = run
    error = column(rows, table=6, patient="mean", detail="unbounded, cubic").set_index("model").ours
    assert error["registration_1dof"] < 1 < error["mean_ct"]
    capped = column(rows, table=6, detail="21 candidates, linear").ours
    assert capped.max() <= 1 and RANDOM_SHIFT_ERROR_MM == pytest.approx(11 / 21)


def test_dose_rows_lie_beside_the_print(run):
    pytest.importorskip("pyRadPlan", reason="dose needs the extra dose")
    out, _, rows = run
    a = rows[(rows.paper == "A") & rows.table.isin([3, 4, 5])]
    assert set(a.model) == set(dosimetry.MAIN_MODELS) and a[a.table < 5].ours.between(0, 100).all()
    printed = a[(a.model.isin(["fused", "primary"])) & (a.patient == "1") & (a.detail != "absolute difference")]
    missing = printed[printed.published.isna()].metric.unique()
    assert list(missing) == ["mandible_d0.03cc"]  # the paper has none for its patient 1
    signed, plain = (column(a, table=5, metric="ctv_d95", model="fused", patient="2", detail=d).ours.item() for d in ("sCT minus gCT", "absolute difference"))
    assert plain == abs(signed)
    stage = next(p.parent for p in out.glob("stages/kv2ct/dose/*/values.csv") if pd.read_csv(p).patient.iloc[0] == 2)
    patient = phantom_patient(2, voxel_mm=8)
    on = {n: dose_indices(read_zarr(stage / f"dose_{n}.zarr"), patient.structures, patient.prescription_gy) for n in ("truth", "fused", "mean_ct")}
    for model in ("fused", "mean_ct"):
        for metric in on["truth"]:
            row = column(a, table=5, metric=metric, model=model, patient="2", detail="sCT minus gCT").ours.item()
            assert row == pytest.approx(on[model][metric] - on["truth"][metric], abs=1e-6)
    real = column(a, table=4, patient="mean", detail="2%2mm, gCT as reference")
    loose = column(a, table=4, patient="mean", detail="3%3mm, gCT as reference")
    assert (loose.set_index("model").ours >= real.set_index("model").ours).all()


def test_a_patient_without_a_ctv_is_a_row_that_says_why(tmp_path, monkeypatch):
    from radrepro.data import cohorts

    pytest.importorskip("pyRadPlan", reason="dose needs the extra dose")
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    whole = cohorts.HeadNeckCase.load

    def without(self, voxel_mm):
        patient = whole(self, voxel_mm)
        return replace(patient, structures={k: v for k, v in patient.structures.items() if k != "ctv"})

    monkeypatch.setattr(cohorts.HeadNeckCase, "load", without)
    case = cohorts.HeadNeckCase(2, "phantom")
    path = dosimetry.run_dose(case, "tiny", dosimetry.hlut_of_tables(), 0, str(tmp_path), "cpu")
    rows = rows_of(pd.read_csv(path), cohort="phantom", preset="tiny")
    why = rows[rows.ours.isna()]
    assert set(why.table) == {4, 5} and why.detail.str.contains("expected a CTV to plan for").all() and (why.n == 0).all()
    assert add_verdicts(rows).verdict.notna().all() and (rows.table == 3).any() and not list(tmp_path.glob("stages/dose/plan/*/plan.json"))


def test_pages_and_files(run, tmp_path):
    _, _, rows = run
    claims = headline(rows)
    assert {True, False} >= {h for h in claims.holds if h is not None} and claims.value.str.len().min() > 0
    assert claims[claims.claim.str.contains("truth")].holds.isna().all()
    paths = write_tables(rows, tmp_path, {"seconds": 1})
    text = write_headline(claims, "tiny preset, phantom cohort", tmp_path).read_text()
    assert [p.name for p in paths] == [*(f"a_table{n}.csv" for n in range(1, 7)), "b_table1.csv", "summary.json"]
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
    scan = Scan(ct, ct.z * 0, ct.z * 0, 1)
    point = np.zeros((1, 3))
    rows = pair_metrics(Pair(scan, scan, scan, mask, None, point, point + [3.0, 0.0, 4.0], 0), to_tensor(ct + 0.1 * ~mask))
    found = {r["metric"]: r["value"] for r in rows}
    assert found["masked_mse"] == 0 and found["outside_mse"] == pytest.approx(0.01, rel=1e-4)
    assert found["mse"] == pytest.approx(0.01 * float((~mask).mean()), rel=1e-4)
    assert found["tre"] == 5.0 and "foldings" not in found and "dice" not in found


def test_wrong_traces_are_wrong():
    z = np.arange(5.0)
    own, other = (xr.DataArray(a, coords={"z": z}, dims="z") for a in ([0.0, 0.1, 0.4, 0.9, 1.0], [1.0, 0.5, 0.2, 0.1, 0.0]))
    ct = volume(np.zeros((5, 4, 4)), z=z, y=np.arange(4.0), x=np.arange(4.0), units="1")
    scan = lambda amplitude: Scan(ct, amplitude, amplitude * 0, 1)
    wrong = wrong_traces(Pair(scan(other), scan(own), scan(other), ct > 0, None, np.zeros((1, 3)), np.zeros((1, 3)), 0))
    assert wrong["swapped trace"].tolist() == other.values.tolist() and wrong["reversed trace"].tolist() == own.values[::-1].tolist()
    assert not wrong["zero trace"].any() and wrong["mean trace"] == pytest.approx(np.full(5, 0.48))
