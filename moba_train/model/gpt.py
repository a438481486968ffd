"""ModelConfig -> Megatron-core GPTModel: pre-norm layers of GQA and SwiGLU, RMSNorm, no dropout; biases on q, k, v.

Megatron's local layer spec is used as it is, with two parts replaced: the core attention is ours
(`moba_train.model.attention`), which also applies the rotary embedding (Megatron's position_embedding_type is "none"),
and so are the norms (`moba_train.model.norm`).

Tensor-parallel ranks always share a shard's tokens outside the projections and the attention (Megatron's sequence
parallelism, arXiv 2205.05198): each all-reduce becomes a reduce-scatter and an all-gather, and norms, residuals and
saved inputs take 1/tp of the memory.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from moba_train.config.schema import EngineConfig, ModelConfig
from moba_train.errors import ConfigError
from moba_train.model import megatron_cpu
from moba_train.model.row_context import RowContext
from moba_train.parallel.topology import Topology
from moba_train.quiet import quiet_imports

with quiet_imports():
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

    from moba_train.model.attention import ContextCoreAttention
from moba_train.model.norm import RmsNorm
from moba_train.model.offload import CudaLink, Link, checkpoints_through
from moba_train.model.tiled_loss import Head, OnTile, token_losses
from moba_train.model.tiled_mlp import tile_mlp
from moba_train.model.weights import initialize_weights, mark_weights


class Gpt(GPTModel):  # type: ignore[misc]  # megatron-core has no types
    """Megatron's model, without logits: it ends in hidden states, which the loss multiplies by the head tile by tile.

    Attributes:
        on_loss_tile: is told about every tile of the loss.
        vocab_padding: rows of the head that stand for no token.
        checkpoint_link: where the checkpoints of recompute wait; None = where they are.
    """

    on_loss_tile: OnTile | None = None
    vocab_padding: int = 0
    checkpoint_link: Link | None = None

    def forward(
        self,
        input_ids: Tensor,
        position_ids: None,
        attention_mask: None,
        *,
        packed_seq_params: RowContext,
        labels: Tensor | None = None,
    ) -> Tensor:
        """See `build_gpt`. Positions and mask follow from the RowContext."""
        with self._checkpoints(input_ids.shape[1]):
            hidden: Tensor = super().forward(
                input_ids, position_ids, attention_mask, packed_seq_params=packed_seq_params
            )
        if labels is None or not self.post_process:
            return hidden
        return token_losses(hidden[0], labels[0], self.head)[None]

    def _checkpoints(self, num_tokens: int) -> AbstractContextManager[None]:
        if self.checkpoint_link is None or not self.training:
            return nullcontext()
        tokens_of_rank = num_tokens // self.config.tensor_model_parallel_size
        return checkpoints_through(self.checkpoint_link, (tokens_of_rank, 1, self.config.hidden_size))

    @property
    def head(self) -> Head:
        """The output head of the last pipeline rank, tied or not."""
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        return Head(weight, self.pg_collection.tp, on_tile=self.on_loss_tile, padding=self.vocab_padding)


def transformer_config(model: ModelConfig, engine: EngineConfig, topology: Topology) -> TransformerConfig:
    """Megatron's configuration of the same model. Raises ConfigError where the mesh does not divide the model."""
    _check_mesh(model, topology)
    dtype = torch.bfloat16 if engine.precision == "bf16" else torch.float32
    full_recompute = engine.recompute == "full"
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        qk_layernorm=model.qk_norm,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=topology.tp,
        sequence_parallel=topology.tp > 1,
        context_parallel_size=topology.cp,
        pipeline_model_parallel_size=topology.pp,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=engine.precision == "bf16",
        batch_p2p_sync=False,  # a wait for the device after every exchange of stages, for PyTorch of long ago
        use_cpu_initialization=True,
        perform_initialization=False,  # `initialize_weights` does it, the same for any mesh
        calculate_per_token_loss=True,
        recompute_granularity="full" if full_recompute else None,
        recompute_method="uniform" if full_recompute else None,
        recompute_num_layers=1 if full_recompute else None,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
    )


