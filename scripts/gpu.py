"""Both papers' tables on one GPU in short pieces, and the times that the papers quote.

    python scripts/gpu.py [--preset h200] [--device cuda] [--minutes 8] [--out-dir out]

A call works for at most `--minutes` on the tables and ends with exit code 75 ("call me again") while something is left; stages and
checkpoints are kept, so the next call goes on. When the tables are whole it times, with untrained weights at the preset's size,
a fused CT from a kV pair (Paper A), gamma of two doses, and a scan by the cVAE and the diffusion model, eager and compiled (Paper B), and writes
OUT_DIR/gpu_seconds.csv: name, size, device, median_s, min_s, max_s, n, peak_mb.
"""
from __future__ import annotations

import argparse
import csv
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
AGAIN = 75  # EX_TEMPFAIL
COLUMNS = ["name", "size", "device", "median_s", "min_s", "max_s", "n", "peak_mb"]


def tables(preset: str, device: str, out_dir: Path, minutes: float) -> int:
    """Work on the tables for at most `minutes`; 0 when they are whole, `AGAIN` when time ran out, else papermill's exit code."""
    out_dir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "papermill", str(ROOT / "nbs" / "tables.ipynb"), str(out_dir / "tables.ipynb"), "--no-progress-bar",
               "-p", "preset", preset, "-p", "device", device, "-p", "out_dir", str(out_dir)]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        return process.wait(timeout=60 * minutes)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return AGAIN


def measured(name: str, size, work: Callable, device: str, repeats: int) -> dict:
    """A row: seconds of `repeats` calls after two that pay for set-up, each until the device has finished."""
    cuda = device.startswith("cuda")
    wait = torch.cuda.synchronize if cuda else lambda: None
    for _ in range(2):
        work()
    wait()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        wait()
        seconds.append(time.perf_counter() - started)
    peak_mb = torch.cuda.max_memory_allocated() / 2**20 if cuda else float("nan")
    return dict(zip(COLUMNS, (name, "x".join(map(str, size)), torch.cuda.get_device_name() if cuda else device, statistics.median(seconds),
                              min(seconds), max(seconds), repeats, peak_mb)))


def timings(preset: str, device: str, repeats: int, gamma_size: int, ct5d_shape: tuple[int, int, int] | None) -> list[dict]:
    """The rows of gpu_seconds.csv. `ct5d_shape`: None for the preset's own."""
    from dataclasses import replace

    from radrepro.core.volume import centred_grid, volume
    from radrepro.ct5d.autoencoder import CTAutoencoder
    from radrepro.ct5d.fit import make_model
    from radrepro.ct5d.fit_diffusion import make_pipeline
    from radrepro.ct5d.imagine import answer
    from radrepro.ct5d.pipeline import VARIANTS
    from radrepro.data.headneck import phantom_patient
    from radrepro.kv2ct.fit import Converter, fuse
    from radrepro.metrics.gamma import CRITERIA, gamma_index
    from radrepro.train.presets import get_preset

    plan = get_preset(preset)
    patient = phantom_patient(1, voxel_mm=plan.kv2ct.voxel_mm)
    primary, secondary = (Converter(patient, which, getattr(plan.kv2ct, which), device=device) for which in ("primary", "secondary"))
    kv = patient.test.kvs[0]
    rows = [measured("fused CT from a kV pair", patient.planning.shape, lambda: fuse(primary.predict(kv), secondary.predict(kv), patient.head_box),
                     device, repeats)]
    grid = centred_grid((gamma_size,) * 3, 2.0)
    rng = np.random.default_rng(0)
    r2 = sum((np.asarray(grid[a]).reshape([-1 if i == j else 1 for j in range(3)]) / (gamma_size / 2)) ** 2 for i, a in enumerate("zyx"))
    dose = volume((60 * np.exp(-r2)).astype(np.float32), **grid, units="Gy")
    other = dose.copy(data=dose.values * (1 + 0.02 * rng.standard_normal(dose.shape, dtype=np.float32)))
    rows.append(measured("gamma 2%/2mm", dose.shape, lambda: gamma_index(dose, other, CRITERIA[2], device=device), device, repeats))
    size = plan.ct5d if ct5d_shape is None else replace(plan.ct5d, shape=ct5d_shape)
    g = torch.Generator().manual_seed(0)
    ct = torch.rand(1, 1, *size.shape, generator=g).to(device)
    traces = torch.rand(2, size.shape[0], 1, generator=g).to(device)
    d = size.diffusion
    autoencoder = CTAutoencoder(size.shape, d.level_strides, d.channels, d.latent_channels)
    plain = {k: torch.full((d.latent_channels,), v) for k, v in (("mean", 0.0), ("std", 1.0), ("residual_std", 1.0))}
    pipe = make_pipeline(VARIANTS["paper"], size, autoencoder, plain, seed=0).to(device)
    pipe.set_progress_bar_config(disable=True)
    models = {"cVAE": make_model("slice", size, seed=0).to(device).eval(), f"LDM, {d.ddim_steps} steps": pipe,
              f"LDM, {d.ddim_steps} steps, compiled": pipe}
    for name, model in models.items():
        if name.endswith("compiled"):  # the loop's one network: CUDA graphs on a GPU; elsewhere the same capture without a compiler
            how = {"mode": "reduce-overhead"} if device.startswith("cuda") else {"backend": "aot_eager"}
            pipe.unet.compile(fullgraph=True, **how)

        def scan(model=model):
            return answer(model, ct, traces[:1], traces[1:], spacing_mm=size.voxel_mm, num_inference_steps=d.ddim_steps)

        rows.append(measured(f"{name}: a scan under another trace", size.shape, scan, device, repeats))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="h200")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=8.0, help="of work on the tables in this call")
    parser.add_argument("--out-dir", type=Path, default=ROOT / "out")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--gamma-size", type=int, default=200, help="voxels along each axis")
    parser.add_argument("--ct5d-shape", type=int, nargs=3, default=None, metavar=("Z", "Y", "X"), help="of the timed scan, e.g. 448 512 512")
    a = parser.parse_args()
    if a.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("expected a GPU for --device cuda, got none that torch sees: pass --device cpu, or install torch for CUDA")
    code = tables(a.preset, a.device, a.out_dir, a.minutes)
    if code:
        if code == AGAIN:
            print("time is up, and something is left: call me again", flush=True)
        return code
    rows = timings(a.preset, a.device, a.repeats, a.gamma_size, tuple(a.ct5d_shape) if a.ct5d_shape else None)
    with open(a.out_dir / "gpu_seconds.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    print(f"times: {a.out_dir / 'gpu_seconds.csv'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
