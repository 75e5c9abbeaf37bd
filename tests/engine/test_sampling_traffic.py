"""What crosses ranks when tokens are chosen: a fixed number of bytes a row, whatever the vocabulary."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from dist_infer.config.options import read_options
from dist_infer.engine.blueprint import Blueprint
from dist_infer.engine.request import Request
from dist_infer.engine.runner import FIRST_PART
from dist_infer.engine.session import Session
from dist_infer.model.weights import cut
from tests.distributed.counting import Call, counted_calls
from tests.engine.jobs import FLOAT32, request
from tests.engine.references import make_model
from tests.ranks import Ranks

VOCABULARIES = 1201, 2403
HIDDEN = 48
LENGTH = 4  # tokens of a request
# Of each kind: parameters, and the float32 numbers that a rank sends of a row.
KINDS: dict[str, tuple[dict[str, Any], int]] = {
    "greedy": ({}, 2),
    "temperature": ({"temperature": 1.0}, 5),
    "top-k 50": ({"temperature": 1.0, "top_k": 50}, 2 + 2 * 50),
    "top-k 100": ({"temperature": 1.0, "top_k": 100}, 2 + 3 * 64 + 1 + 513),
    "top-p 0.95": ({"temperature": 1.0, "top_p": 0.95}, 2 + 3 * 6 + 1 + 513),
    "5 logprobs": ({"logprobs": 5}, 5 + 2 * 5),
    "scoring": ({}, 5),
}
FILTERED = "top-k 100", "top-p 0.95"  # whose summaries leave a row open now and then


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Models that differ in the vocabulary only."""
    paths = []
    for vocabulary in VOCABULARIES:
        paths.append(tmp_path_factory.mktemp(f"vocabulary{vocabulary}"))
        make_model(paths[-1], vocab_size=vocabulary, hidden_size=HIDDEN, num_attention_heads=4)
    return [str(path) for path in paths]


def requests_of(kind: str, count: int) -> list[Request]:
    params, _ = KINDS[kind]
    if kind == "scoring":
        return [request([7, index, *range(20, 20 + LENGTH)], index, score_from=2) for index in range(count)]
    return [request([7, index], index, max_tokens=LENGTH, ignore_eos=True, **params) for index in range(count)]


def count(path: str, tp: int, rows: int) -> dict[str, list[Call]]:
    """This rank's calls for `rows` requests of each kind, kind by kind."""
    options = read_options([f"model.path={path}", f"parallel.tp={tp}", *FLOAT32, "engine.prefix_cache=false", "engine.kv_cache_gib=0.01"])
    found = {}
    with counted_calls() as calls:
        session = Session(options, lambda: Blueprint.of(options), scripted=True)
        for kind in KINDS:
            calls.clear()
            if session.is_conductor:
                session.run(requests_of(kind, rows), lambda *_: None)
            else:
                session.serve()
            found[kind] = list(calls)
        session.close()
    return found


def usual_answer(calls: list[Call]) -> int:
    """Bytes of the answers to most steps: to those that ask for no whole row."""
    return Counter(call.bytes for call in calls if call.kind == "gather").most_common(1)[0][0]


@pytest.mark.parametrize("tp", [2, 4])
def test_answers_grow_with_the_rows_not_with_the_vocabulary(ranks: Ranks, models: list[str], tp: int) -> None:
    """Only a row that its summary leaves open is sent whole, when the leader asks for it."""
    for path, vocabulary, requests in zip(models, VOCABULARIES, (3, 5), strict=True):
        for calls in ranks(tp).run(count, path, tp, requests):
            for kind, (_, width) in KINDS.items():
                rows = requests * (LENGTH if kind == "scoring" else 1)
                assert usual_answer(calls[kind]) == 4 * width * rows, kind
                whole = [call.bytes for call in calls[kind] if call.kind == "gather" and call.bytes != 4 * width * rows]
                assert len(whole) <= (kind in FILTERED), f"{kind}: rows are sent whole"
                assert all(size % (2 * 4 * cut(vocabulary, tp, 0)[1]) == 0 for size in whole)
                summed = {call.shape[-1] for call in calls[kind] if call.kind == "all_reduce"}
                assert summed == {HIDDEN}, "something else than hidden states is summed"
                assert {call.bytes for call in calls[kind] if call.kind == "broadcast"} == {4 * FIRST_PART}, "more than steps is sent"
