"""ModelConfig -> Megatron-core GPTModel: pre-norm layers of GQA and SwiGLU, RMSNorm, no biases, no dropout.

Megatron's local layer spec is used as it is, with one part replaced: the core attention is ours
(`moba_train.model.attention`), which also applies the rotary embedding; Megatron's position_embedding_type is "none".
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from moba_train.config.schema import EngineConfig, ModelConfig
from moba_train.errors import ConfigError
from moba_train.model import megatron_cpu
from moba_train.parallel.topology import Topology
from moba_train.quiet import quiet_imports

with quiet_imports():
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_config import TransformerConfig

    from moba_train.model.attention import ContextCoreAttention
from moba_train.model.loss import token_losses
from moba_train.model.weights import initialize_weights


class Gpt(GPTModel):  # type: ignore[misc]  # megatron-core has no types
    """Megatron's model with our loss."""

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """labels int64 [B,S], logits [S,B,V] -> the loss of each token, fp32 [B,S]."""
        losses_SB = token_losses(logits, labels.T.contiguous(), tp=self.config.tensor_model_parallel_size)
        return losses_SB.T.contiguous()


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
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=topology.tp,
        context_parallel_size=topology.cp,
        pipeline_model_parallel_size=topology.pp,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=engine.precision == "bf16",
        variable_seq_lengths=topology.pp > 1,  # shards of one row differ by a token when the row does not divide
        moe_token_dispatcher_type="alltoall",  # unused; Megatron's check of variable_seq_lengths reads it
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
    """Megatron's local layer with our core attention."""
    spec = get_gpt_layer_local_spec(qk_layernorm=model.qk_norm, normalization="RMSNorm")
    attention = spec.submodules.self_attention
    attention.submodules.core_attention = partial(ContextCoreAttention, key_conv=model.key_conv)
    return spec


def build_gpt(model: ModelConfig, engine: EngineConfig, topology: Topology, *, seed: int) -> Gpt:
    """This rank's part of the model, initialised, on `topology.device`.

    The weights are a function of (model, seed) alone: any mesh starts from the same model. The model's forward takes
    token ids [1,S] of this rank's shard and a RowContext as `packed_seq_params`; it returns logits [1, S, vocabulary /
    tp] or, given labels [1,S], the loss of each token [1,S].
    """
    config = transformer_config(model, engine, topology)
    with megatron_cpu.cuda_calls_on_cpu():
        gpt = Gpt(
            config=config,
            transformer_layer_spec=layer_spec(model),
            vocab_size=model.vocab_size,
            max_sequence_length=1,  # only learned position embeddings would read it
            pre_process=topology.pp_rank == 0,
            post_process=topology.pp_rank == topology.pp - 1,
            share_embeddings_and_output_weights=model.tied_head,
            position_embedding_type="none",
        )
    initialize_weights(gpt, model, topology, seed=seed)
    placed: Gpt = gpt.to(device=topology.device, dtype=config.params_dtype)
    return placed


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


__all__ = ["Gpt", "build_gpt", "layer_spec", "transformer_config"]
