"""kV projection: where points land, how long chords are, what physics and noise do. Analytic answers throughout."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from radrepro.core.project import (
    BONE_G_CM3,
    COUCH,
    ENERGIES_KEV,
    KV_STEP,
    MASS_ATTENUATION_CM2_G,
    METAL_G_CM3,
    Box,
    KVGeometry,
    KVPhysics,
    bone_hu,
    box_chords,
    hu_to_basis,
    kv_geometry,
    kv_pair,
    line_integrals,
    project_points,
    project_tensor,
)
from radrepro.core.volume import centred_grid, crop_or_pad, like, move, rigid, spacing_mm, to_tensor, volume

GEOMETRY = kv_geometry(4.0)
STEPS_MM = (5.0, 3.0, 4.0)  # z, y, x: all different, so that a swapped axis shows
SHAPE = (40, 44, 38)
BARE = KVPhysics(photons_per_mm2=None, scatter_fraction=0.0, couch=())
QUICK = settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def mesh(grid):
    return np.meshgrid(grid["z"], grid["y"], grid["x"], indexing="ij")


def ball(centre_xyz, radius_mm, grid, soft_mm=4.0):
    z, y, x = mesh(grid)
    distance = np.sqrt((x - centre_xyz[0]) ** 2 + (y - centre_xyz[1]) ** 2 + (z - centre_xyz[2]) ** 2)
    return volume(np.clip((radius_mm - distance) / soft_mm + 0.5, 0, 1), **grid, units="1")


def centroid(image):
    total = float(image.sum())
    return np.array([float((image * image.v).sum()) / total, float((image * image.u).sum()) / total])


def water_slab(thickness_mm, hu=0.0):
    """A slab that fills the field of view, `thickness_mm` along y, on voxels whose faces are the slab's."""
    grid = centred_grid((30, 60, 30), (20.0, 4.0, 20.0))
    _, y, _ = mesh(grid)
    return volume(np.where(abs(y) < thickness_mm / 2, hu, -1000.0), **grid, units="HU")


# --- geometry ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("voxel_mm", [1.0, 2.0, 4.0, 8.0])
def test_receptor_keeps_its_field_of_view(voxel_mm):
    g = kv_geometry(voxel_mm)
    assert g.shape_px == (1008 / voxel_mm,) * 2 and np.isclose(g.pixel_mm * g.shape_px[0], 756.0)
    assert np.isclose(g.sid_mm / g.sad_mm, 1.5) and np.isclose(g.pixel_mm / g.magnification, voxel_mm / 2)
    np.testing.assert_allclose(g.v_mm, -g.v_mm[::-1])  # symmetric about the isocentre
    assert np.all(np.diff(g.u_mm) > 0)


def test_sources_stand_where_they_are_said_to():
    anterior, left = (GEOMETRY.camera(a)[:3, 3] for a in (0.0, 90.0))
    np.testing.assert_allclose(anterior, (0, -1500, 0), atol=1e-9)  # anterior is -y
    np.testing.assert_allclose(left, (1500, 0, 0), atol=1e-9)  # left is +x
    assert KVGeometry(1.0, (10, 12), angles_deg=(45.0, 90.0)).views == ["45 deg", "LAT"]
    for angle in (0.0, 30.0, 90.0):
        rotation = GEOMETRY.camera(angle)[:3, :3]
        np.testing.assert_allclose(rotation.T @ rotation, np.eye(3), atol=1e-12)


@pytest.mark.parametrize("axis, sign", [(0, 1), (1, 1), (2, 1), (0, -1), (1, -1), (2, -1)])
def test_directions(axis, sign):
    point = np.zeros(3)
    point[axis] = sign * 50.0
    (v_ap, u_ap), (v_lat, u_lat) = project_points([point], GEOMETRY)[:, 0]
    expected = {0: (0, 75, 0, 0), 1: (0, 0, 0, 75), 2: (75, 0, 75, 0)}[axis]
    np.testing.assert_allclose((v_ap, u_ap, v_lat, u_lat), np.multiply(sign, expected), atol=1e-9)


