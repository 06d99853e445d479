"""Registration of CTs and what is made of it: known fields, the law from fields, real phases and landmarks."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xarray as xr
from scipy import ndimage

from radrepro.core.volume import centred_grid, from_tensor, spacing_mm, to_tensor, volume
from radrepro.core.warp import exp_velocity, jacobian_determinant, warp
from radrepro.ct5d.linear import fit_linear, motion_displacement, solve_linear
from radrepro.ct5d.real_motion import find_phases, landmark_table, leave_one_phase_out, read_phases, surrogate
from radrepro.ct5d.registration import register, smoothness
from radrepro.data.traces import Breathing
from radrepro.metrics.motion import folding_count

STEP = (6.0, 4.0, 5.0)
SHAPE = (26, 36, 30)
GRID = centred_grid(SHAPE, STEP)
INNER = (slice(4, -4),) * 3


def smooth_noise(seed, sigma_mm):
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(SHAPE), [sigma_mm / s for s in STEP])
    return (noise / noise.std()).astype(np.float32)


@pytest.fixture(scope="module")
def blobs():
    return volume(np.clip(0.5 + 0.15 * smooth_noise(1, 9), 0, 1), **GRID, units="1")


@pytest.fixture(scope="module")
def known_pair(blobs):
    """(moving, fixed, true field, found): fixed(x) = moving(x + u(x)) for u = exp(v)."""
    v = torch.from_numpy(np.stack([4 * smooth_noise(s, 32) for s in (2, 3, 4)]))[None]
    u = exp_velocity(v, STEP)
    fixed = from_tensor(warp(to_tensor(blobs), u, STEP), blobs)
    return blobs, fixed, u[0].numpy(), register(blobs, fixed, weight=1e-3)


def test_a_known_diffeomorphism_is_found(known_pair):
    """Each component to a quarter of its own voxel (6, 4, 5 mm), so axes and spacing are told apart."""
    _, _, true, found = known_pair
    for axis, step in enumerate(STEP):
        off = np.abs(found.displacement_mm.values[axis] - true[axis])[INNER]
        assert np.median(off) < step / 4 and np.median(off) < 0.3 * np.median(np.abs(true[axis][INNER]))


def test_direction_and_way_back(known_pair):
    moving, fixed, _, found = known_pair
    error = lambda a, b: float(((a - b).values[INNER] ** 2).mean())
    pulled = from_tensor(warp(to_tensor(moving), to_tensor(found.displacement_mm), STEP), moving)
    np.testing.assert_allclose(pulled.values, found.warped.values, atol=1e-6)
    assert error(pulled, fixed) < 0.05 * error(moving, fixed)
    wrong = from_tensor(warp(to_tensor(moving), -to_tensor(found.displacement_mm), STEP), moving)
    assert error(wrong, fixed) > error(moving, fixed)
    assert folding_count(jacobian_determinant(to_tensor(found.displacement_mm), STEP)).count == 0


def test_velocity_lies_where_it_says(known_pair):
    """v is a Volume on its own grid: read off at the fixed scan's voxels, its exponential is the displacement again."""
    _, _, _, found = known_pair
    v = found.velocity_mm
    assert np.allclose(spacing_mm(v), [2 * s for s in STEP])
    assert all(np.isclose(float(v[a][0]), GRID[a][0] + STEP[i] / 2) for i, a in enumerate("zyx"))
    fine = v.interp({a: GRID[a] for a in "zyx"}).values
    u = exp_velocity(torch.nan_to_num(torch.from_numpy(fine)[None].float()), STEP)[0].numpy()
    assert np.abs(u - found.displacement_mm.values)[:, 4:-6, 4:-6, 4:-6].max() < 0.7


def test_nothing_to_move(blobs):
    """Adam's steps have a size whatever the gradient, so it wanders a little: far below the smallest voxel, 4 mm."""
    u = register(blobs, blobs).displacement_mm.values
    assert np.linalg.norm(u, axis=0).mean() < 0.3 and np.abs(u).max() < 1


def test_shift_has_sign_and_unit(blobs):
    """Tissue 6 mm further along +y in the fixed scan is pulled from -y: u_y = -6 mm, nothing along z and x."""
    u = torch.zeros(1, 3, *SHAPE)
    u[:, 1] = -6.0
    found = register(blobs, from_tensor(warp(to_tensor(blobs), u, STEP), blobs)).displacement_mm
    middle = np.median(found.values[:, 6:-6, 6:-6, 6:-6], axis=(1, 2, 3))
    np.testing.assert_allclose(middle, [0, -6, 0], atol=0.5)


def test_smoothness_has_no_unit():
    """The same stretch on voxels half as large costs the same."""
    x = torch.stack(torch.meshgrid(*[s * torch.arange(8.0) for s in STEP], indexing="ij"))[None]
    assert torch.allclose(smoothness(0.1 * x, STEP), torch.tensor(0.03))
    assert torch.allclose(smoothness(0.05 * x, [s / 2 for s in STEP]), torch.tensor(0.03))


def test_registration_refuses_what_it_cannot_compare(blobs):
    with pytest.raises(ValueError, match="expected '1'"):
        register(blobs.assign_attrs(units="HU"), blobs)
    with pytest.raises(ValueError, match="resample one onto the other"):
        register(blobs, blobs.assign_coords(z=GRID["z"] + 3))
    with pytest.raises(ValueError, match="falling levels"):
        register(blobs, blobs, levels=(1, 2, 4))
    with pytest.raises(ValueError, match="fill them"):
        register(blobs.where(blobs > 0.3), blobs)


