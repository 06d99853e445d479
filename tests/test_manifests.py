"""Manifests of public data, fetching, verifying, unpacking, and lists of a clinic's own patients: no network, nothing trusted."""
import inspect
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
import types
import zipfile
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.data import get_testdata_file

from radrepro.data import manifests_fetch
from radrepro.data.manifests import load_manifest, manifest_names, manifests_dir, read_manifest
from radrepro.data.manifests_fetch import fetch, missing_series, notice
from radrepro.data.manifests_files import check_relative, read_checksums, read_head, safe_path, unpack, verify, write_manifest

SETS = manifest_names()
IN_IDC = [n for n in SETS if read_manifest(n).source == "idc"]
CT = Path(get_testdata_file("CT_small.dcm"))


# The sets that are described

@pytest.mark.parametrize("name", SETS)
def test_every_set_says_whose_it_is_and_what_it_is_for(name):
    m = read_manifest(name)
    for text in (m.title, m.doi, m.licence, m.licence_text, m.citation, m.paper, m.role, m.access):
        assert text.strip()
    assert m.doi.lower() in m.citation.lower() and m.paper in ("A", "B") and m.role.startswith(f"Paper {m.paper}, ")
    assert len(m.licence_text) > 60 and m.licence_text in notice(m) and m.citation in notice(m)
    if m.source == "idc":
        assert m.licence.startswith("CC BY") and m.licence_url.startswith("https://creativecommons.org/") and len(m.rows)
    if m.source == "tcia":
        assert "not in IDC" in m.access and not len(m.rows)
    assert m.version or "version" in m.unverified or "Sizes" in m.unverified  # what is left empty is said


def test_the_sets_of_both_papers_are_there():
    assert {"4d_lung", "lctsc", "ct_vs_pet_ventilation", "lung_pet_ct_dx", "openkbp", "dirlab_4dct", "dirqa_landmarks", "hnscc_3dct_rt",
            "head_neck_pet_ct"} <= set(SETS)


def test_4d_lung_holds_ten_phases_and_their_contours_of_one_study_of_each_patient():
    rows = read_manifest("4d_lung").rows
    assert rows.patient.nunique() == 20 and (rows.groupby("patient").study_uid.nunique() == 1).all()
    for _, one in rows.groupby(["patient", "modality"]):
        assert list(one.part) == [f"phase {p:02d} %" for p in range(0, 100, 10)]
    ct = rows[rows.modality == "CT"]
    assert (ct.groupby("patient").files.nunique() == 1).all()  # every phase has the same slices


# The index itself, as IDC ships it in a wheel

def index_rows(collections: list[str]) -> pd.DataFrame:
    import duckdb
    import idc_index_data as index

    where = ", ".join(f"'{c}'" for c in collections)
    return duckdb.sql(f"select * from '{index.IDC_INDEX_PARQUET_FILEPATH}' where collection_id in ({where})").df()


def test_every_row_of_an_idc_set_is_in_the_index():
    sets = [read_manifest(n) for n in IN_IDC]
    index = index_rows([m.collection for m in sets]).set_index("SeriesInstanceUID")
    for m in sets:
        assert set(m.rows.series_uid) <= set(index.index), m.name
        found = index.loc[m.rows.series_uid].reset_index()
        wanted = m.rows.reset_index(drop=True)
        for ours, theirs in (("patient", "PatientID"), ("study_uid", "StudyInstanceUID"), ("modality", "Modality"),
                             ("files", "instanceCount"), ("crdc_series_uuid", "crdc_series_uuid")):
            assert (wanted[ours] == found[theirs]).all(), (m.name, ours)
        assert (wanted.bytes == (found.series_size_MB * 1e6).round().astype(int)).all()
        assert set(found.collection_id) == {m.collection} and set(found.license_short_name) == {m.licence}
        assert set(found.source_DOI.str.lower()) == {m.doi.lower()}
        assert found.analysis_result_id.isna().all() and set(found.aws_bucket) == {"idc-open-data"}


