"""Study folders: what belongs together, what is left out and why, and that nothing of the patient's comes out."""
import warnings
from dataclasses import replace

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import write_landmarks
from made_up_dicom import item
from made_up_study import (
    F1,
    F2,
    F3,
    SECRETS,
    new_uid,
    write_breathing,
    write_chest,
    write_dose,
    write_head,
    write_kv,
    write_pair,
    write_plan,
    write_reg,
    write_structures,
)
from test_traces_dicom import write_vxp, write_waveform

from radrepro.core.dicom_rt import Registration, frame_id
from radrepro.core.dicom_series import find_series, short_uid
from radrepro.core.dicom_write import StudyHeader, referenced
from radrepro.core.dicom_write import write_ct as write_our_ct
from radrepro.core.dicom_write_rt import write_sct
from radrepro.core.dicom_write_study import write_imagined
from radrepro.core.volume import VECTOR, move, rigid, volume
from radrepro.data.cohorts import headneck_cases, thorax_cases
from radrepro.data.privacy import deidentify
from radrepro.data.study import _between, read_study, study_table
from radrepro.data.study_objects import Names, frames_to
from radrepro.data.study_patient import clinical_patient, days_of, measured_kvs

POSE = rigid((16, -8, 24), (0, 0, 25))  # of the second CT's patient


def read(folder, **kwargs):
    """The study and its table; nothing may be warned about, and nothing of the patient's may be in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        study = read_study(folder, **kwargs)
    table = study_table(study)
    seen = table.to_csv() + repr(study.rows) + repr(study.files.keys())
    assert not any(secret in seen for secret in SECRETS), seen
    assert set(table.status) <= {"used", "ignored", "refused"} and (table.why != "").all()
    return study, table


def why(table, what):
    return list(table[table.what == what].sort_values("status")[["status", "why"]].itertuples(index=False, name=None))


def refused(function, *args, **kwargs):
    with pytest.raises((ValueError, FileNotFoundError)) as e:
        function(*args, **kwargs)
    assert not any(secret in str(e.value) for secret in SECRETS), e.value
    assert e.value.__cause__ is None
    return str(e.value)


def centre(v):
    """Where the bright mark of `head_hu` is, x, y, z in mm."""
    mark = v > 365
    return np.array([float((mark * mark[a]).sum() / mark.sum()) for a in "xyz"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A planning CT with everything, two weeks of CT and kV, a treatment day with kV only, a trace."""
    folder = tmp_path_factory.mktemp("patients") / "CANARY Jane"
    write_head(folder / "a", "1")
    write_head(folder / "b" / "deep", "2", F2, "19990108", pose=POSE)
    write_head(folder / "b", "3", F1, "19990122")
    write_reg(folder / "reg CANARY.dcm", F2, np.linalg.inv(POSE), "RIGID")
    rs = write_structures(folder / "RS CANARY.dcm", series="1")
    write_structures(folder / "RS2 CANARY.dcm", [("Body", (40, -20), -16.0)], F2, series="2")
    write_plan(folder / "RP CANARY.dcm", structures=new_uid(rs), isocentre=(8, 0, -16))
    write_dose(folder / "RD CANARY.dcm")
    for day in ("19990108", "19990122", "19990205"):
        write_pair(folder, day, IsocenterPosition=[8, 0, -16])
    write_breathing(folder / "CANARY.csv")
    return folder


def test_everything_finds_its_place(whole):
    study, table = read(whole)
    assert [c.week for c in study.cts] == [0, 1, 3] and (table.status == "used").all() and len(table) == 15
    assert [len(c.kvs) for c in study.cts] == [0, 1, 1] and len(study.kvs) == 1  # a treatment day without a CT stays by itself
    assert study.isocentre_mm == (8, 0, -16) and study.plan.prescription_gy == 60 and study.dose.dose_gy.shape == (2, 3, 4)
    assert len(study.traces) == 1 and list(study.planning.structures) == ["CTV CANARY"] and list(study.cts[1].structures) == ["Body"]
    assert why(table, "CT")[0][1].startswith("planning CT: the plan was made on it")
    mask = study.planning.structures["CTV CANARY"]
    assert float(study.planning.ct.where(mask).median()) == 700
    np.testing.assert_allclose(centre(study.cts[1].ct), (POSE @ (*centre(study.planning.ct), 1))[:3], atol=2)
    for ct in study.cts:
        back = move(ct.ct, ct.to_planning, fill=-1000, to=study.planning.ct)
        np.testing.assert_allclose(centre(back), centre(study.planning.ct), atol=2)
    ap, lat = study.cts[1].kvs[0]
    assert (ap.angle_deg, lat.angle_deg) == (0, 90) and float(ap.image.isel(v=-1).mean()) > float(ap.image.isel(v=0).mean())


