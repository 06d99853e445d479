"""CT from DICOM: what made-up series, another reader, pydicom's own files, real folders and damaged files make of it."""
import os
import tracemalloc
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from made_up_dicom import POSITIONS, UID_ROOT, hu_at, write_ct, write_enhanced
from pydicom.data import get_testdata_file

from radrepro.core.dicom import open_dicom, pixel_values
from radrepro.core.dicom_ct import read_ct
from radrepro.core.dicom_layout import DicomError, DicomWarning, layout
from radrepro.core.dicom_series import find_series, series_table, short_uid
from radrepro.core.volume import AXES, check

PYDICOM_FILES = sorted(Path(get_testdata_file("CT_small.dcm", download=False)).parent.rglob("*.dcm"))


@pytest.fixture(autouse=True)
def _nothing_passes_unremarked():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def truth(v):
    return hu_at(*np.meshgrid(*(v[a].values for a in AXES), indexing="ij")[::-1])


def remarks(work):
    """What `work` returns, and what it warned of."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = work()
    said = [w for w in said if w.category is not ResourceWarning]  # of whatever the collector found meanwhile
    assert {w.category for w in said} <= {DicomWarning}
    return result, [str(w.message) for w in said]


def by_sitk(paths):
    """Points and HU of SimpleITK's reader, whatever its axes: (n, 3) in mm and (n,)."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(p) for p in paths])
    image = reader.Execute()
    index = np.stack(np.meshgrid(*(range(n) for n in image.GetSize()), indexing="ij"), -1).reshape(-1, 3)
    a = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    return np.array(image.GetOrigin()) + index @ a.T, sitk.GetArrayFromImage(image).transpose(2, 1, 0).ravel()


def look_up(v, points_mm):
    """Values of `v` at points (x, y, z), and by how many mm the nearest voxel centres miss them."""
    index, miss = [], 0.0
    for axis, p in zip("xyz", points_mm.T):
        c = v[axis].values
        k = np.clip(np.round((p - c[0]) / (c[-1] - c[0] or 1) * (len(c) - 1)).astype(int), 0, len(c) - 1)
        index.append(k)
        miss = max(miss, float(np.abs(c[k] - p).max()))
    return v.values[index[2], index[1], index[0]], miss


@pytest.mark.parametrize("position", POSITIONS)
def test_every_position_is_where_and_what_it_was(tmp_path, position):
    paths = write_ct(tmp_path, position)
    v = check(read_ct(tmp_path), units="HU")
    assert v.dtype == np.float32 and np.abs(v.values - truth(v)).max() <= 0.5
    step = np.abs(np.cross(*POSITIONS[position])) * 2.5 + np.abs(POSITIONS[position][1]) * 2.0 + np.abs(POSITIONS[position][0]) * 1.5
    for axis, s in zip("xyz", step):  # voxels are not square: an exchanged axis shows
        np.testing.assert_allclose(np.diff(v[axis]), s, atol=1e-6)
    points, values = by_sitk(paths)
    ours, miss_mm = look_up(v, points)
    assert miss_mm < 0.01 and np.abs(ours - values).max() <= 0.5


def test_neither_numbers_nor_names_decide(tmp_path):
    one = read_ct(write_ct(tmp_path / "a", number=lambda k: k))
    other = read_ct(write_ct(tmp_path / "b", number=lambda k: 50 - k)[::-1])
    assert one.identical(other) and one.values.std() > 10


BITS = [(16, 12, 11, 0), (16, 12, 11, 1), (16, 16, 15, 0), (16, 12, 15, 0), (16, 13, 14, 1), (32, 32, 31, 1)]  # allocated, stored, high, signed


@pytest.mark.parametrize("bits", BITS, ids=str)
def test_bits(tmp_path, bits):
    def change(k, ds):
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = bits
        if bits[3] and bits[1] < 16:
            ds.RescaleIntercept = 0
        if bits[0] == 32:
            ds.RescaleSlope, ds.RescaleIntercept = "0.001", "0.25"

    paths = write_ct(tmp_path, change=change)
    v, said = remarks(lambda: read_ct(tmp_path))
    assert np.abs(v.values - truth(v)).max() <= 0.5
    assert not said or ("High Bit" in said[0] and bits[2] + 1 != bits[1])
    if bits[2] + 1 == bits[1] and bits[0] == 16:
        ours, _ = look_up(v, by_sitk(paths)[0])
        assert np.abs(ours - by_sitk(paths)[1]).max() <= 0.5


