"""How a list of requests is cut into pieces of work: what shares a context stays together, big pieces come first."""

from __future__ import annotations

from collections.abc import Iterator

from dist_infer.engine.request import Request

DECODE_COST = 8  # a token that is produced, in tokens that are read: these go through the model together
SHARES = 4  # a piece is this part of a leader's share of what is left, so the last pieces are small
LARGEST = 256  # requests in a piece, unless they share a context


def pieces(requests: list[Request], leaders: int) -> Iterator[list[Request]]:
    """`requests` in pieces for `leaders` to take, the costly first, each smaller than those before.

    Requests that score continuations of one context are never parted: the context is computed once.
    """
    groups: dict[object, list[Request]] = {}
    for number, request in enumerate(requests):
        context = tuple(request.token_ids[: request.score_from]) if request.score_from is not None else number
        groups.setdefault(context, []).append(request)
    costs = [(cost(group), group) for group in groups.values()]
    costs.sort(key=lambda entry: -entry[0])
    left = sum(found for found, _ in costs)
    piece: list[Request] = []
    size = 0
    for found, group in costs:
        if piece and (size + found > left / (leaders * SHARES) or len(piece) + len(group) > LARGEST):
            yield piece
            left -= size
            piece, size = [], 0
        piece += group
        size += found
    if piece:
        yield piece


def cost(group: list[Request]) -> int:
    """About how much work requests are that share a context, in tokens."""
    first = group[0]
    if first.score_from is not None:
        return first.score_from + sum(len(request.token_ids) - first.score_from for request in group)
    return sum(len(request.token_ids) + DECODE_COST * (request.params.max_tokens or 1) * (request.params.n or 1) for request in group)
