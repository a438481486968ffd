"""Where a step is: told to a listener by hooks on Megatron's layers, for progress inside long steps and for memory.

    data -> for each layer: attention, mlp -> loss -> loss backward -> for each layer, last one first:
    attention recompute (under activation recompute), mlp backward, attention backward -> gradients -> optimizer

"attention" is everything of a layer that is not the MLP: norms, projections, key convolution, routing, attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moba_train.model.gpt import Gpt

Part = Literal["data", "attention", "mlp", "loss", "gradients", "optimizer"]
Direction = Literal["", "forward", "recompute", "backward"]


@dataclass(frozen=True)
class Phase:
    """What begins now.

    Attributes:
        layer: global layer, from 0; -1 = none.
        of: layers of the model, or tiles of the loss.
        tile: tile of the loss, from 0.
    """

    part: Part
    direction: Direction = ""
    layer: int = -1
    of: int = 0
    tile: int = 0

    def __str__(self) -> str:
        if self.part == "loss":
            return f"{self.direction}, loss, tile {self.tile + 1}/{self.of}"
        if self.layer >= 0:
            return f"{self.direction}, layer {self.layer + 1}/{self.of}, {self.part}"
        return {"data": "data", "gradients": "adding up gradients over ranks", "optimizer": "optimizer step"}[self.part]


OnPhase = Callable[[Phase], None]


@contextmanager
def watched(gpt: Gpt, on_phase: OnPhase | None) -> Iterator[None]:
    """Tell `on_phase` about every phase between "data" and "optimizer"; with None nothing is hooked."""
    if on_phase is None:
        yield
        return
    with ExitStack() as undo:
        for layer in gpt.decoder.layers:
            undo.callback(_hook_layer(layer, gpt.config.num_layers, on_phase))
        finalize = gpt.config.finalize_model_grads_func
        gpt.config.finalize_model_grads_func = partial(_told, on_phase, finalize)
        undo.callback(setattr, gpt.config, "finalize_model_grads_func", finalize)
        gpt.on_loss_tile = partial(_loss_tile, on_phase)
        undo.callback(setattr, gpt, "on_loss_tile", None)
        yield


def _hook_layer(layer: Any, num_layers: int, on_phase: OnPhase) -> Callable[[], None]:
    """Hook one transformer layer; returns what takes the hooks away again."""
    recomputes = layer.config.recompute_granularity == "full"
    phase = partial(Phase, layer=layer.layer_number - 1, of=num_layers)

    def direction() -> Direction:
        return "recompute" if recomputes and torch.is_grad_enabled() else "forward"

    def attention_begins(*_: Any) -> None:
        on_phase(phase("attention", direction()))

    def mlp_begins(*_: Any) -> None:
        if direction() == "forward":  # its second forward pass is part of its backward (`tiled_mlp`)
            on_phase(phase("mlp", "forward"))

    def attention_ended(_module: nn.Module, _args: Any, output: Any) -> None:
        _when_its_gradient_comes(output[0], lambda: on_phase(phase("attention", "backward")))

    def layer_ended(_module: nn.Module, _args: Any, output: Any) -> None:
        _when_its_gradient_comes(output[0], lambda: on_phase(phase("mlp", "backward")))

    handles = (
        layer.register_forward_pre_hook(attention_begins),
        layer.self_attention.register_forward_hook(attention_ended),
        layer.mlp.register_forward_pre_hook(mlp_begins),
        layer.register_forward_hook(layer_ended),
    )

    def unhook() -> None:
        for handle in handles:
            handle.remove()

    return unhook


def _when_its_gradient_comes(output: Tensor, tell: Callable[[], None]) -> None:
    if output.requires_grad:
        output.register_hook(lambda _gradient: tell())  # type: ignore[no-untyped-call]


def _loss_tile(on_phase: OnPhase, direction: Literal["forward", "backward"], tile: int, of: int) -> None:
    on_phase(Phase("loss", direction, of=of, tile=tile))


def _told(on_phase: OnPhase, finalize: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    on_phase(Phase("gradients"))
    finalize(*args, **kwargs)


__all__ = ["Direction", "OnPhase", "Part", "Phase", "watched"]
