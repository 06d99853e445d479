"""Faces in a study's CTs: blurred where the face is however the patient lay, kept where something is treated, refused where neither is sure."""
import numpy as np
import pydicom
import pytest

from radrepro.core.dicom_ct import read_ct
from radrepro.core.dicom_kv import POSITIONS
from radrepro.core.dicom_write import StudyHeader, Subject, write_ct
from radrepro.core.dicom_write_plan import write_dose
from radrepro.core.dicom_write_rt import write_structures
from radrepro.core.volume import centred_grid, like, volume
from radrepro.data.privacy import deidentify
from radrepro.data.privacy_faces import TREATED

GRID = centred_grid((10, 46, 40), (6.0, 5.0, 4.0))
Z, Y, X = np.meshgrid(*(GRID[a] for a in "zyx"), indexing="ij")
NOSE = (abs(X - 20) < 10) & (Y < -50) & (Y > -85) & (abs(Z) < 20)  # to the left, in front
HEAD = ((X / 60) ** 2 + (Y / 60) ** 2 < 1) | NOSE
CT = volume(np.where(HEAD, 40.0, -1000.0), **GRID, units="HU")
LEFT, RIGHT = (like(HEAD & (side * X > 8) & (Y < -20) & (Z > 5), CT, "1") for side in (1, -1))


def study_of(folder, position="HFS", change=None, ct=CT, **made):
    header = StudyHeader(Subject("1", "A^B"), seed="faces")
    scan = write_ct(ct, folder / "ct", header, position=position)
    if change:
        for path in scan.files:
            ds = pydicom.dcmread(path)
            change(ds)
            ds.save_as(path)
    if "masks" in made:
        write_structures(made["masks"], folder / "rs.dcm", header, ct=scan)
    if "dose" in made:
        write_dose(made["dose"], folder / "rd.dcm", header, ct=made.get("on") or scan, plan=scan._replace(sop_uids=("1.2.3",)))
    return scan


def blurred(tmp_path, **given):
    """(rows of `deidentify`, the CT as copied, and as blurred)."""
    study_of(tmp_path / "study", **given)
    deidentify(tmp_path / "study", tmp_path / "plain", secret="a secret for tests 3")
    table = deidentify(tmp_path / "study", tmp_path / "out", secret="a secret for tests 3", blur_faces=True)
    return table, *(read_ct(next((tmp_path / name).glob("ct_*"))) for name in ("plain", "out"))


@pytest.mark.parametrize("position", POSITIONS)
def test_the_nose_goes_however_the_patient_lay(tmp_path, position):
    """It is to the left, in front and not at the ends of the head: a wrong axis or sign would blur somewhere else."""
    _, before, after = blurred(tmp_path, position=position)
    assert np.array_equal(before.values, CT.values)
    gone = (before.values > -350) & (after.values < -350)
    assert gone[NOSE].mean() > 0.2 and not (after.values != before.values)[Y > 30].any()
    changed = abs(after.values - before.values)
    assert changed[NOSE].mean() > 3 * changed[HEAD & (Y > -45)].mean()
    assert changed[NOSE].max() > 300 and changed[NOSE].sum() > 1.5 * changed[NOSE[:, :, ::-1]].sum()  # left, not right


@pytest.mark.parametrize("what", ["a target", "a dose"])
@pytest.mark.parametrize("kept, other", [(LEFT, RIGHT), (RIGHT, LEFT)])
def test_what_is_treated_stays_to_the_bit(tmp_path, what, kept, other):
    dose = like(np.where(kept, 1.02 * TREATED, 0.98 * TREATED * other.values), CT, "Gy")
    dose.values[0, 0, 0] = 1.0
    given = {"masks": {"PTV70": kept, "Ring": other}} if what == "a target" else {"dose": dose}
    _, before, after = blurred(tmp_path, **given)
    changed = after.values != before.values
    assert not changed[kept.values].any() and changed[other.values].any()


def test_a_dose_in_another_frame_keeps_nothing(tmp_path):
    other = write_ct(CT, tmp_path / "elsewhere", StudyHeader(seed="other"))
    _, before, after = blurred(tmp_path, dose=like(np.where(LEFT, 1.0, 0.0), CT, "Gy"), on=other)
    assert (after.values != before.values)[LEFT.values].any()


def test_stored_numbers_by_slope_and_sign(tmp_path):
    """A slope of 2, signed 12 bits: what is blurred is within half a step, what is not keeps its stored number."""
    def change(ds):
        hu = ds.pixel_array.astype(int) * int(ds.RescaleSlope) + int(ds.RescaleIntercept)
        ds.RescaleSlope, ds.RescaleIntercept, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 2, -100, 12, 11, 1
        ds.PixelData = ((hu + 100) // 2).astype("<i2").tobytes()

    _, before, after = blurred(tmp_path / "two", change=change)
    _, _, one = blurred(tmp_path / "one")
    assert np.array_equal(before.values, CT.values) and abs(after.values - one.values).max() <= 1.5
    assert (after.values != before.values).any()


def test_skin_contours_lose_their_points(tmp_path):
    blurred(tmp_path, masks={"BODY": like(HEAD, CT, "1"), "PTV70": LEFT})
    [path] = (tmp_path / "out").glob("rtstruct_*/*.dcm")
    ds = pydicom.dcmread(path)
    drawn = {r.ROIName: "ContourSequence" in c for r, c in zip(ds.StructureSetROISequence, ds.ROIContourSequence)}
    assert drawn == {"body": False, "ptv_70": True}


@pytest.mark.parametrize("what", ["tilted", "no body"])
def test_a_ct_that_cannot_be_blurred_is_left_out(tmp_path, what):
    def tilt(ds):
        c, s = np.cos(0.2), np.sin(0.2)
        ds.ImageOrientationPatient = [1, 0, 0, 0, c, s]

    given = {"change": tilt} if what == "tilted" else {"ct": like(CT.values * 0 - 1000, CT)}
    study_of(tmp_path / "study", masks={"PTV70": LEFT}, **given)
    with pytest.warns(UserWarning, match="10 of 11 files are left out"):
        table = deidentify(tmp_path / "study", tmp_path / "out", secret="a secret for tests 3", blur_faces=True)
    left = table[table.written == ""]
    assert len(left) == 10 and left.why.str.startswith("expected a CT whose face can be blurred").all()
    assert not list((tmp_path / "out").glob("ct_*/*")) and len(list((tmp_path / "out").rglob("*.dcm"))) == 1
