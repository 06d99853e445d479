"""Rigid registration of a kV pair: known poses come back with their signs; what cannot be seen is not claimed."""

import numpy as np
import pytest
import torch

from radrepro.core.project import KVGeometry, KVPhysics, kv_geometry, kv_pair, project_points
from radrepro.core.volume import rigid
from radrepro.data.headneck import phantom_patient
from radrepro.kv2ct.grss import shift_rows
from radrepro.kv2ct.registration import (
    HEAD_FROM_MM,
    Pose,
    head_points,
    moved_ct,
    moved_training_ct,
    pose_error,
    random_poses,
    register_2d2d,
    register_2d3d,
    reproject_pose,
    session_pose,
    table_6_poses,
    target_error_mm,
    triangulate,
)

QUIET = KVPhysics(photons_per_mm2=None)
SIX = [(0, 2.0), (1, 2.0), (2, 2.0), (3, 1.5), (4, 1.5), (5, 1.5)]  # component, size in mm or degrees


def pose_of(six) -> Pose:
    return Pose(tuple(six[:3]), tuple(six[3:]))


def six_of(pose: Pose) -> np.ndarray:
    return np.r_[pose.translation_mm, pose.rotation_deg]


@pytest.fixture(scope="module")
def coarse():
    return phantom_patient(2, voxel_mm=8, seed=5)


@pytest.fixture(scope="module")
def fine():
    return phantom_patient(3, voxel_mm=4, seed=5)


STILL = Pose()


def images(patient, pose=STILL):
    return kv_pair(patient.training[0].ct, patient.geometry, QUIET, seed=0, pose=pose.matrix)


# --- poses --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("axis", range(3))
def test_a_pose_turns_right_handed_about_the_isocentre(axis):
    angles, point = np.zeros(3), np.eye(4)[(axis + 1) % 3]
    angles[axis], point[3] = 90.0, 1.0
    expected = np.eye(3)[(axis + 2) % 3]  # y to z about x, z to x about y, x to y about z
    np.testing.assert_allclose((Pose((0, 0, 0), tuple(angles)).matrix @ point)[:3], expected, atol=1e-12)


def test_a_matrix_gives_its_pose_back():
    for pose in random_poses(20, seed=3, rotation_deg=40.0):
        np.testing.assert_allclose(six_of(Pose.from_matrix(pose.matrix)), six_of(pose), atol=1e-9)
    with pytest.raises(ValueError, match="rigid"):
        Pose.from_matrix(2 * np.eye(4))


def test_errors_of_a_pose():
    true = Pose((1, 2, 3), (0.5, -1, 2))
    assert pose_error(true, true) == pytest.approx((0, 0), abs=1e-9)
    off = Pose.from_matrix(rigid((0, 3, -4)) @ true.matrix @ rigid(rotation_deg=(0, 0, 1.5)))
    assert pose_error(off, true) == pytest.approx((5, 1.5))
    # 2 degrees about z: nothing on the axis, the chord at 80 mm from it
    turned = Pose(rotation_deg=(0, 0, 2))
    assert target_error_mm(turned, Pose(), np.array([[0.0, 0, 90]])) == pytest.approx(0, abs=1e-12)
    assert target_error_mm(turned, Pose(), np.array([[80.0, 0, 30]])) == pytest.approx(160 * np.sin(np.deg2rad(1)))
    assert target_error_mm(Pose((0, 0, -2)), Pose(), np.array([[80.0, 0, 30], [0, 0, 0]])) == pytest.approx(2)


def test_points_lie_in_the_head(coarse):
    points, box = head_points(coarse), coarse.head_box
    assert len(points) > 300
    for i, a in enumerate("xyz"):
        inside = coarse.planning[a].values[box[a]]
        assert inside[0] <= points[:, i].min() and points[:, i].max() <= inside[-1]
    body = coarse.structures["body"]
    assert all(bool(body.sel(x=x, y=y, z=z)) for x, y, z in points[::50])


