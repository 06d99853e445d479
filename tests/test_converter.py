"""Paper A's converter: what each model sees of the kV, whole phases, and the readings beside each other."""
from dataclasses import replace

import numpy as np
import pytest
import torch

from radrepro.core.project import line_integrals
from radrepro.core.volume import AXES
from radrepro.data.headneck import phantom_patient
from radrepro.kv2ct.fit import LITERAL, OURS, Converter, fuse, head_window
from radrepro.kv2ct.grss import SECONDARY
from radrepro.train.presets import ViTFit

PLAN = {"primary": ViTFit(7, (16,), (16,), 6, 4), "secondary": ViTFit(9, (16,), (16,), 6, 4)}


@pytest.fixture(scope="module")
def patient():
    return phantom_patient(4, voxel_mm=8, seed=1)


@pytest.fixture(scope="module")
def trained(patient, tmp_path_factory):
    """Converters of a few steps, by name."""
    made = {}
    for name, which, reading in (("primary", "primary", OURS), ("secondary", "secondary", OURS),
                                 ("whole", "secondary", replace(OURS, head_kv=False))):
        made[name] = Converter(patient, which, PLAN[which], reading=reading)
        made[name].train(tmp_path_factory.mktemp(name))
    return made


@pytest.mark.parametrize("voxel_mm", [8, 4])
@pytest.mark.parametrize("number", [1, 7])
def test_the_head_window_holds_the_shadow_of_the_head_box(number, voxel_mm):
    """The shadow by the ray marcher, not by the same corners: no ray outside of the window meets the box."""
    patient = phantom_patient(number, voxel_mm=voxel_mm)
    rows, columns = head_window(patient, SECONDARY)
    inside = patient.planning * 0
    inside[dict(patient.head_box)] = 1
    shadow = line_integrals(inside.assign_attrs(units="1"), patient.geometry).values > voxel_mm  # mm: more than a graze of the edge
    seen = [np.flatnonzero(shadow.any(axis)) for axis in ((0, 2), (0, 1))]
    reach = int(np.ceil(SECONDARY.range_mm * 1.5 / patient.geometry.pixel_mm))  # pixels that a shift moves the image by
    assert rows.start <= seen[0][0] - reach + 1 and seen[0][-1] + reach - 1 < rows.stop
    assert columns.start <= seen[1][0] and seen[1][-1] < columns.stop
    assert all(s.start % 2 == 0 and s.stop % 2 == 0 for s in (rows, columns))
    assert rows.stop - rows.start < 0.7 * shadow.shape[1] and columns.stop - columns.start < shadow.shape[2]  # it does cut


def test_only_the_secondary_is_blind_outside_of_the_window(patient, trained):
    kv = torch.from_numpy(patient.test.kvs[0].values)
    rows, columns = head_window(patient, SECONDARY)
    outside, inside = kv + 1.0, kv.clone()
    outside[:, rows, columns] = kv[:, rows, columns]
    inside[:, rows, columns] += 1.0
    answers = {name: [c.predict(k) for k in (kv, outside, inside)] for name, c in trained.items()}
    assert torch.equal(answers["secondary"][0], answers["secondary"][1])
    assert not torch.equal(answers["secondary"][0], answers["secondary"][2])
    for name in ("primary", "whole"):
        assert not torch.equal(answers[name][0], answers[name][1]), name


def test_cutting_the_kv_leaves_the_phases_in_place(patient):
    """The samples of the cut image are the samples of the whole one, cut: shift by shift and phase by phase."""
    cut = Converter(patient, "secondary", PLAN["secondary"])
    whole = Converter(patient, "secondary", PLAN["secondary"], reading=replace(OURS, head_kv=False))
    assert len(cut.samples) == len(whole.samples)
    drawn = torch.randint(len(cut.samples), (12,), generator=torch.Generator().manual_seed(3))
    a, b = cut.samples.batch(drawn), whole.samples.batch(drawn)
    rows, columns = (slice(s.start // 2, s.stop // 2) for s in head_window(patient, SECONDARY))
    inner = slice(3, -3)  # a shift fills the outermost rows from beyond the border, which lies elsewhere
    assert torch.allclose(a.kv[:, :, inner], b.kv[:, :, rows, columns][:, :, inner], atol=1e-5)
    assert torch.equal(a.ct, b.ct) and torch.equal(a.phase, b.phase) and torch.equal(a.shift_mm, b.shift_mm)


def test_an_untrained_converter_answers_with_the_mean_training_ct(patient):
    mean = torch.stack([torch.from_numpy(s.ct.values).float() for s in patient.training]).mean(0)
    kv = patient.test.kvs[0]
    first, second = (Converter(patient, w, PLAN[w]).predict(kv) for w in ("primary", "secondary"))
    assert torch.allclose(fuse(first, second, patient.head_box), mean, atol=1e-2)
    box = tuple(patient.head_box[a] for a in AXES)
    assert torch.allclose(second, mean[box], atol=1e-2)


def test_the_literal_reading_is_the_papers():
    assert LITERAL.crossed_pairs and not any((LITERAL.phase_code, LITERAL.per_position, LITERAL.mean_residual, LITERAL.standardise,
                                              LITERAL.mix_sessions, LITERAL.head_kv, LITERAL.disturb_kv))
