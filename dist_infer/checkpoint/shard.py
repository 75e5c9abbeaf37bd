"""A rank's shard of the model: built without memory, cut over fsdp, filled from a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dist_infer.checkpoint.checkpoint import Checkpoint, load
from dist_infer.checkpoint.reader import LoadReport
from dist_infer.checkpoint.relay import Relay
from dist_infer.config.loader import LoaderOptions
from dist_infer.distributed.mesh import Mesh
from dist_infer.model import huge_pages
from dist_infer.model.config import ModelConfig
from dist_infer.model.decoder import Decoder
from dist_infer.model.layers import Linear
from dist_infer.model.weights import Weight, describe, fsdp_rows

if TYPE_CHECKING:
    from dist_infer.model.fallback import FallbackDecoder


class ModelShard:
    """The decoder of one rank and the description of its weights.

    Args:
        config: The model.
        mesh: Where this rank stands; tp cuts heads, ffn and vocabulary, fsdp the rows of what is left.
        dtype: Type of the weights.
        device: Where they lie.
    """

    def __init__(self, config: ModelConfig, mesh: Mesh, dtype: torch.dtype, device: torch.device) -> None:
        self.config, self.mesh = config, mesh
        self.weights: list[Weight] = list(describe(config, mesh.shape.tp, mesh.coordinates.tp))
        decoder = _without_memory(config, mesh, dtype, device)
        if mesh.fsdp_device_mesh is not None:
            for block in decoder.blocks:
                fully_shard(block, mesh=mesh.fsdp_device_mesh, reshard_after_forward=True)
            fully_shard(decoder, mesh=mesh.fsdp_device_mesh, reshard_after_forward=True)
        self.decoder = decoder.to_empty(device=device)
        if not isinstance(decoder, Decoder):
            decoder.restore()
        elif mesh.fsdp_device_mesh is None and device.type == "cpu":
            huge_pages.use(decoder)
        if isinstance(decoder, Decoder) and config.tied_head:
            decoder.head.weight = decoder.embedding.weight
        huge_pages.prefer(self.destinations().values())

    def destinations(self) -> dict[str, Tensor]:
        """This rank's rows of each parameter, by the names of `weights`."""
        named = dict(self.decoder.named_parameters())
        local = {weight.parameter: _local(named[weight.parameter]) for weight in self.weights}
        for weight in self.weights:
            first, stop = fsdp_rows(weight.shape[0], self.mesh.shape.fsdp, self.mesh.coordinates.fsdp)
            held, found = (stop - first, *weight.shape[1:]), local[weight.parameter]
            assert found.numel() == math.prod(held), f"{weight.parameter} is {found.shape}, described as {held}"
            local[weight.parameter] = found.view(held)  # transformers' packs of experts have a dim more
        return local

    def load(self, checkpoint: Checkpoint, options: LoaderOptions, progress: Callable[[int], object] | None = None) -> LoadReport:
        """Fill the shard from a checkpoint that matches the model; reads only this rank's bytes."""
        fsdp, coordinate, destinations = self.mesh.shape.fsdp, self.mesh.coordinates.fsdp, self.destinations()
        relay = self._relay() if options.read == "once" else None
        return load(checkpoint, self.config, self.weights, fsdp, coordinate, destinations, options, progress, relay)

    def _relay(self) -> Relay:
        """The ranks that hold what this one holds, and the parameters that all tp ranks hold alike."""
        common = set(self.weights)
        for rank in range(self.mesh.shape.tp):
            common &= set(describe(self.config, self.mesh.shape.tp, rank))
        return Relay(self.mesh.twins(), self.mesh.tp, frozenset(weight.parameter for weight in common))

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Callable[[], Tensor]]) -> None:
        """Fill the shard from whole tensors in memory, by canonical name; each is made, used and let go in turn.

        Every rank calls this with the same names, so that a tensor may be gathered from all of them.

        Raises:
            ValueError: A weight is missing or has another shape.
        """
        destinations = self.destinations()
        for weight in self.weights:
            first, stop = fsdp_rows(weight.shape[0], self.mesh.shape.fsdp, self.mesh.coordinates.fsdp)
            for piece in weight.pieces:
                if piece.name not in tensors:
                    raise ValueError(f"missing weight {piece.name}: the model in memory does not hold it")
                whole = tensors[piece.name]()
                if tuple(whole.shape) != piece.shape:
                    raise ValueError(
                        f"misshapen weight {piece.name}: {tuple(whole.shape)} in memory and {piece.shape} by the model configuration"
                    )
                low, high = max(first, piece.row), min(stop, piece.row + piece.rows)
                if low < high:
                    rows = slice(piece.box[0][0] + low - piece.row, piece.box[0][0] + high - piece.row)
                    rest = tuple(slice(*bounds) for bounds in piece.box[1:])
                    destinations[weight.parameter][low - first : high - first].copy_(whole[(rows, *rest)])

    def pack(self) -> None:
        """Give the projections the layout the CPU multiplies fastest; packed weights exist only at fsdp=1."""
        if self.mesh.fsdp_device_mesh is None:
            for module in self.decoder.modules():
                if isinstance(module, Linear):
                    tied = self.config.tied_head and isinstance(self.decoder, Decoder) and module is self.decoder.head
                    module.pack(keep_weight=tied)

    def refill(self, checkpoint: Checkpoint, options: LoaderOptions, progress: Callable[[int], object] | None = None) -> LoadReport:
        """Load another checkpoint of the same architecture over the weights, in place; packed ones are plain afterwards."""
        for module in self.decoder.modules():
            if isinstance(module, Linear):
                module.unpack()
        huge_pages.prefer(self.destinations().values())
        return self.load(checkpoint, options, progress)

    @property
    def elements(self) -> int:
        """Elements of weights on this rank."""
        rows = [fsdp_rows(weight.shape[0], self.mesh.shape.fsdp, self.mesh.coordinates.fsdp) for weight in self.weights]
        return sum((stop - first) * math.prod(weight.shape[1:]) for weight, (first, stop) in zip(self.weights, rows, strict=True))


def _without_memory(config: ModelConfig, mesh: Mesh, dtype: torch.dtype, device: torch.device) -> Decoder | FallbackDecoder:
    """This rank's part of the decoder over tp, on the meta device."""
    if config.fallback is not None:
        from dist_infer.model.fallback import FallbackDecoder, check_cut

        check_cut(config, mesh.tp, device)
        module = FallbackDecoder(config, mesh.tp, device, dtype)
        module.check_fsdp(mesh.shape.fsdp)
        return module
    with torch.device("meta"):
        decoder = Decoder(config, mesh.tp, device)
    return decoder.to(dtype)


def _local(parameter: nn.Parameter) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()
