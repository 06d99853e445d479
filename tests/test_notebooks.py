"""Every lesson notebook runs from top to bottom, and radrepro/ is what the notebooks export."""
import ast
import filecmp
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from nbdev.test import test_nb as run_notebook

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").rglob("[0-9]*.ipynb"))
LESSONS = [p for p in NOTEBOOKS if p.parent.name != "guides"]  # a guide shows what others export, and exports nothing


BASICS = {"core", "data", "metrics", "dose", "train"}  # test_notebooks_models.py runs the others, at the same time in another worker


def check_runs(path):
    succeeded, _ = run_notebook(path)
    assert succeeded, f"{path.name} raised: run it with nbdev_test --path {path} to see where"


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.parent.name in BASICS], ids=lambda p: p.stem)
def test_notebook_runs(path):
    check_runs(path)


def test_library_is_what_the_notebooks_export(tmp_path):
    """Export a copy of the notebooks and compare file by file."""
    import shutil

    for name in ("nbs", "settings.ini", "pyproject.toml", "setup.py", "README.md"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    # running a notebook's test leaves IN_TEST behind, under which nbdev_export does nothing
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    subprocess.run([Path(sys.executable).parent / "nbdev_export"], cwd=tmp_path, check=True, capture_output=True, env=env)
    exported = {p.relative_to(tmp_path): p for p in (tmp_path / "radrepro").rglob("*.py")}
    here = {p.relative_to(ROOT) for p in (ROOT / "radrepro").rglob("*.py")}
    assert set(exported) == here, "run nbdev_export and commit what it writes"
    different = [str(k) for k, p in exported.items() if not filecmp.cmp(p, ROOT / k, shallow=False)]
    assert not different, f"edit the notebook, not {different}; then nbdev_export"


def test_papermill_parameters_survive_cleaning(tmp_path):
    """nbdev_clean must keep the tag that papermill needs; without it papermill's values would be ignored silently."""
    for name in ("tables", "figures"):
        copy = tmp_path / f"{name}.ipynb"
        copy.write_text((ROOT / "nbs" / f"{name}.ipynb").read_text())
        (tmp_path / "settings.ini").write_text((ROOT / "settings.ini").read_text())
        subprocess.run([Path(sys.executable).parent / "nbdev_clean", "--fname", copy], cwd=tmp_path, check=True, capture_output=True)
        tags = [c["metadata"].get("tags", []) for c in json.loads(copy.read_text())["cells"]]
        assert tags.count(["parameters"]) == 1


def test_notebooks_stay_small():
    large = [p.name for p in (ROOT / "nbs").rglob("*.ipynb") if p.stat().st_size > 200_000]
    assert not large, f"expected notebooks under 200 kB, got {large}: shrink their pictures"


def exported_and_shown(path: Path) -> tuple[set[str], str]:
    """Public names that a notebook exports, and the text of its other code cells: the lesson."""
    cells = ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    exports = [c for c in cells if c.lstrip().startswith("#| export")]
    names = set()
    for node in (n for c in exports for n in ast.parse(c).body):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
    return {n for n in names if not n.startswith("_")}, "\n".join(c for c in cells if c not in exports)


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_every_exported_name_is_in_a_lesson(path):
    names, lesson = exported_and_shown(path)
    assert names, f"{path.name} exports nothing"
    unseen = sorted(n for n in names if not re.search(rf"\b{n}\b", lesson))
    assert not unseen, f"{path.name} exports {unseen} without showing them: use them in a lesson cell, or make them private"


@pytest.mark.parametrize("path", sorted(set(NOTEBOOKS) - set(LESSONS)), ids=lambda p: p.stem)
def test_guides_export_nothing(path):
    cells = json.loads(path.read_text())["cells"]
    assert not [c for c in cells if "".join(c["source"]).lstrip().startswith(("#| export", "#| default_exp"))]
