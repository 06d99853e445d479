"""The pseudo-3D U-Net: who hears of whom, the slice attention against a loop, sizes, weights on disk."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from radrepro.ct5d.unet import CrossAttention, PseudoUNet, SliceAttention, SpatialAttention, TraceEncoder, sinusoids

CHANNELS = (8, 16, 16)


def seeded(block_channels=CHANNELS, **changes) -> PseudoUNet:
    """With a last layer that says something."""
    torch.manual_seed(0)
    net = PseudoUNet(5, 3, block_channels, **{"heads": 4, "trace_dim": 12} | changes).eval()
    torch.nn.init.normal_(net.leave[-1].weight, std=0.1)
    return net


def given_to(net, b=2, d=6, h=8, w=8, n=4):
    g = torch.Generator().manual_seed(1)
    return torch.randn(b, net.config.in_channels, d, h, w, generator=g), torch.randn(b, n, net.config.trace_dim, generator=g)


def silence(net, kind):
    for m in net.modules():
        if isinstance(m, kind):
            torch.nn.init.zeros_(m.out.weight)
            torch.nn.init.zeros_(m.out.bias)


@torch.no_grad()
def test_slice_attention_against_a_loop_over_slices():
    """Weights of slice i on slice j: softmax over j of sum over all places and the head's channels of q_i k_j, over sqrt(c/heads h w)."""
    torch.manual_seed(0)
    b, d, c, h, w, heads = 2, 5, 8, 3, 4, 2
    layer, x = SliceAttention(c, heads), torch.randn(2 * 5, 8, 3, 4)
    e = c // heads
    place = sinusoids(torch.arange(d), c, longest=100.0)
    for volume in range(b):
        slices = [layer.norm(x[volume * d + i][None])[0] for i in range(d)]  # the norm is the slice's own

        def project(conv, t):
            return torch.einsum("oc,chw->ohw", conv.weight[:, :, 0, 0], t) + conv.bias[:, None, None]

        q = [project(layer.q, t + place[i][:, None, None]) for i, t in enumerate(slices)]
        k = [project(layer.k, t + place[i][:, None, None]) for i, t in enumerate(slices)]
        v = [project(layer.v, t) for t in slices]
        for i in range(d):
            seen = torch.zeros(c, h, w)
            for head in range(heads):
                own = slice(head * e, (head + 1) * e)
                scores = torch.stack([(q[i][own] * k[j][own]).sum() / math.sqrt(e * h * w) for j in range(d)])
                for j, weight in enumerate(scores.softmax(0)):
                    seen[own] += weight * v[j][own]
            expected = x[volume * d + i] + project(layer.out, seen)
            torch.testing.assert_close(layer(x, d)[volume * d + i], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_spatial_attention_against_torch():
    """The same as torch's own multi-head attention over the places of each slice."""
    torch.manual_seed(0)
    layer, x = SpatialAttention(8, 2), torch.randn(3, 8, 4, 5)
    theirs = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    theirs.in_proj_weight.copy_(torch.cat([m.weight[:, :, 0, 0] for m in (layer.q, layer.k, layer.v)]))
    theirs.in_proj_bias.copy_(torch.cat([m.bias for m in (layer.q, layer.k, layer.v)]))
    theirs.out_proj.weight.copy_(layer.out.weight[:, :, 0, 0])
    theirs.out_proj.bias.copy_(layer.out.bias)
    tokens = layer.norm(x).flatten(2).mT
    expected = x + theirs(tokens, tokens, tokens)[0].mT.reshape(x.shape)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_cross_attention_against_torch():
    """Queries: every place of every slice of a volume; keys and values: that volume's tokens."""
    torch.manual_seed(0)
    b, d, c = 2, 3, 8
    layer, x, tokens = CrossAttention(c, 2, told=12), torch.randn(b * d, c, 4, 5), torch.randn(b, 6, 12)
    theirs = torch.nn.MultiheadAttention(c, 2, batch_first=True, kdim=12, vdim=12)
    for m, weight in ((layer.k, theirs.k_proj_weight), (layer.v, theirs.v_proj_weight)):
        weight.copy_(m.weight)
    theirs.q_proj_weight.copy_(layer.q.weight[:, :, 0, 0])
    theirs.in_proj_bias.copy_(torch.cat([m.bias for m in (layer.q, layer.k, layer.v)]))
    theirs.out_proj.weight.copy_(layer.out.weight[:, :, 0, 0])
    theirs.out_proj.bias.copy_(layer.out.bias)
    got = layer(x, tokens)
    for i in range(b * d):
        queries = layer.norm(x[i : i + 1]).flatten(2).mT
        told = tokens[i // d][None]
        expected = x[i] + theirs(queries, told, told)[0][0].T.reshape(c, 4, 5)
        torch.testing.assert_close(got[i], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_slices_meet_in_pseudo_3d_attention_only():
    net = seeded()
    sample, tokens = given_to(net)
    changed = sample.clone()
    changed[1, :, 4] += torch.randn(5, 8, 8)

    def reach():
        return (net(changed, 30, tokens) - net(sample, 30, tokens)).abs().amax((1, 3, 4))

    heard = reach()
    assert (heard[0] == 0).all() and (heard[1] > 1e-5).all()
    silence(net, SliceAttention)
    heard = reach()
    assert heard[1, 4] > 1e-2
    heard[1, 4] = 0
    assert (heard == 0).all()


@torch.no_grad()
def test_slices_are_told_apart_by_their_position_only():
    net = seeded()
    sample, tokens = given_to(net)
    order = torch.tensor([5, 3, 1, 0, 2, 4])

    def differ():
        return (net(sample[:, :, order], 30, tokens) - net(sample, 30, tokens)[:, :, order]).abs().max()

    assert differ() > 1e-4
    for m in net.modules():
        if isinstance(m, SliceAttention):  # nothing is asked for: the positions in q and k cannot matter
            torch.nn.init.zeros_(m.q.weight)
            torch.nn.init.zeros_(m.q.bias)
    assert differ() < 1e-5


@pytest.mark.parametrize("block_channels", [(8, 16, 16), (8, 8, 16, 16), (8, 8, 8, 16, 16)])
@torch.no_grad()
def test_the_trace_enters_at_the_three_smallest_levels(block_channels):
    net = seeded(block_channels)
    seen_at = {"down": [], "up": []}
    for branch, sizes in seen_at.items():
        for stage in getattr(net, branch):
            if stage.trace is not None:
                stage.trace.register_forward_hook(lambda m, args, out, sizes=sizes: sizes.append(out.shape[-1]))
    sample, tokens = given_to(net, h=16, w=16)
    out = net(sample, 30, tokens)
    smallest = [16 // 2**i for i in range(len(block_channels))][-3:]
    assert seen_at == {"down": smallest, "up": smallest[::-1]}
    assert sum(isinstance(m, CrossAttention) for m in net.modules()) == 6
    assert sum(isinstance(m, SliceAttention) for m in net.modules()) == 2 * len(block_channels)
    other = tokens.clone()
    other[1] += torch.randn(4, 12)
    change = (net(sample, 30, other) - out).abs().amax((1, 2, 3, 4))
    assert change[0] == 0 and change[1] > 1e-3
    silence(net, CrossAttention)
    assert torch.equal(net(sample, 30, other), net(sample, 30, tokens))


@torch.no_grad()
def test_each_sample_has_its_own_time():
    net = seeded()
    sample, tokens = given_to(net)
    both = net(sample, torch.tensor([3, 700]), tokens)
    torch.testing.assert_close(both[0], net(sample, 3, tokens)[0])
    torch.testing.assert_close(both[1], net(sample, torch.tensor(700), tokens)[1])
    assert (both - net(sample, 3, tokens))[1].abs().max() > 1e-3


@torch.no_grad()
def test_what_is_known_about_a_slice_stays_with_it():
    net = seeded(slice_channels=2)
    silence(net, SliceAttention)
    sample, tokens = given_to(net)
    known = torch.zeros(2, 6, 2)
    told = known.clone()
    told[1, 2, 0] = 1.0
    change = (net(sample, 30, tokens, told) - net(sample, 30, tokens, known)).abs().amax((1, 3, 4))
    assert change.nonzero().tolist() == [[1, 2]]


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(4, 13), st.integers(4, 13))
def test_any_size_with_the_same_parameters(b, d, h, w):
    net = PseudoUNet(5, 3, CHANNELS, heads=4, trace_dim=12)
    sample, tokens = given_to(net, b, d, h, w)
    out = net(sample, 30, tokens)
    assert out.shape == (b, 3, d, h, w) and (out == 0).all()  # the last layer starts at zero


@torch.no_grad()
def test_the_plane_is_not_transposed():
    """A change in the corner y = 0, x = last stays nearest to that corner, on a plane that is not square."""
    net = seeded()
    for kind in (SliceAttention, SpatialAttention):
        silence(net, kind)
    sample, tokens = given_to(net, 1, 2, 16, 24)
    changed = sample.clone()
    changed[:, :, 1, 0, 23] += 5.0
    change = (net(changed, 30, tokens) - net(sample, 30, tokens)).abs()[0].amax(0)
    assert (change[0] == 0).all()
    assert divmod(int(change[1].argmax()), 24) in [(y, x) for y in range(3) for x in range(21, 24)]


@torch.no_grad()
def test_trace_tokens():
    torch.manual_seed(0)
    encoder = TraceEncoder(trace_features=2, trace_dim=8)
    trace = torch.rand(3, 23, 2)
    tokens = encoder(trace)
    assert tokens.shape == (3, 6, 8)
    changed = trace.clone()
    changed[1, 2, 1] += 1
    moved = (encoder(changed) - tokens).abs().amax(2)
    assert (moved[[0, 2]] == 0).all() and moved[1].argmax() in (0, 1) and (moved[1, 3:] == 0).all()
    constant = encoder(torch.ones(1, 400, 2))[0]  # tokens of a constant trace differ by their place only
    assert (constant[20] - constant[21]).abs().max() > 1e-2
    for bad, words in ((trace[..., :1], "trace: expected"), (trace.mT, "trace: expected"), (trace / 0, "finite")):
        with pytest.raises(ValueError, match=words):
            encoder(bad)


def test_sinusoids_are_shift_invariant():
    where = sinusoids(torch.arange(30), 16, longest=100.0)
    assert (where[0, :8] == 0).all() and (where[0, 8:] == 1).all()
    near = where @ where.T
    for lag in (1, 4):
        torch.testing.assert_close(near.diagonal(lag), near[0, lag].expand(30 - lag))
    assert near[0, 1] > near[0, 4]


def test_bad_input_is_refused():
    net, told = seeded(), seeded(slice_channels=2)
    sample, tokens = given_to(net)
    for call, words in (
        (lambda: net(sample[:, :4], 1, tokens), "sample: expected"),
        (lambda: net(sample[0], 1, tokens), "sample: expected"),
        (lambda: net(sample, 1, tokens[:1]), "trace_tokens: expected"),
        (lambda: net(sample, 1, tokens.mT), "trace_tokens: expected"),
        (lambda: net(sample, 1, tokens, torch.zeros(2, 6, 2)), "slice_features: expected None"),
        (lambda: told(sample, 1, tokens), "slice_features: expected .2, 6, 2., got None"),
        (lambda: told(sample, 1, tokens, torch.zeros(2, 2, 6)), "slice_features: expected"),
        (lambda: PseudoUNet(5, 3, (8, 8)), "three levels or more"),
        (lambda: PseudoUNet(5, 3, (8, 12, 16), heads=4), "multiple of 2 . heads"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_saved_and_loaded(tmp_path):
    net, encoder = seeded(slice_channels=2), TraceEncoder(trace_dim=12).eval()
    sample, _ = given_to(net)
    known, trace = torch.rand(2, 6, 2), torch.rand(2, 24, 1)
    net.save_pretrained(tmp_path / "unet")
    encoder.save_pretrained(tmp_path / "trace_encoder")
    assert {p.name for p in (tmp_path / "unet").iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    again = PseudoUNet.from_pretrained(tmp_path / "unet")
    their = TraceEncoder.from_pretrained(tmp_path / "trace_encoder")
    with torch.no_grad():
        assert torch.equal(their(trace), encoder(trace))
        assert torch.equal(again(sample, 30, their(trace), known), net(sample, 30, encoder(trace), known))
