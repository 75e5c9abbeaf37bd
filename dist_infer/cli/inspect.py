"""`dist-infer inspect`: what a checkpoint is, whether it matches the model, and what each rank would read and hold."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from dist_infer.checkpoint.checkpoint import Checkpoint, open_checkpoint
from dist_infer.checkpoint.content import content_hash, hash_weights
from dist_infer.checkpoint.plan import plan
from dist_infer.checkpoint.sources.source import ITEM_SIZES
from dist_infer.cli.arguments import parse
from dist_infer.cli.units import in_units
from dist_infer.distributed.mesh import MeshShape, choose_mesh
from dist_infer.model.config import ModelConfig
from dist_infer.model.weights import HeadCut, cut, describe, fsdp_rows

MOST_RANKS_SHOWN = 16


def run(arguments: Sequence[str]) -> int:
    """Run the command; it starts no ranks, and reads weights only with loader.verify=full.

    Exit status 2 when weights and model do not match.
    """
    options = parse(arguments)
    if options.model.path is None:
        raise ValueError("model.path is not given: name a checkpoint directory, such as model.path=runs/step_50000")
    checkpoint = open_checkpoint(options.model.path, options.model.dialect, options.model.step, options.model.config)
    _show_checkpoint(checkpoint)
    try:
        config = checkpoint.config(options.model.config)
    except FileNotFoundError:
        if options.model.config is None:
            print(f"\n{checkpoint.shapes.stub()}\n")
        raise
    _show_model(checkpoint, config)
    checkpoint.match(config)
    print("match       every weight of the model is there, in shape, and nothing else")
    if options.loader.verify == "full":
        hashes = hash_weights(checkpoint, config, 0, 1, options.loader.threads)
        print(f"content     {content_hash(checkpoint, config, hashes)}, every byte read, and compared where the trainer kept checksums")
    shape, _ = choose_mesh(options.parallel, None, 1, heads=config.heads)
    _show_mesh(checkpoint, config, shape)
    return 0


def _show_checkpoint(checkpoint: Checkpoint) -> None:
    index = checkpoint.index
    count = sum(math.prod(entry.shape) for entry in index.values())
    stored = sum(math.prod(entry.shape) * ITEM_SIZES.get(entry.dtype, 0) for entry in index.values())
    dtypes = Counter(entry.dtype for entry in index.values())
    files = {chunk.file for entry in index.values() for chunk in entry.chunks}
    print(f"path        {checkpoint.path}{f'  ({checkpoint.note})' if checkpoint.note else ''}")
    print(f"source      {checkpoint.source.kind}, {len(files)} files with weights")
    print(f"dialect     {checkpoint.dialect.name}{f', below {prefix!r}' if (prefix := checkpoint.dialect.prefix) else ''}")
    kinds = ", ".join(f"{number} {dtype}" for dtype, number in dtypes.most_common())
    print(f"tensors     {len(index)}, {count:,} elements, {in_units(stored)} ({kinds})")
    print(f"other       {in_units(checkpoint.source.other_bytes)} of optimizer and other state, never read")
    if checkpoint.source.ignored:
        print(f"ignored     {', '.join(checkpoint.source.ignored)}: not known here, and no weights need it")
    print(f"identity    {checkpoint.identity}")
    tokenizer, generation = checkpoint.tokenizer_directory(), checkpoint.generation_config()
    print(f"tokenizer   {tokenizer or 'none found'}")
    print(f"generation  {generation or 'no generation_config.json: greedy by default'}")


def _show_model(checkpoint: Checkpoint, config: ModelConfig) -> None:
    windows = sorted({window for window in config.sliding_windows if window is not None})
    print(
        f"model       {config.family}: {config.layers} layers, hidden {config.hidden_size}, ffn {config.ffn_size}, "
        f"{config.heads} heads over {config.kv_heads} of {config.head_dim}, vocabulary {config.vocab_size}, "
        f"{'tied' if config.tied_head else 'own'} head, up to {config.longest:,} tokens"
    )
    if config.fallback is not None:
        print("runs        as transformers' own module; slower than the families that have a decoder of ours")
    elif not config.learned_positions:
        pairs = checkpoint.dialect.pairs("model.layers.0.self_attn.q_proj.weight", config)
        print(
            f"rotary      {_rope(config.rope)}"
            + (f"; layers with a window {_rope(config.local_rope)}" if config.local_rope else "")
            + (f"; {len(config.unrotated_layers)} layers without" if config.unrotated_layers else "")
            + ("; pairs are stored side by side" if pairs else "")
        )
    if windows:
        print(f"windows     {', '.join(map(str, windows))} tokens, in {sum(map(bool, config.sliding_windows))} of {config.layers} layers")
    if config.experts is not None:
        experts = config.experts
        shared = f", and one of {experts.shared_ffn_size} for all" if experts.shared_ffn_size else ""
        where = f"in {len(experts.layers)} of {config.layers} layers"
        print(f"experts     {experts.chosen} of {experts.count} (ffn {experts.ffn_size}){shared}, {where}")


def _rope(rope: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in rope.items() if not isinstance(value, list))


def _show_mesh(checkpoint: Checkpoint, config: ModelConfig, shape: MeshShape) -> None:
    """A line for each rank of a replica."""
    print(f"\nmesh        {shape}; each replica reads the same")
    print(f"{'fsdp':>4} {'tp':>4} {'heads':>9} {'kv heads':>9} {'vocabulary':>16} {'elements':>15} {'reads':>8} {'bytes read':>12}")
    shown = 0
    for coordinate in range(shape.fsdp):
        for rank in range(shape.tp):
            if shown == MOST_RANKS_SHOWN:
                print(f"... and {shape.fsdp * shape.tp - shown} more ranks alike")
                return
            shown += 1
            weights = list(describe(config, shape.tp, rank))
            reads = plan(weights, shape.fsdp, coordinate, checkpoint.index, checkpoint.dialect, config)
            held = 0
            for weight in weights:
                first, stop = fsdp_rows(weight.shape[0], shape.fsdp, coordinate)
                held += (stop - first) * math.prod(weight.shape[1:])
            heads, vocabulary = HeadCut.of(config, shape.tp, rank), cut(config.vocab_size, shape.tp, rank)
            print(
                f"{coordinate:>4} {rank:>4} {_range(heads.heads):>9} {_range(heads.kv_heads):>9} {_range(vocabulary):>16} "
                f"{held:>15,} {len(reads):>8,} {in_units(sum(read.bytes for read in reads)):>12}"
            )


def _range(bounds: tuple[int, int]) -> str:
    return f"{bounds[0]}-{bounds[1] - 1}"
