"""Families without a decoder of ours run as transformers' own module, and say what transformers says; others are refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from dist_infer.distributed.collectives import SingleRank
from dist_infer.model.fallback import _model_config, comparison
from dist_infer.model.fallback.attention import PagedAttention
from dist_infer.model.families import from_hf
from dist_infer.model.weights import describe
from tests.engine.jobs import Mesh, kv_memory, request, run
from tests.engine.references import Continuation, greedy, make_model
from tests.model.test_against_transformers import check, prompts_of
from tests.ranks import RankError, Ranks

COUNT = 10
LENGTHS = (3, 31, 12, 1, 20)
LATENT = {
    "num_key_value_heads": 6,
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 22,
    "first_k_dense_replace": 1,
}
WITH_PLAN: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 0.3, "tie_word_embeddings": True},
    "cohere2": {"sliding_window": 7, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "glm": {"head_dim": 8, "partial_rotary_factor": 0.5, "attention_bias": True},
    "starcoder2": {"sliding_window": 9, "use_bias": True, "tie_word_embeddings": True},
    "phi": {"partial_rotary_factor": 0.5},
    "nemotron": {"partial_rotary_factor": 0.5, "head_dim": 8},
    "exaone4": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "ernie4_5": {"use_bias": True, "head_dim": 8},
    "arcee": {"mlp_bias": True},
    "granitemoe": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.5,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
    },
    "deepseek_v3": LATENT,
    "vaultgemma": {"head_dim": 8, "sliding_window": 5, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
}
WITHOUT_PLAN: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 88, "word_embed_proj_dim": 48, "do_layer_norm_before": True},
    "stablelm": {"use_qkv_bias": True, "partial_rotary_factor": 0.5},
    "gpt_bigcode": {"n_inner": 88, "n_positions": 128, "tie_word_embeddings": True},
    "gpt_oss": {
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "persimmon": {"num_key_value_heads": 6, "partial_rotary_factor": 0.5},
    "biogpt": {"num_key_value_heads": 6},
}
FAMILIES = {**WITH_PLAN, **WITHOUT_PLAN}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes a model of a family once."""

    @cache
    def make(family: str) -> Path:
        directory = tmp_path_factory.mktemp(family)
        make_model(directory, seed=1, **{"model_type": family, **FAMILIES[family]})
        return directory

    return make


@pytest.fixture(scope="module")
def expected(model: Any) -> Any:
    """Continuations by transformers, computed once for each family."""

    @cache
    def compute(family: str) -> list[Continuation]:
        return [greedy(model(family), prompt, COUNT) for prompt in prompts_of(LENGTHS)]

    return compute


def same_as_transformers(ranks: Ranks, path: Path, mesh: Mesh, expected: list[Continuation], overrides: Sequence[str] = ()) -> int:
    """Run ragged prompts, in chunks, and compare; returns how many sequences were preempted."""
    requests = [request(prompt, index, max_tokens=COUNT, logprobs=5) for index, prompt in enumerate(prompts_of(LENGTHS))]
    limits = ["engine.block_size=4", "engine.max_batch_tokens=24", *overrides]
    found = run(ranks, str(path), mesh, [requests], limits)
    check(found.results[0], expected)
    return found.preemptions


@pytest.mark.parametrize("family", list(FAMILIES))
def test_families(ranks: Ranks, model: Any, expected: Any, family: str) -> None:
    same_as_transformers(ranks, model(family), Mesh(), expected(family))


@pytest.mark.parametrize("family", list(WITH_PLAN))
def test_families_are_cut_by_their_plan(ranks: Ranks, model: Any, expected: Any, family: str) -> None:
    same_as_transformers(ranks, model(family), Mesh(tp=2), expected(family))


@pytest.mark.parametrize("family", ["cohere", "granitemoe", "stablelm"])
def test_fsdp_and_preemption(ranks: Ranks, model: Any, expected: Any, family: str) -> None:
    mesh = Mesh(tp=2, fsdp=2) if family in WITH_PLAN else Mesh(fsdp=2)
    tight = [kv_memory(str(model(family)), mesh, 4, 12), "engine.max_model_len=44"]
    assert same_as_transformers(ranks, model(family), mesh, expected(family), tight) > 0


