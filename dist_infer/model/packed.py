"""Weights reordered once into the layout a CPU multiplies fastest."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dist_infer.model.native import Kernels, PackedMatrix

# x [rows, inputs] and a bias [outputs] to [rows, outputs].
PackedProduct = Callable[[Tensor, Tensor | None], Tensor]


def packed_gated_product(weight: Tensor, kernels: Kernels | None, in_place: bool = False) -> PackedProduct | None:
    """As `packed_product`, of a gate above what it gates, [2 * size, inputs]: silu(gate) * up [rows, size]; None where there is no such."""
    if weight.device.type != "cpu" or kernels is None or not kernels.can_multiply or weight.dtype != torch.bfloat16:
        return None
    return kernels.pack(weight, gated=True, in_place=in_place)


def packed_product(weight: Tensor, kernels: Kernels | None, in_place: bool = False) -> PackedProduct | None:
    """Multiplication by `weight` [outputs, inputs], of which a packed copy is made; None where there is no faster layout.

    With `in_place` the weight's own memory holds the packed one, where that can be: `is_in` tells.

    Our own kernel where it is (few rows, as in decoding, are read at the speed of memory), else oneDNN, for 16-bit types that
    this CPU multiplies.
    """
    if weight.device.type != "cpu":
        return None
    if kernels is not None and kernels.can_multiply and weight.dtype == torch.bfloat16:
        return kernels.pack(weight, in_place=in_place)
    if not onednn_packs(weight.dtype):
        return None
    reordered = torch.ops.mkldnn._reorder_linear_weight(weight)
    return lambda x, bias: torch.ops.mkldnn._linear_pointwise(x, reordered, bias, "none", [], "")


def is_in(product: PackedProduct | None, weight: Tensor) -> bool:
    """Whether the packed weight begins where `weight` does."""
    return isinstance(product, PackedMatrix) and product.address == weight.data_ptr()


def onednn_packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN has a layout of its own for `dtype` on this CPU, and torch its operators (which are private)."""
    mkldnn = torch.ops.mkldnn
    if not hasattr(mkldnn, "_reorder_linear_weight"):
        return False
    if dtype == torch.bfloat16:
        return mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float16 and mkldnn._is_mkldnn_fp16_supported()
