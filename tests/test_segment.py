"""The extra `seg`: buckets of TotalSegmentator's classes, orientation, and what is said where package or weights are absent."""
import json
import os
import sys
from types import ModuleType, SimpleNamespace

import nibabel
import numpy as np
import pytest

from radrepro.core.volume import AXES, centred_grid, read_nifti, volume, write_nifti
from radrepro.data.segment import BUCKET_OF, WEIGHTS, find_weights, read_buckets, segment, write_labels
from radrepro.data.thorax_anatomy import BUCKETS

CLASSES = {k: name for k, name in enumerate(["liver", *BUCKET_OF, "portal_vein_and_splenic_vein"], start=1)}
NUMBER = {name: k for k, name in CLASSES.items()}


@pytest.fixture
def ct():
    """Air with a body in it, and one bright voxel that no mirroring leaves in its place; anisotropic, off the room's middle."""
    grid = centred_grid((9, 10, 11), (4.0, 2.0, 3.0))
    grid = {a: grid[a] + shift for a, shift in zip(AXES, (-300.0, 40.0, 7.0))}
    hu = np.full((9, 10, 11), -1000, np.int16)
    hu[1:8, 2:9, 2:9] = 30
    hu[2, 3, 7] = 900
    return volume(hu, **grid, units="HU")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A stand-in for TotalSegmentator that calls the bright voxel `sternum` and the voxel one step to the patient's left `heart`.

    As the package may, it works in its own order of axes: the file it writes is turned to RAS and its numbers are float."""
    seen = SimpleNamespace(calls=[], environment={})

    def run(source, target, **how):
        seen.calls.append(how)
        seen.environment = {k: os.environ[k] for k in ("TOTALSEG_HOME_DIR", "TOTALSEG_WEIGHTS_PATH")}
        seen.config = json.loads((source.parent / "config.json").read_text())
        picture = nibabel.as_closest_canonical(nibabel.load(source))
        hu = np.asarray(picture.dataobj)
        classes = np.zeros(hu.shape, np.float32)
        i, j, k = np.unravel_index(hu.argmax(), hu.shape)
        classes[i, j, k], classes[i - 1, j, k] = NUMBER["sternum"], NUMBER["heart"]  # RAS+: one step back is to the left
        nibabel.save(nibabel.Nifti1Image(classes, picture.affine), target)

    parts = {"config": {"get_weights_dir": lambda: os.environ["TOTALSEG_WEIGHTS_PATH"]}, "map_to_binary": {"class_map": {"total": CLASSES}},
             "python_api": {"totalsegmentator": run}}
    top = ModuleType("totalsegmentator")
    monkeypatch.setitem(sys.modules, "totalsegmentator", top)
    for name, values in parts.items():
        module = ModuleType(f"totalsegmentator.{name}")
        vars(module).update(values)
        setattr(top, name, module)
        monkeypatch.setitem(sys.modules, f"totalsegmentator.{name}", module)
    weights = tmp_path / "weights"
    for name in WEIGHTS:
        (weights / name / "trainer" / "fold_0").mkdir(parents=True)
        (weights / name / "trainer" / "fold_0" / "checkpoint_final.pth").touch()
    monkeypatch.setenv("TOTALSEG_WEIGHTS_PATH", str(weights))
    return seen


def test_labels_lie_where_the_organ_is(ct, package):
    found = segment(ct)
    assert found.dtype == np.uint8 and all(np.array_equal(found[a], ct[a]) for a in AXES)
    assert np.argwhere(found.values == 1).tolist() == [[2, 3, 7]]
    assert np.argwhere(found.values == 2).tolist() == [[2, 3, 8]]  # LPS: x grows to the left
    assert package.calls == [{"ml": True, "task": "total", "quiet": True, "device": package.calls[0]["device"]}]


def test_nothing_is_sent_and_the_environment_is_put_back(ct, package):
    before = dict(os.environ)
    segment(ct)
    assert package.config["send_usage_stats"] is False and dict(os.environ) == before
    assert package.environment["TOTALSEG_HOME_DIR"] != before.get("TOTALSEG_HOME_DIR") and not os.path.exists(package.environment["TOTALSEG_HOME_DIR"])


def test_absent_weights_are_never_downloaded(ct, package, monkeypatch, tmp_path):
    monkeypatch.setenv("TOTALSEG_WEIGHTS_PATH", str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match=r"0 of 5 networks.*totalseg_download_weights -t total"):
        segment(ct)
    assert not package.calls
    (tmp_path / "none" / WEIGHTS[0]).mkdir(parents=True)  # a folder alone is what a broken download leaves
    with pytest.raises(FileNotFoundError, match="0 of 5"):
        find_weights()


def test_absent_package_says_what_to_install(ct, monkeypatch):
    monkeypatch.setitem(sys.modules, "totalsegmentator", None)
    with pytest.raises(ImportError, match=r"pip install 'radrepro\[seg\]'"):
        segment(ct)


def test_another_version_is_refused(ct, package, monkeypatch):
    old = {k: name.replace("atrial_appendage_left", "heart_atrium_left") for k, name in CLASSES.items()}
    monkeypatch.setattr(sys.modules["totalsegmentator.map_to_binary"], "class_map", {"total": old})
    with pytest.raises(ValueError, match=r"expected the classes of TotalSegmentator v2.*atrial_appendage_left"):
        segment(ct)
    assert not package.calls


def test_another_grid_and_strange_numbers_are_refused(ct, tmp_path):
    moved = volume(np.zeros(ct.shape, np.uint8), **{a: ct[a].values + (a == "z") for a in AXES}, units="1")
    with pytest.raises(ValueError, match="expected the CT's grid"):
        read_buckets(write_nifti(moved, tmp_path / "a.nii.gz"), CLASSES, ct)
    strange = volume(np.full(ct.shape, 200, np.uint8), **{a: ct[a].values for a in AXES}, units="1")
    with pytest.raises(ValueError, match=r"got \[200\]"):
        read_buckets(write_nifti(strange, tmp_path / "b.nii.gz"), CLASSES, ct)


def test_labels_are_written_once_and_read_as_buckets(ct, package, tmp_path, monkeypatch):
    monkeypatch.setattr("radrepro.data.segment.version", lambda name: "2.9")
    write_nifti(ct, tmp_path / "ct.nii.gz")
    labels = read_nifti(write_labels(tmp_path), units="1")
    names = json.loads((tmp_path / "labels.json").read_text())
    assert labels.values[2, 3, 7] == names["labels.nii.gz"]["bones"] == 1 and "2.9" in names["made_by"]
    assert set(names["labels.nii.gz"]) == set(BUCKETS.values()) - {"pulmonary artery", "myocardium"}
    with pytest.raises(FileExistsError, match="expected a case without labels"):
        write_labels(tmp_path)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".labels")]
