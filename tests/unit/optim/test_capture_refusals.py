"""What stops a step in a CUDA graph: each in one sentence that says what to do, and before anything is lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import Parameter

import ds_fira
from ds_fira import FiraAdam
from ds_fira.core import kernels
from ds_fira.optim.plug import FiraRMSProp
from tests.reference.gradients import make_weight

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the record is of interpreted kernels")


@pytest.fixture(autouse=True)
def kernels_tried(kernels_allowed: None) -> None:
    """As after any step in the process: whether the kernels run has been found out."""
    assert kernels.supports(torch.ones(1))


def build(steps: int = 1, **settings: Any):
    """An optimizer of three small matrices and a bias after some steps."""
    params = [Parameter(make_weight((4, 6), seed=i)) for i in range(3)] + [Parameter(torch.ones(5))]
    set_gradients(params, (0, 2, 3, 1))
    groups = [{"params": params[:3], "rank": 2}, {"params": params[3:]}]
    optimizer = FiraAdam(groups, **{"lr": 0.01, "capturable": True, "update_proj_gap": 4, **settings})
    for _ in range(steps):
        optimizer.step()
    return optimizer, params


def set_gradients(params: list[Parameter], places: tuple[int, ...]) -> None:
    """New gradients, not at equal distances, so that a table says where they are."""
    room = torch.arange(400.0).sin()
    for place, param in zip(places, params, strict=True):
        param.grad = room[40 * place :][: param.numel()].view_as(param)


def capture(optimizer: FiraAdam):
    from tests.unit.optim.recorded_graph import RecordedGraph

    graph = RecordedGraph()
    with graph.recording():
        optimizer.step()
    return graph


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"capturable": False, "steps": 0},
            "being captured in a CUDA graph, and capturable = False; make the optimizer with",
        ),
        ({"steps": 0}, "captured in a CUDA graph, and no step was made before it; make one or more without"),
        (
            {"steps": 1, "update_proj_gap": 1},
            "captured in a CUDA graph, and a refresh of the subspace may be due; make that step without",
        ),
        ({"record_scaling_factors": 2}, "the scaling factors of this step are to be recorded; make it without"),
        ({"lr": torch.tensor(0.01), "steps": 0}, "and a parameter has no state yet; make a step with all gradients"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*record_scaling_factors")
def test_a_capture_stops(change: dict[str, Any], message: str) -> None:
    optimizer, params = build(**change)
    before = [param.detach().clone() for param in params]
    with pytest.raises(ValueError, match=f"^FiraAdam: a step is .*{message}"):
        capture(optimizer)
    assert all(map(torch.equal, params, before))


def test_a_capture_before_any_step_keeps_the_kernels() -> None:
    """Whether they run is found by a launch, which a capture would let fail, and for good."""
    for found in (kernels._runs_on, kernels._failure_of_a_launch):
        found.cache_clear()
    optimizer, params = build(steps=0)
    with pytest.raises(ValueError, match="no step was made before it; make one or more without a capture first"):
        capture(optimizer)
    assert kernels.supports(params[0])


def test_a_capture_of_moved_gradients_stops() -> None:
    """They need a table, which a capture cannot upload; after a step with them it is there."""
    optimizer, params = build()
    set_gradients(params, (5, 1, 2, 7))
    with pytest.raises(ValueError, match=r"FiraAdam: a step .* do not lie where .* by zero_grad\(set_to_none=False\)"):
        capture(optimizer)
    optimizer.step()
    assert optimizer.replay(capture(optimizer))


def test_a_replay_stops_where_something_has_changed() -> None:
    """What a captured step has for good; nothing is made then, and a new capture goes on."""
    optimizer, params = build(lr=torch.tensor(0.01))
    other, _ = build()
    with pytest.raises(ValueError, match=r"^FiraAdam\.replay: no step was captured since .* torch.cuda.graph first"):
        other.replay(capture(optimizer))
    graph = capture(optimizer)
    group, before = optimizer.param_groups[1], [param.detach().clone() for param in params]
    for name, value, message in (
        ("weight_decay", 0.5, r"weight_decay was 0\.0 when a step was captured and is 0\.5; capture one with that"),
        ("capturable", False, "capturable was True when a step was captured and is False; capture one with that"),
        ("betas", (0.5, 0.9), r"betas was \(0\.9, 0\.999\) when"),
        ("lr", torch.tensor(0.01), "lr is another tensor than when a step was captured; fill that one in place"),
    ):
        kept, group[name] = group[name], value
        with pytest.raises(ValueError, match=rf"^FiraAdam\.replay: {message}"):
            optimizer.replay(graph)
        group[name] = kept
    gradient, params[1].grad = params[1].grad, params[1].grad.clone()
    with pytest.raises(ValueError, match=r"gradients do not lie where they lay when .*set_to_none=False"):
        optimizer.replay(graph)
    params[1].grad = gradient
    assert all(map(torch.equal, params, before))
    assert optimizer.replay(graph)
    params[3].grad = None
    with pytest.raises(ValueError, match="other groups have gradients; capture a step anew"):
        optimizer.replay(graph)
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"no step was captured since the optimizer was made, loaded"):
        optimizer.replay(graph)


def test_a_learning_rate_goes_through_a_state_dict() -> None:
    """A tensor's, into one with a tensor and one with a number, capturable or not; the steps go on to the bit."""
    optimizer, params = build(steps=2, lr=torch.tensor(0.25))
    twins = [build(steps=0, lr=lr, capturable=on) for lr, on in ((torch.tensor(0.5), True), (0.5, True), (0.5, False))]
    for twin, own in twins:
        with torch.no_grad():
            for mine, theirs in zip(own, params, strict=True):
                mine.copy_(theirs)
                mine.grad.copy_(theirs.grad)
        twin.load_state_dict(optimizer.state_dict())
        twin.step()
    optimizer.step()
    for _, own in twins:
        assert all(map(torch.equal, own, params))


def test_what_cannot_be_captured_is_refused_when_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [Parameter(make_weight((4, 6)))]
    refused = r"capturable = True needs the kernels, and kernels = 'off'; remove one of the two, or DS_FIRA_KERNELS=0"
    with pytest.raises(ValueError, match=f"^FiraAdam.*: {refused}"):
        FiraAdam(made, rank=2, capturable=True, kernels="off")
    with pytest.raises(ValueError, match=r"capturable = True is not supported with the rule RMSProp, .* remove it"):
        FiraRMSProp(made, rank=2, capturable=True)
    with pytest.raises(ValueError, match=r"step no parameter of dtype torch\.float64; train it in float32, or"):
        FiraAdam([Parameter(made[0].detach().double())], rank=2, capturable=True)
    groups = ds_fira.param_groups(torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 5)), 2, capturable=True)
    assert len(groups) > 1
    assert all(group["capturable"] for group in groups)
    optimizer, _ = build(steps=0)
    # What an engine calls before any step.
    with pytest.raises(
        ValueError, match=r"FiraAdam: capturable = True is not supported inside an engine, .* remove it"
    ):
        optimizer.await_attachment(flat=False)
    kernels.interpret_on_cpu(False)
    with pytest.raises(ValueError, match=r"needs the kernels, which do not step .* on cpu \(the kernels are not for"):
        optimizer.step()
