"""Stages under bad conditions, and training that was interrupted."""
import errno
import subprocess
import sys

import pytest
import torch

from radrepro.train.loop import Schedule, fit
from radrepro.train.runs import PeakMemory, Task, code_hash, fan_out, run_stage


def write(folder):
    (folder / "numbers.txt").write_text("1 2 3")


@pytest.mark.parametrize("damage", [
    lambda f: (f / "numbers.txt").write_text("1 2 4"),
    lambda f: (f / "numbers.txt").unlink(),
    lambda f: (f / "stage.json").write_text("{"),
    lambda f: (f / "stage.json").unlink(),
    lambda f: (f / "more.txt").write_text("?"),
])
def test_a_damaged_stage_is_refused_and_named(tmp_path, damage):
    folder = run_stage(tmp_path, "a/b", {"n": 1}, write, modules=("core.volume",))
    other = run_stage(tmp_path, "a/b", {"n": 2}, write, modules=("core.volume",))
    damage(folder)
    with pytest.raises(ValueError, match=f"remove .*{folder.name} and start again"):
        run_stage(tmp_path, "a/b", {"n": 1}, write, modules=("core.volume",))
    assert run_stage(tmp_path, "a/b", {"n": 2}, write, modules=("core.volume",)) == other


def test_a_full_disk_says_what_to_do_and_loses_nothing(tmp_path):
    kept = run_stage(tmp_path, "a/b", {"n": 1}, write, modules=("core.volume",))

    def full(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="free some space, or pass -p out_dir"):
        run_stage(tmp_path, "a/b", {"n": 2}, full, modules=("core.volume",))
    assert run_stage(tmp_path, "a/b", {"n": 1}, write, modules=("core.volume",)) == kept
    run_stage(tmp_path, "a/b", {"n": 2}, write, modules=("core.volume",))


def test_a_full_disk_inside_safetensors_is_recognised(tmp_path):
    from safetensors import SafetensorError

    def full(folder):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with pytest.raises(OSError, match="free some space"):
        run_stage(tmp_path, "a/b", {}, full, modules=("core.volume",))


SLOW_STAGE = """
import sys, time
from pathlib import Path
from radrepro.train.runs import run_stage

def make(folder):
    with open(Path(sys.argv[1]) / "calls.txt", "a") as calls:
        calls.write("made\\n")
    for n in range(10):
        with open(folder / "lines.txt", "a") as lines:
            lines.write(f"{n}\\n")
        time.sleep(0.1)
    if sys.argv[2] == "dies":
        import os
        os._exit(9)

run_stage(sys.argv[1], "a/b", {}, make, modules=("core.volume",))
"""


def test_two_runs_at_once_make_a_stage_once(tmp_path):
    twins = [subprocess.Popen([sys.executable, "-c", SLOW_STAGE, tmp_path, "lives"]) for _ in range(2)]
    assert [t.wait() for t in twins] == [0, 0]
    assert (tmp_path / "calls.txt").read_text() == "made\n"
    [lines] = tmp_path.glob("stages/a/b/*/lines.txt")
    assert lines.read_text().split() == [str(n) for n in range(10)]


def test_a_run_that_died_leaves_no_lock(tmp_path):
    assert subprocess.run([sys.executable, "-c", SLOW_STAGE, tmp_path, "dies"], check=False).returncode == 9
    folder = run_stage(tmp_path, "a/b", {}, write, modules=("core.volume",))
    assert (folder / "numbers.txt").read_text() == "1 2 3" and (folder / "lines.txt").exists()  # it went on in the same place


def test_other_disk_errors_are_not_dressed_up(tmp_path):
    def forbidden(folder):
        raise PermissionError(errno.EACCES, "no")

    with pytest.raises(PermissionError):
        run_stage(tmp_path, "a/b", {}, forbidden, modules=("core.volume",))


def loss_of(model, step, generator):
    return (model(torch.randn(8, 3, generator=generator)) ** 2).mean()


@pytest.mark.parametrize("stop", [1, 7, 19])
def test_resumed_training_is_uninterrupted_training_to_the_bit(tmp_path, stop):
    def network():
        torch.manual_seed(1)
        return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))

    schedule = Schedule(20, 1e-2, 3)
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole, killed = network(), network()
    history = fit(whole, loss_of, schedule, seed=5, folder=tmp_path / "whole", checkpoint_seconds=0)

    def dies(model, step, generator):
        if step == stop:
            raise KeyboardInterrupt
        return loss_of(model, step, generator)

    with pytest.raises(KeyboardInterrupt):
        fit(killed, dies, schedule, seed=5, folder=tmp_path / "killed", checkpoint_seconds=0)
    again = network()
    assert fit(again, loss_of, schedule, seed=5, folder=tmp_path / "killed", checkpoint_seconds=0) == history
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path):
    model = torch.nn.Linear(1, 1)
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        fit(model, lambda m, s, g: m(torch.ones(1, 1)).sum() * float("nan"), Schedule(3, 1e-3), seed=0, folder=tmp_path)


def double(n, *, report):
    report(0.5, "doubling")
    if n < 0:
        raise ValueError("expected n >= 0, got a negative one: pass another")
    return 2 * n


def test_fan_out_over_processes_keeps_order_and_names_the_task_that_failed():
    with PeakMemory() as memory:
        results = fan_out([Task("a", double, (1,)), Task("b", double, (2,), after=("a",))], workers=2)
    assert results == {"a": 2, "b": 4} and memory.gib > 0.1
    with pytest.raises(ValueError) as caught:
        fan_out([Task("a", double, (1,)), Task("bad", double, (-1,))], workers=1)
    assert "'bad'" in caught.value.__notes__[0]


def test_repeated_task_names_are_refused():
    with pytest.raises(ValueError, match="rename"):
        fan_out([Task("a", double, (1,)), Task("a", double, (2,))], workers=0)


def test_a_stage_depends_on_what_its_module_imports_and_on_nothing_else(tmp_path, monkeypatch):
    home = tmp_path / "radrepro"
    texts = {"core/volume.py": "", "core/warp.py": "from .volume import like\n", "core/dicom.py": "from .volume import like\n",
             "data/cohorts.py": "def load():\n    from radrepro.data.thorax import draw\n", "data/thorax.py": "from ..core import warp\n",
             "ct5d/fit.py": "import numpy\nfrom ..data.cohorts import load\n"}
    for name, text in texts.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
    monkeypatch.setattr("radrepro.__file__", str(home / "__init__.py"))

    def hashed():
        code_hash.cache_clear()
        return code_hash(("ct5d.fit",))

    first = hashed()
    assert first == hashed()
    (home / "core/dicom.py").write_text("changed = 1\n")
    assert hashed() == first
    for name in ("core/volume.py", "core/warp.py", "data/thorax.py", "data/cohorts.py", "ct5d/fit.py"):
        (home / name).write_text(texts[name] + "# changed\n")
        assert hashed() != first, name
        (home / name).write_text(texts[name])
    with pytest.raises(FileNotFoundError):
        code_hash(("ct5d.gone",))
    code_hash.cache_clear()
