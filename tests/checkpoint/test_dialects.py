"""Checkpoints written in each trainer's names and row orders load to the same model: rewritten here from one whose logits are known."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dist_infer.checkpoint import Checkpoint, load, open_checkpoint
from dist_infer.cli.main import main
from dist_infer.config.loader import LoaderOptions
from dist_infer.model.config import ModelConfig
from dist_infer.model.weights import describe, fsdp_rows
from tests.checkpoint.forms import (
    DESCRIPTION,
    FORGE,
    LAYERS,
    LLAMAS,
    OLMO,
    ROPE,
    TITAN,
    TUNE,
    UNTOLD,
    Weights,
    by_group,
    canonical,
    fuse,
    interleaved,
    prefixed,
    renamed,
    save,
    torchtitan_fused,
    turn,
)
from tests.engine.jobs import Mesh, request, run
from tests.engine.references import FIXTURES, greedy, logits, make_model, reference
from tests.ranks import Ranks

MESHES = [Mesh(), Mesh(tp=2), Mesh(tp=4), Mesh(fsdp=2), Mesh(tp=2, fsdp=2)]


def opened(directory: Path) -> tuple[Checkpoint, ModelConfig, list[str]]:
    """The checkpoint, its model, and the options that say what cannot be found by itself."""
    dialect = directory / "lab.yaml"
    options = [f"model.dialect={dialect}"] if dialect.is_file() else []
    checkpoint = open_checkpoint(str(directory), str(dialect) if options else "auto")
    explicit = str(directory / "model.yaml") if (directory / "model.yaml").is_file() else None
    config = checkpoint.config(explicit)
    checkpoint.match(config)
    return checkpoint, config, [*options, *([f"model.config={explicit}"] if explicit else [])]


def held(checkpoint: Checkpoint, config: ModelConfig, tp: int, rank: int, fsdp: int, coordinate: int) -> Weights:
    """What one rank loads."""
    weights = list(describe(config, tp, rank))
    room = {}
    for weight in weights:
        first, last = fsdp_rows(weight.shape[0], fsdp, coordinate)
        room[weight.parameter] = torch.full((last - first, *weight.shape[1:]), math.nan)
    load(checkpoint, config, weights, fsdp, coordinate, room, LoaderOptions())
    return room


def check_same(directory: Path, original: Path) -> None:
    """Every rank of every mesh loads from both the same, bit by bit."""
    checkpoint, config, _ = opened(directory)
    expected = open_checkpoint(str(original))
    theirs = expected.config()
    for mesh in MESHES:
        for rank in range(mesh.tp):
            for coordinate in range(mesh.fsdp):
                found = held(checkpoint, config, mesh.tp, rank, mesh.fsdp, coordinate)
                for name, value in held(expected, theirs, mesh.tp, rank, mesh.fsdp, coordinate).items():
                    assert torch.equal(found[name], value), (str(mesh), rank, coordinate, name)


def check_run(ranks: Ranks, directory: Path, mesh: Mesh, expected: Any) -> None:
    """Logits and greedy tokens are the reference's."""
    _, _, options = opened(directory)
    requests = [request(prompt, index, max_tokens=24, ignore_eos=True) for index, prompt in enumerate(expected.inputs)]
    found = run(ranks, str(directory), mesh, [requests], ["engine.block_size=4", *options], prompts=expected.inputs)
    assert found.tokens() == expected.greedy
    for rows, copies in zip(expected.logits, found.logits, strict=True):
        assert (torch.from_numpy(copies[0]) - rows).abs().max() <= 1e-4 * rows.abs().max()


@pytest.mark.parametrize("form", list(LLAMAS))
def test_llama_in_every_form(ranks: Ranks, tmp_path: Path, form: str) -> None:
    dialect, write = LLAMAS[form]
    directory = write(tmp_path, canonical("accelerate_fsdp2_llama"))
    assert opened(directory)[0].dialect.name == dialect
    check_same(directory, FIXTURES / "accelerate_fsdp2_llama/checkpoint-3")
    check_run(ranks, directory, MESHES[list(LLAMAS).index(form) % len(MESHES)], reference("accelerate_fsdp2_llama"))


