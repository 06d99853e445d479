"""The hierarchical ViT: every size, what attention may see, padding, phases, seeds, and that it learns a shift."""
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from radrepro.kv2ct.grss import GRSS, PRIMARY, polyphase
from radrepro.kv2ct.model import Block, HierarchicalViT, Merge, Unmerge, ViTConfig, WindowAttention


def config(**kw):
    sizes = {"kv_shape": (14, 14), "out_shape": (12, 6, 6), "n_phases": 36, "patch": 7, "encoder_dims": (16,),
             "decoder_dims": (16,), "head_dim": 8}
    return ViTConfig(**(sizes | kw))


@settings(deadline=None, max_examples=20)
@given(kv=st.tuples(st.integers(5, 30), st.integers(5, 30)), out=st.tuples(*[st.integers(2, 19)] * 3),
       patch=st.integers(2, 6), window=st.integers(2, 5), levels=st.integers(1, 2), unmerges=st.integers(1, 3),
       per_position=st.booleans(), phase_code=st.booleans())
def test_any_size_works_and_starts_at_zero(kv, out, patch, window, levels, unmerges, per_position, phase_code):
    model = HierarchicalViT(config(kv_shape=kv, out_shape=out, patch=patch, window=window, per_position=per_position,
                                   encoder_dims=(8, 16)[:levels], decoder_dims=(16, 8, 8)[:unmerges],
                                   phase_code=phase_code))
    y = model(torch.randn(2, 2, *kv), torch.tensor([0, 35]))
    assert y.shape == (2, *out) and not y.any() and torch.isfinite(y).all()


def test_every_parameter_gets_a_gradient_once_the_last_layer_is_not_zero():
    model = HierarchicalViT(config(kv_shape=(27, 30), patch=3, window=4, encoder_dims=(16, 32), decoder_dims=(32, 16),
                                   encoder_depths=(2, 1), decoder_depths=(1, 2)))
    torch.nn.init.normal_(model.weight, generator=torch.Generator().manual_seed(0))
    model(torch.randn(2, 2, 27, 30), torch.tensor([1, 2])).square().sum().backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still


@pytest.mark.parametrize("shifted", [False, True])
def test_windowed_attention_is_attention_within_its_windows(shifted):
    """Against plain attention, one window at a time, on a plane that must be padded."""
    attention = WindowAttention(16, (7, 9), window=4, head_dim=8, shifted=shifted)
    (sh, sw), x = attention.size, torch.randn(2, 7, 9, 16)
    assert (sh, sw) == (4, 3)
    rows, columns = ([0, 2, 6, 7], [0, 1, 4, 7, 9]) if shifted else ([0, 4, 7], [0, 3, 6, 9])  # borders of windows
    expected = torch.empty_like(x)
    for r in pairwise(rows):
        for c in pairwise(columns):
            window = x[:, slice(*r), slice(*c)]
            q, k, v = attention.qkv(window.flatten(1, 2)).view(2, -1, 3, 2, 8).permute(2, 0, 3, 1, 4)
            y = ((q @ k.transpose(-1, -2)) / 8**0.5).softmax(-1) @ v
            expected[:, slice(*r), slice(*c)] = attention.out(y.transpose(1, 2).flatten(2)).view(window.shape)
    torch.testing.assert_close(attention(x), expected, atol=1e-5, rtol=1e-4)


def test_unmerging_and_merging_keep_the_place_of_a_token():
    merge, unmerge = Merge(4, 16), Unmerge(16, 4)
    with torch.no_grad():
        for layer in (merge, unmerge):
            layer.linear.weight.copy_(torch.eye(16))
            layer.linear.bias.zero_()
    x = torch.randn(1, 6, 8, 4)
    torch.testing.assert_close(unmerge(merge(x)), x)
    torch.testing.assert_close(merge(x)[0, 1, 2], torch.cat([x[0, 2, 4], x[0, 2, 5], x[0, 3, 4], x[0, 3, 5]]))


def test_a_block_with_silent_layers_is_the_identity():
    block = Block(16, (4, 4), window=4, head_dim=8, mlp_ratio=2.0, shifted=False)
    with torch.no_grad():
        for layer in (block.attention.out, block.mlp[2]):
            layer.weight.zero_()
            layer.bias.zero_()
    x = torch.randn(1, 4, 4, 16)
    assert torch.equal(block(x), x)


