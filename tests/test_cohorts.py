"""Cohorts: who is in which split, what a case holds, and a data_dir of any names in the documented layout."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import write_landmarks

from radrepro.core.volume import AXES
from radrepro.ct5d import stages as ct5d
from radrepro.ct5d import studies
from radrepro.data.cohorts import KINDS, HeadNeckCase, ThoraxCase, find_data_dir, headneck_cases, thorax_cases
from radrepro.data.headneck import BRAINSTEM_MM
from radrepro.kv2ct import dosimetry, robustness
from radrepro.kv2ct import evaluate as kv2ct
from radrepro.train.presets import get_preset

COUNTS = st.integers(0, 40)
SMALL = ((28, 30, 32), (11.0, 10.0, 11.0))


def centre_mm(mask):
    return [float((mask * mask[a]).sum() / mask.sum()) for a in "xyz"]


def test_cases_are_found_by_what_they_hold(made_up):
    [case] = headneck_cases("real", 10, data_dir=made_up)
    assert case == HeadNeckCase(1, "real", str(made_up / "hn_x" / "pt_1"), 0)
    cases = thorax_cases("real", train=2, validation=1, test=10, data_dir=str(made_up), seed=4)
    assert [(c.kind, c.split) for c in cases] == [("real", "test"), ("phantom", "validation")] + 2 * [
        ("phantom", "train")
    ]
    assert cases[0].folder == str(made_up / "thorax_x" / "somebody") and cases[0].landmarks == str(
        made_up / "lung_landmarks_x"
    )
    assert not any(c.folder or c.landmarks for c in cases[1:]) and {c.seed for c in cases} == {4}


def test_a_made_up_headneck_is_loaded_at_8_mm(made_up):
    patient = headneck_cases("real", 1, data_dir=made_up)[0].load(8)
    assert (patient.kind, patient.source, patient.number) == ("real", "pt_1", 1)
    assert patient.planning.shape == (48, 42, 56) and len(patient.training) == 2
    assert set(patient.structures) == {"body", "ctv", "brainstem", "parotid_left", "parotid_right"}
    np.testing.assert_allclose(centre_mm(patient.structures["brainstem"]), BRAINSTEM_MM, atol=3)
    wanted = {
        "parotid_left": (46, 25, -25),
        "parotid_right": (-58, 25, -25),
        "ctv": (14, 0, -40),
    }  # the brainstem's 6 less
    for name, centre in wanted.items():
        np.testing.assert_allclose(centre_mm(patient.structures[name]), centre, atol=4)
    tissue = patient.planning.where(patient.structures["brainstem"])
    assert float(tissue.median()) == pytest.approx(30, abs=15) and float(patient.planning.max()) > 500
    for session in patient.sessions:
        assert np.isfinite(session.ct).all() and all(np.isfinite(kv).all() for kv in session.kvs)
        assert 0 < float(abs(session.ct - patient.planning).mean()) < 80


def test_a_made_up_thorax_is_loaded_at_8_mm(made_up):
    case = thorax_cases("real", train=0, validation=0, test=1, data_dir=made_up)[0]
    patient = case.load((40, 38, 44), (8.0, 8.0, 8.0), scans=2)
    assert (patient.kind, patient.source, len(patient.scans)) == ("real", "somebody", 2)
    litres = float(patient.lung_mask.sum()) * 8**3 / 1e6
    assert litres == pytest.approx(2 * 4 / 3 * np.pi * 0.52 * 0.80 * 1.20, rel=0.15)
    for a in AXES:  # the lungs' box is at the isocentre
        at = patient.lung_mask[a].values[patient.lung_mask.any([b for b in AXES if b != a])]
        assert abs(at[0] + at[-1]) / 2 < 9
    np.testing.assert_allclose(
        patient.alpha_mm.sel(z=0, y=0, method="nearest").sel(x=[-70, 70], method="nearest"),
        [[-9, -9], [-2, -2], [0, 0]],
        atol=1.5,
    )  # down and to the front
    lung = patient.reference.where(patient.lung_mask).median()
    assert float(lung) == pytest.approx(180 / 1400, abs=0.03)
    assert all(float(s.ct.min()) >= 0 and float(s.ct.max()) <= 1 for s in patient.scans)


def test_other_names_give_the_same_patient(made_up, tmp_path):
    """Nothing but the content decides: the case may be called, and lie, as its owner likes."""
    renamed = tmp_path / "head_q"
    shutil.copytree(made_up / "hn_x" / "pt_1", renamed)
    [case], [again] = (headneck_cases("real", 3, data_dir=d) for d in (made_up, tmp_path))
    assert again.folder == str(renamed) and again.key() == case.key()
    assert again.load(8).planning.identical(case.load(8).planning)


# --- keys


def test_a_key_names_all_that_changes_the_numbers(made_up, tmp_path):
    case = headneck_cases("real", 1, data_dir=made_up)[0]
    json.dumps(case.key())
    assert case.key() != replace(case, seed=1).key() != replace(case, number=2, seed=1).key()
    for name in ("ct", "organs"):
        folder = tmp_path / name
        shutil.copytree(case.folder, folder)
        data = (folder / f"{name}.nii.gz").read_bytes()
        (folder / f"{name}.nii.gz").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert replace(case, folder=str(folder)).key() != case.key()
    assert "content" not in HeadNeckCase(1, "phantom").key()


@pytest.mark.parametrize("what", ["labels", "landmarks"])
def test_a_key_knows_labels_and_landmarks(made_up, tmp_path, what):
    shutil.copytree(made_up, tmp_path / "d")
    if what == "labels":
        (tmp_path / "d" / "hn_x" / "pt_1" / "labels.json").write_text(json.dumps({"organs.nii.gz": {"BrainStem": 9}}))
        before, after = (headneck_cases("real", 1, data_dir=d)[0].key() for d in (made_up, tmp_path / "d"))
    else:
        shutil.rmtree(tmp_path / "d" / "lung_landmarks_x")
        write_landmarks(tmp_path / "d" / "lung_landmarks_x", down_mm=20.0)
        before, after = (
            thorax_cases("real", train=0, validation=0, test=1, data_dir=d)[0].key() for d in (made_up, tmp_path / "d")
        )
    assert before != after


# --- splits and kinds


@settings(max_examples=40, deadline=None)
@given(train=COUNTS, validation=COUNTS, test=COUNTS, seed=st.integers(0, 5))
def test_no_patient_is_in_two_splits(train, validation, test, seed):
    cases = thorax_cases("phantom", train=train, validation=validation, test=test, seed=seed)
    count = {s: sum(c.split == s for c in cases) for s in ("train", "validation", "test")}
    assert count == {"train": train, "validation": validation, "test": test}
    assert len({c.number for c in cases}) == len(cases) and {c.kind for c in cases} <= {"phantom"}
    assert cases == thorax_cases("phantom", train=train, validation=validation, test=test, seed=seed)
    more = thorax_cases("phantom", train=train + 3, validation=validation, test=test, seed=seed)
    assert more[: len(cases)] == cases  # a larger training set keeps everyone else


def test_no_patient_is_in_two_splits_of_a_large_cohort():
    cases = thorax_cases("phantom", train=3, validation=1, test=101)
    assert len({c.number for c in cases}) == len(cases)


def test_headneck_phantoms_are_numbered_from_one():
    assert headneck_cases("phantom", 3, seed=7) == [HeadNeckCase(i, "phantom", seed=7) for i in (1, 2, 3)]
    assert headneck_cases("phantom", 0) == []


def test_loading_is_deterministic_and_by_seed():
    case = ThoraxCase(101, "phantom", "train")
    one, two, other = (c.load(*SMALL, scans=2) for c in (case, case, replace(case, seed=1)))
    assert all(a.ct.identical(b.ct) and a.amplitude.identical(b.amplitude) for a, b in zip(one.scans, two.scans))
    assert not one.reference.equals(other.reference)
    head = HeadNeckCase(2, "phantom")
    first, second, stranger = (c.load(8) for c in (head, head, replace(head, seed=1)))
    assert first.test.ct.identical(second.test.ct) and first.test.kvs[0].identical(second.test.kvs[0])
    assert not first.planning.equals(stranger.planning)


@pytest.mark.parametrize(
    "make", [lambda kind: headneck_cases(kind, 1), lambda kind: thorax_cases(kind, train=1, validation=1, test=1)]
)
def test_kinds(make, monkeypatch):
    monkeypatch.delenv("RADREPRO_DATA", raising=False)
    assert KINDS == ("phantom", "real", "clinical") and {c.kind for c in make("phantom")} == {"phantom"}
    with pytest.raises(ValueError, match=r"expected cohort to be one of .*, got 'Phantom': pass -p cohort phantom"):
        make("Phantom")
    for kind in ("real", "clinical"):
        with pytest.raises(FileNotFoundError, match="expected a folder of CTs .*, got none: pass -p data_dir PATH or set RADREPRO_DATA"):
            make(kind)


# --- where the data are


def test_data_dir_by_argument_then_by_environment(tmp_path, monkeypatch):
    named, other = tmp_path / "a", tmp_path / "b"
    named.mkdir(), other.mkdir()
    monkeypatch.setenv("RADREPRO_DATA", str(other))
    assert find_data_dir(named) == find_data_dir(str(named)) == named and find_data_dir() == find_data_dir("") == other
    monkeypatch.setenv("RADREPRO_DATA", str(tmp_path / "gone"))
    for call in (find_data_dir, lambda: find_data_dir(tmp_path / "gone")):
        with pytest.raises(
            FileNotFoundError, match="expected data_dir to be a folder, got '.*gone', which is not there: "
        ):
            call()


def test_the_environment_finds_cases_too(made_up, monkeypatch):
    monkeypatch.setenv("RADREPRO_DATA", str(made_up))
    assert headneck_cases("real", 1) == headneck_cases("real", 1, data_dir=made_up)
    sizes = {"train": 0, "validation": 0, "test": 1}
    assert thorax_cases("real", **sizes) == thorax_cases("real", **sizes, data_dir=made_up)


def test_real_data_hold_enough_patients(data_dir):
    heads = headneck_cases("real", 10, data_dir=data_dir)
    assert len(heads) >= 5 and [c.number for c in heads] == list(range(1, len(heads) + 1))
    assert len({c.folder for c in heads}) == len(heads) and all((Path(c.folder) / "ct.nii.gz").is_file() for c in heads)
    chests = [c for c in thorax_cases("real", train=1, validation=0, test=10, data_dir=data_dir) if c.split == "test"]
    assert len(chests) >= 2 and {c.kind for c in chests} == {"real"} and all(Path(c.landmarks).is_dir() for c in chests)
    assert len({c.key()["content"] for c in (*heads[:3], *chests)}) == len(heads[:3]) + len(chests)


def test_every_task_of_a_run_from_dicom_gets_the_exported_patients():
    """Else it would draw them again, with the same numbers, and nobody would see it."""
    told = get_preset("workstation"), "phantom", "", "out", "cpu", [0], "folder"
    for tasks in (ct5d.tasks, studies.study_tasks, kv2ct.tasks, dosimetry.dose_tasks, robustness.robustness_tasks):
        held = [a for t in tasks(*told) for b in t.arguments for a in (b if isinstance(b, list) else [b])]
        cases = [a for a in held if isinstance(a, (HeadNeckCase, ThoraxCase))]
        assert cases and all(c.exported and c.folder.startswith("folder/") for c in cases), tasks.__module__
