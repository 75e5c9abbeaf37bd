"""A model of 303 million parameters with flat logits on more ranks than processors: tiny peaked models hide errors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dist_infer.engine.request import Request
from tests.engine.jobs import Mesh, kv_memory, request, run
from tests.ranks import Ranks

VOCABULARY = 32000
COUNT = 6  # most tokens of a request


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, PreTrainedModel]]:
    """The model, its weights stored as bfloat16 and meant exactly so."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=VOCABULARY,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    model.tie_weights()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if "norm" in name else parameter.normal_(0, 0.02, generator=generator)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    directory = tmp_path_factory.mktemp("large")
    model.save_pretrained(directory)
    yield str(directory), model.float().eval()
    for file in directory.iterdir():
        file.unlink()


def arrivals(count: int) -> list[Request]:
    """Requests with prompts of 2 to 24 tokens that want 2 to 6; the engine holds a few at a time, so they arrive as others leave."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(2, 25, (count,), generator=generator).tolist()
    wanted = torch.randint(2, COUNT + 1, (count,), generator=generator).tolist()
    prompts = [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    return [request(prompt, index, max_tokens=most) for index, (prompt, most) in enumerate(zip(prompts, wanted, strict=True))]


@pytest.mark.large
def test_unequal_work_under_pressure(ranks: Ranks, large: tuple[str, PreTrainedModel]) -> None:
    """tp=2 x fsdp=2, few blocks, one rank slowed down: every token is transformers' choice wherever rounding leaves one."""
    path, model = large
    requests = arrivals(9)
    mesh = Mesh(tp=2, fsdp=2)
    overrides = [
        "engine.block_size=4",
        "engine.max_batch_tokens=48",
        "engine.max_sequences=4",
        "engine.max_model_len=32",
        kv_memory(path, mesh, 4, 12),
    ]
    found = run(ranks, path, mesh, [requests], overrides, slow_rank=3, timeout_s=240)
    assert found.preemptions > 0
    whole = [made.token_ids + tokens for made, tokens in zip(requests, found.tokens(), strict=True)]
    longest = max(map(len, whole))
    with torch.no_grad():  # padded at the end, where nothing before it looks
        logits = model(torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens in whole])).logits
    undecided = 0
    for made, tokens, rows in zip(requests, found.tokens(), logits, strict=True):
        assert len(tokens) == made.params.max_tokens
        rows = rows[len(made.token_ids) - 1 :][: len(tokens)]
        best, chosen = rows.max(-1), rows.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert (best.values - rows.mean(-1) < 8 * rows.std(-1)).all(), "the logits are meant to be flat"
        assert (best.values - chosen).max() <= 1e-5 * rows.abs().max()
        undecided += int((best.indices != torch.tensor(tokens)).sum())
    assert undecided <= 1
