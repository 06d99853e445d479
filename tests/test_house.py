"""The shape of the project: which way imports go, what an import costs, where numbers may be written down."""
import ast
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "radrepro"
MAY_IMPORT = {
    "core": {"core"},
    "data": {"core", "data"},
    "metrics": {"core", "metrics"},
    "dose": {"core", "dose"},
    "train": {"core", "train"},
    "kv2ct": {"core", "data", "metrics", "dose", "train", "kv2ct"},
    "ct5d": {"core", "data", "metrics", "dose", "train", "ct5d"},
    "report": {"core", "data", "metrics", "dose", "train", "kv2ct", "ct5d", "report"},
}
MAY_IMPORT["cli"] = {*MAY_IMPORT, "cli"}  # the command line stands on everything, and nothing on it


def imported(path: Path, package: tuple[str, ...] = ()) -> set[str]:
    """Absolute names of what a file imports; `package`: its own, to resolve the relative imports that nbdev writes."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            names.add(".".join((*above, *filter(None, [node.module]))))
        elif isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
    return names


def test_imports_run_one_way():
    for path in PACKAGE.rglob("*/*.py"):
        layer = path.relative_to(PACKAGE).parts[0]
        assert not forbidden(path, layer), f"{path.name} ({layer}) must not import {forbidden(path, layer)}"


def forbidden(path: Path, layer: str) -> list[str]:
    names = [n for n in imported(path, ("radrepro", layer)) if n.startswith("radrepro.")]
    return [n for n in names if n.split(".")[1] not in MAY_IMPORT[layer]]


def test_a_wrong_import_is_seen(tmp_path):
    file = tmp_path / "wrong.py"
    file.write_text("from ..report.claims import published\nfrom ..core.volume import check\nimport radrepro.ct5d.cvae\nfrom . import loop\n")
    assert sorted(forbidden(file, "train")) == ["radrepro.ct5d.cvae", "radrepro.report.claims"]
    file.write_text("from ..cli.main import main\nfrom ..report.claims import published\n")
    assert forbidden(file, "report") == ["radrepro.cli.main"] and not forbidden(file, "cli")


def test_the_library_does_not_need_nbdev():
    for path in PACKAGE.rglob("*.py"):
        assert not {n.split(".")[0] for n in imported(path)} & {"nbdev", "fastcore", "execnb", "IPython"}, path


def test_nothing_that_can_hold_code_is_loaded():
    """Weights and arrays come from safetensors, zarr and npz without objects: a pickle runs what is in it."""
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        modules = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        modules |= {(n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level}
        assert not modules & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}, path.name
        for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
            assert ast.unparse(call.func) not in {"torch.load", "pd.read_pickle", "eval", "exec", "yaml.load"}, path.name
            assert not any(k.arg in ("allow_pickle", "weights_only") for k in call.keywords), path.name


def test_no_room_without_a_meaning():
    vague = {"utils", "util", "helpers", "common", "misc"}
    assert not [p for p in PACKAGE.rglob("*.py") if p.stem in vague]


def test_slow_libraries_are_imported_where_used():
    code = ("import sys, radrepro.kv2ct.model, radrepro.ct5d.stages, radrepro.data.cohorts, radrepro.cli.main; "
            "print([m for m in ('monai', 'diffusers', 'pyRadPlan', 'nanodrr', 'accelerate', 'distributed') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_nothing_names_a_machine():
    """No absolute path of whoever built it: not in notebooks' outputs, not in the README."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    words = ["/" + w for w in ("root/", "home/", "tmp/", "work/", "Users/")]
    for name in tracked:
        if Path(name).suffix in (".py", ".ipynb", ".md", ".txt", ".csv", ".yml", ".json", ".ini", ".toml"):
            text = (ROOT / name).read_text()
            found = [w for w in words if any(q + w in text for q in ('"', "'", " ", "\n", "("))]
            assert not found, f"{name} holds {found}"


def test_no_published_number_outside_the_manifests():
    """The papers' means are easy to recognise; none may stand in code."""
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "nbs").rglob("*.ipynb")]:
        text = path.read_text()
        if path.suffix == ".ipynb":  # what a cell prints was computed; what it says was typed
            text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
        for number in ("44.58", "50.85", "0.02089", "0.00827", "0.01239", "21,812"):
            assert number not in text, f"{path.name} holds the published number {number}: read it with read_claims"


def test_help_is_quick():
    """What a command line needs before it is read: neither torch nor pydicom."""
    code = "import sys, radrepro.cli.main; print([m for m in ('torch', 'pydicom', 'scipy', 'xarray', 'plotly') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
