"""A made-up study with a canary in every element that could hold a name: nothing of it may be left anywhere; what is measured stays."""

import logging
import re
import shutil
import subprocess
import warnings
from datetime import date
from itertools import chain
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_canaries import Canaries
from made_up_dicom import UID_ROOT, closed_contour, grey, item, write_ct, write_enhanced
from made_up_study import write_head, write_kv
from pydicom import uid
from pydicom.data import get_testdata_file
from pydicom.datadict import dictionary_description, dictionary_VR, tag_for_keyword
from pydicom.dataelem import DataElement
from pydicom.dataset import FileMetaDataset

from radrepro.core.dicom_ct import read_ct
from radrepro.core.dicom_kv import read_kv
from radrepro.core.dicom_layout import DicomError, DicomWarning
from radrepro.core.dicom_rt import frame_id, read_dose, read_plan, read_registration
from radrepro.core.dicom_structures import read_structures
from radrepro.core.volume import volume
from radrepro.data.headneck_masks import BODY_NAMES, structure_name
from radrepro.data.privacy import deidentify, numbered_files
from radrepro.data.privacy_faces import blur_face
from radrepro.data.privacy_names import Pseudonyms, known_name
from radrepro.data.privacy_profile import ALLOWED
from radrepro.data.study import read_study
from radrepro.data.thorax import bucket_of
from radrepro.data.traces import read_trace
from radrepro.data.traces_dicom import read_waveform

SECRET, OTHER = "the secret of this test", "another secret, another patient"
CT, STUDY, FRAME, CBCT = UID_ROOT + "2.1", UID_ROOT + "1", UID_ROOT + "3", UID_ROOT + "33"
NAMES = {
    "ct": "ct/{}.dcm",
    "structures": "rs.dcm",
    "plan": "rp.dcm",
    "dose": "rd.dcm",
    "registration": "re.dcm",
    "kv": "ri.dcm",
    "trace": "wf.dcm",
}


# a study without canaries, as complete as the standard asks


def shared(modality, sop, number, **more):
    """What every object has."""
    patient = {"PatientName": "Made^Up", "PatientID": "0815", "PatientBirthDate": "19520312", "PatientSex": "O"}
    study = {
        "StudyInstanceUID": STUDY,
        "StudyDate": "20240228",
        "StudyTime": "101112",
        "ReferringPhysicianName": "",
        "StudyID": "1",
        "AccessionNumber": "",
        "Manufacturer": "M",
        "ManufacturerModelName": "MM",
        "DeviceSerialNumber": "1",
        "SoftwareVersions": "1",
    }
    own = {
        "SeriesInstanceUID": f"{UID_ROOT}2.{number}",
        "SeriesNumber": number,
        "Modality": modality,
        "SOPClassUID": sop,
        "SOPInstanceUID": f"{UID_ROOT}5.{number}",
        "InstanceNumber": 1,
        "OperatorsName": "",
    }
    return {**patient, **study, **own, **more}


def reference(sop, instance):
    return item(ReferencedSOPClassUID=sop, ReferencedSOPInstanceUID=instance)


def structures():
    square = lambda side: side * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
    image = reference(uid.CTImageStorage, f"{UID_ROOT}4.1.4")
    rois = {"PTV70 Canary": 9, "LeftParotid": 6, "CANARYs nodule": 5}
    contours = [[closed_contour(square(side) - (5, -19), z) for z in (-4.75, -2.25, 0.25)] for side in rois.values()]
    for c in chain(*contours):
        c.ContourImageSequence = [image]
    return shared(
        "RTSTRUCT",
        uid.RTStructureSetStorage,
        10,
        StructureSetLabel="label",
        StructureSetDate="20240301",
        StructureSetTime="1011",
        PositionReferenceIndicator="",
        FrameOfReferenceUID=FRAME,
        ReferencedFrameOfReferenceSequence=[
            item(
                FrameOfReferenceUID=FRAME,
                RTReferencedStudySequence=[
                    item(
                        **vars_of(reference(uid.UID("1.2.840.10008.3.1.2.3.1"), STUDY)),
                        RTReferencedSeriesSequence=[item(SeriesInstanceUID=CT, ContourImageSequence=[image])],
                    )
                ],
            )
        ],
        StructureSetROISequence=[
            item(ROINumber=i, ROIName=name, ReferencedFrameOfReferenceUID=FRAME, ROIGenerationAlgorithm="MANUAL")
            for i, name in enumerate(rois, 1)
        ],
        ROIContourSequence=[item(ReferencedROINumber=i, ContourSequence=c, ROIDisplayColor=[255, 0, 0]) for i, c in enumerate(contours, 1)],
        RTROIObservationsSequence=[
            item(ObservationNumber=i, ReferencedROINumber=i, RTROIInterpretedType="PTV", ROIInterpreter="") for i in range(1, 4)
        ],
    )


def vars_of(ds):
    return {e.keyword: e.value for e in ds}


