"""Megatron-core's names and layout <-> transformers' names, as an invertible table.

Inside Lockstep a parameter has Megatron-core's name and layout. transformers' names exist only in the families' tables,
for loading and export.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import torch

from lockstep.engine.models.config import ModelConfig
from lockstep.engine.models.families import FAMILIES
from lockstep.engine.models.families.name_rules import NameRule
from lockstep.engine.models.layers.layer import LayerPart, LayerSpec
from lockstep.engine.models.layers.moe import Experts


@dataclass(frozen=True)
class Entry:
    """A NameRule with names and sizes filled in: one parameter of one model.

    hf_names and hf_shapes are in the order in which `to_megatron` takes and `to_hf` gives the tensors: expert by expert
    for experts' parameters. num_groups is the number of query groups of a "qkv" entry, else 1. expert_dim is the
    dimension that counts experts, and experts the part of the layer that they are, None where there are none.
    shard_dim, fp32, hf_stacked: see NameRule.
    """

    megatron: str
    hf_names: tuple[str, ...]
    kind: Literal["copy", "qkv", "gate_up"]
    shape: tuple[int, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    num_groups: int
    shard_dim: int | None
    expert_dim: int | None = None
    experts: Experts | None = None
    fp32: bool = False
    hf_stacked: str | None = None

    @property
    def num_elements(self) -> int:
        return prod(self.shape)


def expand(config: ModelConfig) -> list[Entry]:
    """Every parameter of the model, once, in the order: embedding, layers in ascending order, final norm, head."""
    rules = FAMILIES[config.family].rules
    sizes = {"vocab": config.vocab_size, "hidden": config.hidden_size, "scores": 1}
    of_layers = [rule for rule in rules if "{i}" in rule.megatron]
    first = rules.index(of_layers[0])
    before, behind = rules[:first], [rule for rule in rules[first:] if rule not in of_layers]
    entries = [_entry(rule, sizes) for rule in before if _exists(rule, config)]
    for number, layer in enumerate(config.layers):
        entries += _layer_entries(of_layers, sizes, number, layer)
    return entries + [_entry(rule, sizes) for rule in behind if _exists(rule, config)]


def _layer_entries(rules: Sequence[NameRule], sizes: Mapping[str, int], number: int, layer: LayerSpec) -> list[Entry]:
    owners = {type(part): part for part in layer.parts}
    own_sizes = dict(sizes)
    for part in layer.parts:
        own_sizes.update(part.dimensions())
    return [
        _entry(rule, own_sizes, str(number), owners.get(rule.part))
        for rule in rules
        if rule.part is None or (rule.part in owners and _exists(rule, owners[rule.part]))
    ]


def _exists(rule: NameRule, owner: ModelConfig | LayerPart) -> bool:
    return rule.when is None or getattr(owner, rule.when[0]) == rule.when[1]


def _entry(rule: NameRule, sizes: Mapping[str, int], layer: str = "", owner: LayerPart | None = None) -> Entry:
    """layer: the number that stands in names; owner: the part of the layer that has the parameter."""
    shape = tuple(sizes[dimension] for dimension in rule.shape)
    of_experts = "{e}" in rule.hf[0]
    rows, *rest = shape[1:] if of_experts else shape
    if rule.kind == "qkv":
        hf_shapes = tuple((sizes[of], *rest) for of in ("query", "key_value", "key_value"))
    elif rule.kind == "gate_up":
        hf_shapes = ((rows // 2, *rest),) * 2
    else:
        hf_shapes = ((rows, *rest),)
    hf_names = tuple(name.replace("{i}", layer) for name in rule.hf)
    if of_experts:
        hf_names = tuple(name.replace("{e}", str(e)) for e in owner.held for name in hf_names)
        hf_shapes *= shape[0]
    return Entry(
        megatron=rule.megatron.replace("{i}", layer),
        hf_names=hf_names,
        kind=rule.kind,
        shape=shape,
        hf_shapes=hf_shapes,
        num_groups=sizes["groups"] if rule.kind == "qkv" else 1,
        shard_dim=rule.shard_dim,
        expert_dim=0 if of_experts else None,
        experts=owner if of_experts else None,
        fp32=rule.fp32,
        hf_stacked=rule.hf_stacked and rule.hf_stacked.replace("{i}", layer),
    )


def as_stacked(entry: Entry) -> Entry:
    """The same parameter of experts, for a file that holds it under its one name `hf_stacked`."""
    return replace(entry, kind="copy", hf_names=(entry.hf_stacked,), hf_shapes=(entry.shape,))


def itemsizes(config: ModelConfig, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of an element of each parameter of a model that is held in dtype."""
    return {entry.megatron: torch.float32.itemsize if entry.fp32 else dtype.itemsize for entry in expand(config)}