def test_a_patient_of_measured_days(whole):
    study, _ = read(whole)
    patient = clinical_patient(study, 1, voxel_mm=8)
    assert (patient.kind, patient.prescription_gy, patient.fractions) == ("clinical", 60, 30)
    assert patient.source == f"{study.planning.id}, plan read, kV measured"
    assert [s.name for s in patient.sessions] == ["train 1", "test"] and [s.week for s in patient.sessions] == [1, 3]
    mark = centre(study.planning.ct) - (8, 0, -16)  # about the isocentre
    for v in (patient.planning, *(s.ct for s in patient.sessions), *(s.truth.astype(np.float32) for s in patient.sessions)):
        np.testing.assert_allclose(centre(v), mark, atol=2)
    g = patient.geometry
    assert (g.sad_mm, g.sid_mm, g.angles_deg, g.pixel_mm) == (1000, 1500, (0, 90), 6) and g.shape_px == (78, 78)  # 13 x 6 of 80
    assert all(k.shape == (2, 78, 78) and np.isfinite(k).all() for s in patient.sessions for k in s.kvs)
    assert np.all(patient.test.kvs[0].diff("v") > 0)  # to the head
    assert {"ctv", "body"} <= set(patient.structures) and patient.structures["ctv"].any()
    assert patient.test.truth.z[0] == patient.planning.z[0] - 80 and patient.test.truth.dtype == np.int16
    assert not any(secret in repr(patient.source) for secret in SECRETS)


def test_days_that_cannot_be_used_together(whole):
    study, _ = read(whole)
    swap = lambda **new: study._replace(cts=(*study.cts[:2], study.cts[2]._replace(kvs=(tuple(
        k._replace(**{n: f(k) for n, f in new.items()}) for k in study.cts[2].kvs[0]),))))
    assert "angles" in refused(clinical_patient, swap(angle_deg=lambda k: k.angle_deg + 30), 1, voxel_mm=8)
    assert "a point 20 mm away" in refused(clinical_patient, swap(isocentre_mm=lambda k: (8, 20, -16)), 1, voxel_mm=8)
    assert "show 150 mm" in refused(clinical_patient, swap(image=lambda k: k.image.sel(v=slice(-60, 60))), 1, voxel_mm=8)
    assert "distances" in refused(clinical_patient, swap(sid_mm=lambda k: 1600.0), 1, voxel_mm=8)
    two = study._replace(plan=study.plan._replace(isocentres_mm=((8, 0, -16), (8, 0, 40))))
    assert "one isocentre" in refused(clinical_patient, two, 1, voxel_mm=8)
    few = study._replace(cts=(study.planning._replace(ct=study.planning.ct[:6]),))
    assert "at least 100 mm" in refused(clinical_patient, few, 1, voxel_mm=8)
    wrong = study._replace(cts=(study.planning._replace(ct=(study.planning.ct + 1000).assign_attrs(units="HU")),))
    assert "expected HU" in refused(clinical_patient, wrong, 1, voxel_mm=8)


def test_which_days_and_how_many_pairs(whole):
    study, _ = read(whole)
    twice = study._replace(cts=tuple(c._replace(kvs=c.kvs * 2) for c in study.cts))
    assert [len(s.kvs) for s in clinical_patient(twice, 1, voxel_mm=8).sessions] == [2, 1]  # the test day shows one pair
    assert days_of(study) == (list(study.cts[1:]), True)
    assert days_of(study._replace(cts=study.cts[1:2])) == ([], False)  # one measured day is no course
    there = tuple(float(c) for c in (POSE @ (*study.isocentre_mm, 1))[:3])  # the isocentre as the second CT's own frame has it
    for at, fine in ((there, True), (tuple(2 * np.array(study.isocentre_mm) - there), False)):
        pair = tuple(k._replace(isocentre_mm=at) for k in study.cts[1].kvs[0])
        kvs = [study.cts[1]._replace(kvs=(pair,)), study.cts[2]._replace(kvs=(pair if not fine else study.cts[2].kvs[0],))]
        if fine:
            assert len(measured_kvs(kvs, study.isocentre_mm, 8)[0]) == 2
        else:
            assert "about a point" in refused(measured_kvs, kvs, study.isocentre_mm, 8)


