"""kv2ct.grss_checked: the shift rule against the ray marcher, and where the phases' samples lie."""
from dataclasses import replace

import numpy as np
import pytest
import torch

from radrepro.core.project import KVGeometry, line_integrals
from radrepro.core.volume import centred_grid, rigid, volume
from radrepro.data.headneck import phantom_patient
from radrepro.kv2ct.grss import PRIMARY, SECONDARY, Sampling, phase_pairing
from radrepro.kv2ct.grss_checked import naive_pairing, pairing_misplacement_mm, shift_rule_error_mm, shift_rule_gap

AP = KVGeometry(pixel_mm=3.0, shape_px=(96, 64), angles_deg=(0.0,))


@pytest.mark.parametrize("sad_mm", [800.0, 1500.0])
@pytest.mark.parametrize("angle_deg", [0.0, 90.0, 37.0])
def test_the_rule_is_wrong_by_similar_triangles(sad_mm, angle_deg):
    geometry = replace(AP, sad_mm=sad_mm, angles_deg=(angle_deg,))
    depth_mm = np.array([[-200.0, -20.0, 0.0], [30.0, 150.0, 300.0]])
    for shift_mm in (-5.0, 0.0, 2.5):
        np.testing.assert_allclose(shift_rule_error_mm(depth_mm, shift_mm, geometry), shift_mm * depth_mm / (sad_mm - depth_mm), atol=1e-9)
    with pytest.raises(ValueError, match="behind a source"):
        shift_rule_error_mm(sad_mm + 10, 1.0, geometry)


@pytest.mark.parametrize("angle_deg, towards_xyz", [(0.0, (0, -1, 0)), (90.0, (1, 0, 0))])
@pytest.mark.parametrize("depth_mm", [-120.0, 120.0])
def test_a_bead_lands_where_the_error_says(angle_deg, towards_xyz, depth_mm):
    """A blurred bead, projected before and after it is carried up: its centre of gravity moves by 1.5 (shift + error)."""
    geometry = replace(AP, angles_deg=(angle_deg,), sad_mm=600.0)
    x, y, z = depth_mm * np.array(towards_xyz)
    grid = centred_grid((40, 12, 12), 2.0)
    grid = {"z": grid["z"] + z, "y": grid["y"] + y, "x": grid["x"] + x}
    at = np.meshgrid(*grid.values(), indexing="ij")
    bead = np.exp(-((at[0] - z) ** 2 + (at[1] - y) ** 2 + (at[2] - x) ** 2) / (2 * 4.0**2)).astype(np.float32)
    bead = volume(bead, **grid, units="1")

    def row_mm(up_mm):
        image = line_integrals(bead, geometry, pose=rigid((0, 0, up_mm)))
        return float((image * image.v).sum() / image.sum())

    travelled_mm = (row_mm(8.0) - row_mm(0.0)) / 1.5
    error_mm = float(shift_rule_error_mm(depth_mm, 8.0, geometry))
    assert abs(error_mm) > 1 and travelled_mm - 8.0 == pytest.approx(error_mm, abs=0.05)


@pytest.fixture(scope="module")
def patient():
    return phantom_patient(1, voxel_mm=8, seed=5)


def test_the_gap_comes_from_the_rule_alone(patient):
    bare = replace(patient.physics, photons_per_mm2=None, couch=(), scatter_fraction=0.0)
    parallel = replace(patient, geometry=replace(patient.geometry, sad_mm=1e5))
    one_row_mm = 4.0
    near, far, still = (shift_rule_gap(p, s, bare) for p, s in ((patient, one_row_mm), (parallel, one_row_mm), (patient, 0.0)))
    assert (still == 0).all() and (far < near / 5).all() and near.shape == (2,)
    np.testing.assert_allclose(shift_rule_gap(patient, -one_row_mm, bare), near, rtol=0.4)
    assert (shift_rule_gap(patient, 2 * one_row_mm, bare) > 1.4 * near).all()
    assert (shift_rule_gap(patient, one_row_mm, patient.physics) > near).all()  # noise and the couch that stays


