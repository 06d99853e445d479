"""Figures show what they were given: sides, signs, units, counts, and nothing that was typed by hand."""
import json
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from radrepro.core.project import KVGeometry, kv_geometry, project_points
from radrepro.core.volume import centred_grid, volume
from radrepro.data.headneck import phantom_patient
from radrepro.data.manifests import read_claims
from radrepro.kv2ct.fit import Converter
from radrepro.kv2ct.model import HierarchicalViT, ViTConfig
from radrepro.report.figures import BIN_MM, COLOURS, SCALES, figure_2a, figure_4, plotted_numbers, save_figure
from radrepro.report.figures_model import figure_1, model_stages
from radrepro.report.figures_profiles import figure_2b, figure_2c, worst_stretch
from radrepro.report.figures_room import figure_3, room
from radrepro.report.figures_viewer import VIEWER_SLICES, slice_viewer
from radrepro.report.figures_volumes import difference, figure_2d, picture
from radrepro.train.presets import get_preset

ROOT = Path(__file__).parents[1]
GRID = centred_grid((18, 20, 22), 4.0)


def hu(values=0.0):
    return volume(np.zeros((18, 20, 22), np.float32) + np.asarray(values, np.float32), **GRID, units="HU")


def changed(by=100.0, **where):
    """Zero HU, but `by` in a block given by (first, last) mm per axis."""
    v = hu()
    v.loc[{a: slice(*ends) for a, ends in where.items()}] = by
    return v


def traces(figure) -> dict:
    return {t.name: t for t in figure.data}


@pytest.fixture(scope="module")
def patient():
    return phantom_patient(3, voxel_mm=8, seed=1)


def test_2a_is_the_share_that_exceeds():
    body = volume(np.ones((18, 20, 22), bool), **GRID, units="1")
    noise = np.random.default_rng(0).exponential(40.0, (18, 20, 22))
    figure = figure_2a(hu(), {"fused": hu(noise), "primary": hu(-noise)}, body, cohort="phantom")
    curve = figure.data[0]
    assert np.allclose(curve.y, 100 * np.exp(-np.asarray(curve.x) / 40), atol=2)
    assert np.array_equal(curve.y, figure.data[2].y)  # too much and too little count alike
    assert abs(figure.data[1].x[0] - 40 * np.log(20)) < 6 and list(figure.data[1].y) == [5]
    paper = next(t for t in figure.data if "paper" in t.name)
    assert paper.x[0] == read_claims("kv2ct_figures").value[0] and paper.y[0] == 5
    with pytest.raises(ValueError, match="HU"):
        figure_2a(hu(), {"fused": volume(noise, **GRID, units="Gy")}, body, cohort="phantom")


@pytest.mark.parametrize("start", [-30, -6, 14])
def test_the_worst_stretch_is_where_it_was_put(start):
    sct = changed(x=(start, start + 15))
    low, high, gap = worst_stretch(hu().sel(z=2, y=2), sct.sel(z=2, y=2), 16)
    assert abs(low - start) <= 2 and abs(high - start - 16) <= 2 and gap == 100


def test_2b_lines_run_where_they_say():
    sct = changed(x=(10, 25), y=(-4, 8), z=(0, 4))
    shown = traces(figure_2b(hu(), {"fused": sct}, at_mm=(2, 2, 18), cohort="phantom"))
    rl, ap = shown["fused"], shown["fused, A-P"]
    assert np.allclose(np.asarray(rl.x)[np.asarray(rl.y) > 0], GRID["x"][(GRID["x"] >= 10) & (GRID["x"] <= 25)])
    assert np.allclose(np.asarray(ap.x)[np.asarray(ap.y) > 0], GRID["y"][(GRID["y"] >= -4) & (GRID["y"] <= 8)])
    assert np.ptp(shown["A-P box"].x) == 0 and np.ptp(shown["R-L box"].y) == 0  # the lines in the picture are at a right angle
    beside = traces(figure_2b(hu(), {"fused": sct}, at_mm=(20, 2, 18), cohort="phantom"))
    assert not np.any(beside["fused"].y)  # another slice: nothing was changed there


def test_2c_needs_the_same_fields_in_gray():
    dose = volume(np.ones((18, 20, 22), np.float32), **GRID, units="Gy")
    figure = figure_2c({"60°": dose, "total": dose}, {"60°": dose, "total": dose}, at_mm=(2, 2, 2), cohort="phantom")
    dashes = {t.name: t.line.dash for t in figure.data}
    assert dashes["60° on gCT"] == "solid" and dashes["60° on sCT"] == "dash" and len(figure.data) == 8
    with pytest.raises(ValueError, match="same fields"):
        figure_2c({"60°": dose}, {"180°": dose}, at_mm=(2, 2, 2), cohort="phantom")
    with pytest.raises(ValueError, match="Gy"):
        figure_2c({"60°": dose}, {"60°": hu()}, at_mm=(2, 2, 2), cohort="phantom")


