"""Thorax: signs of the motion, exactness of the map between scans, anatomy, hardness of the cohort, real cases."""
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from scipy import ndimage

from radrepro.core.volume import centred_grid, like, spacing_mm, volume, write_nifti
from radrepro.data.thorax import (
    BUCKETS,
    acquire,
    bucket_of,
    find_lungs,
    find_thoraxes,
    phantom_thorax,
    real_thorax,
    scale_hu,
)
from radrepro.data.thorax_anatomy import draw_anatomy
from radrepro.data.thorax_motion import (
    alpha_from_landmarks,
    displacement_between,
    draw_peak_mm,
    find_landmarks,
    grid_points,
    read_landmarks,
    rest_positions,
    sample_at,
)
from radrepro.data.traces import Breathing, synthetic_trace

SHAPE = (28, 32, 32)


@pytest.fixture(scope="module")
def patient():
    return phantom_thorax(1, shape=SHAPE, n_scans=8)


def held(z, amplitude, rate=0.0):
    make = lambda v: xr.DataArray(np.broadcast_to(np.asarray(v, float), len(z)).copy(), coords={"z": z}, dims="z")
    return Breathing(make(amplitude), make(rate))


def warped(image, u):
    return sample_at(image, grid_points(u) + torch.tensor(u.values))[0].numpy()


def test_inhaling_goes_inferior_and_anterior(patient):
    lungs = patient.lung_mask.values
    assert patient.alpha_mm.sel(vector="z").values[lungs].mean() < -1
    assert patient.alpha_mm.sel(vector="y").max() <= 0 and patient.alpha_mm.sel(vector="y").min() < -0.5
    z = patient.reference["z"].values

    def lung_at(a):
        rest = rest_positions(patient.alpha_mm, patient.beta_mm, held(z, a))
        return sample_at(patient.fine_lungs, rest, mode="nearest")[0].numpy() > 0

    base = lambda a: np.mean(np.argmax(lung_at(a), axis=0)[lung_at(a).sum(0) > 6])
    assert base(1.0) < base(0.0) and lung_at(1.0).sum() > lung_at(0.0).sum()


def test_constant_field_and_linear_ramp_have_closed_forms():
    grid = centred_grid((20, 8, 8), (5.0, 6.0, 7.0))
    ones = np.ones((3, 20, 8, 8), np.float32)
    alpha = volume(ones * np.array([-10, -4, 2]).reshape(3, 1, 1, 1), **grid, units="mm")
    beta = volume(ones * np.array([-2, 0, 0]).reshape(3, 1, 1, 1), **grid, units="mm")
    u = displacement_between(alpha, beta, held(grid["z"], 0.25, 0.5), held(grid["z"], 1.0, -0.5))
    np.testing.assert_allclose(u.values[:, 3:-3, 0, 0].T, [[-10 * -0.75 - 2 * 1, 3, -1.5]] * 14, atol=1e-3)
    # A = s z in the moving scan, 0 in the fixed one: y = x - 10 s y  =>  u_z = -10 s x / (1 + 10 s)
    s = 0.004
    u = displacement_between(alpha, beta * 0, held(grid["z"], s * grid["z"]), held(grid["z"], 0.0))
    np.testing.assert_allclose(u.sel(vector="z").values[:, 2, 2], -10 * s * grid["z"] / (1 + 10 * s), atol=2e-3)


def test_law_holds_at_the_true_positions(patient):
    m, f = patient.scans[0], patient.scans[5]
    u = patient.displacement(m, f)
    rest = rest_positions(patient.alpha_mm, patient.beta_mm, f.breathing)
    y = grid_points(u) + torch.tensor(u.values)
    a, b = (np.interp(y[0].numpy(), s["z"].values, s.values) for s in m.breathing)
    alpha, beta = sample_at(patient.alpha_mm, rest), sample_at(patient.beta_mm, rest)
    law = rest + alpha * torch.tensor(a) + beta * torch.tensor(b)
    residual = (law - y).abs()[:, 4:-4, 4:-4, 4:-4]
    assert residual.max() < 0.1 and residual.mean() < 0.005


