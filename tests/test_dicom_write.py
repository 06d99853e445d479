"""What is written as DICOM is read back by other people's tools and by our readers: same voxels, same millimetres, and nobody's data."""
import shutil
import subprocess
import warnings
from datetime import datetime

import numpy as np
import pydicom
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.uid import ExplicitVRLittleEndian, HemodynamicWaveformStorage, ImplicitVRLittleEndian

from radrepro.core.dicom_contours import outline
from radrepro.core.dicom_ct import read_ct
from radrepro.core.dicom_kv import POSITIONS, kv_views, read_kv
from radrepro.core.dicom_rt import Beam, frame_id, read_dose, read_plan, read_registration
from radrepro.core.dicom_series import find_series
from radrepro.core.dicom_structures import read_structures
from radrepro.core.dicom_write import Referenced, StudyHeader, Subject, referenced, shared_by, write_4dct, write_ct
from radrepro.core.dicom_write_plan import write_dose, write_kv, write_plan
from radrepro.core.dicom_write_rt import write_deformation, write_registration, write_sct, write_structures
from radrepro.core.dicom_write_study import write_imagined, write_study
from radrepro.core.dicom_write_trace import write_trace
from radrepro.core.project import KVGeometry
from radrepro.core.volume import AXES, centred_grid, from_tensor, like, rigid, spacing_mm, to_tensor, volume
from radrepro.core.warp import warp
from radrepro.data.headneck import phantom_patient
from radrepro.data.traces import synthetic_trace
from radrepro.data.traces_dicom import read_waveform

sitk = pytest.importorskip("SimpleITK")
SAYS = ("StudyDescription", "SeriesDescription", "DerivationDescription", "ImageComments", "StructureSetDescription", "RTPlanDescription",
        "RTImageDescription", "DoseComment", "ContentDescription")
MADE = datetime(2031, 4, 5, 6, 7, 8)
GEOMETRY = KVGeometry(pixel_mm=6.0, shape_px=(20, 30))
BEAMS = (Beam("left", "PROTON", 60.0, 60.0, 10.0, (2000.0, 2000.0), (70.0, 150.5), (1.5, -2.25, 40.0)),
         Beam("back", "PHOTON", 180.0, 180.0, 0.0, (1000.0, 1000.0), (), (1.5, -2.25, 40.0)))


def random_ct(seed=0, shape=(4, 13, 11), step=(3.0, 1.2, 0.9), origin=(101.3, -7.77, 12.345)):
    grid = {a: c + o for (a, c), o in zip(centred_grid(shape, step).items(), origin)}
    return volume(np.random.default_rng(seed).uniform(-1000, 2500, shape), **grid, units="HU")


def masks_on(ct, seed=1):
    """A body with holes and corners, one voxel, and nothing."""
    body = np.random.default_rng(seed).random(ct.shape) < 0.7
    one = np.zeros(ct.shape, bool)
    one[2, 3, 4] = True
    return {"body": like(body, ct, "1"), "CTV": like(one, ct, "1"), "empty": like(one & False, ct, "1")}


