"""Damaged DICOM: 2,000 mutants, each refused in a sentence or read right; no crash, no hang, no memory beyond the files'."""
import os
import time
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
import xarray as xr
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from made_up_dicom import write_ct, write_enhanced
from pydicom.tag import Tag
from test_dicom_ct import compress, remarks
from test_dicom_write import write_everything

from radrepro.core.dicom_ct import read_ct
from radrepro.core.dicom_kv import read_kv
from radrepro.core.dicom_layout import DicomError, layout
from radrepro.core.dicom_rt import frame_id, read_dose, read_plan, read_registration
from radrepro.core.dicom_structures import read_structures
from radrepro.core.volume import AXES
from radrepro.data.study import read_study, study_table
from radrepro.data.traces_dicom import read_waveform

# RADREPRO_MUTANTS=20000 pytest tests/test_dicom_mutants.py -s  for more of them
MUTANTS = int(os.environ.get("RADREPRO_MUTANTS", "2000"))
VRS = [b"US", b"SS", b"DS", b"IS", b"LO", b"SQ", b"UN", b"OW", b"FD", b"UI", b"??", b"\0\0", b"OB", b"UL"]
NUMBERS = ["0", "-1", "1", "1e9", "nan", "inf", "1e-9", "", "65535", "3.7", "2.5", "1_0", "0x10", "-13.25"]
STRUCTURE = ["cut off", "tag removed", "wrong type", "wrong length", "twice"]  # what a reader can see to be wrong


@pytest.fixture(autouse=True)
def _nothing_passes_unremarked():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def mutants(share: float):
    """Decorator of a function of hypothesis' data: as many different mutants in every run."""
    return lambda run: settings(max_examples=int(share * MUTANTS), deadline=None, database=None, derandomize=True, phases=[Phase.generate],
                                suppress_health_check=list(HealthCheck))(given(st.data())(run))


def mutate(path: Path, how: str, draw) -> bytes:
    """The bytes of a file after one change to its structure or its header; pixels are never touched."""
    raw, found = bytearray(path.read_bytes()), layout(path)
    tag = draw(st.sampled_from(sorted(found.elements)))
    e = found.elements[tag]
    explicit = not found.syntax.is_implicit_VR
    head = 12 if explicit and e.vr in ("OB", "OW", "SQ", "UN", "UT") else 8
    length = e.length if e.length != 0xFFFFFFFF else 0
    if how == "cut off":
        return bytes(raw[: draw(st.integers(0, len(raw) - 1))])
    if how == "tag removed":
        end = e.start + length if e.length != 0xFFFFFFFF else len(raw)
        return bytes(raw[: e.start - head] + raw[end:])
    if how == "wrong type":
        if explicit:
            raw[e.start - head + 4 : e.start - head + 6] = draw(st.sampled_from(VRS))
        else:
            raw[e.start - 8 : e.start - 4] = draw(st.binary(min_size=4, max_size=4))
    elif how == "wrong length":
        n = draw(st.sampled_from([0, 1, 2, 3, length + 1, length + 2, max(length - 2, 0), 0xFFFE, 2**31, 0xFFFFFFFE, 0xFFFFFFFF]))
        size = 4 if head == 12 or not explicit else 2
        raw[e.start - size : e.start] = (n % 256**size).to_bytes(size, "little")
    elif how == "another number":
        names = ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept", "Rows", "Columns",
                 "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "NumberOfFrames", "SamplesPerPixel", "SliceThickness", "PixelPaddingValue"]
        numbers = [found.elements[t] for t in map(pydicom.datadict.tag_for_keyword, names) if t in found.elements]
        e = draw(st.sampled_from(numbers))
        if e.vr in ("US", "SS"):
            raw[e.start : e.start + 2] = draw(st.sampled_from([0, 1, 2, 7, 8, 10, 12, 13, 16, 24, 32, 65535])).to_bytes(2, "little")
        else:
            parts = bytes(raw[e.start : e.start + e.length]).split(b"\\")
            parts[draw(st.integers(0, len(parts) - 1))] = draw(st.sampled_from(NUMBERS)).encode()
            value = b"\\".join(parts)
            value += b" " * (len(value) % 2)
            size = 2 if explicit else 4
            raw[e.start - size : e.start + e.length] = len(value).to_bytes(size, "little") + value
    elif how == "a byte":
        limit = found.elements[0x7FE00010].start if 0x7FE00010 in found.elements else len(raw)
        for _ in range(draw(st.integers(1, 3))):
            raw[draw(st.integers(132, limit - 1))] = draw(st.integers(0, 255))
    elif how == "twice":
        raw[e.start - head : e.start - head] = raw[e.start - head : e.start + length]
    return bytes(raw)


