"""The decoder that the engine runs: lockstep's kernels over weights with Megatron-core's names and layout."""

import torch
from torch import nn

from lockstep.engine.memory.layer_caches import LayerCache, new_layer_caches
from lockstep.engine.models.config import ModelConfig
from lockstep.engine.models.layers.context import AttentionContext
from lockstep.engine.models.layers.layer import Layer, ModuleFactory
from lockstep.engine.models.layers.linear import PLAIN, LinearFormat, Weights
from lockstep.engine.models.layers.shard import WHOLE, Shard
from lockstep.engine.models.sharding import shard_config
from lockstep.engine.ranks.rank_group import RankGroup
from lockstep.kernels.linear.linear import linear
from lockstep.kernels.linear.scalar_head import scalar_head
from lockstep.kernels.memory.embedding import embedding, embedding_shard


class _Embedding(nn.Module):
    def __init__(self, config: ModelConfig, factory: ModuleFactory) -> None:
        super().__init__()
        self.word_embeddings = _matrix(config.vocab_size, factory)


class _Layers(nn.Module):
    def __init__(self, config: ModelConfig, factory: ModuleFactory) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(layer, factory) for layer in config.layers)
        self.final_layernorm = factory.norm(config.hidden_size, config.final_norm)


class Decoder(nn.Module):
    """Token ids and positions in, hidden states and logits out, with keys and values in a paged cache.

    Parameters are uninitialised (see `engine.checkpoints`), take no gradient, and stay where they are for the life of
    the module: new weights are copied into them. Their names are those of `names.expand(config)`, and in a format that
    stores a weight in parts those of the parts. The bits of an output row depend on that row's request alone.

    config is the whole model's. Where it runs on several ranks, this one holds its part (`sharding.parameter_shards`),
    of the sizes `local_config`, and every rank calls the same methods with the same arguments.
    row_parallel_splits: see `kernels.row_parallel_linear`; in all, over the ranks, which divide it.
    share_experts: the ranks share out the experts of a layer, whole; else each holds all of them.
    linear_format: in which the layers' products have their weights; embedding, router and head are plain.
    """

    def __init__(
        self,
        config: ModelConfig,
        device: str | torch.device,
        dtype: torch.dtype,
        row_parallel_splits: int = 1,
        ranks: RankGroup | None = None,
        share_experts: bool = False,
        linear_format: LinearFormat = PLAIN,
    ) -> None:
        super().__init__()
        self.config = config
        self.ranks = ranks
        self.shard = WHOLE if ranks is None else Shard(ranks.rank, ranks.size, ranks.size if share_experts else 1)
        self.local_config = shard_config(config, self.shard)
        factory = ModuleFactory(
            hidden_size=config.hidden_size,
            device=torch.device(device),
            dtype=dtype,
            format=linear_format,
            splits=row_parallel_splits // self.shard.size,
            sum_over_ranks=None if ranks is None else ranks.sum,
            join_rows=ranks.sum_disjoint if self.shard.expert_ranks > 1 else None,
        )
        self.embedding = _Embedding(self.local_config, factory)
        self.decoder = _Layers(self.local_config, factory)
        output_rows = 1 if config.head == "scalar" else self.local_config.vocab_size
        self.output_layer = None if config.tie_word_embeddings else _matrix(output_rows, factory)
        tables = {None: None} | {name: rope.table(device) for name, rope in config.ropes.items()}
        self.rope_tables = [tables[layer.mixer.rope] for layer in config.layers]  # of each layer

    def new_caches(self, num_pages: int, page_size: int, dtype: torch.dtype) -> list[LayerCache]:
        """The uninitialised caches of this rank's part of all layers."""
        device = self.embedding.word_embeddings.weight.device
        return new_layer_caches(self.local_config.caches, num_pages, page_size, dtype, device)

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        context: AttentionContext,
        last_context: AttentionContext | None = None,
    ) -> torch.Tensor:
        """Hidden states [T, H] after the final norm; the rows' keys and values go to the cache.

        token_ids, positions: int64 [T]. last_context: the last layer's, if not all hidden states are wanted; those of
        its `rows` are returned.
        """
        return self.forward_with_aux(token_ids, positions, context, (), last_context)[0]

    def forward_with_aux(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        context: AttentionContext,
        aux_layers: tuple[int, ...],
        last_context: AttentionContext | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(what `forward` gives, to the bit; aux [T, A * H], the hidden states of all rows that enter A layers).

        aux_layers: ascending, from 0; num_layers is the final norm, which is entered by the rows of the last layer
        alone, so no last_context goes with it. The states lie side by side in that order.
        """
        hidden = self._embed(token_ids)
        residual = None
        aux = hidden.new_empty(len(hidden), len(aux_layers), self.config.hidden_size)
        last = self.config.num_layers - 1
        for number, (layer, table, cache) in enumerate(
            zip(self.decoder.layers, self.rope_tables, context.kv_caches, strict=True)
        ):
            if number in aux_layers:
                entering = aux[:, aux_layers.index(number)]
                entering.copy_(hidden) if residual is None else torch.add(hidden, residual, out=entering)
            own_context = (last_context or context) if number == last else context
            hidden, residual = layer(hidden, residual, positions, table, cache, own_context)
        hidden, summed = self.decoder.final_layernorm.add_normed(hidden, residual)
        if self.config.num_layers in aux_layers:
            assert last_context is None, "the states that enter the final norm are wanted of all rows"
            aux[:, -1] = summed
        return hidden, aux.flatten(1)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """Logits [N, V] of the hidden states [N, H] of `forward`, in the model's dtype. None on ranks other than 0.

        Of a model with a scalar head its values fp32 [N, 1], on every rank.
        """
        if self.config.head == "scalar":
            return scalar_head(hidden, self.output_layer.weight)
        logits = linear(hidden, self.head_weight, None)
        return logits if self.ranks is None else self.ranks.gather_columns(logits, self.config.vocab_size)

    @property
    def head_weight(self) -> torch.Tensor:
        """[V, H] (of a rank: its part), tied to the embedding or not."""
        head = self.embedding.word_embeddings if self.output_layer is None else self.output_layer
        return head.weight

    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        weight = self.embedding.word_embeddings.weight
        if self.ranks is None:
            return embedding(token_ids, weight)
        first_token = self.shard.part_of(self.config.vocab_size).start
        return self.ranks.sum_disjoint(embedding_shard(token_ids, weight, first_token))


def _matrix(rows: int, factory: ModuleFactory) -> Weights:
    """A plain [rows, hidden size]."""
    return Weights((rows, factory.hidden_size), PLAIN, factory.dtype, factory.device)
