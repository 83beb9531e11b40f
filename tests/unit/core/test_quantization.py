"""Moments stored in bfloat16 and int8: what a round trip keeps, and what rounding may do."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ds_fira.core import quantization as C
from ds_fira.core import rounding

# Distance of bfloat16 neighbours relative to the value: 7 bits follow the leading one.
BFLOAT16_GAP = 2.0**-7
# Distance of the dynamic map's points in its top decade, relative to the largest: 64 or 128 points over 0.9.
TOP_GAP = {True: 0.9 / 64, False: 0.9 / 128}
COMPRESSED = [("bfloat16", True), ("bfloat16", False), ("int8", True), ("int8", False)]


def zero(numel: int, state_dtype: str, signed: bool) -> dict[str, Tensor]:
    return C.allocate((numel,), (), state_dtype, dtype=torch.float32, device="cpu", signed=signed)


def stored(value: Tensor, state_dtype: str, signed: bool, seed: int | None) -> dict[str, Tensor]:
    result = zero(value.numel(), state_dtype, signed)
    C.write_(result, value, seed=seed)
    return result


def spread(numel: int, decades: float, signed: bool, seed: int = 0) -> Tensor:
    """Values log-uniform over so many decades below 1, of either sign if signed."""
    generator = torch.Generator().manual_seed(seed)
    value = 10.0 ** (-decades * torch.rand(numel, generator=generator))
    return value * torch.randn(numel, generator=generator).sign() if signed else value


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("state_dtype", C.STATE_DTYPES)
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_zero_moments_are_zeros(state_dtype: str, signed: bool, batch: tuple[int, ...]) -> None:
    """Every tensor has the batch in front, holds zeros and decodes to zeros; 300 elements have a short last block."""
    result = C.allocate((20, 15), batch, state_dtype, dtype=torch.float64, device="cpu", signed=signed)
    assert result[""].shape == (*batch, 20, 15)
    assert all(not tensor.any() for tensor in result.values())
    if state_dtype == "int8":
        assert result["_scale"].shape == (*batch, 2)
    row = {key: tensor[1] if batch else tensor for key, tensor in result.items()}
    assert torch.equal(C.read(row, torch.float64), torch.zeros(20, 15, dtype=torch.float64))
    C.write_(row, torch.zeros(20, 15), seed=5)
    assert all(not tensor.any() for tensor in result.values())
    assert sum(tensor.nbytes for tensor in row.values()) == {"float32": 2400, "bfloat16": 600, "int8": 308}[state_dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float32_storage_is_updated_in_place(dtype: torch.dtype) -> None:
    result = C.allocate((4, 5), (), "float32", dtype=dtype, device="cpu", signed=True)
    value = C.read(result, dtype)
    assert value is result[""]
    value += 1.5
    C.write_(result, value, seed=3)
    C.write_(C.part(result, 0, 20), torch.full((20,), 2.5), seed=3)
    assert torch.equal(result[""], torch.full((4, 5), 2.5, dtype=dtype))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    case=st.sampled_from(COMPRESSED),
    numel=st.integers(1, 700),
    magnitude=st.floats(-44.0, 38.0),
    decades=st.floats(0.0, 20.0),
    seeds=st.tuples(*[st.none() | st.integers(0, 2**40)] * 2),
)
def test_writing_back_what_was_read_changes_no_bit(case, numel, magnitude, decades, seeds) -> None:
    """Whatever the magnitude, subnormal and near overflow included, and whatever the noise."""
    value = (spread(numel, decades, case[1], numel).double() * 10.0**magnitude).float()
    value = torch.cat([value, torch.zeros(3), torch.full((300,), 1e-30)])
    first = stored(value, *case, seeds[0])
    again = {key: tensor.clone() for key, tensor in first.items()}
    C.write_(again, C.read(first), seed=seeds[1])
    assert same(first, again)
    assert C.read(first).isfinite().all()


@pytest.mark.parametrize("signed", [True, False])
def test_every_code_is_kept_under_scales_of_all_magnitudes(signed: bool) -> None:
    """All 256 codes in every block: noise finds no rounding of decoded values that it could push to a neighbour."""
    state = zero(2000 * C.BLOCK, "int8", signed)
    state[""].view(2000, C.BLOCK).copy_(torch.arange(256).to(state[""].dtype))
    state["_scale"].copy_(1e38 * spread(2000, 31.0, signed) * spread(2000, 31.0, False, 1))
    assert state["_scale"].abs().min() >= C.MIN_SCALE
    for seed in (None, *range(12)):
        again = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
        C.write_(again, C.read(state), seed=seed)
        assert same(state, again)


def test_tiny_blocks_are_kept() -> None:
    """Blocks whose values are partly or all subnormal."""
    value = spread(90 * C.BLOCK, 12.0, False).double().view(90, -1) * 10.0 ** -torch.arange(90.0).div(2).unsqueeze(1)
    first = stored(value.float().flatten(), "int8", False, 0)
    for seed in range(1, 4):
        again = {key: tensor.clone() for key, tensor in first.items()}
        C.write_(again, C.read(first), seed=seed)
        assert same(first, again)


def test_decoded_values_lie_nearer_to_their_points_than_the_snap() -> None:
    """The bound behind the round trip: two roundings, of the product and of the quotient, in shares of the gap."""
    for signed in (True, False):
        tables = C._tables(signed, torch.device("cpu"))
        assert float((tables.points.abs() * 2.0**-23 * tables.density).max()) < C.SNAP
        assert (tables.points[-1], tables.points[127 if signed else 0]) == (1.0, 0.0)


def neighbours(value: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """The map's points at or below and at or above values from -0.993 (0) to 1, by a plain search; in float64."""
    points = C._tables(signed, torch.device("cpu")).points.double()
    upper = torch.bucketize(value.double(), points).clamp(1, 255)
    low, high = points[upper - 1], points[upper]
    # What is positive does not become 0.
    return (low if signed else torch.where(value > 0.0, low.clamp(min=float(points[1])), low)), high