def plan():
    jaws = [item(RTBeamLimitingDeviceType=axis, NumberOfLeafJawPairs=1) for axis in ("X", "Y")]
    open_jaws = [item(RTBeamLimitingDeviceType=axis, LeafJawPositions=[-50, 50]) for axis in ("X", "Y")]
    start = item(
        ControlPointIndex=0,
        CumulativeMetersetWeight=0,
        NominalBeamEnergy=6,
        DoseRateSet=600,
        BeamLimitingDevicePositionSequence=open_jaws,
        GantryAngle=30,
        GantryRotationDirection="NONE",
        BeamLimitingDeviceAngle=0,
        BeamLimitingDeviceRotationDirection="NONE",
        PatientSupportAngle=0,
        PatientSupportRotationDirection="NONE",
        TableTopEccentricAngle=0,
        TableTopEccentricRotationDirection="NONE",
        TableTopVerticalPosition=None,
        TableTopLongitudinalPosition=None,
        TableTopLateralPosition=None,
        IsocenterPosition=[-5, 19, -2],
    )
    beam = item(
        BeamNumber=3,
        BeamName="Canary field",
        BeamType="STATIC",
        RadiationType="PHOTON",
        TreatmentMachineName="LINAC",
        PrimaryDosimeterUnit="MU",
        SourceAxisDistance=1000,
        BeamLimitingDeviceSequence=jaws,
        TreatmentDeliveryType="TREATMENT",
        NumberOfWedges=0,
        NumberOfCompensators=0,
        NumberOfBoli=0,
        NumberOfBlocks=0,
        FinalCumulativeMetersetWeight=1,
        NumberOfControlPoints=2,
        ReferencedPatientSetupNumber=1,
        ControlPointSequence=[start, item(ControlPointIndex=1, CumulativeMetersetWeight=1)],
    )
    return shared(
        "RTPLAN",
        uid.RTPlanStorage,
        11,
        RTPlanLabel="label",
        RTPlanDate="20240302",
        RTPlanTime="",
        RTPlanGeometry="PATIENT",
        FrameOfReferenceUID=FRAME,
        PositionReferenceIndicator="",
        BeamSequence=[beam],
        ReferencedStructureSetSequence=[reference(uid.RTStructureSetStorage, f"{UID_ROOT}5.10")],
        DoseReferenceSequence=[
            item(
                DoseReferenceNumber=1,
                DoseReferenceStructureType="SITE",
                DoseReferenceType="TARGET",
                DoseReferenceDescription="Canary",
                TargetPrescriptionDose=70,
            )
        ],
        FractionGroupSequence=[
            item(
                FractionGroupNumber=1,
                NumberOfFractionsPlanned=35,
                NumberOfBeams=1,
                NumberOfBrachyApplicationSetups=0,
                ReferencedBeamSequence=[item(ReferencedBeamNumber=3, BeamMeterset=100, BeamDose=2)],
            )
        ],
        PatientSetupSequence=[item(PatientSetupNumber=1, PatientPosition="HFS")],
    )


def dose():
    gray = np.arange(4 * 5 * 6, dtype=np.uint32).reshape(4, 5, 6) * 70_000
    return shared(
        "RTDOSE",
        uid.RTDoseStorage,
        12,
        **grey(gray),
        DoseUnits="GY",
        DoseType="PHYSICAL",
        DoseSummationType="PLAN",
        DoseGridScaling=1e-5,
        FrameIncrementPointer=0x3004000C,
        GridFrameOffsetVector=[0, 3, 6, 9],
        ImagePositionPatient=[-20.5, 5, -9],
        PixelSpacing=[2, 3],
        ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
        SliceThickness=3,
        FrameOfReferenceUID=FRAME,
        PositionReferenceIndicator="",
        ReferencedRTPlanSequence=[reference(uid.RTPlanStorage, f"{UID_ROOT}5.11")],
        ContentDate="20240302",
        ContentTime="",
    )


def registration():
    turn = np.eye(4)
    turn[:2, :2], turn[:3, 3] = ((0.8, -0.6), (0.6, 0.8)), (1.5, -2.25, 3)
    entries = [
        item(
            FrameOfReferenceUID=frame,
            MatrixRegistrationSequence=[
                item(
                    RegistrationTypeCodeSequence=[],
                    MatrixSequence=[
                        item(FrameOfReferenceTransformationMatrix=m.ravel().tolist(), FrameOfReferenceTransformationMatrixType="RIGID")
                    ],
                )
            ],
        )
        for frame, m in ((FRAME, np.eye(4)), (CBCT, turn))
    ]
    return shared(
        "REG",
        uid.SpatialRegistrationStorage,
        13,
        FrameOfReferenceUID=FRAME,
        PositionReferenceIndicator="",
        ContentDate="20240303",
        ContentTime="1011",
        ContentLabel="LABEL",
        ContentDescription="",
        ContentCreatorName="",
        RegistrationSequence=entries,
        ReferencedSeriesSequence=[
            item(SeriesInstanceUID=CT, ReferencedInstanceSequence=[reference(uid.CTImageStorage, f"{UID_ROOT}4.1.4")])
        ],
    )


def kv():
    picture = np.arange(30, dtype=np.uint16).reshape(5, 6)
    return shared(
        "RTIMAGE",
        uid.RTImageStorage,
        14,
        **grey(picture),
        RTImageLabel="label",
        RTImagePlane="NORMAL",
        RTImageSID=1500,
        RadiationMachineSAD=1000,
        GantryAngle=90,
        PatientPosition="HFS",
        ImagePlanePixelSpacing=[2, 3],
        RTImagePosition=[-7.5, 4],
        PixelIntensityRelationship="LIN",
        XRayImageReceptorTranslation=[0, 0, -500],
        PixelIntensityRelationshipSign=1,
        IsocenterPosition=[1, 2, 3],
        ConversionType="DI",
        ImageType=["ORIGINAL", "PRIMARY", "RADIOGRAPH"],
        ReportedValuesOrigin="ACTUAL",
        RadiationMachineName="",
        BeamLimitingDeviceAngle=0,
        PatientOrientation="",
        ContentDate="20240319",
        ContentTime="",
        AcquisitionDate="20240319",
        FrameOfReferenceUID=FRAME,
        PositionReferenceIndicator="",
        RTImageOrientation=[1, 0, 0, 0, -1, 0],
        PrimaryDosimeterUnit="MU",
    )