def test_each_slice_by_its_own_rescale(tmp_path):
    def change(k, ds):
        ds.RescaleSlope, ds.RescaleIntercept = f"{0.5 + 0.25 * k:g}", str(-1000 - k)

    write_ct(tmp_path, change=change)
    v, said = remarks(lambda: read_ct(tmp_path))
    assert np.abs(v.values - truth(v)).max() <= 1.001 and any("Rescale Slope" in s for s in said)  # half of the coarsest step


def test_padding_monochrome1_and_lossy_are_remarked(tmp_path):
    def after(k, ds):
        stored = np.frombuffer(ds.PixelData, "<i2").copy()
        stored[:5] = -2000
        ds.PixelData = stored.tobytes()

    def change(k, ds):
        ds.add_new("PixelPaddingValue", "SS", -2000)
        ds.PhotometricInterpretation, ds.LossyImageCompression = "MONOCHROME1", "01"

    write_ct(tmp_path, change=change, after=after)
    v, said = remarks(lambda: read_ct(tmp_path))
    padded = v.values == -1024
    assert padded.sum() == 7 * 5 and np.abs(v.values - truth(v))[~padded].max() <= 0.5
    assert [sum(name in s for s in said) for name in ("Pixel Padding Value", "Photometric Interpretation", "Lossy")] == [1, 1, 1]


def compress(uid):
    return lambda k, ds: ds.compress(uid, generate_instance_uid=False)


@pytest.mark.parametrize("syntax", ["RLELossless", "JPEGLSLossless", "JPEG2000Lossless"])
@pytest.mark.parametrize("signed", [0, 1])
def test_compressed(tmp_path, syntax, signed):
    def change(k, ds):
        ds.PixelRepresentation, ds.BitsStored, ds.HighBit, ds.RescaleIntercept = signed, 12, 11, 0 if signed else -1024

    uid = getattr(pydicom.uid, syntax)
    paths = write_ct(tmp_path, change=change, after=compress(uid), shape=(3, 64, 48), spacing_mm=(0.5, 0.4))
    v = read_ct(tmp_path)
    assert layout(paths[0]).syntax == uid and np.abs(v.values - truth(v)).max() <= 0.5
    ours, _ = look_up(v, by_sitk(paths)[0])
    assert np.abs(ours - by_sitk(paths)[1]).max() <= 0.5


@pytest.mark.parametrize("signed", [0, 1])
def test_lossless_jpeg(tmp_path, signed):
    """The kind that scanners write; only SimpleITK (GDCM) can write it here."""
    def change(k, ds):
        ds.PixelRepresentation, ds.RescaleIntercept = signed, 0 if signed else -1024

    def after(k, ds):
        stored = np.frombuffer(ds.PixelData, "<i2" if signed else "<u2").reshape(1, ds.Rows, ds.Columns)
        writer = sitk.ImageFileWriter()
        writer.SetFileName(str(tmp_path / "jpeg.dcm"))
        writer.UseCompressionOn()
        writer.SetCompressor("JPEG")
        writer.Execute(sitk.GetImageFromArray(stored.copy()))
        packed = pydicom.dcmread(tmp_path / "jpeg.dcm")
        ds.PixelData, ds.file_meta.TransferSyntaxUID = packed.PixelData, packed.file_meta.TransferSyntaxUID
        ds["PixelData"].is_undefined_length = True

    paths = write_ct(tmp_path / "ct", change=change, after=after, shape=(3, 64, 48), spacing_mm=(0.5, 0.4))
    assert layout(paths[0]).syntax == pydicom.uid.JPEGLosslessSV1
    if find_spec("libjpeg") is None:  # GPL, so no dependency of ours
        with pytest.raises(DicomError, match="pylibjpeg-libjpeg"):
            read_ct(tmp_path / "ct")
        return
    v = read_ct(tmp_path / "ct")
    assert np.abs(v.values - truth(v)).max() <= 0.5


