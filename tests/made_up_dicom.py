"""CT series that no scanner made: a function of the patient's left, back and head in mm, written slice by slice with pydicom alone."""
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian

UID_ROOT = "1.2.826.0.1.3680043.10.999."
POSITIONS = {  # directions of a row and a column (x left, y back, z head) of an axial picture, as the patient lies
    "HFS": ((1, 0, 0), (0, 1, 0)),
    "HFP": ((-1, 0, 0), (0, -1, 0)),
    "FFS": ((-1, 0, 0), (0, 1, 0)),
    "FFP": ((1, 0, 0), (0, -1, 0)),
    "HFDR": ((0, 1, 0), (-1, 0, 0)),
    "HFDL": ((0, -1, 0), (1, 0, 0)),
    "FFDR": ((0, 1, 0), (1, 0, 0)),
    "FFDL": ((0, -1, 0), (-1, 0, 0)),
    "coronal": ((1, 0, 0), (0, 0, -1)),
    "sagittal": ((0, 1, 0), (0, 0, -1)),
}


def hu_at(x_mm, y_mm, z_mm):
    """Whole HU, different along every axis and in every octant; from -1000 to about 1900 within 150 mm."""
    ball = (x_mm + 10) ** 2 + (y_mm - 9) ** 2 + (z_mm + 6) ** 2 < 8**2
    return np.clip(np.round(40 + 3 * x_mm + 2 * y_mm + 4 * z_mm + 600 * ball), -1000, 1900)


def slice_points(position_mm, row, column, shape, spacing_mm):
    """(rows, columns, 3): x, y, z in mm of each pixel; `spacing_mm` as DICOM has it, between rows and between columns."""
    i, j = np.meshgrid(range(shape[0]), range(shape[1]), indexing="ij")
    return np.array(position_mm) + i[..., None] * np.array(column) * spacing_mm[0] + j[..., None] * np.array(row) * spacing_mm[1]


def blank_ct(series: str = "1") -> FileDataset:
    """A CT slice without geometry or pixels: what all slices of a series share."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = CTImageStorage
    ds = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.Modality, ds.ImageType = CTImageStorage, "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.PatientName, ds.PatientID, ds.StudyInstanceUID = "Made^Up", "0", UID_ROOT + "1"
    ds.SeriesInstanceUID, ds.FrameOfReferenceUID = UID_ROOT + "2." + series, UID_ROOT + "3"
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
    ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = 1, -1024, "HU"
    return ds


def set_values(ds: Dataset, hu) -> None:
    """Store HU by the slope, the intercept and the bits that `ds` has."""
    stored = np.round((hu - float(ds.RescaleIntercept)) / float(ds.RescaleSlope))
    low = -(2 ** (ds.BitsStored - 1)) if ds.PixelRepresentation else 0
    assert low <= stored.min() and stored.max() < low + 2**ds.BitsStored, "HU do not fit the bits"
    bits = (stored.astype(np.int64) % 2**ds.BitsStored) << (ds.HighBit + 1 - ds.BitsStored)
    if ds.PixelRepresentation and ds.HighBit + 1 == ds.BitsStored:  # as writers do: the sign goes all the way up
        bits = stored.astype(np.int64)
    ds.PixelData = (bits % 2**ds.BitsAllocated).astype(f"<u{ds.BitsAllocated // 8}").tobytes()
    ds["PixelData"].VR = "OW"


def write_ct(folder, position="HFS", *, shape=(7, 10, 12), spacing_mm=(2.0, 1.5), step_mm=2.5, corner=(-13.25, 11.5, -9.75), step=None,
             row_column=None, number=lambda k: (5 * k + 3) % 97, change=lambda k, ds: None, after=lambda k, ds: None, series="1", hu=hu_at) -> list[Path]:
    """Write `shape` (slices, rows, columns) from the slice at `corner` on, each `step` (or step_mm along the normal) further: the paths.

    `number(k)`: the file and instance number of slice k, in no order. `change(k, ds)`: edits a slice before its values are stored; `after`
    once they are."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    row, column = row_column or POSITIONS[position]
    step = np.cross(row, column) * step_mm if step is None else np.array(step, float)
    paths = []
    for k in range(shape[0]):
        ds, at = blank_ct(series), np.array(corner) + k * step
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"{UID_ROOT}4.{series}.{number(k) + 1}"
        ds.InstanceNumber, ds.PatientPosition = number(k), position if position in POSITIONS and len(position) <= 4 else "HFS"
        ds.ImagePositionPatient = [round(float(v), 6) for v in at]
        ds.ImageOrientationPatient = [round(float(v), 9) for v in (*row, *column)]
        (ds.Rows, ds.Columns), ds.PixelSpacing, ds.SliceThickness = shape[1:], list(spacing_mm), step_mm
        change(k, ds)
        set_values(ds, hu(*np.moveaxis(slice_points(at, row, column, shape[1:], spacing_mm), -1, 0)))
        after(k, ds)
        paths.append(folder / f"{number(k)}.dcm")
        ds.save_as(paths[-1])
    return paths


