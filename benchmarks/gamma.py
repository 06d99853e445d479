"""3D gamma of two doses, against pymedphys and, where it is installed, plastimatch.

The pair: a proton-like plateau with steep edges, 96 x 84 x 112 voxels of 4 mm, moved by 2.7 mm and scaled by some percent, so that points
fail at every criterion. Both peers at ten steps a DTA, cap 2, cut-off 10 %. plastimatch reads and writes files, as its users do; that is in its time.
"""
from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import warnings

import numba
import numpy as np
import SimpleITK as sitk
import torch
from harness import compare
from scipy import ndimage

from radrepro.core.volume import AXES, centred_grid, spacing_mm, volume
from radrepro.metrics.gamma import CRITERIA, gamma_index


def pair(shape: tuple[int, int, int], voxel_mm: float):
    """Reference and evaluated dose in Gy."""
    rng, grid = np.random.default_rng(0), centred_grid(shape, voxel_mm)
    z, y, x = np.meshgrid(*(grid[a] for a in AXES), indexing="ij")
    rough = lambda mm: ndimage.gaussian_filter(rng.standard_normal(shape), mm / voxel_mm)
    rough_1, rough_2 = rough(14.0), rough(18.0)
    dose = 60 / (1 + np.exp((np.sqrt((z / 1.4) ** 2 + (y / 1.1) ** 2 + (x / 1.3) ** 2) - 75) / 6)) * (1 + 0.05 * rough_1 / rough_1.std())
    moved = ndimage.shift(dose, np.array((1.8, -1.5, 1.2)) / voxel_mm, order=1, mode="nearest") * (1 + 0.015 * rough_2 / rough_2.std())
    return [volume(v.astype(np.float32), **grid, units="Gy") for v in (dose, moved)]


def rows(reference, evaluated) -> None:
    import pymedphys

    axes, size = tuple(reference[a].values for a in AXES), "x".join(map(str, reference.shape))

    def passing(gamma) -> float:
        gamma = gamma[np.isfinite(gamma)]
        return 100 * float((gamma <= 1).mean())

    with tempfile.TemporaryDirectory() as folder:
        files = [f"{folder}/{n}.mha" for n in ("reference", "evaluated", "gamma")]
        for path, v in zip(files, (reference, evaluated)):
            image = sitk.GetImageFromArray(v.values)
            image.SetSpacing(spacing_mm(v)[::-1])
            image.SetOrigin([float(v[a][0]) for a in AXES[::-1]])
            sitk.WriteImage(image, path)
        for c in CRITERIA:
            name = f"gamma_{c.percent:g}%_{c.distance_mm:g}mm"
            counted = gamma_index(reference, evaluated, c).n_compared

            def ours(c=c):
                return gamma_index(reference, evaluated, c).values.values

            def medphys(c=c):
                return pymedphys.gamma(axes, reference.values, axes, evaluated.values, c.percent, c.distance_mm, interp_fraction=c.fraction,
                                       lower_percent_dose_cutoff=c.cutoff_percent, max_gamma=c.cap, quiet=True)

            def plastimatch(c=c):
                subprocess.run(["plastimatch", "gamma", "--interp-search", "--ref-only-threshold", "--dose-tolerance", str(c.percent / 100),
                                "--dta-tolerance", str(c.distance_mm), "--analysis-threshold", str(c.cutoff_percent / 100), "--gamma-max",
                                str(c.cap), "--output", files[2], *files[:2]], check=True, capture_output=True)
                gamma = sitk.GetArrayFromImage(sitk.ReadImage(files[2]))
                return np.where(reference.values >= c.cutoff_percent / 100 * reference.values.max(), gamma, np.nan)

            agree = lambda a, b, counted=counted: f"{counted} points, pass {passing(a):.2f} / {passing(b):.2f} %, mean |d gamma| {np.nanmean(np.abs(a - b)):.4f}"
            compare(name, "pymedphys", size, ours, medphys, agreement=agree)
            if shutil.which("plastimatch"):
                compare(name, "plastimatch --interp-search", size, ours, plastimatch, agreement=agree)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(min(os.cpu_count() or 1, numba.config.NUMBA_NUM_THREADS))
    rows(*pair((96, 84, 112), 4.0))