def test_swapped_trace_wrong_sign_and_scan_mean_are_worse(patient):
    by = sorted(patient.scans, key=lambda s: float(s.amplitude.mean()))
    m, f = by[0], by[-1]
    mask = ndimage.distance_transform_edt(~patient.lung_mask_in(f).values, sampling=spacing_mm(f.ct)) <= 10
    mse = lambda image: float(((image - f.ct.values)[mask] ** 2).mean())
    u = patient.displacement(m, f)
    none, true, wrong = mse(m.ct.values), mse(warped(m.ct, u)), mse(warped(m.ct, -u))
    upside = like(u.values * np.array([1, -1, 1]).reshape(3, 1, 1, 1), u)
    assert true < 0.35 * none and wrong > none and mse(warped(m.ct, upside)) > 1.02 * true
    mean = Breathing(f.amplitude * 0 + f.amplitude.mean(), f.rate * 0)
    assert mse(warped(m.ct, displacement_between(patient.alpha_mm, patient.beta_mm, m.breathing, mean))) > true


def test_true_map_does_not_fold(patient):
    u = patient.displacement(patient.scans[1], patient.scans[6])
    gradient = np.array([np.gradient(u.values[k], *spacing_mm(u)) for k in range(3)])
    assert np.linalg.det(np.moveaxis(gradient, (0, 1), (-2, -1)) + np.eye(3)).min() > 0


def test_scans_are_free_breathing_both_ways(patient):
    assert len(patient.scans) == 8 and {s.direction for s in patient.scans} == {-1, 1}
    for s in patient.scans:
        assert s.ct.dtype == np.float32 and 0 <= s.ct.min() and s.ct.max() <= 1
        assert np.sign(float(s.amplitude["time"][-1] - s.amplitude["time"][0])) == s.direction
    assert max(np.ptp(s.amplitude.values) for s in patient.scans) > 0.4
    again = phantom_thorax(1, shape=SHAPE, n_scans=8)
    xr.testing.assert_identical(again.scans[3].ct, patient.scans[3].ct)
    assert not phantom_thorax(1, shape=SHAPE, n_scans=1, seed=1).reference.equals(patient.reference)


def test_anatomy_is_complete_and_looks_like_ct(patient):
    labels, ct = patient.fine_labels.values, patient.fine.values * 1400 - 1000
    assert set(np.unique(labels)) == {0, *BUCKETS}
    mean = lambda k: ct[labels == k].mean()
    assert mean(3) < -650 < -200 < mean(2) < 400 and mean(1) > 120 and mean(10) < -600
    middle = lambda k: [float(patient.fine[a].values[i].mean()) for a, i in zip("zyx", np.nonzero(labels == k))]
    centre = {k: middle(k) for k in BUCKETS}
    assert centre[5][1] > centre[4][1] > centre[2][1]  # cord behind oesophagus behind heart
    assert centre[2][2] > centre[7][2] and centre[6][2] > centre[7][2]  # heart and aorta left of the vena cava
    assert centre[10][0] > centre[7][0]
    lungs = find_lungs(like(ct.astype(np.float32), patient.fine, units="HU")).values
    assert 2 * (lungs & patient.fine_lungs.values).sum() / (lungs.sum() + patient.fine_lungs.values.sum()) > 0.9


def test_same_patient_at_another_resolution(patient):
    fine = phantom_thorax(1, shape=(56, 64, 64), n_scans=1)
    assert abs(float(fine.reference.mean()) - float(patient.reference.mean())) < 0.02
    points = grid_points(patient.reference)
    assert np.abs(sample_at(fine.reference, points)[0].numpy() - patient.reference.values).mean() < 0.03


def test_cohort_is_hard_on_purpose():
    drawn = [draw_anatomy(s) for s in range(300)]
    peaks = np.array([draw_peak_mm(s) for s in range(300)])
    assert 5 <= peaks.min() < 7 and 28 < peaks.max() <= 30
    for visible in ([a.fat_mm for a in drawn], [a.size[0] for a in drawn], [max(a.elevation) for a in drawn]):
        assert abs(np.corrcoef(peaks, visible)[0, 1]) < 0.2
    assert max(abs(np.array([a.pose_mm for a in drawn])).max(0)) > 18


def test_hu_scaling_and_wrong_units():
    v = volume(np.array([-3000.0, -1000, 400, 2000]).reshape(4, 1, 1), z=range(4), y=[0], x=[0], units="HU")
    assert scale_hu(v).values.ravel().tolist() == [0, 0, 1, 1] and scale_hu(v).attrs["units"] == "1"
    with pytest.raises(ValueError, match="expected 'HU'"):
        scale_hu(scale_hu(v))
    with pytest.raises(ValueError, match="NaN"):
        scale_hu(v.where(v > 0))
    with pytest.raises(ValueError, match="expected lungs"):
        find_lungs(like(np.zeros((8, 8, 8)), volume(np.zeros((8, 8, 8)), **centred_grid((8, 8, 8), 4.0), units="HU")))