@QUICK
@given(st.tuples(*[st.floats(-45, 45)] * 3))
def test_a_point_lands_where_it_should(centre):
    small = ball(centre, 8.0, centred_grid(SHAPE, STEPS_MM), soft_mm=5.0)
    seen = line_integrals(small, GEOMETRY)
    weights = small.values / small.values.sum()
    true_centre = [(weights * c).sum() for c in mesh({a: small[a].values for a in "zyx"})][::-1]  # of the voxels
    for image, expected in zip(seen, project_points([true_centre], GEOMETRY)[:, 0]):
        assert np.abs(centroid(image) - expected).max() < 0.25 * GEOMETRY.pixel_mm


def test_points_behind_the_source_are_refused():
    with pytest.raises(ValueError, match="behind a source"):
        project_points((0, -1501, 0), GEOMETRY)
    far = volume(np.ones((2, 2, 2)), **centred_grid((2, 2, 2), 4000.0), units="1")
    with pytest.raises(ValueError, match="behind a source"):
        line_integrals(far, GEOMETRY)
    with pytest.raises(ValueError, match="divides 1008"):
        kv_geometry(5.0)


# --- line integrals ---------------------------------------------------------------------------------------------

def test_chords_of_a_sphere():
    centre, radius = np.array([12.0, -20.0, 25.0]), 55.0
    grid = centred_grid((56, 60, 60), 3.0)
    seen = line_integrals(ball(centre, radius, grid, soft_mm=3.0), GEOMETRY)
    for i, angle in enumerate(GEOMETRY.angles_deg):
        camera = GEOMETRY.camera(angle)
        v, u = np.meshgrid(GEOMETRY.v_mm, GEOMETRY.u_mm, indexing="ij")
        ray = np.stack([u, v, np.full_like(u, GEOMETRY.sid_mm)], -1) @ camera[:3, :3].T
        ray /= np.linalg.norm(ray, axis=-1, keepdims=True)
        offset = centre - camera[:3, 3]
        d2 = (offset**2).sum() - (ray @ offset) ** 2
        chord = 2 * np.sqrt(np.maximum(radius**2 - d2, 0))
        inside = chord > 60
        assert inside.sum() > 300
        assert np.abs(seen.values[i][inside] / chord[inside] - 1).max() < 0.01
        assert np.abs(seen.values[i][d2 > (radius + 8) ** 2]).max() == 0


def test_magnification_is_one_and_a_half_at_the_isocentre():
    grid = centred_grid((41, 41, 41), 4.0)
    up, down = (line_integrals(ball((0, 0, z), 10, grid), GEOMETRY) for z in (40, -40))
    for a, b in zip(up, down):
        assert abs((centroid(a) - centroid(b))[0] / 80 - 1.5) < 0.01


@pytest.mark.parametrize("steps", [(4.0, 4.0, 4.0), (2.0, 3.0, 5.0)])
def test_unit_impulse(steps):
    v = volume(np.zeros((21, 21, 21)), **centred_grid((21, 21, 21), steps), units="1")
    v.loc[{"z": 0, "y": 0, "x": 0}] = 1
    g = KVGeometry(pixel_mm=0.5, shape_px=(51, 51))
    seen = line_integrals(v, g)
    np.testing.assert_allclose(seen.sel(v=0, u=0), (steps[1], steps[2]), rtol=1e-3)  # AP crosses y, LAT crosses x
    np.testing.assert_allclose(seen.sum(("v", "u")) * (0.5 / 1.5) ** 2, np.prod(steps), rtol=0.01)


def test_empty_and_cropped_volumes():
    grid = centred_grid((20, 20, 20), 4.0)
    zero = volume(np.zeros((20, 20, 20)), **grid, units="1")
    assert float(np.abs(line_integrals(zero, GEOMETRY)).max()) == 0
    off_centre = ball((20, -16, 12), 10, grid)
    padded = crop_or_pad(off_centre, (32, 30, 34), fill=0)
    ours = line_integrals(padded, GEOMETRY)
    np.testing.assert_allclose(ours, line_integrals(off_centre, GEOMETRY), atol=0.02)
    everything = project_tensor(to_tensor(padded), [float(padded[a][0]) for a in "zyx"], spacing_mm(padded), GEOMETRY)
    np.testing.assert_allclose(ours, everything.numpy(), atol=0.05)
    assert ours.attrs["units"] == "1*mm" and ours.dims == ("view", "v", "u") and list(ours.view.values) == ["AP", "LAT"]


