"""The main job as a newcomer runs it: README's command, twice, killed in the middle, and with bad input."""
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from radrepro.report.claims import COLUMNS

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
README = (ROOT / "README.md").read_text()
TIMES = ("seconds", "milliseconds")  # the only numbers that may differ between two runs


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line and not line.startswith("#")]


def papermill(out: Path, *parameters: str, **kwargs):
    """README's quick command, with its own output folder."""
    command = next(c for c in commands() if c.startswith("papermill") and "preset quick" in c)
    words = shlex.split(command)
    words[0], words[2] = str(BIN / "papermill"), str(out / "tables.ipynb")
    out.mkdir(parents=True, exist_ok=True)
    extra = [w for p in (f"out_dir={out}", *parameters) for w in ("-p", *p.split("=", 1))]
    return subprocess.Popen([*words, *extra], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True, env=os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}, **kwargs)


def finished(out: Path, *parameters: str) -> str:
    process = papermill(out, *parameters)
    text, _ = process.communicate()
    assert process.returncode == 0, text[-3000:]
    return text


def numbers(out: Path) -> pd.DataFrame:
    tables = pd.concat([pd.read_csv(p, dtype={"patient": str}) for p in sorted((out / "tables").glob("*_table*.csv"))])
    return tables[~tables.metric.isin(TIMES)].reset_index(drop=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One uninterrupted quick run."""
    out = tmp_path_factory.mktemp("run")
    finished(out)
    return out


@pytest.fixture(scope="module")
def own_run(made_up, tmp_path_factory):
    """One uninterrupted quick run on made-up patients, one for each paper: short, and every kind of stage is in it."""
    out = tmp_path_factory.mktemp("own_run")
    finished(out, "cohort=real", f"data_dir={made_up}")
    return out


def test_readme_names_the_two_commands():
    assert "make tables" in commands() and "make test" in commands()
    for target in ("tables", "test"):
        subprocess.run(["make", "-n", target, "VENV=no-such-venv"], cwd=ROOT, check=True, capture_output=True)


def test_readme_parameters_exist():
    cells = nbformat.read(ROOT / "nbs" / "tables.ipynb", 4).cells
    known = set(re.findall(r"^(\w+) =", next(c.source for c in cells if "parameters" in c.metadata.get("tags", [])), re.MULTILINE))
    used = {name for c in commands() for name in re.findall(r"-p (\w+) ", c)}
    assert used and used <= known


def test_rows_are_the_contract(run):
    rows = numbers(run)
    assert list(rows.columns) == COLUMNS and rows.ours.notna().all()
    assert set(rows.verdict.str.removesuffix(" (not in the paper)")) <= {"trend holds", "trend fails", "exact", "print is wrong", "no claim",
                                                                         "not in the paper"}
    counts = rows[(rows.table == 1) & (rows.paper == "A")]
    assert list(counts[counts.verdict == "print is wrong"].patient) == ["1", "4", "6"] and "mean" not in set(counts.patient)
    assert {p.name for p in (run / "tables").iterdir()} >= {"a_table1.csv", "a_table2.csv", "a_table6.csv", "a_statistics.csv", "b_table1.csv",
                                                             "summary.json", "headline.txt"}
    assert set(rows[(rows.paper == "A") & (rows.table == 2)].model) >= {"fused", "primary", "mean_ct", "registration_1dof", "fused_wrong_kv"}
    assert set(rows[rows.paper == "B"].model) == {"none", "population", "cvae_global", "cvae_slice", "ldm_paper", "ldm_extension",
                                                     "linear5d", "registration", "truth"}
    assert rows[rows.patient.ne("mean") & rows.table.le(6)].groupby(["paper", "table"]).patient.nunique().eq(10).all()
    assert set(rows[rows.table == 7].patient) == {"1"}  # robustness: one patient is enough here
    assert {"fused", "primary", "fused_aligned"} <= set(rows[(rows.paper == "A") & (rows.table == 4)].model)
    shifted = rows.query("model == 'fused' and detail == 'whole, shifted kV'")
    assert len(shifted) == 11 and shifted.verdict.str.startswith("trend").all()
    assert (rows.cohort == "phantom").all() and (rows.preset == "quick").all()


def test_a_second_run_reads_and_a_killed_run_goes_on(own_run, made_up, tmp_path):
    """kill -9 in the middle, the same command again: the same numbers, and nothing that was finished is made again.

    It starts from DICOM, the run that it is compared with from memory."""
    given = ("cohort=real", f"data_dir={made_up}", "source=dicom")
    process = papermill(tmp_path, *given)
    while process.poll() is None and len(list(tmp_path.glob("stages/kv2ct/fit/*/stage.json"))) < 2:
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    time.sleep(3)  # the kernel and its workers notice that they are alone
    kept = {p: p.stat().st_mtime_ns for p in tmp_path.glob("stages/*/*/*/stage.json")}
    assert kept and not (tmp_path / "tables").exists()
    finished(tmp_path, *given)
    assert all(p.stat().st_mtime_ns == t for p, t in kept.items())
    pd.testing.assert_frame_equal(numbers(tmp_path), numbers(own_run), check_exact=True)
    made = {p: p.stat().st_mtime_ns for p in tmp_path.glob("stages/*/*/*/stage.json")}
    started = time.monotonic()
    finished(tmp_path, *given)
    assert time.monotonic() - started < 60
    assert made == {p: p.stat().st_mtime_ns for p in tmp_path.glob("stages/*/*/*/stage.json")}  # everything was read, nothing made
    pd.testing.assert_frame_equal(numbers(tmp_path), numbers(own_run), check_exact=True)


def test_any_data_dir_in_the_documented_layout(own_run):
    """The whole page on patients that no code has heard of: rows say real, and nothing of the phantoms stands among them."""
    rows = numbers(own_run)
    assert set(rows[~rows.detail.str.contains("residual sd")].cohort) == {"real"}
    assert set(rows.query("cohort == 'real'").patient) == {"1"}  # one of each, so no mean over patients
    assert {"fused", "registration_1dof"} <= set(rows.query("paper == 'A'").model)
    b = rows.query("paper == 'B' and metric == 'masked_mse' and detail == 'lung + 10 mm'").set_index("model").ours
    assert b["truth"] < b["none"] and "cvae_slice" in b
    leaked = [p.name for p in own_run.rglob("*") if p.is_file() and b"pt_1" in p.read_bytes() and p.suffix in (".csv", ".html", ".txt")]
    assert not leaked, f"{leaked} name a patient's folder"


@pytest.mark.parametrize(("parameter", "sentence"), [
    ("preset=laptob", "expected preset to be one of"),
    ("cohrt=real", "expected parameters among"),
    ("cohort=clincal", "expected cohort to be one of"),
    ("device=gpu", "expected device auto, cpu or cuda"),
    ("seeds=0", "expected seeds to be a whole number"),
    ("source=dicm", "expected source to be one of"),
])
def test_bad_parameters_end_the_run_with_one_sentence(tmp_path, parameter, sentence):
    process = papermill(tmp_path, parameter)
    text, _ = process.communicate()
    assert process.returncode != 0 and sentence in text.strip().splitlines()[-1]


def test_missing_data_dir(tmp_path):
    process = papermill(tmp_path, "cohort=real", f"data_dir={tmp_path / 'nowhere'}")
    text, _ = process.communicate()
    assert process.returncode != 0 and "use -p cohort phantom" in text.strip().splitlines()[-1]