def test_2d_signs_sides_and_centred_scale():
    box = {"z": slice(2, 16), "y": slice(3, 17), "x": slice(4, 18)}
    left_anterior = changed(by=150.0, x=(4, 60), y=(-60, -4))
    figure = figure_2d(hu(), left_anterior, hu(-20), box, cohort="phantom")
    shown = traces(figure)
    gap = shown["fused − gCT, axial"]
    hot = np.argwhere(np.asarray(gap.z) == 150)
    assert len(hot) and (np.asarray(gap.x)[hot[:, 1]] > 0).all() and (np.asarray(gap.y)[hot[:, 0]] < 0).all()  # left is +x, anterior -y
    assert (np.asarray(shown["primary − gCT, sagittal"].z) == -20).all()
    axes = {a: figure.layout[a] for a in figure.layout if a.startswith("yaxis")}
    reversed_ = [n for n, a in axes.items() if a.autorange == "reversed"]
    assert len(reversed_) == 5 and figure.layout.yaxis.autorange is True  # axial planes: anterior up; sagittal: superior up
    assert figure.layout.coloraxis2.cmin == -figure.layout.coloraxis2.cmax == SCALES["HU difference"]["cmin"]
    titles = " ".join(a.text for a in figure.layout.annotations)
    assert "20.0 HU" in titles


def test_another_grid_is_refused_not_cut():
    moved = hu().assign_coords(x=hu().x + 4)
    with pytest.raises(ValueError, match="one grid"):
        difference(moved, hu())
    with pytest.raises(ValueError, match="HU"):
        slice_viewer(volume(hu().values, **GRID, units="Gy"), hu(), cohort="phantom")


def test_a_picture_of_a_line_is_refused():
    with pytest.raises(ValueError, match="dims"):
        picture(hu().sel(z=2, y=2), "HU", "line")


def test_viewer_frames_are_the_slices():
    ramp = hu(GRID["z"][:, None, None])
    figure = slice_viewer(ramp, hu(), cohort="phantom", dose=volume(np.ones(ramp.shape, np.float32), **GRID, units="Gy"))
    assert 1 < len(figure.frames) <= VIEWER_SLICES and len(figure.layout.sliders[0].steps) == len(figure.frames)
    for frame in figure.frames:
        assert np.unique(frame.data[0].z) == float(frame.name) and np.unique(frame.data[2].z) == -float(frame.name)  # sCT minus gCT
    assert [step.args[0][0] for step in figure.layout.sliders[0].steps] == [frame.name for frame in figure.frames]


def test_viewer_stays_light():
    grid = centred_grid((192, 168, 224), 2.0)
    v = volume(np.zeros((192, 168, 224), np.int16), **grid, units="HU")
    figure = slice_viewer(v, v, cohort="phantom")
    assert len(figure.to_json()) < 4_000_000 and len(figure.frames) <= VIEWER_SLICES
    assert np.allclose(np.diff(figure.data[0].x), 4)


@pytest.mark.parametrize("geometry", [kv_geometry(8), KVGeometry(2.0, (300, 200), sad_mm=1000, magnification=1.3)])
def test_the_room_is_that_of_the_projector(geometry):
    for i, (view, place) in enumerate(room(geometry).items()):
        assert np.isclose(np.linalg.norm(place["source"]), geometry.sad_mm)
        halfway = place["source"] + 0.5 * (place["receptor"] - place["source"])  # a point on each corner's ray
        v, u = project_points(halfway, geometry)[i].T
        assert np.allclose(np.abs(v), geometry.shape_px[0] * geometry.pixel_mm / 2)
        assert np.allclose(np.abs(u), geometry.shape_px[1] * geometry.pixel_mm / 2)


def test_3_shows_couch_and_noise_only_in_the_kv_image(patient):
    figure = figure_3(patient, most_px=126)
    shown = traces(figure)
    kv, drr = (np.asarray(shown[f"LAT, {n}"].z) for n in ("kV image", "DRR"))
    behind = np.asarray(shown["LAT, DRR"].x) > 230  # posterior of the helmet: air, but for the couch
    assert kv[:, behind].max() > 0.3 and abs(drr[:, behind]).max() < 0.05 < kv.std()
    head, shoulders = (np.asarray(drr)[np.asarray(shown["LAT, DRR"].y) * s > 250].sum() for s in (1, -1))
    assert shoulders > head  # superior is up
    assert "phantom cohort" in figure.layout.title.text