def with_scale_one(value: Tensor) -> Tensor:
    value[:: C.BLOCK] = 1.0
    return value


@pytest.mark.parametrize("signed", [True, False])
def test_codes_name_the_neighbours_of_a_value(signed: bool) -> None:
    """Over all decades of the map and below: the nearest without a seed, one of the two with one."""
    value = torch.cat([spread(30 * C.BLOCK, 14.0, signed), C._tables(signed, torch.device("cpu")).points[1:]])
    value = with_scale_one(value.clamp(min=-0.99))
    low, high = neighbours(value, signed)
    for seed in (None, 0, 1):
        read = C.read(stored(value, "int8", signed, seed)).double()
        assert ((read == low) | (read == high)).all()
        if seed is None:
            nearest = torch.minimum((value - low).abs(), (high - value).abs())
            assert ((read - value).abs() <= nearest * (1.0 + 1e-6) + 1e-20).all()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("decade", [0, 1, 2])
def test_int8_error_by_decade(signed: bool, decade: int) -> None:
    """Relative to a decade's end the gap doubles from one to the next further down; for V it is that of sqrt(V)."""
    largest = -3.7e-5 if signed else 3.7e-5
    root = with_scale_one(spread(64 * C.BLOCK, 1.0, signed) * 10.0**-decade)
    value = root * largest if signed else root.square() * largest
    # Above the decade's last point the next decade's larger gap begins.
    inside = root.abs() < 0.97 * 10.0**-decade
    for seed, share in ((None, 0.5), (7, 1.0)):
        read = C.read(stored(value, "int8", signed, seed))
        assert torch.equal(read[:: C.BLOCK], value[:: C.BLOCK])
        error = (read / largest if signed else (read / largest).sqrt()) - root
        gap = TOP_GAP[signed] * 2.0**decade * 10.0**-decade
        # The middle of two squares lies above the square of the middle: at the low end of these by 7% of half a gap.
        assert 0.9 * share * gap < float(error[inside].abs().max()) <= 1.08 * share * gap


def test_second_moments_stay_positive_beside_large_ones() -> None:
    """Down to the smallest float32, in the block of one: the update's divisor is never 0 where there was a gradient."""
    value = spread(4 * C.BLOCK, 44.0, False)
    value[:: C.BLOCK], value[1 :: C.BLOCK], value[2 :: C.BLOCK] = 1e30, 1e-45, 0.0
    for state_dtype in ("bfloat16", "int8"):
        for seed in (None, 1, 2):
            read = C.read(stored(value, state_dtype, False, seed))
            assert (read >= 0.0).all()
            assert not read[2 :: C.BLOCK].any()
            assert (read[value > 1e-38] > 0.0).all()
        # An element that is 1e-10 of the largest keeps its square root to a fifth.
    pair = torch.tensor([1.0, 1e-10])
    assert float(C.read(stored(pair, "int8", False, None))[1]) == pytest.approx(1e-10, rel=0.4)


@pytest.mark.parametrize("case", COMPRESSED)
def test_stochastic_rounding_is_unbiased(case: tuple[str, bool]) -> None:
    """The mean over seeds is the value, within 5.5 standard errors of a throw between its neighbours."""
    seeds = 400
    value = with_scale_one(spread(600, 4.0, case[1])).clamp(min=-0.99)
    reads = torch.stack([C.read(stored(value, *case, seed)) for seed in range(seeds)]).double()
    if case[0] == "int8":
        low, high = neighbours(value, case[1])
        gap = high - low
    else:
        gap = BFLOAT16_GAP * value.abs().double()
    assert ((reads - value).abs() <= gap * (1.0 + 1e-6)).all()
    assert ((reads.mean(0) - value).abs() <= (5.5 * 0.5 / math.sqrt(seeds) + C.SNAP) * gap).all()


def test_bfloat16_does_not_overflow() -> None:
    value = torch.tensor([3.4e38, -3.4e38, 3.389e38])
    for seed in (None, *range(20)):
        assert C.read(stored(value, "bfloat16", True, seed)).isfinite().all()