def trace():
    counts = np.round(100 * np.sin(np.pi * np.arange(200) / 50) ** 4).astype("<i2")
    coded = lambda *c: item(**dict(zip(("CodeValue", "CodingSchemeDesignator", "CodeMeaning"), c)))
    channel = item(
        ChannelSensitivity=0.1,
        ChannelSensitivityCorrectionFactor=1,
        ChannelBaseline=0.25,
        WaveformBitsStored=16,
        ChannelTimeSkew=0,
        WaveformChannelNumber=1,
        ChannelSensitivityUnitsSequence=[coded("mm", "UCUM", "mm")],
        ChannelSourceSequence=[coded("109113", "DCM", "Respiration Waveform")],
    )
    group = item(
        NumberOfWaveformChannels=1,
        NumberOfWaveformSamples=200,
        SamplingFrequency=25,
        WaveformOriginality="ORIGINAL",
        WaveformBitsAllocated=16,
        WaveformSampleInterpretation="SS",
        ChannelDefinitionSequence=[channel],
        WaveformData=counts.tobytes(),
    )
    group["WaveformData"].VR = "OW"
    return shared(
        "RESP",
        uid.RespiratoryWaveformStorage,
        15,
        WaveformSequence=[group],
        AcquisitionContextSequence=[],
        AcquisitionDateTime="20240319101500",
        ContentDate="20240319",
        ContentTime="101500",
    )


def write(path, elements, preamble=b"\0" * 128, meta=None):
    ds = item(**elements) if isinstance(elements, dict) else elements
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    ds.file_meta.update(meta or {})
    ds.preamble = preamble
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds.save_as(path, enforce_file_format=True)
    return path


def plain_study(folder):
    """The paths of the study by what they are; the CT's slices in a list."""
    more = {
        k: v for k, v in shared("CT", uid.CTImageStorage, 1).items() if k not in ("SeriesInstanceUID", "SOPInstanceUID", "InstanceNumber")
    }

    def complete(k, ds):
        ds.update(more)
        ds.KVP, ds.AcquisitionNumber, ds.PositionReferenceIndicator, ds.ContentDate, ds.ContentTime = 120, 1, "", "20240228", "1011"

    written = {"ct": write_ct(folder / "ct", change=complete)}
    for name, made in zip(list(NAMES)[1:], (structures, plan, dose, registration, kv, trace)):
        written[name] = write(folder / NAMES[name], made())
    return written


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    return tmp_path_factory.mktemp("privacy")


@pytest.fixture(scope="module")
def planted(room):
    """(study with canaries, what was planted, its paths); folders and files are named after the canary too."""
    canaries, paths = Canaries(), {}
    for name, path in plain_study(room / "plain").items():
        found = []
        for i, p in enumerate(path if isinstance(path, list) else [path]):
            ds = pydicom.dcmread(p)
            canaries.plant(ds, top=i == 0)
            ds.PatientID = "CANARY ID"
            meta = item(
                SourceApplicationEntityTitle="CANARY AE", PrivateInformationCreatorUID="1.2.999.7777777", PrivateInformation=b"CANARY"
            )
            found.append(
                write(room / "CANARY^Mary" / "1601 CANARY" / f"CANARY {name} {i}.dcm", ds, preamble=b"CANARY".ljust(128, b"!"), meta=meta)
            )
        paths[name] = found if isinstance(path, list) else found[0]
    other = room / "CANARY^Mary" / "1601 CANARY"
    shutil.copy(get_testdata_file("reportsi.dcm"), other / "CANARY report.dcm")
    (other / "CANARY.txt").write_text("CANARY")
    (other / "CANARY cut.dcm").write_bytes(paths["plan"].read_bytes()[:-999])
    return room / "CANARY^Mary", canaries.values, paths


@pytest.fixture(scope="module")
def copied(room, planted):
    """(copy, its table, the paths in it by what they are, warnings): one run for all tests."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        table = deidentify(planted[0], room / "copy", secret=SECRET)
    number = {p: f"file {n}" for n, p in enumerate(numbered_files(planted[0]), 1)}
    new = table.set_index("file")["written"]
    at = lambda p: room / "copy" / new[number[p]]
    return room / "copy", table, {k: [at(p) for p in v] if isinstance(v, list) else at(v) for k, v in planted[2].items()}, said


def all_left(folder):
    """Every byte and every name below a folder, without the UIDs that stand for others."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return re.sub(rb"2\.25\.\d+", b"", b"\n".join(str(p.relative_to(folder)).encode() + p.read_bytes() for p in files))


