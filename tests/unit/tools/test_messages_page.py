"""docs/troubleshooting.md has every message of the code, and none that the code does not have."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import ds_fira

ROOT = Path(__file__).resolve().parents[3]
TOOL = ROOT / "docs" / "tools" / "messages.py"
REMEDY = "write the page anew: python docs/tools/messages.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_messages", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["docs_messages"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_that_of_the_code(tool: ModuleType) -> None:
    written = tool.page(tool.all_messages(), tool.explained()).splitlines()
    on_page = tool.PAGE.read_text().splitlines()
    assert not (missing := [line for line in written if line not in on_page]), f"{missing}; {REMEDY}"
    assert not (gone := [line for line in on_page if line not in written]), f"{gone}; {REMEDY}"
    assert written == on_page, REMEDY


def test_what_is_explained_is_what_the_code_says(tool: ModuleType) -> None:
    said = {message.text for message in tool.all_messages()}
    details = tool.explained()
    assert [detail["title"] for detail in details if detail["text"] not in said] == []
    assert len({detail["text"] for detail in details}) == len({detail["title"] for detail in details}) == len(details)
    assert all(detail["cause"] and detail["remedy"] for detail in details)


def test_messages_that_were_raised_are_found(tool: ModuleType) -> None:
    """By the page's own rule: the words around `…`."""
    weight = [torch.nn.Parameter(torch.ones(4, 4))]
    for settings in ({}, {"rank": 0}, {"rank": 2, "alfa": 1.0}, {"rank": 2, "target_modules": ["q"]}):
        with pytest.raises(ValueError) as caught:
            ds_fira.FiraAdam(weight, **settings)
        patterns = (re.escape(message.text).replace(tool.GAP, ".*") for message in tool.all_messages())
        assert any(re.fullmatch(pattern, str(caught.value), re.DOTALL) for pattern in patterns), str(caught.value)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (
            'raise ValueError(f"{name}: rank = {rank!r} is too small; give more.")',
            "FiraAdam: rank = … is too small; give more.",
        ),
        ('raise ValueError("one half of it, " + other + "; the other half.")', "one half of it, …; the other half."),
        (
            'warnings.warn(f"the basis {basis}{more} is old; make it anew.", stacklevel=2)',
            "the basis … is old; make it anew.",
        ),
        ('"""A docstring: it is long enough to be a sentence; no message."""', None),
        (
            'table = {f"stage = {stage} is not supported here; use another stage.": True}',
            "stage = … is not supported here; use another stage.",
        ),
        ('help("the folder that the run has written its files to, if any")', None),
    ],
)
def test_how_a_message_is_read(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, expected: str | None
) -> None:
    monkeypatch.setattr(tool, "LIBRARY", tmp_path)
    (tmp_path / "module.py").write_text(f"{code}\n")
    assert [message.text for message in tool.messages_of(tmp_path / "module.py")] == (
        [] if expected is None else [expected]
    )