def test_half_outside_of_the_receptor():
    g = KVGeometry(pixel_mm=3.0, shape_px=(20, 24))  # 60 x 72 mm, far smaller than the volume
    seen = line_integrals(volume(np.ones((30, 30, 30)), **centred_grid((30, 30, 30), 4.0), units="1"), g)
    np.testing.assert_allclose(seen, 120, rtol=0.01)


def test_one_sample_a_voxel_is_enough():
    v = ball((10, -8, 14), 50, centred_grid((40, 40, 40), 4.0), soft_mm=1.0)
    args = to_tensor(v), [float(v[a][0]) for a in "zyx"], (4, 4, 4), GEOMETRY
    one, many = project_tensor(*args), project_tensor(*args, samples_per_voxel=12)
    assert float((one - many).square().mean().sqrt() / many.max()) < 2e-4
    assert float((one - many).abs().max() / many.max()) < 0.01


@pytest.mark.parametrize("pose", [rigid((6, -9, 12)), rigid((3, 2, -4), (5, -4, 7))])
def test_a_pose_moves_the_patient(pose):
    grid = centred_grid((60, 60, 60), 3.0)
    v = ball((15, -10, 20), 25, grid) + 0.5 * ball((-20, 15, -15), 18, grid)
    v.attrs["units"] = "1"
    posed, resampled = line_integrals(v, GEOMETRY, pose=pose), line_integrals(move(v, pose, fill=0), GEOMETRY)
    still = line_integrals(v, GEOMETRY)
    assert float(np.abs(posed - resampled).mean()) < 0.1 * float(np.abs(posed - still).mean())
    for a, b in zip(posed, resampled):
        assert np.abs(centroid(a) - centroid(b)).max() < 0.3


@pytest.mark.parametrize("shift_mm", [-4.0, 2.0, 6.0])
def test_the_papers_shift_rule(shift_mm):
    v = ball((0, 0, 0), 50, centred_grid((50, 50, 50), 3.0))
    still, moved = line_integrals(v, GEOMETRY), line_integrals(v, GEOMETRY, pose=rigid((0, 0, shift_mm)))
    rule = still.shift(v=round(1.5 * shift_mm / GEOMETRY.pixel_mm), fill_value=0)
    wrong = still.shift(v=-round(1.5 * shift_mm / GEOMETRY.pixel_mm), fill_value=0)
    effect = float(np.abs(moved - still).mean())
    assert float(np.abs(rule - moved).mean()) < 0.06 * effect < effect < float(np.abs(wrong - moved).mean())


def test_gradients_against_finite_differences():
    v = ball((6, -4, 3), 20, centred_grid((20, 20, 20), 4.0), soft_mm=12.0)
    g = KVGeometry(pixel_mm=6.0, shape_px=(30, 30))
    weights = torch.randn(2, 30, 30, generator=torch.Generator().manual_seed(0))
    args = [float(v[a][0]) for a in "zyx"], (4, 4, 4), g

    def score(volume_tensor, pose):
        return (project_tensor(volume_tensor, *args, pose=pose, samples_per_voxel=4) * weights).sum()

    tensor, pose = to_tensor(v).requires_grad_(), torch.eye(4).requires_grad_()
    score(tensor, pose).backward()
    direction = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():  # linear in the volume: the difference is exact
        change = score(tensor + direction, pose) - score(tensor, pose)
        assert torch.isclose(change, (tensor.grad * direction).sum(), rtol=1e-3)
        for row in range(3):
            step = torch.zeros(4, 4)
            step[row, 3] = 0.1
            slope = (score(tensor, pose + step) - score(tensor, pose - step)) / 0.2
            assert abs(float(slope) - float(pose.grad[row, 3])) < 0.08 * float(pose.grad[:3, 3].norm())