def test_tilted_and_oblique_stacks_are_resampled_with_a_remark(tmp_path):
    for name, degrees, step in (("tilt", 17.0, (0, 0, 2.0)), ("oblique", 12.0, None), ("other way", -25.0, (0, 0, 2.0))):
        a = np.deg2rad(degrees)
        leaning = (1, 0, 0), (0, np.cos(a), np.sin(a))
        write_ct(tmp_path / name, row_column=leaning, step=step, step_mm=2.0, shape=(40, 30, 20), corner=(-20, -15, -40))
        v, said = remarks(lambda name=name: read_ct(tmp_path / name))
        assert len(said) == 1 and f"{abs(degrees):.2f} degrees" in said[0]
        z, y, x = np.meshgrid(*(v[a].values for a in AXES), indexing="ij")
        linear = np.round(40 + 3 * x + 2 * y + 4 * z)  # but for the ball, linear interpolation makes no error
        from_ball = np.sqrt((x + 10) ** 2 + (y - 9) ** 2 + (z + 6) ** 2)
        inside = (v.values > -1000) & (from_ball > 12)
        assert inside.mean() > 0.4 and np.abs(v.values - linear)[inside].max() <= 1.01
        assert np.abs(v.values - truth(v))[(v.values > -1000) & (from_ball < 4)].max() <= 1.01


def test_a_hair_off_is_not_resampled(tmp_path):
    a = 1e-4
    write_ct(tmp_path, row_column=((np.cos(a), np.sin(a), 0), (-np.sin(a), np.cos(a), 0)), shape=(5, 300, 310))
    v, said = remarks(lambda: read_ct(tmp_path))
    assert len(said) == 1 and "rounded" in said[0] and v.shape == (5, 300, 310)


@pytest.mark.parametrize("off_mm, outcome", [(0.004, "silent"), (0.04, "remark"), (0.3, "refused")])
def test_uneven_places(tmp_path, off_mm, outcome):
    def change(k, ds):
        ds.ImagePositionPatient[2] += off_mm * (k == 3)

    write_ct(tmp_path, change=change)
    if outcome == "refused":
        with pytest.raises(DicomError, match=r"98.dcm.*\(0020,0032\).*mm|18.dcm.*\(0020,0032\).*mm"):
            read_ct(tmp_path)
        return
    v, said = remarks(lambda: read_ct(tmp_path))
    assert len(said) == (outcome == "remark") and np.abs(v.z.values - (-9.75 + 2.5 * np.arange(7))).max() < 1e-6


def test_missing_slices_say_where_and_how_far(tmp_path):
    write_ct(tmp_path, number=lambda k: k)
    (tmp_path / "3.dcm").unlink()
    with pytest.raises(DicomError, match=r"4\.dcm.*5\.00 mm between 2\.dcm.*usually 2\.50 mm"):
        read_ct(tmp_path)


def test_every_second_slice_missing_is_remarked(tmp_path):
    paths = write_ct(tmp_path, number=lambda k: k)
    v, said = remarks(lambda: read_ct(paths[::2]))
    assert v.shape[0] == 4 and len(said) == 1 and "Slice Thickness" in said[0] and "5.00 mm" in said[0]


def test_a_slice_beside_the_others_is_refused(tmp_path):
    def change(k, ds):
        ds.ImagePositionPatient[0] += 7.0 * (k == 2)

    write_ct(tmp_path, change=change)
    with pytest.raises(DicomError, match=r"13.dcm.*7.00 mm beside"):
        read_ct(tmp_path)


def test_duplicates(tmp_path):
    paths = write_ct(tmp_path, number=lambda k: k)
    once = read_ct(tmp_path)
    (tmp_path / "again.dcm").write_bytes(paths[2].read_bytes())
    v, said = remarks(lambda: read_ct(tmp_path))
    assert once.identical(v) and len(said) == 1 and "twice" in said[0]
    ds = pydicom.dcmread(paths[2])
    ds.PixelData = bytes(len(ds.PixelData))
    ds.save_as(tmp_path / "again.dcm")
    with pytest.raises(DicomError, match="one slice at a place"):
        read_ct(tmp_path)