# --- 2D/2D --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("angles", [(0.0, 90.0), (30.0, 100.0)])
def test_triangulation_inverts_the_cone_beam(angles):
    geometry = KVGeometry(3.0, (252, 252), angles_deg=angles)
    for t in ((30.0, -40.0, 25.0), (-4.5, 0.0, 0.0), (0.0, 0.0, 2.0)):
        np.testing.assert_allclose(triangulate(project_points([t], geometry)[:, 0], geometry), t, atol=1e-9)


def test_one_view_does_not_triangulate():
    with pytest.raises(ValueError, match="add a view"):
        triangulate(np.zeros((2, 2)), KVGeometry(3.0, (252, 252), angles_deg=(0.0, 180.0)))


@pytest.mark.parametrize("component, size", SIX[:5])
@pytest.mark.parametrize("sign", [1, -1])
def test_2d2d_finds_each_of_five_with_its_sign(coarse, component, size, sign):
    true = np.zeros(6)
    true[component] = sign * size
    found = register_2d2d(images(coarse), images(coarse, pose_of(true)), coarse.geometry, 5)
    np.testing.assert_allclose(six_of(found), true, atol=0.5)


def test_2d2d_does_not_see_the_rotation_about_the_long_axis(coarse):
    found = register_2d2d(images(coarse), images(coarse, Pose(rotation_deg=(0, 0, 1.5))), coarse.geometry, 5)
    assert found.rotation_deg[2] == 0 and np.abs(six_of(found)).max() < 1.0


def test_identical_images_give_the_identity(coarse):
    kv = images(coarse)
    for dof in (1, 3, 5):
        np.testing.assert_allclose(six_of(register_2d2d(kv, kv, coarse.geometry, dof)), 0, atol=1e-6)
    for dof in (1, 3, 6):
        np.testing.assert_allclose(six_of(register_2d3d(coarse.training[0].ct, kv, coarse.geometry, QUIET, dof)), 0, atol=0.05)


def test_fewer_degrees_of_freedom_leave_the_others_alone(coarse):
    kv = images(coarse, Pose((2.0, -2.0, 3.0)))
    one, three = (register_2d2d(images(coarse), kv, coarse.geometry, dof) for dof in (1, 3))
    assert one.translation_mm[:2] == (0, 0) and one.rotation_deg == three.rotation_deg == (0, 0, 0)
    one, three = (register_2d3d(coarse.training[0].ct, kv, coarse.geometry, QUIET, dof) for dof in (1, 3))
    assert one.translation_mm[:2] == (0, 0) and one.rotation_deg == three.rotation_deg == (0, 0, 0)
    np.testing.assert_allclose(three.translation_mm, (2, -2, 3), atol=0.2)


# --- 2D/3D --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("component, size", SIX)
def test_2d3d_finds_each_of_six_with_its_sign(coarse, component, size):
    for sign in (1, -1):
        true = np.zeros(6)
        true[component] = sign * size
        found = register_2d3d(coarse.training[0].ct, images(coarse, pose_of(true)), coarse.geometry, QUIET, 6)
        np.testing.assert_allclose(six_of(found), true, atol=0.3)


@pytest.mark.parametrize("seed", [1, 2])
def test_2d3d_recovers_a_known_pose(fine, seed):
    true = random_poses(1, seed)[0]
    found = register_2d3d(fine.training[0].ct, images(fine, true), fine.geometry, QUIET, 6)
    translation_mm, rotation_deg = pose_error(found, true)
    assert translation_mm < 0.2 and rotation_deg < 0.2


def test_2d3d_does_not_mind_gain_and_offset(coarse):
    true = Pose((2.0, -1.0, 1.5), (0.5, 1.0, -1.0))
    kv = images(coarse, true) * np.array([1.2, 0.8])[:, None, None] + np.array([0.3, -0.1])[:, None, None]
    found = register_2d3d(coarse.training[0].ct, kv, coarse.geometry, QUIET, 6)
    assert max(pose_error(found, true)) < 0.4


def test_the_residual_of_a_session_is_what_is_found(fine):
    """With the day's own CT, noise and all: kv_residuals is the pose at shift 0, and composes with what is asked for."""
    session, asked = fine.training[0], Pose((3.0, -2.0, 1.0), (1.0, -1.0, 1.5))
    found = register_2d3d(session.ct, reproject_pose(fine, session, asked), fine.geometry, fine.physics, 6)
    true = Pose.from_matrix(asked.matrix @ session.kv_residuals[0])
    assert max(pose_error(found, true)) < 0.3
    np.testing.assert_allclose(reproject_pose(fine, session, Pose()), session.kvs[0])


