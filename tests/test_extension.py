"""Virtual days obey projection, poses are taken out with the right signs, and what the extension predicts moves with the patient."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from radrepro.core.volume import like
from radrepro.data.headneck import phantom_patient, reproject
from radrepro.kv2ct import extension
from radrepro.kv2ct.baselines import mean_training_ct
from radrepro.kv2ct.evaluate import pose_rows
from radrepro.kv2ct.extension import (
    Aligned,
    aligned_kv,
    changed_day,
    extension_converter,
    found_pose,
    new_anatomy_percent,
    projected,
    random_change,
    virtual_days,
)
from radrepro.kv2ct.grss import shift_rows
from radrepro.kv2ct.registration import Pose, moved_ct, reproject_pose
from radrepro.train.presets import ViTFit

PLANS = {"primary": ViTFit(7, (32,), (32,), 6, 4), "secondary": ViTFit(9, (32,), (32,), 6, 4)}


@pytest.fixture(scope="module")
def patient():
    return phantom_patient(2, voxel_mm=8, seed=5)


def moved_by(patient, z=0.0, y=0.0, x=0.0):
    """The pull-back displacement of content that moves by (z, y, x) mm."""
    return -torch.tensor([z, y, x]).view(1, 3, 1, 1, 1).expand(1, 3, *patient.planning.shape).contiguous()


@pytest.mark.parametrize("way", [{"z": 5.0}, {"z": -5.0}, {"y": 5.0}, {"x": 5.0}, {"x": -5.0}])
def test_a_day_that_is_only_a_shift_has_the_kv_of_the_shifted_patient(patient, way):
    day, before = patient.training[0], projected(patient, patient.training[0].ct)
    ct, kv = changed_day(patient, day, 0, moved_by(patient, **way), before)
    pose = Pose(tuple(way.get(a, 0.0) for a in "xyz"))
    truly = reproject_pose(patient, day, pose).values
    rows = patient.geometry.v_mm > 0  # below, the scan ends and the truth goes on
    apart = lambda a: float(np.abs(a[:, rows] - truly[:, rows]).mean())
    assert apart(kv.numpy()) < 0.6 * apart(day.kvs[0].values)
    there = moved_ct(day.ct, pose).values
    assert np.abs(ct.numpy() - there).mean() < 0.5 * np.abs(day.ct.values - there).mean()


def test_no_change_is_no_new_day(patient):
    ct, kv = changed_day(patient, patient.training[1], 0, moved_by(patient), projected(patient, patient.training[1].ct))
    np.testing.assert_allclose(ct, patient.training[1].ct.values, atol=0.1)  # sampling in float32
    np.testing.assert_allclose(kv, patient.training[1].kvs[0].values, atol=1e-4)


def test_random_changes_have_the_size_they_say_and_the_rigid_part_is_rigid(patient, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    changes = torch.cat([random_change(patient, generator) for _ in range(12)])
    at_knots = sum(s**2 for s in extension.KNOT_SD_MM) ** 0.5
    assert 0.4 * at_knots < float(changes.std()) < 1.5 * at_knots and abs(float(changes.mean())) < 1
    monkeypatch.setattr(extension, "KNOT_SD_MM", (0.0, 0.0))
    u, mm = random_change(patient, generator)[0], 8.0
    gradient = torch.stack([torch.stack(torch.gradient(c, spacing=mm), 0) for c in u])  # component, axis
    strain = gradient + gradient.transpose(0, 1)
    assert float(gradient.abs().max()) > 1e-3 and float(strain.abs().max()) < 1e-4  # a turn, and no stretch


def test_days_come_from_every_session_and_every_kv(patient, monkeypatch):
    monkeypatch.setattr(extension, "random_change", lambda p, g: moved_by(p))
    days = virtual_days(patient, 6, seed=3)
    for i, (ct, kv) in enumerate(days):
        session = patient.training[i % 2]
        np.testing.assert_allclose(ct, session.ct.values, atol=0.1)
        np.testing.assert_allclose(kv, session.kvs[i // 2 % len(session.kvs)].values, atol=1e-4)


@pytest.mark.parametrize("component", range(5))
@pytest.mark.parametrize("sign", [1, -1])
def test_each_component_of_a_pose_is_taken_out_in_its_direction(patient, component, sign):
    numbers = np.zeros(6)
    numbers[component] = sign * (4.0 if component < 3 else 2.0)
    pose = Pose(tuple(numbers[:3]), tuple(numbers[3:]))
    straight = projected(patient, patient.test.truth)
    kv = torch.from_numpy(reproject_pose(replace(patient, physics=replace(patient.physics, photons_per_mm2=None, couch=())), patient.test, pose).values)
    quiet = reproject_pose(replace(patient, physics=replace(patient.physics, photons_per_mm2=None, couch=())), patient.test, Pose()).values
    inner = (slice(None), slice(45, -15), slice(40, -40))
    apart = lambda a: float(np.abs(np.asarray(a) - quiet)[inner].mean())
    assert straight.shape == quiet.shape and apart(aligned_kv(kv, pose, patient.geometry)) < 0.7 * apart(kv)


def test_the_pose_that_is_found_has_the_signs_of_the_true_one(patient):
    true = Pose((3.0, -3.0, 4.0), (1.5, -1.5, 0.0))
    at_rest = found_pose(patient, torch.from_numpy(patient.test.kvs[0].values))
    found = found_pose(patient, torch.from_numpy(reproject_pose(patient, patient.test, true).values))
    change = np.subtract(found.translation_mm, at_rest.translation_mm)
    assert np.abs(change - true.translation_mm).max() < 1.0
    assert np.sign(np.subtract(found.rotation_deg, at_rest.rotation_deg))[:2].tolist() == [1, -1]


def test_the_prediction_goes_with_the_patient(patient, tmp_path):
    """Even an untrained model: a patient that lies higher is predicted higher."""
    days = virtual_days(patient, 2)
    models = [extension_converter(patient, which, PLANS[which], days) for which in ("primary", "secondary")]
    assert all(m.sampling.range_mm == extension.RANGE_MM and m.plan.kv_noise == extension.KV_NOISE for m in models)
    aligned = Aligned(patient, *models)
    rest, up = (aligned.predict(torch.from_numpy(reproject(patient, patient.test, s).values)) for s in (0.0, 8.0))
    inner = slice(4, -4)
    follows = float((up - shift_rows(rest, 1.0, dim=0))[inner].abs().mean())  # one voxel
    stays, opposite = (float((up - shift_rows(rest, s, dim=0))[inner].abs().mean()) for s in (0.0, -1.0))
    assert follows < 0.5 * stays < 0.5 * opposite


def test_new_anatomy_counts_only_what_no_mixture_has(patient):
    a, b = (torch.from_numpy(s.ct.values).double() for s in patient.training[:2])
    truth = torch.from_numpy(patient.test.ct.values).double()
    assert abs(new_anatomy_percent(patient, 1.7 * a - 0.7 * b)) < 1e-6
    half = mean_training_ct(patient) + 0.5 * (truth - mean_training_ct(patient))
    assert new_anatomy_percent(patient, half) == pytest.approx(50.0, abs=1e-5)
    assert new_anatomy_percent(patient, half + 3 * (a - b)) == pytest.approx(50.0, abs=1e-5)
    assert new_anatomy_percent(patient, 2 * mean_training_ct(patient) - truth) == pytest.approx(-100.0, abs=1e-5)
    one = replace(patient, sessions=(patient.training[0], patient.test))
    assert new_anatomy_percent(one, truth) == pytest.approx(100.0)


@pytest.mark.parametrize("which", ["primary", "secondary"])
def test_a_virtual_day_keeps_its_own_kv(patient, which):
    """Days told apart by a number in both: whatever sample of a day is drawn, CT and kV carry the same number."""
    shape, views = patient.planning.shape, patient.test.kvs[0].shape
    days = [(torch.full(shape, 1000.0 * n), torch.full(views, 100.0 * n)) for n in (1, 2, 3)]
    samples = extension_converter(patient, which, PLANS[which], days).samples
    drawn = samples.batch(torch.arange(0, len(samples), max(1, len(samples) // 4000)))
    ct, kv = (v.flatten(1).float().round() for v in (drawn.ct, drawn.kv))  # shifts are interpolated
    made_up = (kv.amin(1) >= 100) & (kv.amin(1) == kv.amax(1))  # a constant picture comes from a day; real ones are below
    assert torch.equal(ct[made_up].amin(1), 10 * kv[made_up].amax(1)) and set(kv[made_up].amax(1).tolist()) == {100.0, 200.0, 300.0}


def test_six_degree_errors_are_against_the_moved_truth(patient):
    """A model that knows the pose and the day has no error; the day as it lay has one."""
    pose = Pose(translation_mm=(3.0, -4.0, 2.0), rotation_deg=(2.0, 0.0, -1.0))
    truth = like(patient.test.ct.values, patient.planning, "HU")
    knows, lies = torch.from_numpy(moved_ct(truth, pose).values), torch.from_numpy(truth.values)
    rows = {r["model"]: r["value"] for r in pose_rows(patient, {"knows": lambda kv: knows, "lies": lambda kv: lies}, [pose])}
    assert rows["knows"] == 0 and rows["lies"] > 5