def layer_spec(model: ModelConfig) -> ModuleSpec:
    """Megatron's local layer with our core attention and norms."""
    spec = get_gpt_layer_local_spec(qk_layernorm=model.qk_norm, normalization="RMSNorm")
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    attention.core_attention = partial(ContextCoreAttention, key_conv=model.key_conv)
    layer.input_layernorm = layer.pre_mlp_layernorm = RmsNorm
    if model.qk_norm:
        attention.q_layernorm = attention.k_layernorm = RmsNorm
    return spec


FillWeights = Callable[[Gpt], None]
"""Fills this rank's part of a new model with weights; collective."""


def build_gpt(
    model: ModelConfig, engine: EngineConfig, topology: Topology, *, seed: int, fill: FillWeights | None = None
) -> Gpt:
    """This rank's part of the model, initialised, on `topology.device`.

    The weights come from `fill`; without it they are a function of (model, seed) alone: any mesh starts from the same
    model. The model's forward takes token ids [1,S] of this rank's shard and a RowContext as `packed_seq_params`; the
    last pipeline rank returns the final hidden states [1, S / tp, hidden_size] or, given labels [1,S], the loss of each
    token, fp32 [1,S]; see `tiled_loss` for what to do with hidden states. S is a multiple of tp: the shard's own tokens
    come first, the rest is padding that no other token sees.
    """
    megatron_cpu.compute_on(topology.device)
    _check_offload(engine, topology)
    config = transformer_config(model, engine, topology)
    layers = [layer_spec(model)] * (model.num_layers // topology.pp)
    with megatron_cpu.cuda_calls_on_cpu():
        if config.sequence_parallel:  # then Megatron forks this tracker in every forward; our models draw nothing
            model_parallel_cuda_manual_seed(0)
        gpt = Gpt(
            config=config,
            transformer_layer_spec=TransformerBlockSubmodules(layer_specs=layers, layer_norm=RmsNorm),
            vocab_size=model.vocab_size,
            max_sequence_length=1,  # only learned position embeddings would read it
            pre_process=topology.pp_rank == 0,
            post_process=topology.pp_rank == topology.pp - 1,
            share_embeddings_and_output_weights=model.tied_head,
            position_embedding_type="none",
        )
    gpt.vocab_padding = model.vocab_padding
    mark_weights(gpt)
    if fill is None:
        initialize_weights(gpt, model, topology, seed=seed)
    placed: Gpt = gpt.to(device=topology.device, dtype=config.params_dtype)
    if placed.post_process:
        placed.output_layer.forward = _hand_on  # its weight stays where checkpoints have it
    if engine.recompute == "full":
        for layer in placed.decoder.layers:
            tile_mlp(layer.mlp, num_ranks=topology.tp)
    if engine.offload == "host":
        placed.checkpoint_link = CudaLink(topology.device)
    if fill is not None:
        fill(placed)
    return placed


def _hand_on(hidden: Tensor, weight: Tensor | None, runtime_gather_output: bool | None) -> tuple[Tensor, None]:
    """The forward of the output layer, in Megatron's form."""
    return hidden, None


def _check_offload(engine: EngineConfig, topology: Topology) -> None:
    if engine.offload == "host" and topology.device.type != "cuda":
        raise ConfigError(
            "checkpoints are in host memory already where the model runs on the CPU",
            where="engine.offload",
            got='"host" on a CPU',
            allowed='"none"',
            fix='set engine.offload = "none"',
        )


def _check_mesh(model: ModelConfig, topology: Topology) -> None:
    divided = (
        ("model.num_heads", model.num_heads, "tp", topology.tp),
        ("model.num_kv_heads", model.num_kv_heads, "tp", topology.tp),
        ("model.ffn_hidden_size", model.ffn_hidden_size, "tp", topology.tp),
        ("model.vocab_size", model.vocab_size, "tp", topology.tp),
        ("model.num_layers", model.num_layers, "pp", topology.pp),
    )
    for where, value, degree_name, degree in divided:
        if value % degree:
            raise ConfigError(
                f"{where} must be divisible by parallel.{degree_name}",
                where=where,
                got=f"{value} with parallel.{degree_name} = {degree}",
                allowed=f"a multiple of {degree}",
                fix=f"lower parallel.{degree_name} or change {where}",
            )


__all__ = ["FillWeights", "Gpt", "build_gpt", "layer_spec", "transformer_config"]
