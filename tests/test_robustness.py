"""What the test kV may bring that the training did not: its noise, its metal, its shift; and more or fewer training sessions."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from radrepro.core.project import METAL_ABOVE_HU, METAL_G_CM3
from radrepro.core.volume import centred_grid, spacing_mm, volume
from radrepro.data.cohorts import HeadNeckCase
from radrepro.data.headneck import phantom_patient, reproject
from radrepro.kv2ct import robustness
from radrepro.kv2ct.evaluate import CONVERTERS, LITERAL_CONVERTERS, averaged, fit_models, predictors
from radrepro.kv2ct.grss import shift_rows
from radrepro.kv2ct.robustness import (
    MOUTH_MM,
    PHOTONS,
    REACH_MM,
    SHIFTS_MM,
    TITANIUM_CM3,
    dental_metal,
    followed_mm,
    measured,
    metal_rows,
    noise_rows,
    reach_rows,
    retaken_kv,
    robustness_tasks,
    with_sessions,
)
from radrepro.train.presets import PRESETS, KV2CTPreset, Preset, ViTFit

SMALLEST = KV2CTPreset(8, 2, ViTFit(7, (32,), (32,), 4, 4), ViTFit(9, (32,), (32,), 4, 4), 0, 2, 1, 2)


@pytest.fixture(scope="module")
def patient():
    return phantom_patient(2, voxel_mm=8, seed=5)


def values(rows, metric):
    return pd.DataFrame(rows).query("metric == @metric").set_index(["model", "detail"]).value


def moved_truth(patient, by_mm):
    return shift_rows(torch.from_numpy(patient.test.ct.values).float(), by_mm / 8.0, dim=0)


# --- the test kV ----------------------------------------------------------------------------------------------------

def test_the_kv_taken_again_as_it_was_is_the_test_kv(patient):
    np.testing.assert_array_equal(retaken_kv(patient), patient.test.kvs[0].values)
    np.testing.assert_array_equal(retaken_kv(patient, shift_mm=-6.0), reproject(patient, patient.test, -6.0).values)


def test_noise_is_that_of_counting(patient):
    """In the open field var(-ln I) is 1 / photons per pixel."""
    clean = retaken_kv(patient, photons=np.inf)
    open_field = clean.abs() < 0.02
    assert open_field.sum() > 1000
    for photons in (0.1, 0.01):
        counts = photons * patient.physics.photons_per_mm2 * patient.geometry.pixel_mm**2
        noise = (retaken_kv(patient, photons=photons) - clean)[open_field]
        assert float(noise.std()) == pytest.approx(counts**-0.5, rel=0.05)


def test_a_day_without_noise_stays_without_noise(patient):
    quiet = replace(patient, physics=replace(patient.physics, photons_per_mm2=None))
    np.testing.assert_array_equal(retaken_kv(quiet, photons=0.01), retaken_kv(patient, photons=np.inf))


@pytest.mark.parametrize("photons", [0.0, -1.0, float("nan")])
def test_no_photons_is_no_image(patient, photons):
    with pytest.raises(ValueError, match=r"expected photons > 0 .* got"):
        retaken_kv(patient, photons=photons)


def test_a_shift_up_moves_the_image_up(patient):
    """Near the isocentre's plane by magnification / pitch rows a mm, to higher rows."""
    at, up = (retaken_kv(patient, shift_mm=s, photons=np.inf).double() for s in (0.0, 8.0))
    head = patient.geometry.v_mm > 40
    profile = [i[0][head].mean(1).numpy() for i in (at, up)]
    cost = [np.abs(profile[1][10:-10] - np.roll(profile[0], k)[10:-10]).mean() for k in range(-4, 5)]
    assert int(np.argmin(cost)) - 4 == round(8.0 * patient.geometry.magnification / patient.geometry.pixel_mm) == 2


# --- metal ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("titanium_cm3", [0.1, *TITANIUM_CM3, 20.0])
def test_titanium_has_the_volume_asked_for_and_lies_in_the_mouth(patient, titanium_cm3):
    truth = patient.test.truth
    share = dental_metal(truth, titanium_cm3)
    assert share.shape == truth.shape and 0 <= float(share.min()) and float(share.max()) <= 1 + 1e-6
    assert float(share.sum()) * np.prod(spacing_mm(share)) / 1000 == pytest.approx(titanium_cm3, rel=1e-4)
    outside = share.copy()
    outside.loc[{a: truth.sel({a: s})[a] for a, s in MOUTH_MM.items()}] = 0
    assert not outside.any()
    filled = truth.values[share.values > 0]
    rest = truth.sel(MOUTH_MM).values[share.sel(MOUTH_MM).values == 0]
    assert filled.min() >= rest[rest <= METAL_ABOVE_HU].max()  # the densest first