def test_1_draws_what_the_modules_say(patient):
    plan = get_preset("quick").kv2ct
    converters = [Converter(patient, w, getattr(plan, w)) for w in ("primary", "secondary")]
    figure = figure_1(*converters, cohort="phantom")
    words = [t.text[0] for t in figure.data]
    for c in converters:
        stages = model_stages(c.model)
        assert stages.parameters.sum() == sum(p.numel() for p in c.model.parameters())
        assert stages.iloc[-1]["shape"] == c.samples.ct_shape
        assert any(" × ".join(map(str, c.samples.ct_shape)) in w for w in words) and any(f"{c.sampling.n_phases} phases" in w for w in words)


def test_stages_follow_levels_and_windows():
    model = HierarchicalViT(ViTConfig((42, 35), (12, 10, 12), 4, 3, (16, 32), (32, 16, 16), window=4, phase_code=False))
    by = model_stages(model).set_index("name")
    assert list(by.index) == ["embedding", "encoder 1", "encoder 2", "bridge", "decoder 1", "decoder 2", "decoder 3", "blocks of HU"]
    assert by.loc["encoder 1", "shape"] == (14, 12, 16) and by.loc["encoder 2", "shape"] == (7, 6, 32)
    down, across = by.loc["encoder 1", "windows"]
    assert down * by.loc["encoder 1", "window"][0] >= 14 and across * by.loc["encoder 1", "window"][1] >= 12
    assert by.loc["encoder 2", "heads"] == 2 and by.parameters.sum() == sum(p.numel() for p in model.parameters())


def test_4_counts_every_shift_once():
    errors = pd.DataFrame([{"patient": p, "model": m, "shift_mm": 0.5 * p, "error_mm": abs(-1 + k * 0.1)} for m in ("fused", "mean_ct")
                           for p in range(1, 11) for k in range(11)])
    bars = [t for t in figure_4(errors, cohort="phantom").data if t.type == "bar"]
    assert sum(np.sum(t.y) for t in bars) == len(errors) and {int(n) for t in bars for n in t.y} == {1}  # 1 - 0.7 stays in its bin
    assert all(t.width == BIN_MM and t.offset == 0 for t in bars) and bars[0].x[0] == 0
    paper = next(t for t in figure_4(errors, cohort="phantom").data if t.name == "paper's mean")
    assert paper.x[0] == float(read_claims("kv2ct_table6").set_index("patient").shift_error_mm["printed_mean_in_text"])
    with pytest.raises(ValueError, match="error_mm"):
        figure_4(errors.drop(columns="error_mm"), cohort="phantom")


def test_three_files_and_one_line_without_a_browser(tmp_path, monkeypatch, capsys):
    figure = go.Figure(go.Scatter(x=[1.0, 2.0], y=[3.0, 4.5], name="line"))

    def no_browser(*_, **__):
        raise RuntimeError("\n\nKaleido requires Google Chrome to be installed.\n\nmore")

    monkeypatch.setattr(go.Figure, "to_image", no_browser)
    paths = save_figure(figure, tmp_path / "new", "f")
    assert [p.name for p in paths] == ["f.html", "f.csv"] and all(p.exists() for p in paths)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "f.png" in said and "Chrome" in said
    assert paths[0].stat().st_size < 20_000 and "plotly" in paths[0].read_text()  # the script is named, not copied
    again = pd.read_csv(paths[1])
    assert again.x.tolist() == [1, 2] and again.y.tolist() == [3, 4.5] and set(again.trace) == {"line"}
    monkeypatch.setattr(go.Figure, "to_image", lambda *_, **__: b"png")
    assert save_figure(figure, tmp_path, "f")[-1].read_bytes() == b"png"


def test_the_numbers_of_a_picture_keep_their_axes():
    v = changed(by=77.0, y=(-6, -2), x=(10, 14))
    numbers = plotted_numbers(go.Figure(picture(v.sel(z=2), "HU", "axial")))
    hot = numbers[numbers.value == 77]
    assert len(numbers) == 20 * 22 and sorted(hot.x.unique()) == [10, 14] and sorted(hot.y.unique()) == [-6, -2]


def test_no_two_models_share_a_colour():
    assert len(set(COLOURS.values())) == len(COLOURS)


def test_the_page_of_figures_has_parameters_and_refuses_others():
    cells = json.loads((ROOT / "nbs" / "figures.ipynb").read_text())["cells"]
    tagged = ["".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    names: dict = {}
    exec(tagged[0], names)  # noqa: S102  a page is code
    given = {k for k in names if not k.startswith("_")}
    check = next("".join(c["source"]) for c in cells if "refuse_unknown(globals()" in "".join(c["source"]))
    assert all(f'"{name}"' in check for name in given)
    exec(tagged[0] + "\n" + check, {})  # noqa: S102
    with pytest.raises(ValueError, match="pateint"):
        exec(tagged[0] + "\npateint = 2\n" + check, {})  # noqa: S102
