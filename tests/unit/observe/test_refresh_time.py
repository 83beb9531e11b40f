"""The time of refreshes on a GPU, by events; there is no second GPU here, so torch's events are stood in for."""

from __future__ import annotations

import pytest
import torch

from ds_fira.observe.metrics import StepMetrics


class Event:
    """An event that knows the stream in which it was recorded."""

    def __init__(self, enable_timing: bool) -> None:
        self.stream = None

    def record(self, stream: str = "the current device's") -> None:
        self.stream = stream

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        assert (self.stream, end.stream) == ("of cuda:1", "of cuda:1")
        return 500.0


def test_events_are_recorded_where_the_matrices_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another device than the current one: its stream has nothing of the refresh in it, and would time nothing."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"of {device}")
    metrics = StepMetrics()
    with metrics.refreshing(torch.device("cuda", 1)):
        pass
    assert metrics.totals().refresh_seconds == 0.5
