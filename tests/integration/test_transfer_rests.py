"""The prototypes' rate of embeddings, head and norms, and what falls in a long training."""

import math

import pytest
import torch
from torch import nn

from examples.reproduction.transfer import trials
from examples.reproduction.transfer.prototypes import METHODS
from examples.reproduction.transfer.trials import Trial, settings_of
from tests.integration.test_transfer_prototypes import GAP, RANK, STEPS, gradients, model, stepped


@pytest.fixture(autouse=True)
def small_width(monkeypatch):
    """A width of 16, which no trial has, for the rank's share."""
    monkeypatch.setitem(trials.MODELS, 16, (1, 40))


@pytest.mark.parametrize(("rest", "fade"), [(0.5, None), (1.0, 4), (0.5, 4)])
def test_embeddings_have_a_rate_of_their_own_that_falls(rest, fade):
    """Against torch's Adam under the same schedule; hidden matrices take no notice of it."""
    net, other = model(), model()
    trial = Trial(method="normalized", lr=0.01, width=16, rank=RANK, settings=settings_of(rest=rest, rest_fade=fade))
    ours, plain = METHODS["normalized"](net, trial), METHODS["normalized"](other, trial.change(settings=()))
    reference = nn.Parameter(net["embed"].weight.detach().clone())
    adam = torch.optim.Adam([reference], lr=0.01, eps=1e-8)
    for number, grads in enumerate(gradients(), 1):
        for one in (net, other):
            for layer, grad in zip(one["body"], grads, strict=True):
                layer.weight.grad = grad.clone()
        reference.grad = torch.randn(8, 16, generator=torch.Generator().manual_seed(number))
        net["embed"].weight.grad, other["embed"].weight.grad = reference.grad.clone(), reference.grad.clone()
        adam.param_groups[0]["lr"] = 0.01 * rest * (1.0 if fade is None or number <= fade else math.sqrt(fade / number))
        for optimizer in (ours, plain):
            optimizer.step(1.0)
        adam.step()
    torch.testing.assert_close(net["embed"].weight, reference)
    for mine, theirs in zip(net["body"], other["body"], strict=True):
        assert torch.equal(mine.weight, theirs.weight)


def test_a_residual_that_falls():
    """`fade`: at first it is whole; once it is behind its steps, less of it moves the weights."""
    whole, never = stepped("normalized", gap=GAP)[0], stepped("normalized", gap=GAP, fade=STEPS)[0]
    assert all(torch.equal(a, b) for a, b in zip(whole, never, strict=True))
    start = [layer.weight.detach() for layer in model()["body"]]
    without, early = stepped("normalized", gap=GAP, c=0.0)[0], stepped("normalized", gap=GAP, fade=1)[0]
    for a, b, c, w in zip(whole, early, without, start, strict=True):
        assert (c - w).norm() < (b - w).norm() < (a - w).norm()


def test_norms_have_a_rate_of_their_own():
    """`vectors`, against torch's Adam at that rate; embeddings take no notice of it."""
    slower, plain = model(), model()
    for net in (slower, plain):
        net["norm"] = nn.LayerNorm(16)
    trial = Trial(method="normalized", lr=0.01, width=16, rank=RANK)
    optimizers = [
        METHODS["normalized"](slower, trial.change(settings=settings_of(vectors=0.1))),
        METHODS["normalized"](plain, trial),
    ]
    reference = nn.Parameter(slower["norm"].weight.detach().clone())
    adam = torch.optim.Adam([reference], lr=0.001, eps=1e-8)
    for number, grads in enumerate(gradients(), 1):
        drawn = torch.Generator().manual_seed(number)
        reference.grad, embedded = torch.randn(16, generator=drawn), torch.randn(8, 16, generator=drawn)
        for net in (slower, plain):
            for layer, grad in zip(net["body"], grads, strict=True):
                layer.weight.grad = grad.clone()
            net["embed"].weight.grad = embedded.clone()
            net["norm"].weight.grad, net["norm"].bias.grad = reference.grad.clone(), reference.grad.clone()
        for optimizer in optimizers:
            optimizer.step(1.0)
        adam.step()
    torch.testing.assert_close(slower["norm"].weight, reference)
    assert not torch.allclose(plain["norm"].weight, reference)
    assert torch.equal(slower["embed"].weight, plain["embed"].weight)