# --- CTs and rows -------------------------------------------------------------------------------------------------

def test_a_moved_ct_repeats_its_edge(coarse):
    ct = coarse.training[0].ct
    step = float(ct.z[1] - ct.z[0])
    for axis, name in ((0, "z"), (1, "y"), (2, "x")):
        t = {"x": (step, 0, 0), "y": (0, step, 0), "z": (0, 0, step)}[name]
        expected = shift_rows(torch.from_numpy(ct.values), 1.0, dim=axis)
        np.testing.assert_allclose(moved_ct(ct, Pose(t)), expected, atol=0.5)


def test_moved_training_cts_follow_the_patient(coarse):
    # where the patient went: the moved CTs must be nearer to the moved test CT than CTs moved the other way
    pose = Pose((0, 0, 6.0), (0, 0, 3.0))
    kv = reproject_pose(coarse, coarse.test, pose)
    body = coarse.structures["body"].values.astype(bool)
    truth = moved_ct(coarse.test.ct, pose).values
    still = np.abs(np.mean([s.ct.values for s in coarse.training], 0) - truth)[body].mean()
    errors = {(w, d): np.abs(moved_training_ct(coarse, kv, w, d).numpy() - truth)[body].mean() for w, d in (("2d2d", 1), ("2d3d", 6))}
    assert errors["2d3d", 6] < errors["2d2d", 1] < still


def test_rows_of_the_table(coarse):
    rows = table_6_poses(coarse, random_poses(1, seed=4), (("2d2d", 3), ("2d3d", 6)))
    assert {r["model"] for r in rows} == {"no_registration", "registration_2d2d_3dof", "registration_2d3d_6dof"}
    assert {(r["metric"], r["unit"]) for r in rows} == {("translation_error", "mm"), ("rotation_error", "deg"), ("tre", "mm")}
    by = {(r["model"], r["metric"]): r["value"] for r in rows}
    assert all(r["table"] == 6 and r["count"] == 1 for r in rows)
    assert by["registration_2d3d_6dof", "tre"] < by["no_registration", "tre"]


def test_random_poses_stay_in_range():
    drawn = np.array([six_of(p) for p in random_poses(500, seed=0)])
    assert np.abs(drawn[:, :3]).max() <= 4.5 and np.abs(drawn[:, 3:]).max() <= 2
    assert (drawn.max(0) > [4, 4, 4, 1.8, 1.8, 1.8]).all() and (drawn.min(0) < [-4, -4, -4, -1.8, -1.8, -1.8]).all()


# --- bad input ----------------------------------------------------------------------------------------------------

def test_bad_input_is_refused(coarse):
    kv, ct, geometry = images(coarse), coarse.training[0].ct, coarse.geometry
    with pytest.raises(ValueError, match="dof"):
        register_2d2d(kv, kv, geometry, 6)
    with pytest.raises(ValueError, match="dof"):
        register_2d3d(ct, kv, geometry, QUIET, 5)
    with pytest.raises(ValueError, match="geometry it was taken with"):
        register_2d2d(kv, kv, kv_geometry(4), 3)
    with pytest.raises(ValueError, match="NaN"):
        register_2d3d(ct, kv.where(kv.v > 0), geometry, QUIET, 3)
    with pytest.raises(ValueError, match="expected 'HU'"):
        register_2d3d(ct.assign_attrs(units="1"), kv, geometry, QUIET, 3)
    with pytest.raises(ValueError, match="reaches above"):
        register_2d3d(ct.sel(z=slice(None, HEAD_FROM_MM - 10)), kv, geometry, QUIET, 3)
    with pytest.raises(ValueError, match="multiples of 3"):
        register_2d3d(ct, np.zeros((2, 100, 100)), KVGeometry(6.0, (100, 100)), QUIET, 3)
    with pytest.raises(ValueError, match="2d2d or 2d3d"):
        session_pose(coarse, coarse.training[0], kv, "3d", 3)
