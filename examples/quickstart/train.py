"""Trains the quickstart model with FSDP2 and leaves sharded checkpoints, as a trainer would.

torchrun --nproc-per-node=4 examples/quickstart/train.py --out examples/quickstart/run
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tokenizers import Tokenizer
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from tasks import training_question
from tokenizer import BOS, EOS, build_tokenizer, save_tokenizer

ROW = 128  # tokens of a training row
IGNORE = -100  # label of tokens that are not learned


def model_config(tokenizer: Tokenizer) -> LlamaConfig:
    """The architecture: 0.8 million parameters, two query heads to a KV head, an untied head."""
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(EOS),
        dtype="bfloat16",
    )


def batches(tokenizer: Tokenizer, rows: int, rng: random.Random) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (tokens, labels), each [rows, ROW]: questions and answers in a row, only the answers learned."""
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    while True:
        tokens, labels = [], []
        for _ in range(rows):
            row, learned = [bos], [IGNORE]
            while len(row) < ROW:
                question = training_question(rng)
                prompt = tokenizer.encode(question.prompt, add_special_tokens=False).ids
                answer = [*tokenizer.encode(question.answer, add_special_tokens=False).ids, eos]
                row += prompt + answer
                learned += [IGNORE] * len(prompt) + answer
            tokens.append(row[:ROW])
            labels.append(learned[:ROW])
        yield torch.tensor(tokens), torch.tensor(labels)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Rises linearly over the first twentieth, then falls as a cosine to a hundredth of `peak`."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def save(model: LlamaForCausalLM, out: Path, step: int) -> None:
    """Write the sharded weights in bfloat16; every rank writes its own file."""
    weights = {name: weight.to(torch.bfloat16) for name, weight in get_model_state_dict(model).items()}
    dcp.save({"model": weights}, checkpoint_id=out / f"step_{step}")
    if dist.get_rank() == 0:
        (out / "latest").write_text(f"step_{step}\n")


def train(args: argparse.Namespace) -> None:
    """Train for `args.steps` steps; save at the steps of `args.save_at`."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(args.seed)  # the same on all ranks: they draw the same weights, then shard them
    tokenizer = build_tokenizer()
    config = model_config(tokenizer)
    if rank == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        save_tokenizer(tokenizer, args.out)
        (args.out / "config.json").write_text(config.to_json_string())
        generation = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id, "do_sample": False, "max_new_tokens": 64}
        (args.out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")

    model = LlamaForCausalLM(config).float()
    for layer in model.model.layers:
        fully_shard(layer, reshard_after_forward=False)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.05)
    data = batches(tokenizer, args.rows // world, random.Random(f"{args.seed}/{rank}"))

    start = time.monotonic()
    for step in range(1, args.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - 1, args.steps, args.lr)
        tokens, labels = next(data)
        logits = model(input_ids=tokens, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and (step % 25 == 0 or step == 1):
            print(f"step {step:5d}  loss {loss.item():.4f}  {time.monotonic() - start:6.1f} s", flush=True)
        if step in args.save_at:
            save(model, args.out, step)


def main() -> None:
    """Read the command line and train on every rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--steps", type=int, default=800, help="optimizer steps")
    parser.add_argument("--save-at", type=int, nargs="+", default=[50, 100, 200, 400, 800], help="steps after which to save")
    parser.add_argument("--rows", type=int, default=64, help="rows of a batch, over all ranks")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and questions")
    args = parser.parse_args()
    dist.init_process_group("gloo")
    try:
        train(args)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
