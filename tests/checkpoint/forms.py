"""Weights written as each trainer names and orders them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import yaml
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tests.engine.references import FIXTURES

Weights = dict[str, Tensor]
LAYERS, HEADS, KV_HEADS, HEAD_DIM = 4, 8, 4, 8
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# What no shape tells of the Llama whose weights are written below.
UNTOLD = {"heads": HEADS, "norm_eps": 1e-5, "max_position": 256, "rope": ROPE}


@cache
def canonical(name: str) -> Weights:
    """The fixture's weights by Hugging Face's names, read by torch and safetensors themselves."""
    if name.startswith("hf_"):
        files = [load_file(file) for file in sorted((FIXTURES / name).glob("model-*.safetensors"))]
        return {key: value for file in files for key, value in file.items()}
    inner = {"accelerate_fsdp2_llama": "checkpoint-3/pytorch_model_fsdp_0"}.get(name, "checkpoints/step_3")
    storage = dcp.FileSystemReader(FIXTURES / name / inner)
    stored = storage.read_metadata().state_dict_metadata
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata) and key.startswith("model.")
    }
    dcp.load(state, storage_reader=storage, no_dist=True)
    return {key.removeprefix("model."): value for key, value in state.items()}


def renamed(weights: Weights, *pairs: tuple[str, str]) -> Weights:
    """The weights with parts of their names replaced."""
    found = {}
    for name, value in weights.items():
        for ours, theirs in pairs:
            name = name.replace(ours, theirs)
        found[name] = value.clone()
    return found


def interleaved(matrix: Tensor, head_dim: int = HEAD_DIM) -> Tensor:
    """Rows i and i + head_dim / 2 of a head, side by side."""
    return matrix.view(-1, 2, head_dim // 2, *matrix.shape[1:]).transpose(1, 2).reshape(matrix.shape)


def by_group(q: Tensor, k: Tensor, v: Tensor, kv_heads: int = KV_HEADS) -> Tensor:
    """A group's queries, its key, its value, and so on with the next group."""
    return torch.cat([part.view(kv_heads, -1, *part.shape[1:]) for part in (q, k, v)], dim=1).flatten(0, 1)


def fuse(weights: Weights, layer: str, names: tuple[str, str, str], into: str, join: Callable[..., Tensor], turn: bool) -> None:
    """Replace three projections of each layer by one matrix."""
    for number in range(LAYERS):
        q, k, v = (weights.pop(f"{layer.format(number)}.{name}") for name in names)
        weights[f"{layer.format(number)}.{into}"] = join(*((interleaved(q), interleaved(k)) if turn else (q, k)), v)


def turn(weights: Weights, *endings: str) -> None:
    """Store the rotary pairs of some weights side by side."""
    for name in weights:
        if name.endswith(endings):
            weights[name] = interleaved(weights[name])


def save(directory: Path, weights: Weights, config: str, text: str) -> Path:
    """Write a DCP directory with a configuration above it."""
    dcp.save({name: value.contiguous() for name, value in weights.items()}, checkpoint_id=directory / "step-7", no_dist=True)
    (directory / config).write_text(text)
    return directory


TITAN = (
    ("model.layers", "layers"), ("model.norm", "norm"), ("model.embed_tokens", "tok_embeddings"), ("self_attn", "attention"),
    ("q_proj", "wq"), ("k_proj", "wk"), ("v_proj", "wv"), ("o_proj", "wo"), ("mlp.gate_proj", "feed_forward.w1"),
    ("mlp.up_proj", "feed_forward.w3"), ("mlp.down_proj", "feed_forward.w2"), ("input_layernorm", "attention_norm"),
    ("post_attention_layernorm", "ffn_norm"),
)  # fmt: skip
TUNE = (
    ("model.layers", "layers"), ("model.norm.weight", "norm.scale"), ("model.embed_tokens", "tok_embeddings"), ("lm_head", "output"),
    ("self_attn", "attn"), ("o_proj", "output_proj"), ("mlp.gate_proj", "mlp.w1"), ("mlp.up_proj", "mlp.w3"),
    ("mlp.down_proj", "mlp.w2"), ("input_layernorm.weight", "sa_norm.scale"), ("post_attention_layernorm.weight", "mlp_norm.scale"),
    ("q_norm.weight", "q_norm.scale"), ("k_norm.weight", "k_norm.scale"),
)  # fmt: skip
OLMO = (
    ("lm_head.weight", "lm_head.w_out.weight"), ("model.layers", "blocks"), ("model.norm", "lm_head.norm"),
    ("model.embed_tokens", "embeddings"), ("self_attn", "attention"), ("q_proj", "w_q"), ("k_proj", "w_k"), ("v_proj", "w_v"),
    ("o_proj", "w_out"), ("mlp.gate_proj", "feed_forward.w1"), ("mlp.up_proj", "feed_forward.w3"), ("mlp.down_proj", "feed_forward.w2"),
)  # fmt: skip
FORGE = (
    ("model.embed_tokens", "token_embedding.embedding"), ("model.layers", "layers"), ("model.norm", "norm"),
    ("lm_head", "output_head.proj"), ("self_attn", "attention"), ("input_layernorm", "attention_norm"),
    ("post_attention_layernorm", "mlp_norm"),
)  # fmt: skip


