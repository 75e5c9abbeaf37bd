"""The machine's limit as a side: how fast weights larger than all caches are read by products with one row: `serve_bandwidth.py DEVICE`."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from serving import Command, serve
from torch import Tensor

from dist_infer.model.native import kernels
from dist_infer.model.packed import packed_product

# Inputs, outputs and number of matrices: 0.6 and 12 GB, far more than caches hold, and each worth a launch.
SHAPES = {"cpu": (1024, 5632, 52), "cuda": (8192, 28_672, 26)}
PASSES = 10


class Bandwidth:
    """Products of a row with many matrices in bfloat16, packed in every way there is, and plain."""

    def __init__(self, device: str) -> None:
        self.device = device
        inputs, outputs, count = SHAPES[device]
        weight = torch.randn(outputs, inputs, device=device).to(torch.bfloat16)
        weights = [weight.clone() for _ in range(count)]
        self.bytes = sum(weight.nbytes for weight in weights)
        self.x = torch.randn(1, inputs, device=device).to(torch.bfloat16)
        self.products: dict[str, list[Callable[[Tensor], Tensor]]] = {}
        if device == "cuda":
            self.products["plain"] = [_plain(weight) for weight in weights]
            return
        native = kernels(torch.bfloat16)
        for name, how in (("ours", native), ("oneDNN", None)):
            packed = [packed_product(weight, how) for weight in weights]
            if all(packed) and not (name == "ours" and (native is None or not native.can_multiply)):
                self.products[name] = [lambda x, product=product: product(x, None) for product in packed if product is not None]

    @torch.no_grad()
    def measure(self) -> dict[str, Any]:
        """GB/s of each way, the median of several passes in alternation."""
        seconds: dict[str, list[float]] = {name: [] for name in self.products}
        for number in range(PASSES + 1):
            for name, products in self.products.items():
                began = time.perf_counter()
                for product in products:
                    product(self.x)
                if self.device == "cuda":
                    torch.cuda.synchronize()
                if number:  # the first pass warms up
                    seconds[name].append(time.perf_counter() - began)
        return {name: self.bytes / statistics.median(took) / 1e9 for name, took in seconds.items()}


def _plain(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: F.linear(x, weight)


def make() -> dict[str, Command]:
    """The matrices, on the device that the command line names."""
    return {"measure": Bandwidth(sys.argv[1]).measure}


if __name__ == "__main__":
    serve(make)