def breathing(phase, waves=1.0, rate=None):
    angle = phase + waves * 2 * np.pi * (GRID["z"] - GRID["z"][0]) / 156
    over = lambda v: xr.DataArray(v, coords={"z": GRID["z"]}, dims="z")
    return Breathing(over(0.5 - 0.5 * np.cos(angle)), over(np.sin(angle) if rate is None else rate + 0 * angle))


@pytest.fixture(scope="module")
def law():
    """alpha -18 mm at the bottom, beta a fifth of it, both fading to the top; a little along y."""
    z = np.broadcast_to(GRID["z"].reshape(-1, 1, 1), SHAPE)
    fade = 1 / (1 + np.exp(z / 25))
    field = lambda k: volume(np.stack([-18 * k * fade, -4 * k * fade, 0 * fade]).astype(np.float32), **GRID, units="mm")
    return field(1.0), field(0.2)


def scans_of(law, n):
    """n breathing states beside a reference, and the exact field from each to it."""
    breaths = [breathing(0.9 * i, 0.6 + 0.1 * i) for i in range(n + 1)]
    return breaths[1:], breaths[0], [motion_displacement(*law, moving=b, fixed=breaths[0]) for b in breaths[1:]]


def test_the_law_comes_back_from_exact_fields(law):
    """Each slice has its own amplitude and rate in every scan, the reference too; only interpolation is left over."""
    found = solve_linear(scans_of(law, 5)[2], *scans_of(law, 5)[:2])
    inside = (slice(None), slice(5, -4))
    for got, true in zip(found, law):
        assert np.abs(got.values - true.values)[inside].max() < 0.02 * np.abs(true.values).max() + 0.05
        assert got.attrs["units"] == "mm"


def test_wrong_rate_or_reference_at_rest_is_not_the_law(law):
    scans, reference, fields = scans_of(law, 5)
    off = lambda model, k: np.abs(model[k].values - law[k].values)[:, 5:-4].max()
    backwards = [b._replace(rate=-b.rate) for b in scans]
    wrong = solve_linear(fields, backwards, reference._replace(rate=-reference.rate))
    np.testing.assert_allclose(wrong.beta_mm.values[:, 5:-4].max(), -law[1].values[:, 5:-4].min(), rtol=0.1)
    assert off(wrong, 1) > 3  # beta comes out with the wrong sign
    still = solve_linear(fields, scans, breathing(0, 0, rate=0.0))
    assert off(still, 0) > 3  # the reference was breathing as well


def test_two_scans_are_too_few(law):
    scans, reference, fields = scans_of(law, 2)
    with pytest.raises(ValueError, match="two or more scans beside the reference"):
        solve_linear(fields[:1], scans[:1], reference)
    with pytest.raises(ValueError, match="expected three scans or more"):
        fit_linear(scans)


def test_law_from_pictures(law, blobs):
    """Scans made by the law, registered and fitted, foretell a scan that was not among them."""
    breaths = [breathing(1.3 * i, 0.5 + 0.1 * i) for i in range(6)]
    rest = breathing(0, 0)  # amplitude 0
    rest = rest._replace(rate=0 * rest.rate)
    scan = lambda b: SimpleNamespace(amplitude=b.amplitude, rate=b.rate, ct=from_tensor(
        warp(to_tensor(blobs), to_tensor(motion_displacement(*law, moving=rest, fixed=b)), STEP), blobs))
    scans = [scan(b) for b in breaths]
    found = fit_linear(scans[:5])
    moved = warp(to_tensor(scans[4].ct), to_tensor(motion_displacement(*found, scans[4], scans[5])), STEP)[0, 0].numpy()
    error = lambda values: float(((values - scans[5].ct.values)[INNER] ** 2).mean())
    assert error(moved) < 0.25 * error(scans[4].ct.values)


def test_surrogate_is_a_cycle():
    amplitude, rate = surrogate([3, 2, 1, 2])
    np.testing.assert_allclose(amplitude, [1, 0.5, 0, 0.5])
    np.testing.assert_allclose(rate, [0, -2, 0, 2])  # exhaling falls; 1 per breath, the last phase borders the first
    with pytest.raises(ValueError, match="changing volumes"):
        surrogate([1, 1, 1, 1, 1])


def test_real_phases(data_dir):
    """End of exhale carried to end of inhale; the phase itself is only seen by the registration."""
    folders = find_phases(data_dir)
    if not folders:
        pytest.skip("no lung4d_* folder in RADREPRO_DATA")
    phases = read_phases(folders[0])
    rows = leave_one_phase_out([p for p in phases if p.number in (1, 4, 6, 8, 10)], left_out=[8], coarse=3).set_index("model")
    assert rows.rmse_hu["registration"] < 0.7 * rows.rmse_hu["none"]
    assert rows.rmse_hu["linear"] < 0.9 * rows.rmse_hu["none"]
    assert not rows.foldings.any() and 1 < rows.mean_mm["registration"] < 15


def test_real_landmarks(data_dir):
    table = landmark_table(data_dir)
    if table.empty:
        pytest.skip("no lung_landmarks_* folder in RADREPRO_DATA")
    assert (table.after_mm < 0.8 * table.before_mm).all() and table.before_mm.between(2, 20).all()
