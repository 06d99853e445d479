"""core.warp against answers known by hand, on uneven spacing, and against MONAI where its borders do not matter."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from radrepro.core import warp as module
from radrepro.core.volume import centred_grid, from_tensor, move, rigid, to_tensor, volume
from radrepro.core.warp import compose, exp_velocity, exp_warp, jacobian_determinant, upsample_field, warp

SPACING = (3.0, 2.0, 1.5)
SHAPE = (12, 14, 16)
mm = st.floats(-20, 20, width=32)


def points_mm(shape=SHAPE, spacing=SPACING) -> torch.Tensor:
    """(3, z, y, x): where each voxel centre lies."""
    return torch.from_numpy(np.stack(np.meshgrid(*centred_grid(shape, spacing).values(), indexing="ij"))).float()


def linear(matrix, shape=SHAPE, spacing=SPACING) -> torch.Tensor:
    return torch.einsum("ij,jzyx->izyx", torch.as_tensor(matrix, dtype=torch.float32), points_mm(shape, spacing))[None]


def smooth_velocity(n=32, amplitude_mm=4.0, seed=0) -> torch.Tensor:
    """A few long waves with random phases, that fade to nothing at the border."""
    rng = np.random.default_rng(seed)
    t = torch.pi * (torch.arange(n) + 0.5) / n
    taper = torch.sin(t) ** 2
    taper = taper[:, None, None] * taper[None, :, None] * taper[None, None, :]

    def wave():
        z, y, x = (torch.cos(t + phase) for phase in rng.uniform(0, 2 * np.pi, 3))
        return z[:, None, None] + y[None, :, None] + x[None, None, :]

    return amplitude_mm / 2 * torch.stack([wave() for _ in range(3)])[None] * taper


def random_picture(seed=0, batch=1, channels=1, shape=SHAPE) -> torch.Tensor:
    return torch.rand(batch, channels, *shape, generator=torch.Generator().manual_seed(seed))


@given(st.tuples(mm, mm, mm), st.integers(0, 8))
@settings(max_examples=20, deadline=None)
def test_constant_velocity_is_its_own_exponential_also_at_the_border(v_mm, squarings):
    v = torch.tensor(v_mm).view(1, 3, 1, 1, 1).expand(1, 3, *SHAPE)
    torch.testing.assert_close(exp_velocity(v, SPACING, squarings=squarings), v, atol=1e-4, rtol=1e-5)


@given(st.lists(st.floats(-0.15, 0.15), min_size=9, max_size=9))
@settings(max_examples=20, deadline=None)
def test_linear_velocity_gives_the_matrix_exponential(entries):
    a = torch.tensor(entries).view(3, 3)
    shape = (20, 20, 20)
    u = exp_velocity(linear(a, shape), SPACING, squarings=10)
    expected = linear(torch.matrix_exp(a) - torch.eye(3), shape)
    # far inside no flow line comes from beyond the border
    assert (u - expected)[..., 7:-7, 7:-7, 7:-7].abs().max() < 0.02


def test_there_and_back_is_nothing():
    v = smooth_velocity(48, 3.0)
    w = exp_warp(v, (3.0, 3.0, 3.0))
    inside = (..., *[slice(6, -6)] * 3)
    assert w.forward_mm.abs().max() > 2
    assert compose(w.forward_mm, w.inverse_mm, (3.0,) * 3)[inside].abs().max() < 0.01
    assert compose(w.inverse_mm, w.forward_mm, (3.0,) * 3)[inside].abs().max() < 0.01
    assert w.jacobian.shape == (1, 1, 48, 48, 48) and w.jacobian.min() > 0


def test_what_is_left_there_and_back_is_interpolation():
    """It falls with the square of the voxel, for a movement of several voxels."""
    def residue_mm(n, voxel_mm):
        w = exp_warp(smooth_velocity(n, 8.0), (voxel_mm,) * 3, squarings=10)
        return float(compose(w.forward_mm, w.inverse_mm, (voxel_mm,) * 3).abs().max())

    assert residue_mm(48, 3.0) < residue_mm(24, 6.0) / 2.5


def test_halves_of_a_flow_make_the_whole():
    v = smooth_velocity()
    half = exp_velocity(v / 2, (2.0,) * 3, squarings=6)
    whole = exp_velocity(v, (2.0,) * 3, squarings=7)
    torch.testing.assert_close(compose(half, half, (2.0,) * 3), whole, atol=1e-5, rtol=0)


@given(st.tuples(mm, mm, mm), st.tuples(mm, mm, mm))
@settings(max_examples=10, deadline=None)
def test_translations_add(a_mm, b_mm):
    a, b = (torch.tensor(t).view(1, 3, 1, 1, 1).expand(1, 3, *SHAPE).contiguous() for t in (a_mm, b_mm))
    torch.testing.assert_close(compose(a, b, SPACING), a + b, atol=1e-4, rtol=1e-5)


def test_compose_puts_the_inner_map_first():
    """outer = 0.1 x, inner = +3 mm: outer o inner moves by 3 + 0.1 (x + 3), the other way round by 0.1 x + 3."""
    outer, inner = linear(0.1 * np.eye(3)), torch.full((1, 3, *SHAPE), 3.0)
    inside = (..., *[slice(3, -3)] * 3)
    torch.testing.assert_close(compose(outer, inner, SPACING)[inside], (outer + 3.3)[inside], atol=1e-5, rtol=0)
    torch.testing.assert_close(compose(inner, outer, SPACING)[inside], (outer + 3.0)[inside], atol=1e-5, rtol=0)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("voxels", [1, -2])
def test_a_whole_voxel_moves_the_picture_the_right_way(axis, voxels):
    picture = random_picture(channels=2)
    u = torch.zeros(1, 3, *SHAPE)
    u[:, axis] = voxels * SPACING[axis]
    expected = picture.roll(-voxels, axis + 2)  # out(x) = image(x + u): what lies ahead comes here
    edge = slice(0, -voxels) if voxels > 0 else slice(-voxels, None)
    inside = (slice(None),) * (axis + 2) + (edge,)
    torch.testing.assert_close(warp(picture, u, SPACING)[inside], expected[inside], atol=1e-5, rtol=0)
    beyond = warp(picture, u * 100, SPACING).select(axis + 2, 3)
    torch.testing.assert_close(beyond, picture.select(axis + 2, -1 if voxels > 0 else 0), atol=1e-5, rtol=0)


def test_warp_agrees_with_moving_the_volume():
    """A patient moved by +t is pulled by -t: two independent paths, one in (x, y, z), one in (z, y, x)."""
    grid = centred_grid(SHAPE, SPACING)
    z, y, x = np.meshgrid(*grid.values(), indexing="ij")
    blob = volume(np.exp(-((z - 3) ** 2 + (y + 2) ** 2 + (x - 1) ** 2) / 30), **grid, units="1")
    t_xyz = (2.25, -1.0, 1.5)
    u = torch.tensor([-t_xyz[2], -t_xyz[1], -t_xyz[0]]).view(1, 3, 1, 1, 1).expand(1, 3, *SHAPE)
    pulled = from_tensor(warp(to_tensor(blob), u, SPACING), blob)
    moved = move(blob, rigid(t_xyz), fill=0)
    np.testing.assert_allclose(pulled.values[3:-3, 3:-3, 3:-3], moved.values[3:-3, 3:-3, 3:-3], atol=1e-5)


def test_jacobian_of_linear_maps():
    a = np.array([[0.1, 0.05, 0.0], [0.0, -0.2, 0.1], [0.07, 0.0, 0.3]])
    expected = torch.tensor(np.linalg.det(np.eye(3) + a), dtype=torch.float32)
    found = jacobian_determinant(linear(a), SPACING)
    torch.testing.assert_close(found, expected.expand(1, 1, *SHAPE), atol=1e-4, rtol=0)
    turned = 2 * np.diag([0, -1.0, 0])  # y turned round: inside out
    assert (jacobian_determinant(linear(turned), SPACING) < -0.99).all()


def test_volume_is_kept_where_the_determinant_says_so():
    """The integral of det J over the box is the box: nothing flows through a border at rest."""
    v = smooth_velocity(32, 6.0)
    assert abs(float(exp_warp(v, (2.0,) * 3).jacobian.mean()) - 1) < 2e-3


def test_labels_stay_labels():
    labels = random_picture().mul(5).round()
    seen = warp(labels, smooth_velocity(16, 10.0)[..., :12, :14, :], SPACING, mode="nearest")
    assert set(seen.unique().tolist()) <= set(labels.unique().tolist()) and not torch.equal(seen, labels)


def test_upsampling_keeps_millimetres_and_the_box():
    field = points_mm((6, 6, 6), (4.0, 4.0, 4.0))[None]
    fine = points_mm((12, 12, 12), (2.0, 2.0, 2.0))[None]
    torch.testing.assert_close(upsample_field(field, (12, 12, 12))[..., 1:-1, 1:-1, 1:-1], fine[..., 1:-1, 1:-1, 1:-1])


@pytest.mark.parametrize("slab_voxels", [1, 500, 10**9])
@pytest.mark.parametrize("threads", [1, 2])
def test_slabs_and_threads_change_nothing(monkeypatch, slab_voxels, threads):
    """Without gradients the work goes slab by slab; with them in one piece: the same numbers."""
    generator = torch.Generator().manual_seed(3)
    v = upsample_field(5 * torch.randn(2, 3, 3, 3, 3, generator=generator), (13, 14, 16))
    picture = random_picture(batch=2, channels=2, shape=(13, 14, 16))
    wanted = v.clone().requires_grad_(True)
    expected_u = exp_velocity(wanted, SPACING)
    expected = warp(picture, expected_u, SPACING)
    monkeypatch.setattr(module, "_CPU_SLAB_VOXELS", slab_voxels)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    u = exp_velocity(v, SPACING)
    torch.testing.assert_close(u, expected_u.detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(warp(picture, u, SPACING), expected.detach(), atol=1e-5, rtol=0)


def test_gradients_are_right():
    generator = torch.Generator().manual_seed(0)
    v = (torch.rand(1, 3, 3, 4, 4, dtype=torch.float64, generator=generator) - 0.5).requires_grad_(True)
    picture = torch.rand(1, 1, 3, 4, 4, dtype=torch.float64, generator=generator).requires_grad_(True)

    def f(v, picture):
        u = exp_velocity(v, SPACING, squarings=2)
        return warp(picture, u, SPACING), jacobian_determinant(u, SPACING), compose(u, v, SPACING)

    assert torch.autograd.gradcheck(f, (v, picture), eps=1e-7, atol=1e-5)


def test_a_gradient_finds_the_translation():
    """Descent on the displacement that undoes a shift goes the right way along each axis."""
    z, y, x = points_mm()
    blob = torch.exp(-(z**2 + y**2 + x**2) / 40)[None, None]
    shift = torch.tensor([2.0, -1.5, 1.0])
    target = torch.exp(-((z + shift[0]) ** 2 + (y + shift[1]) ** 2 + (x + shift[2]) ** 2) / 40)[None, None]
    u = torch.zeros(1, 3, 1, 1, 1, requires_grad=True)
    for _ in range(60):
        loss = (warp(blob, u.expand(1, 3, *SHAPE), SPACING) - target).square().mean()
        (gradient,) = torch.autograd.grad(loss, u)
        u = (u - 300 * gradient).detach().requires_grad_(True)
    torch.testing.assert_close(u.detach().flatten(), shift, atol=0.1, rtol=0)


def test_half_precision_pictures_and_fields_are_sampled_in_fp32():
    u = smooth_velocity(16, 3.0)[..., :12, :14, :]
    picture = random_picture().half()
    assert warp(picture, u, SPACING).dtype == torch.float16
    assert exp_velocity(u.bfloat16(), SPACING).dtype == torch.float32


def test_single_slices_do_not_divide_by_zero():
    u = torch.full((1, 3, 1, 5, 6), 2.0)
    torch.testing.assert_close(exp_velocity(u, SPACING), u)
    assert torch.isfinite(warp(torch.rand(1, 1, 1, 5, 6), u, SPACING)).all()


def test_agrees_with_monai_inside():
    n = 32
    blocks = pytest.importorskip("monai.networks.blocks")
    v, picture = smooth_velocity(n, 4.0), random_picture(shape=(n, n, n))
    u = exp_velocity(v, (1.0,) * 3)
    theirs = blocks.DVF2DDF(num_steps=7)(v)
    inside = (..., *[slice(2, -2)] * 3)
    torch.testing.assert_close(u[inside], theirs[inside], atol=1e-5, rtol=0)
    torch.testing.assert_close(warp(picture, u, (1.0,) * 3)[inside], blocks.Warp()(picture, theirs)[inside],
                               atol=1e-4, rtol=0)
    constant = torch.full((1, 3, 8, 8, 8), 2.0)
    assert (blocks.DVF2DDF(num_steps=7)(constant) - constant).abs().max() > 0.5  # MONAI's zeros at the border
    torch.testing.assert_close(exp_velocity(constant, (1.0,) * 3), constant)


@pytest.mark.parametrize("call, words", [
    (lambda: exp_velocity(torch.zeros(1, 2, 4, 4, 4), SPACING), "expected a field"),
    (lambda: exp_velocity(torch.zeros(1, 3, 4, 4, 4), (1.0, 0.0, 1.0)), "three positive sizes"),
    (lambda: exp_velocity(torch.zeros(1, 3, 4, 4, 4), SPACING, squarings=-1), "expected >= 0"),
    (lambda: warp(torch.zeros(1, 1, 4, 4, 5), torch.zeros(1, 3, 4, 4, 4), SPACING), "upsample_field"),
    (lambda: warp(torch.zeros(2, 1, 4, 4, 4), torch.zeros(1, 3, 4, 4, 4), SPACING), "on the grid of the field"),
    (lambda: compose(torch.zeros(1, 3, 4, 4, 4), torch.zeros(1, 3, 4, 4, 5), SPACING), "one shape"),
    (lambda: jacobian_determinant(torch.zeros(1, 3, 1, 4, 4), SPACING), "at least 2 voxels"),
])
def test_bad_input_says_what_to_do(call, words):
    with pytest.raises(ValueError, match=words):
        call()