def test_parts_are_what_the_index_describes():
    index = index_rows(["4d_lung", "ct_vs_pet_ventilation_imaging"]).set_index("SeriesInstanceUID")
    lung = read_manifest("4d_lung").rows
    for row in lung.itertuples():
        assert f"Gated, {int(row.part.split()[1])}.0%" in index.SeriesDescription[row.series_uid]
        assert index.ManufacturerModelName[row.series_uid] == "Pinnacle3"  # fan beam; the cone-beam series say Trilogy
    words = {"4DCT": "RespLow", "exhale breath hold": "Thorax Exp", "inhale breath hold": "Thorax Insp", "attenuation CT": "CT Lung"}
    for row in read_manifest("ct_vs_pet_ventilation").rows.itertuples():
        assert words[row.part] in index.SeriesDescription[row.series_uid]


def test_sets_by_tcia_are_not_in_the_index():
    names = [read_manifest(n).collection for n in SETS if read_manifest(n).source == "tcia"]
    assert len(names) == 4 and index_rows([n.lower().replace("-", "_").replace(" ", "_") for n in names]).empty
    assert len(index_rows(["lctsc"])) == 120  # the question is answered where there is an answer


def test_openkbp_rows_are_those_of_the_real_files(data_dir):
    rows = read_manifest("openkbp").rows.set_index("patient")
    seen = {p.parent.name: json.loads(p.read_text())["source"] for p in (data_dir / "hn_openkbp").glob("*/labels.json")}
    if not seen:
        pytest.skip("no OpenKBP patients in RADREPRO_DATA")
    for patient, source in seen.items():
        assert rows.git_blob_sha1[patient] == source["ct_csv_git_blob"] and rows.path[patient] == source["path"] + "/ct.csv"
        assert source["commit"] in read_manifest("openkbp").version


# Lists that somebody else wrote

@pytest.fixture
def copy(tmp_path):
    """A copy of a described set, to spoil."""
    for end in (".toml", ".csv"):
        shutil.copy(manifests_dir() / f"lctsc{end}", tmp_path / f"evil{end}")
    return tmp_path / "evil.toml"


def refused(path: Path, says: str, within_s: float = 3.0):
    start = time.monotonic()
    with pytest.raises(ValueError, match=says):
        load_manifest(path)
    assert time.monotonic() - start < within_s


@pytest.mark.parametrize("evil", ["../../etc", "/etc", "C:", "a/b", "..", "", "a\\b", "a\nb", "x" * 65])
def test_a_row_cannot_leave_its_folder(copy, evil):
    rows = pd.read_csv(copy.with_suffix(".csv"), dtype=str)
    rows.loc[3, "patient"] = evil
    rows.to_csv(copy.with_suffix(".csv"), index=False)
    refused(copy, "expected patient")


@pytest.mark.parametrize("column,evil", [
    ("series_uid", "1.2/../../x"), ("series_uid", "1." * 40 + "1"), ("series_uid", "1.02"), ("files", "0"), ("bytes", "9" * 30),
    ("bytes", "-5"), ("modality", "CT/.."), ("crdc_series_uuid", "*")])
def test_a_row_has_the_expected_form(copy, column, evil):
    rows = pd.read_csv(copy.with_suffix(".csv"), dtype=str)
    rows.loc[3, column] = evil
    rows.to_csv(copy.with_suffix(".csv"), index=False)
    refused(copy, f"expected {column}")


def test_a_series_twice_is_refused(copy):
    rows = pd.read_csv(copy.with_suffix(".csv"), dtype=str)
    pd.concat([rows, rows.head(1)]).to_csv(copy.with_suffix(".csv"), index=False)
    refused(copy, "each series once")


def test_manifest_bombs(copy):
    table, text = copy.with_suffix(".csv"), copy.read_text()
    header = table.read_text().split("\n")[0]
    os.truncate(table, 50_000_000_000)  # sparse: it takes no room, unless somebody reads it
    refused(copy, "at most 20,000,000 bytes")
    table.write_text(header + "\n" + "1,1,1,1,CT,a,1,1\n" * 60_000)
    refused(copy, "at most 50,000 rows")
    table.write_text("a," * 5_000_000 + "\n1")
    refused(copy, "expected the columns")
    table.write_text(header + "\n" + "a," * 5_000_000)
    refused(copy, "expected the columns")
    table.write_text(header + '\n"' + "x" * 1_000_000)
    refused(copy, "table of text")
    table.write_bytes(b"\xff\xfe\x00")
    refused(copy, "table of text")
    table.unlink()
    table.symlink_to("/dev/zero")
    refused(copy, "at most 20,000,000 bytes")
    for nested in ("x = " + "[" * 30_000, ".".join("a" * 20_000) + " = 1", "x = " + "{a=" * 15_000, "[" + ".".join("a" * 20_000) + "]"):
        copy.write_text(nested)
        refused(copy, "lines of key")
    copy.write_text(text + 'x = "\\u12"\n')
    refused(copy, "TOML in UTF-8")
    copy.write_text(text + "x = '" + "x" * 70_000 + "'")
    refused(copy, "64,000 bytes")
    copy.write_text(text + 'command = "rm"\n')
    refused(copy, "nothing else")
    copy.write_text(text.replace("10.7937/", "file:///"))
    refused(copy, "a DOI")
    copy.unlink()
    copy.symlink_to("/dev/zero")
    refused(copy, "64,000 bytes")
    with pytest.raises(ValueError, match="expected one of"):
        read_manifest("../data_manifests/lctsc")


