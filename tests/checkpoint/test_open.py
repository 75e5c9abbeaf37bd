"""Finding a checkpoint, its dialect and its configuration."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from dist_infer.checkpoint import open_checkpoint
from dist_infer.checkpoint.configurations import read_configuration
from dist_infer.checkpoint.dialects import find_dialect
from dist_infer.checkpoint.locate import locate
from dist_infer.model.config import ModelConfig

FIXTURES = Path(__file__).parents[1] / "data" / "fixtures"


def run_with(tmp_path: Path, steps: dict[str, bool], latest: str | None = None, link: bool = False) -> Path:
    """A run's directory; steps map to whether they are complete."""
    for name, complete in steps.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__0_0.distcp").touch()
        if complete:
            (tmp_path / name / ".metadata").touch()
    if latest and link:
        os.symlink(latest, tmp_path / "latest")
    elif latest:
        (tmp_path / "latest").write_text(f"{latest}\n")
    return tmp_path


@pytest.mark.parametrize("link", [False, True])
def test_latest_names_the_step(tmp_path: Path, link: bool) -> None:
    found = locate(str(run_with(tmp_path, {"step_10": True, "step_9": True}, "step_9", link)))
    assert found.path.name == "step_9" and "step_9" in found.note


@pytest.mark.parametrize("link", [False, True])
def test_incomplete_latest_is_passed_over(tmp_path: Path, link: bool) -> None:
    found = locate(str(run_with(tmp_path, {"step_10": False, "step_9": True, "step_8": True}, "step_10", link)))
    assert found.path.name == "step_9" and "step_10 is not complete" in found.note


def test_newest_complete_step_by_number(tmp_path: Path) -> None:
    found = locate(str(run_with(tmp_path, {"step-900": True, "step-1000": True, "step-1100": False, "notes": True})))
    assert found.path.name == "step-1000" and "step-1100 is not complete" in found.note


def test_latest_that_leads_away_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="outside"):
        locate(str(run_with(tmp_path, {"step_1": True}, "../elsewhere")))


@pytest.mark.parametrize(
    ("name", "inner"),
    [
        ("kempnerforge", "checkpoints/step_3"),
        ("torchtitan_llama3/outputs", "checkpoint/step-3"),
        ("accelerate_fsdp2_llama", "checkpoint-3/pytorch_model_fsdp_0"),
        ("hf_llama", ""),
    ],
)
def test_directories_of_runs(name: str, inner: str) -> None:
    assert locate(str(FIXTURES / name)).path == FIXTURES / name / inner


def test_one_safetensors_file(tmp_path: Path) -> None:
    assert locate(str(FIXTURES / "hf_llama/model-00001-of-00004.safetensors")).path.suffix == ".safetensors"
    assert locate(str(FIXTURES / "hf_llama/model.safetensors.index.json")).path == FIXTURES / "hf_llama"


@pytest.mark.parametrize("link", ["checkpoint", "step_1"])
def test_a_directory_within_itself_ends(tmp_path: Path, link: str) -> None:
    os.symlink(tmp_path, tmp_path / link)
    with pytest.raises((ValueError, FileNotFoundError)):
        locate(str(tmp_path))