def write_everything(root, position="HFS", seed="all"):
    """One of each kind of object; returns ({name: Referenced}, {name: what went in})."""
    study, rng, ct = StudyHeader(seed=seed, made=MADE), np.random.default_rng(5), random_ct()
    kv = rng.uniform(0, 5, (2, 20, 30))
    kv = xr.DataArray(kv, dims=("view", "v", "u"), coords={"view": GEOMETRY.views, "v": GEOMETRY.v_mm, "u": GEOMETRY.u_mm})
    put = {"ct": ct, "masks": masks_on(ct), "dose": like(rng.uniform(0, 60, ct.shape), ct, "Gy"), "kv": kv,
           "matrix": rigid((1.23456789, -2, 300), (4, 5, 6)),
           "field": volume(rng.normal(size=(3, *ct.shape)), **{a: ct[a].values for a in AXES}, units="mm")}
    w = {"ct": write_ct(ct, root / "ct", study, position=position)}
    for p, s in write_4dct({50: ct, 0: ct}, root / "4d", study, frame_uid=w["ct"].frame_uid, position=position, sources=[w["ct"]]).items():
        w[f"phase {p}"] = s
    w["masks"] = write_structures(put["masks"], root / "rs.dcm", study, ct=w["ct"])
    w["plan"] = write_plan(root / "rp.dcm", study, structures=w["masks"], prescription_gy=60, fractions=30, beams=BEAMS,
                           geometry=GEOMETRY, position=position)
    w["dose"] = write_dose(put["dose"], root / "rd.dcm", study, ct=w["ct"], plan=w["plan"])
    w["kv"] = write_kv(kv, root / "kv", study, geometry=GEOMETRY, frame_uid=w["ct"].frame_uid, position=position, plan=w["plan"],
                       isocentre_xyz_mm=BEAMS[0].isocentre_mm)
    w["sct"], w["matrix"] = write_sct(ct, root / "sct", study, source=w["ct"], to_source=put["matrix"], sources=[w["kv"]],
                                   position=position)
    put["trace"] = synthetic_trace(30, seed=4)
    w["field"] = write_deformation(put["field"], root / "dreg.dcm", study, moving=w["sct"], fixed=w["ct"])
    w["trace"] = write_trace(put["trace"], root / "breath.dcm", study)
    return w, put


@pytest.fixture(scope="module", params=list(POSITIONS))
def written(request, tmp_path_factory):
    return *write_everything(tmp_path_factory.mktemp(request.param), request.param), request.param


def upright(image):
    """A Volume of an image of SimpleITK whose axes are parallel to the patient's, in any order and direction."""
    size, directions = image.GetSize(), np.reshape(image.GetDirection(), (3, 3))
    along = abs(directions).argmax(0).tolist()  # the patient's axis of each axis of the image
    values = sitk.GetArrayFromImage(image).T.transpose(np.argsort(along)[::-1])
    first, last = (image.TransformIndexToPhysicalPoint(i) for i in ((0, 0, 0), [n - 1 for n in size]))
    coords = {"xyz"[a]: np.linspace(first[a], last[a], size[i]) for i, a in enumerate(along)}
    flips = {a: slice(None, None, 1 if c[-1] >= c[0] else -1) for a, c in coords.items()}
    return volume(values[tuple(flips[a] for a in AXES)], **{a: c[flips[a]] for a, c in coords.items()}, units="1")


def assert_same_place(found, put, atol=0.01):
    for a in AXES:
        np.testing.assert_allclose(found[a], put[a], atol=atol)


