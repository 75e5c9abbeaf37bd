"""A rank's shard of the model: built without memory, cut over fsdp, filled from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dist_infer.checkpoint.checkpoint import Checkpoint, load
from dist_infer.checkpoint.reader import LoadReport
from dist_infer.config.loader import LoaderOptions
from dist_infer.distributed.mesh import Mesh
from dist_infer.model.config import ModelConfig
from dist_infer.model.decoder import Decoder
from dist_infer.model.layers import Linear
from dist_infer.model.weights import Weight, describe, fsdp_rows


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
        with torch.device("meta"):
            decoder = Decoder(config, mesh.tp, device)
        decoder.to(dtype)
        if mesh.fsdp_device_mesh is not None:
            for block in decoder.blocks:
                fully_shard(block, mesh=mesh.fsdp_device_mesh, reshard_after_forward=True)
            fully_shard(decoder, mesh=mesh.fsdp_device_mesh, reshard_after_forward=True)
        self.decoder = decoder.to_empty(device=device)
        if config.tied_head:
            decoder.head.weight = decoder.embedding.weight

    def destinations(self) -> dict[str, Tensor]:
        """This rank's rows of each parameter, by the names of `weights`."""
        named = dict(self.decoder.named_parameters())
        local = {weight.parameter: _local(named[weight.parameter]) for weight in self.weights}
        for weight in self.weights:
            first, stop = fsdp_rows(weight.shape[0], self.mesh.shape.fsdp, self.mesh.coordinates.fsdp)
            held = (stop - first, *weight.shape[1:])
            assert local[weight.parameter].shape == held, f"{weight.parameter} is {local[weight.parameter].shape}, described as {held}"
        return local

    def load(self, checkpoint: Checkpoint, options: LoaderOptions, progress: Callable[[int], object] | None = None) -> LoadReport:
        """Fill the shard from a checkpoint that matches the model; reads only this rank's bytes."""
        coordinate = self.mesh.coordinates.fsdp
        return load(checkpoint, self.config, self.weights, self.mesh.shape.fsdp, coordinate, self.destinations(), options, progress)

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
                    module.pack(keep_weight=self.config.tied_head and module is self.decoder.head)

    def parameter_bytes(self) -> int:
        """Bytes of weights on this rank."""
        return sum(tensor.nbytes for tensor in self.destinations().values())


def _local(parameter: nn.Parameter) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()
