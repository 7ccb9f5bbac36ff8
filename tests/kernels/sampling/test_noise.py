import pytest
import torch

from lockstep.kernels.sampling import noise
from lockstep.kernels.sampling.noise import gumbel_noise, gumbel_noise_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEEDS = torch.tensor([0, 1, 2**63 - 1, 12345678901234, 7])
POSITIONS = torch.tensor([0, 7, 2**40 + 3, 5, 2**31])


def chi_square_is_plausible(observed: torch.Tensor, expected: torch.Tensor) -> bool:
    """Within five standard deviations of what the chi-square statistic should be (mean n, variance 2n)."""
    degrees = observed.numel() - 1
    statistic = ((observed.double() - expected) ** 2 / expected).sum()
    return abs(statistic - degrees) < 5 * (2 * degrees) ** 0.5


def test_philox_gives_the_published_known_answer():
    # Random123's kat_vectors: philox4x32 10, counter and key all zero.
    bits = noise._philox_bits_reference(torch.tensor([0]), torch.tensor([0]), 512)[0]
    assert bits[[0, 128, 256, 384]].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("vocab_size", [1, 100, 512, 1300])
def test_every_implementation_has_the_same_bits(vocab_size):
    expected = gumbel_noise_reference(SEEDS, POSITIONS, vocab_size)
    assert torch.equal(gumbel_noise(SEEDS, POSITIONS, vocab_size), expected)
    on_device = noise._gumbel_noise_triton(SEEDS.to(DEVICE), POSITIONS.to(DEVICE), vocab_size)
    assert torch.equal(on_device.cpu(), expected)


def test_noise_is_minus_log_minus_log_u():
    bits = noise._philox_bits_reference(SEEDS, POSITIONS, 20000)
    complement = ((bits.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24).double()
    exact = -torch.log(-torch.log1p(-complement))
    error = (gumbel_noise(SEEDS, POSITIONS, 20000) - exact).abs() / exact.abs().clamp(min=1)
    assert error.max() < 1e-6


@pytest.mark.parametrize("bits", [0, 1, 2**24, 2**31, 2**32 - 1])
def test_extreme_hashes_give_finite_bounded_noise(bits, monkeypatch):
    monkeypatch.setattr(noise, "_philox_bits_reference", lambda seeds, positions, size: torch.full((1, size), bits))
    value = gumbel_noise_reference(SEEDS[:1], POSITIONS[:1], 1).item()
    assert -2.82 < value < min(22.88, noise.MAX_NOISE)


def test_a_value_depends_on_its_coordinates_only():
    whole = gumbel_noise(SEEDS, POSITIONS, 1000)
    for row in range(len(SEEDS)):
        assert torch.equal(gumbel_noise(SEEDS[row : row + 1], POSITIONS[row : row + 1], 700)[0], whole[row, :700])


def _uniforms(axis: str, count: int) -> torch.Tensor:
    """[256, count] uniforms with neighbouring coordinates of one kind along the last dimension."""
    if axis == "token":
        seeds, positions = torch.arange(256), torch.zeros(256, dtype=torch.int64)
        return torch.exp(-torch.exp(-gumbel_noise(seeds, positions, count).double()))
    steps, zeros = torch.arange(count), torch.zeros(count, dtype=torch.int64)
    seeds, positions = (steps, zeros + 3) if axis == "seed" else (zeros + 11, steps)
    return torch.exp(-torch.exp(-gumbel_noise(seeds, positions, 256).double())).t()


@pytest.mark.parametrize("axis", ["seed", "position", "token"])
def test_uniform_and_uncorrelated_along(axis):
    u = _uniforms(axis, 2048)
    counts = torch.histc(u, bins=256, min=0, max=1)
    assert chi_square_is_plausible(counts, torch.full_like(counts, u.numel() / 256).double())
    centred = (u - 0.5) * 12**0.5
    for lag in (1, 2, 4, 128, 512):
        products = centred[:, lag:] * centred[:, :-lag]
        assert abs(products.mean()) < 5 / products.numel() ** 0.5, f"lag {lag}"
    across = centred[1:] * centred[:-1]
    assert abs(across.mean()) < 5 / across.numel() ** 0.5


def test_wrong_inputs_are_named():
    with pytest.raises(ValueError, match="int64"):
        gumbel_noise(SEEDS.int(), POSITIONS, 4)
    with pytest.raises(ValueError, match=r"\[B\]"):
        gumbel_noise(SEEDS, POSITIONS[:2], 4)
