"""Plans: memory, collectives and times against what is computed by hand, and against what ranks really hold and say."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_infer.checkpoint.shard import ModelShard
from dist_infer.config.engine import EngineOptions
from dist_infer.config.options import read_options
from dist_infer.distributed.mesh import Mesh, MeshShape
from dist_infer.distributed.world import World
from dist_infer.engine.blueprint import Blueprint
from dist_infer.engine.cluster import Cluster, Link, Rates
from dist_infer.engine.footprint import Footprint, TensorCut
from dist_infer.engine.forecast import Planner
from dist_infer.engine.memory import GIB, KVPlan
from dist_infer.engine.runner import FIRST_PART
from dist_infer.engine.session import Session
from dist_infer.engine.step_time import LEADER_S, SEQUENCE_S, Spans, StepTime
from dist_infer.engine.traffic import REMOTE_CONTROL_S, Collective, collectives, seconds
from dist_infer.model.config import ExpertsConfig, ModelConfig
from dist_infer.model.weights import describe
from dist_infer.sampling.slots import SlotParams
from tests.distributed.counting import counted_calls
from tests.engine.jobs import FLOAT32, request
from tests.engine.references import make_model, reference
from tests.ranks import Ranks

CONFIG = ModelConfig("llama", 1000, 64, 128, layers=3, heads=9, kv_heads=3, head_dim=8, norm_eps=1e-5, max_position=512)
PLAIN = Rates(bandwidth=1e9, flops=1e12)
CLUSTER = Cluster(
    name="made up",
    kind="cuda",
    nodes=2,
    devices=4,
    memory=GIB,
    products=PLAIN,
    gathered_products=PLAIN,
    attention=PLAIN,
    intra=Link(1e9, 1e-6),
    gather=Link(1e9, 1e-6),
    inter=Link(1e8, 1e-5),
    control=1e-5,
    storage=1e9,
    cut_storage=5e8,
)
BF16 = torch.bfloat16


def planner(config: ModelConfig, cluster: Cluster, *overrides: str) -> Planner:
    return Planner(config, BF16, cluster, read_options([*SMALL, *overrides]), 2)


SMALL = ("workload.prompt_tokens=32", "workload.output_tokens=8", "workload.sequences=8")


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, tied_head=True, norm="layer", norm_placement="both", qkv_bias=True)], ids=str)
def test_elements_are_those_described(config: ModelConfig) -> None:
    whole = TensorCut.of(config, 1)
    assert sum(whole.layers) + whole.root == whole.held(1) == sum(weight.elements for weight in describe(config))
    for tp in (2, 3, 4, 9):
        held = [sum(weight.elements for weight in describe(config, tp, rank)) for rank in range(tp)]
        assert TensorCut.of(config, tp).held(1) == max(held)


def _held(path: str, tp: int, fsdp: int) -> tuple[int, int]:
    options = read_options([f"model.path={path}", *FLOAT32])
    blueprint, shape = Blueprint.of(options), MeshShape(1, fsdp, tp)
    world = World.join(options.parallel, "cpu", shape.size, may_exit=False)
    mesh = Mesh(world, shape, options.parallel)
    elements = ModelShard(blueprint.config, mesh, blueprint.dtype, world.device).elements
    mesh.close()
    world.close()
    return elements, TensorCut.of(blueprint.config, tp).held(fsdp)


@pytest.mark.parametrize(("name", "tp", "fsdp"), [("hf_llama", 2, 2), ("kempnerforge_moe", 2, 1), ("hf_gemma3_text", 1, 2)])
def test_weights_are_what_a_rank_holds(ranks: Ranks, name: str, tp: int, fsdp: int) -> None:
    found = ranks(tp * fsdp).run(_held, reference(name).path, tp, fsdp)
    assert max(held for held, _ in found) == found[0][1]


def footprint(shape: MeshShape, memory: int, config: ModelConfig = CONFIG, cluster: Cluster = CLUSTER, **options: Any) -> Footprint:
    engine = EngineOptions(max_batch_tokens=64, **options)
    return Footprint.of(TensorCut.of(config, shape.tp), shape, BF16, engine, cluster, memory, 512, 100)


def test_the_kv_cache_is_that_of_the_engine() -> None:
    for shape in (MeshShape(1, 1, 1), MeshShape(1, 1, 2), MeshShape(2, 2, 1)):
        part = footprint(shape, GIB // 8, max_sequences=10_000)
        plan = KVPlan.make(CONFIG, shape.tp, shape.fsdp, BF16, EngineOptions(max_sequences=10_000), 512, GIB // 8 - part.weights)
        assert part.kv == plan and not part.missing
        assert part.tokens(EngineOptions(), shape.fsdp) == (plan.blocks - 1) * 16 * shape.fsdp
        assert part.total == sum(part.parts.values()) <= GIB // 8


def test_a_tied_embedding_is_kept_beside_its_packed_copy() -> None:
    tied, cpu = replace(CONFIG, tied_head=True), replace(CLUSTER, kind="cpu")
    assert footprint(MeshShape(1, 1, 2), GIB, tied, cpu).copies == 2 * 500 * 64
    assert footprint(MeshShape(1, 2, 2), GIB, tied, cpu).copies == 0
    assert footprint(MeshShape(1, 1, 2), GIB, tied).copies == 0
    assert footprint(MeshShape(1, 1, 2), GIB, CONFIG, cpu).copies == 0


def test_what_fsdp_gathers() -> None:
    held = TensorCut.of(CONFIG, 1)
    assert footprint(MeshShape(1, 2, 1), GIB).gathered == 2 * (2 * 1000 * 64 + 64 + 2 * held.layers[0])
    assert footprint(MeshShape(1, 1, 1), GIB).gathered == 0


@pytest.mark.parametrize("shape", [MeshShape(1, 1, 1), MeshShape(1, 2, 2)])
def test_what_is_missing_is_enough(shape: MeshShape) -> None:
    """A mesh that lacks memory fits once it has what was missing for the weights, and the part of the rest that the KV cache wants."""
    lacking = footprint(shape, 100_000)
    assert lacking.missing and lacking.why and lacking.kv is None
    assert footprint(shape, 100_000 + 4 * lacking.missing).missing == 0
    assert footprint(shape, 100_000 + lacking.missing // 2).missing


@pytest.mark.parametrize("window", [None, 1, 5, 16, 40, 100])
@pytest.mark.parametrize(("length", "context"), [(1, 1), (1, 40), (16, 16), (7, 40), (40, 40)])
def test_what_attention_reads(window: int | None, length: int, context: int) -> None:
    """Against a count over all queries and keys."""
    seen = {
        query: {key for key in range(query + 1) if window is None or query - key < window} for query in range(context - length, context)
    }
    spans = Spans(3, length, context)
    assert spans.scores(window) == 3 * sum(map(len, seen.values()))
    assert spans.read(window) == 3 * len(set().union(*seen.values()))


def time_of(config: ModelConfig, shape: MeshShape, spans: list[Spans], cluster: Cluster = CLUSTER, overlap: bool = False) -> StepTime:
    held = TensorCut.of(config, shape.tp)
    lengths = [part.length for part in spans for _ in range(part.count)]
    said = collectives(held, shape, BF16, lengths, SlotParams(), overlap=overlap)
    return StepTime.of(held, shape, BF16, cluster, cluster.devices, spans, said, overlap)


def test_a_step_by_hand() -> None:
    """One token of one sequence that has 10: every weight of layers and head is read once, and so are keys and values."""
    layer = (9 + 2 * 3) * 8 * 64 + 72 * 64 + 3 * 128 * 64 + 2 * 64
    activations = 3 * (8 * 64 + 2 * (9 + 2 * 3) * 8 + 3 * 128)
    reading = Rates(1e9, math.inf)
    found = time_of(
        CONFIG, MeshShape(1, 1, 1), [Spans(1, 1, 10)], replace(CLUSTER, products=reading, attention=reading, layer_s=1e-4, step_s=1e-3)
    )
    assert found.products == pytest.approx(2 * (3 * layer + 1000 * 64 + activations) / 1e9)
    assert found.attention == pytest.approx(3 * 10 * 2 * 3 * 8 * 2 / 1e9)
    assert (found.reductions, found.gathers, found.arithmetic) == (0, 0, False)
    assert found.host == pytest.approx(3e-4 + 1e-3 + LEADER_S + SEQUENCE_S)
    assert found.total == pytest.approx(found.products + found.attention + found.host)


def test_many_rows_are_limited_by_arithmetic() -> None:
    slow = replace(CLUSTER, products=Rates(1e9, 1e9), attention=Rates(1e9, 1e9))
    found = time_of(CONFIG, MeshShape(1, 1, 1), [Spans(1, 200, 200)], slow)
    held = TensorCut.of(CONFIG, 1)
    activations = 200 * 3 * (8 * 64 + 2 * (9 + 2 * 3) * 8 + 3 * 128)
    assert found.arithmetic
    # One row of logits: memory takes as long as arithmetic, so the corner's root of two.
    products = math.hypot(2 * held.dense, 2 * 200 * held.dense) + math.sqrt(2) * 2 * held.head + 2 * activations
    assert found.products == pytest.approx(products / 1e9)
    read, scores = 3 * 200 * 2 * 3 * 8 * 2, 3 * 4 * 9 * 8 * (200 * 201 // 2)
    assert found.attention == pytest.approx(math.hypot(read, scores) / 1e9)


def test_experts_that_a_batch_touches() -> None:
    experts = ExpertsConfig(count=8, chosen=2, ffn_size=32, layers=(0, 2), shared_ffn_size=16)
    config = replace(CONFIG, experts=experts)
    held = TensorCut.of(config, 1)
    one = 3 * 32 * 64
    assert held.experts == 2 * 8 * one
    assert held.dense == sum(held.layers) - held.experts
    unlimited = replace(CLUSTER, products=Rates(1e9, math.inf))
    few, many = (time_of(config, MeshShape(1, 1, 1), [Spans(count, 1, 1)], unlimited) for count in (1, 64))
    beside = [count * 3 * (8 * 64 + 2 * 15 * 8 + 3 * held.ffn) for count in (1, 64)]
    assert 1e9 * few.products / 2 - beside[0] == pytest.approx(held.dense + held.head + 2 * 2 * one)
    assert 1e9 * many.products / 2 - beside[1] == pytest.approx(held.dense + held.head + held.experts, rel=1e-6)
    assert TensorCut.of(config, 4).experts == held.experts // 4


def test_kv_heads_are_repeated_when_tp_exceeds_them() -> None:
    assert [TensorCut.of(CONFIG, tp).kv_heads for tp in (1, 2, 3, 4, 9)] == [3, 2, 1, 2, 1]
    reading = replace(CLUSTER, attention=Rates(1e9, math.inf))  # which the rank's query heads do not count in
    at_3, at_9 = (time_of(CONFIG, MeshShape(1, 1, tp), [Spans(1, 1, 100)], reading) for tp in (3, 9))
    assert at_3.attention == at_9.attention


def test_windows_bound_what_is_read() -> None:
    config = replace(CONFIG, sliding_windows=(16, None, 16))
    half = time_of(config, MeshShape(1, 1, 1), [Spans(4, 1, 160)])
    whole = time_of(CONFIG, MeshShape(1, 1, 1), [Spans(4, 1, 160)])
    assert half.attention == pytest.approx(whole.attention * (16 + 160 + 16) / 480)


def test_collectives_by_hand() -> None:
    near, far = Collective("all_reduce", "tp", 3, 8000, ""), Collective("all_gather", "fsdp", 1, 8000, "")
    assert seconds(near, MeshShape(1, 1, 4), CLUSTER, 4) == pytest.approx(3 * (1e-6 + 2 * 3 / 4 * 8000 / 1e9))
    over_nodes = 1e-6 + 2 * 3 / 4 * 8000 / 1e9 + 1e-5 + 2 * 1 / 2 * 8000 / 4 / 1e8
    assert seconds(near, MeshShape(1, 1, 8), CLUSTER, 4) == pytest.approx(3 * over_nodes)
    assert seconds(far, MeshShape(1, 2, 4), CLUSTER, 4) == pytest.approx(1e-5 + 1 / 2 * 8000 / 1e8)
    assert seconds(far, MeshShape(1, 2, 2), CLUSTER, 4) == pytest.approx(1e-6 + 1 / 2 * 8000 / 1e9)
    control = Collective("gather", "control", 2, 100, "")
    assert seconds(control, MeshShape(1, 2, 2), CLUSTER, 4) == 2 * CLUSTER.control
    assert seconds(control, MeshShape(1, 2, 4), CLUSTER, 4) == 2 * REMOTE_CONTROL_S


def test_what_a_step_says_by_hand() -> None:
    """A step of many tokens goes in two parts, and a scored row is told with five numbers."""

    def sizes(kind: str, lengths: list[int], targets: bool) -> list[int]:
        said = collectives(TensorCut.of(CONFIG, 2), MeshShape(1, 1, 2), BF16, lengths, SlotParams(), targets)
        return [one.bytes for one in said if one.kind == kind]

    first, rest = sizes("broadcast", [5000], False)
    assert first == 4 * FIRST_PART and 4 * 5000 < first + rest < 4 * 5100
    assert sizes("broadcast", [2000], False) == [first]
    assert sizes("gather", [10] * 3, True) == [4 * 5 * 3]


def test_the_leader_works_while_ranks_compute_where_steps_overlap() -> None:
    spans = [Spans(32, 1, 400)]
    alone, beside = (time_of(CONFIG, MeshShape(1, 1, 1), spans, overlap=overlap) for overlap in (False, True))
    assert alone.host == pytest.approx(LEADER_S + 32 * SEQUENCE_S)
    assert beside.host == pytest.approx(max(0, alone.host - alone.products - alone.attention))


def test_gathers_are_hidden_where_they_overlap() -> None:
    shape, spans = MeshShape(1, 2, 1), [Spans(1, 1, 10)]
    shown = time_of(CONFIG, shape, spans, replace(CLUSTER, overlaps=False))
    assert shown.gathers == pytest.approx(
        4e-6 + sum(size * 2 / 2 / 1e9 for size in (*TensorCut.of(CONFIG, 1).layers, TensorCut.of(CONFIG, 1).root))
    )
    hidden = time_of(CONFIG, shape, spans)
    assert hidden.gathers == pytest.approx(max(0, shown.gathers - shown.products - shown.attention))


def _count(path: str, tp: int, overlap: bool) -> list[tuple[str, int]]:
    """This rank's collectives over some decode steps of three sequences."""
    overrides = [f"model.path={path}", f"parallel.tp={tp}", *FLOAT32, f"engine.overlap={overlap}", "engine.kv_cache_gib=0.01"]
    options = read_options(overrides)
    with counted_calls() as calls:
        session = Session(options, lambda: Blueprint.of(options), scripted=True)
        try:
            calls.clear()
            if session.is_conductor:
                session.run([request([3, index], index, max_tokens=10, ignore_eos=True) for index in range(3)], lambda *_: None)
            else:
                session.serve()
            return [(call.kind, call.bytes) for call in calls]
        finally:
            session.close()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_collectives_are_those_that_are_made(ranks: Ranks, tmp_path: Path, family: str, overlap: bool) -> None:
    """Three prompts enter in one step; nine steps of one token each follow."""
    make_model(tmp_path, model_type=family, num_attention_heads=4)
    config = Blueprint.of(read_options([f"model.path={tmp_path}"])).config
    assert (config.qk_norm == "full") == (family == "olmo2")
    predicted = Counter[tuple[str, int]]()
    for steps, lengths in ((1, [2, 2, 2]), (9, [1, 1, 1])):
        for one in collectives(TensorCut.of(config, 2), MeshShape(1, 1, 2), torch.float32, lengths, SlotParams(), overlap=overlap):
            predicted[one.kind, one.bytes] += steps * one.count
    for found in ranks(2).run(_count, str(tmp_path), 2, overlap):
        made = Counter(found)
        messages = [key for key in {**predicted, **made} if key[0] == "broadcast"]
        assert {key: count for key, count in made.items() if key not in messages} == {
            key: count for key, count in predicted.items() if key not in messages
        }
        # The end of the call is a message too, and with overlap so is that of the last step.
        assert 0 < sum(made[key] for key in messages) - sum(predicted[key] for key in messages) <= (2 if overlap else 1)
        assert len(messages) == 1