@pytest.fixture(scope="session")
def series_to_mutate(tmp_path_factory):
    """Folders of a plain, an implicit, a compressed and an enhanced CT, each with its volume."""
    root = tmp_path_factory.mktemp("mutants")

    def change(k, ds):
        ds.BitsStored, ds.HighBit, ds.PixelRepresentation, ds.PixelPaddingValue = 12, 11, 0, 4095
        ds["PixelPaddingValue"].VR = "US"
        ds.ReferencedImageSequence = [pydicom.Dataset() for _ in range(2)]
        ds.ReferencedImageSequence[0].ReferencedSOPInstanceUID = "1.2.3"
        ds.add_new(Tag(0x00090010), "LO", "MADE UP")
        ds.add_new(Tag(0x00091001), "UN", b"abcd" * 5)

    paths = write_ct(root / "plain", change=change, number=lambda k: k)
    write_ct(root / "packed", change=change, number=lambda k: k, after=compress(pydicom.uid.RLELossless))
    for kind in ("implicit", "enhanced"):
        (root / kind).mkdir()
    for p in paths:
        ds = pydicom.dcmread(p)
        ds.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
        ds.save_as(root / "implicit" / p.name, implicit_vr=True, little_endian=True)
    write_enhanced(root / "enhanced" / "0.dcm", root / "plain")
    return {folder: read_ct(folder) for folder in sorted(root.iterdir())}


def test_mutants_of_cts(series_to_mutate):
    """A Volume or a DicomError; a Volume without a remark is the one that was written."""
    counts, longest, wrong = {"read": 0, "read with a remark": 0, "refused": 0}, [0.0, ""], []

    @mutants(0.5)
    def run(data):
        folder = data.draw(st.sampled_from(sorted(series_to_mutate)))
        path = data.draw(st.sampled_from(sorted(folder.iterdir())))
        hows = [*STRUCTURE, "another number"]
        # a digit of a file that is a series of its own has no second witness
        how = data.draw(st.sampled_from(hows + ["a byte"] * (folder.name != "enhanced")))
        whole, original = path.read_bytes(), series_to_mutate[folder]
        path.write_bytes(mutate(path, how, data.draw))
        limit = 2 * sum(p.stat().st_size for p in folder.iterdir()) + 2 * original.nbytes + 2**20  # a MB for Python's own objects
        start = time.perf_counter()
        tracemalloc.start()
        try:
            v, said = remarks(lambda: read_ct(folder))
            outcome = "read with a remark" if said else "read"
            assert all(".dcm: " in s for s in said)
            same = v.shape == original.shape and np.array_equal(v.values, original.values)
            same = same and max(np.abs(v[a].values - original[a].values).max() for a in AXES) < 0.02
            if not said and not same:
                wrong.append((folder.name, path.name, how))
        except DicomError as e:
            outcome = "refused"
            assert "expected" in str(e)
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            path.write_bytes(whole)
        took = time.perf_counter() - start
        counts[outcome] += 1
        if took > longest[0]:
            longest[:] = took, f"{folder.name} {how}"
        assert took < 5 and peak < limit, (folder.name, how, took, peak)

    run()
    print(f"{sum(counts.values())} mutants: {counts}, longest {longest[0]:.3f} s ({longest[1]})")
    assert not wrong, wrong
    assert counts["refused"] > MUTANTS / 8 and counts["read"] > MUTANTS / 100


def same(a, b) -> bool:
    """Whether two results of a reader say the same; what is None, empty or absent in `a` says nothing."""
    if isinstance(a, xr.DataArray):
        return a.shape == b.shape and np.array_equal(a.values, b.values) and all(np.allclose(a[d], b[d], atol=1e-6) for d in a.dims)
    if isinstance(a, dict):
        return all(k in b and same(v, b[k]) for k, v in a.items())
    if isinstance(a, tuple) and hasattr(a, "_fields"):
        return all(same(x, y) for x, y in zip(a, b))
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    return a is None or a in ("", ()) or len(a) == len(b) and all(map(same, a, b)) if isinstance(a, (tuple, list)) else a in (None, "") or a == b