def prefixed(weights: Weights, prefix: str = "model.") -> Weights:
    return {prefix + name: value for name, value in weights.items()}


def torchtitan_old(directory: Path, weights: Weights) -> Path:
    """2025: `model.` before all, `output` for the head, projections right below the attention, a table of frequencies."""
    old = renamed(weights, *TITAN, ("lm_head", "output"))
    turn(old, "wq.weight", "wk.weight")
    old["freqs_cis"] = torch.zeros(256, HEAD_DIM // 2, dtype=torch.complex64).real.contiguous()
    return save(directory, prefixed(old), "model.yaml", yaml.safe_dump(UNTOLD))


def torchtitan_fused(directory: Path, weights: Weights) -> Path:
    """Spring of 2026: one matrix for Q, K and V, interleaved by KV group, within it rotary pairs side by side."""
    new = renamed(weights, *TITAN)
    fuse(new, "layers.{}.attention", ("wq.weight", "wk.weight", "wv.weight"), "qkv_linear.wqkv.weight", by_group, turn=True)
    return save(directory, new, "model.yaml", yaml.safe_dump({**UNTOLD, "heads": 8}))


def torchtitan_compiled(directory: Path, weights: Weights) -> Path:
    """Blocks that were compiled have a wrapper's name in theirs."""
    new = renamed(weights, *TITAN, ("attention.w", "attention.qkv_linear.w"), ("qkv_linear.wo", "wo"))
    turn(new, "wq.weight", "wk.weight")
    wrapped = {name.replace("attention.", "_orig_mod.attention.").replace("feed", "_orig_mod.feed"): new[name] for name in new}
    return save(directory, wrapped, "model.yaml", yaml.safe_dump(UNTOLD))


def torchtune(directory: Path, weights: Weights) -> Path:
    """Its general builder, whose arguments are in the file."""
    new = renamed(weights, *TUNE)
    turn(new, "q_proj.weight", "k_proj.weight")
    model = {
        "_component_": "torchtune.models.llama3.llama3", "vocab_size": 512, "num_layers": 4, "num_heads": 8, "num_kv_heads": 4,
        "embed_dim": 64, "max_seq_len": 256, "intermediate_dim": 128, "rope_base": 10000, "norm_eps": 1e-5,
    }  # fmt: skip
    return save(directory, prefixed(new), "torchtune_config.yaml", yaml.safe_dump({"model": model, "seed": 1}))


def olmo_core(directory: Path, weights: Weights, rope: str, fused: bool) -> Path:
    """Fused attention, and complex rotary embeddings."""
    new = renamed(weights, *OLMO, ("input_layernorm", "attention_norm"), ("post_attention_layernorm", "feed_forward_norm"))
    names = ("w_q.weight", "w_k.weight", "w_v.weight")
    if fused:
        fuse(new, "blocks.{}.attention", names, "w_qkv.weight", lambda *parts: torch.cat(parts), turn=rope == "complex")
    elif rope == "complex":
        turn(new, *names[:2])
    config = json.loads((FIXTURES / "olmo_core_llama/step3/config.json").read_text())
    block = config["model"]["block"]
    block["feed_forward"]["hidden_size"] = 128
    block["attention"] = block.pop("sequence_mixer") | {"name": "fused" if fused else "default"}  # as it was called before
    block["attention"]["rope"]["name"] = rope
    return save(directory, prefixed(new), "config.json", json.dumps(config))


def litgpt_old(directory: Path, weights: Weights) -> Path:
    """Until 2024: `attn.attn`, interleaved by KV group."""
    new = renamed(
        weights, ("model.layers", "transformer.h"), ("model.norm", "transformer.ln_f"), ("model.embed_tokens", "transformer.wte"),
        ("self_attn", "attn"), ("o_proj", "proj"), ("gate_proj", "fc_1"), ("up_proj", "fc_2"), ("down_proj", "proj"),
        ("input_layernorm", "norm_1"), ("post_attention_layernorm", "norm_2"),
    )  # fmt: skip
    fuse(new, "transformer.h.{}.attn", ("q_proj.weight", "k_proj.weight", "v_proj.weight"), "attn.weight", by_group, turn=False)
    config = yaml.safe_load((FIXTURES / "litgpt_llama/model_config.yaml").read_text())
    return save(directory, new, "model_config.yaml", yaml.safe_dump({**config, "intermediate_size": 128, "rope_adjustments": None}))


DESCRIPTION = """
name: lab
rotary: interleaved
weights:
  model.embed_tokens: emb
  model.norm.weight: last.gain
  lm_head.weight: head
  model.layers.{layer}.input_layernorm.weight: "{layer}.one.gain"
  model.layers.{layer}.post_attention_layernorm.weight: "{layer}.two.gain"
  model.layers.{layer}.self_attn.q_proj: {name: "{layer}.vkq", parts: [v_proj, k_proj, 3, q_proj]}
  model.layers.{layer}.self_attn.k_proj: {name: "{layer}.vkq", parts: [v_proj, k_proj, 3, q_proj]}
  model.layers.{layer}.self_attn.v_proj: {name: "{layer}.vkq", parts: [v_proj, k_proj, 3, q_proj]}
  model.layers.{layer}.self_attn.o_proj: {name: "{layer}.out.{kind}", transposed: true}
  model.layers.{layer}.mlp.gate_proj: {name: "{layer}.up_gate", parts: [up_proj, gate_proj], transposed: true}
  model.layers.{layer}.mlp.up_proj: {name: "{layer}.up_gate", parts: [up_proj, gate_proj], transposed: true}
  model.layers.{layer}.mlp.down_proj: ["{layer}.never", "{layer}.down"]
ignored: ["{layer}.steps"]
"""


def described(directory: Path, weights: Weights) -> Path:
    """Names and orders of nobody's, as a user describes them."""
    new: Weights = {}
    for name, theirs in (("model.embed_tokens", "emb.weight"), ("model.norm", "last.gain"), ("lm_head", "head")):
        new[f"net.{theirs}"] = weights[f"{name}.weight"]
    for number in range(LAYERS):
        ours, theirs = f"model.layers.{number}", f"net.{number}"
        q, k, v, o = (weights[f"{ours}.self_attn.{name}_proj.weight"] for name in "qkvo")
        gate, up, down = (weights[f"{ours}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        new[f"{theirs}.vkq.weight"] = torch.cat([v, interleaved(k), torch.full((3, 64), math.nan), interleaved(q)])
        new[f"{theirs}.out.weight"], new[f"{theirs}.up_gate.weight"] = o.T, torch.cat([up, gate]).T
        new[f"{theirs}.down.weight"], new[f"{theirs}.steps"] = down, torch.zeros(1)
        new[f"{theirs}.one.gain"] = weights[f"{ours}.input_layernorm.weight"]
        new[f"{theirs}.two.gain"] = weights[f"{ours}.post_attention_layernorm.weight"]
    (directory / "lab.yaml").write_text(DESCRIPTION)
    own = {"family": "llama", "vocab_size": 512, "hidden_size": 64, "ffn_size": 128, "layers": 4, "kv_heads": 4, "head_dim": 8, **UNTOLD}
    return save(directory, new, "model.yaml", yaml.safe_dump(own))


LLAMAS: dict[str, tuple[str, Callable[[Path, Weights], Path]]] = {
    "torchtitan old": ("torchtitan", torchtitan_old),
    "torchtitan fused": ("torchtitan", torchtitan_fused),
    "torchtitan compiled": ("torchtitan", torchtitan_compiled),
    "torchtune": ("torchtune", torchtune),
    "olmo_core fused": ("olmo_core", lambda directory, weights: olmo_core(directory, weights, "fused", True)),
    "olmo_core complex": ("olmo_core", lambda directory, weights: olmo_core(directory, weights, "complex", False)),
    "litgpt old": ("litgpt", litgpt_old),
    "described": ("lab", described),
}
