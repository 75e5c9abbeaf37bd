"""The machines a plan is made for."""

from __future__ import annotations

from dataclasses import dataclass

from dist_infer.config.field import option


@dataclass
class ClusterOptions:
    """The machines of a plan. With neither a machine nor figures, this machine is measured."""

    machine: str | None = option(None, "YAML file with a cluster section, as configs/clusters/h100x8.yaml; what is given here goes over it")
    nodes: int | None = option(None, "machines; default: 1", low=1)
    gpus_per_node: int | None = option(None, "GPUs of a machine", low=1)
    memory_gib: float | None = option(None, "memory of a GPU, in GiB", above=0)
    reserved_gib: float | None = option(None, "what the driver, NCCL and fragments take of it, in GiB; default: 0", low=0)
    memory_gb_s: float | None = option(None, "memory bandwidth of a GPU, in GB/s", above=0)
    tflops: float | None = option(None, "dense bf16 peak of a GPU, in TFLOP/s", above=0)
    attained: float | None = option(None, "part of bandwidth and peak that kernels reach; default: 1", above=0, high=1)
    intra_gb_s: float | None = option(None, "between GPUs of a machine, each GPU one way, in GB/s", above=0)
    intra_us: float | None = option(None, "what the smallest all-reduce of a machine's GPUs takes, in microseconds", low=0)
    inter_gb_s: float | None = option(None, "between machines, each GPU one way, in GB/s", above=0)
    inter_us: float | None = option(None, "what an all-reduce takes longer when it crosses machines, in microseconds", low=0)
    storage_gb_s: float | None = option(None, "what a machine reads of a checkpoint, in GB/s", above=0)
    layer_us: float | None = option(None, "least time of a layer, when nothing is left to compute, in microseconds; default: 0", low=0)
    step_us: float | None = option(None, "what a step takes beside the layers, in microseconds; default: 0", low=0)
