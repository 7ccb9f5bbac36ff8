"""Linear layers whose weights are stored in a format: what is stored, how it is made, and the products with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from lockstep.kernels.linear.linear import linear
from lockstep.kernels.linear.linear_silu_mul import linear_silu_mul
from lockstep.kernels.linear.row_parallel_linear import row_parallel_linear

SumOverRanks = Callable[[torch.Tensor], torch.Tensor]


class Part(NamedTuple):
    """One of the tensors in which a weight is stored."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class LinearFormat(ABC):
    """How the weights of linear layers are stored, in the engine, and what the trainer's forward pass makes of its own.

    A weight [..., N, K] is stored as parts, each a parameter of its layer: "weight", and beside it whatever the format
    needs, "weight_scale" for example. The trainer keeps whole weights and multiplies with `as_served`. Promise 2 asks
    that its products have the bits of the engine's; the products below do, since both are of `dense`.
    A format with kernels of its own overrides them.
    """

    @abstractmethod
    def parts(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Part]:
        """What is stored of a weight of a model in dtype, by name; the first is called "weight"."""

    @abstractmethod
    def encode(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parts of a weight. The same bits on every device."""

    @abstractmethod
    def dense(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The weight that parts, in their order, stand for, in the model's dtype."""

    def as_served(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight that the engine multiplies with where the trainer has this one. Its gradient passes as it is."""
        return _AsServed.apply(weight, self)

    def product(self, x: torch.Tensor, parts: Sequence[torch.Tensor], bias: torch.Tensor | None) -> torch.Tensor:
        """See `kernels.linear`."""
        return linear(x, self.dense(parts), bias)

    def silu_product(self, x: torch.Tensor, parts: Sequence[torch.Tensor], bias: torch.Tensor | None) -> torch.Tensor:
        """See `kernels.linear_silu_mul`."""
        return linear_silu_mul(x, self.dense(parts), bias)

    def row_product(
        self,
        x: torch.Tensor,
        parts: Sequence[torch.Tensor],
        bias: torch.Tensor | None,
        splits: int,
        sum_over_ranks: SumOverRanks | None,
    ) -> torch.Tensor:
        """See `kernels.row_parallel_linear`."""
        return row_parallel_linear(x, self.dense(parts), bias, splits, sum_over_ranks)


class PlainFormat(LinearFormat):
    """The weight itself, in the model's dtype."""

    def parts(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Part]:
        return {"weight": Part(shape, dtype)}

    def encode(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"weight": weight}

    def dense(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        return parts[0]

    def as_served(self, weight: torch.Tensor) -> torch.Tensor:
        return weight


class _AsServed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, format):
        return format.dense(tuple(format.encode(weight).values()))

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


# By the name that EngineConfig and TrainerConfig call it by. Each has numerics of its own.
FORMATS: dict[str, LinearFormat] = {"plain": PlainFormat()}
PLAIN = FORMATS["plain"]


def format_named(name: str, owner: str, ranks: int) -> LinearFormat:
    """Raises ValueError, which calls the option by `owner`, for a name that is none, and for a format that is not cut
    over ranks yet."""
    if not isinstance(name, str) or name not in FORMATS:
        raise ValueError(f"{owner}={name!r} is no format of linear layers: there are {', '.join(FORMATS)}")
    if ranks > 1 and FORMATS[name] is not PLAIN:
        raise ValueError(f"{owner}={name!r} takes one tensor-parallel rank so far, and there are {ranks}")
    return FORMATS[name]


class Weights(nn.Module):
    """A named place for a weight in a format; the arithmetic is in the format and in the kernels.

    The tensors are also held in a tuple: a look-up of `module.weight` takes nn.Module a microsecond, and a decode step
    does a dozen per layer.
    """

    def __init__(self, shape: tuple[int, ...], format: LinearFormat, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.shape, self.format, self.dtype = shape, format, dtype
        for name, part in format.parts(shape, dtype).items():
            tensor = torch.empty(part.shape, dtype=part.dtype, device=device)
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.parts = tuple(self.parameters())

    @torch.no_grad()
    def store(self, weight: torch.Tensor) -> None:
        """Replaces what is stored, in place, by the parts of a weight."""
        for name, part in self.format.encode(weight.to(self.parts[0].device, self.dtype)).items():
            getattr(self, name).copy_(part)

    def dense(self) -> torch.Tensor:
        """The whole weight, for products that are not a linear layer's."""
        return self.format.dense(self.parts)


class Linear(Weights):
    """x[T, K] -> [T, N]. weight [N, K]; column-parallel: a rank holds some of the N."""

    def __init__(
        self,
        rows: int,
        columns: int,
        format: LinearFormat,
        dtype: torch.dtype,
        device: torch.device,
        bias: bool = False,
    ) -> None:
        super().__init__((rows, columns), format, dtype, device)
        vector = nn.Parameter(torch.empty(rows, dtype=dtype, device=device), requires_grad=False) if bias else None
        self.register_parameter("bias", vector)
        self._bias = (vector,)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return self.format.product(x, self.parts, self._bias[0])

    def silu_product(self, x: torch.Tensor) -> torch.Tensor:
        """[T, N / 2]: the rows of weight are a gate's, then as many of what it multiplies."""
        return self.format.silu_product(x, self.parts, self._bias[0])


class RowLinear(Linear):
    """x[T, K] -> [T, N], where a rank holds some of the K, and the sum over them is of all ranks.

    splits: parts of this rank's sum. sum_over_ranks: None for one rank. Both as `kernels.row_parallel_linear` has them.
    """

    def __init__(self, *args, splits: int = 1, sum_over_ranks: SumOverRanks | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._splits, self._sum_over_ranks = splits, sum_over_ranks

    def product(self, x: torch.Tensor) -> torch.Tensor:
        if self._splits == 1 and self._sum_over_ranks is None:
            return self.format.product(x, self.parts, self._bias[0])
        return self.format.row_product(x, self.parts, self._bias[0], self._splits, self._sum_over_ranks)


def encoded(model: nn.Module) -> dict[str, Weights]:
    """The places of the weights that `model` does not store as they are, by the names of the whole weights."""
    places = {f"{prefix}.weight": module for prefix, module in model.named_modules() if isinstance(module, Weights)}
    return {name: place for name, place in places.items() if place.format is not PLAIN}


def encode(name: str, place: Weights, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The parts of the whole weight `name`, by their own full names."""
    prefix = name.removesuffix("weight")
    return {prefix + part_name: part for part_name, part in place.format.encode(weight.to(place.dtype)).items()}