def test_the_best_mesh_is_first_and_says_why() -> None:
    found = planner(CONFIG, CLUSTER).forecasts()
    assert {one.shape.size for one in found} == {8}
    assert {(one.shape.replicas, one.shape.fsdp, one.shape.tp) for one in found} == {
        (8 // tp // fsdp, fsdp, tp) for tp in (1, 2, 4, 8) for fsdp in (1, 2, 4, 8) if 8 % (tp * fsdp) == 0
    }
    assert [one.seconds for one in found] == sorted(one.seconds for one in found)
    assert all(one.fits and "% of a " in one.why for one in found)
    slow = planner(CONFIG, replace(CLUSTER, intra=Link(1e9, 1), gather=Link(1e9, 1), inter=Link(1e8, 1))).forecasts()
    assert slow[0].shape == MeshShape(8, 1, 1) and not slow[0].traffic
    assert "all-reduces over tp" in next(one for one in slow if one.shape.fsdp == 1 and one.shape.tp > 1).why
    assert "gathers of weights over fsdp" in next(one for one in slow if one.shape.tp == 1 and one.shape.fsdp > 1).why


def test_axes_that_are_given_stay() -> None:
    shapes = [one.shape for one in planner(CONFIG, CLUSTER, "parallel.tp=2").forecasts()]
    assert {(shape.tp, shape.size) for shape in shapes} == {(2, 8)} and len(shapes) == 3
    with pytest.raises(ValueError, match=r"parallel: tp=3: no mesh of 8 ranks for a model of 9 query heads"):
        planner(CONFIG, CLUSTER, "parallel.tp=3").forecasts()


def test_ranks_of_a_cpu_share_out_its_cores() -> None:
    cpu = replace(CLUSTER, kind="cpu", nodes=1, devices=2, inter=Link(math.inf, 0))
    found = {str(one.shape): one for one in planner(CONFIG, cpu).forecasts()}
    assert set(found) == {f"replicas={r} x fsdp={f} x tp={t}" for r, f, t in ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2))}
    alone, beside = found["replicas=1 x fsdp=1 x tp=1"], found["replicas=2 x fsdp=1 x tp=1"]
    assert beside.decode_step.attention == alone.decode_step.attention  # half the sequences, at half the speed
    assert beside.footprint.weights == alone.footprint.weights