def test_kv_is_simulated_where_a_day_lacks_it(whole):
    study, _ = read(whole)
    bare = study._replace(cts=tuple(c._replace(kvs=()) for c in study.cts[:2]), plan=None)
    patient = clinical_patient(bare, 1, voxel_mm=8)
    assert patient.source == f"{study.planning.id}, dose of Table 1, kV simulated" and [s.week for s in patient.sessions] == [0, 1]
    assert patient.geometry.sad_mm == 1500 and all(len(s.kvs) == 1 for s in patient.sessions)


def test_no_registration_no_day(tmp_path):
    write_head(tmp_path, "1")
    write_head(tmp_path, "2", F2, "19990108")
    write_structures(tmp_path / "s.dcm", series="1")
    write_structures(tmp_path / "t.dcm", frame=F3, series="")
    write_dose(tmp_path / "d.dcm", F2)
    study, table = read(tmp_path)
    assert len(study.cts) == 1 and study.dose is None
    status, text = why(table, "CT")[0]
    assert status == "refused" and text.startswith("no registration that can be believed leads from its frame") and "(REG)" in text
    assert ("ignored", "not in the frame of the planning CT") in why(table, "RTDOSE")
    assert [s for s, _ in why(table, "RTSTRUCT")] == ["ignored", "used"]
    write_reg(tmp_path / "r.dcm", F2, rigid((0, 0, 5)), "RIGID")
    assert len(read(tmp_path)[0].cts) == 2
    write_reg(tmp_path / "q.dcm", F2, rigid((0, 3, 5)), "RIGID")
    study, table = read(tmp_path)
    assert len(study.cts) == 1 and [s for s, _ in why(table, "REG")] == ["refused"] * 2
    assert all(text.startswith("it contradicts another registration") for _, text in why(table, "REG"))
    write_reg(tmp_path / "q.dcm", F2, np.diag([1.1, 1, 1, 1]), "AFFINE")
    study, table = read(tmp_path)
    assert len(study.cts) == 2 and "RIGID" in why(table, "REG")[0][1]


def test_structures_of_a_frame_that_registrations_lead_from(tmp_path):
    write_head(tmp_path / "a", "1")
    write_structures(tmp_path / "s.dcm", frame=F3, series="77")
    write_reg(tmp_path / "q.dcm", F2, rigid((16, 0, 0)), "RIGID")
    write_reg(tmp_path / "r.dcm", F3, rigid((8, 0, 0)), "RIGID", target=F2)
    study, table = read(tmp_path)
    mask = study.planning.structures["CTV CANARY"]
    assert abs(float((mask * mask.x).sum() / mask.sum()) - 54) < 4  # 30 + 16 + 8 mm, over two steps
    for shift_mm in (0, 40):
        write_reg(tmp_path / f"t{shift_mm}.dcm", F3, rigid((shift_mm, 0, 0)), "RIGID")
    study, table = read(tmp_path)
    assert study.planning.structures == {} and [s for s, _ in why(table, "RTSTRUCT")] == ["refused"]
    assert (table[table.what == "REG"].status == "refused").sum() >= 3  # all that touch F3


def test_two_cts_and_nothing_that_decides(tmp_path):
    for series, frame in (("1", F1), ("2", F2)):
        write_head(tmp_path, series, frame, day="", n=4)
    text = refused(read_study, tmp_path)
    ids = [w for w in text.replace(",", " ").split() if len(w) == 8 and not set(w) - set("0123456789abcdef")]
    assert len(ids) == 2 and "planning=" in text
    for digits in ids:
        assert read(tmp_path, planning=digits)[0].planning.id == digits
    assert "another" in refused(read_study, tmp_path, planning="CANARY")


