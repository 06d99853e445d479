"""A data_dir that no code has heard of, in the documented layout: one head and neck, one thorax, and landmarks."""
import json

import numpy as np
import pandas as pd

from radrepro.core.volume import AXES, centred_grid, volume, write_nifti


def inside(grid, centre_xyz_mm, half_xyz_mm, power=2):
    """An ellipsoid (power 2) or a box with round corners on `grid`, bool."""
    z, y, x = np.meshgrid(*(grid[a] for a in AXES), indexing="ij")
    return sum(abs((c - m) / h) ** power for c, m, h in zip((x, y, z), centre_xyz_mm, half_xyz_mm)) < 1


def write_headneck(folder):
    """A head on a neck and shoulders, anisotropic, somewhere in the room; masks in two files. Left is +x."""
    grid = centred_grid((64, 60, 80), (5.0, 4.0, 5.0))
    head, neck = inside(grid, (0, 0, 45), (72, 92, 105)), inside(grid, (0, 20, -60), (55, 60, 130), 8)
    shoulders = inside(grid, (0, 20, -160), (180, 80, 60), 4)
    skull = head & ~inside(grid, (0, 0, 45), (64, 84, 97))
    hu = np.where(head | neck | shoulders, 20, -1000)
    hu[skull], hu[inside(grid, (0, 20, 10), (12, 9, 20))] = 900, 30
    oar = np.zeros(hu.shape, np.uint8)
    for value, centre in (
        (2, (6, 23, 11)),
        (5, (52, 25, -25)),
        (9, (-52, 25, -25)),
    ):  # 6: not in the middle of the room
        oar[inside(grid, centre, (14, 14, 18))] = value
    target = inside(grid, (20, 0, -40), (20, 20, 25)).astype(np.uint8)
    room = {"z": grid["z"] - 812, "y": grid["y"] + 31, "x": grid["x"] - 7}
    for name, values, units in (("ct", hu.astype(np.int16), "HU"), ("organs", oar, "1"), ("targets", target, "1")):
        write_nifti(volume(values, **room, units=units), folder / f"{name}.nii.gz")
    (folder / "labels.json").write_text(
        json.dumps(
            {
                "organs.nii.gz": {"BrainStem": 2, "Parotid_L": 5, "Parotid_R": 9},
                "targets.nii.gz": {"PTV_5000": 1},
                "contoured_by": "nobody",
            }
        )
    )


def write_thorax(folder):
    """A trunk with two lungs, a spine and a diaphragm, anisotropic, somewhere in the room; no labels."""
    grid = centred_grid((60, 66, 76), (5.0, 4.5, 5.0))
    hu = np.where(inside(grid, (0, 0, 0), (165, 120, 400), 4), 30, -1000)
    for side in (-1, 1):
        hu[inside(grid, (70 * side, 0, 5), (52, 80, 120))] = -820
    hu[inside(grid, (0, 85, 0), (18, 18, 400), 4)] = 500
    write_nifti(
        volume(hu.astype(np.int16), z=grid["z"] + 1300, y=grid["y"], x=grid["x"] + 44, units="HU"), folder / "ct.nii.gz"
    )


def write_landmarks(folder, down_mm=9.0):
    """Landmark pairs in the documented frame, z growing inferior: inhaling goes down, and to the front."""
    folder.mkdir(parents=True)
    exhale = np.random.default_rng(5).uniform([20, 30, 40], [260, 210, 280], (300, 3))
    columns = [f"{end}_{a}_mm" for end in ("ee", "ei") for a in "xyz"]
    pairs = np.hstack([exhale, exhale + [0, -2, down_mm]])
    pd.DataFrame(pairs, columns=columns).to_csv(folder / "case01_300.csv", index=False)


def write_clinic(root):
    """All of it under `root`, beside folders that hold no case."""
    write_headneck(root / "hn_x" / "pt_1")
    write_thorax(root / "thorax_x" / "somebody")
    write_landmarks(root / "lung_landmarks_x")
    for other in ("dicom_y", "hn_no_ct_here", "notes"):
        (root / other).mkdir()
    (root / "README.md").write_text("hn_x/pt_1/ct.nii.gz")