def test_a_workload_by_hand() -> None:
    one = planner(CONFIG, replace(CLUSTER, nodes=1, devices=1), "engine.max_sequences=4").forecasts()[0]
    assert one.running == 4
    # Two batches of four, each read at once, then seven steps.
    assert one.seconds == pytest.approx(2 * (one.prefill_step.total + 7 * one.decode_step.total))
    assert one.prefill == pytest.approx(4 * 32 / one.prefill_step.total)
    assert one.decode == pytest.approx(4 / one.decode_step.total)
    assert one.load_s == pytest.approx(2 * TensorCut.of(CONFIG, 1).held(1) / 1e9)
    assert one.fresh_s == 0


def test_a_tied_head_that_is_kept_twice_is_loaded_twice() -> None:
    """On a CPU it is packed beside the embedding; not so where nothing is packed."""
    tied = replace(CONFIG, tied_head=True)
    cpu = replace(CLUSTER, kind="cpu", nodes=1, devices=2, inter=Link(math.inf, 0))
    for tp in (1, 2):
        mesh = (f"parallel.tp={tp}", f"parallel.replicas={2 // tp}")
        packed, plain = planner(tied, cpu, *mesh).forecasts()[0], planner(tied, cpu, *mesh, "engine.pack_weights=false").forecasts()[0]
        assert packed.footprint.copies == 2 * 1000 * 64 // tp
        rate = cpu.storage if tp == 1 else cpu.cut_storage
        assert packed.load_s - plain.load_s == pytest.approx(2 * packed.footprint.copies / rate)