@pytest.mark.parametrize(("change", "tag"), [
    ({"GantryAngle": None}, "Gantry Angle"),
    ({"RTImageSID": None}, "RT Image SID"),
    ({"RadiationMachineSAD": None}, "Radiation Machine SAD"),
    ({"PixelIntensityRelationship": None}, "PixelIntensityRelationship"),
    ({"ImagePlanePixelSpacing": [0, 0]}, "Image Plane Pixel Spacing"),
])
def test_kv_whose_geometry_or_meaning_is_missing(tmp_path, change, tag):
    write_head(tmp_path, "1", day="19990108", n=4)
    write_kv(tmp_path / "kV CANARY.dcm", 0.0, **change)
    write_kv(tmp_path / "k.dcm", 90.0)
    study, table = read(tmp_path)
    assert study.planning.kvs == () and [s for s, _ in why(table, "kV")] == ["ignored", "refused"]
    assert "without a second one" in why(table, "kV")[0][1] and tag in why(table, "kV")[1][1]


def test_kv_by_frame_where_days_are_gone(tmp_path):
    write_head(tmp_path, "1", F1, day="", n=4)
    write_head(tmp_path, "2", F2, day="", n=4)
    write_reg(tmp_path / "r.dcm", F2, np.eye(4), "RIGID")
    write_pair(tmp_path, "", frame=F2, StudyDate=None)
    study, table = read(tmp_path)
    assert [len(c.kvs) for c in study.cts] == [0, 1] and "the frame of CT" in why(table, "kV")[0][1]


def test_the_isocentre_of_kv_pairs_where_there_is_no_plan(tmp_path):
    write_head(tmp_path, "1")
    write_head(tmp_path, "2", F2, "19990108", pose=POSE)
    write_reg(tmp_path / "r.dcm", F2, np.linalg.inv(POSE), "RIGID")
    write_head(tmp_path, "3", F1, "19990115")
    own = [round(float(c), 6) for c in (POSE @ (60, 0, -30, 1))[:3]]  # the second CT's frame has it there
    write_pair(tmp_path, "19990108", IsocenterPosition=own, frame=F2)
    write_pair(tmp_path, "19990115", IsocenterPosition=[60, 0, -30])
    study, table = read(tmp_path)
    np.testing.assert_allclose(study.isocentre_mm, (60, 0, -30), atol=1e-4)
    patient = clinical_patient(study, 1, voxel_mm=8)
    np.testing.assert_allclose(centre(patient.planning), centre(study.planning.ct) - (60, 0, -30), atol=2)
    for frame, at in ((F1, [60, 0, -30]), (F3, own)):  # a set-up image in the planning CT's frame, one in a frame that nothing leads from
        write_pair(tmp_path, "19990108", IsocenterPosition=at, frame=frame)
        np.testing.assert_allclose(read(tmp_path)[0].isocentre_mm, (60, 0, -30), atol=1e-4)
    write_pair(tmp_path, "19990115", IsocenterPosition=[60, 40, -30])
    study, _ = read(tmp_path)
    assert "a point 40 mm away" in refused(clinical_patient, study, 1, voxel_mm=8)
    for day in ("19990108", "19990115"):
        write_pair(tmp_path, day, IsocenterPosition=None)
    study, table = read(tmp_path)
    assert study.isocentre_mm is None and all("remark: neither a plan nor a kV image says where" in text for _, text in why(table, "kV"))
    assert clinical_patient(study, 1, voxel_mm=8).source.endswith("kV measured about an isocentre that no file gives")


def test_linear_images_become_attenuation(tmp_path):
    write_head(tmp_path, "1", day="19990108", n=4)
    write_pair(tmp_path, "19990108", PixelIntensityRelationship="LIN", PixelIntensityRelationshipSign=1)
    kv = read(tmp_path)[0].planning.kvs[0][0]
    assert abs(float(kv.image.min())) < 0.02 and float(kv.image.isel(v=0).mean()) > float(kv.image.isel(v=-1).mean()) + 3


def test_the_newest_structures_or_those_of_the_plan(tmp_path):
    write_head(tmp_path, "1", n=12)
    at = lambda name: [(name, (0, 0), -100.0)]
    old = write_structures(tmp_path / "o.dcm", at("old"), StructureSetDate="19990102")
    write_structures(tmp_path / "n.dcm", at("new"), StructureSetDate="19990103")
    assert list(read(tmp_path)[0].planning.structures) == ["new"]
    write_plan(tmp_path / "p.dcm", structures=new_uid(old))
    study, table = read(tmp_path)
    assert list(study.planning.structures) == ["old"] and "another structure set" in why(table, "RTSTRUCT")[0][1]
    for name in ("o", "n"):
        write_structures(tmp_path / f"{name}.dcm", at(name), StructureSetDate="19990102")
    study, table = read(tmp_path)
    assert study.planning.structures == {} and [s for s, _ in why(table, "RTSTRUCT")] == ["refused"] * 2


