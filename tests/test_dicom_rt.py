"""Structures, dose, plan and registration: against geometry, against matplotlib and plastimatch, and against files of others."""

import subprocess
import tracemalloc
import warnings
from shutil import which

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_dicom import POSITIONS, closed_contour, grey, item, write_ct, write_object, write_registration, write_structure_set
from matplotlib.path import Path as Polygon
from pydicom import uid
from pydicom.data import get_testdata_file

from radrepro.core.dicom_ct import read_ct
from radrepro.core.dicom_layout import DicomError, DicomWarning
from radrepro.core.dicom_rt import frame_id, read_dose, read_plan, read_registration
from radrepro.core.dicom_structures import fill_polygons, read_structures
from radrepro.core.volume import rigid, volume

CT = volume(
    np.zeros((30, 60, 56), np.int16), z=np.arange(30) * 2.5 - 35, y=np.arange(60) * 1.5 - 44, x=np.arange(56) * 1.25 - 33, units="HU"
)
VOXEL_MM3 = 2.5 * 1.5 * 1.25
HERE, THERE = frame_id("1.2.8"), frame_id("1.2.7")


def ellipse(z, half=(20.0, 26.0, 24.0), centre=(2.0, -1.0, 0.0), n=120):
    scale = np.sqrt(1 - ((z - centre[2]) / half[2]) ** 2)
    phi = np.linspace(0, 2 * np.pi, n, endpoint=False)
    return np.c_[centre[0] + half[0] * scale * np.cos(phi), centre[1] + half[1] * scale * np.sin(phi)]


def square(cx, cy, h):
    return np.array([(cx - h, cy - h), (cx + h, cy - h), (cx + h, cy + h), (cx - h, cy + h)])


def centroid(mask):
    return np.array([float(mask[a].weighted(mask.sum([b for b in mask.dims if b != a])).mean()) for a in "xyz"])


