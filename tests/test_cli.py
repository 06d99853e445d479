"""The command line: grammar, exit codes, JSON, errors as sentences, and that nothing of it names a patient."""
import ast
import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
import warnings
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
import torch
from made_up_canaries import Canaries

from radrepro.cli import data, pages
from radrepro.cli.answers import EXIT_CODES
from radrepro.cli.grammar import make_parser
from radrepro.cli.main import main
from radrepro.cli.patient import StudyCase, in_planning_frame
from radrepro.cli.series import join_study
from radrepro.data.export import GANTRY_DEG, export_headneck
from radrepro.data.headneck import phantom_patient
from radrepro.data.manifests_files import write_manifest
from radrepro.data.study import Study, StudyCT
from radrepro.dose.protons import PlanSize

ROOT = Path(__file__).parents[1]
COMMANDS = make_parser()._subparsers._group_actions[0].choices
SAME_IN_A_STUDY = ("PatientBirthDate", "StudyDate", "StudyTime", "StudyDescription", "ReferringPhysicianName")
SECRETS = ("Canary", "CANARY", "http://canary", "1.2.999.7777777", "19310417", "20010108", "20010115", "2001-01-08")


def called(*argv) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(a) for a in argv])
    return code, out.getvalue(), err.getvalue()


def entry_point() -> EntryPoint:
    [text] = re.findall(r'"console_scripts": \["(\w+=[\w.:]+)"\]', (ROOT / "setup.py").read_text())
    return EntryPoint(*text.split("="), group="console_scripts")