def test_a_token_makes_its_own_rows_and_columns_of_the_volume():
    model = HierarchicalViT(config(kv_shape=(28, 21), out_shape=(8, 5, 6)))  # plane 4 x 3: blocks of 2 rows, 2 columns
    tokens = torch.zeros(1, 4, 3, 16)
    tokens[0, 3, 1] = 1
    torch.nn.init.ones_(model.weight)
    hit = model._to_volume(tokens)[0].nonzero()
    assert hit.min(0).values.tolist() == [6, 0, 2] and hit.max(0).values.tolist() == [7, 4, 3] and len(hit) == 2 * 5 * 2


def test_switches_do_what_they_say():
    kv, phases = torch.randn(1, 2, 14, 14), [torch.tensor([p]) for p in (0, 7)]
    for code in (True, False):
        model = HierarchicalViT(config(phase_code=code))
        torch.nn.init.normal_(model.weight)
        assert torch.equal(model(kv, phases[0]), model(kv, phases[1])) is not code
    own, shared = (HierarchicalViT(config(per_position=p)).weight.shape for p in (True, False))
    assert own[0] == 4 and shared[0] == 1 and own[1:] == shared[1:]


def test_seed_decides_the_weights_and_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    a, b, c = (HierarchicalViT(config(), seed=s).state_dict() for s in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(a["embed.weight"], c["embed.weight"])


def test_the_sizes_of_the_paper_fit():
    with torch.device("meta"):
        for kv, out, phases, patch in (((168, 168), (128, 112, 112), 36, 3), ((504, 504), (112, 112, 173), 4, 7)):
            model = HierarchicalViT(ViTConfig(kv, out, phases, patch, (96, 192, 384), (384, 192, 96, 96), head_dim=32))
            y = model(torch.empty(2, 2, *kv), torch.zeros(2, dtype=torch.long))
            assert y.shape == (2, *out)


@pytest.mark.parametrize("kw, words", [
    ({"encoder_depths": (1, 2)}, "one per level"),
    ({"decoder_dims": (20,)}, "multiples of head_dim"),
    ({"encoder_dims": ()}, "encoder_dims"),
])
def test_a_configuration_that_cannot_be_is_refused(kw, words):
    with pytest.raises(ValueError, match=words):
        config(**kw)


def test_a_kv_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"expected kv of shape \(B, 2, 14, 14\)"):
        HierarchicalViT(config())(torch.zeros(1, 2, 21, 14), torch.zeros(1, dtype=torch.long))


def test_it_learns_to_follow_a_shift():
    noise = torch.randn(1, 1, 24, 12, 16, generator=torch.Generator().manual_seed(3))
    ct = 5 * F.avg_pool3d(F.avg_pool3d(noise, 3, 1, 1), 3, 1, 1)[0, 0]
    views = [F.interpolate(ct.sum(axis)[None, None], scale_factor=2, mode="bilinear")[0, 0] for axis in (1, 2)]
    kv = torch.stack([F.pad(i, (0, 60 - i.shape[1], 6, 6)) for i in views]) / 5
    samples = GRSS([ct], [kv], [(0, 0)], PRIMARY, ct_spacing_z_mm=4.0, kv_pitch_mm=3.0)
    still = polyphase(ct, PRIMARY.ct_stride)
    model = HierarchicalViT(ViTConfig(samples.kv_shape, samples.ct_shape, 36, 5, (32,), (64,)), seed=1)
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(250):
        b = samples.sample_batch(16, torch.Generator().manual_seed(step))
        loss = F.smooth_l1_loss(model(b.kv, b.phase), b.ct - still[b.phase], beta=0.1)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    b = samples.sample_batch(200, torch.Generator().manual_seed(999))
    with torch.no_grad():
        left = (model(b.kv, b.phase) - (b.ct - still[b.phase])).abs().mean() / (b.ct - still[b.phase]).abs().mean()
        mirrored = (model(b.kv, b.phase) + (b.ct - still[b.phase])).abs().mean() / (b.ct - still[b.phase]).abs().mean()
    assert left < 0.45 and mirrored > 1.5
