"""What is exported is the same model: for transformers, and when it is read back; a part of one is never left under the final name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from dist_infer.checkpoint import export as export_module
from dist_infer.checkpoint import open_checkpoint
from dist_infer.checkpoint.content import content_hash, hash_weights
from dist_infer.cli.export import run
from tests.checkpoint.test_load import nine_heads, random_tensors, save
from tests.engine.references import make_model, reference
from tests.ranks import Ranks

SOURCES = ["kempnerforge", "kempnerforge_tied", "torchtitan_llama3", "torchtitan_qwen3", "hf_qwen3", "hf_mistral"]
ROOT = Path(__file__).parents[2]


def content(path: str | Path) -> str:
    """The content hash of the checkpoint at `path`."""
    checkpoint = open_checkpoint(str(path))
    config = checkpoint.config()
    checkpoint.match(config)
    return content_hash(checkpoint, config, hash_weights(checkpoint, config, 0, 1, threads=2))


@torch.no_grad()
def logits(path: str | Path, tokens: list[int]) -> Tensor:
    """Logits [tokens, vocabulary] by transformers, of all of a model and nothing else."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    model, info = loaded
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()(torch.tensor([tokens])).logits[0].float()


def export_on_rank(*arguments: str) -> int:
    """The command, on a rank of a world that is there."""
    export_module._MOST_FILE = 1 << 18  # several files of weights a rank
    return run(arguments)


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("size", [1, 2])
def test_transformers_computes_the_same(ranks: Ranks, name: str, size: int, tmp_path: Path) -> None:
    expected, out = reference(name), tmp_path / "out"
    assert ranks(size).run(export_on_rank, f"model.path={expected.path}", f"output={out}", f"parallel.tp={size}") == [0] * size
    assert os.listdir(tmp_path) == ["out"]
    assert len(list(out.glob("*.safetensors"))) > size
    for tokens, wanted in zip(expected.inputs, expected.logits, strict=True):
        assert (logits(out, tokens) - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert content(out) == content(expected.path)


@pytest.mark.parametrize("name", ["kempnerforge_tied", "torchtitan_llama3", "hf_mistral"])
@pytest.mark.parametrize("size", [1, 2])
def test_dcp(ranks: Ranks, name: str, size: int, tmp_path: Path) -> None:
    path, out = reference(name).path, tmp_path / "out"
    ranks(size).run(export_on_rank, f"model.path={path}", f"output={out}", "format=dcp", f"parallel.tp={size}")
    assert os.listdir(tmp_path) == ["out"] and len(list(out.glob("*.distcp"))) == size
    assert content(out) == content(path)
    assert open_checkpoint(str(out)).dialect.name == "huggingface"


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gpt2", "gpt_neox", "mixtral", "gemma2", "stablelm"])
def test_names_and_layouts_of_other_families(family: str, tmp_path: Path) -> None:
    """Fused and transposed matrices are taken apart and put together again."""
    traits = {"num_key_value_heads": 6} if family in ("gpt2", "gpt_neox", "stablelm") else {}
    make_model(tmp_path / "model", model_type=family, **traits)
    checkpoint = open_checkpoint(str(tmp_path / "model"))
    assert run([f"model.path={checkpoint.path}", f"output={tmp_path / 'out'}"]) == 0
    assert content(tmp_path / "out") == content(tmp_path / "model")
    tokens = list(range(20))
    assert torch.equal(logits(tmp_path / "out", tokens), logits(tmp_path / "model", tokens))


def test_conversion(tmp_path: Path) -> None:
    path = reference("kempnerforge").path
    assert run([f"model.path={path}", f"output={tmp_path / 'out'}", "model.dtype=bfloat16"]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    run([f"model.path={path}", f"output={tmp_path / 'float16'}", "model.dtype=float16"])
    config = nine_heads()
    tensors = random_tensors(config, torch.float32)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 2] = 1e6
    save("safetensors", tensors, tmp_path / "large")
    own = {name: value for name, value in vars(config).items() if value is not None}
    (tmp_path / "large" / "config.yaml").write_text(json.dumps(own))
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.up_proj\.weight is not finite in float16"):
        run([f"model.path={tmp_path / 'large'}", f"output={tmp_path / 'small'}", "model.dtype=float16"])
    assert sorted(os.listdir(tmp_path)) == ["float16", "large", "out"]


def test_what_stands_beside_the_weights_comes_along(tmp_path: Path) -> None:
    run([f"model.path={ROOT / 'examples/quickstart/run'}", f"output={tmp_path / 'out'}"])
    from transformers import AutoTokenizer

    text = "What is 12 + 7?"
    there, here = (AutoTokenizer.from_pretrained(place) for place in (ROOT / "examples/quickstart/run", tmp_path / "out"))
    assert there(text).input_ids == here(text).input_ids


def test_mistakes(tmp_path: Path) -> None:
    path = f"model.path={reference('hf_llama').path}"
    with pytest.raises(ValueError, match="output is not given"):
        run([path])
    with pytest.raises(ValueError, match="it is there already"):
        run([path, f"output={tmp_path}"])
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        run([path, f"output={tmp_path / 'a' / 'b'}"])
    assert not os.listdir(tmp_path)


def test_ranks_that_the_command_starts(tmp_path: Path) -> None:
    arguments = [f"model.path={reference('torchtitan_llama3').path}", f"output={tmp_path / 'out'}", "parallel.fsdp=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "dist_infer", "export", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path) == ["out"] and len(list((tmp_path / "out").glob("model-*.safetensors"))) >= 2
    assert content(tmp_path / "out") == content(reference("torchtitan_llama3").path)