def head_matrix_shapes(config: ModelConfig) -> set[tuple[int, int]]:
    """(rows, columns) of the matrices that latent attention's up-projection of keys and values holds for each head."""
    return set().union(*(layer.mixer.head_matrices() for layer in config.layers))


def to_megatron(entry: Entry, hf_tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The parameter of shape `entry.shape` from the tensors of `entry.hf_names`, in that order: a permutation of rows.

    A "copy" of one tensor gives back the tensor itself, not a clone. Raises ValueError for a wrong number of tensors or
    a wrong shape.
    """
    if len(hf_tensors) != len(entry.hf_names):
        raise ValueError(
            f"{entry.megatron}: expected the {len(entry.hf_names)} tensors {entry.hf_names}, got {len(hf_tensors)}"
        )
    for name, shape, tensor in zip(entry.hf_names, entry.hf_shapes, hf_tensors, strict=True):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if entry.hf_shapes == (entry.shape,):
        return hf_tensors[0]
    if entry.expert_dim is not None:
        # One expert after the other, each by gate and up: what stacking them gives.
        return torch.cat([tensor.reshape(-1) for tensor in hf_tensors]).view(entry.shape)
    # With one group, and for gate_up, "by group" is plain concatenation along dim 0.
    by_group = [tensor.reshape(entry.num_groups, -1, *tensor.shape[1:]) for tensor in hf_tensors]
    return torch.cat(by_group, dim=1).reshape(entry.shape)


def to_hf(entry: Entry, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The inverse of `to_megatron`: tensors in the order of `entry.hf_names`, possibly views of `tensor`.

    Raises ValueError for a wrong shape.
    """
    if tuple(tensor.shape) != entry.shape:
        raise ValueError(f"{entry.megatron}: expected shape {entry.shape}, got {tuple(tensor.shape)}")
    if entry.hf_shapes == (entry.shape,):
        return (tensor,)
    if entry.expert_dim is not None:
        parts_of_expert = len(entry.hf_names) // entry.shape[0]
        return tuple(part for expert in tensor for part in expert.chunk(parts_of_expert))
    rows_per_group = [shape[0] // entry.num_groups for shape in entry.hf_shapes]
    by_group = tensor.reshape(entry.num_groups, -1, *tensor.shape[1:])
    parts = by_group.split(rows_per_group, dim=1)
    return tuple(part.reshape(shape) for part, shape in zip(parts, entry.hf_shapes, strict=True))


def format_table(entries: Sequence[Entry]) -> str:
    """The table as text, a parameter a line: Megatron name, shape, sharded dimension, kind, transformers names."""
    lines = []
    for entry in entries:
        sharded = "whole" if entry.shard_dim is None else f"dim {entry.shard_dim}"
        sharded = sharded if entry.expert_dim is None else "experts"
        shape = "x".join(map(str, entry.shape))
        lines.append(f"{entry.megatron}  [{shape}]  {sharded}  {entry.kind}  {' '.join(entry.hf_names)}")
    return "\n".join(lines)
