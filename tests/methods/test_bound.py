"""The rate-distortion bound against brute force, and against what methods reach."""

from __future__ import annotations

import pytest
import torch

from ultralowbit.methods.bound import least_error, spectrum
from ultralowbit.methods.sign import Sign
from ultralowbit.methods.statistics import InputStats, output_energy, relative_error


def water_filled(variances: torch.Tensor, bits: float) -> float:
    """The water level found by bisection."""
    low, high = 0.0, variances.max().item()
    for _ in range(200):
        theta = (low + high) / 2
        rate = (variances / theta).log2().clamp_min(0).sum().item() / 2 / len(variances)
        low, high = (theta, high) if rate > bits else (low, theta)
    return variances.clamp_max(theta).sum().item() / variances.sum().item()


@pytest.mark.parametrize("bits", [0.1, 0.5, 1.0, 2.05, 4.0])
def test_it_is_reverse_water_filling(layer, bits):
    hessian = layer(2, 40).hessian
    assert least_error(spectrum(hessian.float()), bits) == pytest.approx(
        water_filled(torch.linalg.eigvalsh(hessian), bits), rel=1e-4
    )


@pytest.mark.parametrize("bits", [0.3, 1.0, 3.0])
def test_no_split_of_the_bits_is_better(bits):
    """Of two directions: every share of the bits, tried."""
    variances = torch.tensor([5.0, 0.7], dtype=torch.float64)
    first = torch.linspace(0, 2 * bits, 20001, dtype=torch.float64)
    errors = variances[0] * 4.0**-first + variances[1] * 4.0 ** -(2 * bits - first)
    assert least_error(spectrum(torch.diag(variances)), bits) == pytest.approx(
        (errors.min() / variances.sum()).item(), rel=1e-6
    )


def test_edges():
    assert least_error(spectrum(torch.eye(8)), 0.0) == 1.0
    assert least_error(spectrum(torch.eye(8)), 2.0) == pytest.approx(2**-4)
    assert least_error(spectrum(torch.zeros(8, 8)), 1.0) == 0.0
    one = torch.zeros(8, 8)
    one[0, 0] = 1.0  # all 16 bits of a row go to the one direction that matters
    assert least_error(spectrum(one), 2.0) == pytest.approx(2.0**-32, rel=1e-3)


@pytest.mark.parametrize("planes", [1, 2])
def test_no_method_is_below_it_and_a_refined_one_is_near(planes):
    """On Gaussian rows and white inputs, where scalar levels lose 1.45 times the bound at one bit, 1.88 at two."""
    weight, x = torch.randn(64 + 1024, 256, generator=torch.Generator().manual_seed(0)).split([64, 1024])
    stats = InputStats(256)
    stats.add(x)
    packed = Sign(planes=planes, refine=3, act_order=True).quantize(weight, stats)
    error = relative_error(weight, packed.dequantize(), stats.hessian, output_energy(weight, stats.hessian))
    least = least_error(spectrum(stats.hessian), packed.bits_per_weight)
    assert least < error < 2.3 * least  # scales: 1/8 of a bit for two planes, 1.19 times


@pytest.mark.parametrize("decay", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("columns", [600, 900])
def test_quadrature_stands_for_the_eigenvalues(columns, decay):
    """Of spectra like those of language models, which fall as powers; some inputs are dead."""
    generator = torch.Generator().manual_seed(columns)
    basis = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64)).Q
    values = torch.arange(1, columns + 1, dtype=torch.float64) ** -decay * 1000
    values[-columns // 10 :] = 0
    hessian = (basis * values) @ basis.T
    for bits in (0.5, 1.0, 2.0, 3.0):
        near = least_error(spectrum(hessian.float()), bits)
        assert near == pytest.approx(water_filled(values.clamp_min(1e-300), bits), rel=0.05)


def test_quadrature_of_what_has_no_spread():
    """After one step nothing is left to span."""
    assert least_error(spectrum(3 * torch.eye(600)), 2.0) == pytest.approx(2**-4, rel=1e-4)
    assert least_error(spectrum(torch.zeros(600, 600)), 2.0) == 0.0