def test_bad_volumes_are_refused():
    with pytest.raises(ValueError, match="1, 1, Z, Y, X"):
        project_tensor(torch.zeros(1, 2, 4, 4, 4), (0, 0, 0), (1, 1, 1), GEOMETRY)
    bad = ball((0, 0, 0), 10, centred_grid((8, 8, 8), 4.0))
    bad[0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        line_integrals(bad, GEOMETRY)


# --- attenuation ------------------------------------------------------------------------------------------------

@QUICK
@given(st.floats(-1000, 2400))
def test_the_mixture_is_sound(hu):
    ct = volume(np.full((2, 2, 2), hu), **centred_grid((2, 2, 2), 4.0), units="HU")
    water, bone, metal = (float(b[0, 0, 0]) for b in hu_to_basis(ct))
    assert water >= 0 and bone >= 0 and metal == 0
    if -950 <= hu <= 100:
        assert np.isclose(water, 1 + hu / 1000, atol=1e-5) and bone == 0
    if hu >= bone_hu():
        assert water < 1e-5 and bone >= BONE_G_CM3 - 1e-4


def test_attenuation_grows_with_hu():
    ct = volume(np.linspace(-950, 3000, 400).reshape(1, 1, -1), z=[0], y=[0], x=np.arange(400.0), units="HU")
    bases = dict(zip(("water", "bone", "metal"), hu_to_basis(ct)))
    for i in range(len(ENERGIES_KEV)):
        mu = sum(MASS_ATTENUATION_CM2_G[b][i] * d.values.ravel() for b, d in bases.items())
        assert np.all(np.diff(mu) > -1e-6)


def test_a_slab_of_water_by_hand():
    """-ln sum_E w_E exp(-mu_E d) at the centre, and less per mm where it is thicker (beam hardening)."""
    weights = np.array(BARE.weights) / np.sum(BARE.weights)
    mu = np.array(MASS_ATTENUATION_CM2_G["water"])
    seen = {}
    for thickness_mm in (40, 160):
        kv = kv_pair(water_slab(thickness_mm), GEOMETRY, BARE, seed=0).sel(view="AP")
        seen[thickness_mm] = float(kv.sel(u=0, v=0, method="nearest"))
        by_hand = -np.log((weights * np.exp(-mu * thickness_mm / 10)).sum())
        assert abs(seen[thickness_mm] / by_hand - 1) < 1e-3
    assert seen[160] / 160 < 0.99 * seen[40] / 40


def test_bone_and_metal_hide_more():
    values = {}
    for hu in (0.0, 700.0, 1600.0, 3000.0):
        kv = kv_pair(water_slab(8, hu), GEOMETRY, BARE, seed=0).sel(view="AP")
        values[hu] = float(kv.sel(u=0, v=0, method="nearest"))
    assert values[0.0] < values[700.0] < values[1600.0] < values[3000.0]
    mu = np.array(MASS_ATTENUATION_CM2_G["metal"])
    titanium = -np.log((np.array(BARE.weights) * np.exp(-mu * METAL_G_CM3 * 0.8)).sum() / sum(BARE.weights))
    assert abs(values[3000.0] / titanium - 1) < 1e-3


def test_explicit_metal_takes_the_place_of_tissue():
    ct = water_slab(40)
    share = like((np.abs(ct.values) < 1).astype(float), ct, "1")
    by_share = kv_pair(ct, GEOMETRY, BARE, seed=0, metal=share)
    xr.testing.assert_allclose(by_share, kv_pair(water_slab(40, 3000.0), GEOMETRY, BARE, seed=0), rtol=1e-4)
    with pytest.raises(ValueError, match="another grid"):
        kv_pair(ct, GEOMETRY, BARE, seed=0, metal=share.assign_coords(z=share.z + 1))


# --- couch, scatter, noise --------------------------------------------------------------------------------------

def test_box_chords_are_exact():
    box = Box((-10, 20, -30), (40, 50, 5), 1.0)
    seen = box_chords(box, KVGeometry(pixel_mm=1.0, shape_px=(101, 101)))
    assert abs(float(seen.sel(view="AP", v=0, u=0)) - 30) < 1e-6  # through y, along the central ray
    assert float(seen.sel(view="LAT", v=0, u=0)) == 0 and float(seen.sel(view="LAT", v=0, u=50)) > 49  # posterior: +u
    assert float(seen.sel(view="AP", v=20, u=0)) == 0 and float(seen.sel(view="AP", v=-20, u=0)) > 29  # inferior: -v
    everything = Box((-300, -300, -300), (300, 300, 300), 1.0)
    assert float(box_chords(everything, GEOMETRY).min()) > 590  # windows never cut a box


def test_the_couch_stays_in_the_room():
    air = volume(np.full((20, 20, 20), -1000.0), **centred_grid((20, 20, 20), 8.0), units="HU")
    physics = KVPhysics(photons_per_mm2=None, scatter_fraction=0.0)
    still = kv_pair(air, GEOMETRY, physics, seed=0)
    xr.testing.assert_identical(still, kv_pair(air, GEOMETRY, physics, seed=0, pose=rigid((10, 10, 10))))
    lat = still.sel(view="LAT")
    assert float(lat.sel(u=slice(210, None)).max()) > 0.5 and float(lat.sel(u=slice(None, 150)).max()) == 0
    assert float(np.abs(kv_pair(air, GEOMETRY, BARE, seed=0)).max()) == 0 and len(COUCH) == 6


def test_scatter_brightens_and_blurs():
    ct = water_slab(160)
    clean = kv_pair(ct, GEOMETRY, BARE, seed=0)
    hazy = kv_pair(ct, GEOMETRY, KVPhysics(photons_per_mm2=None, couch=()), seed=0)
    assert float((hazy - clean).max()) < 1e-6  # scatter adds signal
    ratio = float((np.exp(clean - hazy) - 1).sel(view="AP").sel(u=0, v=0, method="nearest"))
    by_hand = 0.05 * float(clean.sel(view="AP").sel(u=0, v=0, method="nearest"))  # wide slab: S / P = k (-ln P)
    assert abs(ratio / by_hand - 1) < 0.1


@pytest.mark.parametrize("photons_per_mm2", [20.0, 2000.0])
def test_noise_is_that_of_the_photons(photons_per_mm2):
    ct = water_slab(80)
    physics = KVPhysics(photons_per_mm2=photons_per_mm2, couch=())
    clean = kv_pair(ct, GEOMETRY, KVPhysics(photons_per_mm2=None, couch=()), seed=0)
    noisy = kv_pair(ct, GEOMETRY, physics, seed=3)
    counts = photons_per_mm2 * GEOMETRY.pixel_mm**2 * np.exp(-clean)
    score = ((noisy - clean) * np.sqrt(counts)).where(counts > 30)
    assert abs(float(score.std()) - 1) < 0.06


def test_seeds_types_and_state():
    ct = water_slab(40)
    before = np.random.get_state()[1].copy()
    torch_before = torch.get_rng_state()
    a, b, c = (kv_pair(ct, GEOMETRY, seed=s) for s in (7, 7, 8))
    xr.testing.assert_identical(a, b)
    assert not a.equals(c) and a.dtype == np.float32 and np.isfinite(a).all() and a.attrs["units"] == "1"
    assert np.array_equal(before, np.random.get_state()[1]) and torch.equal(torch_before, torch.get_rng_state())


def test_a_dark_pixel_is_finite():
    kv = kv_pair(water_slab(160, 3000.0), GEOMETRY, KVPhysics(photons_per_mm2=1.0), seed=0)
    assert np.isfinite(kv).all() and abs(float(kv.max()) - np.log(GEOMETRY.pixel_mm**2)) <= KV_STEP / 2  # one photon


def test_errors_of_the_image():
    with pytest.raises(ValueError, match="expected 'HU'"):
        kv_pair(like(water_slab(8).values, water_slab(8), "1/mm"), GEOMETRY, seed=0)
    for weights in ((1.0,), (1.0, 1, 1, 1, -1), (0.0,) * 5):
        with pytest.raises(ValueError, match="weights"):
            KVPhysics(weights=weights)


# --- the adapter ------------------------------------------------------------------------------------------------

def test_nanodrr_is_imported_only_when_used():
    code = "import sys, radrepro.core.project; sys.exit('nanodrr' in sys.modules or 'torchio' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_agrees():
    v = ball((10, -8, 14), 50, centred_grid((40, 40, 40), 4.0))
    for pose in (None, rigid((3, 2, -4), (5, -4, 7))):
        np.testing.assert_allclose(line_integrals(v, GEOMETRY, pose=pose, device="cuda"),
                                   line_integrals(v, GEOMETRY, pose=pose), atol=0.05)