def readers_of(w, put):
    """By the kind of object its reader, for the files of `write_everything`."""
    return {"masks": lambda f: read_structures(f, put["ct"], frame=frame_id(w["ct"].frame_uid)), "plan": read_plan, "dose": read_dose,
            "kv": lambda f: read_kv(f, position="HFS"), "matrix": read_registration, "trace": read_waveform}


def test_mutants_of_rt_objects(tmp_path):
    """What a reader returns without a further remark is what was written, or less of it; a changed byte may be another true value."""
    w, put = write_everything(tmp_path)
    read = readers_of(w, put)
    original = {name: remarks(lambda f=f, name=name: f(w[name].files[0])) for name, f in read.items()}  # with its remarks
    counts, longest, wrong = {}, [0.0, ""], []

    @mutants(0.5)
    def run(data):
        name, how = data.draw(st.sampled_from(sorted(read))), data.draw(st.sampled_from([*STRUCTURE, "a byte"]))
        path = w[name].files[0]
        whole = path.read_bytes()
        path.write_bytes(mutate(path, how, data.draw))
        start, outcome = time.perf_counter(), "refused"
        try:
            found, said = remarks(lambda: read[name](path))
            value, usual = original[name]
            outcome = "read" if said == usual else "read with a remark"
            if how != "a byte" and said == usual and not same(found, value):
                wrong.append((name, how))
        except DicomError as e:
            assert "expected" in str(e) and path.name in str(e), (name, how, str(e))
        finally:
            path.write_bytes(whole)
        took = time.perf_counter() - start
        counts[name, outcome] = counts.get((name, outcome), 0) + 1
        longest[:] = max(longest, [took, f"{name} {how}"])

    run()
    print(f"{sum(counts.values())} mutants: {counts}, longest {longest[0]:.3f} s ({longest[1]})")
    assert not wrong and longest[0] < 5, (wrong, longest)
    assert all(counts.get((name, "refused"), 0) > MUTANTS / 100 and counts.get((name, "read"), 0) for name in read)


def test_no_element_can_be_lost_in_silence(tmp_path):
    """Each element of each RT object left out in turn: refused, remarked, without meaning, or the less that is read says so."""
    w, put = write_everything(tmp_path)
    for name, read in readers_of(w, put).items():
        path = w[name].files[0]
        whole, (value, usual) = path.read_bytes(), remarks(lambda read=read, path=path: read(path))
        outcomes = {"read": 0, "refused": 0}
        for tag in layout(path).elements:
            ds = pydicom.dcmread(path)
            del ds[tag]
            ds.save_as(path)
            try:
                found, said = remarks(lambda read=read, path=path: read(path))
                assert said != usual or same(found, value), f"{name}: {pydicom.datadict.keyword_for_tag(tag)}"
                outcomes["read"] += 1
            except DicomError as e:
                assert "expected" in str(e)
                outcomes["refused"] += 1
            path.write_bytes(whole)
        assert min(outcomes.values()) > 0, (name, outcomes)


def test_mutants_in_a_study(tmp_path):
    """One damaged object does not cost the others: a study is read, or its planning CT is refused in a sentence; no file is named."""
    w, _ = write_everything(tmp_path)
    files = [f for name, of in w.items() if not name.startswith("phase") for f in of.files]
    for name in w:
        if name.startswith("phase"):
            for f in w[name].files:
                f.unlink()
    found = {"read": 0, "refused": 0}

    @mutants(0.05)
    def run(data):
        path = data.draw(st.sampled_from(files))
        whole = path.read_bytes()
        path.write_bytes(mutate(path, data.draw(st.sampled_from([*STRUCTURE, "a byte"])), data.draw))
        start = time.perf_counter()
        try:
            table = study_table(read_study(tmp_path, planning=None))
            said = " ".join(table.why)
            assert set(table.status) <= {"used", "ignored", "refused"}
            found["read"] += 1
        except DicomError as e:
            said = str(e)
            assert "expected" in said
            found["refused"] += 1
        finally:
            path.write_bytes(whole)
        assert path.name not in said and time.perf_counter() - start < 5

    run()
    assert found["read"] > found["refused"] > 0
