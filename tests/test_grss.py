"""GRSS: Paper A's Table 1, exact inverses, sign and scale of a shift, and the views against the paper's way."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from radrepro.data.manifests import read_claims
from radrepro.kv2ct.grss import (
    GRSS,
    PRIMARY,
    SECONDARY,
    Sampling,
    crossed_pairs,
    interleave,
    kv_phases,
    matched_pairs,
    phase_pairing,
    polyphase,
    shift_rows,
)

BOTH = pytest.mark.parametrize("sampling", [PRIMARY, SECONDARY], ids=["primary", "secondary"])


def smooth(*shape, seed=0):
    """A smooth random image, so that interpolating it is well defined."""
    return torch.from_numpy(ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 2)).float()


def a_set(sampling, n_kv=2, n_ct=2, pairs=None, **kw):
    cts = [smooth(12, 12, 16, seed=i) for i in range(n_ct)]
    kvs = [smooth(2, 36, 24, seed=10 + i) for i in range(n_kv)]
    grss = GRSS(cts, kvs, pairs or matched_pairs(range(n_kv)), sampling, ct_spacing_z_mm=2.0, kv_pitch_mm=1.5, **kw)
    return grss, cts, kvs


def test_counts_of_table_1_and_its_three_wrong_cells():
    table = read_claims("kv2ct_table1")
    for column, sampling, wrong in (("n_primary", PRIMARY, [1, 4, 6]), ("n_secondary", SECONDARY, [])):
        counts = []
        for row in table.itertuples():
            ct, kv = torch.zeros(sampling.ct_stride), torch.zeros(2, sampling.kv_stride, sampling.kv_stride)
            pairs = crossed_pairs(row.kv_raw, row.ctor_raw)
            counts.append(len(GRSS([ct] * row.ctor_raw, [kv] * row.kv_raw, pairs, sampling, ct_spacing_z_mm=1.0,
                                   kv_pitch_mm=0.75)))
        assert list(table.patient[table[column] != counts]) == wrong


@settings(deadline=None, max_examples=30)
@given(stride=st.lists(st.integers(1, 4), min_size=2, max_size=3), blocks=st.integers(1, 3), lead=st.integers(0, 2))
def test_polyphase_and_interleave_are_exact_inverses(stride, blocks, lead):
    shape = [2] * lead + [s * blocks for s in stride]
    values = torch.arange(int(np.prod(shape))).reshape(shape)
    phases = polyphase(values, stride)
    assert phases.shape == (np.prod(stride), *[2] * lead, *[blocks] * len(stride))
    assert torch.equal(interleave(phases, stride), values)
    last = np.array(stride) - 1
    assert torch.equal(phases[-1], values[(..., *(slice(int(o), None, s) for o, s in zip(last, stride)))])


@BOTH
def test_pairing_is_a_bijection_that_follows_the_geometry(sampling):
    pairing = phase_pairing(sampling)
    assert len({tuple(p) for p in pairing.tolist()}) == sampling.n_phases == sampling.kv_stride**2
    z, y, _ = torch.unravel_index(torch.arange(sampling.n_phases), sampling.ct_stride)
    assert torch.equal(pairing[:, 0] // (sampling.kv_stride // sampling.ct_stride[0]), z)
    assert torch.equal(pairing[:, 1] // (sampling.kv_stride // sampling.ct_stride[1]), y)


@BOTH
@pytest.mark.parametrize("interpolation", ["cubic", "linear"])
def test_views_are_what_shifting_everything_and_slicing_gives(sampling, interpolation):
    grss, cts, kvs = a_set(sampling, pairs=[(0, 1), (1, 0)], interpolation=interpolation)
    drawn = torch.randint(len(grss), (40,), generator=torch.Generator().manual_seed(2))
    batch = grss.batch(drawn)
    for i, index in enumerate(drawn.tolist()):
        n_shifts = len(sampling.shifts_mm)
        shift_mm = sampling.shifts_mm[index % n_shifts].item()
        phase, pair = index // n_shifts % sampling.n_phases, index // n_shifts // sampling.n_phases
        ct = shift_rows(cts[1 - pair], shift_mm / 2.0, dim=0, interpolation=interpolation)
        kv = shift_rows(kvs[pair], 1.5 * shift_mm / 1.5, dim=1, interpolation=interpolation)
        assert batch.phase[i] == phase and abs(batch.shift_mm[i] - shift_mm) < 1e-5
        torch.testing.assert_close(batch.ct[i], polyphase(ct, sampling.ct_stride)[phase], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(batch.kv[i], kv_phases(kv, sampling)[phase], atol=1e-5, rtol=1e-5)


def test_all_phases_at_no_shift_put_the_ct_together_to_the_bit():
    grss, cts, _ = a_set(SECONDARY)
    middle = len(SECONDARY.shifts_mm) // 2
    whole = interleave(grss.batch(torch.arange(4) * len(SECONDARY.shifts_mm) + middle).ct, SECONDARY.ct_stride)
    assert torch.equal(whole, cts[0])


@pytest.mark.parametrize("rows", [-3.0, -0.4, 0.0, 1.0, 2.7])
def test_shift_is_towards_larger_indices_exact_for_parabolas_and_repeats_the_edge(rows):
    ramp = torch.arange(30.0, dtype=torch.float64)
    moved = shift_rows((ramp**2)[:, None].expand(-1, 3), rows, dim=0)
    torch.testing.assert_close(moved[5:-5, 1], ((ramp - rows) ** 2)[5:-5])
    if rows == int(rows):
        torch.testing.assert_close(moved[:, 0], (ramp - rows).clamp(0, 29) ** 2)


def test_linear_matches_scipy_to_rounding_and_cubic_is_close_to_its_spline():
    ct = smooth(24, 9, 8)
    ours = {i: shift_rows(ct, 1.3, dim=0, interpolation=i).numpy() for i in ("linear", "cubic")}
    orders = {"linear": 1, "cubic": 3}
    theirs = {i: ndimage.shift(ct.numpy(), (1.3, 0, 0), order=o, mode="nearest") for i, o in orders.items()}
    np.testing.assert_allclose(ours["linear"], theirs["linear"], atol=1e-6)
    off = {i: np.abs(ours[i] - theirs["cubic"])[3:-3].max() for i in ours}
    assert off["cubic"] < 0.4 * off["linear"], off


def test_a_point_moves_by_s_in_the_ct_and_by_one_and_a_half_s_on_the_receptor():
    ct, kv = torch.zeros(48, 3, 4), torch.zeros(2, 60, 6)
    ct[20], kv[:, 30] = 1, 1
    grss = GRSS([ct], [kv], [(0, 0)], PRIMARY, ct_spacing_z_mm=1.0, kv_pitch_mm=0.75)
    order = torch.argsort(phase_pairing(PRIMARY) @ torch.tensor([6, 1]))
    for number, shift_mm in enumerate(PRIMARY.shifts_mm.tolist()):
        b = grss.batch(torch.arange(36) * 101 + number)
        profile = interleave(b.ct, PRIMARY.ct_stride).mean((1, 2))
        rows = interleave(b.kv[order], (6, 6)).mean((0, 2))
        assert abs(float((profile * torch.arange(48)).sum()) * 1.0 - 20.0 - shift_mm) < 1e-3
        assert abs(float((rows * torch.arange(60)).sum() - 30) * 0.75 - 1.5 * shift_mm) < 1e-3


def test_the_shift_of_the_image_is_that_of_a_projection_of_the_shifted_patient():
    project, volume = pytest.importorskip("radrepro.core.project"), pytest.importorskip("radrepro.core.volume")
    grid = volume.centred_grid((48, 36, 40), 4.0)
    z, y, x = np.meshgrid(*grid.values(), indexing="ij")
    head = volume.volume(0.02 / (1 + np.exp((np.sqrt(z**2 / 1.4 + y**2 + x**2) - 50) / 3)), **grid, units="1/mm")
    geometry = project.kv_geometry(4.0)
    image = torch.from_numpy(project.line_integrals(head, geometry).values)
    for shift_mm in (-5.0, 1.7, 5.0):
        true = torch.from_numpy(project.line_integrals(head, geometry, pose=volume.rigid((0, 0, shift_mm))).values)
        error = (shift_rows(image, 1.5 * shift_mm / geometry.pixel_mm, dim=1) - true).square().mean().sqrt()
        unmoved = (image - true).square().mean().sqrt()
        wrong = (shift_rows(image, shift_mm / geometry.pixel_mm, dim=1) - true).square().mean().sqrt()
        assert error < 0.1 * unmoved < wrong, f"{shift_mm} mm: {error / unmoved:.3f} of the effect is left"


def test_draws_are_uniform_depend_on_the_generator_alone_and_hold_one_copy():
    grss, cts, kvs = a_set(PRIMARY)
    state = torch.get_rng_state()
    a, b = (grss.sample_batch(500, torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a, b)) and torch.equal(state, torch.get_rng_state())
    assert a.phase.bincount(minlength=36).min() > 0 and abs(a.shift_mm.mean()) < 0.5 and 2.5 < a.shift_mm.std() < 3.3
    assert grss.nbytes == sum(t.nbytes for t in (*cts, *kvs))
    assert grss.batch(torch.zeros(0, dtype=torch.long)).ct.shape == (0, 4, 4, 4)


@pytest.mark.parametrize("wrong, words", [
    (lambda: Sampling((2, 2, 2), 2, 0.1), "change one stride"),
    (lambda: phase_pairing(Sampling((4, 1, 1), 2, 0.1)), "multiple of 4"),
    (lambda: polyphase(torch.zeros(7, 6), (2, 2)), "crop or pad"),
    (lambda: interleave(torch.zeros(3, 2, 2), (2, 2)), "expected 4 phases"),
    (lambda: shift_rows(torch.zeros(4), 1.0, dim=0, interpolation="spline"), "choose one"),
    (lambda: a_set(PRIMARY, pairs=[(0, 2)]), "crossed_pairs"),
    (lambda: GRSS([torch.zeros(6, 6, 8), torch.zeros(6, 6, 4)], [torch.zeros(2, 6, 6)], [(0, 0)], PRIMARY,
                  ct_spacing_z_mm=1.0, kv_pitch_mm=1.0), "one shape"),
    (lambda: GRSS([torch.zeros(7, 6, 8)], [torch.zeros(2, 6, 6)], [(0, 0)], PRIMARY,
                  ct_spacing_z_mm=1.0, kv_pitch_mm=1.0), "multiples of 3"),
])
def test_bad_input_says_what_was_expected(wrong, words):
    with pytest.raises(ValueError, match=words):
        wrong()


def test_indices_beyond_the_set_are_refused():
    grss, *_ = a_set(PRIMARY)
    with pytest.raises(IndexError, match="sample_batch"):
        grss.batch(torch.tensor([len(grss)]))
