"""Tokens that the ranks of a tp group find out by themselves, each the same, so that their next step need not wait for the leader.

It decides the same rows from the same summaries, a little later (`sampler`): this is its rule for rows without filters, in operations
of the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dist_infer.distributed.collectives import Communicator
from dist_infer.sampling.summary import SummaryLayout


def settle(summaries: Tensor, layout: SummaryLayout, drawn: Tensor | None, tp: Communicator, vocab_size: int) -> Tensor:
    """The token of each row, [rows] int64: the greatest of all shards, of equals the lowest; any where logits are not finite.

    Args:
        summaries: This rank's, [rows, layout.width] float32.
        layout: Theirs; it is `settled`.
        drawn: [rows, 1], which rows take the best noised token instead of the best; None where none does.
        tp: The ranks that hold a slice of the vocabulary each; all of them call this.
        vocab_size: Tokens are below it.
    """
    fields = layout.fields
    value, bits = (summaries[:, fields[name]] for name in ("best", "best_id"))
    if drawn is not None:
        value, bits = (torch.where(drawn, summaries[:, fields[name]], of) for name, of in (("noised", value), ("noised_id", bits)))
    token = bits.contiguous().view(torch.int32)
    if tp.size > 1:
        board = summaries.new_zeros(tp.size, len(summaries), 2)  # adding zeros changes nothing; ids below 2^24 are exact
        board[tp.rank, :, :1], board[tp.rank, :, 1:] = value, token
        values, tokens = tp.all_reduce(board).unbind(2)
        token = tokens.where(values == values.amax(0), torch.inf).amin(0)
    return token.view(-1).clamp(0, vocab_size - 1).long()