@pytest.mark.parametrize("trainer", ["torchtitan", "torchtune"])
def test_qwen3_pairs_lie_in_halves(ranks: Ranks, tmp_path: Path, trainer: str) -> None:
    weights, theirs = canonical("hf_qwen3"), open_checkpoint(str(FIXTURES / "hf_qwen3")).config()
    untold = {"norm_eps": theirs.norm_eps, "max_position": theirs.max_position, "rope": theirs.rope}
    if theirs.tied_head:
        untold["tied_head"] = True
    if trainer == "torchtitan":
        new = renamed(weights, *TITAN)
        kv_heads = theirs.kv_heads
        fuse(
            new, "layers.{}.attention", ("wq.weight", "wk.weight", "wv.weight"), "qkv_linear.wqkv.weight",
            lambda q, k, v: by_group(q, k, v, kv_heads), turn=False,
        )  # fmt: skip
        directory = save(tmp_path, new, "model.yaml", yaml.safe_dump(untold))
    else:
        model = {
            "_component_": "torchtune.models.qwen3.qwen3", "vocab_size": theirs.vocab_size, "num_layers": theirs.layers,
            "num_heads": theirs.heads, "num_kv_heads": theirs.kv_heads, "embed_dim": theirs.hidden_size, "head_dim": theirs.head_dim,
            "intermediate_dim": theirs.ffn_size, "max_seq_len": theirs.max_position, "rope_base": theirs.rope["rope_theta"],
            "norm_eps": theirs.norm_eps, "tie_word_embeddings": theirs.tied_head, "q_norm": True, "k_norm": True,
            "q_proj_bias": False, "k_proj_bias": False, "v_proj_bias": False,
        }  # fmt: skip
        directory = save(tmp_path, prefixed(renamed(weights, *TUNE)), "torchtune_config.yaml", yaml.safe_dump({"model": model}))
    check_same(directory, FIXTURES / "hf_qwen3")
    check_run(ranks, directory, Mesh(tp=2), reference("hf_qwen3"))


@pytest.mark.parametrize("mesh", [Mesh(tp=2), Mesh(fsdp=2)], ids=str)
def test_packed_experts_of_kempnerforge(ranks: Ranks, tmp_path: Path, mesh: Mesh) -> None:
    weights = dict(canonical("kempnerforge_moe"))
    for layer in (1, 3):
        mlp = f"layers.{layer}.mlp"
        for name in ("gate", "up", "down"):
            experts = [weights.pop(f"{mlp}.experts.{expert}.{name}_proj.weight").T for expert in range(4)]
            weights[f"{mlp}.{name}_w"] = torch.stack(experts)
    shutil.copy(FIXTURES / "kempnerforge_moe/config.toml", tmp_path)
    directory = save(tmp_path, prefixed(weights), "notes.txt", "")
    check_same(directory, FIXTURES / "kempnerforge_moe")
    check_run(ranks, directory, mesh, reference("kempnerforge_moe"))


def test_sigmoid_router_of_kempnerforge(tmp_path: Path) -> None:
    weights = dict(canonical("kempnerforge_moe"))
    for layer in (1, 3):
        mlp = f"layers.{layer}.mlp"
        weights[f"{mlp}.router.expert_bias"] = torch.arange(4.0)
        weights[f"{mlp}.router.expert_ema"] = torch.full((4,), 0.25)  # a buffer of training
        for name in ("gate", "up", "down"):
            weights[f"{mlp}.shared_expert.{name}_proj.weight"] = weights[f"{mlp}.experts.0.{name}_proj.weight"]
    text = (FIXTURES / "kempnerforge_moe/config.toml").read_text().replace("softmax_topk", "sigmoid_topk")
    text = text.replace("num_experts = 4", "num_experts = 4\nmoe_shared_experts = 2")
    checkpoint, config, _ = opened(save(tmp_path, prefixed(weights), "config.toml", text))
    assert config.experts is not None and config.experts.scoring == "sigmoid" and config.experts.bias_in_score
    assert (config.experts.layers, config.experts.shared_ffn_size, config.experts.ffn_size) == ((1, 3), 48, 48)
    found = held(checkpoint, config, 1, 0, 1, 0)
    assert any(torch.equal(value.float(), torch.arange(4.0)) for value in found.values()), "the bias is not read"


