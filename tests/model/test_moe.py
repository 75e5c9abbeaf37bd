"""Mixtures of experts: whole models against transformers, the layer against one token and one expert at a time."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from dist_infer import LLM, SamplingParams
from dist_infer.checkpoint.checkpoint import open_checkpoint
from dist_infer.checkpoint.plan import plan
from dist_infer.distributed.collectives import SingleRank
from dist_infer.model.config import ExpertsConfig, ModelConfig
from dist_infer.model.moe import ExpertLinear, Experts, MoE
from dist_infer.model.native import kernels
from dist_infer.model.packed import onednn_packs
from dist_infer.model.weights import ExpertCut, describe
from tests.engine.jobs import Mesh, request, run
from tests.engine.references import Continuation, greedy, make_model, reference
from tests.model.test_against_transformers import COUNT, check, prompts_of
from tests.ranks import Ranks

MESHES = [Mesh(), Mesh(tp=2), Mesh(tp=3), Mesh(tp=4), Mesh(fsdp=2), Mesh(tp=2, fsdp=2)]
MODELS: dict[str, dict[str, Any]] = {
    "mixtral, four experts": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 22},
    "mixtral, window": {"model_type": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 1, "sliding_window": 9},
    "qwen3_moe, dense layers between": {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 5,
        "head_dim": 12,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 13,
    },
    "qwen3_moe, normalized": {
        "model_type": "qwen3_moe",
        "attention_bias": True,
        "num_experts": 12,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 10,
        "norm_topk_prob": True,
        "use_sliding_window": True,
        "sliding_window": 7,
    },
    "qwen2_moe, shared expert": {
        "model_type": "qwen2_moe",
        "num_hidden_layers": 3,
        "mlp_only_layers": [0],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 14,
        "shared_expert_intermediate_size": 23,
        "use_sliding_window": True,
        "sliding_window": 11,
        "max_window_layers": 2,
    },
}
LENGTHS = (3, 31, 12, 1, 20)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes a model once: its directory, and continuations by transformers."""

    @cache
    def make(name: str) -> tuple[str, list[Continuation]]:
        directory = tmp_path_factory.mktemp("model")
        make_model(directory, **MODELS[name])
        return str(directory), [greedy(directory, prompt, COUNT) for prompt in prompts_of(LENGTHS)]

    return make


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("name", list(MODELS))
def test_logits_and_tokens_are_those_of_transformers(ranks: Ranks, model: Any, name: str, mesh: Mesh) -> None:
    path, expected = model(name)
    compiled = (list(MODELS).index(name) + MESHES.index(mesh)) % 2 == 0
    requests = [request(prompt, index, max_tokens=COUNT, logprobs=5) for index, prompt in enumerate(prompts_of(LENGTHS))]
    overrides = ["engine.block_size=4", "engine.max_batch_tokens=24", f"engine.native_kernels={compiled}"]
    check(run(ranks, path, mesh, [requests], overrides).results[0], expected)