def test_titanium_goes_into_the_teeth_and_not_into_what_is_metal_already():
    ct = volume(np.full((24, 24, 24), 0.0, np.float32), **centred_grid((24, 24, 24), 8.0), units="HU")
    ct.values[8, 6, 12], ct.values[8, 6, 13], ct.values[8, 6, 14], ct.values[20, 6, 12] = 1800, 1900, 3000, 2000  # the last: not in the mouth
    share = dental_metal(ct, 0.512)
    assert share.values[8, 6, 12] == share.values[8, 6, 13] == pytest.approx(0.5) and np.count_nonzero(share) == 2
    with pytest.raises(ValueError, match="expected room for 10000 cm3"):
        dental_metal(ct, 10000)
    with pytest.raises(ValueError, match="expected 'HU'"):
        dental_metal(ct.assign_attrs(units="g/cm3"), 1.0)


def test_titanium_casts_its_own_shadow(patient):
    """The projected metal's mass follows its volume; the shadow is positive and lies where the mouth is."""
    shares = [dental_metal(patient.test.truth, v) for v in TITANIUM_CM3]
    clean = retaken_kv(patient, photons=np.inf)
    shadows = [(retaken_kv(patient, photons=np.inf, metal=s) - clean).numpy() for s in shares]
    assert shadows[1].sum() > 2 * shadows[0].sum() > 0 and METAL_G_CM3 > 4
    for view, image in enumerate(shadows[1]):
        weight = np.where(image > 0.1, image, 0)
        v = (weight.sum(1) @ patient.geometry.v_mm) / weight.sum()
        u = (weight.sum(0) @ patient.geometry.u_mm) / weight.sum()
        assert 1.4 * -75 < v < 1.6 * -10, view
        assert (abs(u) < 80) if view == 0 else (u < 1.4 * -25)  # from the side the mouth is anterior: u is posterior


# --- measuring ------------------------------------------------------------------------------------------------------

def test_a_perfect_model_has_no_error_and_one_that_lags_has_its_lag(patient):
    for shift in (0.0, 6.0, -8.0):
        models = {"fused": lambda kv, s=shift: moved_truth(patient, s), "fused_aligned": lambda kv, s=shift: moved_truth(patient, s - 3.0)}
        rows = measured(patient, models, retaken_kv(patient), "here", shift_mm=shift)
        error = values(rows, "shift_error")
        assert error["fused", "here"] == pytest.approx(0, abs=1e-6) and error["fused_aligned", "here"] == pytest.approx(3.0, abs=0.11)
        assert values(rows, "mae")["fused", "here"] == 0 < values(rows, "mae")["fused_aligned", "here"]


def test_averaged_keeps_the_spread_and_the_count(patient):
    rows = [{"table": 7, "model": "fused", "metric": "mae", "unit": "HU", "detail": d, "value": v} for d, v in (("a", 1.0), ("b", 5.0), ("a", 4.0))]
    a, b = averaged(rows)
    assert (a["detail"], a["value"], a["count"]) == ("a", 2.5, 2) and a["sd"] == pytest.approx(4.5**0.5)
    assert (b["value"], b["count"]) == (5.0, 1) and np.isnan(b["sd"])


@pytest.mark.parametrize("bias_mm", [0.0, 0.9, 3.0, -5.0])
@pytest.mark.parametrize(("share", "reached"), [(0.0, 0.0), (1.0, 8.0), (0.8, 4.5), (0.5, 0.0)])
def test_how_far_a_model_follows_does_not_depend_on_where_it_starts(bias_mm, share, reached):
    """It answers share * s + bias for a shift s, so |error| is |(1 - share) s - bias|; the worse side counts."""
    error = {s: abs((1 - share) * s - bias_mm) for s in SHIFTS_MM}
    assert followed_mm(error) == reached


def test_a_gap_ends_it():
    assert followed_mm({0.0: 0.0, 2.0: 5.0, 8.0: 0.0}) == 0 and followed_mm({0.0: 0.0, 2.0: 0.5, -2.0: 0.9, 8.0: 7.0}) == 2
    with pytest.raises(ValueError, match="expected the error of shift 0"):
        followed_mm({1.0: 0.0})


def test_registration_follows_beyond_the_training_range_and_the_mean_ct_does_not(patient):
    models = predictors(patient, {})
    rows = reach_rows(patient, models, (0.0, 8.0, -8.0))
    follows, error = (values(rows, m) for m in ("follows_to", "shift_error"))
    assert sorted(follows.droplevel("detail").to_dict().items()) == [("mean_ct", 0.0), ("registration_1dof", 8.0)]
    assert error["registration_1dof", "S-I shift 8 mm"] < 1 and error["mean_ct", "S-I shift 8 mm"] == pytest.approx(8.0, abs=0.5)
    assert error.max() < REACH_MM
    counts = pd.DataFrame(rows).query("metric == 'mae' and model == 'mean_ct'").set_index("detail")["count"]
    assert counts.to_dict() == {"S-I shift 0 mm": 1, "S-I shift 8 mm": 2}