# Paths

@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=40),
                 st.lists(st.sampled_from(["..", ".", "a", "/", "\\", "C:", "~", "con", "b.dcm", " ", "\0"]), max_size=6).map("/".join)))
def test_no_text_leads_out_of_the_folder(text):
    root = Path("/nowhere/inside")
    try:
        place = safe_path(root, text)
    except ValueError:
        return
    assert os.path.normpath(place).startswith("/nowhere/inside/") and place != root and ":" not in text and "\\" not in text


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x", "C:/x", "C:x", "\\\\host\\x", "a\\..\\x", "", ".", "a//b", "a/",
                                  "nul", "COM1.txt", "x.", "x ", "a\0b", "a\nb", "é" * 200, "a/" * 600 + "b"])
def test_paths_that_are_not_plain_are_refused(path):
    with pytest.raises(ValueError, match="expected a plain relative path"):
        check_relative(path)


def test_links_are_not_followed(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "out")
    with pytest.raises(ValueError, match="link"):
        safe_path(tmp_path / "in", "link/x")
    with pytest.raises(ValueError, match="link"):
        write_manifest(tmp_path / "in")
    assert safe_path(tmp_path / "in", "plain/x") == tmp_path / "in/plain/x"


# Archives

def pack(path: Path, members: dict[str, bytes], **how) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, **how) as z:
        for name, content in members.items():
            z.writestr(name, content)
    return path


def not_unpacked(archive: Path, says: str, **limits):
    with pytest.raises(ValueError, match=says):
        unpack(archive, archive.with_name("to"), **limits)
    left = sorted(p.name for p in archive.parent.iterdir())
    assert left == [archive.name], left  # nothing half unpacked, nothing outside


def test_unpack_gives_what_was_packed(tmp_path):
    content = {"ct/1.dcm": CT.read_bytes(), "ct/deep/2.dcm": b"", "note.txt": b"x" * 5}
    folder = unpack(pack(tmp_path / "a.zip", content), tmp_path / "to")
    assert {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == content
    with pytest.raises(FileExistsError):
        unpack(tmp_path / "a.zip", folder)


def test_unpack_leaves_the_folders_of_others_alone(tmp_path):
    (tmp_path / "to.partial").mkdir()
    (tmp_path / "to.partial" / "precious.txt").write_text("x")
    with pytest.raises(ValueError, match="plain relative path"):
        unpack(pack(tmp_path / "bad.zip", {"../up.dcm": b"x"}), tmp_path / "to")
    folder = unpack(pack(tmp_path / "a.zip", {"1.dcm": b"x"}), tmp_path / "deep" / "to")
    assert folder.stat().st_mode == (tmp_path / "deep").stat().st_mode and [p.name for p in (tmp_path / "deep").iterdir()] == ["to"]
    unpack(tmp_path / "a.zip", tmp_path / "to")
    assert (tmp_path / "to.partial" / "precious.txt").read_text() == "x" and not list(tmp_path.glob(".unpack-*"))


@pytest.mark.parametrize("name", ["/abs.dcm", "../up.dcm", "a/../../up.dcm", "C:/x.dcm", "a\\..\\x.dcm", "nul", "a//b"])
def test_members_with_paths_that_lead_out(tmp_path, name):
    not_unpacked(pack(tmp_path / "a.zip", {"good.dcm": b"x", name: b"x"}), "plain relative path")


def test_members_that_are_links_or_devices(tmp_path):
    for mode in (0o120777, 0o020666, 0o010666):  # link, device, pipe
        info = zipfile.ZipInfo("a")
        info.external_attr = mode << 16
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
            z.writestr(info, "/etc/passwd")
        not_unpacked(tmp_path / "a.zip", "link or device")


def test_bombs(tmp_path):
    archive = tmp_path / "a.zip"
    not_unpacked(pack(archive, {"zeros": bytes(30_000_000)}), "times the archive's")
    not_unpacked(pack(archive, {"a": os.urandom(9000), "b": os.urandom(9000)}), "at most", max_bytes=10_000)
    not_unpacked(pack(archive, {f"{n}": b"x" for n in range(60)}), "at most 50 files", max_files=50)
    not_unpacked(pack(archive, {f"{n:0100}": b"" for n in range(300)}), "directory of", max_files=50)  # before the directory is read
    with zipfile.ZipFile(archive, "w") as z:
        z.writestr("a", "1")
        with pytest.warns(UserWarning, match="Duplicate"):
            z.writestr("a", "2")
    not_unpacked(archive, "twice")
    not_unpacked(pack(archive, {"a": b"1", "A": b"2"}), "twice")  # one file on macOS and Windows
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_BZIP2) as z:
        z.writestr("a", "1")
    not_unpacked(archive, "packed otherwise")