@pytest.mark.parametrize("fsdp", [1, 3])
@pytest.mark.parametrize("tp", [1, 2, 3, 4])
def test_a_rank_reads_its_own_experts_alone(tp: int, fsdp: int) -> None:
    """Four experts over three ranks: a third of each one; else whole experts, and none of the files' other bytes."""
    checkpoint = open_checkpoint(reference("hf_mixtral").path)
    config = checkpoint.config()
    assert config.experts is not None
    stored = {
        f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{projection}.weight": expert
        for layer in range(config.layers)
        for expert in range(config.experts.count)
        for projection in ("w1", "w2", "w3")
    }
    places = {(chunk.file, chunk.offset): name for name in stored for chunk in checkpoint.index[name].chunks}
    brought: dict[str, int] = dict.fromkeys(stored, 0)
    for rank in range(tp):
        held = range(*ExpertCut.of(config.experts, tp, rank).experts)
        assert len(held) == (4 // tp if 4 % tp == 0 else 4)
        elements = 0
        for coordinate in range(fsdp):
            for read in plan(describe(config, tp, rank), fsdp, coordinate, checkpoint.index, checkpoint.dialect, config):
                name = places.get((read.chunk.file, read.chunk.offset))
                assert (name is not None) == ("experts" in read.parameter)
                if name is not None:
                    assert stored[name] in held
                    brought[name] += read.elements
                    elements += read.elements
        whole = config.layers * config.experts.count * 3 * config.hidden_size * config.experts.ffn_size
        assert abs(elements - whole / tp) <= whole * (1 / config.experts.ffn_size if config.experts.count % tp else 0)
    for name, elements in brought.items():
        assert elements == config.hidden_size * config.experts.ffn_size, f"{name}: every element once over the ranks"


ROUTINGS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "softmax as it is": {"normalized": False},
    "softmax, bias for the choice": {"score_bias": True},
    "sigmoid": {"scoring": "sigmoid"},
    "sigmoid, bias for the choice": {"scoring": "sigmoid", "score_bias": True, "scale": 2.5},
    "sigmoid, bias inside": {"scoring": "sigmoid", "score_bias": True, "bias_in_score": True},
    "shared expert": {"shared_ffn_size": 9, "normalized": False},
    "shared expert behind a gate": {"shared_ffn_size": 9, "shared_gate": True, "scale": 0.5},
}
HIDDEN, FFN = 32, 24


def config_of(**experts: Any) -> ModelConfig:
    """A model whose one layer has seven experts."""
    mixture = ExpertsConfig(**{"count": 7, "chosen": 3, "ffn_size": FFN, "layers": (0,), **experts})
    return ModelConfig("test", 11, HIDDEN, 16, 1, 4, 2, 8, 1e-5, 64, experts=mixture)


def layer(config: ModelConfig) -> MoE:
    """Its layer of experts with random weights, float32."""
    moe = MoE(config, SingleRank())
    generator = torch.Generator().manual_seed(3)
    for parameter in moe.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return moe


def tokens(count: int) -> Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(count))