@pytest.mark.parametrize("family", ["deepseek_v3", "granitemoe", "opt"])
def test_a_module_saved_as_it_is(ranks: Ranks, model: Any, expected: Any, tmp_path: Path, family: str) -> None:
    """Trainers save what lies in memory, perhaps below a prefix: experts in packs, weights by the module's names."""
    module = AutoModelForCausalLM.from_pretrained(model(family), dtype=torch.float32)
    tied = module.config.tie_word_embeddings
    weights = {f"model.{name}": x.clone() for name, x in module.state_dict().items() if not (tied and name == "lm_head.weight")}
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((model(family) / "config.json").read_text())
    same_as_transformers(ranks, tmp_path, Mesh(), expected(family))


def small(model_type: str, **settings: Any) -> Any:
    """A transformers configuration."""
    sizes = {"vocab_size": 131, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6}
    return AutoConfig.for_model(model_type, **{**sizes, **settings})


@pytest.mark.parametrize(
    ("model_type", "settings", "reason"),
    [
        ("t5", {}, "it is an encoder and a decoder"),
        ("vit", {}, "transformers has no causal language model for it"),
        ("mamba", {}, "its attention is not called through transformers' attention interface, or it has none"),
        ("bloom", {}, "its attention is not called through"),
        ("falcon", {}, "its attention is not called through"),
        ("jamba", {"num_hidden_layers": 8}, "not every layer calls attention just once"),
        ("bert", {}, "a small model of its kind does not compute alike .*its logits differ"),
        ("llama4_text", {"num_hidden_layers": 4, "head_dim": 8}, "a small model of its kind does not compute alike"),
        ("doge", {}, "its attention has a mask of its own"),
        ("arcee", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope_type 'dynamic' turns keys by"),
        ("arcee", {"quantization_config": {"quant_method": "fp8"}}, "its weights are quantized"),
        ("cohere2_vision", {}, "its language model is a part of a larger one"),
    ],
)
def test_what_would_be_wrong_is_refused(model_type: str, settings: dict[str, Any], reason: str) -> None:
    config = AutoConfig.for_model(model_type) if model_type == "cohere2_vision" else small(model_type, **settings)
    with pytest.raises(ValueError, match=reason) as error:
        from_hf(config)
    assert "\n" not in str(error.value) and repr(model_type) in str(error.value)


@pytest.mark.parametrize(
    ("family", "ignored"), [("cohere2", "sliding_window"), ("granitemoe", "scaling"), ("gpt_oss", "s_aux"), ("vaultgemma", "softcap")]
)
def test_the_comparison_sees_what_attention_ignores(monkeypatch: pytest.MonkeyPatch, family: str, ignored: str) -> None:
    """Sizes of a real model, whose window no short sequence would leave."""
    attend = PagedAttention.attend
    config = AutoConfig.for_model(family, **({"attention_multiplier": 0.3} if family == "granitemoe" else {}))
    assert from_hf(config).fallback is not None
    monkeypatch.setattr(PagedAttention, "attend", lambda self, *tensors, **options: attend(self, *tensors, **{**options, ignored: None}))
    with pytest.raises(ValueError, match="its logits differ"):
        comparison.check(config, _model_config, SingleRank(), torch.device("cpu"))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model_type": "stablelm"}, "transformers has no tensor parallel plan for it"),
        ({"model_type": "arcee", "num_key_value_heads": 3}, "6 query heads over 3 KV heads tp must divide"),
        ({"model_type": "cohere", "use_qk_norm": True}, "does not compute alike"),
    ],
)
def test_a_model_that_cannot_be_cut_is_refused(ranks: Ranks, tmp_path: Path, settings: dict[str, Any], reason: str) -> None:
    make_model(tmp_path, **settings)
    with pytest.raises(RankError, match=f"parallel.tp=2: {settings['model_type']} runs as transformers' own module, .*{reason}"):
        run(ranks, str(tmp_path), Mesh(tp=2), [[]])


def test_large_configurations_are_described_on_paper() -> None:
    """Experts lie one by one on disk and as a pack in the module; a rank's pieces cover its part once."""
    config = from_hf(AutoConfig.for_model("deepseek_v3"))
    assert (config.layers, config.kv_heads, config.head_dim) == (61, 128, 192)
    whole, halves = (sum(w.elements for w in describe(config, tp)) for tp in (1, 2))
    assert whole == 671_026_419_200
    assert 0.5 < halves / whole < 0.53
    for weight in describe(config, 2, 1):
        assert sum(piece.rows for piece in weight.pieces) == weight.shape[0]