@pytest.mark.parametrize("case", COMPRESSED)
def test_parts_are_views_written_as_in_the_whole(case: tuple[str, bool]) -> None:
    """Also where chunks of the whole begin elsewhere; and nothing outside a part is touched."""
    value = spread(C.CPU_CHUNK + 3 * C.BLOCK + 17, 5.0, case[1])
    whole, parts = stored(value, *case, 11), zero(value.numel(), *case)
    cuts = [0, C.BLOCK, 5 * C.BLOCK, value.numel()]
    for start, stop in itertools.pairwise(cuts[1:]):
        C.write_(C.part(parts, start, stop), value[start:stop], seed=11, start=start)
    assert not any(tensor.any() for tensor in C.part(parts, 0, C.BLOCK).values())
    C.write_(C.part(parts, 0, C.BLOCK), value[: C.BLOCK], seed=11)
    assert same(whole, parts)
    assert torch.equal(C.read(C.part(whole, 256, 512)), C.read(whole)[256:512])
    for start, stop in ((1, 256), (0, 100)):
        with pytest.raises(ValueError, match="cut a block of 256"):
            C.part(whole, start, stop)


def test_writing_needs_no_temporary_beyond_a_chunk() -> None:
    class Largest(TorchDispatchMode):
        known: set[int]
        nbytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in self.known:
                self.nbytes = max(self.nbytes, result.untyped_storage().nbytes())
            return result

    value = spread(5 * C.CPU_CHUNK, 3.0, False)
    for state_dtype in ("bfloat16", "int8"):
        target = stored(value, state_dtype, False, 1)
        with Largest() as largest:
            largest.known = {tensor.untyped_storage().data_ptr() for tensor in (value, *target.values())}
            C.write_(target, value, seed=1)
        assert C.CPU_CHUNK < largest.nbytes <= 4 * C.CPU_CHUNK


def test_noise_is_the_hash_of_place_and_seed() -> None:
    """In plain integers; the same for a seed on the device; even over 16 bits, and independent of its neighbours."""

    def hashed(word: int) -> int:
        word = ((word ^ word >> 16) * 0x7FEB352D) % 2**32
        word = ((word ^ word >> 15) * 0x846CA68B) % 2**32
        return word ^ word >> 16

    cpu = torch.device("cpu")
    for seed, start in ((0, 0), (1, 256), (2**62 + 12345, 2**33)):
        words = [hashed((seed * rounding.SEED_STRIDE + start // 2 + i) % 2**32) for i in range(20)]
        halves = [half - 2**16 * (half >= 2**15) for word in words for half in (word % 2**16, word >> 16)]
        assert rounding.noise_of(39, start, seed, cpu).tolist() == halves[:39]
        assert torch.equal(
            rounding.noise_of(40, start, torch.tensor(seed), cpu), rounding.noise_of(40, start, seed, cpu)
        )
    rows = torch.stack([rounding.noise_of(2**10, 0, seed, cpu) for seed in range(1024)])
    counts = torch.bincount((rows.flatten().int() + 2**15) // 2**8, minlength=256).double()
    # Chi-square with 255 degrees of freedom has mean 255 and standard deviation 22.6.
    expected = rows.numel() / 256
    assert 255 - 113 < float(((counts - expected).square() / expected).sum()) < 255 + 113
    noise = rows.double() / 2**15
    for left, right in ((noise[:, 1:], noise[:, :-1]), (noise[1:], noise[:-1]), (noise[:, 2:], noise[:, :-2])):
        assert abs(float((left * right).mean() * 3.0)) < 5.0 / math.sqrt(left.numel())


@pytest.mark.parametrize("state_dtype", C.STATE_DTYPES)
def test_state_goes_through_a_file_of_plain_tensors(state_dtype: str, tmp_path: Path) -> None:
    state = {"exp_avg" + key: tensor for key, tensor in stored(spread(600, 6.0, True), state_dtype, True, 1).items()}
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert all(type(tensor) is Tensor for tensor in loaded.values())
    assert same(state, loaded)


def test_int8_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence for int8; the others do not touch the library."""
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(ValueError, match=r"state_dtype = 'int8' needs .*; pip install ds_fira\[int8\], or choose"):
        zero(4, "int8", True)
    for state_dtype in ("float32", "bfloat16"):
        C.read(stored(torch.ones(4), state_dtype, True, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("case", COMPRESSED)
def test_as_on_the_cpu(case: tuple[str, bool]) -> None:
    """The same bits, with the seed on the device."""
    value = spread(C.CPU_CHUNK + 1000, 8.0, case[1])
    target = C.allocate((value.numel(),), (), case[0], dtype=torch.float32, device="cuda", signed=case[1])
    C.write_(target, value.cuda(), seed=torch.tensor(9, device="cuda"))
    expected = stored(value, *case, 9)
    assert same({key: tensor.cpu() for key, tensor in target.items()}, expected)
    assert torch.equal(C.read(target).cpu(), C.read(expected))