def test_doses_plans_and_phases_that_come_second(tmp_path):
    write_head(tmp_path, "1", n=12)
    phase = write_head(tmp_path, "2", n=12, day="19990101")
    rs = new_uid(write_structures(tmp_path / "s.dcm", [("a", (0, 0), -100.0)], series="1"))
    old = write_plan(tmp_path / "p.dcm", structures=rs, dose_gy=50, RTPlanDate="19990102")
    write_plan(tmp_path / "q.dcm", structures=rs, RTPlanDate="19990103")
    write_dose(tmp_path / "b.dcm", summation="BEAM")
    study, table = read(tmp_path)
    assert study.plan.prescription_gy == 60 and study.dose is None and "not the whole plan" in why(table, "RTDOSE")[0][1]
    assert "another phase" in why(table, "CT")[0][1] and phase
    write_dose(tmp_path / "c.dcm", ReferencedRTPlanSequence=[item(ReferencedSOPInstanceUID=new_uid(old))])
    study, table = read(tmp_path)
    assert study.plan.prescription_gy == 50 and study.dose is not None  # the plan that has a dose
    write_dose(tmp_path / "c.dcm", ReferencedRTPlanSequence=[item(ReferencedSOPInstanceUID="1.2.999")])
    study, table = read(tmp_path)
    assert study.plan is not None and study.dose is None and ("ignored", "of another plan than the one that is used") in why(table, "RTDOSE")
    for name in "pq":  # a plan that is not this CT's
        write_plan(tmp_path / f"{name}.dcm", F3)
    write_dose(tmp_path / "c.dcm", ReferencedRTPlanSequence=[item(ReferencedSOPInstanceUID=new_uid(tmp_path / "p.dcm"))])
    study, table = read(tmp_path)
    assert study.plan is None and study.dose is None and ("ignored", "of another plan than the one that is used") in why(table, "RTDOSE")


def test_damaged_files_links_tables_and_doubles(tmp_path):
    folder = tmp_path / "CANARY"
    slices = write_head(folder, "1", n=4)
    write_kv(folder / "kV CANARY.dcm")
    cut = folder / "CANARY cut.dcm"
    cut.write_bytes(slices[0].read_bytes()[:1000])
    (folder / "CANARY note.txt").write_text("CANARY")
    (folder / "Jane.csv").write_text("Jane Roe,CANARY\n1,2\n")
    (folder / "CANARY.vxp").write_text("CANARY")
    (folder / "again CANARY.dcm").write_bytes((folder / "kV CANARY.dcm").read_bytes())
    study, table = read(folder)
    assert len(study.planning.ct) == 4 and table.status.value_counts().to_dict() == {"refused": 3, "ignored": 3, "used": 1}
    assert "there twice" in " ".join(table.why) and "1 damaged file(s)" in why(table, "CT")[0][1]
    (folder / "CANARY top.dcm").touch()  # of a slice that a full disk left empty
    assert "2 damaged file(s) in the study: is the first or last slice" in why(read(folder)[1], "CT")[0][1]
    row = table[table.what == "damaged file"].iloc[0]
    [digits] = [w for w in row.why.replace(":", "").split() if w in study.files]
    assert cut in study.files[digits]
    slices[1].write_bytes(slices[1].read_bytes()[:-500])
    assert "planning CT" in refused(read_study, folder)  # a hole
    (folder / "CANARY link").symlink_to(tmp_path)
    assert "link" in refused(read_study, folder)
    (folder / "CANARY link").unlink()
    (folder / "x: expected CANARY Jane.dcm").symlink_to(tmp_path)
    assert refused(read_study, folder).startswith("study folder: expected files of this folder, got a link that leads out of it: ")
    assert "expected a study folder" in refused(read_study, tmp_path / "CANARY none")
    (tmp_path / "empty CANARY").mkdir()
    assert "at least one CT" in refused(read_study, tmp_path / "empty CANARY")


