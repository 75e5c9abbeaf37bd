"""A look at a model between two training steps: what it says is right, and the training does not notice."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from dist_infer import LLM, SamplingParams
from tests.ranks import Ranks

PROMPTS = [[1, 2, 3], [9] * 17, [4, 5], [88, 0, 7, 12, 30], [60]]


def train(family: str, mesh: dict[str, int] | None) -> tuple[list[list[int]], list[list[int]], Any]:
    """Four FSDP2 training steps, with a look (on `mesh`) between the backward pass and the update of the second.

    Returns:
        What the look said and what transformers says (on rank 0), and the state of the training at its end.
    """
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=97,
        hidden_size=32,
        intermediate_size=52,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=family == "qwen3",
        attention_dropout=0.1,  # draws from the random state
        initializer_range=0.3,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model.train()
    said: list[list[int]] = []
    expected: list[list[int]] = []
    for step in range(4):
        batch = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        model(input_ids=batch, labels=batch).loss.backward()
        if step == 1 and mesh is not None:
            said = look(model, mesh)
            expected = transformers_tokens(model, config)
        optimizer.step()
        optimizer.zero_grad()
    state = {name: numbers(parameter) for name, parameter in model.named_parameters()}
    moments = [numbers(value) for values in optimizer.state.values() for value in values.values()]
    generators = (torch.get_rng_state().numpy(), np.random.get_state(legacy=False)["state"]["key"], random.getstate())
    return said, expected, (state, moments, generators)


def look(model: torch.nn.Module, mesh: dict[str, int]) -> list[list[int]]:
    axes: dict[str, Any] = dict(mesh)
    with LLM.from_model(model, **axes, overrides=["device=cpu", "model.dtype=float32", "engine.max_batch_tokens=9"]) as llm:
        results = llm.generate(PROMPTS, SamplingParams(max_tokens=10))
        sampled = llm.generate(PROMPTS, SamplingParams(max_tokens=5, temperature=1.0, n=2))
    assert (len(results), len(sampled)) == ((5, 5) if dist.get_rank() == 0 else (0, 0))
    assert model.training and dist.is_initialized()
    assert all(parameter.grad is not None for parameter in model.parameters()), "gradients are left alone"
    return [result.outputs[0].token_ids for result in results]


@torch.no_grad()
def transformers_tokens(model: torch.nn.Module, config: Any) -> list[list[int]]:
    """Greedy tokens of a whole copy, computed anew for each token; draws no random number."""
    whole = {name: parameter.full_tensor().float() for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)}
    random_state = torch.get_rng_state()
    copy = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    torch.set_rng_state(random_state)
    copy.load_state_dict(whole, strict=not config.tie_word_embeddings)
    copy.eval()
    found = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(10):
            best = copy(torch.tensor([tokens])).logits[0, -1].topk(2)
            assert best.values[0] - best.values[1] > 1e-4, "near tie: choose another seed"
            tokens.append(int(best.indices[0]))
        found.append(tokens[len(prompt) :])
    return found


def numbers(tensor: Tensor) -> np.ndarray:
    """This rank's part."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().clone().numpy()


def same(a: Any, b: Any) -> bool:
    """Whether nested states are the same to the last bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return np.array_equal(a, b)


@pytest.mark.parametrize(
    ("size", "mesh"),
    [(2, {"tp": 2}), (2, {"fsdp": 2}), (2, {"replicas": 2}), (4, {"tp": 2, "fsdp": 2}), (4, {"tp": 4})],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_look_between_training_steps(ranks: Ranks, family: str, size: int, mesh: dict[str, int]) -> None:
    undisturbed = ranks(size).run(train, family, None)
    looked = ranks(size).run(train, family, mesh)
    assert looked[0][0] == looked[0][1], "what the look said is not what transformers says"
    for (_, _, before), (_, _, after) in zip(undisturbed, looked, strict=True):
        assert same(before, after), "the training went another way"
    assert not same(undisturbed[0][2][0], undisturbed[1][2][0]), "every rank holds its own rows"


def look_often(mesh: dict[str, int], collectives: str) -> list[list[list[int]]]:
    """One look after another, in one process group."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=97, **sizes), dtype=torch.float32)
    axes: dict[str, Any] = dict(mesh)
    found = []
    for _ in range(3):
        with LLM.from_model(model, **axes, overrides=["device=cpu", f"parallel.collectives={collectives}"]) as llm:
            found.append([result.outputs[0].token_ids for result in llm.generate(PROMPTS, SamplingParams(max_tokens=4, ignore_eos=True))])
    return found


@pytest.mark.parametrize(("size", "mesh"), [(2, {"fsdp": 2}), (2, {"tp": 2}), (4, {"tp": 2, "fsdp": 2})], ids=str)
@pytest.mark.parametrize("collectives", ["auto", "process_group"])
def test_one_look_after_another(ranks: Ranks, size: int, mesh: dict[str, int], collectives: str) -> None:
    first, second, third = ranks(size).run(look_often, mesh, collectives)[0]
    assert len(first) == len(PROMPTS) and first == second == third