def write_enhanced(path, folder) -> Path:
    """The slices of a folder as one Enhanced CT file at `path`, its frames in the order of their numbers."""
    slices = sorted((pydicom.dcmread(p) for p in Path(folder).glob("*.dcm")), key=lambda s: s.InstanceNumber)
    ds = blank_ct()
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = UID_ROOT + "5.1"
    for keyword in ("RescaleSlope", "RescaleIntercept", "RescaleType"):
        delattr(ds, keyword)
    for keyword in ("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "ImageType"):
        setattr(ds, keyword, getattr(slices[0], keyword))
    ds.NumberOfFrames, ds.PixelData = len(slices), b"".join(s.PixelData for s in slices)
    ds["PixelData"].VR = "OW"
    groups = {"PlaneOrientationSequence": ["ImageOrientationPatient"], "PixelMeasuresSequence": ["PixelSpacing", "SliceThickness"],
              "PlanePositionSequence": ["ImagePositionPatient"],
              "PixelValueTransformationSequence": ["RescaleSlope", "RescaleIntercept", "RescaleType"]}

    def taken(source: Dataset, names) -> Dataset:
        out = Dataset()
        for name in names:
            inner = Dataset()
            for keyword in groups[name]:
                setattr(inner, keyword, getattr(source, keyword))
            setattr(out, name, [inner])
        return out

    ds.SharedFunctionalGroupsSequence = [taken(slices[0], list(groups)[:2])]
    ds.PerFrameFunctionalGroupsSequence = [taken(s, list(groups)[2:]) for s in slices]
    ds.save_as(path)
    return Path(path)


def item(**elements) -> Dataset:
    """One item of a sequence."""
    ds = Dataset()
    ds.update(elements)
    return ds


def write_object(path, sop_class, **elements) -> Path:
    """Any DICOM object of `elements`; None leaves an element out."""
    ds = item(SOPClassUID=sop_class, SOPInstanceUID=pydicom.uid.generate_uid(), PatientName="CANARY^NAME", PatientID="CANARY-ID")
    ds.update({k: v for k, v in elements.items() if v is not None})
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.save_as(path, enforce_file_format=True)
    return Path(path)


def closed_contour(points_xy, z_mm: float, kind: str = "CLOSED_PLANAR") -> Dataset:
    """A contour of points (n, 2) at `z_mm`."""
    points = np.c_[np.asarray(points_xy, float), np.full(len(points_xy), z_mm)]
    return item(ContourGeometricType=kind, NumberOfContourPoints=len(points), ContourData=points.ravel().round(5).tolist())


def write_structure_set(path, structures, frame: str = "1.2.8") -> Path:
    """An RTSTRUCT of `structures`: (name, list of contours)."""
    rois = [item(ROINumber=i, ROIName=name, ReferencedFrameOfReferenceUID=frame) for i, (name, _) in enumerate(structures, 1)]
    contours = [item(ReferencedROINumber=i, ContourSequence=c) for i, (_, c) in enumerate(structures, 1)]
    return write_object(path, pydicom.uid.RTStructureSetStorage, StructureSetROISequence=rois, ROIContourSequence=contours)


def write_registration(path, *entries, target: str = "1.2.7") -> Path:
    """A REG of `entries`: (frame, its matrices in order of application, their type)."""
    made = [item(FrameOfReferenceUID=frame, MatrixRegistrationSequence=[item(MatrixSequence=[
        item(FrameOfReferenceTransformationMatrix=np.ravel(m).round(9).tolist(), FrameOfReferenceTransformationMatrixType=kind)
        for m in matrices])]) for frame, matrices, kind in entries]
    return write_object(path, pydicom.uid.SpatialRegistrationStorage, FrameOfReferenceUID=target, RegistrationSequence=made)


def grey(pixels) -> dict:
    """The elements of a picture of unsigned integers (rows, columns), or of frames of it."""
    bits = 8 * pixels.dtype.itemsize
    frames = {"NumberOfFrames": len(pixels)} if pixels.ndim == 3 else {}
    return frames | {"Rows": pixels.shape[-2], "Columns": pixels.shape[-1], "BitsAllocated": bits, "BitsStored": bits, "HighBit": bits - 1,
                     "PixelRepresentation": 0, "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2", "PixelData": pixels.tobytes()}