@pytest.mark.parametrize("family", ["olmo2", "olmo3"])
@pytest.mark.parametrize("mesh", [Mesh(tp=2), Mesh(fsdp=2)], ids=str)
def test_olmo_core_of_todays_models(ranks: Ranks, tmp_path: Path, family: str, mesh: Mesh) -> None:
    scaled = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24, "beta_fast": 32, "beta_slow": 1}
    extra: dict[str, Any] = {}
    if family == "olmo3":
        extra = {
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "sliding_window": 7,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
                "full_attention": {**scaled, "rope_theta": 5000.0},
            },
        }  # fmt: skip
    else:
        extra = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
    made = make_model(tmp_path / "theirs", model_type=family, num_hidden_layers=3, **extra)
    head_dim = made.config.hidden_size // made.config.num_attention_heads
    new = renamed(
        dict(made.state_dict()), *OLMO, ("post_attention_layernorm", "attention_norm"), ("post_feedforward_layernorm", "feed_forward_norm")
    )
    norm = {"name": "rms", "eps": made.config.rms_norm_eps, "bias": False}
    rope = {"name": "default", "theta": 5000}
    attention: dict[str, Any] = {"n_heads": 6, "n_kv_heads": 2, "bias": False, "rope": rope, "qk_norm": norm, "head_dim": head_dim}
    block = {
        "name": "reordered_norm", "sequence_mixer": attention, "layer_norm": norm,
        "feed_forward": {"hidden_size": made.config.intermediate_size, "bias": False},
    }  # fmt: skip
    model: dict[str, Any] = {
        "d_model": 48, "vocab_size": 131, "n_layers": 3, "block": block, "lm_head": {"layer_norm": norm, "bias": False},
        "from_a_newer_version": {"says": "nothing of the model"},
    }  # fmt: skip
    if family == "olmo3":
        attention["sliding_window"] = {"pattern": [7, 7, -1], "force_full_attention_on_first_layer": False}
        scaling = {
            "factor": 4.0,
            "old_context_len": 24,
            "beta_fast": 32,
            "beta_slow": 1,
            "_CLASS_": "olmo_core.nn.rope.YaRNRoPEScalingConfig",
        }
        full = {**block, "sequence_mixer": {**attention, "rope": {**rope, "scaling": scaling}}}
        model["block_overrides"] = {"2": full}
    text = json.dumps({"model": model, "dataset": {"sequence_length": 128, "tokenizer": {"eos_token_id": 130}}})
    directory = save(tmp_path / "ours", prefixed(new), "config.json", text)
    config = open_checkpoint(str(directory)).config()
    assert config.norm_placement == "post" and config.qk_norm == "full" and config.eos_token_ids == (130,) and config.max_position == 128
    assert config.family == family
    prompts = [[5, 9, 77], list(range(3, 34)), [8] * 12]
    requests = [request(prompt, index, max_tokens=10, ignore_eos=True) for index, prompt in enumerate(prompts)]
    found = run(ranks, str(directory), mesh, [requests], ["engine.block_size=4"], prompts=prompts)
    assert found.tokens() == [greedy(tmp_path / "theirs", prompt, 10).tokens for prompt in prompts]
    for rows, copies in zip(logits(tmp_path / "theirs", prompts), found.logits, strict=True):
        assert (torch.from_numpy(copies[0]) - rows).abs().max() <= 1e-4 * rows.abs().max()


