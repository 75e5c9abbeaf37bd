"""Whether this machine's GPUs can be given Triton's kernels."""

from __future__ import annotations

import functools
import subprocess

import torch
from torch.utils._triton import has_triton


@functools.cache
def kernels_start() -> bool:
    """Whether a kernel of ours starts: Triton wants a C compiler for that, which some containers lack."""
    if not has_triton():
        return False
    from dist_infer.model.cuda_kernels import CudaKernels  # half a second that no start on CPU should cost

    device = torch.device("cuda", torch.cuda.current_device())
    row = torch.ones(1, 16, device=device)
    try:
        CudaKernels(device).add_rms_norm(row, None, row[0], 1e-6)
    except (RuntimeError, OSError, AssertionError, ImportError, subprocess.SubprocessError):
        return False
    return True