def test_what_radrepro_made_of_the_patient_is_no_day(tmp_path):
    write_head(tmp_path / "a", "1", n=6, day="")
    write_head(tmp_path / "b", "2", F2, n=6, day="")
    write_reg(tmp_path / "r.dcm", F2, np.eye(4), "RIGID")
    ours, header = tmp_path / "ours", StudyHeader(seed="made")
    before, _ = read(tmp_path)
    ct, source = before.cts[1].ct, next(referenced(s) for s in find_series(tmp_path / "b").series)
    field = volume(np.zeros((3, *ct.shape), np.float32), **{a: ct[a].values for a in "zyx"}, units="mm")
    assert field.dims[0] == VECTOR
    write_sct(ct, ours / "same", header, source=source)
    write_sct(ct + 1, ours / "apart", header, source=source, to_source=rigid((5, 0, 0)))  # its registration leads to the second CT
    write_imagined({0.0: (ct, field)}, ours / "4d", header, source=source)
    study, table = read(tmp_path)
    assert [c.id for c in study.cts] == [c.id for c in before.cts]
    said = [row.why for row in table[table.status == "ignored"].itertuples()]
    assert said.count("a synthetic CT or an imagined phase that radrepro wrote") == 3 and len(said) == 5
    assert "the motion of an imagined phase that radrepro wrote" in said and "the registration of a synthetic CT that radrepro wrote" in said
    deidentify(tmp_path, tmp_path.with_name(tmp_path.name + "-copy"), secret="a secret for tests 2")
    copy, said_there = read(tmp_path.with_name(tmp_path.name + "-copy"))
    assert len(copy.cts) == len(before.cts) and (said_there.status == "ignored").sum() == 5
    write_our_ct(ct, ours / "exported", header, frame_uid=F1)  # as `radrepro export` writes a built-in patient's day: made of nothing
    assert len(read(tmp_path, planning=study.planning.id)[0].cts) == 3


def test_names_are_hidden_and_errors_kept(tmp_path):
    for name in ("a: CANARY.dcm", "1: ", "b.dcm"):
        (tmp_path / name).touch()
    names = Names(tmp_path.iterdir())
    for name in ("a: CANARY.dcm", "1: "):
        said = names.hide(f"{name}: expected one, got none")
        assert said == "file e3b0c442: expected one, got none"
    assert sorted(p.name for p in names.files["e3b0c442"]) == ["1: ", "a: CANARY.dcm"]

    def too_large():
        raise MemoryError("CANARY")
    value, said = names.attempt(too_large)
    assert value is None and said.startswith("expected an object that fits into memory")


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 6))
def test_registrations_lead_through_any_chain(seed, n):
    """Frames hung on a random tree, registered in either direction: every matrix is that of the true poses."""
    rng = np.random.default_rng(seed)
    poses = [rigid(tuple(rng.uniform(-30, 30, 3)), tuple(rng.uniform(-20, 20, 3))) for _ in range(n + 1)]  # frame -> world
    edges = [(i, int(rng.integers(i))) if rng.random() < 0.5 else (int(rng.integers(i)), i) for i in range(1, n + 1)]
    regs = [Registration(np.linalg.inv(poses[b]) @ poses[a], f"f{a}", f"f{b}") for a, b in rng.permutation(edges)]
    found = frames_to(regs, "f0")
    assert set(found) == {f"f{i}" for i in range(n + 1)}
    for i in range(n + 1):
        np.testing.assert_allclose(found[f"f{i}"], np.linalg.inv(poses[0]) @ poses[i], atol=1e-9)
    bad = regs[0]._replace(matrix=rigid((0, 2, 0)) @ regs[0].matrix)
    assert set(frames_to([*regs, bad], "f0")) < set(found) and frames_to([], "f0").keys() == {"f0"}