def plastimatch(*arguments):
    if not shutil.which("plastimatch"):
        pytest.skip("plastimatch is not installed")
    done = subprocess.run(["plastimatch", "convert", *map(str, arguments)], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_itk_reads_the_same_ct(written):
    w, put, _ = written
    reader = sitk.ImageSeriesReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileNames([str(f) for f in w["ct"].files])
    found = upright(reader.Execute())
    assert abs(found.values - put["ct"].values).max() <= 0.5
    assert_same_place(found, put["ct"], 1e-6)


def test_itk_reads_the_same_dose(written):
    w, put, _ = written
    image = sitk.ReadImage(str(w["dose"].files[0]))
    found = upright(image)
    scaling = float(pydicom.dcmread(w["dose"].files[0]).DoseGridScaling)
    assert abs(found.values * scaling - put["dose"].values).max() <= float(put["dose"].max()) / 2**31
    assert_same_place(found, put["dose"], 1e-6)


def test_plastimatch_reads_the_same(written, tmp_path):
    w, put, _ = written
    for f in (*w["ct"].files, *w["masks"].files):
        shutil.copy(f, tmp_path)
    plastimatch("--input", tmp_path, "--output-img", tmp_path / "ct.nrrd", "--output-type", "float", "--output-prefix", tmp_path / "masks",
                "--prefix-format", "nrrd")
    found = upright(sitk.ReadImage(str(tmp_path / "ct.nrrd")))
    assert abs(found.values - put["ct"].values).max() <= 0.5
    assert_same_place(found, put["ct"])
    for name in ("body", "CTV"):
        mask = upright(sitk.ReadImage(str(tmp_path / "masks" / f"{name}.nrrd")))
        np.testing.assert_array_equal(mask.values > 0, put["masks"][name].values)
    plastimatch("--input", w["dose"].files[0], "--output-dose-img", tmp_path / "dose.nrrd")
    found = upright(sitk.ReadImage(str(tmp_path / "dose.nrrd")))
    np.testing.assert_allclose(found.values, put["dose"].values, atol=1e-5)  # it computes in float32
    assert_same_place(found, put["dose"])


def test_our_readers_read_the_same(written):
    w, put, position = written
    ct = read_ct(w["ct"].files)
    assert abs(ct.values - put["ct"].values).max() <= 0.5 + 1e-4  # float32
    assert_same_place(ct, put["ct"], 1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the empty structure is left out
        masks = read_structures(w["masks"].files[0], ct, frame=frame_id(w["ct"].frame_uid))
    assert set(masks) == {"body", "CTV"}
    for name, mask in masks.items():
        np.testing.assert_array_equal(mask.values, put["masks"][name].values)
    for i, percent in enumerate((0, 50), 1):
        found = read_ct(w[f"phase {percent}"].files)
        assert abs(found.values - put["ct"].values).max() <= 0.5 + 1e-4
        assert_same_place(found, put["ct"], 1e-6)
        ds = pydicom.dcmread(w[f"phase {percent}"].files[-1])
        assert (ds.TemporalPositionIdentifier, ds.NumberOfTemporalPositions) == (i, 2) and f"phase {percent}%" in ds.SeriesDescription
    dose = read_dose(w["dose"].files[0])
    np.testing.assert_allclose(dose.dose_gy.values, put["dose"].values, rtol=3e-7)
    assert_same_place(dose.dose_gy, put["dose"], 1e-6)
    assert dose.frame == frame_id(w["ct"].frame_uid) and dose.kind == "PHYSICAL"
    registration = read_registration(w["matrix"].files[0])
    np.testing.assert_allclose(registration.matrix, put["matrix"], atol=1e-9)
    assert (registration.source, registration.target) == tuple(frame_id(w[n].frame_uid) for n in ("sct", "ct"))
    kv, geometry = kv_views([read_kv(f) for f in w["kv"].files], pixel_mm=GEOMETRY.pixel_mm, shape_px=GEOMETRY.shape_px)
    np.testing.assert_allclose(kv.values, put["kv"].values, atol=5 / 131000 + 1e-6)
    plan = read_plan(w["plan"].files[0])
    assert (plan.beams, plan.isocentres_mm, plan.prescription_gy, plan.fractions) == (BEAMS, (BEAMS[0].isocentre_mm,), 60, 30)
    assert (plan.position, plan.frame) == (position, dose.frame)
    assert geometry.angles_deg == GEOMETRY.angles_deg and (geometry.sad_mm, geometry.sid_mm) == (GEOMETRY.sad_mm, GEOMETRY.sid_mm)


def test_gdcm_reads_the_same_slices(written):
    import gdcm  # here, since it brings a copy of what SimpleITK has too

    w, *_ = written
    for file in w["ct"].files:
        reader = gdcm.ImageReader()
        reader.SetFileName(str(file))
        assert reader.Read()
        image, ds = reader.GetImage(), pydicom.dcmread(file)
        np.testing.assert_allclose([image.GetOrigin(i) for i in range(3)], ds.ImagePositionPatient, atol=0.01)
        np.testing.assert_allclose([image.GetDirectionCosines(i) for i in range(6)], ds.ImageOrientationPatient)
        assert (image.GetIntercept(), image.GetSlope()) == (ds.RescaleIntercept, ds.RescaleSlope)
        assert image.GetBuffer().encode("utf-8", "surrogateescape") == ds.PixelData


@pytest.mark.parametrize("start_s", [0.0, 12.34])
def test_a_trace_comes_back(tmp_path, start_s):
    for units, scale in (("1", 1), ("mm", 14.2)):
        trace = scale * synthetic_trace(30, seed=4)
        trace = trace.assign_attrs(units=units).assign_coords(time=trace.time + start_s)
        file = write_trace(trace, tmp_path / f"{units}.dcm", StudyHeader()).files[0]
        if units == "mm":
            found = read_waveform(file, normalise=False)
            np.testing.assert_allclose(found, trace, atol=scale * np.ptp(trace.values) / 131000)
            assert found.attrs["units"] == "mm"
        found = read_waveform(file)
        np.testing.assert_allclose(found, synthetic_trace(30, seed=4), atol=1e-4)
        np.testing.assert_allclose(found.time, trace.time, atol=1e-6)


def test_a_phantom_patient_comes_back_from_a_whole_study(tmp_path):
    p = phantom_patient(2, voxel_mm=8)
    days = p.sessions[-2:]
    kvs = {f"{s.name} kV": s.kvs[0] for s in days}
    w = write_study(tmp_path, StudyHeader(), planning=p.planning, structures=p.structures, cts={s.name: s.ct for s in days}, kvs=kvs,
                    geometry=p.geometry, prescription_gy=p.prescription_gy, fractions=p.fractions, gantry_angles_deg=(60, 180, 300))
    for name, ct in [("planning", p.planning), *((s.name, s.ct) for s in days)]:
        found = read_ct(w[name].files)
        assert abs(found.values - ct.values).max() <= 0.5 + 1e-4
        assert_same_place(found, ct, 1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # empty ones are left out
        masks = read_structures(w["structures"].files[0], p.planning, frame=frame_id(w["planning"].frame_uid))
    assert set(masks) == {n for n, m in p.structures.items() if m.values.any()}
    assert all((masks[n].values == p.structures[n].values).all() for n in masks)
    for name, kv in kvs.items():
        images = [read_kv(f) for f in w[name].files]
        found, geometry = kv_views(images, pixel_mm=p.geometry.pixel_mm, shape_px=p.geometry.shape_px)
        assert geometry == p.geometry and images[0].isocentre_mm == (0, 0, 0)
        np.testing.assert_allclose(found.values, kv.values, atol=np.ptp(kv.values) / 131000 + 1e-6)
    plan = read_plan(w["plan"].files[0])
    assert (plan.prescription_gy, plan.fractions) == (p.prescription_gy, p.fractions)


@pytest.mark.parametrize("position", ["HFS", "FFP", "HFDL"])
def test_an_imagined_phase_is_the_ct_pulled_by_its_field(tmp_path, position):
    """From the files alone, by the standard's own equation: source point = registered point + vector."""
    ct, rng = random_ct(6, (8, 13, 11)), np.random.default_rng(6)
    source = write_ct(ct, tmp_path / "ct", StudyHeader(synthetic=False), position=position)
    fields = {p: volume(rng.normal(0, 3, (3, *ct.shape)), **{a: ct[a].values for a in AXES}, units="mm") for p in (0, 30)}
    phases = {p: (from_tensor(warp(to_tensor(ct), to_tensor(u), spacing_mm(ct)), ct), u) for p, u in fields.items()}
    w = write_imagined(phases, tmp_path / "4d", StudyHeader(), source=source, trace=synthetic_trace(20, seed=1), position=position)
    assert sorted(w) == ["field 0", "field 30", "phase 0", "phase 30", "trace"]
    given = read_ct(source.files)
    for p in fields:
        item = pydicom.dcmread(w[f"field {p}"].files[0]).DeformableRegistrationSequence[0]
        assert {i.ReferencedSOPInstanceUID for i in item.ReferencedImageSequence} == {*source.sop_uids}
        vectors = np.frombuffer(item.DeformableRegistrationGridSequence[0].VectorGridData, "<f4").reshape(*ct.shape, 3)
        points = np.stack(np.meshgrid(*(ct[a].values for a in AXES), indexing="ij")) + np.moveaxis(vectors, -1, 0)[::-1]
        points = [np.clip(q, given[a].values[0], given[a].values[-1]) for q, a in zip(points, AXES)]
        pulled = given.interp({a: (("k", "j", "i"), q) for q, a in zip(points, AXES)})
        assert abs(pulled.values - read_ct(w[f"phase {p}"].files).values).max() <= 1.01  # each of the two is rounded


def test_itk_reads_the_kv_images(written):
    """The same -ln(I / I0), rows from the head (feet first: from the feet) and columns as the gantry sees them."""
    w, put, position = written
    turn = 1 if position[0] == "H" else -1
    for i, file in enumerate(w["kv"].files):
        image = sitk.ReadImage(str(file))
        assert np.allclose(image.GetSpacing()[:2], GEOMETRY.pixel_mm)
        expected = put["kv"].values[i, ::-turn, ::turn]
        assert abs(sitk.GetArrayFromImage(image).squeeze() - expected).max() <= np.ptp(expected) / 131000 + 1e-6


def test_a_long_contour_keeps_its_type(tmp_path):
    ct = random_ct(0, (2, 90, 91))
    w = write_ct(ct, tmp_path / "ct", StudyHeader())
    sieve = like(np.random.default_rng(1).random(ct.shape) < 0.85, ct, "1")  # one polygon with a thousand holes
    file = write_structures({"sieve": sieve}, tmp_path / "rs.dcm", StudyHeader(), ct=w).files[0]
    contours = [c for r in pydicom.dcmread(file).ROIContourSequence for c in r.ContourSequence]
    assert max(len("\\".join(map(str, c.ContourData))) for c in contours) > 65536
    assert {c["ContourData"].VR for c in contours} == {"DS"}
    np.testing.assert_array_equal(read_structures(file, ct, frame=frame_id(w.frame_uid))["sieve"].values, sieve.values)


def test_the_field_is_a_pull_in_the_fixed_frame(written):
    w, put, _ = written
    ds = pydicom.dcmread(w["field"].files[0])
    item = ds.DeformableRegistrationSequence[0]
    grid = item.DeformableRegistrationGridSequence[0]
    assert (ds.FrameOfReferenceUID, item.SourceFrameOfReferenceUID) == (w["ct"].frame_uid, w["sct"].frame_uid)
    nx, ny, nz = grid.GridDimensions
    vectors = np.frombuffer(grid.VectorGridData, "<f4").reshape(nz, ny, nx, 3)
    for i, component in enumerate("xyz"):
        np.testing.assert_array_equal(vectors[..., i], put["field"].sel(vector=component).values.astype("f4"))
        at = float(grid.ImagePositionPatient[i]) + grid.GridResolution[i] * np.arange(grid.GridDimensions[i])
        np.testing.assert_allclose(at, put["field"][component], atol=1e-9)
    assert grid.ImageOrientationPatient == [1, 0, 0, 0, 1, 0]


def test_the_patient_lies_as_said(written):
    w, _, position = written
    first, last = (pydicom.dcmread(w["ct"].files[i]) for i in (0, -1))
    assert first.PatientPosition == position
    row, column = np.reshape(first.ImageOrientationPatient, (2, 3)).astype(float)
    down = {"S": [0, 1, 0], "P": [0, -1, 0], "DL": [1, 0, 0], "DR": [-1, 0, 0]}[position[2:]]  # back, belly, left or right
    assert column.tolist() == down
    assert np.cross(row, column)[2] == (1 if position[0] == "H" else -1)
    assert np.sign(last.ImagePositionPatient[2] - first.ImagePositionPatient[2]) == np.cross(row, column)[2]
    assert [p.PatientPosition for p in pydicom.dcmread(w["plan"].files[0]).PatientSetupSequence] == [position]


def test_dciodvfy_finds_no_error(written, tmp_path):
    if not shutil.which("dciodvfy"):
        pytest.skip("dciodvfy (Debian's dicom3tools) is not installed")
    w, *_ = written
    for name, file in ((name, file) for name, of in w.items() for file in of.files):
        if name == "dose":  # it stops with a failed assertion at any pixels of 32 bits, pydicom's own test dose too: a twin of 16 bits
            ds = pydicom.dcmread(file)
            pixels = (ds.pixel_array >> 16).astype("<u2")
            ds.BitsAllocated = ds.BitsStored = 16
            ds.HighBit, ds.PixelData = 15, pixels.tobytes()
            ds.save_as(file := tmp_path / "twin.dcm")
        if name == "trace":  # it does not know respiratory waveforms: a twin of a class that has the same modules
            ds = pydicom.dcmread(file)
            ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = HemodynamicWaveformStorage
            ds.Modality = "HD"
            ds.save_as(file := tmp_path / "twin.dcm")
        said = subprocess.run(["dciodvfy", str(file)], check=False, capture_output=True, text=True, timeout=60)
        assert said.returncode == 0 and "Error" not in said.stderr, f"{name}: {said.stderr}"


def test_everything_says_what_it_is_and_points_at_what_is_there(written):
    w, *_ = written
    objects = {uid: pydicom.dcmread(f) for s in w.values() for uid, f in zip(s.sop_uids, s.files)}
    assert len(objects) == sum(len(s.files) for s in w.values())  # no UID twice
    assert w["trace"].frame_uid == ""
    for file in w["sct"].files:  # in a frame of its own: made from all slices and all kV images
        named = {i.ReferencedSOPInstanceUID for i in pydicom.dcmread(file).SourceImageSequence}
        assert named == {*w["ct"].sop_uids, *w["kv"].sop_uids}
    assert len({s.series_uid for s in w.values()}) == len(w) and {s.study_uid for s in w.values()} == {w["ct"].study_uid}
    for uid, ds in objects.items():
        assert ds.SOPInstanceUID == uid == ds.file_meta.MediaStorageSOPInstanceUID
        assert ds.SeriesDescription.startswith("SYNTHETIC, FOR RESEARCH ONLY") and ds.ContentQualification == "RESEARCH"
        assert ds.file_meta.TransferSyntaxUID == (ImplicitVRLittleEndian if ds.Modality == "RTSTRUCT" else ExplicitVRLittleEndian)
        if ds.Modality == "CT":
            assert ds.ImageType == ["DERIVED", "SECONDARY", "AXIAL"] and ds.ImageComments.startswith("SYNTHETIC")
        said = [ds[k].value for k in SAYS if k in ds]
        assert len(said) >= 2 and all(s.startswith("SYNTHETIC, FOR RESEARCH ONLY") for s in said)
        for e in ds.iterall():
            if e.keyword == "ReferencedSOPInstanceUID":
                assert e.value in objects or e.value == w["ct"].study_uid
    assert w["sct"].frame_uid != w["ct"].frame_uid == w["phase 50"].frame_uid == w["dose"].frame_uid


def test_nothing_of_a_source_is_kept(tmp_path):
    source = tmp_path / "source"
    first = write_ct(random_ct(), source, StudyHeader(Subject("CANARY-7", "Canary^Carla"), seed="s", made=datetime(1999, 1, 9)))
    joined = StudyHeader(seed="j", made=MADE, study_uid=first.study_uid)  # without `shared`
    found = referenced(find_series(source).series[0])
    assert found == first
    s = write_ct(random_ct(2), tmp_path / "sct", joined, frame_uid=found.frame_uid, sources=[found])
    for f in s.files:
        ds = pydicom.dcmread(f)
        for e in ds.iterall():
            text = str(e.value)
            assert "anary" not in text and "CANARY" not in text
            if e.VR in ("DA", "DT"):
                assert text in ("", "20310405")
        assert ds.StudyInstanceUID == first.study_uid and ds.StudyDate == "" and ds.FrameOfReferenceUID == first.frame_uid
        same_z = [i for i, z in enumerate(first.z_mm) if abs(z - ds.ImagePositionPatient[2]) < 1e-6]
        assert [i.ReferencedSOPInstanceUID for i in ds.SourceImageSequence] == [first.sop_uids[k] for k in same_z]


def test_a_joined_study_tells_one_story(tmp_path):
    """An archive knows a study by its UID: what its objects say of patient and study must not differ."""
    first = write_ct(random_ct(), tmp_path / "ct", StudyHeader(made=datetime(1999, 1, 9)))
    theirs = pydicom.dcmread(first.files[0])
    theirs.PatientBirthDate, theirs.PatientSex, theirs.StudyID, theirs.AccessionNumber = "19500102", "F", "7", "A1"
    theirs.StudyDescription, theirs.SeriesDescription, theirs.PatientIdentityRemoved = "thorax", "not of the study", "YES"
    theirs.DeidentificationMethod = ["one", "two"]
    said = shared_by(theirs)
    joined = StudyHeader(made=MADE, study_uid=first.study_uid, shared=said)
    made = pydicom.dcmread(write_ct(random_ct(2), tmp_path / "sct", joined, frame_uid=first.frame_uid).files[0])
    assert {e.keyword for e in said} >= {"PatientBirthDate", "StudyDate", "StudyTime", "DeidentificationMethod"} and "SeriesDescription" not in said
    assert all(made[e.keyword].value == e.value for e in said) and made.SeriesDate == "20310405"
    assert made.SeriesDescription.startswith("SYNTHETIC, FOR RESEARCH ONLY") and made.ImageComments.startswith("SYNTHETIC, FOR RESEARCH ONLY")


def test_one_uid_is_one_object(tmp_path):
    ct, study = random_ct(), StudyHeader(seed="one", made=MADE)
    on = write_ct(ct, tmp_path / "ct", study, frame_uid="1.2.3")
    plan, other = on._replace(sop_uids=("1.7",)), on._replace(sop_uids=("1.8",))
    gy = like(abs(ct.values), ct, "Gy")
    kv = xr.DataArray(np.ones((2, 20, 30)), dims=("view", "v", "u"), coords={"view": GEOMETRY.views, "v": GEOMETRY.v_mm, "u": GEOMETRY.u_mm})
    image = lambda name, **more: write_kv(kv, tmp_path / name, study, geometry=GEOMETRY, **({"frame_uid": "1.2.3"} | more))
    dose = lambda name, **more: write_dose(gy, tmp_path / name, study, **({"ct": on, "plan": plan} | more))
    joined = StudyHeader(seed="one", made=MADE, study_uid="1.2.9")
    made = [on, write_ct(ct, tmp_path / "b", study, frame_uid="1.2.4"), write_ct(ct, tmp_path / "c", joined, frame_uid="1.2.3"),
            write_ct(ct, tmp_path / "d", study, frame_uid="1.2.3", sources=[on]), image("e"), image("f", isocentre_xyz_mm=(50, 0, 0)),
            image("g", frame_uid="1.2.4"), image("h", plan=plan), dose("i"), dose("j", kind="EFFECTIVE"), dose("k", plan=other),
            dose("l", ct=on._replace(frame_uid="1.2.4"))]
    uids = [uid for of in made for uid in of.sop_uids]
    assert len(set(uids)) == len(uids)


def test_uids_follow_the_seed_and_the_voxels(tmp_path):
    ct = random_ct()
    uids = [write_ct(v, tmp_path / str(i), StudyHeader(seed=seed)).sop_uids
            for i, (v, seed) in enumerate(((ct, "a"), (ct, "a"), (ct, "b"), (ct.copy(data=ct.values + 1), "a")))]
    assert uids[0] == uids[1] and not set(uids[0]) & (set(uids[2]) | set(uids[3]))
    assert StudyHeader().uid("x") != StudyHeader().uid("x")
    for name in ("PTV\\1", "a" * 65):
        with pytest.raises(ValueError, match="64 characters"):
            write_structures({name: like(ct.values > 0, ct, "1")}, tmp_path / "rs", StudyHeader(), ct=write_ct(ct, tmp_path / name[:3], StudyHeader()))
    with pytest.raises(FileExistsError, match="new folder"):
        write_ct(ct, tmp_path / "0", StudyHeader())


@settings(max_examples=25, deadline=None)
@given(st.tuples(*[st.floats(0.3, 12)] * 3), st.tuples(*[st.floats(-2000, 2000)] * 3), st.sampled_from(POSITIONS), st.integers(-3024, 0))
def test_any_spacing_and_origin(tmp_path_factory, step, origin, position, low):
    ct = random_ct(3, (3, 4, 5), step, origin)
    ct.values[0, 0, 0] = low - 0.3
    s = write_ct(ct, tmp_path_factory.mktemp("any"), StudyHeader(seed="h"), position=position)
    found = read_ct(s.files)
    assert abs(found.values - ct.values).max() <= 0.501
    assert_same_place(found, ct, 1e-6)
    assert sorted(s.z_mm) == ct.z.values.tolist()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1), st.floats(0.05, 0.95))
def test_any_mask_comes_back_from_its_outline(rows, columns, seed, share):
    mask = np.random.default_rng(seed).random((rows, columns)) < share
    r, c = np.indices(mask.shape)
    times = np.zeros(mask.shape, int)
    area = 0.0
    for p in outline(mask):
        q = np.roll(p, -1, 0)
        area += float((p[:, 0] * q[:, 1] - q[:, 0] * p[:, 1]).sum() / 2)
        inside = np.zeros(mask.shape, bool)
        for (x0, y0), (x1, y1) in zip(p, q):
            assert x0 == x1 or y0 == y1  # along the pixels' edges, cuts too
            inside ^= ((y0 > r) != (y1 > r)) & (c < x0)
        times += inside
    np.testing.assert_array_equal(times, mask)  # united or exclusive: the same
    assert area == mask.sum()


def test_what_does_not_fit_is_refused(tmp_path):
    ct, study = random_ct(), StudyHeader(seed="r")
    on = Referenced("1.2", "1.3", "1.4", "1.2.840.10008.5.1.4.1.1.2", tuple(f"1.5.{i}" for i in range(4)), tuple(ct.z.values))
    other = on._replace(frame_uid="1.9")
    wide, shifted = like(ct.values * 100, ct), like(ct.values > 0, ct).assign_coords(z=ct.z + 0.5)
    mirror = np.diag([1, 1, -1, 1])
    arc, twice = BEAMS[0]._replace(gantry_stop_deg=1.0), (BEAMS[0], BEAMS[1]._replace(isocentre_mm=(0.0, 0.0, 0.0)))
    plan = lambda fractions=30, beams=BEAMS: write_plan(tmp_path / "p", study, structures=on, prescription_gy=60, fractions=fractions,
                                                        beams=beams, geometry=GEOMETRY)
    for error, f in (("NaN", lambda: write_ct(ct.where(ct > 0), tmp_path, study)),
                     ("'HU'", lambda: write_ct(like(ct.values, ct, "Gy"), tmp_path, study)),
                     ("65535", lambda: write_ct(wide, tmp_path, study)),
                     ("HFDL", lambda: write_ct(ct, tmp_path, study, position="prone")),
                     ("one grid", lambda: write_4dct({0: ct, 50: ct[1:]}, tmp_path, study)),
                     ("100 percent", lambda: write_4dct({100: ct}, tmp_path, study)),
                     ("below 0", lambda: write_dose(like(-abs(ct.values), ct, "Gy"), tmp_path / "d", study, ct=on, plan=on)),
                     ("slices of the CT", lambda: write_structures({"a": shifted}, tmp_path / "s", study, ct=on)),
                     ("rigid 4 x 4", lambda: write_registration(mirror, tmp_path / "m", study, moving=other, fixed=on)),
                     ("rigid 4 x 4", lambda: write_registration(np.full((4, 4), np.nan), tmp_path / "m", study, moving=other, fixed=on)),
                     ("two frames", lambda: write_registration(np.eye(4), tmp_path / "m", study, moving=on, fixed=on)),
                     ("field", lambda: write_deformation(like(ct.values, ct, "mm"), tmp_path / "f", study, moving=other, fixed=on)),
                     ("fractions", lambda: plan(fractions=0)), ("one angle", lambda: plan(beams=(arc,))), ("none", lambda: plan(beams=())),
                     ("one isocentre", lambda: plan(beams=twice))):
        with pytest.raises(ValueError, match=error):
            f()
    assert not list(tmp_path.rglob("*.dcm"))


def test_pyradplan_imports_ct_and_structures(written, tmp_path):
    """The CT in every position; structures head first, supine or prone: its importer puts those of the others elsewhere, or drops them."""
    io = pytest.importorskip("pyRadPlan.io")
    w, put, position = written
    for f in (*w["ct"].files, *w["masks"].files):
        shutil.copy(f, tmp_path)
    handler = io.DicomHandler(str(tmp_path))
    ct = handler.load_ct()
    found = upright(ct.cube_hu)
    assert abs(found.values - put["ct"].values).max() <= 0.5
    assert_same_place(found, put["ct"])
    if position in ("HFS", "HFP"):
        vois = {v.name: v for v in handler.load_cst(ct).vois}
        assert vois["body"].voi_type == "EXTERNAL" and vois["CTV"].voi_type == "TARGET"
        for name in ("body", "CTV"):
            np.testing.assert_array_equal(upright(vois[name].mask).values > 0, put["masks"][name].values)
