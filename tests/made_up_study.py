"""Studies that no clinic made: canaries wherever a clinic has a name, and one function for each kind of object."""
import numpy as np
import pydicom
from made_up_dicom import UID_ROOT, closed_contour, grey, item, write_ct, write_object, write_registration
from pydicom import uid

STILL = np.eye(4)
F1, F2, F3 = (f"{UID_ROOT}7.{i}" for i in (1, 2, 3))
SECRETS = ("CANARY", "19990", UID_ROOT, "Jane")  # names, dates, UIDs
PHI = {"PatientName": "CANARY^NAME", "PatientID": "CANARY-ID", "PatientBirthDate": "19990909", "InstitutionName": "CANARY CLINIC",
       "StudyDate": "19990101", "StudyDescription": "CANARY STUDY", "SeriesDescription": "CANARY SERIES"}


def head_hu(x, y, z):
    """A head with a skull on a neck and shoulders; the top at z = 140 mm, a bright mark at the left, front, low: about (30, -20, -40)."""
    head, skull = ((x / 72) ** 2 + (y / 92) ** 2 + ((z - 40) / 100) ** 2 < s for s in (1, 0.8))
    neck, shoulders = (x / 55) ** 2 + ((y - 20) / 60) ** 2 < (z < 40), (abs(x) < 150) & (abs(y - 20) < 70) & (z < -110)
    hu = np.where(head | neck | shoulders, 30, -1000)
    hu = np.where(head & ~skull, 250, hu)
    return np.where((abs(x - 30) < 16) & (abs(y + 20) < 17) & (abs(z + 40) < 20), 700, hu).astype(float)


def chest_hu(x, y, z):
    """A trunk with two lungs and a spine."""
    hu = np.where((x / 165) ** 4 + (y / 120) ** 4 < 1, 30.0, -1000.0)
    for side in (-1, 1):
        hu[((x - 70 * side) / 52) ** 2 + (y / 80) ** 2 + ((z - 5) / 120) ** 2 < 1] = -820
    hu[(x / 18) ** 4 + ((y - 85) / 18) ** 4 < 1] = 500
    return hu


def write_chest(folder):
    """A CT of it, with a trace."""
    write_ct(folder, shape=(40, 54, 76), spacing_mm=(5.0, 5.0), step_mm=7.0, corner=(-190.0, -135.0, -136.0), series="9", hu=chest_hu,
             change=lambda k, ds: ds.update(PHI | {"FrameOfReferenceUID": F1}))
    write_breathing(folder / "CANARY.csv")


def write_head(folder, series, frame=F1, day="19990101", pose=STILL, study="1", n=36, change=lambda k, ds: None):
    """A CT of the head, 8 mm all round, its content carried by `pose`; names of files hold a canary."""
    back = np.linalg.inv(pose)

    def spoil(k, ds):
        ds.update(PHI | {"FrameOfReferenceUID": frame, "StudyInstanceUID": UID_ROOT + "1." + study})
        if day:
            ds.AcquisitionDate = day
        else:
            del ds.StudyDate
        change(k, ds)
    paths = write_ct(folder, shape=(n, 42, 44), spacing_mm=(8.0, 8.0), step_mm=8.0, corner=(-172.0, -164.0, -140.0), change=spoil,
                     series=series, hu=lambda *xyz: head_hu(*np.tensordot(back, [*xyz, np.ones_like(xyz[0])], 1)[:3]))
    return [p.rename(p.with_name(f"CT CANARY Jane {series} {p.name}")) for p in paths]


def new_uid(path) -> str:
    return pydicom.dcmread(path, stop_before_pixels=True).SOPInstanceUID


