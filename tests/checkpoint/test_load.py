"""Weights arrive with the right values, whoever wrote them and however they are cut; what it costs is bounded."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dist_infer.checkpoint import Checkpoint, load, open_checkpoint, reader
from dist_infer.checkpoint.plan import plan
from dist_infer.config.loader import LoaderOptions
from dist_infer.model.config import ModelConfig
from dist_infer.model.weights import describe, fsdp_rows

FIXTURES = Path(__file__).parents[1] / "data" / "fixtures"
DCP = {
    "kempnerforge": "checkpoints/step_3",
    "kempnerforge_tied": "checkpoints/step_3",
    "torchtitan_llama3": "outputs/checkpoint/step-3",
    "torchtitan_llama3_full": "outputs/checkpoint/step-3",
    "torchtitan_qwen3": "outputs/checkpoint/step-3",
    "accelerate_fsdp2_llama": "checkpoint-3/pytorch_model_fsdp_0",
}
HF = ["hf_llama", "hf_qwen2", "hf_qwen3", "hf_mistral"]
# The trainers' names, in the order in which they are tried on a canonical name.
RENAMES = {
    "kempnerforge": [
        ("model.embed_tokens", "token_embedding.embedding"),
        ("lm_head", "output_head.proj"),
        ("self_attn", "attention"),
        ("input_layernorm", "attention_norm"),
        ("post_attention_layernorm", "mlp_norm"),
        ("model.", ""),
    ],
    "torchtitan": [
        ("model.embed_tokens", "tok_embeddings"),
        *((f"self_attn.{x}_proj", f"attention.qkv_linear.w{x}") for x in "qkv"),
        ("self_attn.o_proj", "attention.wo"),
        ("self_attn", "attention"),
        ("input_layernorm", "attention_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        *((f"mlp.{theirs}_proj", f"feed_forward.{ours}") for theirs, ours in (("gate", "w1"), ("down", "w2"), ("up", "w3"))),
        ("model.", ""),
    ],
    "accelerate": [],
}


def reference(name: str, config: ModelConfig) -> dict[str, torch.Tensor]:
    """Canonical tensors of a fixture, read by PyTorch or safetensors and renamed here."""
    if name in HF:
        return {key: value for file in (FIXTURES / name).glob("model*.safetensors") for key, value in load_file(file).items()}
    trainer = name.split("_")[0]
    storage = dcp.FileSystemReader(FIXTURES / name / DCP[name])
    stored = storage.read_metadata().state_dict_metadata
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata) and not key.startswith("optimizer")
    }
    dcp.load(state, storage_reader=storage, no_dist=True)
    state = {key.removeprefix("model." if trainer != "torchtitan" else ""): value for key, value in state.items()}
    found = {}
    for canonical in (piece.name for weight in describe(config) for piece in weight.pieces):
        theirs = canonical
        for ours, their in RENAMES[trainer]:
            theirs = theirs.replace(ours, their)
        value = state[theirs]
        if trainer == "torchtitan" and config.family == "llama" and ("q_proj" in canonical or "k_proj" in canonical):
            value = value.view(-1, config.head_dim // 2, 2, value.shape[1]).transpose(1, 2).reshape(value.shape)
        found[canonical] = value
    return found


def cut_out(
    config: ModelConfig, tensors: dict[str, torch.Tensor], tp: int, rank: int, fsdp: int, coordinate: int
) -> dict[str, torch.Tensor]:
    parts = {}
    for weight in describe(config, tp, rank):
        whole = torch.cat([tensors[piece.name][tuple(slice(*edges) for edges in piece.box)] for piece in weight.pieces])
        parts[weight.parameter] = whole[slice(*fsdp_rows(len(whole), fsdp, coordinate))]
    return parts


def load_part(
    checkpoint: Checkpoint, config: ModelConfig, tp: int, rank: int, fsdp: int, coordinate: int, dtype: torch.dtype, **options: int
) -> tuple[dict[str, torch.Tensor], reader.LoadReport]:
    weights = list(describe(config, tp, rank))
    room = {}
    for weight in weights:
        first, last = fsdp_rows(weight.shape[0], fsdp, coordinate)
        size = (last - first) * math.prod(weight.shape[1:])
        # A view that does not begin where its storage does, as a slice of a larger buffer would be.
        room[weight.parameter] = torch.full((size + 3,), math.nan, dtype=dtype)[3:].view(last - first, *weight.shape[1:])
    report = load(checkpoint, config, weights, fsdp, coordinate, room, LoaderOptions(**options))
    return room, report


@pytest.mark.parametrize("name", [*DCP, *HF])
@pytest.mark.parametrize(("tp", "fsdp"), [(1, 1), (2, 1), (4, 1), (1, 3), (2, 3)])
def test_fixtures_load_to_the_trainers_values(name: str, tp: int, fsdp: int) -> None:
    checkpoint = open_checkpoint(str(FIXTURES / name / DCP.get(name, "")))
    config = checkpoint.config()
    checkpoint.match(config)
    tensors = reference(name, config)
    dtype = getattr(torch, checkpoint.dtype(config))
    for rank in range(tp):
        for coordinate in range(fsdp):
            expected = cut_out(config, tensors, tp, rank, fsdp, coordinate)
            found, _ = load_part(checkpoint, config, tp, rank, fsdp, coordinate, dtype)
            for parameter, value in expected.items():
                assert torch.equal(found[parameter], value), parameter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["torchtitan_llama3", "kempnerforge"])
@pytest.mark.parametrize("staging", [640, 64])  # bytes: reads are split between rows, and within them
def test_conversion_and_small_buffers(name: str, dtype: torch.dtype, staging: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "STAGING", staging)
    checkpoint = open_checkpoint(str(FIXTURES / name / DCP[name]))
    config = checkpoint.config()
    tensors = reference(name, config)
    for tp in (1, 2):  # tiles of two writers side by side, and columns of one
        expected = cut_out(config, tensors, tp, tp - 1, 2, 1)
        found, _ = load_part(checkpoint, config, tp, tp - 1, 2, 1, dtype, threads=3)
        for parameter, value in expected.items():
            assert torch.equal(found[parameter], value.to(dtype)), parameter


def nine_heads(**changes: int) -> ModelConfig:
    fields: dict = {
        "family": "llama", "vocab_size": 101, "hidden_size": 72, "ffn_size": 50, "layers": 2, "heads": 9, "kv_heads": 3, "head_dim": 8,
        "norm_eps": 1e-5, "max_position": 64,
    } | changes  # fmt: skip
    return ModelConfig(**fields)


def random_tensors(config: ModelConfig, dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {piece.name: piece.shape for weight in describe(config) for piece in weight.pieces}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def save(kind: str, tensors: dict[str, torch.Tensor], path: Path) -> Checkpoint:
    path.mkdir()
    if kind == "dcp":
        dcp.save({"app": {"model": tensors}, "optimizer": {"state": torch.ones(5)}}, checkpoint_id=path, no_dist=True)
    else:
        save_file(tensors, path / "model.safetensors")
    return open_checkpoint(str(path))


@pytest.mark.parametrize("kind", ["dcp", "safetensors"])
@pytest.mark.parametrize("tp", [2, 4, 9])
def test_nine_heads_over_three(kind: str, tp: int, tmp_path: Path) -> None:
    config = nine_heads()
    tensors = random_tensors(config, torch.float32)
    checkpoint = save(kind, tensors, tmp_path / "c")
    checkpoint.match(config)
    for rank in range(tp):
        found, _ = load_part(checkpoint, config, tp, rank, 2, 1, torch.float32)
        for parameter, value in cut_out(config, tensors, tp, rank, 2, 1).items():
            assert torch.equal(found[parameter], value), parameter


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))


@pytest.mark.parametrize("kind", ["dcp", "safetensors"])
def test_bytes_and_memory_of_a_large_checkpoint(kind: str, tmp_path: Path) -> None:
    config = nine_heads(vocab_size=16000, hidden_size=768, ffn_size=2048, heads=12, kv_heads=4, head_dim=64, layers=4)
    checkpoint = save(kind, random_tensors(config, torch.float32), tmp_path / "c")
    assert sum(os.path.getsize(file) for file in (tmp_path / "c").iterdir()) > 100e6
    for tp, fsdp in [(1, 1), (4, 1), (1, 4), (2, 2)]:
        weights = list(describe(config, tp, tp - 1))
        room = {}
        for weight in weights:
            first, last = fsdp_rows(weight.shape[0], fsdp, fsdp - 1)
            room[weight.parameter] = torch.empty(last - first, *weight.shape[1:], dtype=torch.bfloat16)
        shard = sum(tensor.numel() * 2 for tensor in room.values())
        before, seen = anonymous_bytes(), []
        report = load(checkpoint, config, weights, fsdp, fsdp - 1, room, LoaderOptions(), lambda _: seen.append(anonymous_bytes()))  # noqa: B023
        assert report.bytes_held == 2 * shard
        assert report.bytes_held <= report.bytes_requested <= 1.05 * report.bytes_held
        assert max(seen) - before <= shard + 4 * reader.STAGING + 32e6


def test_rotary_pairs_are_read_in_one_go() -> None:
    checkpoint = open_checkpoint(str(FIXTURES / "torchtitan_llama3" / DCP["torchtitan_llama3"]))
    config = checkpoint.config()
    weights = [weight for weight in describe(config) if weight.parameter == "blocks.0.attention.qkv.weight"]
    reads = plan(weights, 1, 0, checkpoint.index, checkpoint.dialect, config)
    assert len(reads) == 2 * (config.heads + config.kv_heads) + 1  # both halves of each head of q and k, and v
    found = list(reader.batches(reads))
    assert len(found) == 3 and all(batch.span is not None for batch in found)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite(value: float, tmp_path: Path) -> None:
    config = nine_heads()
    tensors = random_tensors(config, torch.float32)
    tensors["model.layers.1.self_attn.v_proj.weight"][23, 71] = value
    checkpoint = save("safetensors", tensors, tmp_path / "c")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.v_proj\.weight\[23, 71\] is -?(nan|inf)"):
        load_part(checkpoint, config, 4, 3, 2, 1, torch.bfloat16)
    load_part(checkpoint, config, 4, 0, 2, 1, torch.bfloat16)  # a rank that does not hold it
    load_part(checkpoint, config, 4, 3, 2, 1, torch.bfloat16, check_finite=False)


def test_values_too_large_for_the_type(tmp_path: Path) -> None:
    config = nine_heads()
    tensors = random_tensors(config, torch.float32)
    tensors["model.layers.0.self_attn.o_proj.weight"][5, 6] = -1e5
    checkpoint = save("dcp", tensors, tmp_path / "c")
    load_part(checkpoint, config, 1, 0, 1, 0, torch.bfloat16)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.o_proj\.weight\[5, 6\] is -inf"):
        load_part(checkpoint, config, 1, 0, 1, 0, torch.float16)


def test_progress_adds_up(tmp_path: Path) -> None:
    config = nine_heads()
    checkpoint = save("dcp", random_tensors(config, torch.float32), tmp_path / "c")
    weights, told = list(describe(config)), []
    room = {weight.parameter: torch.empty(weight.shape) for weight in weights}
    report = load(checkpoint, config, weights, 1, 0, room, LoaderOptions(), told.append)
    assert sum(told) == report.bytes_requested


def test_identity_is_of_the_content(tmp_path: Path) -> None:
    config = nine_heads()
    for kind in ("dcp", "safetensors"):
        one = save(kind, random_tensors(config, torch.float32), tmp_path / f"{kind}1")
        other = save(kind, random_tensors(config, torch.float32, seed=1), tmp_path / f"{kind}2")
        assert one.identity != other.identity
        os.rename(tmp_path / f"{kind}1", tmp_path / f"{kind}3")
        assert open_checkpoint(str(tmp_path / f"{kind}3")).identity == one.identity
