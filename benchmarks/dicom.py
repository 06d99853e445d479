"""A folder of 200 CT slices of 512 x 512 into a Volume, against SimpleITK's series reader.

Made-up slices, 16 bits, uncompressed, their file names in no order. SimpleITK finds the series, sorts it and reads it (GDCM), as its users
do; both read from the disk's cache. Both give HU: ours float32, SimpleITK's what GDCM chooses.
"""
from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from harness import compare

from radrepro.core.dicom_ct import read_ct

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from made_up_dicom import write_ct


def rows(folder: str, shape: tuple[int, int, int]) -> None:
    write_ct(folder, shape=shape, spacing_mm=(0.9, 0.9), number=lambda k: (77 * k + 5) % 1009)

    def ours():
        return read_ct(folder)

    def theirs():
        return sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(folder))

    def agreement(v, image) -> str:
        off_mm = max(abs(float(v[a][0]) - o) for a, o in zip("xyz", image.GetOrigin()))
        off_hu = np.abs(v.values - sitk.GetArrayViewFromImage(image)).max()
        return f"max |dHU| {off_hu:g}, origin {off_mm:.1g} mm apart, voxels {v.nbytes / 2**20:.0f} MB"

    compare("read_ct", "SimpleITK ImageSeriesReader", "x".join(map(str, shape)), ours, theirs, agreement=agreement)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        rows(folder, (200, 512, 512))
