"""The loop's choices one by one, against what the optimiser's equations say."""
from __future__ import annotations

import pytest
import torch

from radrepro.train.loop import Schedule, fit


class Two(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.quick, self.calm = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(3))

    def forward(self):
        return self.quick.sum() + self.calm.sum()


def losses_of(model, step, generator):
    return model()


def test_slow_parameters_take_that_share_of_a_step(tmp_path):
    """Adam's step is the learning rate itself where the gradient is constant."""
    model = Two()
    fit(model, losses_of, Schedule(1, 0.1, weight_decay=0.0, clip=1e9), seed=0, folder=tmp_path, slow=("calm", 0.25))
    torch.testing.assert_close(model.quick.detach(), torch.full((3,), -0.1), atol=1e-6, rtol=0)
    torch.testing.assert_close(model.calm.detach(), torch.full((3,), -0.025), atol=1e-6, rtol=0)


def test_frozen_parameters_stay(tmp_path):
    model = Two()
    model.calm.requires_grad_(False)
    fit(model, losses_of, Schedule(3, 0.1, clip=1e9), seed=0, folder=tmp_path)
    assert not model.calm.any() and model.quick.all()


@pytest.mark.parametrize("decay", [0.2, 0.9])
def test_the_average_is_what_is_kept(tmp_path, decay):
    """shadow <- d shadow + (1 - d) weight, d = min((1 + t) / (10 + t), decay) at the step's number t."""
    seen = []

    def watched(model, step, generator):
        seen.append(model.quick.detach().clone())
        return model()

    schedule = Schedule(6, 0.1, weight_decay=0.0, clip=1e9)
    last = Two()
    fit(last, watched, schedule, seed=0, folder=tmp_path)
    weights = [*seen[1:], last.quick.detach().clone()]
    averaged = Two()
    fit(averaged, losses_of, Schedule(6, 0.1, weight_decay=0.0, clip=1e9, average=decay), seed=0, folder=tmp_path)
    shadow = seen[0]
    for t, w in enumerate(weights):
        d = min((1 + t) / (10 + t), decay) if t else 0.0  # diffusers takes the first step's weights whole
        shadow = d * shadow + (1 - d) * w
    torch.testing.assert_close(averaged.quick.detach(), shadow, atol=1e-5, rtol=0)
    assert (averaged.quick - last.quick).abs().max() > 1e-3