def test_members_that_share_their_bytes(tmp_path):
    """Many entries of the directory that point at one member, as a `zip bomb without recursion` has them."""
    archive = pack(tmp_path / "a.zip", {"0" * 5: bytes(100_000)})
    with zipfile.ZipFile(archive, "a") as z:
        first = z.infolist()[0]
        for n in range(1, 2000):
            twin = zipfile.ZipInfo(f"{n:05}")
            for key in ("compress_type", "compress_size", "file_size", "CRC", "header_offset", "external_attr"):
                setattr(twin, key, getattr(first, key))
            z.filelist.append(twin)
        z._didModify = True
    assert archive.stat().st_size < 300_000
    not_unpacked(archive, "200,000,000 bytes")


def test_damaged_or_lying_archives(tmp_path):
    archive = tmp_path / "a.zip"
    pack(archive, {"a": b"voxels" * 2000})
    whole = archive.read_bytes()
    archive.write_bytes(whole[:-10])
    not_unpacked(archive, "zip archive")
    archive.write_bytes(b"no zip at all")
    not_unpacked(archive, "zip archive")
    spoiled = bytearray(whole)
    spoiled[40] ^= 255
    archive.write_bytes(spoiled)
    not_unpacked(archive, "zip archive")
    at = whole.rfind(b"PK\1\2")
    for size in (100, 100_000):  # a member that states less, or more, than it holds
        lying = bytearray(whole)
        lying[at + 24:at + 28] = size.to_bytes(4, "little")
        archive.write_bytes(lying)
        not_unpacked(archive, "zip archive|another number|times the archive's")
    flagged = bytearray(whole)
    flagged[at + 8] |= 1
    archive.write_bytes(flagged)
    not_unpacked(archive, "encrypted")


# Fetching, with files that are made up

def make_series(folder: Path, uid: str, files: int) -> None:
    """`files` small DICOM files of the series `uid`."""
    folder.mkdir(parents=True, exist_ok=True)
    ds = pydicom.dcmread(CT)
    ds.SeriesInstanceUID = uid
    for n in range(files):
        ds.InstanceNumber = n + 1
        ds.save_as(folder / f"{n}.dcm")


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Path:
    """Six series, as IDC would give them."""
    root = tmp_path_factory.mktemp("server")
    for row in read_manifest("lctsc").rows.head(6).itertuples():
        make_series(root / row.series_uid, row.series_uid, 3)
    return root


@pytest.fixture
def small(server):
    """LCTSC's first six rows, with the sizes of the made-up files."""
    rows = read_manifest("lctsc").rows.head(6)
    sizes = [sum(p.stat().st_size for p in (server / uid).iterdir()) for uid in rows.series_uid]
    return replace(read_manifest("lctsc"), rows=rows.assign(files=3, bytes=sizes))


class Network:
    """Copies made-up files and counts; `breaks_at`: which call breaks after one file."""

    def __init__(self, server: Path, breaks_at: int | None = None, error: type[BaseException] = ConnectionError):
        self.server, self.breaks_at, self.error, self.asked = server, breaks_at, error, []

    def __call__(self, uid: str, folder: Path) -> None:
        self.asked.append(uid)
        for place in sorted((self.server / uid).iterdir()):
            shutil.copy(place, folder)
            if len(self.asked) - 1 == self.breaks_at:
                raise self.error("the line went dead")