def test_memory_that_a_hypervisor_must_give_is_told_apart() -> None:
    """All that the ranks of a machine hold of the model, copies too; it is not part of the loading time."""
    cpu = replace(CLUSTER, kind="cpu", nodes=1, devices=2, inter=Link(math.inf, 0))
    slow = replace(cpu, fresh=1e8)
    for mesh in (("parallel.tp=2",), ("parallel.replicas=2",)):
        at_hand, one = (planner(replace(CONFIG, tied_head=True), cluster, *mesh).forecasts()[0] for cluster in (cpu, slow))
        assert one.fresh_s == pytest.approx(2 * (one.footprint.weights + one.footprint.copies) / 1e8)
        assert one.load_s == at_hand.load_s and at_hand.fresh_s == 0


def test_long_prompts_are_read_in_chunks() -> None:
    cluster = replace(CLUSTER, nodes=1, devices=1)
    chunked = planner(CONFIG, cluster, "workload.prompt_tokens=100", "engine.max_batch_tokens=40", "workload.sequences=1").forecasts()[0]
    steps = [time_of(CONFIG, MeshShape(1, 1, 1), [Spans(1, length, end)], cluster, True) for length, end in ((40, 40), (40, 80), (20, 100))]
    assert chunked.first_token_s == pytest.approx(sum(step.total for step in steps))
    assert chunked.prefill_step == steps[1]


def test_scoring_decodes_nothing() -> None:
    one = planner(CONFIG, CLUSTER, "workload.output_tokens=0").forecasts()[0]
    assert one.decode == 0 and one.decode_step.total == 0
    assert one.seconds == pytest.approx(one.prefill_step.total)
