"""Side by side with a peer, in one run: `compare` times both in turn, weighs their memory, and writes one row.

Rows go to out/bench.csv: name, peer, size, device, ours_s, peer_s, ratio_median, ratio_min, ratio_max, ours_mb,
peer_mb, agreement. A ratio is peer_s / ours_s of one round, so above 1 we are faster. Seconds are medians.
Memory is the peak that one further call needs beyond what stands before it (what either side cached stays outside).
"""
from __future__ import annotations

import csv
import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

COLUMNS = ["name", "peer", "size", "device", "ours_s", "peer_s", "ratio_median", "ratio_min", "ratio_max", "ours_mb",
           "peer_mb", "agreement"]
BENCH_CSV = Path(__file__).resolve().parents[1] / "out" / "bench.csv"
if sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "mallopt"):
    ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD: large blocks go back when freed, so a peak is a peak


def _timed(work: Callable, device: str) -> tuple[float, object]:
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def _status_mb(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) / 1024


def peak_mb(work: Callable, device: str = "cpu") -> float:
    """MB that one call of `work` needs at its peak beyond what was there before; NaN where the system cannot tell."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if not sys.platform.startswith("linux"):
        return float("nan")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    except OSError:
        return float("nan")
    before = _status_mb("VmRSS")
    work()
    return _status_mb("VmHWM") - before


def compare(name: str, peer: str, size: str, ours: Callable, theirs: Callable, *, agreement: Callable[..., str],
            rounds: int = 5, device: str = "cpu") -> dict:
    """Run `ours` and `theirs` (no arguments) in turn `rounds` >= 5 times after a warm-up, print and append the row.

    `agreement(ours_result, peer_result)` says in words and numbers how far the two results are apart."""
    if rounds < 5:
        raise ValueError(f"rounds: expected at least 5, got {rounds}: fewer say nothing on a shared machine")
    agreed = agreement(ours(), theirs())  # the warm-up; results are not kept, they would weigh on the memory
    seconds = {"ours": [], "peer": []}
    for r in range(rounds):
        turns = [("ours", ours), ("peer", theirs)]
        for who, work in turns if r % 2 == 0 else turns[::-1]:
            seconds[who].append(_timed(work, device)[0])
    ratios = [p / o for o, p in zip(seconds["ours"], seconds["peer"])]
    row = {"name": name, "peer": peer, "size": size,
           "device": torch.cuda.get_device_name() if device.startswith("cuda") else f"cpu x{torch.get_num_threads()}",
           "ours_s": f"{statistics.median(seconds['ours']):.4g}", "peer_s": f"{statistics.median(seconds['peer']):.4g}",
           "ratio_median": f"{statistics.median(ratios):.3g}", "ratio_min": f"{min(ratios):.3g}",
           "ratio_max": f"{max(ratios):.3g}", "ours_mb": f"{peak_mb(ours, device):.4g}",
           "peer_mb": f"{peak_mb(theirs, device):.4g}", "agreement": agreed}
    BENCH_CSV.parent.mkdir(parents=True, exist_ok=True)
    fresh = not BENCH_CSV.exists()
    with BENCH_CSV.open("a", newline="") as f:
        writer = csv.DictWriter(f, COLUMNS)
        if fresh:
            writer.writeheader()
        writer.writerow(row)
    print(" ".join(f"{k}={v}" for k, v in row.items()), flush=True)
    return row