def test_what_ignores_the_kv_does_not_change_with_it(patient):
    rows = noise_rows(patient, predictors(patient, {})) + metal_rows(patient, predictors(patient, {}))
    mae = values(rows, "mae")
    assert mae["mean_ct"].nunique() == 1 and len(mae["mean_ct"]) == len(PHOTONS) + len(TITANIUM_CM3)
    assert mae["registration_1dof", "test kV, noise-free"] <= mae["registration_1dof", "test kV, photons x 0.01"] + 0.1


# --- sessions -------------------------------------------------------------------------------------------------------

def test_other_numbers_of_sessions_keep_the_test_session_and_the_first_ones(patient):
    for n in (1, 2, 3, 5):
        other = with_sessions(patient, n, 5)
        assert other.test is patient.test and len(other.training) == n
        assert all(a is b for a, b in zip(other.training, patient.training, strict=False))
        assert len({s.week for s in other.sessions}) == len({s.name for s in other.sessions}) == n + 1
        assert (other.source == patient.source) == (n == 2)
    again, five = with_sessions(patient, 3, 5).training[2], other.training
    np.testing.assert_array_equal(again.ct.values, five[2].ct.values)  # the third is the third, however many follow


def test_sessions_that_are_not_there(patient):
    for n in (0, 6):
        with pytest.raises(ValueError, match=f"expected 1 to 5 training sessions of a phantom patient, got {n}"):
            with_sessions(patient, n, 5)
    with pytest.raises(ValueError, match="expected 1 to 2 training sessions of a real patient, got 4"):
        with_sessions(replace(patient, kind="real"), 4, 5)
    with pytest.raises(ValueError, match="expected a phantom of cohort seed 0, got one of seed 5"):
        with_sessions(patient, 4)


# --- stages ---------------------------------------------------------------------------------------------------------

def test_fits_are_shared_by_sessions_and_told_apart(patient, tmp_path):
    case, names = HeadNeckCase(2, "phantom", seed=5), ("primary", "secondary")
    made = lambda: len(list(tmp_path.glob("stages/kv2ct/fit/*/stage.json")))
    first = predictors(patient, fit_models(case, patient, SMALLEST, 0, str(tmp_path), "cpu", names))
    assert made() == 2 and set(first) == {"fused", "mean_ct", "registration_1dof"}
    again = predictors(patient, fit_models(case, with_sessions(patient, 2, 5), SMALLEST, 0, str(tmp_path), "cpu", names))
    assert made() == 2 and torch.equal(first["fused"](retaken_kv(patient)), again["fused"](retaken_kv(patient)))
    fit_models(case, with_sessions(patient, 1, 5), SMALLEST, 0, str(tmp_path), "cpu", names)
    assert made() == 4
    with pytest.raises(ValueError, match=r"expected names among .* got \['tertiary'\]"):
        fit_models(case, patient, SMALLEST, 0, str(tmp_path), "cpu", ("primary", "tertiary"))
    assert not set(CONVERTERS) & set(LITERAL_CONVERTERS)


def test_a_real_patient_gets_no_further_sessions(patient, tmp_path, monkeypatch):
    real = replace(patient, kind="real", source="made up")
    monkeypatch.setitem(PRESETS, "smallest", Preset("smallest", "0", SMALLEST, PRESETS["quick"].ct5d))
    monkeypatch.setattr(HeadNeckCase, "load", lambda self, voxel_mm: real)
    rows = pd.read_csv(robustness.run_robustness(HeadNeckCase(2, "real", seed=5), "smallest", 0, str(tmp_path), "cpu"))
    assert set(rows.detail[rows.detail.str.startswith("training")]) == {"training sessions: 1", "training sessions: 2"}
    assert set(rows.table) == {7} and set(rows.model) == set(robustness.TESTED) and rows.value.notna().all() and set(rows.paper) == {"A"}
    assert rows.columns.tolist() == ["table", "model", "metric", "unit", "detail", "value", "sd", "count", "paper", "patient", "seed"]


def test_tasks_wait_for_their_patient():
    for preset, patients in (("quick", 1), ("laptop", 1), ("workstation", 3)):
        tasks = robustness_tasks(PRESETS[preset], "phantom", "", "out", "cpu", [0, 1])
        assert [t.name for t in tasks] == [f"A: robustness, patient {p}, seed {s}" for s in (0, 1) for p in range(1, patients + 1)]
        assert all(t.after == (t.name.replace("robustness, ", ""),) for t in tasks)
