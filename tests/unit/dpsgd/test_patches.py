"""Norms and sums of convolutions that never hold all patches are those of the patches."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from dpsgd import patches
from dpsgd.layer_records import OuterProduct
from dpsgd.patches import ConvolutionRecord, Geometry
from dpsgd.row_owners import RowOwners
from dpsgd.tape import Tape

CPU = torch.device("cpu")
ALONE, SEVERAL = torch.arange(6), torch.tensor([0, 0, 1, 2, 2, 2])
GEOMETRIES = {
    "same size": (Geometry((3, 3), (1, 1), (1, 1), (1, 1), 1), (4, 5)),
    "strided": (Geometry((3, 3), (2, 2), (1, 1), (1, 1), 1), (7, 6)),
    "without padding": (Geometry((2, 3), (1, 2), (0, 0), (1, 1), 1), (5, 6)),
    "dilated": (Geometry((3, 3), (1, 1), (2, 2), (2, 2), 1), (5, 5)),
    "more padding than image": (Geometry((3, 3), (2, 3), (3, 4), (1, 2), 1), (2, 3)),
    "one place": (Geometry((4, 4), (1, 1), (0, 0), (1, 1), 1), (4, 4)),
    "one by one": (Geometry((1, 1), (2, 2), (0, 0), (1, 1), 1), (5, 5)),
    "series": (Geometry((5,), (1,), (2,), (1,), 1), (9,)),
}
EACH = pytest.mark.parametrize("name", GEOMETRIES)


def places_of(geometry: Geometry, pixels: tuple[int, ...]) -> tuple[int, ...]:
    about = zip(pixels, geometry.kernel, geometry.stride, geometry.padding, geometry.dilation, strict=True)
    return tuple((size + 2 * pad - by * (kernel - 1) - 1) // stride + 1 for size, kernel, stride, pad, by in about)


def numbered(sizes: tuple[int, ...]) -> Tensor:
    return torch.arange(math.prod(sizes)).view(sizes)


def entry(name: str, owners: RowOwners, channels: int = 3, outputs: int = 4) -> ConvolutionRecord:
    geometry, pixels = GEOMETRIES[name]
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(owners.batch, channels, *pixels, generator=draw)
    deltas = torch.randn(owners.batch, outputs, *places_of(geometry, pixels), generator=draw)
    weight = nn.Parameter(torch.zeros(outputs, channels, *geometry.kernel))
    return ConvolutionRecord((weight,), owners.without_filling(inputs), owners.weighted(deltas), owners, geometry)


def unfolded(found: ConvolutionRecord) -> OuterProduct:
    copied = found.geometry.patches(found.inputs)
    return OuterProduct(found.weights, copied, found.deltas.flatten(2).transpose(1, 2), found.owners)


def added(found: OuterProduct, factors: Tensor, precision: torch.dtype = torch.float64) -> Tensor:
    (weight,) = found.weights
    totals: dict[Tensor, Tensor] = {weight: torch.zeros(weight.numel(), dtype=precision)}
    found.add_weighted_sum(factors, totals)
    return totals[weight]


@EACH
@pytest.mark.parametrize("by_pixels", [True, False])
@pytest.mark.parametrize(("rows", "batch"), [(ALONE, 6), (SEVERAL, 6), (ALONE, 8)])
def test_norms_are_those_of_the_patches(
    name: str, by_pixels: bool, rows: Tensor, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Geometry, "by_pixels", lambda *_: by_pixels)
    found = entry(name, RowOwners(rows, CPU, batch))
    for mine, expected in zip(found.squares(), unfolded(found).squares(), strict=True):
        assert len(mine) == int(rows[-1]) + 1
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=0.0)


@EACH
@pytest.mark.parametrize("rows", [ALONE, SEVERAL])
@pytest.mark.parametrize(("block", "copied"), [(2**18, 2**22), (1, 1), (40, 200)])
def test_sums_are_those_of_the_patches_in_blocks_of_any_size(
    name: str, rows: Tensor, block: int, copied: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patches, "_BLOCK", block)
    monkeypatch.setattr(patches, "_PATCHES", copied)
    found = entry(name, RowOwners(rows, CPU, 6))
    factors = torch.linspace(0.5, 2.0, int(rows[-1]) + 1, dtype=torch.float64)
    torch.testing.assert_close(added(found, factors), added(unfolded(found), factors), rtol=1e-12, atol=1e-13)
    assert added(found, factors, torch.float32).dtype == torch.float32


@EACH
def test_every_place_meets_every_pixel_under_its_kernel_and_no_padding(name: str) -> None:
    geometry, pixels = GEOMETRIES[name]
    places = places_of(geometry, pixels)
    found = []
    for at, under in geometry.positions(pixels, places):
        at_places, at_pixels = numbered(places)[at].flatten(), numbered(pixels)[under].flatten()
        found.append(set(zip(at_places.tolist(), at_pixels.tolist(), strict=True)))
    for number, position in enumerate(itertools.product(*map(range, geometry.kernel))):
        expected = set()
        for place in itertools.product(*map(range, places)):
            about = zip(place, geometry.stride, position, geometry.dilation, geometry.padding, strict=True)
            pixel = tuple(t * stride + at * by - padding for t, stride, at, by, padding in about)
            if all(0 <= one < size for one, size in zip(pixel, pixels, strict=True)):
                expected.add((int(numbered(places)[place]), int(numbered(pixels)[pixel])))
        assert found[number] == expected


@pytest.mark.parametrize("left", [1e-1, 1e-3, 1e-6])
def test_a_norm_from_pixels_is_never_too_small(left: float) -> None:
    """The second half of a series cancels the first, but for ``left``; between them the kernel finds zeros."""
    draw = torch.Generator().manual_seed(1)
    inputs, deltas = torch.zeros(1, 3, 12), torch.zeros(1, 2, 12)
    inputs[..., 1:5], deltas[..., 1:5] = (torch.randn(1, n, 4, generator=draw) for n in (3, 2))
    inputs[..., 7:11], deltas[..., 7:11] = inputs[..., 1:5] * (1 + left), -deltas[..., 1:5]
    geometry, owners = Geometry((3,), (1,), (1,), (1,), 1), RowOwners(torch.arange(1), CPU)
    assert geometry.by_pixels(12, 12)
    found = ConvolutionRecord((nn.Parameter(torch.zeros(2, 3, 3)),), inputs, deltas, owners, geometry)
    square = Fraction(float(found.squares()[0]))
    exact = Fraction(0)
    for one, column in itertools.product(deltas[0].tolist(), geometry.patches(inputs)[0].t().tolist()):
        exact += sum((Fraction(a) * Fraction(d) for a, d in zip(column, one, strict=True)), Fraction(0)) ** 2
    assert square >= exact > 0
    if left > 1e-2:
        assert square <= exact * Fraction(1 + 1e-10)


@EACH
def test_a_samples_norm_is_the_same_bits_whoever_is_beside_it(name: str) -> None:
    owners = RowOwners(torch.arange(32), CPU)
    found = entry(name, owners, channels=8, outputs=16)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(2))
    others = torch.arange(32) % 3 > 0
    before = found.squares()
    found.inputs, found.deltas = found.inputs[order], found.deltas[order]
    found.inputs[others] *= 1e10
    for one, again in zip(before, found.squares(), strict=True):
        assert torch.equal(one[order][~others], again[~others])


@EACH
@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_formed_one_after_the_other_are_those_formed_at_once(
    name: str, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (plain, pixels), draw = GEOMETRIES[name], torch.Generator().manual_seed(0)
    geometry = Geometry(plain.kernel, plain.stride, plain.padding, plain.dilation, groups)
    inputs = torch.randn(5, 2 * groups, *pixels, generator=draw, dtype=torch.float64)
    deltas = torch.randn(5, 3 * groups, *places_of(geometry, pixels), generator=draw, dtype=torch.float64)
    found = []
    for few, many in ((0, math.inf), (math.inf, math.inf), (0, 1)):
        monkeypatch.setattr(patches, "_FEW_CHANNELS", few)
        monkeypatch.setattr(patches, "_MANY_PLACES", many)
        found.append(geometry.per_sample_gradients(inputs, deltas))
    assert found[0].shape == (5, 3 * groups, 2, *geometry.kernel)
    for each in found[1:]:
        torch.testing.assert_close(each, found[0], rtol=1e-12, atol=1e-13)


def test_a_sample_that_is_not_finite_is_not_in_the_sum() -> None:
    whole = entry("same size", RowOwners(ALONE, CPU))
    (weight,), sums = whole.weights, []
    assert isinstance(weight, nn.Parameter)
    for planted in (0.0, math.nan, math.inf):
        inputs, deltas = whole.inputs.clone(), whole.deltas.clone()
        inputs[2] = planted
        found = Tape()
        totals: dict[torch.Tensor, torch.Tensor] = {weight: torch.zeros(weight.numel(), dtype=torch.float64)}
        found.open(RowOwners(ALONE, CPU))
        found.record_convolution(weight, whole.geometry, inputs, deltas)
        found.add_weighted_sum(found.factors(0.5), totals)
        assert found.empty
        sums.append(totals[weight])
    assert sums[0].norm() > 0
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(sums[0], sums[2])


@pytest.mark.parametrize("groups", [1, 2])
def test_what_lies_on_no_pixel_is_zero_whatever_a_kernel_left_there(
    groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16 some leave the memory as it was: another patient's numbers."""
    geometry = Geometry((3, 2), (3, 1), (1, 0), (1, 1), groups)
    inputs, grad = torch.ones(5, 4, 2, 3), torch.ones(5, 6, 1, 2)
    shape = (5, 6, 4 // groups, 3, 2)
    monkeypatch.setattr(Geometry, "_per_sample_gradients", lambda *_: torch.full(shape, torch.nan))
    found = geometry.per_sample_gradients(inputs, grad)
    assert (found[..., 0, :] == 0.0).all()  # above the first row of pixels
    assert found[..., 1:, :].isnan().all()
