"""What sampling computes with `native.cpp`, on the CPU: greatest tokens, noise, draws. None where it could not be compiled."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dist_infer.model import native
from dist_infer.model.native import address


def best(values: Tensor, with_sums: bool) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """The greatest of each row, the first index where it is, and the sum of exp(value - greatest); None where there are no kernels.

    Args:
        values: [rows, n] float32, contiguous, on the CPU. A NaN is the greatest of its row.
        with_sums: Whether the sums are wanted.

    Returns:
        [rows] float32, int64 and float32.
    """
    library = native.library()
    if library is None:
        return None
    rows, size = values.shape
    greatest, index = torch.empty(rows), torch.empty(rows, dtype=torch.int64)
    sums = torch.empty(rows) if with_sums else None
    library.best_of_rows_float(address(values), address(greatest), address(index), address(sums), rows, size)
    return greatest, index, sums


def greatest(values: Tensor, first_token: int) -> Tensor | None:
    """The greatest of each row, as `best` has it, and beside it the bits of its token id, [rows, 2]; None where there are no kernels.

    Args:
        values: [rows, n] float32, contiguous, on the CPU.
        first_token: Id of the first column.
    """
    library = native.library()
    if library is None:
        return None
    found = torch.empty(len(values), 2)
    library.greatest_float(address(values), address(found), first_token, *values.shape)
    return found


def best_few(values: Tensor, few: int) -> tuple[Tensor, Tensor] | None:
    """The first `few` of each row of `values` [rows, n], the greater first, among equals the lower index; None where there are no kernels.

    Args:
        values: float32, contiguous, on the CPU.
        few: At most n.

    Returns:
        Values and indices, [rows, few].
    """
    library = native.library()
    if library is None:
        return None
    rows, size = values.shape
    found, index = torch.empty(rows, few), torch.empty(rows, few, dtype=torch.int64)
    library.best_few_float(address(values), address(found), address(index), rows, size, few)
    return found, index


def gumbel(keys: Tensor, ids: Tensor) -> Tensor | None:
    """Gumbel noise [rows, n] float32 of CPU token ids [n] or [rows, n] under keys [rows, 2], int64; None where there are no kernels.

    Args:
        keys: From `noise.row_keys`.
        ids: Token ids.
    """
    library = native.library()
    if library is None:
        return None
    keys, ids = keys.contiguous(), ids.contiguous()
    out = torch.empty(len(keys), ids.shape[-1])
    library.gumbel_noise(address(keys), address(ids), address(out), *out.shape, ids.shape[-1] if ids.dim() > 1 else 0)
    return out


class _Drawn(ctypes.Structure):
    _fields_ = [
        *(("logits", ctypes.c_void_p), ("temperature", ctypes.c_float), ("greatest", ctypes.c_float)),
        *((name, ctypes.c_void_p) for name in ("keys", "masses", "counts")),
    ]


def draw(
    logits: Tensor,
    rows: Sequence[int],
    temperature: Tensor,
    greatest: Tensor,
    keys: Tensor,
    first_token: int,
    few: int,
    masses: Mapping[int, Tensor],
    counts: Mapping[int, Tensor],
    per_unit: float,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The best tokens of some rows with Gumbel noise on logits divided by a temperature, and histograms; None where there are no kernels.

    Args:
        logits: [R, n] float32, contiguous, on the CPU.
        rows: Which of them.
        temperature: [rows] float32.
        greatest: [rows] float32, the greatest of each after the division.
        keys: [rows, 2] int64, from `noise.row_keys`.
        first_token: Id of the first column.
        few: How many tokens.
        masses: By place in `rows`, [bins + 1] float64 to add sums of exp(value - greatest) to; of rows whose histogram is wanted.
        counts: The same for numbers of tokens, where these are wanted, too.
        per_unit: Bins in 1.

    Returns:
        The first `few` of each row, the greater first, [rows, few]: values with noise, index, values without.
    """
    library = native.library()
    if library is None:
        return None
    assert logits.is_contiguous() and keys.is_contiguous(), "rows are found by their size"
    count, size = len(rows), logits.shape[1]
    starts = (logits.data_ptr() + row * size * logits.element_size() for row in rows)
    keys_of = range(keys.data_ptr(), keys.data_ptr() + 16 * count, 16)
    sums = ((address(masses.get(i)), address(counts.get(i))) for i in range(count))
    fields = zip(starts, temperature.tolist(), greatest.tolist(), keys_of, sums, strict=True)
    drawn = (_Drawn * count)(*((start, divisor, most, key, *of) for start, divisor, most, key, of in fields))
    noised, index, scaled = torch.empty(count, few), torch.empty(count, few, dtype=torch.int64), torch.empty(count, few)
    bins = next((len(mass) - 1 for mass in masses.values()), 0)
    library.draw_rows(
        ctypes.addressof(drawn), first_token, address(noised), address(index), address(scaled), count, size, few, bins, per_unit
    )
    return noised, index, scaled
