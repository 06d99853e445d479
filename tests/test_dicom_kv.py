"""kV images: every frame against geometry written out by hand, and beads put through the projector and a file."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_dicom import grey, write_object
from pydicom import uid
from pydicom.data import get_testdata_file

from radrepro.core.dicom_kv import POSITIONS, fixed_to_gantry, gantry_to_receptor, kv_views, minus_log, patient_to_fixed, read_kv
from radrepro.core.dicom_layout import DicomError, DicomWarning
from radrepro.core.project import KVGeometry, line_integrals, project_points
from radrepro.core.volume import centred_grid, volume

BEAD = (30.0, -20.0, 45.0)  # left, front, head
SAD, SID, PITCH, SHAPE = 1000.0, 1500.0, 1.0, (160, 200)
FIXED = {  # room's right, to the gantry, up: as directions of the patient (left, back, head)
    "HFS": ((1, 0, 0), (0, 0, 1), (0, -1, 0)),
    "HFP": ((-1, 0, 0), (0, 0, 1), (0, 1, 0)),
    "FFS": ((-1, 0, 0), (0, 0, -1), (0, -1, 0)),
    "FFP": ((1, 0, 0), (0, 0, -1), (0, 1, 0)),
    "HFDL": ((0, -1, 0), (0, 0, 1), (-1, 0, 0)),
    "HFDR": ((0, 1, 0), (0, 0, 1), (1, 0, 0)),
    "FFDL": ((0, 1, 0), (0, 0, -1), (-1, 0, 0)),
    "FFDR": ((0, -1, 0), (0, 0, -1), (1, 0, 0)),
}


def seen_by_machine(position, gantry_deg, xyz=BEAD):
    """Where the bead lands on the receptor (x right, y to the gantry, mm), by hand: no matrix of the library."""
    x, y, z = (float(np.dot(axis, xyz)) for axis in FIXED[position])
    s, c = np.sin(np.deg2rad(gantry_deg)), np.cos(np.deg2rad(gantry_deg))
    across, up = x * c - z * s, x * s + z * c  # up: towards the source
    return np.array([across, y]) * SID / (SAD - up)


def spot(at_xy, first_xy, step_xy):
    """A picture whose only dark pixel is where the bead lands."""
    pixels = np.full(SHAPE, 60000, np.uint16)
    column, row = np.round((np.asarray(at_xy) - first_xy) / step_xy).astype(int)
    pixels[row, column] = 100
    return pixels


def write_rt_image(path, position, gantry_deg, *, shift_mm=(7.0, -4.0), **more):
    """As an imager would: first pixel at the upper left corner of a panel that is off centre."""
    first = np.array([-(SHAPE[1] - 1) / 2, (SHAPE[0] - 1) / 2]) * PITCH
    lands = seen_by_machine(position, gantry_deg) - shift_mm
    return write_object(
        path,
        uid.RTImageStorage,
        **{
            "RTImagePlane": "NORMAL",
            "RTImageSID": SID,
            "RadiationMachineSAD": SAD,
            "GantryAngle": gantry_deg,
            "PatientPosition": position,
            "ImagePlanePixelSpacing": [PITCH, PITCH],
            "RTImagePosition": first.tolist(),
            "XRayImageReceptorTranslation": [*shift_mm, SAD - SID],
            "PixelIntensityRelationship": "LIN",
            "PixelIntensityRelationshipSign": 1,
            "IsocenterPosition": [1, 2, 3],
            **grey(spot(lands, first, (PITCH, -PITCH))),
        }
        | more,
    )


def darkest(kv):
    at = kv.image.where(kv.image == kv.image.min(), drop=True)
    return np.array([float(at.v.mean()), float(at.u.mean())])


def expected(kv):
    return project_points([BEAD], KVGeometry(1.0, (8, 8), kv.sad_mm, kv.sid_mm / kv.sad_mm, (kv.angle_deg,)))[0, 0]


@settings(max_examples=40, deadline=None)
@given(position=st.sampled_from(POSITIONS), gantry=st.floats(-360, 360), xyz=st.tuples(*[st.floats(-300, 300)] * 3))
def test_frames_are_rotations_and_lead_back(position, gantry, xyz):
    there = fixed_to_gantry(gantry) @ patient_to_fixed(position, (5, -6, 7))
    np.testing.assert_allclose(np.linalg.inv(there) @ (there @ (*xyz, 1)), (*xyz, 1), atol=1e-9)
    assert np.linalg.det(there[:3, :3]) == pytest.approx(1)
    np.testing.assert_allclose((patient_to_fixed(position, xyz) @ (*xyz, 1))[:3], 0, atol=1e-9)
    np.testing.assert_array_equal(patient_to_fixed(position)[:3, :3], FIXED[position])
    x, y, z = gantry_to_receptor((10, 20, -500), 90)[:3, :3] @ (1, 0, 0)
    np.testing.assert_allclose((x, y, z), (0, -1, 0), atol=1e-12)  # the receptor's x now is the gantry's y


@pytest.mark.parametrize("deg,from_", [(0, (0, -1, 0)), (90, (1, 0, 0)), (180, (0, 1, 0)), (270, (-1, 0, 0))])
def test_supine_head_first_the_source_comes_from_front_left_back_right(tmp_path, deg, from_):
    source = np.linalg.inv(fixed_to_gantry(deg) @ patient_to_fixed("HFS")) @ (0, 0, 1, 1)
    np.testing.assert_allclose(source[:3], from_, atol=1e-12)
    assert read_kv(write_rt_image(tmp_path / "i.dcm", "HFS", deg)).angle_deg == pytest.approx(deg)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("gantry", [0, 90, 33, 290])
def test_a_bead_lands_where_the_projector_puts_it(tmp_path, position, gantry):
    kv = read_kv(write_rt_image(tmp_path / "i.dcm", position, gantry))
    np.testing.assert_allclose(darkest(kv), expected(kv), atol=0.51 * PITCH)
    assert (kv.sad_mm, kv.sid_mm, kv.intensity, kv.isocentre_mm) == (SAD, SID, True, (1, 2, 3))
    assert kv.image.dims == ("v", "u") and kv.image.v.diff("v").min() > 0 and kv.image.u.diff("u").min() > 0


def test_a_receptor_that_is_turned_or_read_out_otherwise(tmp_path):
    lands = seen_by_machine("HFS", 20)
    first = np.array([-(SHAPE[1] - 1) / 2, -(SHAPE[0] - 1) / 2]) * PITCH
    quarter = np.array([lands[1], -lands[0]])  # in a receptor turned by 90 degrees
    upward = {"shift_mm": (0, 0), "RTImagePosition": first.tolist(), "RTImageOrientation": [1, 0, 0, 0, 1, 0]}
    for where, more in ((lands, {}), (quarter, {"XRayImageReceptorAngle": 90.0})):
        kv = read_kv(write_rt_image(tmp_path / "i.dcm", "HFS", 20, **upward, **more, **grey(spot(where, first, (PITCH, PITCH)))))
        np.testing.assert_allclose(darkest(kv), expected(kv), atol=0.51)


def write_x_ray(path, source_deg, sop=uid.DigitalXRayImageStorageForPresentation, flip_u=False, **more):
    """A C-arm's image whose source is at `source_deg` of the library: rows run along +u, or along -u with `flip_u`; heads up."""
    v, u = project_points([BEAD], KVGeometry(PITCH, (8, 8), SAD, SID / SAD, (source_deg,)))[0, 0]
    first = np.array([-(SHAPE[1] - 1) / 2, (SHAPE[0] - 1) / 2])
    letters = {0: "LR", 90: "PA", 180: "RL", 270: "AP"}[source_deg][int(flip_u)]
    return write_object(
        path,
        sop,
        **{
            "DistanceSourceToDetector": SID,
            "DistanceSourceToPatient": SAD,
            "PositionerPrimaryAngle": (source_deg % 360) - 180,
            "PatientOrientation": [letters, "F"],
            "ImagerPixelSpacing": [PITCH, PITCH],
            **grey(spot((-u if flip_u else u, v), first, (1, -1))),
        }
        | more,
    )