def test_entry_point():
    """What the installed script does, in a process of its own."""
    found = entry_point()
    assert found.name == "radrepro" and found.load() is main
    code = f"import sys; from {found.module} import {found.attr}; sys.exit({found.attr}())"
    done = subprocess.run([sys.executable, "-c", code, "verify", "nowhere"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and not done.stdout and len(done.stderr.splitlines()) == 1 and done.stderr.startswith("radrepro verify: expected")


def test_the_commands_of_the_issue_are_there():
    assert set(COMMANDS) == {"inspect", "export", "ingest", "fit", "synthesise", "imagine", "fetch", "verify", "tables", "figures", "report"}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_that_can_be_typed(command):
    code, out, err = called(command, "--help")
    assert code == 0 and not err and max(map(len, out.splitlines())) <= 110
    example = re.search(r"example:\n  radrepro (.*)", out)[1].split()
    assert make_parser().parse_args(example).command == command


def test_help_documents_the_exit_codes():
    code, out, _ = called("--help")
    assert code == 0 and all(f"  {c:<4}" in out for c in EXIT_CODES)


@pytest.mark.parametrize("argv", [[], ["nothing"], ["fit"], ["fit", "study", "--patient", "1"], ["fit", "--patient", "-1"], ["tables", "--preset", "laptob"],
                                  ["inspect"], ["fetch", "lctsc"], ["report", "--patient", "1", "--device", "gpu"], ["tables", "--seeds", "0"]])
def test_a_wrong_command_line_is_2(argv):
    code, out, err = called(*argv)
    assert code == 2 and not out and "usage: radrepro" in err


def test_json_is_alone_on_stdout(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    write_manifest(tmp_path)
    code, out, err = called("verify", tmp_path, "--json")
    assert code == 0 and json.loads(out) == {"command": "verify", "ok": True, "exit_code": 0, "files": 1, "missing": [], "changed": [], "not_listed": 0}
    assert "as they were written" in err
    (tmp_path / "a.txt").unlink()
    code, out, err = called("verify", tmp_path, "--json")
    assert code == 1 and json.loads(out)["missing"] == ["a.txt"] and "missing: a.txt" in err
    code, out, err = called("verify", tmp_path)
    assert code == 1 and out == "missing: a.txt\n" and err == "radrepro verify: expected 1 files as they were written, got 1 that are not: fetch or copy them again\n"


def test_what_the_library_prints_goes_to_stderr(monkeypatch, tmp_path):
    from radrepro.data import manifests_fetch

    monkeypatch.setattr(manifests_fetch, "fetch", lambda manifest, folder, **which: print(manifests_fetch.notice(manifest)))
    monkeypatch.setattr(manifests_fetch, "missing_series", lambda manifest, folder, **which: manifest.rows[:1])
    code, out, err = called("fetch", "lctsc", tmp_path, "--json")
    assert code == 1 and json.loads(out)["missing_series"] == 1 and "Licence:" in err and "Cite:" in err


def test_a_missing_package_is_a_sentence(monkeypatch, tmp_path):
    from radrepro.data import manifests_fetch

    manifests_fetch._idc_client.cache_clear()
    for name in ("idc_index", "idc_index.index"):
        monkeypatch.setitem(sys.modules, name, None)
    code, out, err = called("fetch", "lctsc", tmp_path / "new", "--patients", "LCTSC-Test-S1-101")
    assert code == 1 and not out and "expected the package idc-index" in err and "Traceback" not in err


@pytest.mark.parametrize(("error", "code"), [(KeyError("Canary"), 70), (TypeError("Canary"), 70), (KeyboardInterrupt(), 130),
                                             (ValueError("could not convert string to float: 'Canary'"), 1), (MemoryError(), 1),
                                             (PermissionError(13, "Permission denied", "Canary.dcm"), 1)])
def test_every_error_has_its_code_and_quotes_nothing(monkeypatch, error, code):
    def fail(args, report):
        raise error

    monkeypatch.setattr(data, "verify", fail)
    for more in ([], ["--json"]):
        got, out, err = called("verify", "folder", *more)
        assert got == code and "Traceback" not in err and "Canary" not in out + err and len(err.splitlines()) == 1
    assert json.loads(out)["exit_code"] == code
    if code != 130:
        assert "Traceback" in called("verify", "folder", "--debug")[2]


@pytest.mark.parametrize("name", ["tables", "figures"])
def test_notebooks_get_what_the_makefile_gives(monkeypatch, tmp_path, name):
    given = {}
    monkeypatch.setattr(pages, "run_notebook", lambda path, out, parameters: given.update(path=path, out=out, **parameters) or out / f"{name}.html")
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "headline.txt").write_text("a claim: holds\n")
    (tmp_path / "figures").mkdir()
    code, out, _ = called(name, "--preset", "quick", "--out-dir", tmp_path, "--seeds", "2")
    assert code == 0 and name in out and given.pop("path") == ROOT / "nbs" / f"{name}.ipynb" and given.pop("out") == tmp_path
    cells = json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text())["cells"]
    [defaults] = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    known = {t.id for n in ast.parse("".join(defaults["source"])).body for t in n.targets}
    assert set(given) == known - {"data_dir"} and given["seeds"] == 2 and given["out_dir"] == str(tmp_path)


def test_notebooks_travel_in_the_package(monkeypatch, tmp_path):
    """As a wheel has them: inside of the package, with no checkout around it."""
    (tmp_path / "radrepro" / "notebooks").mkdir(parents=True)
    monkeypatch.setattr(pages.radrepro, "__file__", str(tmp_path / "radrepro" / "__init__.py"))
    with pytest.raises(FileNotFoundError, match="reinstall"):
        pages.find_notebook("tables")
    (tmp_path / "radrepro" / "notebooks" / "tables.ipynb").write_text("{}")
    assert pages.find_notebook("tables").parent.name == "notebooks"
    assert '"radrepro.notebooks": ["tables.ipynb", "figures.ipynb"]' in (ROOT / "setup.py").read_text()


def when(ds: pydicom.Dataset) -> list[pydicom.DataElement]:
    return [e for e in ds if e.VR in ("DA", "TM", "DT") and e.tag.group == 8]


@pytest.fixture(scope="module")
def clinic(tmp_path_factory) -> Path:
    """A study as a clinic has it: canaries wherever a header has room, in the names of files and folders, and a damaged file among them."""
    home, canaries = tmp_path_factory.mktemp("clinic") / "Canary clinic", Canaries()
    home.mkdir()
    parts = export_headneck(phantom_patient(1, voxel_mm=8), home / "Canary_Jane")
    for part in parts.values():
        for i, path in enumerate(part.files):
            ds = pydicom.dcmread(path)
            days = when(ds)  # by them a kV pair finds its CT
            canaries.plant(ds, top=i == 0)
            for tag in [*(e.tag for e in when(ds)), 0x00041220]:  # the last would make it a DICOMDIR
                ds.pop(tag, None)
            for e in days:
                ds.add(e)
            ds.PatientName, ds.PatientID, ds.PatientBirthDate = "Canary^Name", "CANARYID77", "19310417"
            ds.ReferringPhysicianName, ds.InstitutionName, ds.StudyDescription = "Canary^Doctor", "Canary Hospital", "Canary plan"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ds.save_as(path.with_name(f"Canary {path.name}"))
            path.unlink()
    (home / "Canary_Jane" / "Canary damaged.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\xff" * 64)
    (home / "Canary_Jane" / "Canary.csv").write_text("Canary,1931\n1,2\n")
    return home


def uids(home: Path) -> list[str]:
    found = set()
    for path in (home / "Canary_Jane").rglob("Canary *.dcm"):
        if "damaged" not in path.name:
            ds = pydicom.dcmread(path, stop_before_pixels=True)
            found |= {ds.get(k) for k in ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID")} - {None}
    return sorted(found)


def test_a_whole_run_names_nobody(clinic):
    """From the folder to the tables and the page: what is printed and all that is left behind, searched for every canary."""
    room, study = clinic.parent, clinic / "Canary_Jane"
    copy, run = room / "copy", room / "run"
    sizes = ("--preset", "quick", "--out-dir", run)
    steps = [(0, "tables", "--cohort", "clinical", "--data-dir", clinic, *sizes), (0, "inspect", study), (1, "inspect", clinic / "Canary missing"),
             (1, "synthesise", study, room / "refused", *sizes), (1, "imagine", study, room / "refused", "--weights", clinic),
             (1, "synthesise", study, study / "refused", *sizes, "--identified"),
             (1, "ingest", study, copy, "--secret-file", room / "secret.txt"),  # 1: the damaged file and the table are left out
             (0, "fit", study, *sizes), (0, "report", study, *sizes),
             (0, "synthesise", study, room / "sct", *sizes, "--identified"), (1, "synthesise", copy, room / "sct", *sizes)]
    (room / "secret.txt").write_text("a secret for tests 2")
    said = ""
    for code, *argv in steps:
        got, out, err = called(*argv, "--json")
        assert got == code == json.loads(out)["exit_code"], f"{argv[0]}: exit code {got}, {err}"
        assert code == 0 or argv[0] == "ingest" or len(err.splitlines()) <= 2
        said += out + err
    secrets = [*SECRETS, *uids(clinic)]
    assert not [s for s in secrets if s in said]
    left = [p for folder in (copy, run) for p in folder.rglob("*") if p.is_file()]
    telling = [p for p in left if any(s.encode() in p.read_bytes() or s in str(p.relative_to(room)) for s in secrets)]
    assert len(left) > 200 and not telling and not (room / "refused").exists()
    rows = pd.concat([pd.read_csv(p) for p in sorted((run / "tables").glob("*_table*.csv"))])
    assert set(rows.paper) == {"A"} and {"fused", "primary"} <= set(rows.model)  # a clinic of heads: Paper B is left out
    assert set(rows[~rows.detail.str.contains("residual sd")].cohort) == {"clinical"}
    page = (run / "report.html").read_text()
    assert "Patient 1" in page and not re.search(r"<(script|link|img|iframe)[^>]*(src|href)=", page)
    # on purpose alone: the series joins the patient's own study
    made = pydicom.dcmread(next((room / "sct").rglob("*.dcm")))
    assert made.PatientID == "CANARYID77" and made.StudyInstanceUID in secrets
    theirs = pydicom.dcmread(min((study / "planning").glob("*.dcm")))
    assert theirs.StudyDescription == "Canary plan" and all(made[k].value == theirs[k].value for k in SAME_IN_A_STUDY)
    if shutil.which("dciodvfy"):  # of the header only: its own values come from a canary-planted file
        said = subprocess.run(["dciodvfy", next((room / "sct").rglob("*.dcm"))], check=False, capture_output=True, text=True, timeout=60).stderr
        assert "Error" not in said, said
    digits = StudyCase(str(copy)).study.planning.id
    assert "Canary" not in str(join_study(copy, digits).study.subject)


def test_a_copy_keeps_the_kv_pairs(clinic):
    """A copy has no times of day; under this secret the order of the new UIDs alone would pair a frontal view with another pair's lateral one."""
    room = clinic.parent
    if not (room / "copy").exists():
        (room / "secret.txt").write_text("a secret for tests 2")
        called("ingest", clinic / "Canary_Jane", room / "copy", "--secret-file", room / "secret.txt")
    taken = [kv.values for session in phantom_patient(1, voxel_mm=8).sessions for kv in session.kvs]
    pairs = [pair for ct in StudyCase(str(room / "copy")).study.cts for pair in ct.kvs]
    assert len(pairs) == len(taken)
    assert all(min(max(abs(view.image.values - kv[i]).max() for i, view in enumerate(pair)) for kv in taken) < 1e-3 for pair in pairs)


def test_a_synthetic_ct_lies_where_the_planning_ct_lies():
    patient, shift_mm = phantom_patient(1, voxel_mm=8), {"z": 123.0, "y": -40.0, "x": 16.0}
    carried = lambda v: v.assign_coords({a: v[a] + mm for a, mm in shift_mm.items()})
    planning = StudyCT("01234567", 0, carried(patient.planning), {"body": carried(patient.structures["body"])}, np.eye(4))
    study = Study((planning,), None, None, tuple(shift_mm[a] for a in "xyz"), (), (), (), {})
    sct = in_planning_frame(torch.from_numpy(patient.planning.values).float(), patient, study)
    at = sct.sel({a: planning.ct[a] for a in "zyx"}, method="nearest")
    assert all(np.allclose(at[a], planning.ct[a], atol=0.01) for a in "zyx") and np.allclose(at, planning.ct, atol=0.5)


def test_an_exported_plan_has_the_fields_that_dose_is_computed_for():
    assert GANTRY_DEG == PlanSize().gantry_angles_deg