def test_fetch_brings_everything_and_says_whose_it_is(small, server, tmp_path, capsys):
    folder = fetch(small, tmp_path / "to", download=Network(server))
    assert small.licence in capsys.readouterr().out and small.citation in (folder / "CITATION.txt").read_text()
    assert small.licence_url in (folder / "LICENSE.txt").read_text() and small.licence_text in (folder / "LICENSE.txt").read_text()
    assert tomllib.loads((folder / "manifest.toml").read_text())["doi"] == small.doi
    listed = read_checksums(folder)
    assert len(listed) == 18 and verify(folder) == {} and set(listed.modality) == {"CT", "RTSTRUCT"}
    row = small.rows.iloc[0]
    place = folder / row.patient / f"{row.modality}_{row.series_uid}"
    for n in range(3):
        assert (place / f"{n}.dcm").read_bytes() == (server / row.series_uid / f"{n}.dcm").read_bytes()


@pytest.mark.parametrize("error", [ConnectionError, KeyboardInterrupt, OSError])
def test_a_broken_fetch_goes_on_where_it_stopped(small, server, tmp_path, error):
    broken = Network(server, breaks_at=3, error=error)
    with pytest.raises(error):
        fetch(small, tmp_path / "to", download=broken)
    assert len(broken.asked) == 4 and len(missing_series(small, tmp_path / "to")) == 3 and verify(tmp_path / "to") == {}
    again = Network(server)
    fetch(small, tmp_path / "to", download=again)
    assert again.asked == list(small.rows.series_uid[3:]) and verify(tmp_path / "to") == {} and len(read_checksums(tmp_path / "to")) == 18
    idle = Network(server)
    fetch(small, tmp_path / "to", download=idle)
    assert idle.asked == []