def one_by_one(moe: MoE, x: Tensor) -> Tensor:
    """What the layer is meant to compute, in float64."""
    settings, weights = moe.router.experts, {name: weight.double() for name, weight in moe.named_parameters()}
    gate_up = weights["experts.gate_up.weight"].view(settings.count, 2, FFN, HIDDEN)
    down = weights["experts.down.weight"].view(settings.count, HIDDEN, FFN)

    def mlp(token: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        gated = gate @ token
        return down @ (gated / (1 + (-gated).exp()) * (up @ token))

    rows = []
    for token in x.double():
        logits = weights["router.gate.weight"] @ token
        if settings.bias_in_score:
            logits = logits + weights["router.score_bias"]
        scores = 1 / (1 + (-logits).exp()) if settings.scoring == "sigmoid" else logits.exp() / logits.exp().sum()
        order = scores + weights["router.score_bias"] if settings.score_bias and not settings.bias_in_score else scores
        chosen = sorted(range(settings.count), key=lambda expert: -float(order[expert]))[: settings.chosen]
        total = sum(float(scores[expert]) for expert in chosen) if settings.normalized else 1.0
        row = torch.zeros(HIDDEN, dtype=torch.float64)
        for expert in chosen:
            row += settings.scale * scores[expert] / total * mlp(token, gate_up[expert, 0], gate_up[expert, 1], down[expert])
        if settings.shared_ffn_size:
            gate, up = weights["shared.gate_up.weight"].chunk(2)
            factor = 1 / (1 + (-weights["shared_gate.weight"][0] @ token).exp()) if settings.shared_gate else 1.0
            row += factor * mlp(token, gate, up, weights["shared.down.weight"])
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("routing", list(ROUTINGS))
def test_every_routing(routing: str) -> None:
    moe = layer(config_of(**ROUTINGS[routing]))
    for count in (1, 2, 50):
        torch.testing.assert_close(moe(tokens(count)).double(), one_by_one(moe, tokens(count)), rtol=1e-4, atol=1e-5)
    assert moe(tokens(0)).shape == (0, HIDDEN)


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    moe = layer(config_of())
    x = tokens(50)
    torch.testing.assert_close(torch.cat([moe(x[i : i + 1]) for i in range(50)]), moe(x), rtol=1e-5, atol=1e-6)


def test_experts_nobody_chose_are_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    moe, x = layer(config_of()), tokens(2)
    used: list[int] = []
    product = ExpertLinear.of
    monkeypatch.setattr(ExpertLinear, "of", lambda self, expert, x: used.append(expert) or product(self, expert, x))
    moe(x)
    chosen = moe.router(x)[0].unique().tolist()
    assert len(chosen) < 7 and sorted(used) == sorted(2 * chosen)


@pytest.mark.parametrize("held", [(0, 8), (0, 4), (4, 8), (6, 8)])
@pytest.mark.parametrize("count", [1, 3, 40])
def test_grouped_products_give_what_turns_give(count: int, held: tuple[int, int]) -> None:
    """The way without a question to the device, for all experts and for a part of them."""
    config = config_of(count=8)
    moe = layer(config).bfloat16()
    x = tokens(count).bfloat16()
    part = Experts(config, ExpertCut(held, (0, FFN))).bfloat16()
    part.kernels = kernels(torch.bfloat16)
    for mine, whole in ((part.gate_up, moe.experts.gate_up), (part.down, moe.experts.down)):
        mine.weight.copy_(whole.weight.view(8, -1, whole.inputs)[held[0] : held[1]].reshape(mine.weight.shape))
    assert part.gate_up.can_group() and part.down.can_group()
    chosen, weights = moe.router(x)
    local = part.local(chosen)
    torch.testing.assert_close(part.together(x, local, weights), part.by_turns(x, local, weights), rtol=0.02, atol=0.02)


@pytest.mark.skipif(not onednn_packs(torch.bfloat16), reason="no packed layout with this torch on this CPU")
@pytest.mark.parametrize("compiled", [True, False])
def test_packed_experts_are_as_near_as_plain_ones(compiled: bool) -> None:
    config = config_of(shared_ffn_size=9)
    moe = layer(config).bfloat16()
    moe.experts.kernels = kernels(torch.bfloat16) if compiled else None
    for count in (1, 2, 50):
        x = tokens(count).bfloat16()
        chosen, weights = moe.router(x)
        exact = one_by_one(moe, x)
        error = (moe(x).double() - exact).abs().mean()
        packed = Experts(config, ExpertCut((0, 7), (0, FFN))).bfloat16()
        packed.load_state_dict(moe.experts.state_dict())
        for projection in (packed.gate_up, packed.down):
            projection.kernels = moe.experts.kernels
            projection.pack(keep_weight=False)
            assert not projection.weight.numel(), "the plain weight is kept beside the packed one"
        plain, found = moe.experts(x, chosen, weights), packed(x, chosen, weights)
        assert (plain - found).abs().mean() <= 2 * error
        for projection in (packed.gate_up, packed.down):
            projection.unpack()
            projection.weight.fill_(0)
        assert not packed(x, chosen, weights).any(), "new weights count, not those packed before"


def test_impossible_mixtures_are_refused() -> None:
    mixture = ExpertsConfig(count=4, chosen=2, ffn_size=8, layers=(0,))
    with pytest.raises(ValueError, match="5 experts a token cannot be chosen of 4"):
        replace(mixture, chosen=5)
    with pytest.raises(ValueError, match="experts scoring 'noisy' is not supported; supported are softmax, sigmoid"):
        replace(mixture, scoring="noisy")


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(tp=2), Mesh(tp=3), Mesh(fsdp=2)], ids=str)
@pytest.mark.parametrize("name", ["mixtral, four experts", "qwen2_moe, shared expert"])
def test_packs_as_a_training_of_transformers_saves_them(ranks: Ranks, model: Any, tmp_path: Path, name: str, mesh: Mesh) -> None:
    """The module's own state in a DCP checkpoint: all experts of a layer in one tensor, gates above ups."""
    path, expected = model(name)
    module: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert any(name.endswith("experts.gate_up_proj") for name in module.state_dict())
    dcp.save({"model": module.state_dict()}, checkpoint_id=tmp_path, no_dist=True)
    shutil.copy(Path(path) / "config.json", tmp_path)
    requests = [request(prompt, index, max_tokens=COUNT, logprobs=5) for index, prompt in enumerate(prompts_of(LENGTHS))]
    check(run(ranks, str(tmp_path), mesh, [requests], ["engine.block_size=4"]).results[0], expected)


