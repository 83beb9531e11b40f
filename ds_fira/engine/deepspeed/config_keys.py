"""Which keys of a config DeepSpeed reads: those that it does not know it passes over in silence.

Nothing lists the names: a config that notes what is asked for is given to DeepSpeed's own reader. What it relies on:
`DeepSpeedConfig` takes a dict and reads it key by key, whole blocks with `f(**block)`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping

# Blocks that are passed on whole to what refuses a name it does not know: an optimizer, a scheduler, and what lies in
# the pydantic model of ZeRO.
PASSED_ON = ("optimizer.params", "scheduler.params")
MODEL = "zero_optimization."


class NotedConfig(dict):
    """A config that notes which of its keys are read.

    Args:
        content: a config or a block of one; blocks in it become of this kind too.

    Attributes:
        asked: every key that was asked for, also those that are not there.
    """

    def __init__(self, content: Mapping[str, object]) -> None:
        super().__init__({key: NotedConfig(v) if isinstance(v, Mapping) else v for key, v in content.items()})
        self.asked: set[str] = set()

    def __getitem__(self, key: str) -> object:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: object = None) -> object:
        """As of a dict."""
        self.asked.add(key)
        return super().get(key, default)

    def __iter__(self) -> Iterator[str]:  # has `f(**config)` ask for every key, rather than copy the dict
        return super().__iter__()

    def __copy__(self) -> NotedConfig:
        """The same config: DeepSpeed reads a copy of what it is given."""
        return self

    def unread(self, prefix: str = "") -> dict[str, str | None]:
        """Keys that nothing has asked for, by their dotted names, each with the nearest one that was; None for none."""
        found: dict[str, str | None] = {}
        for key, value in self.items():
            name = prefix + key
            if key not in self.asked:
                near = difflib.get_close_matches(key, self.asked, n=1)
                found[name] = prefix + near[0] if near else None
            elif isinstance(value, NotedConfig) and name not in PASSED_ON and not name.startswith(MODEL):
                found |= value.unread(f"{name}.")
        return found