@pytest.mark.parametrize("sampling", [PRIMARY, SECONDARY])
def test_the_naive_pairing_is_a_bijection_in_order(sampling):
    pairing = naive_pairing(sampling)
    assert len({tuple(p) for p in pairing.tolist()}) == sampling.n_phases
    assert torch.equal(pairing[:, 0] * sampling.kv_stride + pairing[:, 1], torch.arange(sampling.n_phases))


@pytest.mark.parametrize("pair", [phase_pairing, naive_pairing])
@pytest.mark.parametrize("sampling", [PRIMARY, SECONDARY])
def test_misplacement_by_arithmetic(sampling, pair):
    """In the isocentre's planes: kV samples lie at 0.5 mm offset - 251.75 mm, every 0.5 k mm; CT samples at voxel - (N - 1) / 2."""
    pairing, k = pair(sampling), sampling.kv_stride
    found = pairing_misplacement_mm(sampling, pairing)
    assert {a: d.shape for a, d in found.items()} == {a: (sampling.n_phases, n // s) for a, n, s in
                                                        zip("zyx", (384, 336, 448), sampling.ct_stride)}
    place = torch.stack(torch.unravel_index(torch.arange(sampling.n_phases), sampling.ct_stride), 1).numpy()
    for axis, i, column, n in (("z", 0, 0, 384), ("y", 1, 1, 336), ("x", 2, 1, 448)):
        ct_mm = place[:, i : i + 1] + sampling.ct_stride[i] * np.arange(n // sampling.ct_stride[i]) - (n - 1) / 2
        apart = (0.5 * pairing[:, column : column + 1].numpy() - 251.75 - ct_mm) % (0.5 * k)
        np.testing.assert_allclose(found[axis], np.minimum(apart, 0.5 * k - apart), atol=1e-9)


def test_a_wrong_row_or_a_swap_is_seen():
    ours = phase_pairing(PRIMARY)
    assert all(pairing_misplacement_mm(PRIMARY, ours)[a] == pytest.approx(0.25) for a in "zy")
    later = (ours + torch.tensor([2, 0])) % 6  # a whole voxel
    moved = pairing_misplacement_mm(PRIMARY, later)
    assert moved["z"].min() == pytest.approx(0.75) and moved["z"].max() == pytest.approx(1.25) and moved["y"] == pytest.approx(0.25)
    swapped = pairing_misplacement_mm(PRIMARY, ours.flip(1))
    assert swapped["z"].max() > 1 and swapped["y"].max() > 1


def test_depth_spreads_the_samples_and_the_axis_does_not_care():
    """On the central ray depth changes nothing; 150 mm from it a plane 30 mm nearer is seen 150 * 30 / 1470 = 3.06 mm further out."""
    ours = phase_pairing(PRIMARY)
    flat, near = (pairing_misplacement_mm(PRIMARY, ours, depth_mm=d) for d in (0.0, 30.0))
    for axis in "zy":
        middle = flat[axis].shape[1] // 2
        assert np.abs(near[axis] - flat[axis])[:, middle - 1 : middle + 1].max() < 0.1
        assert near[axis].max() > 1.4 and np.sqrt((near[axis] ** 2).mean()) == pytest.approx(3 / 12**0.5, abs=0.1)
    # the first sample of phase 0 at its depth, by similar triangles
    seen_mm = -191.5 * 1500 / 1470
    kv_mm = -251.75 + 3 * np.arange(168)
    assert near["z"][0, 0] == pytest.approx(np.abs(kv_mm - seen_mm).min())
    with pytest.raises(ValueError, match="voxel_mm"):
        pairing_misplacement_mm(Sampling((2, 2, 1), 2, 0.1), phase_pairing(SECONDARY), voxel_mm=3.0)
