"""One list of requests for several leaders."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Event

import pytest
import torch.distributed as dist

from dist_infer.config.sampling import SamplingParams
from dist_infer.engine.pieces import SHARES, pieces
from dist_infer.engine.request import Output, Request, Result, Score, TokenLogprob, Usage
from dist_infer.engine.shared_work import SharedWork


def nothing() -> None:
    """No rank has failed."""


def requests(count: int) -> list[Request]:
    return [
        Request(str(i), [i, 1], SamplingParams(max_tokens=3, logit_bias={5: -1.0}, stop=["ü${x}"]), seed=2**63 - 1 - i, index=i)
        for i in range(count)
    ]


def answer(request: Request, leader: int) -> Result:
    return Result(request.id, request.index, [Output(None, [leader], "length")])


@pytest.mark.parametrize("count", [0, 1, 2, 47, 400])
def test_each_request_is_run_once_and_each_result_collected_once(count: int) -> None:
    store = dist.HashStore()
    calls, leaders = 3, 3
    together, over = Barrier(leaders), Event()

    def check() -> None:
        assert not over.is_set(), "the conductor has left"

    def follow(leader: int) -> list[list[Request]]:
        work = SharedWork(store, leaders, check)
        taken = []
        while work.await_call():
            together.wait(10)
            taken.append([])
            for request in work.take():
                taken[-1].append(request)
                work.deliver([answer(request, leader)])
            together.wait(10)
            work.finish()
        return taken

    def conduct() -> tuple[list[list[Request]], list[list[Result]]]:
        work = SharedWork(store, leaders, check)
        taken, collected = [], []
        for _ in range(calls):
            work.publish(requests(count))
            together.wait(10)
            results = []
            taken.append([])
            for request in work.take():
                taken[-1].append(request)
                results += [answer(request, 0), *work.collect()]
            together.wait(10)
            collected.append([*results, *work.collect()])
            work.finish()
        work.close()
        return taken, collected

    with ThreadPoolExecutor(leaders) as pool:
        followers = [pool.submit(follow, leader) for leader in range(1, leaders)]
        try:
            first, collected = conduct()
            taken = [first, *(follower.result(20) for follower in followers)]
        finally:
            over.set()
    for call in range(calls):
        everything = [request for leader in taken for request in leader[call]]
        assert sorted(everything, key=lambda r: r.index) == requests(count)
        assert Counter(result.index for result in collected[call]) == Counter(range(count))
        by = {request.index: leader for leader, calls_of in enumerate(taken) for request in calls_of[call]}
        assert all(result.outputs[0].token_ids == [by[result.index]] for result in collected[call])


def scored(context: int, tokens: int, choices: int) -> list[Request]:
    """Requests that score `choices` continuations of one context."""
    return [Request(f"{context}/{i}", [context] * tokens + [i], score_from=tokens) for i in range(choices)]


@pytest.mark.parametrize(("leaders", "count"), [(1, 1), (2, 8), (2, 64), (4, 1000)])
def test_pieces_hold_every_request_once_and_grow_smaller(leaders: int, count: int) -> None:
    asked = requests(count)
    found = list(pieces(asked, leaders))
    assert sorted(request.index for piece in found for request in piece) == list(range(count))
    assert [len(piece) for piece in found] == sorted((len(piece) for piece in found), reverse=True)
    assert len(found) >= min(count, leaders), "everyone has some"
    assert len(found[-1]) <= max(1, count // (leaders * 8)), "the tail is short"
    assert len(found) <= 1 + 8 * leaders * SHARES, "taking a piece costs something"


def test_what_shares_a_context_stays_together_and_the_costly_comes_first() -> None:
    asked = [request for number in range(40) for request in scored(number, 5 + 3 * number, 4)]
    asked += [Request(f"g{i}", [1, 2], SamplingParams(max_tokens=100)) for i in range(3)]
    found = list(pieces(asked[::-1], 3))
    assert found[0][0].id.startswith("g"), "what produces tokens is costly"
    order = [request.token_ids[0] for piece in found for request in piece if request.score_from is not None]
    assert order == sorted(order, reverse=True)
    for number in range(40):
        assert sum(any(request.token_ids[0] == number for request in piece if request.score_from) for piece in found) == 1


def test_a_signal_that_one_leader_notices_stops_all() -> None:
    store = dist.HashStore()
    one, other = SharedWork(store, 2, nothing), SharedWork(store, 2, nothing)
    assert one.stopping(None) is None and other.stopping(None) is None
    assert one.stopping("SIGUSR1") == "SIGUSR1"
    late = SharedWork(store, 2, nothing)
    assert late.stopping(None) == "SIGUSR1"
    assert late.stopping("SIGTERM") == "SIGUSR1", "the first counts"


def test_results_come_through_whole() -> None:
    store = dist.HashStore()
    conductor, other = SharedWork(store, 2, nothing), SharedWork(store, 2, nothing)
    results = [
        Result("a", 3, [Output("ü", [1], "stop", [TokenLogprob(1, -0.5, {1: -0.5, 2: -1.5})])], usage=Usage(1, 2, 3), seed=2**63 - 1),
        Result("b", 4, score=Score(-1.5, True, [-1.0, -0.5])),
        Result("c", 5, error="bad"),
    ]
    assert conductor.collect() == []
    other.deliver([])
    other.deliver(results[:2])
    other.deliver(results[2:])
    assert conductor.collect() == results
    assert conductor.collect() == []


@pytest.mark.parametrize("kind", ["hash", "file", "tcp"])
def test_waiting_ends_only_when_a_rank_has_failed(kind: str, tmp_path: Path) -> None:
    checks = 0

    def check() -> None:
        nonlocal checks
        checks += 1
        if checks > 1:
            raise RuntimeError("rank 1 has died")

    stores = {
        "hash": dist.HashStore,
        "file": lambda: dist.FileStore(str(tmp_path / "store"), 2),
        "tcp": lambda: dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False),
    }
    work = SharedWork(stores[kind](), 2, check)
    with pytest.raises(RuntimeError, match="rank 1 has died"):
        work.await_call()
    assert checks == 2, "a wait that is over for now is no failure"
    with pytest.raises(RuntimeError, match="rank 1 has died"):
        work.pause()