def test_two_series_are_a_question(tmp_path):
    write_ct(tmp_path, series="1")
    write_ct(tmp_path / "inner", "FFS", series="2", shape=(5, 10, 12))
    with pytest.raises(DicomError, match="series=") as e:
        read_ct(tmp_path)
    uids = [UID_ROOT + f"2.{n}" for n in (1, 2)]
    assert all(short_uid(u) in str(e.value) and u not in str(e.value) for u in uids)
    for u, n in zip(uids, (7, 5)):
        assert read_ct(tmp_path, series=u).identical(read_ct(tmp_path, series=short_uid(u))) and read_ct(tmp_path, series=u).shape[0] == n
    with pytest.raises(DicomError, match="none of that name"):
        read_ct(tmp_path, series="no such")


def test_enhanced_and_its_refusals(tmp_path):
    write_ct(tmp_path / "slices", "FFP")
    (tmp_path / "e").mkdir()
    file = write_enhanced(tmp_path / "e" / "one.dcm", tmp_path / "slices")
    assert read_ct(file).identical(read_ct(tmp_path / "slices")) and read_ct(tmp_path / "e").identical(read_ct(file))
    ds = pydicom.dcmread(file)
    for syntax in (pydicom.uid.RLELossless, pydicom.uid.ImplicitVRLittleEndian):
        packed = pydicom.dcmread(file)
        if syntax.is_compressed:
            packed.compress(syntax, generate_instance_uid=False)
        else:
            packed.file_meta.TransferSyntaxUID = syntax
        packed.save_as(tmp_path / "packed.dcm", implicit_vr=syntax.is_implicit_VR, little_endian=True)
        assert read_ct(tmp_path / "packed.dcm").identical(read_ct(file)), syntax.name
    del ds.PerFrameFunctionalGroupsSequence[3].PlanePositionSequence
    ds.save_as(file)
    with pytest.raises(DicomError, match=r"one.dcm.*Plane Position Sequence"):
        read_ct(file)


@pytest.mark.parametrize("implicit, little", [(True, True), (False, False)])
def test_other_syntaxes(tmp_path, implicit, little):
    paths = write_ct(tmp_path)
    before = read_ct(tmp_path)
    for p in paths:
        ds = pydicom.dcmread(p)
        if not little:
            ds.PixelData = np.frombuffer(ds.PixelData, "<i2").astype(">i2").tobytes()
        ds.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian if implicit else pydicom.uid.ExplicitVRBigEndian
        pydicom.filewriter.dcmwrite(p, ds, implicit_vr=implicit, little_endian=little)
    assert read_ct(tmp_path).identical(before)


def test_what_is_no_slice_is_left_out_with_a_remark(tmp_path):
    paths = write_ct(tmp_path, number=lambda k: k)
    before = read_ct(tmp_path)
    scout = pydicom.dcmread(paths[0])
    scout.ImageType, scout.ImageOrientationPatient = ["ORIGINAL", "PRIMARY", "LOCALIZER"], [0, 1, 0, 0, 0, -1]
    scout.save_as(tmp_path / "scout.dcm")
    (tmp_path / "note.txt").write_text("note")
    v, said = remarks(lambda: read_ct(tmp_path))
    assert v.identical(before) and ["scout" in s for s in said] == [False, True] and "note.txt" in said[0]
    table = series_table(find_series(tmp_path), {UID_ROOT + "2.1": "planning CT"})
    assert table["used"].tolist() == [True, False, False] and not table.to_csv().count(UID_ROOT)
    report = pydicom.dcmread(paths[3])
    report.Modality = "MR"
    report.save_as(paths[3])
    with pytest.raises(DicomError, match="one kind of object"), warnings.catch_warnings():
        read_ct(tmp_path)


def test_links_devices_and_no_folder_are_refused(tmp_path):
    write_ct(tmp_path / "ct")
    (tmp_path / "secret").mkdir()
    for target in (tmp_path / "secret", Path("/etc/hostname")):
        link = tmp_path / "ct" / "link"
        link.symlink_to(target)
        with pytest.raises(DicomError, match="leads out"):
            read_ct(tmp_path / "ct")
        link.unlink()
    os.mkfifo(tmp_path / "ct" / "pipe.dcm")
    assert "pipe.dcm" in remarks(lambda: read_ct(tmp_path / "ct"))[1][0]
    for wrong in (tmp_path / "none", tmp_path / "ct" / "pipe.dcm", [tmp_path / "ct" / "pipe.dcm"], [], tmp_path / "secret"):
        with pytest.raises(DicomError, match="expected"):
            read_ct(wrong)