def test_a_killed_fetch_goes_on_too(small, server, tmp_path):
    code = f"""
import os, signal, shutil
from dataclasses import replace
from pathlib import Path
from radrepro.data.manifests import read_manifest
from radrepro.data.manifests_fetch import fetch
m = read_manifest("lctsc")
m = replace(m, rows=m.rows.head(6).assign(files=3, bytes={list(small.rows.bytes)}))
asked = []
def download(uid, folder):
    asked.append(uid)
    for place in sorted((Path({str(server)!r}) / uid).iterdir()):
        shutil.copy(place, folder)
        if len(asked) == 3: os.kill(os.getpid(), signal.SIGKILL)
fetch(m, Path({str(tmp_path / "to")!r}), download=download)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == -signal.SIGKILL
    again = Network(server)
    fetch(small, tmp_path / "to", download=again)
    assert again.asked == list(small.rows.series_uid[2:]) and verify(tmp_path / "to") == {}
    assert not [p for p in (tmp_path / "to").rglob(".*") if p.is_dir()]  # what had half arrived is gone


def test_a_flipped_byte_is_found_and_fetched_again(small, server, tmp_path):
    folder = fetch(small, tmp_path / "to", download=Network(server))
    victim = next((folder / small.rows.patient.iloc[2]).rglob("1.dcm"))
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    name = victim.relative_to(folder).as_posix()
    assert verify(folder) == {name: "changed"}
    again = Network(server)
    fetch(small, folder, download=again)
    assert again.asked == [name.split("/")[1].split("_")[1]] and verify(folder) == {}
    victim.unlink()
    (folder / "new.dcm").touch()
    assert verify(folder) == {name: "missing", "new.dcm": "not listed"}


def test_some_patients_or_series(small, server, tmp_path):
    patient, uid = small.rows.patient.iloc[-1], small.rows.series_uid.iloc[0]
    some = Network(server)
    fetch(small, tmp_path / "to", patients=[patient], download=some)
    assert some.asked == list(small.rows.series_uid[small.rows.patient == patient])
    fetch(small, tmp_path / "to", series=[uid], download=some)
    assert some.asked[-1] == uid and len(missing_series(small, tmp_path / "to")) == 6 - len(some.asked)
    with pytest.raises(ValueError, match="nobody"):
        fetch(small, tmp_path / "to", patients=["nobody"], download=some)


def test_a_series_that_is_not_as_described_is_refused(small, server, tmp_path):
    first = small.rows.series_uid.iloc[0]

    def other_series(uid, folder):  # right number and sizes, wrong UID: same length, last digit changed
        for place in (server / uid).iterdir():
            (folder / place.name).write_bytes(place.read_bytes().replace(uid.encode(), (uid[:-1] + str(9 - int(uid[-1]))).encode()))

    def more(uid, folder):
        shutil.copytree(server / uid, folder, dirs_exist_ok=True)
        (folder / "more.dcm").write_bytes(b"x")

    def link(uid, folder):
        (folder / "0.dcm").symlink_to("/etc/hosts")

    def subfolder(uid, folder):
        shutil.copytree(server / uid, folder / "deep")

    def nothing(uid, folder):
        pass

    def deflated(uid, folder):  # an archive of its own
        ds = pydicom.dcmread(CT)
        ds.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
        ds.save_as(folder / "0.dcm")

    for bad, says in ((other_series, "got another in"), (more, "got 4 of"), (link, "link or folder"), (subfolder, "link or folder")):
        with pytest.raises(ValueError, match=says):
            fetch(small, tmp_path / "to", series=[first], download=bad)
    for bad in (nothing, deflated):  # too little: as when the network goes, which IDC's client does not tell
        with pytest.raises(ConnectionError, match="Missing: 1 series"):
            fetch(small, tmp_path / "to", series=[first], download=bad)
    assert len(missing_series(small, tmp_path / "to")) == 6 and not list((tmp_path / "to").rglob("*.dcm"))


def test_folders_of_something_else_are_left_alone(small, server, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match="name another"):
        fetch(small, tmp_path / "mine", download=Network(server))
    fetch(small, tmp_path / "to", series=[small.rows.series_uid[0]], download=Network(server))
    with pytest.raises(ValueError, match="name another"):
        fetch("4d_lung", tmp_path / "to", download=Network(server))
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    with pytest.raises(ValueError, match="link"):
        fetch(small, tmp_path / "link", download=Network(server))
    (tmp_path / "to2").mkdir()
    (tmp_path / "to2" / small.rows.patient.iloc[0]).symlink_to(tmp_path / "mine")
    shutil.copy(tmp_path / "to" / "manifest.toml", tmp_path / "to2")
    with pytest.raises(ValueError, match="link"):
        fetch(small, tmp_path / "to2", download=Network(server))
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_without_room_nothing_begins(small, server, tmp_path):
    asked = Network(server)
    with pytest.raises(ValueError, match="GB free"):
        fetch(replace(small, rows=small.rows.assign(bytes=10**15)), tmp_path / "to", download=asked)
    assert asked.asked == []


@pytest.mark.parametrize("name", [n for n in SETS if n not in IN_IDC])
def test_sets_that_are_not_in_idc_are_refused_with_the_place_to_go(name, tmp_path, capsys):
    asked = Network(tmp_path)
    with pytest.raises(ValueError, match="https://doi.org/10") as told:
        fetch(name, tmp_path / "to", download=asked)
    assert "not in IDC" in str(told.value) and read_manifest(name).citation in capsys.readouterr().out
    assert asked.asked == [] and not (tmp_path / "to").exists()


def test_offline_it_says_what_is_missing_and_the_command(small, tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise socket.gaierror("no such host")

    class Never:
        def __init__(self):
            raise AssertionError("the client was started without a network")

    manifests_fetch._idc_client.cache_clear()
    monkeypatch.setattr(socket, "create_connection", unreachable)
    monkeypatch.setitem(sys.modules, "idc_index", types.ModuleType("idc_index"))
    monkeypatch.setitem(sys.modules, "idc_index.index", types.SimpleNamespace(IDCClient=Never))
    with pytest.raises(ConnectionError, match=r"Missing: 20 series, 0\.\d\d GB.*fetch\('4d_lung', 'to', patients=\['100_HM10395'\]\)"):
        fetch("4d_lung", tmp_path / "to", patients=["100_HM10395"])
    monkeypatch.setitem(sys.modules, "idc_index", None)
    monkeypatch.delitem(sys.modules, "idc_index.index")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'radrepro\[data\]'.*Missing: 400 series, 12\.09 GB"):
        fetch("4d_lung", tmp_path / "to")


def test_idc_is_asked_as_its_client_wants(small, server, tmp_path, monkeypatch):
    calls = []

    class Client:
        def download_from_selection(self, **how):
            calls.append(how)
            shutil.copytree(server / how["seriesInstanceUID"][0], how["downloadDir"], dirs_exist_ok=True)

    manifests_fetch._idc_client.cache_clear()
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: socket.socket())
    monkeypatch.setitem(sys.modules, "idc_index", types.ModuleType("idc_index"))
    monkeypatch.setitem(sys.modules, "idc_index.index", types.SimpleNamespace(IDCClient=Client))
    fetch(small, tmp_path / "to")
    monkeypatch.undo()
    manifests_fetch._idc_client.cache_clear()
    assert [c["seriesInstanceUID"] for c in calls] == [[u] for u in small.rows.series_uid] and verify(tmp_path / "to") == {}
    real = pytest.importorskip("idc_index.index", reason="the real client: pip install 'radrepro[data]'")
    inspect.signature(real.IDCClient.download_from_selection).bind(None, **calls[0])


def test_a_real_series_is_as_the_manifest_says(data_dir, tmp_path):
    """The 30 files that another mirror holds of a patient of Lung-PET-CT-Dx: same bytes, same UID."""
    row = read_manifest("lung_pet_ct_dx").rows.set_index("patient").loc["Lung_Dx-A0002"]
    source = data_dir / "dicom_lungdx_A0002"
    if not source.is_dir():
        pytest.skip("no dicom_lungdx_A0002 in RADREPRO_DATA")

    def download(uid, folder):
        for place in source.glob("*.dcm"):
            shutil.copy(place, folder)

    fetch("lung_pet_ct_dx", tmp_path / "to", series=[row.series_uid], download=download)
    assert len(read_checksums(tmp_path / "to")) == row.files == 30 and verify(tmp_path / "to") == {}


# A clinic's own folder

def clinic(root: Path, **header) -> Path:
    ds = pydicom.dcmread(CT)
    for key, value in ({"PatientName": "Canary^Yellow", "PatientID": "MRN-4711-X", "PatientBirthDate": "19510203",
                        "AccessionNumber": "ACC99812", "StudyDate": "20250304", "InstitutionName": "Saint Elsewhere"} | header).items():
        setattr(ds, key, value)
    (root / "s1").mkdir(parents=True)
    ds.save_as(root / "s1" / "1.dcm")
    shutil.copy(get_testdata_file("rtplan.dcm"), root / "plan.dcm")
    (root / "trace.csv").write_text("time_s,amplitude\n0,1\n")
    return root


def test_own_manifest_counts_and_holds_nothing_of_the_patient(tmp_path):
    folder = clinic(tmp_path / "own")
    own = tomllib.loads(write_manifest(folder).read_text())
    assert own["files"] == 3 and own["modalities"] == {"CT": 1, "RTPLAN": 1, "not DICOM": 1}
    assert own["bytes"] == sum((folder / path).stat().st_size for path in ("plan.dcm", "s1/1.dcm", "trace.csv"))
    assert sorted(read_checksums(folder).path) == ["plan.dcm", "s1/1.dcm", "trace.csv"] and verify(folder) == {}
    written = (folder / "manifest.toml").read_text() + (folder / "checksums.csv").read_text()
    ds = pydicom.dcmread(folder / "s1" / "1.dcm")
    for canary in ("Canary", "Yellow", "4711", "19510203", "ACC99812", "20250304", "Elsewhere", ds.SeriesInstanceUID, ds.SOPInstanceUID,
                   str(tmp_path)):
        assert canary not in written
    (folder / "trace.csv").write_text("time_s,amplitude\n0,2\n")
    assert verify(folder) == {"trace.csv": "changed"}
    write_manifest(folder)  # again, as it is now
    assert verify(folder) == {} and len(read_checksums(folder)) == 3


@pytest.mark.parametrize("name", ["Canary", "canary_yellow", "mrn-4711-x", "MRN4711X", "1951-02-03", "acc99812", "20250304 CT",
                                  "saint elsewhere", "uid"])
def test_paths_that_tell_are_refused_and_not_repeated(tmp_path, name):
    folder = clinic(tmp_path / "own")
    name = str(pydicom.dcmread(folder / "s1" / "1.dcm").SeriesInstanceUID) if name == "uid" else name
    (folder / "s1").rename(folder / name)
    with pytest.raises(ValueError, match="1 of 3") as told:
        write_manifest(folder)
    assert name not in str(told.value) and not (folder / "manifest.toml").exists() and not (folder / "checksums.csv").exists()


@pytest.mark.parametrize("name", ["Canary Yellow letter.pdf", "canary.csv", "s2/yel9.txt", "kim1.dcm", "k\u00edm 7.pdf", "Kim^A.png",
                                  "{sop}.png"])
def test_what_one_header_says_no_other_path_may_repeat(tmp_path, name):
    """A letter beside the images is no DICOM file, and tells who the patient is all the same."""
    folder = clinic(tmp_path / "own", PatientName="Canary^Yel^Kim")
    name = name.format(sop=pydicom.dcmread(folder / "s1" / "1.dcm").SOPInstanceUID)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("x")
    with pytest.raises(ValueError, match="1 of 4") as told:
        write_manifest(folder)
    assert Path(name).stem not in str(told.value) and not (folder / "checksums.csv").exists()


def test_a_short_name_within_another_word_tells_nothing(tmp_path):
    folder = clinic(tmp_path / "own", PatientName="Doe^Jon", PatientID="12")
    (folder / "doeskin jonquil 3120.txt").write_text("x")
    assert len(read_checksums(write_manifest(folder).parent)) == 4
    (folder / "12.txt").write_text("x")
    with pytest.raises(ValueError, match="1 of 5"):
        write_manifest(folder)


def test_what_cannot_be_listed_is_called_by_its_number(tmp_path):
    folder = clinic(tmp_path / "own")
    (folder / "zz Canary? Yellow.pdf").write_text("x")
    with pytest.raises(ValueError, match="^file 3: expected a plain relative path") as told:
        write_manifest(folder)
    (folder / "zz Canary? Yellow.pdf").rename(folder / "a link for Canary")
    (folder / "Canary link").symlink_to(folder / "plan.dcm")
    with pytest.raises(ValueError, match="symbolic link") as linked:
        write_manifest(folder)
    for error in (told.value, linked.value):
        assert "Canary" not in str(error) and error.__cause__ is None and error.__context__ is None


def test_a_pseudonym_may_stand_in_the_path(tmp_path):
    folder = clinic(tmp_path / "own", PatientID="RR-0001", PatientIdentityRemoved="YES")
    (folder / "s1").rename(folder / "RR-0001")
    assert "RR-0001/1.dcm" in list(read_checksums(write_manifest(folder).parent).path)
    with pytest.raises(ValueError, match="got 0 of 0"):
        (tmp_path / "empty").mkdir()
        write_manifest(tmp_path / "empty")


def test_crafted_lists_of_checksums(tmp_path):
    folder = clinic(tmp_path / "own")
    with pytest.raises(FileNotFoundError, match="checksums.csv"):
        verify(folder)
    write_manifest(folder)
    whole = (folder / "checksums.csv").read_text()
    for bad in (whole.replace("s1/1.dcm", "../1.dcm"), whole.replace("s1/1.dcm", "/etc/passwd"), whole + whole.split("\n")[1] + "\n",
                whole.replace("path,", "p,"), whole + "x", whole.replace("CT\n", "CT,more\n"), "", whole + "a,1,zz,CT\n"):
        (folder / "checksums.csv").write_text(bad)
        with pytest.raises(ValueError, match="expected"):
            verify(folder)
    os.truncate(folder / "checksums.csv", 10**12)
    with pytest.raises(ValueError, match="200,000,000"):
        verify(folder)


def test_heads_of_files_that_are_no_dicom(tmp_path):
    place = tmp_path / "x"
    whole = CT.read_bytes()
    assert read_head(CT).Modality == "CT" and "PixelData" not in read_head(CT)
    for bad in (b"", b"\0" * 128, b"\0" * 128 + b"DICM", whole[:200], b"\0" * 128 + b"DICM" + b"\xff" * 3000):
        place.write_bytes(bad)
        head = read_head(place)
        assert head is None or "SeriesInstanceUID" not in head
    place.write_bytes(whole[:128] + b"DICM" + bytes.fromhex("08000500") + b"UT\0\0\xf0\xff\xff\xff" + b"x" * 100)  # states 4 GB
    assert read_head(place) is None or "SeriesInstanceUID" not in read_head(place)