def read_all(paths):
    """What the readers of the library make of the study."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DicomWarning)
        ct = read_ct(paths["ct"])
        frame = frame_id(pydicom.dcmread(paths["ct"][0]).FrameOfReferenceUID)
        return {
            "ct": ct,
            "structures": read_structures(paths["structures"], ct, frame=frame),
            "plan": read_plan(paths["plan"]),
            "dose": read_dose(paths["dose"]),
            "registration": read_registration(paths["registration"]),
            "kv": read_kv(paths["kv"]),
            "trace": read_waveform(paths["trace"], normalise=False),
        }


def test_no_canary_is_left(planted, copied):
    left, there = all_left(copied[0]), all_left(planted[0])
    assert len(planted[1]) > 20_000 and all(v.encode() in there for v in planted[1][::500])
    assert not re.findall(rb"canary|1\.2\.999|" + re.escape(UID_ROOT.encode()) + rb"|1952|0815|made\^up|1717\d\d\.", left, re.IGNORECASE)
    found = {v for v in planted[1] if not v.startswith(("CANARY", "1.2.999", "http"))}
    dates = {v for v in found if v.isdigit()}
    moved = date(2024, 2, 28) - date.fromisoformat(pydicom.dcmread(copied[2]["ct"][1]).StudyDate)
    assert len(dates) > 1000 and moved.days % 37 and not dates & {d.decode() for d in re.findall(rb"(?<!\d)\d{8}(?!\d)", left)}
    for path in copied[0].rglob("*.dcm"):
        for e in pydicom.dcmread(path).iterall():
            assert e.tag in ALLOWED or e.tag.group in (0x0010, 0x0012, 0x0028, 0x7FE0, 0x5400, 0x0008) and not e.is_private
            assert e.VR not in ("AS", "UN", "LT", "ST", "UT", "UC", "UR", "AE")
            assert e.VR != "TM" or re.fullmatch(r"(00[0-5]\d00)?", e.value or "")  # a place among less than 60, not the time


def test_nothing_is_said(planted, copied, room, capfd, caplog):
    table, said = copied[1], copied[3]
    with caplog.at_level(logging.DEBUG), pytest.warns(DicomWarning) as more:
        again = deidentify(planted[0], room / "copy again", secret=SECRET)
    assert again.equals(table) and all_left(room / "copy again") == all_left(copied[0])
    assert all((room / "copy again" / p).read_bytes() == (copied[0] / p).read_bytes() for p in table["written"] if p)
    text = table.to_csv() + "".join(str(w.message) + str(w.filename) for w in [*said, *more]) + "".join(capfd.readouterr()) + caplog.text
    assert not re.search("canary|mary|1601", text.replace(str(room), ""), re.IGNORECASE) and len(said) == 1
    out = table[table["written"] == ""]
    assert (
        len(out) == 3
        and out["why"].str.contains("expected").all()
        and table["written"].str.fullmatch(r"([a-z]+_[0-9a-f]{8}/\d{5}\.dcm)?").all()
    )


def test_what_is_measured_stays(planted, copied):
    before, after = read_all(planted[2]), read_all(copied[2])
    assert before["ct"].identical(after["ct"]) and before["trace"].identical(after["trace"])
    assert before["dose"].dose_gy.identical(after["dose"].dose_gy) and before["dose"][1:3] == after["dose"][1:3]
    assert before["kv"].image.identical(after["kv"].image) and before["kv"][1:7] == after["kv"][1:7]
    assert np.array_equal(before["registration"].matrix, after["registration"].matrix)
    assert list(before["structures"]) == ["PTV70 Canary", "LeftParotid", "CANARYs nodule"]
    assert list(after["structures"]) == ["ptv_70", "left_parotid", "structure_03"]
    assert all(a.any() and a.identical(b) for a, b in zip(before["structures"].values(), after["structures"].values()))
    named = lambda p: p._replace(frame="", beams=tuple(b._replace(name="") for b in p.beams))
    assert named(before["plan"]) == named(after["plan"]) and after["plan"].beams[0].name == "beam_03"
    assert after["plan"].prescription_gy == 70 and after["plan"].fractions == 35 and after["plan"].position == "HFS"


def test_references_still_resolve(copied):
    new = {name: pydicom.dcmread(p[3] if name == "ct" else p) for name, p in copied[2].items()}
    slices = {s.SOPInstanceUID for s in map(pydicom.dcmread, copied[2]["ct"])}
    frame, ct = new["ct"].FrameOfReferenceUID, new["ct"].SeriesInstanceUID
    assert len(slices) == 7 and {ds.StudyInstanceUID for ds in new.values()} == {new["ct"].StudyInstanceUID}
    assert {new[k].FrameOfReferenceUID for k in ("structures", "plan", "dose", "registration", "kv")} == {frame}
    referenced = new["structures"].ReferencedFrameOfReferenceSequence[0]
    series = referenced.RTReferencedStudySequence[0].RTReferencedSeriesSequence[0]
    assert (referenced.FrameOfReferenceUID, series.SeriesInstanceUID) == (frame, ct) and series.ContourImageSequence[
        0
    ].ReferencedSOPInstanceUID in slices
    assert new["structures"].ROIContourSequence[0].ContourSequence[0].ContourImageSequence[0].ReferencedSOPInstanceUID in slices
    assert new["plan"].ReferencedStructureSetSequence[0].ReferencedSOPInstanceUID == new["structures"].SOPInstanceUID
    assert new["dose"].ReferencedRTPlanSequence[0].ReferencedSOPInstanceUID == new["plan"].SOPInstanceUID
    assert new["dose"].ReferencedRTPlanSequence[0].ReferencedSOPClassUID == uid.RTPlanStorage
    inside = new["registration"].ReferencedSeriesSequence[0]
    assert inside.SeriesInstanceUID == ct and inside.ReferencedInstanceSequence[0].ReferencedSOPInstanceUID in slices
    assert read_registration(copied[2]["registration"]).target == frame_id(frame) != read_registration(copied[2]["registration"]).source
    for ds in new.values():
        assert ds.file_meta.MediaStorageSOPInstanceUID == ds.SOPInstanceUID and uid.UID(ds.SOPInstanceUID).is_valid
        codes = [(c.CodeValue, c.CodingSchemeDesignator) for c in ds.DeidentificationMethodCodeSequence]
        assert ds.PatientIdentityRemoved == "YES" and codes == [("113100", "DCM"), ("113105", "DCM"), ("113107", "DCM")]


def test_intervals_between_days_stay(planted, copied):
    when = lambda path, keyword: date.fromisoformat(str(pydicom.dcmread(path)[keyword].value)[:8])
    for study in (planted[2], copied[2]):
        assert (when(study["kv"], "AcquisitionDate") - when(study["ct"][0], "StudyDate")).days == 20
        assert when(study["trace"], "AcquisitionDateTime") == when(study["kv"], "AcquisitionDate")
    moved = when(planted[2]["kv"], "AcquisitionDate") - when(copied[2]["kv"], "AcquisitionDate")
    assert 1 <= moved.days <= 3650 and not pydicom.dcmread(copied[2]["kv"]).StudyTime


def test_times_of_day_become_their_order(tmp_path):
    """Of each patient and day by themselves; equal times stay equal, fractions of a second do not count, no time is none."""
    taken = {  # patient, day of acquisition, time of acquisition, time of content: what is left of both
        ("1", "20240102", "101500.25", "091500"): ("000200", "000100"),
        ("1", "20240102", "101500.75", ""): ("000200", ""),
        ("1", "20240102", "101501", "080000"): ("000300", "000000"),
        ("1", "20240103", "235959", "235959"): ("000000", "000000"),
        ("2", "20240102", "120000", None): ("000000", None),
        ("2", "20240102", None, None): (None, None),
    }
    for n, (patient, day, *times) in enumerate(taken):
        of_day = {"AcquisitionDate": day, "ContentDate": day, "AcquisitionTime": times[0], "ContentTime": times[1], "StudyTime": "101112"}
        more = {k: v for k, v in of_day.items() if v is not None}
        one(tmp_path / "s" / f"{n}.dcm", PatientID=patient, SeriesInstanceUID=f"1.2.{n}", **more)
    table = deidentify(tmp_path / "s", tmp_path / "o", secret=SECRET)
    left = [pydicom.dcmread(tmp_path / "o" / written) for written in table["written"]]
    assert [(ds.get("AcquisitionTime"), ds.get("ContentTime")) for ds in left] == list(taken.values())
    assert not any(ds.StudyTime for ds in left) and left[0].DeidentificationMethod[2] == "Dates moved, times of day replaced by their order"


@pytest.mark.parametrize("one_series", [True, False])
def test_views_of_several_set_ups_a_day_stay_pairs(tmp_path, one_series):
    """Three set-ups on one day: a frontal view and a lateral one each, of one brightness."""
    write_head(tmp_path / "s" / "ct", "1")
    for n in range(6):
        series, pixels = UID_ROOT + ("88" if one_series else f"88.{n}"), np.full((80, 80), 100 * (n // 2 + 1), np.uint16)
        more = {"AcquisitionTime": f"{8 + n // 2:02d}{n % 2:02d}00", "SeriesInstanceUID": series, "PixelData": pixels.tobytes()}
        write_kv(tmp_path / "s" / f"{n}.dcm", 90.0 * (n % 2), "19990108", StudyInstanceUID=UID_ROOT + "9", **more)
    deidentify(tmp_path / "s", tmp_path / "o", secret="x" * 20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        brightness = [[int(view.image.mean()) for view in pair] for pair in read_study(tmp_path / "o").kvs]
    assert brightness == [[100, 100], [200, 200], [300, 300]]


def test_another_secret_is_another_study(planted, copied, room):
    with pytest.warns(DicomWarning):
        other = deidentify(planted[0], room / "other", secret=OTHER)
    of = lambda d: list(zip(*[(ds.SOPInstanceUID, ds.PatientID, ds.StudyDate) for ds in map(pydicom.dcmread, sorted(d.rglob("*.dcm")))]))
    assert not any(set(a) & set(b) for a, b in zip(of(copied[0]), of(room / "other"))) and len(other) == len(copied[1])


@pytest.mark.skipif(not shutil.which("dciodvfy"), reason="dciodvfy (Debian package dicom3tools) is not installed")
@pytest.mark.parametrize("name", NAMES)
def test_no_new_error_of_dciodvfy(planted, copied, name):
    def errors(path):
        said = subprocess.run(["dciodvfy", str(path)], check=False, capture_output=True, text=True, errors="replace")
        return {line for line in (said.stdout + said.stderr).splitlines() if line.startswith("Error")}

    plain = planted[0].parent / "plain" / NAMES[name].format(3)
    assert (
        plain.exists()
        and pydicom.dcmread(plain).SOPClassUID == pydicom.dcmread(copied[2][name][0] if name == "ct" else copied[2][name]).SOPClassUID
    )
    new = errors(copied[2][name][0] if name == "ct" else copied[2][name]) - errors(plain)
    assert not new, "\n".join(sorted(new))


# one file at a time


def one(path, **elements):
    """A small CT slice at `path`, with more elements."""
    made = write_ct(path.parent / "made", shape=(1, 4, 5), change=lambda k, ds: ds.update(elements))[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    return made.rename(path)


@pytest.mark.parametrize(
    "elements",
    [
        {"BurnedInAnnotation": "YES"},
        {"ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"]},
        {"ConversionType": "SI"},
        {"ImageType": ["DERIVED", "SECONDARY", "DOSE_INFO"]},
        {"SOPClassUID": uid.SecondaryCaptureImageStorage},
        {"SOPClassUID": uid.MRImageStorage},
        {"SOPClassUID": "1.2.999.1"},
        {"PatientID": "", "PatientName": ""},
        {"SamplesPerPixel": 3},
        {"HighBit": 99},
    ],
)
def test_what_is_refused(tmp_path, elements):
    one(tmp_path / "s" / "canary.dcm", **elements)
    with pytest.raises(DicomError, match="expected") as error:
        deidentify(tmp_path / "s", tmp_path / "out", secret=SECRET)
    assert "canary" not in str(error.value) and str(tmp_path) not in str(error.value) and "1.2.999" not in str(error.value)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("deidentify-*"))
    while (cause := error.value.__cause__ or error.value.__context__) is not None:
        assert "canary" not in str(cause)
        error.value = cause


def spoilt(path, value, by):
    """`path` with a value of as many bytes in the place of `value`, which pydicom would not write."""
    stored = path.read_bytes()
    assert stored.count(value) == 1 and len(value) == len(by)
    path.write_bytes(stored.replace(value, by))
    return path


@pytest.mark.parametrize(
    ("made", "where", "keyword", "value"),
    [
        ("ct", "", "RescaleType", "CANARY"),
        ("ct", "", "PatientPosition", "CANARY"),
        ("kv", "", "RTImagePlane", "CANARY"),
        ("kv", "", "PatientPosition", "CANARY"),
        ("kv", "", "PatientSupportAngle", "45,000"),
        ("kv", "", "RescaleSlope", "2 or 3"),
        ("kv", "", "IsocenterPosition", "\\\\  "),
        ("dose", "", "DoseUnits", "CANARY"),
        ("plan", "BeamSequence", "TreatmentDeliveryType", "CANARY"),
        ("plan", "DoseReferenceSequence", "TargetPrescriptionDose", "70,000"),
        (
            "registration",
            "RegistrationSequence MatrixRegistrationSequence MatrixSequence",
            "FrameOfReferenceTransformationMatrix",
            "1,0000",
        ),
    ],
)
def test_a_copy_is_not_read_as_what_the_original_is_not(tmp_path, made, where, keyword, value):
    """Without the value the copy would be read by a default; the reason names the element and not the value."""
    elements = {"kv": kv, "dose": dose, "plan": plan, "registration": registration}
    ds = item(**elements[made]()) if made in elements else pydicom.dcmread(one(tmp_path / "s" / "a.dcm"))
    inner = ds
    for sequence in where.split():
        inner = inner[sequence].value[0]
    vr, stand_in = dictionary_VR(keyword), "867530"[: len(value)]
    inner[keyword] = DataElement(tag_for_keyword(keyword), vr, stand_in, validation_mode=pydicom.config.IGNORE)
    spoilt(write(tmp_path / "s" / "a.dcm", ds), stand_in.encode(), value.encode())
    with pytest.raises(DicomError, match=re.escape(dictionary_description(keyword))) as error:
        deidentify(tmp_path / "s", tmp_path / "o", secret=SECRET)
    assert value.strip() not in str(error.value) and "a.dcm" not in str(error.value) and "file 1" in str(error.value)


@pytest.mark.parametrize("kind", ["MGML", "ED", "EDW", "HU_MOD", "Z_EFF", "PCT", "OD", "US"])
def test_units_of_the_standard_stay(tmp_path, kind):
    new = copy_of(one(tmp_path / "s" / "a.dcm", RescaleType=kind), tmp_path)
    assert pydicom.dcmread(new).RescaleType == kind
    if kind != "US":
        with pytest.raises(DicomError, match="Rescale Type"):
            read_ct(new)


def test_what_only_describes_may_go(tmp_path):
    path = one(tmp_path / "s" / "a.dcm", WindowCenter="31415926", BodyPartExamined="CANARY", LossyImageCompression="CANARY")
    new = pydicom.dcmread(copy_of(spoilt(path, b"31415926", b"CANARY  "), tmp_path))
    assert "WindowCenter" not in new and not new.BodyPartExamined and "LossyImageCompression" not in new and new.RescaleType == "HU"


# fmt: off
WORDS_OF_NAMES = [
    "PTV", "CTV", "GTV", "ITV", "PTV70", "70", "54", "1952", "ring", "Ring", "prv", "PRV03", "non", "Non", "no", "minus", "opt",
    "avoid", "Parotid", "parotids", "L", "R", "left", "Right", "brainstem", "Brain", "stem", "Mandible", "oral", "Cavity", "cord",
    "spinal", "lung", "lungs", "vessels", "heart", "inferior", "vena", "cava", "pulmonary", "vein", "artery", "body", "skin",
    "External", "Jones", "Canary", "z", "x", "5mm",
]
# fmt: on


@given(st.lists(st.sampled_from(WORDS_OF_NAMES), min_size=1, max_size=4), st.sampled_from([" ", "_", "-", "", "+", " (", "."]))
@settings(max_examples=400, deadline=None)
def test_a_name_is_never_read_as_another(words, between):
    label = between.join(words)
    name = known_name(label)
    assert structure_name(name) in (None, structure_name(label)) and bucket_of(name) in (0, bucket_of(label), bucket_of("_".join(words)))
    assert name not in BODY_NAMES or label.lower() == name
    assert "jones" not in name.lower() and "canary" not in name.lower()


@pytest.mark.parametrize(
    "label", ["Ring_PTV70", "Non-PTV parotid L", "PTV70 minus cord", "Parotid-PTV", "Jones PTV70", "skin 5mm", "lung vessels"]
)
def test_a_helper_is_no_structure_in_the_copy(label):
    assert known_name(label) == ""


def test_folders(tmp_path):
    file = one(tmp_path / "s" / "a.dcm")
    (tmp_path / "away").mkdir()
    shutil.copy(file, tmp_path / "away" / "b.dcm")
    (tmp_path / "s" / "link").symlink_to(tmp_path / "away")
    (tmp_path / "s" / "c.dcm").symlink_to(tmp_path / "away" / "b.dcm")
    assert numbered_files(tmp_path / "s") == [file]
    for source, out in ((tmp_path / "none", "o"), (file, "o"), (tmp_path / "s", "s/o"), (tmp_path / "s", "away"), (tmp_path / "s", "s")):
        with pytest.raises(DicomError, match="expected"):
            deidentify(source, tmp_path / out, secret=SECRET)
    with pytest.raises(ValueError, match="16 characters"):
        deidentify(tmp_path / "s", tmp_path / "o", secret="short")
    assert list(deidentify(tmp_path / "s", tmp_path / "o", secret=SECRET)["written"]) == [
        str(p.relative_to(tmp_path / "o")) for p in (tmp_path / "o").rglob("*.dcm")
    ]


def test_bits_behind_the_picture(tmp_path):
    """Twelve bits a pixel; a message in the four above them, and in what follows the picture."""
    path = one(tmp_path / "s" / "a.dcm", BitsStored=12, HighBit=11, PixelRepresentation=0, PixelPaddingValue=0xF0F0)
    ds = pydicom.dcmread(path)
    pixels = ds.pixel_array.copy()
    hidden = pixels | (np.arange(pixels.size, dtype=np.uint16).reshape(pixels.shape) % 15 + 1 << 12)
    hidden[0, 0] = 0xF0F0
    ds.PixelData = hidden.tobytes()
    ds.save_as(path)
    deidentify(tmp_path / "s", tmp_path / "o", secret=SECRET)
    left = np.frombuffer(pydicom.dcmread(next((tmp_path / "o").rglob("*.dcm"))).PixelData, "<u2")
    assert left[0] == 0xF0F0 and np.array_equal(left[1:], pixels.ravel()[1:]) and hidden.max() > 4095 > left[1:].max()


@pytest.mark.parametrize("kind", [uid.RLELossless, uid.ImplicitVRLittleEndian, uid.ExplicitVRBigEndian])
def test_transfer_syntaxes(tmp_path, kind):
    path = one(tmp_path / "s" / "a.dcm", PixelPaddingValue=-2000, PatientComments="canary", AcquisitionDate="20240102")
    before, ds = read_ct(path), pydicom.dcmread(path)
    if kind.is_compressed:
        ds.compress(kind)
    elif not kind.is_little_endian:
        ds.PixelData = ds.pixel_array.astype(">i2").tobytes()
    ds.file_meta.TransferSyntaxUID = kind
    pydicom.dcmwrite(path, ds, implicit_vr=kind.is_implicit_VR, little_endian=kind.is_little_endian, force_encoding=True)
    deidentify(tmp_path / "s", tmp_path / "o", secret=SECRET)
    new = next((tmp_path / "o").rglob("*.dcm"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert read_ct(new).identical(before) and b"canary" not in new.read_bytes()
    ds = pydicom.dcmread(new)
    assert ds.file_meta.TransferSyntaxUID == uid.ExplicitVRLittleEndian and ds.PixelPaddingValue == -2000


def test_enhanced_ct(tmp_path):
    write_ct(tmp_path / "slices", shape=(4, 6, 5))
    (tmp_path / "s").mkdir()
    file = write_enhanced(tmp_path / "s" / "e.dcm", tmp_path / "slices")
    deidentify(tmp_path / "s", tmp_path / "o", secret=SECRET)
    assert read_ct(next((tmp_path / "o").rglob("*.dcm"))).identical(read_ct(file))


def test_files_of_pydicom_are_cleaned_or_refused(tmp_path, capfd):
    (tmp_path / "s").mkdir()
    names = set()
    for path in Path(get_testdata_file("CT_small.dcm")).parent.glob("*.dcm"):
        shutil.copy(path, tmp_path / "s")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ds = pydicom.dcmread(path, stop_before_pixels=True, force=True)
            names |= {str(ds.get(k, "")) for k in ("PatientName", "PatientID", "StudyDescription", "StudyInstanceUID")}
    with pytest.warns(DicomWarning):
        table = deidentify(tmp_path / "s", tmp_path / "o", secret=SECRET)
    left = all_left(tmp_path / "o") + table.to_csv().encode()
    assert (table["written"] != "").sum() > 9 and table.loc[table["written"] == "", "why"].str.contains("expected").all()
    assert not [n for n in names if len(n) > 5 and n.encode() in left] and not "".join(capfd.readouterr())


def test_damaged_files_say_nothing(tmp_path):
    whole = one(tmp_path / "s" / "canary.dcm", PatientName="CANARY^A").read_bytes()
    rng = np.random.default_rng(3)
    for k in range(60):
        data = bytearray(whole)
        for at in rng.integers(132, len(data), 4):
            data[at] = rng.integers(256)
        (tmp_path / "s" / f"canary {k}.dcm").write_bytes(data if k % 3 else data[: rng.integers(len(data))])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        table = deidentify(tmp_path / "s", tmp_path / "o", secret=SECRET)
    assert (table["written"] == "").sum() > 10 and b"canary" not in (
        all_left(tmp_path / "o") + table.to_csv().encode() + str(said[-1].message).encode()
    ).lower()
    assert len(said) == 1


@pytest.mark.parametrize("name", ["dicom_rt_dicompyler", "dicom_lungdx_A0002"])
def test_real_studies(data_dir, tmp_path, name):
    source = data_dir / name
    if not source.is_dir():
        pytest.skip(f"RADREPRO_DATA has no {name}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DicomWarning)
        table = deidentify(source, tmp_path / "o", secret=SECRET)
        at = {p.name: tmp_path / "o" / w for p, w in zip(numbered_files(source), table["written"]) if w}
        slices = [p for p in numbered_files(source) if p.name in at and pydicom.dcmread(p, stop_before_pixels=True).Modality == "CT"]
        assert read_ct(slices).identical(read_ct([at[p.name] for p in slices]))
    assert (table["written"] == "").sum() == sum(p.suffix != ".dcm" for p in numbered_files(source))


def test_traces_become_numbers(tmp_path):
    time_s = 1.7e9 + np.arange(0, 20, 0.04)
    rows = "".join(f"{t:.2f},{np.sin(t) ** 4:.5f},CANARY\n" for t in time_s)
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "CANARY.csv").write_text("time_s,amplitude,patient\n" + rows)
    (tmp_path / "s" / "patients.csv").write_text("CANARY^Mary,1601-01-01\n" + rows)
    with pytest.warns(DicomWarning) as said:
        table = deidentify(tmp_path / "s", tmp_path / "o", secret=SECRET)
    assert list(table["written"]) == ["trace/00001.csv", ""] and "CANARY" not in table.to_csv() + str(said[0].message)
    left = (tmp_path / "o" / "trace" / "00001.csv").read_text()
    before, after = read_trace(tmp_path / "s" / "CANARY.csv"), read_trace(tmp_path / "o" / "trace" / "00001.csv")
    assert "CANARY" not in left and "17000" not in left and float(after.time[0]) == 0
    np.testing.assert_allclose(after[:490], before[:490], atol=2e-3)


def test_two_patients_in_one_folder(tmp_path):
    for n in (1, 2):
        one(tmp_path / "s" / f"{n}.dcm", PatientID=f"number {n}", StudyDate="20240102", SeriesInstanceUID=f"1.2.{n}")
    deidentify(tmp_path / "s", tmp_path / "o", secret=SECRET)
    a, b = (pydicom.dcmread(p) for p in (tmp_path / "o").rglob("*.dcm"))
    assert a.PatientID != b.PatientID and a.StudyDate != b.StudyDate and a.PatientName == a.PatientID


@pytest.mark.parametrize("front", [-1, 1])
def test_the_face_looks_to_minus_y(front):
    """A head with a nose at either end: what lies to the back stays to the bit."""
    z, y, x = np.meshgrid(*[np.arange(-60, 61, 4.0)] * 3, indexing="ij")
    inside = (z**2 + y**2 + x**2 < 44**2) | (z**2 + (y - front * 44) ** 2 + x**2 < 10**2)
    ct = volume(np.where(inside, 40.0, -1000.0), z=z[:, 0, 0], y=y[0, :, 0], x=x[0, 0], units="HU")
    hidden = blur_face(ct, ct < -2000)
    surface = lambda v, back: (v.sel(x=0, z=0) > -350).values[:: -1 if back else 1].argmax()
    assert (
        hidden.dtype == ct.dtype and hidden.attrs == ct.attrs and bool((hidden.sel(y=slice(10, None)) == ct.sel(y=slice(10, None))).all())
    )
    assert (surface(hidden, front == 1) == surface(ct, front == 1)) == (front == 1)


def copy_of(path, tmp_path):
    """The only file of the copy of a folder with `path` alone."""
    deidentify(path.parent, tmp_path / "o", secret=SECRET)
    return next((tmp_path / "o").rglob("*.dcm"))


@pytest.mark.parametrize("sop", [uid.DigitalXRayImageStorageForPresentation, uid.ComputedRadiographyImageStorage])
def test_x_rays(tmp_path, sop):
    geometry = {
        "DistanceSourceToDetector": 1500,
        "DistanceSourceToPatient": 1000,
        "PositionerPrimaryAngle": -90,
        "PatientOrientation": ["P", "F"],
    }
    more = {"ImagerPixelSpacing": [2, 3], "PixelIntensityRelationship": "LOG", "PixelIntensityRelationshipSign": -1, "ViewPosition": "LL"}
    picture = grey(np.arange(30, dtype=np.uint16).reshape(5, 6))
    path = write(tmp_path / "s" / "x.dcm", shared("DX", sop, 20, **geometry, **more, **picture, PatientComments="CANARY"))
    before, after = read_kv(path), read_kv(copy_of(path, tmp_path))
    assert before.image.identical(after.image) and before[1:6] == after[1:6] and before.intensity is False


def test_proton_plan(tmp_path):
    spots = np.arange(6, dtype=np.float32).tolist()
    point = {
        "ControlPointIndex": 0,
        "CumulativeMetersetWeight": 0,
        "NominalBeamEnergy": 150.5,
        "GantryAngle": 271,
        "PatientSupportAngle": 10,
    }
    point |= {
        "IsocenterPosition": [1, -2, 3],
        "ScanSpotTuneID": "CANARY",
        "ScanSpotPositionMap": spots,
        "ScanSpotMetersetWeights": spots[:3],
    }
    beam = {
        "BeamNumber": 2,
        "BeamName": "CANARY",
        "RadiationType": "PROTON",
        "VirtualSourceAxisDistances": [2000, 1800],
        "ScanMode": "MODULATED",
    }
    beam |= {
        "TreatmentDeliveryType": "TREATMENT",
        "IonControlPointSequence": [item(**point), item(ControlPointIndex=1, NominalBeamEnergy=140)],
    }
    group = item(FractionGroupNumber=1, NumberOfFractionsPlanned=33)
    dose = item(DoseReferenceStructureType="VOLUME", TargetPrescriptionDose=66, DoseReferenceDescription="CANARY")
    elements = {
        "IonBeamSequence": [item(**beam)],
        "FractionGroupSequence": [group],
        "DoseReferenceSequence": [dose],
        "RTPlanLabel": "CANARY",
    }
    path = write(tmp_path / "s" / "p.dcm", shared("RTPLAN", uid.RTIonPlanStorage, 21, **elements))
    new = copy_of(path, tmp_path)
    before, after = read_plan(path), read_plan(new)
    assert before.beams[0]._replace(name="beam_02") == after.beams[0] and before.prescription_gy == after.prescription_gy == 66
    left = pydicom.dcmread(new).IonBeamSequence[0].IonControlPointSequence[0]
    assert list(left.ScanSpotPositionMap) == spots and left.ScanSpotTuneID == "removed" and b"CANARY" not in new.read_bytes()


def test_deformable_registration_keeps_its_field_and_nowhere_else(tmp_path):
    field = np.arange(2 * 2 * 2 * 3, dtype="<f4").tobytes()
    grid = item(
        GridDimensions=[2, 2, 2], GridResolution=[3, 3, 3], ImagePositionPatient=[1, 2, 3], ImageOrientationPatient=[1, 0, 0, 0, 1, 0]
    )
    grid.VectorGridData = field
    entry = item(SourceFrameOfReferenceUID=CBCT, DeformableRegistrationGridSequence=[grid])
    elements = shared(
        "REG", uid.DeformableSpatialRegistrationStorage, 22, FrameOfReferenceUID=FRAME, DeformableRegistrationSequence=[entry]
    )
    path = write(tmp_path / "s" / "d.dcm", elements | {"VectorGridData": b"CANARY__"})
    new = pydicom.dcmread(copy_of(path, tmp_path))
    assert (
        new.DeformableRegistrationSequence[0].DeformableRegistrationGridSequence[0].VectorGridData == field and "VectorGridData" not in new
    )
    assert new.DeformableRegistrationSequence[0].SourceFrameOfReferenceUID == Pseudonyms(SECRET).uid(CBCT)