def test_no_slice_is_lost_without_a_word(tmp_path, monkeypatch):
    paths = write_ct(tmp_path / "a", number=lambda k: k)
    for name, content, lost in (("6.dcm", b"", True), ("6.dcm", b"\0" * 131, True), ("6.dcm", b"\0" * 5000, True), ("IM7", b"", False),
                                ("note.txt", b"", False), (".dcm", b"", False), ("6.dcm", b"x" * 5000, False)):
        (tmp_path / "a" / name).write_bytes(content)
        found = find_series(tmp_path)
        assert [str(e).split(":")[0] for e in found.damaged] == [name] * lost and len(found.ignored) == 1 - lost, name
        if lost:
            with pytest.raises(DicomError, match="6.dcm: expected a DICOM file, got an empty or cut-off one"):
                read_ct(tmp_path / "a")
        (tmp_path / "a" / name).unlink()
    for k, path in enumerate(paths[:6]):  # files named by their numbers or UIDs
        path.rename(tmp_path / "a" / f"1.2.{k}")
    (tmp_path / "a" / "1.2.9").touch()
    assert len(find_series(tmp_path).damaged) == 1
    (tmp_path / "a" / "1.2.9").unlink()

    def closed(name, real):
        def call(path, *args, **kwargs):
            if Path(path).name == name:
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, *args, **kwargs)
        return call

    with monkeypatch.context() as m:
        m.setattr("builtins.open", closed("1.2.5", open))
        [e] = find_series(tmp_path).damaged
    assert str(e) == "1.2.5: expected a file that can be read, got PermissionError: check who may read it, or copy it again"
    monkeypatch.setattr("os.scandir", closed("a", os.scandir))
    with pytest.raises(DicomError, match="a: expected a folder that can be read, got PermissionError"):
        find_series(tmp_path)


def test_messages_hold_no_patient(tmp_path):
    def change(k, ds):
        ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.StudyDescription = "Canary^Anna", "canary-7", "19010203", "of canary"
        ds.SeriesInstanceUID = "1.2.99.7777"

    paths = write_ct(tmp_path / "canary-folder", change=change)
    raw = paths[3].read_bytes()
    paths[3].write_bytes(raw.replace(b"\x28\x00\x53\x10DS\x04\x001.0 ", b"\x28\x00\x53\x10DS\x04\x00cana"))
    with pytest.raises(DicomError, match="Rescale Slope") as e:
        read_ct(tmp_path / "canary-folder")
    table = series_table(find_series(tmp_path / "canary-folder")).to_csv()
    for word in ("anary", "7777", "1901", str(tmp_path)):
        assert word not in str(e.value) + table


def refused_or_read(path):
    try:
        v, _ = remarks(lambda: read_ct(path))
        return check(v, units="HU")
    except DicomError as e:
        assert path.name in str(e) and "expected" in str(e) and "\n" not in str(e) and len(str(e)) < 500
        return None


def test_pydicoms_own_files():
    """Two are CTs; everything else, damaged and compressed in every way, is refused in one sentence."""
    read = {p.name: v for p in PYDICOM_FILES if (v := refused_or_read(p)) is not None}
    assert len(PYDICOM_FILES) > 70 and "CT_small.dcm" in read and not {"MR_small.dcm", "rtdose.dcm", "MR_truncated.dcm"} & set(read)
    for name, v in read.items():
        path = next(p for p in PYDICOM_FILES if p.name == name)
        points, values = by_sitk([path])
        ours, miss_mm = look_up(v, points)
        counted = (ours != -1024) | (values > -1024)  # SimpleITK keeps padding as it is
        assert np.abs(ours - values)[counted].max() <= 0.5 and counted.mean() > 0.5 and miss_mm < 0.01, name


