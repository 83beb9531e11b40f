"""What a preset knows of a model: width, depth and rank, and what follows from them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from ds_fira.core.selection import find_projected_weights, shape_of
from ds_fira.core.settings import GroupSettings
from ds_fira.optim.presets import (
    BASE_ALPHA,
    BASE_RANK_DEPTH,
    BASE_STEP,
    BASE_WIDTH,
    PRESETS,
    WARMUP_PER_LAYER,
    ModelSize,
    Projected,
    preset_mark,
    size_of,
    transferred_alpha,
    transferred_scale,
    transferred_warmup,
)
from ds_fira.optim.settings import NOT_OF_GROUPS, Settings, check_params
from tests.small_models import gpt2, gpt_neox, llama, mixtral

RANK = 4


def llama_gqa() -> nn.Module:
    """One key-value head for four: k and v are a quarter as high as q."""
    config = {"vocab_size": 24, "hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 5}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config, **heads))


def opt() -> nn.Module:
    """fc1 and fc2, whose digits are no numbers of layers; k, v, q and out."""
    config = {"vocab_size": 24, "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 64, "num_hidden_layers": 3}
    return transformers.OPTForCausalLM(transformers.OPTConfig(**config, num_attention_heads=2))


def listed_experts() -> nn.Module:
    """Four experts in each of two layers, every one a module of its own, as older code has them."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.o_proj = nn.Linear(8, 8)
            self.experts = nn.ModuleList(
                nn.ModuleDict({"w1": nn.Linear(8, 12), "w2": nn.Linear(12, 8), "w3": nn.Linear(8, 12)})
                for _ in range(4)
            )

    return nn.ModuleDict({"layers": nn.ModuleList(Layer() for _ in range(2))})


def matrices(model: nn.Module, named: bool = True) -> list[Projected]:
    found = find_projected_weights(model)
    return [(found[id(p)] if named else "", shape_of(p), RANK) for p in model.parameters() if id(p) in found]


# The model, its width and depth by names, and its depth where there are none.
MODELS: dict[str, tuple[Callable[[], nn.Module], int, int, int]] = {
    "llama": (lambda: llama(layers=3), 16, 3, 3),
    "llama, one key-value head": (llama_gqa, 32, 5, 5),
    "gpt-2, weights transposed": (gpt2, 16, 2, 2),
    "gpt-neox": (gpt_neox, 16, 2, 2),
    "opt": (opt, 16, 3, 3),
    "mixtral, 3-D experts": (mixtral, 16, 2, 2),
    "experts in a list": (listed_experts, 8, 2, 2),
}


@pytest.mark.parametrize("name", MODELS)
def test_width_and_depth_of_models(name: str) -> None:
    make, width, depth, unnamed = MODELS[name]
    with torch.device("meta"):
        model = make()
    assert size_of(matrices(model)) == ModelSize(width, depth, RANK)
    assert size_of(matrices(model, named=False)) == ModelSize(width, unnamed, RANK)


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ([("", (8, 6))], (6, 1)),
        ([("", (8, 6)), ("", (6, 8))], (6, 1)),
        ([("", (8, 6)), ("", (6, 8)), ("", (8, 6)), ("", (6, 8))], (6, 2)),
        ([("0.weight", (6, 6)), ("2.weight", (6, 6)), ("4.weight", (9, 6))], (6, 3)),
        ([("up.weight", (8, 6)), ("down.weight", (6, 8))], (6, 1)),
        ([("0.weight", (6, 6)), ("", (6, 6))], (6, 2)),
        ([("a.experts.w", (4, 6, 8)), ("b.w", (6, 8)), ("b.bias", (6,))], (8, 2)),
    ],
    ids=str,
)
def test_width_and_depth_of_lists(listed: list[tuple[str, tuple[int, ...]]], expected: tuple[int, int]) -> None:
    """Without names, without numbers in them, and with experts, a tensor of which is one matrix."""
    assert size_of([(*one, RANK) for one in listed]) == ModelSize(*expected, RANK)


def test_a_model_under_zero_3_has_its_own_shapes() -> None:
    """Where the tensors are empty between uses."""
    model = llama()
    expected = size_of(matrices(model))
    for param in model.parameters():
        param.ds_shape, param.data = param.shape, torch.empty(0)
    assert size_of(matrices(model)) == expected


def test_nothing_projected_has_no_size() -> None:
    with pytest.raises(ValueError, match=r"^there is no projected matrix"):
        size_of([("bias", (6,), RANK)])


def test_the_rank_is_that_of_most_matrices() -> None:
    assert size_of([("a", (6, 6), 2), ("b", (6, 6), 3), ("c", (6, 6), 3)]).rank == 3


def residual_step(size: ModelSize) -> float:
    """What an element of the residual is multiplied with beside the learning rate."""
    return transferred_alpha(size) * transferred_scale(size)


def test_the_residual_falls_as_the_width_grows() -> None:
    """The same for every depth and rank; where the laws were tuned they are their bases."""
    base = ModelSize(BASE_WIDTH, 2, BASE_RANK_DEPTH // 2)
    assert transferred_alpha(base) == BASE_ALPHA
    assert residual_step(base) == pytest.approx(BASE_STEP)
    wider, deeper = residual_step(ModelSize(1536, 12, 128)), residual_step(ModelSize(768, 24, 8))
    assert wider == pytest.approx(deeper / 2) == pytest.approx(residual_step(ModelSize(768, 12, 64)) / 2)


def test_the_residual_grows_longer_in_a_deeper_model() -> None:
    assert [transferred_warmup(ModelSize(512, depth, 128)) for depth in (1, 8, 32)] == [50, 400, 1600]


def test_the_low_rank_part_does_not_outgrow_its_norm() -> None:
    """Alpha falls by the root of what the rank, or the depth, grows by; below the base it is the published one."""
    found = [transferred_alpha(ModelSize(512, depth, rank)) for depth, rank in ((8, 128), (8, 32), (2, 128))]
    assert found[1] == found[2] == pytest.approx(2 * found[0])
    assert transferred_alpha(ModelSize(512, 8, 4)) == BASE_ALPHA


def test_the_page_says_what_the_preset_gives() -> None:
    words = " ".join((Path(__file__).resolve().parents[3] / "docs" / "configs.md").read_text().split())
    assert f"{BASE_ALPHA:g} x min(1, sqrt({BASE_RANK_DEPTH} / (rank x depth)))" in words
    assert f"{BASE_STEP:g} x {BASE_WIDTH} / width" in words
    assert f"{WARMUP_PER_LAYER} steps a layer" in words
    assert re.search(rf"`lr` (to )?{PRESETS['recommended'].settings['lr']:g}\b", words)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_gives_legal_settings_of_param_groups(name: str) -> None:
    mark = preset_mark(name, matrices(llama()))
    assert mark.pop("name") == name
    assert set(mark) == set(PRESETS[name].rows) <= set(GroupSettings.model_fields)
    assert check_params({"rank": 4, **mark}).items() >= mark.items()
    assert preset_mark(None, []) == {}


def test_a_setting_of_the_whole_training() -> None:
    assert "preset" in NOT_OF_GROUPS
    assert Settings().preset is None


@pytest.mark.parametrize("value", ["recommend", 1, True, ["recommended"]])
def test_an_unknown_preset_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"^FiraAdam: preset = .* is not legal; choose 'recommended', or leave it out"):
        check_params({"rank": 4, "preset": value})


def test_without_a_preset_nothing_is_left_out() -> None:
    assert check_params({"preset": None}) == check_params({})
    assert (check_params({})["lr"], check_params({})["alpha"]) == (1e-3, 1.0)