def write_structures(path, rois=(("CTV CANARY", (30, -20), -40.0),), frame=F1, series="", **more):
    """Squares of 20 mm at (x, y) through three slices about z."""
    square = np.array([(-10, -10), (10, -10), (10, 10), (-10, 10)])
    contours = [[closed_contour(square + at, z + d) for d in (-8, 0, 8)] for _, at, z in rois]
    drawn = [item(RTReferencedSeriesSequence=[item(SeriesInstanceUID=f"{UID_ROOT}2.{series}")])] if series else []
    return write_object(path, uid.RTStructureSetStorage, **PHI | {
        "SeriesInstanceUID": uid.generate_uid(),
        "ReferencedFrameOfReferenceSequence": [item(FrameOfReferenceUID=frame, RTReferencedStudySequence=drawn)],
        "StructureSetROISequence": [item(ROINumber=i, ROIName=name, ReferencedFrameOfReferenceUID=frame)
                                    for i, (name, _, _) in enumerate(rois)],
        "ROIContourSequence": [item(ReferencedROINumber=i, ContourSequence=c) for i, c in enumerate(contours)]} | more)


def write_plan(path, frame=F1, structures="", isocentre=(0, 0, 0), dose_gy=60.0, **more):
    beam = item(BeamName="CANARY", RadiationType="PHOTON", TreatmentDeliveryType="TREATMENT", SourceAxisDistance=1000,
                ControlPointSequence=[item(GantryAngle=0, PatientSupportAngle=0, NominalBeamEnergy=6, IsocenterPosition=list(isocentre))])
    return write_object(path, uid.RTPlanStorage, **PHI | {
        "SeriesInstanceUID": uid.generate_uid(), "FrameOfReferenceUID": frame, "RTPlanLabel": "CANARY", "BeamSequence": [beam],
        "ReferencedStructureSetSequence": [item(ReferencedSOPInstanceUID=structures)] if structures else None,
        "FractionGroupSequence": [item(NumberOfFractionsPlanned=30)],
        "DoseReferenceSequence": [item(DoseReferenceStructureType="SITE", TargetPrescriptionDose=dose_gy)]} | more)


def write_dose(path, frame=F1, summation="PLAN", **more):
    pixels = np.arange(2 * 3 * 4, dtype=np.uint16).reshape(2, 3, 4)
    return write_object(path, uid.RTDoseStorage, **PHI | {
        "SeriesInstanceUID": uid.generate_uid(), "FrameOfReferenceUID": frame, "DoseUnits": "GY", "DoseType": "PHYSICAL",
        "DoseSummationType": summation, "DoseGridScaling": 0.5, "ImagePositionPatient": [0, 0, 0],
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "PixelSpacing": [4, 4], "GridFrameOffsetVector": [0, 4], **grey(pixels)} | more)


def write_reg(path, source, matrix, kind="RIGID", target=F1):
    ds = pydicom.dcmread(write_registration(path, (source, [matrix], kind), target=target))
    ds.update(PHI | {"SeriesInstanceUID": uid.generate_uid()})
    ds.save_as(path)


def write_kv(path, angle=0.0, day="19990108", frame=F1, n=80, **more):
    """An image of 6 mm pixels as stored by LOG, brighter towards the patient's head."""
    pixels = np.repeat(np.arange(n, dtype=np.uint16)[::-1, None] * 10, n, 1)
    first = -(n - 1) / 2 * 6.0
    return write_object(path, uid.RTImageStorage, **PHI | {
        "SeriesInstanceUID": uid.generate_uid(), "FrameOfReferenceUID": frame, "AcquisitionDate": day, "RTImagePlane": "NORMAL",
        "GantryAngle": angle, "RTImageSID": 1500.0, "RadiationMachineSAD": 1000.0, "ImagePlanePixelSpacing": [6, 6],
        "PatientPosition": "HFS", "RTImagePosition": [first, -first],
        "PixelIntensityRelationship": "LOG", "PixelIntensityRelationshipSign": -1,
        "IsocenterPosition": [0, 0, 0], **grey(pixels)} | more)


def write_pair(folder, day, angles=(0.0, 90.0), **more):
    for a in angles:
        write_kv(folder / f"kV CANARY {day} {a}.dcm", a, day, AcquisitionTime=f"0800{int(a) % 60:02d}", **more)


def write_breathing(path, seconds=60):
    t = np.arange(0, seconds, 0.1)
    path.write_text("time_s,amplitude,patient\n" + "".join(f"{a:.1f},{np.cos(a):.3f},CANARY\n" for a in t))
