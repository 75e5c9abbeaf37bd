"""Every family, as a small random model with every trait of it away from its default, against transformers run beside it."""

from __future__ import annotations

from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from dist_infer.model.config import ModelConfig
from dist_infer.model.families import FAMILIES, from_hf
from tests.engine.jobs import Mesh, request, run
from tests.engine.references import Continuation, greedy, logits, make_model
from tests.model.test_against_transformers import COUNT, check, prompts_of
from tests.ranks import Ranks

MESHES = [Mesh(), Mesh(tp=2), Mesh(tp=4), Mesh(tp=2, fsdp=2)]
PROMPTS = prompts_of((3, 31, 12, 1, 24))

WINDOWS = {"num_hidden_layers": 3, "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
BY_LAYER_TYPE = {
    "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.3],
    "long_factor": [1.0, 4.0],
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
}
CASES: dict[str, dict[str, Any]] = {
    "gemma2": {
        **WINDOWS,
        "model_type": "gemma2",
        "head_dim": 12,
        "query_pre_attn_scalar": 20,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 8.0,
        "tie_word_embeddings": True,
    },
    "gemma2 with biases and its own head": {
        **WINDOWS,
        "model_type": "gemma2",
        "head_dim": 20,
        "hidden_activation": "gelu",
        "attention_bias": True,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    },
    "gemma3_text": {
        **WINDOWS,
        "model_type": "gemma3_text",
        "head_dim": 12,
        "query_pre_attn_scalar": 20,
        "final_logit_softcapping": 6.0,
        "rope_parameters": BY_LAYER_TYPE,
        "tie_word_embeddings": True,
    },
    "olmo2": {"model_type": "olmo2", "attention_bias": True},
    "olmo2 with a KV head for each": {"model_type": "olmo2", "num_key_value_heads": 6, "hidden_act": "relu"},
    "olmo3": {
        **WINDOWS,
        "model_type": "olmo3",
        "rope_parameters": {
            **BY_LAYER_TYPE,
            "full_attention": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24, "rope_theta": 1e4},
        },
    },
    "phi3": {"model_type": "phi3", "sliding_window": 9, "tie_word_embeddings": True},
    "phi3 with longrope": {"model_type": "phi3", "original_max_position_embeddings": 24, "rope_parameters": LONGROPE},
    "smollm3": {
        "model_type": "smollm3",
        "num_hidden_layers": 4,
        "no_rope_layers": [1, 0, 1, 0],
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "smollm3 with windows": {
        "model_type": "smollm3",
        "num_hidden_layers": 4,
        "no_rope_layer_interval": 2,
        "use_sliding_window": True,
        "sliding_window": 7,
    },
    "granite": {
        "model_type": "granite",
        "embedding_multiplier": 3.5,
        "attention_multiplier": 0.21,
        "residual_multiplier": 0.6,
        "logits_scaling": 2.5,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "gpt2": {"model_type": "gpt2", "n_inner": 88, "tie_word_embeddings": True},
    "gpt2 with its own head": {"model_type": "gpt2", "activation_function": "gelu", "scale_attn_weights": False, "layer_norm_epsilon": 0.1},
    "gpt_neox": {"model_type": "gpt_neox", "rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}},
    "gpt_neox, one after another": {
        "model_type": "gpt_neox",
        "use_parallel_residual": False,
        "attention_bias": False,
        "hidden_act": "gelu_new",
        "tie_word_embeddings": True,
        "layer_norm_eps": 0.1,
    },
}


class Truth(NamedTuple):
    """What transformers says of the model at `path`."""

    path: Path
    continuations: list[Continuation]
    logits: list[Tensor]


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The truth by the name of a case, computed once."""

    @cache
    def compute(case: str) -> Truth:
        path = tmp_path_factory.mktemp("model")
        make_model(path, **CASES[case])
        # A longrope cache keeps keys of the short regime when it switches; the whole sequence anew is what is meant.
        continuations = [greedy(path, prompt, COUNT, cache="longrope" not in case) for prompt in PROMPTS]
        return Truth(path, continuations, logits(path, PROMPTS))

    return compute


@pytest.mark.parametrize(("case", "mesh"), list(product(CASES, MESHES)), ids=str)
def test_family(ranks: Ranks, truth: Any, case: str, mesh: Mesh) -> None:
    expected: Truth = truth(case)
    requests = [request(prompt, index, max_tokens=COUNT, logprobs=5) for index, prompt in enumerate(PROMPTS)]
    kernels = (list(CASES).index(case) + MESHES.index(mesh)) % 2 == 0
    overrides = ["engine.block_size=4", "engine.max_batch_tokens=24", f"engine.native_kernels={kernels}"]
    found = run(ranks, str(expected.path), mesh, [requests], overrides, prompts=PROMPTS)
    for whole, (ours,) in zip(expected.logits, found.logits, strict=True):
        assert (torch.from_numpy(ours) - whole).abs().max() <= 1e-4 * whole.abs().max()
    check(found.results[0], expected.continuations)


def test_the_language_model_of_gemma3_is_run_without_its_vision_tower(ranks: Ranks, tmp_path: Path) -> None:
    text = {"model_type": "gemma3_text", "num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 48, "intermediate_size": 88}
    text |= {**CASES["gemma3_text"], "vocab_size": 131, "max_position_embeddings": 128, "initializer_range": 0.2}
    text |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "final_logit_softcapping": None}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    special = {"mm_tokens_per_image": 4, "image_token_index": 130, "boi_token_index": 128, "eoi_token_index": 129}
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, **special))
    model.eval().save_pretrained(tmp_path)
    prompt = PROMPTS[1]
    with torch.no_grad():
        whole = model(torch.tensor([prompt]), token_type_ids=torch.zeros(1, len(prompt), dtype=torch.long)).logits[0]
    found = run(ranks, str(tmp_path), Mesh(tp=2), [], prompts=[prompt])
    assert (torch.from_numpy(found.logits[0][0]) - whole).abs().max() <= 1e-4 * whole.abs().max()


def test_every_family_is_tested() -> None:
    elsewhere = {"llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe"}
    assert {case["model_type"] for case in CASES.values()} | {"gemma3"} | elsewhere == set(FAMILIES)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"model_type": "llama", "hidden_act": "quick_gelu"}, "activation 'quick_gelu'"),
        (
            {"model_type": "llama", "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 4},
            "6 query heads cannot share 4 KV heads",
        ),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 5.0}, "attn_logit_softcapping 5.0"),
        ({"model_type": "olmo3", "num_hidden_layers": 1, "layer_types": ["chunked_attention"]}, "layer type 'chunked_attention'"),
        ({"model_type": "llama", "alibi": True}, "alibi = True"),
    ],
    ids=lambda value: value if isinstance(value, str) else value["model_type"],
)
def test_what_the_decoder_does_not_do_is_refused_by_name(config: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        from_hf(AutoConfig.for_model(**config))


@pytest.mark.parametrize(
    ("trait", "value"),
    [("norm", "batch"), ("norm_placement", "sandwich"), ("qk_norm", "both"), ("local_rope", {"rope_type": "dynamic"})],
)
def test_unknown_traits_are_refused_by_name(trait: str, value: Any) -> None:
    sizes = {"vocab_size": 8, "hidden_size": 8, "ffn_size": 8, "layers": 1, "heads": 1, "kv_heads": 1, "head_dim": 8}
    values: dict[str, Any] = {"family": "llama", **sizes, "norm_eps": 1e-6, "max_position": 8, trait: value}
    with pytest.raises(ValueError, match=trait if isinstance(value, str) else "dynamic"):
        ModelConfig(**values)