class Unsummed(SingleRank):
    """One of several ranks, whose sum the test makes."""

    def __init__(self, size: int, rank: int) -> None:
        self.size, self.rank = size, rank


@pytest.mark.parametrize("tp", [1, 2, 3, 4])
@pytest.mark.parametrize("traits", [{"activation": "relu", "gated_mlp": False}, {"activation": "gelu"}], ids=str)
def test_experts_are_mlps_as_the_model_has_them(traits: dict[str, Any], tp: int) -> None:
    """Every rank is filled as it is described; together they give what whole experts give."""
    config = replace(config_of(count=6, shared_ffn_size=11), **traits)
    prefix, generator = "model.layers.0.mlp.", torch.Generator().manual_seed(1)
    pieces = [piece for weight in describe(config) for piece in weight.pieces if piece.name.startswith(prefix)]
    stored = {piece.name.removeprefix(prefix): torch.randn(piece.shape, generator=generator) / 5 for piece in pieces}
    x, found = tokens(9), torch.zeros(9, HIDDEN)
    for rank in range(tp):
        moe = MoE(config, Unsummed(tp, rank))
        parameters = {f"blocks.0.mlp.{name}": parameter for name, parameter in moe.named_parameters()}
        for weight in describe(config, tp, rank):
            if weight.parameter in parameters:
                boxes = [stored[piece.name.removeprefix(prefix)][tuple(slice(*b) for b in piece.box)] for piece in weight.pieces]
                parameters.pop(weight.parameter).copy_(torch.cat(boxes))
        assert not parameters, "described are all"
        found += moe(x)

    def mlp(place: str, x: Tensor) -> Tensor:
        inner = F.linear(x, stored[f"{place}.{'gate' if config.gated_mlp else 'up'}_proj.weight"])
        inner = inner.relu() if config.activation == "relu" else F.gelu(inner)
        return F.linear(
            inner * F.linear(x, stored[f"{place}.up_proj.weight"]) if config.gated_mlp else inner, stored[f"{place}.down_proj.weight"]
        )

    scores = F.linear(x, stored["gate.weight"]).softmax(dim=-1)
    scores = scores.where(scores >= scores.topk(3).values[:, -1:], 0)
    scores /= scores.sum(dim=1, keepdim=True)
    expected = mlp("shared_expert", x) + sum(scores[:, e, None] * mlp(f"experts.{e}", x) for e in range(6))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def look(path: str, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens of a sharded transformers module in memory."""
    module: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for block in module.model.layers:
        fully_shard(block)
    fully_shard(module)
    with LLM.from_model(module, tp=2, overrides=["device=cpu"]) as llm:
        return [result.outputs[0].token_ids for result in llm.generate(prompts, SamplingParams(max_tokens=COUNT))]


@pytest.mark.parametrize("name", ["mixtral, four experts", "qwen3_moe, dense layers between"])
def test_model_in_memory(ranks: Ranks, model: Any, name: str) -> None:
    """Between two steps of its training, whose packs of experts are sharded another way."""
    path, expected = model(name)
    assert ranks(2).run(look, path, prompts_of(LENGTHS))[0] == [continuation.tokens for continuation in expected]