@pytest.mark.parametrize(
    ("path", "error", "part"),
    [
        ("/does/not/exist", FileNotFoundError, "no such path"),
        ("does/notexist", FileNotFoundError, "no such Hugging Face model"),
        (str(FIXTURES / "hf_llama/config.json"), ValueError, "no checkpoint"),
        (str(FIXTURES.parent), ValueError, "no checkpoint; give a DCP directory"),
    ],
)
def test_what_is_no_checkpoint(path: str, error: type[Exception], part: str) -> None:
    with pytest.raises(error) as caught:
        locate(path)
    assert part in str(caught.value) and path in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_in_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    home = tmp_path / "models--someone--tiny"
    (home / "refs").mkdir(parents=True)
    (home / "refs/main").write_text("a" * 40)
    shutil.copytree(FIXTURES / "hf_qwen3", home / "snapshots" / ("a" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    checkpoint = open_checkpoint("someone/tiny")
    assert checkpoint.dialect.name == "huggingface" and "cache" in checkpoint.note
    assert checkpoint.config().family == "qwen3"


TITAN = ["tok_embeddings.weight", "layers.0.attention.wo.weight"]
HUGGINGFACE = ["model.embed_tokens.weight", "model.layers.0.self_attn.o_proj.weight"]
LLAMA = ModelConfig("llama", 8, 8, 8, 1, 2, 2, 4, 1e-5, 8)


@pytest.mark.parametrize(
    ("names", "query", "stored"),
    [
        ([*TITAN, "output.weight"], "lm_head.weight", "output.weight"),
        ([*TITAN, "lm_head.weight"], "lm_head.weight", "lm_head.weight"),
        ([f"model.{name}" for name in [*TITAN, "layers.0.attention.wq.weight"]],
         "model.layers.0.self_attn.q_proj.weight", "model.layers.0.attention.wq.weight"),
        (TITAN, "model.layers.0.self_attn.v_proj.weight", "layers.0.attention.qkv_linear.wv.weight"),
        ([f"app.model.{name}" for name in HUGGINGFACE], "model.norm.weight", "app.model.model.norm.weight"),
    ],
)  # fmt: skip
def test_older_names_and_prefixes(names: list[str], query: str, stored: str) -> None:
    assert find_dialect(names).map(query, LLAMA).tensor == stored


def test_dialects_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"no known model in this checkpoint: it has a\.weight"):
        find_dialect(["a.weight"])
    with pytest.raises(ValueError, match="several models"):
        find_dialect([*HUGGINGFACE, *(f"ema.{name}" for name in HUGGINGFACE)])
    with pytest.raises(ValueError, match=r"no known model .* looked for tok_embeddings"):
        find_dialect(HUGGINGFACE, "torchtitan")
    with pytest.raises(ValueError, match="must be one of auto, huggingface, kempnerforge, torchtitan"):
        find_dialect(HUGGINGFACE, "olmo")
    assert find_dialect([*HUGGINGFACE, *TITAN], "torchtitan").name == "torchtitan"


def test_trainers_configurations() -> None:
    kempner = open_checkpoint(str(FIXTURES / "kempnerforge_tied")).config()
    assert (kempner.hidden_size, kempner.ffn_size, kempner.layers, kempner.heads, kempner.kv_heads) == (64, 176, 4, 8, 4)
    assert kempner.tied_head and kempner.max_position == 256
    titan = open_checkpoint(str(FIXTURES / "torchtitan_llama3_full/outputs")).config()
    assert titan.family == "llama" and titan.rope["rope_type"] == "llama3" and titan.rope["original_max_position_embeddings"] == 64
    qwen = open_checkpoint(str(FIXTURES / "torchtitan_qwen3/outputs")).config()
    assert qwen.family == "qwen3" and qwen.qk_norm == "head" and qwen.head_dim == 16 and qwen.norm_eps == 1e-6


def write(tmp_path: Path, name: str, text: str) -> Path:
    (tmp_path / name).write_text(text)
    return tmp_path / name


@pytest.mark.parametrize(("multiplier", "ffn"), [("", 11008), ("ffn_dim_multiplier = 1.3\n", 14336)])
def test_kempnerforge_defaults(tmp_path: Path, multiplier: str, ffn: int) -> None:
    config = read_configuration(write(tmp_path, "config.toml", f"[model]\nqk_norm = true\n{multiplier}"))
    assert (config.hidden_size, config.ffn_size, config.kv_heads, config.vocab_size) == (4096, ffn, 32, 32000)


OWN = {
    "family": "llama", "vocab_size": 9, "hidden_size": 8, "ffn_size": 8, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 4,
    "max_position": 16, "eos_token_ids": [1, 2], "rope": {"rope_theta": 1e4},
}  # fmt: skip


def test_our_own_file(tmp_path: Path) -> None:
    lines = [f"{key}: {json.dumps(value)}" for key, value in OWN.items()]
    config = read_configuration(write(tmp_path, "model.yaml", "\n".join([*lines, "norm_eps: 1e-6", "sliding_windows: [4]"])))
    assert config.norm_eps == 1e-6 and config.eos_token_ids == (1, 2) and config.window(0) == 4
    assert read_configuration(write(tmp_path, "model.json", json.dumps(OWN | {"norm_eps": 1e-6, "sliding_windows": [4]}))) == config


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("model.json", json.dumps(OWN), "'norm_eps' is missing"),
        ("model.json", json.dumps(OWN | {"norm_eps": 1, "hiden_size": 3}), "did you mean 'hidden_size'?"),
        ("model.json", json.dumps(OWN | {"norm_eps": 1, "layers": "many"}), "layers = 'many' is not a int"),
        ("model.json", json.dumps(OWN | {"norm_eps": 1, "family": "mamba"}), "family 'mamba' is not supported"),
        ("model.json", "{", "not readable"),
        ("model.json", "{}", "not a model configuration"),
        ("model.yaml", "a: [", "not readable"),
        ("config.json", '{"model_type": "other", "auto_map": {"AutoConfig": "x.C"}}', "code from a checkpoint is never run"),
        ("config.toml", "[model]\nactivation = 'swish'", "model.activation = 'swish' is not supported"),
        ("config.toml", "[model]\nmodel_type = 'mamba'", "model.model_type = 'mamba' is not supported"),
        ("config.json", '{"model_spec": {"name": "llama3", "model": {"dim": 4}}}', "not a complete torchtitan configuration"),
    ],
)
def test_configurations_that_are_refused(tmp_path: Path, name: str, text: str, part: str) -> None:
    path = write(tmp_path, name, text)
    with pytest.raises(ValueError) as caught:
        read_configuration(path)
    assert part in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_no_configuration_says_where_it_looked(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b" / "c" / "d"
    shutil.copytree(FIXTURES / "kempnerforge/checkpoints/step_3", deep)
    with pytest.raises(FileNotFoundError) as caught:
        open_checkpoint(str(deep)).config()
    assert str(tmp_path / "a") in str(caught.value) and "model.config" in str(caught.value)
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_checkpoint(str(deep)).config("nowhere.json")


def test_tokenizer_and_generation_config_beside_or_above(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "kempnerforge", tmp_path / "run")
    checkpoint = open_checkpoint(str(tmp_path / "run"))
    assert checkpoint.tokenizer_directory() is None and checkpoint.generation_config() is None
    write(tmp_path / "run", "tokenizer.json", "{}")
    write(tmp_path / "run/checkpoints", "generation_config.json", "{}")
    assert checkpoint.tokenizer_directory() == tmp_path / "run"
    assert checkpoint.generation_config() == tmp_path / "run/checkpoints/generation_config.json"