def test_real_lung(data_dir):
    folder = data_dir / "dicom_lungdx_A0002"
    v, said = remarks(lambda: read_ct(folder))
    assert len(said) == 1 and "LICENSE.txt" in said[0] and v.shape == (30, 512, 512)
    points, values = by_sitk(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder)))
    ours, miss_mm = look_up(v, points)
    assert miss_mm < 0.01 and np.abs(ours - values).max() <= 0.5


def test_real_planning_slice(data_dir):
    v, said = remarks(lambda: read_ct(data_dir / "dicom_rt_dicompyler"))
    assert v.shape == (1, 512, 512) and any("single slice" in s for s in said)
    reference = sitk.GetArrayFromImage(sitk.ReadImage(str(data_dir / "dicom_rt_dicompyler" / "ct.0.dcm")))
    assert np.abs(v.values - reference).max() <= 0.5


def test_bombs_are_refused_before_memory_is_taken(tmp_path):
    """Rows and columns of 65535, in the element and in the compressed stream; a gigabyte of empty items; nesting without end."""
    def change(k, ds):
        ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 12, 11, 0

    path = write_ct(tmp_path, change=change, after=compress(pydicom.uid.JPEG2000Lossless), shape=(1, 64, 64))[0]
    raw = path.read_bytes()
    siz = raw.index(b"\xff\x4f\xff\x51") + 8
    rows, columns = layout(path).elements[0x00280010].start, layout(path).elements[0x00280011].start
    bombs = [bytearray(raw) for _ in range(3)]
    for b in bombs[:2]:
        b[rows : rows + 2] = b[columns : columns + 2] = b"\xff\xff"
    for b in bombs[1:]:
        b[siz : siz + 8] = (65535).to_bytes(4, "big") * 2
    head = raw[: layout(path).elements[0x00080008].start - 8]
    sequence = b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff"
    many = head + sequence + b"\xfe\xff\x00\xe0\0\0\0\0" * 100_000
    deep = head + (sequence + b"\xfe\xff\x00\xe0\xff\xff\xff\xff") * 5000
    for bomb in (*bombs, many, deep):
        path.write_bytes(bytes(bomb))
        tracemalloc.start()
        with pytest.raises(DicomError):
            read_ct(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2 * len(bomb) + 2**20


def test_opening_costs_twice_the_file_at_most(tmp_path):
    path = write_ct(tmp_path, shape=(1, 1500, 1500), spacing_mm=(0.1, 0.1))[0]
    size = path.stat().st_size
    for pixels, limit in ((True, 2 * size + 2**18), (False, 2**19)):
        tracemalloc.start()
        ds = open_dicom(path, pixels=pixels)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < limit and ("PixelData" in ds) == pixels


def test_a_type_without_a_length_is_not_read(tmp_path):
    """An element of unknown type and no length, where a number should be: four gigabytes, if one believed it."""
    path = write_ct(tmp_path, shape=(1, 10, 12))[0]
    raw, e = path.read_bytes(), layout(path).elements[0x00180050]
    item = b"\xfe\xff\x00\xe0\0\0\0\0\xfe\xff\xdd\xe0\0\0\0\0"
    path.write_bytes(raw[: e.start - 4] + b"UN\0\0\xff\xff\xff\xff" + item + raw[e.start + e.length :])
    assert layout(path).elements[0x00180050].length == 0xFFFFFFFF
    with pytest.raises(DicomError, match="Slice Thickness.*a length"):
        read_ct(path)


def test_pydicoms_files_with_bytes_changed(tmp_path):
    """Anywhere, also in compressed pixels: opened or refused, and nothing else."""
    rng, file, outcomes = np.random.default_rng(0), tmp_path / "changed.dcm", []
    small = [p.read_bytes() for p in PYDICOM_FILES if p.stat().st_size < 200_000]
    for _ in range(150):
        raw = bytearray(small[rng.integers(len(small))])
        for at in rng.integers(132, len(raw), rng.integers(1, 4)):
            raw[at] = rng.integers(256)
        file.write_bytes(raw)
        try:
            ds = open_dicom(file, pixels=True)
            outcomes.append("PixelData" in ds and pixel_values(ds, file=file).size > 0)
        except DicomError as e:
            assert "changed.dcm" in str(e)
            outcomes.append(None)
    assert outcomes.count(None) > 20 and outcomes.count(True) > 20