def structures(path, *args, **kwargs):
    """Masks, and the remarks."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        masks = read_structures(path, CT, **{"frame": HERE} | kwargs)
    assert all(w.category is DicomWarning and "CANARY" not in str(w.message) for w in caught)
    return masks, " | ".join(str(w.message) for w in caught)


def test_box_and_ellipsoid_have_their_volume(tmp_path):
    z = CT.z.values[np.abs(CT.z.values) < 24]
    box = [closed_contour([(-10.1, 5.2), (9.7, 5.2), (9.7, 30.3), (-10.1, 30.3)], k) for k in CT.z.values[4:11]]
    masks, said = structures(write_structure_set(tmp_path / "s.dcm", [("Box", box), ("Body ", [closed_contour(ellipse(k), k) for k in z])]))
    want = ((CT.x > -10.1) & (CT.x < 9.7)) & ((CT.y > 5.2) & (CT.y < 30.3)) & ((CT.z >= CT.z[4]) & (CT.z <= CT.z[10]))
    assert said == "" and masks["Box"].equals(want.transpose("z", "y", "x"))
    # each slice errs at most by the pixels that its outline crosses; the slices by the midpoint rule
    expected = 4 / 3 * np.pi * 20 * 26 * 24
    got = float(masks["Body"].sum()) * VOXEL_MM3
    assert abs(got - expected) < 0.01 * expected and list(masks) == ["Box", "Body"]
    np.testing.assert_allclose(centroid(masks["Body"]), (2, -1, 0), atol=0.3)
    for k in z[::4]:
        area = float(masks["Body"].sel(z=k).sum()) * 1.5 * 1.25
        assert abs(area - np.pi * 20 * 26 * (1 - (k / 24) ** 2)) < 2 * (20 + 26) * np.sqrt(2) * 1.5


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(3, 12))
def test_filling_is_the_even_odd_rule(seed, n):
    rng = np.random.default_rng(seed)
    polygon = rng.uniform(-20, 20, (n, 2))  # crosses itself more often than not
    y, x = np.arange(-22, 22) * 1.01, np.arange(-22, 22) * 0.97
    yy, xx = np.meshgrid(y, x, indexing="ij")
    crossings = np.zeros(yy.shape, int)
    for (x0, y0), (x1, y1) in zip(polygon, np.roll(polygon, -1, axis=0)):
        between = (y0 <= yy) != (y1 <= yy)
        crossings += between & (xx >= x0 + (yy - y0) * (x1 - x0) / (y1 - y0))
    np.testing.assert_array_equal(fill_polygons([polygon], y, x), crossings % 2 == 1)
    if n == 3:
        np.testing.assert_array_equal(
            fill_polygons([polygon], y, x).ravel(), Polygon(polygon).contains_points(np.c_[xx.ravel(), yy.ravel()])
        )


def test_what_small_files_cost(tmp_path, monkeypatch):
    """A zigzag over all rows, contours a kilometre away and hundreds in one plane need no more memory than the masks do."""
    rng = np.random.default_rng(0)
    polygons = [rng.uniform(-20, 20, (9, 2)) for _ in range(3)]
    y, x = np.arange(-22, 22) * 1.01, np.arange(-22, 22) * 0.97
    whole = fill_polygons(polygons, y, x)
    monkeypatch.setattr("radrepro.core.dicom_structures._CROSSINGS", 5)
    np.testing.assert_array_equal(fill_polygons(polygons, y, x), whole)
    monkeypatch.undo()
    far = [closed_contour([(-1e6, 1e6), (1e6, 1e6), (0, -1e6)], z) for z in (0.0, 2.5)]
    crowd = [closed_contour(np.round(square(0, 0, 5) + rng.uniform(-30, 30, 2), 3), 0.0) for _ in range(200)]
    turn = read_registration(write_registration(tmp_path / "r.dcm", ("1.2.8", [rigid((0, 0, 0), (0, 0, 5))], "RIGID")))
    fine = [closed_contour(square(0, 0, 5), z) for z in (0.0, 0.2)]
    rs = write_structure_set(tmp_path / "s.dcm", [("far", far), ("crowd", crowd), ("miss", [closed_contour(square(1e6, 0, 5), 0.0)])])
    tracemalloc.start()
    for more in ({}, {"frame": THERE, "registration": turn}):
        masks, said = structures(rs, **more)
        assert masks["far"].any() and "cut off" in said and "more than 100 contours in one plane" in said and not masks["miss"].any()
    zigzag = np.stack([np.arange(20000) % 7, 600 * (np.arange(20000) % 2) - 300], 1)
    fill_polygons([zigzag], np.arange(512) - 256.0, np.arange(512) - 256.0)
    assert tracemalloc.get_traced_memory()[1] < 60e6
    tracemalloc.stop()
    monkeypatch.setattr("radrepro.core.dicom_structures._MOST_VOXELS", 1000)
    with pytest.raises(DicomError, match="Contour Data"):
        structures(write_structure_set(tmp_path / "s.dcm", [("fine", fine)]), frame=THERE, registration=turn)


def test_holes_islands_and_keyholes_in_one_slice(tmp_path):
    z = float(CT.z[7])
    outer, hole, island = square(0, 0, 20.2), square(4, -3, 8.1), square(4, -3, 3.3)
    xor = [closed_contour(p, z) for p in (outer, hole, island)]
    keyhole = [closed_contour(np.r_[outer, outer[:1], hole[::-1], hole[3:]], z), closed_contour(island, z, "CLOSEDPLANAR_XOR")]
    masks, said = structures(write_structure_set(tmp_path / "s.dcm", [("a", xor), ("b", keyhole)]))
    assert said == "" and masks["a"].equals(masks["b"])
    at = masks["a"].sel(z=z)
    assert at.sel(x=4, y=-3, method="nearest") and not at.sel(x=9, y=-3, method="nearest") and at.sel(x=-15, y=0, method="nearest")


def test_planes_off_the_slices_and_beyond(tmp_path):
    z = CT.z.values
    shapes = [
        ("between", [closed_contour(square(0, 0, 5), z[5] + 0.9), closed_contour(square(0, 0, 5), z[6] + 0.9)]),
        ("two", [closed_contour(square(0, 0, 5), z[5] - 0.2), closed_contour(square(9, 0, 5), z[5] + 0.9)]),
        ("beyond", [closed_contour(square(0, 0, 5), z[0] - 1.2), closed_contour(square(0, 0, 5), z[0] - 1.4)]),
        ("gap", [closed_contour(square(0, 0, 5), z[5]), closed_contour(square(0, 0, 5), z[8])]),
        ("twice", [closed_contour(square(0, 0, 5), z[5])] * 2),
        ("overlap", [closed_contour(square(0, 0, 5), z[5]), closed_contour(square(4, 4, 5), z[5])]),
        ("off", [closed_contour(square(40, 0, 15), z[5])]),
    ]
    masks, said = structures(write_structure_set(tmp_path / "s.dcm", shapes))
    filled = {name: np.flatnonzero(m.any(["x", "y"])).tolist() for name, m in masks.items()}
    assert filled == {"between": [5, 6], "two": [5], "beyond": [0], "gap": [5, 8], "twice": [5], "overlap": [5], "off": [5]}
    assert abs(centroid(masks["two"])[0]) < 1 and masks["twice"].equals(masks["gap"].where(masks["gap"].z == z[5], False))
    for roi, text in (
        (1, "0.90 mm off"),
        (2, "several contoured planes"),
        (3, "1 of 2 contoured planes"),
        (4, "2 slices between"),
        (5, "twice"),
        (6, "overlap in part"),
        (7, "cut off"),
    ):
        assert any(f"ROI {roi}" in s and text in s for s in said.split(" | ")), (roi, said)


def test_names_points_open_and_tilted(tmp_path):
    good = closed_contour(square(0, 0, 5), 0.0)
    tilted = item(ContourGeometricType="CLOSED_PLANAR", NumberOfContourPoints=3, ContourData=[0, 0, 0, 9, 0, 0, 0, 9, 5])
    point, line = (
        item(ContourGeometricType=k, NumberOfContourPoints=n, ContourData=[0, 1, 2] * n) for k, n in (("POINT", 1), ("OPEN_PLANAR", 4))
    )
    masks, said = structures(
        write_structure_set(
            tmp_path / "s.dcm",
            [
                ("Eye", [good]),
                (" Eye", [good, point]),
                ("Iso", [point]),
                ("Line", [line]),
                ("Tilted", [tilted]),
                ("Eye (2)", [good]),
                ("", [good]),
            ],
        )
    )
    assert list(masks) == ["Eye", "Eye (2)", "Eye (2) (2)", "ROI 7"]
    assert said.count("has the name of another") == 2 and said.count("it is left out") == 3 and "axial plane" in said


def test_frames_must_match_or_be_registered(tmp_path):
    z = np.arange(-22.5, 23, 2.5)
    rs = write_structure_set(tmp_path / "s.dcm", [("Ball", [closed_contour(ellipse(k, (20, 16, 24)), k) for k in z])])
    with pytest.raises(DicomError, match="s.dcm.*Frame of Reference.*registration"):
        structures(rs, frame=THERE)
    straight, _ = structures(rs)
    for m in (rigid((5, -3, 2.5)), rigid((3, 2, -5), (0, 0, 25)), rigid((1, 2, 3), (12, -8, 20))):
        forward = read_registration(write_registration(tmp_path / "r.dcm", ("1.2.8", [m], "RIGID")))
        backward = read_registration(write_registration(tmp_path / "r.dcm", ("1.2.7", [np.linalg.inv(m)], "RIGID"), target="1.2.8"))
        moved, _ = structures(rs, frame=THERE, registration=forward)
        np.testing.assert_allclose(centroid(moved["Ball"]), (m @ (2, -1, 0, 1))[:3], atol=0.35)
        assert abs(float(moved["Ball"].sum()) / float(straight["Ball"].sum()) - 1) < 0.02
        assert float((moved["Ball"] ^ structures(rs, frame=THERE, registration=backward)[0]["Ball"]).sum()) <= 4
    other = read_registration(write_registration(tmp_path / "r.dcm", ("1.2.99", [np.eye(4)], "RIGID")))
    with pytest.raises(DicomError, match="another one"):
        structures(rs, frame=THERE, registration=other)


def test_registration_composes_in_order_and_refuses_what_is_not_rigid(tmp_path):
    a, b = rigid((1, 2, 3), (0, 0, 90)), rigid((10, 0, 0), (90, 0, 0))
    r = read_registration(write_registration(tmp_path / "r.dcm", ("1.2.7", [np.eye(4)], "RIGID"), ("1.2.8", [a, b], "RIGID")))
    np.testing.assert_allclose(r.matrix, b @ a, atol=1e-8)
    assert (r.source, r.target) == (HERE, THERE) and "1.2.8" not in repr(r)
    mirror, shear = np.diag([1, 1, -1, 1.0]), a + np.eye(4, k=1) * 0.1
    for matrices, kind in (
        ([mirror], "RIGID"),
        ([shear], "RIGID"),
        ([a * [[1.01], [1], [1], [1]]], "RIGID"),
        ([a], "AFFINE"),
        ([a], "RIGID_SCALE"),
    ):
        with pytest.raises(DicomError, match="r.dcm: tag .3006,00C6.|r.dcm: tag .0070,030C."):
            read_registration(write_registration(tmp_path / "r.dcm", ("1.2.8", matrices, kind)))
    with pytest.raises(DicomError, match="one frame"):
        read_registration(write_registration(tmp_path / "r.dcm", ("1.2.8", [a], "RIGID"), ("1.2.9", [b], "RIGID")))
    with pytest.raises(DicomError, match="deformable"):
        read_registration(write_object(tmp_path / "d.dcm", uid.DeformableSpatialRegistrationStorage))


def dose_at(x, y, z):
    return (x + 2 * y + 5 * z + 1000).astype(np.uint32)


def write_dose(path, position, *, offsets=None, **more):
    """A dose that is a function of place, its rows and columns as the patient lies."""
    row, column = (np.array(v, float) for v in POSITIONS[position])
    first, shape, spacing, step = np.array([-10.0, 20.0, 50.0]), (4, 5, 6), (3.0, 2.0), 4.0
    k, j, i = np.meshgrid(*map(np.arange, shape), indexing="ij")
    at = first + i[..., None] * spacing[1] * row + j[..., None] * spacing[0] * column + k[..., None] * step * np.cross(row, column)
    offsets = step * np.arange(4) if offsets is None else offsets
    return write_object(
        path,
        uid.RTDoseStorage,
        **{
            "DoseUnits": "GY",
            "DoseType": "PHYSICAL",
            "DoseSummationType": "PLAN",
            "DoseGridScaling": 0.01,
            "PixelSpacing": list(spacing),
            "ImagePositionPatient": first.tolist(),
            "ImageOrientationPatient": [*row, *column],
            "GridFrameOffsetVector": list(offsets),
            **grey(dose_at(*np.moveaxis(at, -1, 0))),
        }
        | more,
    )


@pytest.mark.parametrize("position", POSITIONS)
def test_dose_lies_where_it_was_for_every_orientation(tmp_path, position):
    dose = read_dose(write_dose(tmp_path / "d.dcm", position))
    z, y, x = np.meshgrid(*(dose.dose_gy[a].values for a in "zyx"), indexing="ij")
    np.testing.assert_allclose(dose.dose_gy, 0.01 * dose_at(x, y, z), rtol=1e-6)
    assert (
        dose.dose_gy.attrs["units"] == "Gy"
        and dose[1:] == ("PLAN", "PHYSICAL", "")
        and all(dose.dose_gy[a].diff(a).min() > 0 for a in "xyz")
    )


@pytest.mark.parametrize("position", ["HFS", "HFP", "FFS", "FFP"])
def test_absolute_and_relative_planes_are_one_dose(tmp_path, position):
    normal_z = np.cross(*POSITIONS[position])[2]
    absolute = read_dose(write_dose(tmp_path / "d.dcm", position, offsets=50 + normal_z * 4 * np.arange(4)))
    assert absolute.dose_gy.identical(read_dose(write_dose(tmp_path / "d.dcm", position)).dose_gy)


def test_what_is_no_dose_in_gray_is_refused(tmp_path):
    slant = [np.cos(0.1), np.sin(0.1), 0, -np.sin(0.1), np.cos(0.1), 0]
    for more, tag in (
        ({"DoseUnits": "RELATIVE"}, "3004,0002"),
        ({"DoseType": "ERROR"}, "3004,0004"),
        ({"DoseGridScaling": 0.0}, "3004,000E"),
        ({"DoseGridScaling": None}, "3004,000E"),
        ({"GridFrameOffsetVector": [0, 4, 8, 13]}, "3004,000C"),
        ({"GridFrameOffsetVector": [7, 11, 15, 19]}, "3004,000C"),
        ({"GridFrameOffsetVector": [0, 4, 8]}, "3004,000C"),
        ({"ImageOrientationPatient": slant}, "0020,0037"),
        ({"Rows": 7}, "7FE0,0010"),
        ({"PixelSpacing": [0, 1]}, "0028,0030"),
    ):
        with pytest.raises(DicomError, match=tag) as error:
            read_dose(write_dose(tmp_path / "d.dcm", "HFS", **more))
        assert str(tmp_path) not in str(error.value) and "CANARY" not in str(error.value)


def test_pydicoms_own_doses(tmp_path):
    for name in ("rtdose.dcm", "rtdose_1frame.dcm", "rtdose_rle.dcm", "rtdose_expb.dcm"):
        with pytest.raises(DicomError, match="Dose Units"):  # they are in percent
            read_dose(get_testdata_file(name))
        ds = pydicom.dcmread(get_testdata_file(name))
        ds.DoseUnits = "GY"
        ds.save_as(tmp_path / name)
        dose = read_dose(tmp_path / name).dose_gy
        np.testing.assert_allclose(dose.values.reshape(ds.pixel_array.shape), ds.pixel_array * float(ds.DoseGridScaling), rtol=1e-6)
        np.testing.assert_allclose([dose[a][0] for a in "xyz"], ds.ImagePositionPatient)


def test_dose_is_what_simpleitk_reads(tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    image = sitk.ReadImage(str(write_dose(tmp_path / "d.dcm", "HFS")))
    dose = read_dose(tmp_path / "d.dcm").dose_gy
    for index in ((3, 2, 1), (0, 4, 3), (5, 0, 2)):
        at = dict(zip("xyz", image.TransformIndexToPhysicalPoint(index)))
        assert float(dose.sel(at)) == pytest.approx(0.01 * image.GetPixel(index))  # SimpleITK leaves the scaling out


def write_plan(path, ion=False, **more):
    points, beams = ("IonControlPointSequence", "IonBeamSequence") if ion else ("ControlPointSequence", "BeamSequence")
    distance = {"VirtualSourceAxisDistances": [2000, 1800]} if ion else {"SourceAxisDistance": 1000}
    control = [
        item(GantryAngle=181, PatientSupportAngle=10, NominalBeamEnergy=150, IsocenterPosition=[1, 2, 3]),
        item(GantryAngle=179, NominalBeamEnergy=120),
    ]
    field = item(BeamName="A", RadiationType="PROTON" if ion else "PHOTON", **{points: control}, **distance)
    setup = item(BeamName="kV", TreatmentDeliveryType="SETUP", **{points: control}, **distance)
    return write_object(
        path,
        uid.RTIonPlanStorage if ion else uid.RTPlanStorage,
        **{
            beams: [field, setup],
            "FractionGroupSequence": [item(NumberOfFractionsPlanned=7)],
            "FrameOfReferenceUID": "1.2.8",
            "PatientSetupSequence": [item(PatientPosition="HFP")],
            "DoseReferenceSequence": [item(DoseReferenceStructureType="SITE", TargetPrescriptionDose=14.0)],
        }
        | more,
    )


@pytest.mark.parametrize("ion", [False, True])
def test_plans_of_photons_and_ions(tmp_path, ion):
    plan = read_plan(write_plan(tmp_path / "p.dcm", ion))
    assert (plan.prescription_gy, plan.fractions, plan.isocentres_mm, plan.position, plan.frame) == (14, 7, ((1, 2, 3),), "HFP", HERE)
    sad = (2000, 1800) if ion else (1000, 1000)
    assert plan.beams == (("A", "PROTON" if ion else "PHOTON", 181, 179, 10, sad, (120, 150), (1, 2, 3)),)
    for more, tag in (
        ({"FractionGroupSequence": []}, "300A,0070"),
        ({"IonBeamSequence" if ion else "BeamSequence": []}, "300A,03A2|300A,00B0"),
        ({"FractionGroupSequence": [item(NumberOfFractionsPlanned=0)]}, "300A,0078.*at least one"),
        ({"FractionGroupSequence": [item(NumberOfFractionsPlanned=-30)]}, "300A,0078.*at least one"),
        ({"DoseReferenceSequence": [item(TargetPrescriptionDose=-60)]}, "300A,0026.*above 0"),
        ({"DoseReferenceSequence": [item(TargetPrescriptionDose=0)]}, "300A,0026.*above 0"),
    ):
        with pytest.raises(DicomError, match=tag):
            read_plan(write_plan(tmp_path / "p.dcm", ion, **more))
    with pytest.warns(DicomWarning, match="no dose"):
        assert read_plan(write_plan(tmp_path / "p.dcm", ion, DoseReferenceSequence=None)).prescription_gy is None
    some = [item(DoseReferenceStructureType=kind, TargetPrescriptionDose=dose) for kind, dose in (("SITE", 0), ("POINT", 50))]
    assert read_plan(write_plan(tmp_path / "p.dcm", ion, DoseReferenceSequence=some)).prescription_gy == 50  # 0 prescribes nothing


def test_pydicoms_own_plans():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = read_plan(get_testdata_file("rtplan.dcm"))
    assert (plan.fractions, len(plan.beams), plan.beams[0].sad_mm) == (30, 1, (1000, 1000)) and plan.prescription_gy == pytest.approx(
        30.826203
    )
    for name in ("rtplan_truncated.dcm", "rtdose.dcm", "waveform_ecg.dcm"):
        with pytest.raises(DicomError, match=f"^{name}: [^\n]*$"):
            read_plan(get_testdata_file(name))


def test_real_plan_and_structures(data_dir):
    folder = data_dir / "dicom_rt_dicompyler"
    if not folder.is_dir():
        pytest.skip("expected dicom_rt_dicompyler under RADREPRO_DATA")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = read_plan(folder / "rtplan.dcm")
        ct = pydicom.dcmread(folder / "ct.0.dcm", stop_before_pixels=True)
        step = 2 * float(ct.PixelSpacing[0])
        z = np.arange(-128.44, 174, 3)
        grid = volume(
            np.zeros((len(z), 256, 256), np.int8),
            z=z,
            y=ct.ImagePositionPatient[1] + step * np.arange(256),
            x=ct.ImagePositionPatient[0] + step * np.arange(256),
            units="HU",
        )
        masks = read_structures(folder / "rtss.dcm", grid, frame=plan.frame)
    assert (plan.prescription_gy, plan.fractions, len(plan.beams)) == (14, 7, 4)
    litres = {name: float(m.sum()) * 3 * step**2 / 1e6 for name, m in masks.items()}
    assert "Areola" not in masks and 10 < litres["BODY"] < 20 and 1.5 < litres["Lt Lung"] < 2.5 and 0.3 < litres["Heart"] < 0.6
    assert centroid(masks["Lt Lung"])[0] > centroid(masks["Heart"])[0] > 0  # left is +x
    inside = masks["BODY"].sel(dict(zip("xyz", plan.isocentres_mm[0])), method="nearest")
    assert bool(inside)


def test_masks_are_plastimatchs(tmp_path):
    if which("plastimatch") is None:
        pytest.skip("plastimatch is not installed")
    sitk = pytest.importorskip("SimpleITK")
    write_ct(tmp_path / "ct", "HFS", shape=(20, 40, 44), spacing_mm=(2.0, 1.5), step_mm=2.5)
    ct = read_ct(tmp_path / "ct")
    x, y, z = (float(ct[a].mean()) for a in "xyz")
    contours = [closed_contour(ellipse(k - z, (20, 22, 24), (0, 0, 0)) + (x + 0.1, y - 0.2), k) for k in ct.z.values if abs(k - z) < 23]
    slice_ = pydicom.dcmread(next((tmp_path / "ct").iterdir()))
    rs = write_structure_set(tmp_path / "rs.dcm", [("Ball", contours)], frame=slice_.FrameOfReferenceUID)
    ds = pydicom.dcmread(rs)
    ds.Modality = "RTSTRUCT"
    ds.save_as(rs)
    ours = read_structures(rs, ct, frame=frame_id(slice_.FrameOfReferenceUID))["Ball"].values
    done = subprocess.run(
        [
            "plastimatch",
            "convert",
            "--input",
            rs,
            "--referenced-ct",
            tmp_path / "ct",
            "--output-prefix",
            tmp_path / "out",
            "--prefix-format",
            "nrrd",
        ],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    made = list((tmp_path / "out").glob("*.nrrd")) if (tmp_path / "out").is_dir() else []
    assert made, done.stdout[-500:] + done.stderr[-500:]
    theirs = sitk.GetArrayFromImage(sitk.ReadImage(str(made[0]))) > 0
    assert theirs.shape == ours.shape and ours.any()
    assert (ours ^ theirs).sum() <= 0.01 * ours.sum()
