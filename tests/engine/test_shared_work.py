"""One list of requests for several leaders."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event

import pytest
import torch.distributed as dist

from dist_infer.config.sampling import SamplingParams
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


def test_a_piece_is_small_enough_for_everyone_to_have_some() -> None:
    assert SharedWork(dist.HashStore(), 2, nothing).publish(requests(64)) == 16
    assert SharedWork(dist.HashStore(), 4, nothing).publish(requests(8)) == 8
    assert SharedWork(dist.HashStore(), 2, nothing).publish(requests(1000)) == 63  # of 16
    assert SharedWork(dist.HashStore(), 2, nothing).publish([]) == 0


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


def test_waiting_ends_when_a_rank_has_failed() -> None:
    def check() -> None:
        raise RuntimeError("rank 1 has died")

    work = SharedWork(dist.HashStore(), 2, check)
    with pytest.raises(RuntimeError, match="rank 1 has died"):
        work.await_call()
    with pytest.raises(RuntimeError, match="rank 1 has died"):
        work.pause()