@pytest.mark.parametrize("deg", [0, 90, 180, 270])
@pytest.mark.parametrize("flip", [False, True])
def test_dx_and_cr(tmp_path, deg, flip):
    for sop in (uid.DigitalXRayImageStorageForPresentation, uid.ComputedRadiographyImageStorage):
        with pytest.warns(DicomWarning, match="Pixel Intensity Relationship"):
            kv = read_kv(write_x_ray(tmp_path / "x.dcm", deg, sop, flip))
        assert kv.angle_deg == pytest.approx(deg) and kv.intensity is None
        np.testing.assert_allclose(darkest(kv), expected(kv), atol=0.51)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if deg in (0, 180):  # the beam goes from front to back: AP
            kv = read_kv(
                write_x_ray(tmp_path / "x.dcm", deg, flip_u=flip, PositionerPrimaryAngle=None, ViewPosition={0: "AP", 180: "PA"}[deg])
            )
            assert kv.angle_deg == pytest.approx(deg)


def test_what_cannot_be_placed_is_refused(tmp_path):
    for more, tag in (
        ({"PatientPosition": "SITTING"}, "0018,5100"),
        ({"PatientPosition": None}, "0018,5100"),
        ({"PatientSupportAngle": 15.0}, "300A,0122"),
        ({"RTImagePlane": "NON_NORMAL"}, "3002,000C"),
        ({"RadiationMachineSAD": None}, "3002,0022"),
        ({"GantryAngle": None}, "300A,011E"),
        ({"RTImageSID": 900.0}, "3002,0026"),
        ({"XRayImageReceptorAngle": 30.0}, "3002,000E"),
        ({"Rows": 3}, "7FE0,0010"),
        ({"ImagePlanePixelSpacing": [1, 0]}, "3002,0011"),
        ({"RTImageOrientation": [1, 0, 0, 1, 0, 0]}, "3002,000E"),
        ({"RTImageSID": None, "XRayImageReceptorTranslation": None}, "3002,0026"),
    ):
        with pytest.raises(DicomError, match=tag) as error:
            read_kv(write_rt_image(tmp_path / "i.dcm", "HFS", 0, **more))
        assert str(tmp_path) not in str(error.value) and "CANARY" not in str(error.value)
    for more, tag in (
        ({"PatientOrientation": None}, "0020,0020"),
        ({"PatientOrientation": ["F", "L"]}, "0020,0020"),
        ({"DistanceSourceToPatient": None}, "0018,1111"),
        ({"PositionerSecondaryAngle": 20.0}, "0018,1511"),
        ({"PositionerPrimaryAngle": None}, "0018,1510"),
    ):
        with pytest.raises(DicomError, match=tag):
            read_kv(write_x_ray(tmp_path / "x.dcm", 0, **more))
    with pytest.raises(DicomError, match="SOP Class"):
        read_kv(get_testdata_file("CT_small.dcm"))
    assert read_kv(write_rt_image(tmp_path / "i.dcm", "HFS", 0, PatientPosition=None), position="HFS").angle_deg == 0
    assert read_kv(write_rt_image(tmp_path / "i.dcm", "HFS", 0, RTImageSID=None)).sid_mm == SID


