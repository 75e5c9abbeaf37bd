"""The leader's loop around a model that shows what its cache holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dist_infer.config.sampling import SamplingParams
from dist_infer.engine.engine import Delta, Engine
from dist_infer.engine.request import Request, Result
from dist_infer.engine.step import DECIDED, Kind, Step
from tests.engine.stand_in import EOS, LONGEST, POISON, VOCAB, alone, logits_of, make_engine, run, traffic

WAYS: list[dict[str, Any]] = [
    {},
    {"tp": 2, "blocks": 14, "block_size": 3, "max_batch_tokens": 7},
    {"tp": 4, "chunked_prefill": False, "prefix_cache": False},
    {"fsdp": 2, "blocks": 12},
    {"fsdp": 3, "tp": 2, "block_size": 1, "blocks": 41, "max_batch_tokens": 9},
    {"fsdp": 2, "block_size": 64, "blocks": 4, "max_sequences": 9},
]
WAYS += [{**way, "overlap": True} for way in WAYS]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_results_are_those_of_each_sequence_alone(way: dict[str, Any]) -> None:
    engine, requests = make_engine(**way), traffic()
    results = run(engine, requests)
    if way.get("blocks") in (12, 14):
        assert engine.scheduler.preemptions > 0
    assert engine.statistics.resolved > 10
    for request in requests:
        result = results[request.id]
        assert result.error is None and result.index == request.index and result.usage is not None
        if request.score_from is not None:
            rows = [logits_of(request.token_ids[:p]).log_softmax(0) for p in range(request.score_from, len(request.token_ids))]
            wanted = [float(row[t]) for row, t in zip(rows, request.token_ids[request.score_from :], strict=True)]
            assert result.score is not None
            assert result.score.token_logprobs == pytest.approx(wanted, abs=1e-5)
            assert result.score.logprob == pytest.approx(sum(wanted), abs=1e-4)
            assert not result.score.is_greedy
            continue
        assert [o.token_ids for o in result.outputs] == [alone(request, i) for i in range(request.params.n or 1)]
        assert result.usage.completion_tokens == sum(len(o.token_ids) for o in result.outputs)
        assert 0 <= result.usage.cached_tokens <= result.usage.prompt_tokens == len(request.token_ids)
        assert result.seed == request.seed
        for output in result.outputs:
            ended = output.token_ids[-1] == EOS and not request.params.ignore_eos
            assert output.finish_reason == ("stop" if ended else "length")
            assert output.text is None
            check_logprobs(request, output.token_ids, output.logprobs)


@pytest.mark.parametrize("way", [{}, {"fsdp": 2, "tp": 2}, {"fsdp": 2, "tp": 2, "overlap": True}], ids=str)
def test_many_rows_of_a_step_are_resolved_before_the_next(way: dict[str, Any]) -> None:
    engine = make_engine(max_batch_tokens=64, **way)
    params = SamplingParams(temperature=3.0, top_p=0.002, max_tokens=6, ignore_eos=True, logprobs=0)
    requests = [Request(str(i), [i, 9], params, seed=i) for i in range(8)]
    results = run(engine, requests)
    assert engine.statistics.resolved > 24
    for request in requests:
        output = results[request.id].outputs[0]
        assert output.token_ids == alone(request, 0)
        check_logprobs(request, output.token_ids, output.logprobs)


def check_logprobs(request: Request, tokens: list[int], logprobs: Any) -> None:
    if request.params.logprobs is None:
        assert logprobs is None
        return
    for place, entry in enumerate(logprobs):
        raw = logits_of(request.token_ids + tokens[:place]).log_softmax(0)
        assert entry.token_id == tokens[place]
        assert entry.logprob == pytest.approx(float(raw[tokens[place]]), abs=1e-5)
        assert list(entry.top) == raw.topk(request.params.logprobs).indices.tolist()
    assert len(logprobs) == len(tokens)


def test_greedy_scores_are_recognized() -> None:
    tokens = [20, 21]
    while len(tokens) < 20:
        tokens.append(int(logits_of(tokens).argmax()))
    wrong = [*tokens[:-1], (tokens[-1] + 1) % 1000]
    for way in ({}, {"tp": 2, "max_batch_tokens": 5}):
        results = run(make_engine(**way), [Request("right", tokens, score_from=2), Request("wrong", wrong, score_from=2)])
        assert [results[name].score.is_greedy for name in ("right", "wrong")] == [True, False]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request("x", []), "the prompt is empty: give at least one token"),
        (Request("x", [5, VOCAB]), "token id 2000 is outside the vocabulary of 2000"),
        (Request("x", [-1]), "token id -1 is outside the vocabulary of 2000"),
        (Request("x", [5] * LONGEST), "the prompt has 40 tokens; at most 39 fit, and one to produce (engine.max_model_len=40)"),
        (Request("x", [5] * (LONGEST + 2), score_from=1), "42 tokens to score; at most 41 fit (engine.max_model_len=40)"),
        (Request("x", [5, 6], score_from=2), "nothing to score: the continuation is empty"),
    ],
)
def test_a_bad_request_fails_alone(request_: Request, message: str) -> None:
    good = traffic(3)
    results = run(make_engine(), [good[0], request_, *good[1:]])
    assert results["x"].error == message and not results["x"].outputs
    assert all(results[request.id].error is None for request in good)


def test_the_longest_requests_fit() -> None:
    prompt = [5] * (LONGEST - 1)
    results = run(make_engine(blocks=11), [Request("x", prompt), Request("y", [5] * (LONGEST + 1), score_from=1)])
    assert [len(o.token_ids) for o in results["x"].outputs] == [1]
    assert results["y"].score is not None and len(results["y"].score.token_logprobs) == LONGEST


@pytest.mark.parametrize("way", [{}, {"fsdp": 2, "tp": 2}, {"overlap": True}, {"fsdp": 2, "tp": 2, "overlap": True}], ids=str)
def test_a_request_without_finite_logits_fails_alone(way: dict[str, Any]) -> None:
    bad = [
        Request("x", [5, POISON], SamplingParams(n=3, temperature=1.0)),
        Request("y", [5, POISON, 6, POISON, 8], score_from=1),
        Request("z", [5, 6], SamplingParams(logit_bias={POISON: 100.0})),
    ]
    good = traffic(6)
    results = run(make_engine(**way), [*good[:3], *bad, *good[3:]])
    assert results["x"].error == "the model gave no finite logits at position 2"
    assert results["y"].error == "the model gave no finite logits at position 2"
    assert results["z"].error == "the model gave no finite logits at position 3"
    for request in good:
        assert results[request.id].error is None
        if request.score_from is None:
            assert [o.token_ids for o in results[request.id].outputs] == [alone(request, i) for i in range(request.params.n or 1)]


def launches(engine: Engine) -> list[Step]:
    """The steps that `engine` will send, as they leave."""
    sent: list[Step] = []
    execute = engine.runner.execute

    def listen(step: Step) -> Any:
        sent.append(step)
        return execute(step)

    engine.runner.execute = listen  # type: ignore[method-assign]
    return sent


@pytest.mark.parametrize("filtered", [False, True])
def test_the_plan_of_a_step_leaves_before_its_tokens_are_known(filtered: bool) -> None:
    engine = make_engine(overlap=True)
    sent = launches(engine)
    kinds = [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5} if filtered else {"temperature": 0.5, "logit_bias": {9: 5.0}}]
    requests = [Request(str(i), [20 + i], SamplingParams(max_tokens=3, ignore_eos=True, **kinds[i]), seed=i) for i in range(3)]
    results = run(engine, requests)
    tokens = [results[request.id].outputs[0].token_ids for request in requests]
    launch = [Kind.PLAN, Kind.LAUNCH] if filtered else [Kind.CONTINUE]
    assert [step.kind for step in sent] == [Kind.CONTINUE, *launch * 2, Kind.PLAN]
    plans = [step.spans for step in sent if step.kind != Kind.LAUNCH]
    assert [[span.tokens for span in plan] for plan in plans] == [[[20], [21], [22]], [[DECIDED]] * 3, [[DECIDED]] * 3, []]
    decided = [step.decided for step in sent if step.kind == Kind.LAUNCH]
    assert decided == ([[*(t[0] for t in tokens), 0], [*(t[1] for t in tokens), 0]] if filtered else [])
    # All are known to end with their third token: no fourth is computed, and the last plan is empty.
    assert engine.statistics.decode_tokens == 9
    assert tokens == [alone(request, 0) for request in requests]


def test_a_stop_found_late_costs_one_row() -> None:
    engine = make_engine(overlap=True)
    sent = launches(engine)
    first = alone(Request("", [20], SamplingParams(max_tokens=1)), 0)[0]
    results = run(engine, [Request("a", [20], SamplingParams(stop_token_ids=[first])), Request("b", [21], SamplingParams(max_tokens=4))])
    assert results["a"].outputs[0].token_ids == [first] and results["a"].outputs[0].finish_reason == "stop"
    assert [len(step.spans) for step in sent] == [2, 2, 1, 1, 0]
    assert engine.runner.execute(Step(Kind.PLAN)) is None  # nothing is left being computed


def test_a_step_of_nothing_but_stopped_sequences_is_not_left_behind() -> None:
    engine = make_engine(overlap=True)
    first = alone(Request("", [20], SamplingParams(max_tokens=1)), 0)[0]
    run(engine, [Request("a", [20], SamplingParams(stop_token_ids=[first]))])
    assert engine.runner.execute(Step(Kind.PLAN)) is None
    unwanted = Request("b", [21])
    engine.submit(unwanted)
    engine.step()
    engine.cancel(unwanted)
    assert engine.runner.execute(Step(Kind.PLAN)) is None


@pytest.mark.parametrize("overlap", [False, True])
def test_penalties_count_every_token(overlap: bool) -> None:
    params = SamplingParams(logit_bias=dict.fromkeys(range(10, 13), 8.0), frequency_penalty=1.0, max_tokens=14, ignore_eos=True)
    request = Request("a", [20], params)
    found = run(make_engine(overlap=overlap), [request])["a"].outputs[0].token_ids
    assert found == alone(request, 0) and max(map(found.count, range(10, 13))) > 2


@pytest.mark.parametrize("overlap", [False, True])
def test_a_request_is_forgotten_and_the_rest_goes_on(overlap: bool) -> None:
    engine, requests = make_engine(tp=2, blocks=14, overlap=overlap), traffic(12)
    unwanted = requests[2::4]
    for request in requests:
        assert engine.submit(request) is None
    finished: list[Result] = []
    for number in range(1000):
        if not engine.busy:
            break
        finished += engine.step()[1]
        if number < len(unwanted):
            engine.cancel(unwanted[number])
            engine.cancel(unwanted[number])  # again does nothing
            engine.scheduler.check()
    early = {result.id for result in finished} & {request.id for request in unwanted}
    assert not engine.scheduler.busy and len(early) < len(unwanted)
    assert {result.id for result in finished} == {request.id for request in requests if request not in unwanted} | early
    for request in requests:
        if request not in unwanted and request.score_from is None:
            result = next(result for result in finished if result.id == request.id)
            assert [o.token_ids for o in result.outputs] == [alone(request, i) for i in range(request.params.n or 1)]


def test_requests_are_taken_only_when_there_is_room() -> None:
    engine = make_engine(max_sequences=2)
    taken = 0

    def requests() -> Any:
        nonlocal taken
        for i in range(50):
            taken += 1
            yield Request(str(i), [5, 6 + i], SamplingParams(max_tokens=3))

    finished = 0

    def sink(_: list[Delta], results: list[Result]) -> None:
        nonlocal finished
        finished += len(results)
        assert taken - finished <= 5

    engine.run(requests(), sink)
    assert taken == finished == 50


def test_steps_of_any_size_travel() -> None:
    """A prompt longer than the first part of a broadcast."""
    prompt = np.random.default_rng(1).integers(10, 200, 30).tolist()
    params = SamplingParams(max_tokens=2, logit_bias={i: 0.0 for i in range(290)}, n=4)
    requests = [Request(str(i), prompt, params) for i in range(8)]
    engine = make_engine(tp=2, max_sequences=32, max_batch_tokens=400)
    assert [len(o.token_ids) for r in run(engine, requests).values() for o in r.outputs] == [2] * 32


def test_what_workers_hear_when_there_is_nothing_to_compute() -> None:
    engine = make_engine(tp=2, follow=False)
    worker, inbox = engine.runner.mesh.control.workers[0], engine.runner.mesh.control.received[1]  # type: ignore[attr-defined]
    engine.release()
    assert inbox.empty()  # nobody is following yet
    engine.resume()
    engine.release()
    engine.release()
    assert worker.receive().kind == Kind.RELEASE and inbox.empty()
    engine.resume()
    engine.close("out of memory")
    step = worker.receive()
    assert (step.kind, step.message) == (Kind.ERROR, "out of memory") and inbox.empty()
    engine.close()
    assert inbox.empty()


def test_an_idle_leader_says_that_it_is_alive() -> None:
    engine = make_engine(tp=2, heartbeat_s=0.01, follow=False)
    worker, inbox = engine.runner.mesh.control.workers[0], engine.runner.mesh.control.received[1]  # type: ignore[attr-defined]
    engine.resume()
    assert engine.runner.mesh.control.spoke.wait(30)  # type: ignore[attr-defined]
    assert worker.receive().kind == Kind.HEARTBEAT
    engine.close()
    kinds = set()
    while not inbox.empty():
        kinds.add(worker.receive().kind)
    assert Kind.STOP in kinds and kinds <= {Kind.STOP, Kind.HEARTBEAT}