def test_named_builders_of_torchtune(tmp_path: Path) -> None:
    """A real model's file holds no sizes: they are the weights', heads and rotary base the builder's."""
    weights = renamed(canonical("accelerate_fsdp2_llama"), *TUNE)
    del weights["output.weight"]
    text = yaml.safe_dump({"model": {"_component_": "torchtune.models.llama3_2.llama3_2_1b"}})
    config = open_checkpoint(str(save(tmp_path, prefixed(weights), "torchtune_config.yaml", text))).config()
    assert (config.heads, config.kv_heads, config.head_dim, config.hidden_size, config.tied_head) == (32, 16, 2, 64, True)
    assert config.rope["factor"] == 32 and config.rope["rope_theta"] == 500000 and config.max_position == 131072
    (tmp_path / "torchtune_config.yaml").write_text(text.replace("llama3_2_1b", "llama3_2_99b"))
    with pytest.raises(ValueError, match=r"llama3_2_99b' is not known here.* heads, norm_eps, max_position, rope") as caught:
        open_checkpoint(str(tmp_path)).config()
    assert "\n" not in str(caught.value)


def test_without_a_configuration_what_is_missing_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A torchtitan user has no configuration file: the message names the fields, inspect prints the file, filled in they do."""
    place = tmp_path / "a/b/c/d/e"
    torchtitan_fused(place, canonical("accelerate_fsdp2_llama"))
    (place / "model.yaml").unlink()
    with pytest.raises(FileNotFoundError, match=r"with heads, norm_eps, max_position, rope; the weights tell the rest") as caught:
        open_checkpoint(str(place)).config()
    assert "\n" not in str(caught.value)
    assert main(["inspect", f"model.path={place}"]) == 2
    text = capsys.readouterr().out
    stub = text[text.index("# To be filled in") : text.index("\n\n", text.index("# To be filled in"))]
    (tmp_path / "stub.yaml").write_text(stub)
    with pytest.raises(ValueError, match="heads = 'TODO' is not a int"):
        open_checkpoint(str(place)).config(str(tmp_path / "stub.yaml"))
    filled = {"heads: TODO": "heads: 8", "eps: TODO": "eps: 1e-5", "position: TODO": "position: 256", "theta: TODO": "theta: 1e4"}
    for line, value in filled.items():
        assert line in stub
        stub = stub.replace(line, value)
    (tmp_path / "stub.yaml").write_text(stub)
    expected = open_checkpoint(str(FIXTURES / "accelerate_fsdp2_llama/checkpoint-3")).config()
    assert open_checkpoint(str(place)).config(str(tmp_path / "stub.yaml")) == expected
    with pytest.raises(ValueError, match="heads = 7 does not divide the 64 rows"):
        (tmp_path / "stub.yaml").write_text(stub.replace("heads: 8", "heads: 7"))
        open_checkpoint(str(place)).config(str(tmp_path / "stub.yaml"))


def test_a_missing_head_is_no_proof_of_a_tie(tmp_path: Path) -> None:
    weights = renamed(canonical("accelerate_fsdp2_llama"), *TITAN)
    del weights["lm_head.weight"]
    directory = save(tmp_path, weights, "model.yaml", yaml.safe_dump(UNTOLD))
    checkpoint = open_checkpoint(str(directory))
    with pytest.raises(ValueError, match="'tied_head' is missing"):
        checkpoint.config(str(directory / "model.yaml"))
    (directory / "model.yaml").write_text(yaml.safe_dump({**UNTOLD, "tied_head": True}))
    assert checkpoint.config(str(directory / "model.yaml")).tied_head


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("rotary: interleaved", "rotary: pairs", "rotary: 'pairs' must be half"),
        ("rotary: interleaved", "rotry: half", "rotry: there is no such field; did you mean rotary?"),
        ("model.embed_tokens:", "model.embed_token:", "weights.model.embed_token: there is no such canonical name; did you mean model."),
        ("model.embed_tokens:", "model.embed_positions:", "weights.model.embed_tokens: is missing"),
        ("parts: [up_proj, gate_proj]", "parts: [up_proj, gat_proj]", "mlp.gate_proj.parts: ['up_proj', 'gat_proj'] must list"),
        ("parts: [up_proj, gate_proj]", "parts: [up_proj]", "mlp.gate_proj.parts: ['up_proj'] must contain gate_proj once"),
        ('"{layer}.one.gain"', '"one.gain"', "input_layernorm.weight.name: 'one.gain' must contain {layer}"),
        ('"{layer}.one.gain"', '"{layr}.one.gain"', "input_layernorm.weight.name: '{layr}.one.gain' must be a stored name"),
        ("transposed: true", "transposed: maybe", "o_proj.transposed: 'maybe' must be true or false"),
        ("transposed: true", "transpose: true", "o_proj.transpose: there is no such field; did you mean transposed?"),
        ("3, q_proj]", "3, q_proj], transposed: true", "q_proj.transposed: interleaved rotary pairs"),
        ("parts: [up_proj, gate_proj]", "parts: [up_proj, gate_proj], grouped: true", "grouped: only q_proj, k_proj and v_proj"),
        ("name: lab", "name: [", "not readable as YAML"),
        ("rotary: interleaved", "", "rotary: None must be half"),
    ],
)  # fmt: skip
def test_descriptions_that_are_refused(tmp_path: Path, old: str, new: str, part: str) -> None:
    assert old in DESCRIPTION
    (tmp_path / "lab.yaml").write_text(DESCRIPTION.replace(old, new, 1))
    with pytest.raises(ValueError) as caught:
        open_checkpoint(str(FIXTURES / "hf_llama"), str(tmp_path / "lab.yaml"))
    assert part in str(caught.value) and "lab.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_two_that_fit_are_named(tmp_path: Path) -> None:
    both = {**canonical("accelerate_fsdp2_llama"), **prefixed(renamed(canonical("accelerate_fsdp2_llama"), *FORGE), "student.")}
    directory = save(tmp_path, both, "model.yaml", yaml.safe_dump(UNTOLD))
    with pytest.raises(ValueError, match=r"huggingface below '', kempnerforge below 'student\.'.*choose by model.dialect=hugg"):
        open_checkpoint(str(directory))
    assert open_checkpoint(str(directory), "kempnerforge").dialect.prefix == "student."
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml: no such file"):
        open_checkpoint(str(directory), "nowhere.yaml")


@pytest.mark.parametrize(
    ("fixture", "file", "old", "new", "part"),
    [
        ("olmo_core_llama/step3", "config.json", '"name": "default", "_CLASS_": "olmo_core.nn.transformer.config.TransformerBlockConfig"',
         '"name": "normalized"', "model.block.name = 'normalized' is not supported"),
        ("olmo_core_llama/step3", "config.json", '"activation": "silu"', '"activation": "swish"', "feed_forward.activation = 'swish'"),
        ("olmo_core_llama/step3", "config.json", '"n_heads": 8', '"n_heads": 8, "clip_qkv": 3.0', "attention.clip_qkv = 3.0"),
        ("litgpt_llama", "model_config.yaml", "norm_class_name: RMSNorm", "norm_class_name: Other", "norm_class_name = 'Other'"),
        ("litgpt_llama", "model_config.yaml", "lm_head_bias: false", "lm_head_bias: true", "lm_head_bias = True is not supported"),
        ("fast_llm_llama", "metadata.yaml", "          type: mlp", "          type: moe", "mlp.type = 'moe' is not supported"),
        ("fast_llm_llama", "metadata.yaml", "value_norm: null", "value_norm: {type: rms_norm}", "mixer.value_norm is not supported"),
    ],
)  # fmt: skip
def test_what_the_decoder_does_not_do_is_refused_by_name(tmp_path: Path, fixture: str, file: str, old: str, new: str, part: str) -> None:
    from dist_infer.checkpoint.configurations import read_configuration

    text = (FIXTURES / fixture / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new))
    with pytest.raises(ValueError) as caught:
        read_configuration(tmp_path / file)
    assert part in str(caught.value) and "\n" not in str(caught.value)


def test_the_description_in_the_docs_is_one(tmp_path: Path) -> None:
    blocks = (Path(__file__).parents[2] / "docs/checkpoints.md").read_text().split("```yaml\n")[1:]
    (tmp_path / "untold.yaml").write_text(blocks[0].split("```")[0].replace("32", "8"))
    (tmp_path / "docs.yaml").write_text(blocks[1].split("```")[0])
    weights = canonical("accelerate_fsdp2_llama")
    new = {
        f"net.{name}": weights[f"{ours}.weight"] for name, ours in (("embedding.weight", "model.embed_tokens"), ("head.weight", "lm_head"))
    }
    new["net.final_norm.scale"] = weights["model.norm.weight"]
    for number in range(LAYERS):
        ours, theirs = f"model.layers.{number}", f"net.blocks.{number}"
        q, k, v, o = (weights[f"{ours}.self_attn.{name}_proj.weight"] for name in "qkvo")
        gate, up, down = (weights[f"{ours}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        new[f"{theirs}.attention.qkv.weight"] = by_group(interleaved(q), interleaved(k), v)
        new[f"{theirs}.attention.out.weight"], new[f"{theirs}.attention.table"] = o, torch.zeros(2)
        new[f"{theirs}.mlp.in.weight"], new[f"{theirs}.mlp.out.weight"] = torch.cat([gate, up]), down.T
        new[f"{theirs}.norm_1.scale"] = weights[f"{ours}.input_layernorm.weight"]
        new[f"{theirs}.norm_2.scale"] = weights[f"{ours}.post_attention_layernorm.weight"]
    (tmp_path / "lab.yaml").write_text((tmp_path / "docs.yaml").read_text())
    save(tmp_path, new, "model.yaml", (tmp_path / "untold.yaml").read_text())
    assert opened(tmp_path)[1].rope == {"rope_theta": 500000}
    check_same(tmp_path, FIXTURES / "accelerate_fsdp2_llama/checkpoint-3")


def test_huggingface_names_with_pairs_side_by_side(tmp_path: Path) -> None:
    """Scripts that train Meta's code under Hugging Face's names; the rows of queries and keys are in Meta's order."""
    new = {name: value.clone() for name, value in canonical("accelerate_fsdp2_llama").items()}
    turn(new, "q_proj.weight", "k_proj.weight")
    check_same(
        save(tmp_path, new, "model.yaml", yaml.safe_dump({**UNTOLD, "interleaved_rotary": True})), FIXTURES / "accelerate_fsdp2_llama"
    )
    (tmp_path / "model.yaml").write_text(
        yaml.safe_dump({**UNTOLD, "interleaved_rotary": True, "rope": {**ROPE, "partial_rotary_factor": 0.5}})
    )
    with pytest.raises(ValueError, match=r"interleaved rotary pairs with partial_rotary_factor 0\.5 are not supported"):
        opened(tmp_path)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_model_saved_without_its_head(ranks: Ranks, tmp_path: Path, family: str) -> None:
    """As the original GPT-2 is: names begin after `transformer.` or `model.`."""
    model = make_model(tmp_path / "whole", model_type=family, tie_word_embeddings=True, **({"n_inner": 40} if family == "gpt2" else {}))
    model.base_model.save_pretrained(tmp_path / "bare")
    model.config.save_pretrained(tmp_path / "bare")
    names = open_checkpoint(str(tmp_path / "bare")).index
    assert {"gpt2": "wte.weight", "llama": "embed_tokens.weight"}[family] in names
    prompts = [[3, 14, 15, 92], [65]]
    found = run(ranks, str(tmp_path / "bare"), Mesh(), [[request(prompt, index, max_tokens=6) for index, prompt in enumerate(prompts)]])
    assert found.tokens() == [greedy(tmp_path / "whole", prompt, 6).tokens for prompt in prompts]