def test_the_cohort_clinical(tmp_path, monkeypatch):
    monkeypatch.delenv("RADREPRO_DATA", raising=False)
    write_head(tmp_path / "CANARY Jane" / "CT", "1", n=30)
    write_head(tmp_path / "Zoe CANARY", "1", n=4)
    (tmp_path / "no patient").mkdir()
    write_head(tmp_path / "Lung CANARY", "1", n=4)
    write_breathing(tmp_path / "Lung CANARY" / "b.csv")
    (tmp_path / "CANARY Jane" / "list.csv").write_text("day,who\n1,CANARY\n")  # a table that is no breathing
    one, two = headneck_cases("clinical", 10, data_dir=tmp_path)
    assert (one.number, one.kind, two.number) == (1, "clinical", 2) and "CANARY" not in str(one.key())
    patient = one.load(8)
    assert (patient.kind, patient.number) == ("clinical", 1) and patient.source.endswith("dose of Table 1, days and kV simulated")
    assert one.load(8) is patient and len(patient.sessions) == 3
    assert refused(two.load, 8).startswith("patient 2 of cohort clinical: planning CT")
    before = one.key()
    (tmp_path / "CANARY Jane" / "CT" / "new.txt").write_text("x")
    assert one.key() != before and replace(one, number=2).key() != one.key()
    with pytest.raises(FileNotFoundError, match="lung_landmarks"):
        thorax_cases("clinical", train=0, validation=0, test=1, data_dir=tmp_path)
    (tmp_path / "lung_landmarks_x").mkdir()
    [case] = thorax_cases("clinical", train=0, validation=0, test=9, data_dir=tmp_path)
    assert (case.kind, case.split, case.number) == ("clinical", "test", 1)
    assert refused(case.load, (8, 8, 8), (40.0, 40.0, 40.0), 2).startswith("patient 1 of cohort clinical")
    write_head(tmp_path / "no patient" / "x", "1", n=4)
    assert thorax_cases("clinical", train=2, validation=1, test=1, data_dir=tmp_path / "no patient") == []  # heads alone
    with pytest.raises(FileNotFoundError, match="a sub-folder with DICOM CTs"):
        thorax_cases("clinical", train=0, validation=0, test=1, data_dir=tmp_path / "lung_landmarks_x")


def test_a_thorax_of_the_clinic_breathes(tmp_path):
    write_chest(tmp_path / "CANARY")
    write_landmarks(tmp_path / "lung_landmarks_x", down_mm=9.0)
    [case] = thorax_cases("clinical", train=0, validation=0, test=1, data_dir=tmp_path)
    patient = case.load((28, 30, 32), (11.0, 10.0, 11.0), scans=3)
    assert (patient.kind, len(patient.scans)) == ("clinical", 3) and patient.source.endswith(", motion borrowed")
    assert abs(np.median(patient.alpha_mm.sel(vector="z").values[patient.lung_mask.values]) + 9) < 1.5  # down, when inhaling
    assert "at least 90 s" in refused(case.load, (28, 30, 32), (11.0, 10.0, 11.0), 25)


def test_traces_of_every_kind(tmp_path):
    write_head(tmp_path, "1", n=4)
    write_breathing(tmp_path / "a.csv", 25)
    write_vxp(tmp_path / "CANARY.VXP")
    waveform = pydicom.dcmread(write_waveform(tmp_path / "w CANARY.dcm"))
    waveform.SeriesInstanceUID = "1.2.3"
    waveform.save_as(tmp_path / "w CANARY.dcm")
    study, table = read(tmp_path)
    assert sorted(round(float(t.time[-1])) for t in study.traces) == [25, 30, 30] and set(table.status) == {"used"}


def test_real_objects_of_others(data_dir):
    """A CT slice, structures and a plan of somebody else's: the table accounts for each file."""
    folder = data_dir / "dicom_rt_dicompyler"
    if not folder.is_dir():
        pytest.skip("dicom_rt_dicompyler is not in RADREPRO_DATA")
    study = read_study(folder)
    table = study_table(study)
    assert {"CT", "RTSTRUCT", "RTPLAN"} <= set(table.what) and len(study.planning.structures) > 5
    assert short_uid("") == "" and frame_id("") == ""


def test_between_two_frames_the_way_leads_through_the_planning_ct():
    """A point of one frame and what it becomes in the other lie at one place of the planning CT."""
    to_planning = {"a": rigid((5, -3, 2), (0, 0, 30)), "b": rigid((-4, 7, 1), (20, 0, 0))}
    found = _between("a", "b", to_planning)
    np.testing.assert_allclose(to_planning["b"] @ found.matrix, to_planning["a"], atol=1e-12)
    assert (found.source, found.target) == ("a", "b") and _between("a", "c", to_planning) is None