def test_short_trace_is_refused(patient):
    with pytest.raises(ValueError, match="longer recording"):
        acquire(patient.reference, patient.fine, patient.alpha_mm, patient.beta_mm, synthetic_trace(20, seed=0),
                n_scans=25, seed=0)


def test_names_to_buckets():
    names = ("vertebrae_T8", "Heart", "lung_lower_lobe_left", "lung_vessels", "oesophagus", "liver")
    assert [bucket_of(n) for n in names] == [1, 2, 3, 0, 4, 0]


def test_landmarks_in_dirlab_frame_turn_to_inferior(tmp_path):
    rng = np.random.default_rng(0)
    ee = rng.uniform([0, 0, 0], [240, 180, 200], (500, 3))  # x, y, z with z inferior
    ei = ee + np.array([0, -2, 9])  # +z: inferior in their frame
    folder = tmp_path / "lung_landmarks_x"
    folder.mkdir()
    np.savetxt(folder / "case07_300.csv", np.c_[ee, ei], delimiter=",", comments="",
               header="ee_x_mm,ee_y_mm,ee_z_mm,ei_x_mm,ei_y_mm,ei_z_mm")
    [case] = find_landmarks(tmp_path)
    mask = volume(np.pad(np.ones((16, 16, 16), bool), 6), **centred_grid((28, 28, 28), 10.0), units="1")
    alpha = alpha_from_landmarks(*read_landmarks(case), mask)
    np.testing.assert_allclose(alpha.sel(z=0, y=0, x=0, method="nearest"), [-9, -2, 0], atol=0.3)
    side = alpha.sel(vector="z").sel(y=0, method="nearest")
    assert abs(float(side.sel(z=0, x=125, method="nearest"))) < 0.5  # the chest wall slides
    belly, neck = (float(side.sel(z=z, x=0, method="nearest")) for z in (-110, 130))
    assert belly < -3 < neck
    with pytest.raises(ValueError, match="20 landmark pairs"):
        alpha_from_landmarks(ee[:5], ei[:5], mask)


def test_bad_real_cases(tmp_path, patient):
    with pytest.raises(FileNotFoundError, match="found none"):
        find_thoraxes(tmp_path / "none")
    assert find_thoraxes(tmp_path) == []
    case = tmp_path / "thorax_a" / "inner"
    hu = like((patient.fine.values * 1400 - 1000).astype(np.int16), patient.fine, units="HU")
    write_nifti(hu, case / "ct.nii.gz")
    assert find_thoraxes(tmp_path) == [case]
    with pytest.raises(FileNotFoundError, match="lung_landmarks"):
        real_thorax(case, 1, landmarks=tmp_path, shape=SHAPE, n_scans=1)
    write_nifti(patient.fine, case / "ct.nii.gz")  # 0..1 is not HU
    with pytest.raises(ValueError, match="in HU"):
        real_thorax(case, 1, landmarks=tmp_path, shape=SHAPE, n_scans=1)
    broken = patient.fine * 1400 - 1000
    broken[3, 3, 3] = np.nan
    write_nifti(broken, case / "ct.nii.gz")
    with pytest.raises(ValueError, match="NaN"):
        real_thorax(case, 1, landmarks=tmp_path, shape=SHAPE, n_scans=1)


def test_real_cases():
    data_dir = os.environ.get("RADREPRO_DATA")
    if not data_dir or not Path(data_dir).is_dir() or not find_thoraxes(data_dir) or not find_landmarks(data_dir):
        pytest.skip("RADREPRO_DATA is not set, or holds no thorax_* and lung_landmarks_*")
    for number, case in enumerate(find_thoraxes(data_dir), 1):
        p = real_thorax(case, number, landmarks=data_dir, shape=SHAPE, n_scans=3)
        assert p.kind == "real" and p.source == case.name
        litres = p.lung_mask.values.sum() * np.prod(spacing_mm(p.reference)) / 1e6
        assert 1 < litres < 9
        s_i = p.alpha_mm.sel(vector="z").values
        assert s_i[p.lung_mask.values].mean() < -1 and s_i.min() > -45
        lower = p.lung_mask.values & (np.arange(28) < 14).reshape(-1, 1, 1)
        assert s_i[lower].mean() < s_i[p.lung_mask.values & ~lower].mean()  # the base moves more than the apex
        assert p.displacement(p.scans[0], p.scans[1]).shape == (3, *SHAPE)
