"""The core attention of every layer: layout changes around `context_attend`, no maths of its own.

Megatron hands over this tensor-parallel rank's heads of the local shard; here keys get their convolution (where the
model has one), queries and keys their rotation, and the plan of the row says full attention or MoBA. Padding behind the
shard (`moba_train.engine.local_row`) ends here: it is cut off before anything looks at other tokens.

Legend: S tokens of this rank's shard, L the same with padding, H query heads, K key/value heads (both of this
tensor-parallel rank), D head dim.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

import moba_kernels
from moba_kernels import MoBA, Routing
from moba_train.errors import BackendError
from moba_train.model.key_conv import KeyConv
from moba_train.model.row_context import RowContext
from moba_train.parallel.context_attention import context_attend
from moba_train.parallel.halo import key_halo
from moba_train.parallel.shard import shard_pieces
from moba_train.quiet import quiet_imports

with quiet_imports():
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.transformer_config import TransformerConfig


class ContextCoreAttention(MegatronModule):
    """`SelfAttentionSubmodules.core_attention`: full attention or MoBA over a row that context-parallel ranks share.

    The parameters are those that Megatron's attention builds its core attention with; `key_conv` (0, 3 or 5) is bound
    by the layer spec.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        key_conv: int = 0,
    ) -> None:
        super().__init__(config=config)
        self.layer = layer_number - 1  # Megatron counts global layers from 1
        self.softmax_scale = softmax_scale
        self.key_conv: KeyConv | None = None
        if key_conv:
            assert pg_collection is not None
            self.key_conv = KeyConv(
                config.num_query_groups // pg_collection.tp.size(),
                config.kv_channels,
                key_conv,
                dtype=config.params_dtype,
                tp_group=pg_collection.tp,
            )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query [L,H,D], key and value [L,K,D] -> [L, H*D], zeros for padding.

        The mask follows from `packed_seq_params`, a RowContext.
        Raises errors.BackendError when no backend serves the call.
        """
        context = packed_seq_params
        assert isinstance(context, RowContext) and context.rope is not None
        num_tokens, padding = context.num_local_tokens, query.shape[0] - context.num_local_tokens
        query, key, value = query[:num_tokens], key[:num_tokens], value[:num_tokens]
        if self.key_conv is not None:
            key = self._convolve(self.key_conv, key, context)
        spec = context.plan[self.layer]
        query, key = context.rope.rotate(query), context.rope.rotate(key)
        try:
            result = context_attend(
                query,
                key,
                value.contiguous(),
                spec,
                layout=context.layout,
                group=context.cp_group,
                transport=context.transports.of(spec),
                cu_seqlens=context.pack,
                softmax_scale=self.softmax_scale,
                routing=self._given_routing(spec, query, key, context),
                backend=context.backend,
                node_ranks=context.node_ranks,
                layer=self.layer,
                traffic=context.traffic,
                watch=context.watch,
            )
        except moba_kernels.BackendError as error:
            raise BackendError(
                "the attention backend cannot serve this run",
                where=f"layer {self.layer}, engine.attention_backend",
                got=f"{error.backend}: {'; '.join(error.reasons)}",
                fix='set engine.attention_backend = "auto"',
            ) from error
        if context.keep_routing and isinstance(spec, MoBA) and result.routing is not None:
            context.routings[self.layer] = result.routing
        out = result.out.flatten(1)
        return functional.pad(out, (0, 0, 0, padding)) if padding else out

    def _given_routing(self, spec: object, query: Tensor, key: Tensor, context: RowContext) -> Routing | None:
        """Picks that are not to be made anew: those of the forward pass under recompute, or random ones."""
        if not isinstance(spec, MoBA):
            return None
        if self.layer in context.routings:
            return context.routings[self.layer]
        if context.random_picks is not None:
            return context.random_picks.routing(self.layer, spec, query, key.shape[1], context)
        return None

    def _convolve(self, key_conv: KeyConv, key_SKD: Tensor, context: RowContext) -> Tensor:
        """The key convolution, with the tokens before each piece fetched from their owner."""
        group, num_tokens = context.cp_group, context.pack.num_tokens
        num_ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
        layout = context.layout if num_ranks > 1 else "contiguous"  # one rank holds one piece, however it is named
        halos = key_halo(
            key_SKD,
            key_conv.width - 1,
            num_tokens=num_tokens,
            layout=layout,
            group=group,
            pack=context.pack,
            layer=self.layer,
            traffic=context.traffic,
            watch=context.watch,
        )
        lengths = [stop - start for start, stop in shard_pieces(num_tokens, num_ranks, rank, layout)]
        assert context.document_offset_S is not None
        return key_conv(key_SKD, halos, lengths, context.document_offset_S)


__all__ = ["ContextCoreAttention"]