def test_a_pair_through_files_is_the_projectors_pair(tmp_path):
    bead = volume(np.zeros((41, 41, 41)), **centred_grid((41, 41, 41), 5.0), units="1/mm")
    bead.loc[{"x": 30, "y": -20, "z": 45}] = 0.02
    geometry = KVGeometry(2.0, SHAPE, SAD, SID / SAD, (0.0, 90.0))
    truth = line_integrals(bead, geometry)
    read = []
    for image, deg in zip(truth, (0, 90)):
        counts = np.round(60000 * np.exp(-image.values[::-1])).astype(np.uint16)
        path = write_rt_image(
            tmp_path / "i.dcm",
            "HFS",
            deg,
            ImagePlanePixelSpacing=[2, 2],
            XRayImageReceptorTranslation=[0, 0, SAD - SID],
            RTImagePosition=[float(image.u[0]), float(image.v[-1])],
            **grey(counts),
        )
        read.append(minus_log(read_kv(path), open_field=60000))
    pair, same = kv_views(read, pixel_mm=2.0, shape_px=SHAPE)
    assert same == geometry and pair.dims == truth.dims and list(pair["view"].values) == ["AP", "LAT"]
    np.testing.assert_allclose(pair, truth, atol=2 / 60000)
    finer, _ = kv_views(read, pixel_mm=1.0, shape_px=(500, 100))
    assert np.isnan(finer.values[:, 0]).all() and np.isfinite(finer.sel(v=0, method="nearest")).all()
    for wrong, text in (
        ([read[0], read[0]], "different angles"),
        ([read[0], read[1]._replace(sad_mm=1100)], "one SAD"),
        ([read[0], read[1]._replace(isocentre_mm=(9, 9, 9))], "one isocentre"),
    ):
        with pytest.raises(ValueError, match=text):
            kv_views(wrong, pixel_mm=2.0, shape_px=SHAPE)
    with pytest.raises(ValueError, match="LIN"):
        minus_log(read[0], open_field=60000)
    with pytest.raises(ValueError, match="above 0"):
        minus_log(read[0]._replace(intensity=True), open_field=0)
