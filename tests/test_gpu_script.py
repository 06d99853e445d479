"""The script for one GPU goes through the same path on a CPU at a tiny size: pieces that end in time, and every timing."""
from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("gpu_script", ROOT / "scripts" / "gpu.py")
gpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu)


def test_a_piece_ends_in_time_and_says_so(tmp_path):
    started = time.monotonic()
    assert gpu.tables("quick", "cpu", tmp_path, minutes=0.3) == gpu.AGAIN
    assert time.monotonic() - started < 60


def test_an_error_is_not_taken_for_work_left(tmp_path):
    assert gpu.tables("no such preset", "cpu", tmp_path, minutes=2) not in (0, gpu.AGAIN)


def test_every_time_is_taken():
    rows = gpu.timings("quick", "cpu", repeats=2, gamma_size=16, ct5d_shape=(16, 16, 16))
    assert [list(r) for r in rows] == [gpu.COLUMNS] * 5 and all(0 < r["min_s"] <= r["median_s"] <= r["max_s"] and r["n"] == 2 for r in rows)
    assert [r["name"].split()[0] for r in rows] == ["fused", "gamma", "cVAE:", "LDM,", "LDM,"] and rows[2]["size"] == "16x16x16"
    assert "compiled" in rows[-1]["name"] and "compiled" not in rows[-2]["name"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_no_gpu_is_one_sentence(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "scripts" / "gpu.py", "--out-dir", tmp_path], check=False, capture_output=True, text=True)
    assert done.returncode != 0 and done.stderr.strip().startswith("expected a GPU") and len(done.stderr.strip().splitlines()) == 1


def test_bf16_trains_and_keeps_float32_weights(tmp_path):
    """In a process of its own, since accelerate keeps one precision per process."""
    code = f"""
import torch
from pathlib import Path
from dataclasses import replace
from radrepro.train.loop import Schedule, fit
seen = []
class Net(torch.nn.Linear):
    def forward(self, x):
        out = super().forward(x)
        seen.append(out.dtype)
        return out
torch.manual_seed(0)
net = Net(4, 1)
def loss(model, step, generator):
    x = torch.rand(32, 4, generator=generator)
    return ((model(x) - x.sum(1, keepdim=True)) ** 2).mean()
h = fit(net, loss, Schedule(200, 0.05, precision="bf16"), seed=0, folder=Path({str(tmp_path)!r}))
assert set(seen) == {{torch.bfloat16}} and net.weight.dtype == torch.float32 and h[-1] < 0.01 * h[0], (set(seen), h[-1])
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]
