"""Driving two optimizers over the same gradients and comparing what they did. Knows no optimizer by name."""

import torch
from torch import nn


def drive(optimizer, parameter, gradients, *, before_step=None):
    """Give ``parameter`` each gradient in turn and step; each gradient must come back as it went in."""
    for index, gradient in enumerate(gradients):
        parameter.grad = gradient.clone()
        if before_step is not None:
            before_step(index)
        optimizer.step()
        assert torch.equal(parameter.grad.nan_to_num(), gradient.nan_to_num()), "step() changed p.grad"
    return parameter.detach().clone()


def with_a_rank(*groups):
    """Param groups, and where none has a rank, without which there is no Fira, one that never gets a gradient."""
    if any("rank" in group for group in groups):
        return list(groups)
    beside, named = nn.Parameter(torch.zeros(2, 3)), isinstance(next(iter(groups[0]["params"])), tuple)
    return [*groups, {"params": [("beside", beside) if named else beside], "rank": 1}]


def run_optimizer(make, weight, gradients, **group_settings):
    """The weight after ``gradients`` under ``make([{params, **group_settings}])``, and the optimizer's state for it."""
    parameter = nn.Parameter(weight.clone())
    optimizer = make([{"params": [parameter], **group_settings}])
    final = drive(optimizer, parameter, gradients)
    return final, optimizer.state[parameter]


def run_reference(reference, gradients):
    for gradient in gradients:
        reference.step(gradient)
    return reference.weight


def weight_change_error(start, ours, theirs):
    """Return max |dW_ours - dW_theirs| / max |dW_theirs|; a run that did not move the weights is no comparison."""
    start, ours, theirs = start.double(), ours.double(), theirs.double()
    change = (theirs - start).abs().max().item()
    assert change > 0.0, "the reference did not move the weights"
    error = (ours - theirs).abs().max().item()
    assert error == error, "not a number"
    return error / change


def relative_error(ours, theirs):
    """Return max |ours - theirs| / max |theirs|, for a state tensor."""
    ours, theirs = ours.double(), theirs.double()
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-300)).item()
