"""`dist-infer plan`: memory, speed and load time of a model on a cluster, mesh by mesh."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from dist_infer.checkpoint.checkpoint import open_checkpoint
from dist_infer.checkpoint.configurations import read_configuration
from dist_infer.checkpoint.locate import locate
from dist_infer.checkpoint.sources import is_checkpoint
from dist_infer.checkpoint.sources.source import ITEM_SIZES
from dist_infer.cli.arguments import parse
from dist_infer.cli.units import in_units
from dist_infer.config.cluster import ClusterOptions
from dist_infer.config.options import Options
from dist_infer.engine.cluster import Cluster
from dist_infer.engine.forecast import Forecast, Planner
from dist_infer.engine.memory import GIB
from dist_infer.model.config import ModelConfig

MOST_SHOWN = 12  # meshes that fit; and of those that do not
CONFIGURATIONS = (".json", ".toml", ".yaml", ".yml")


def run(arguments: Sequence[str]) -> int:
    """Run the command; it starts no ranks and reads no weights."""
    options = parse(arguments)
    config, stored = _model(options)
    if options.output is not None and not Path(options.output).absolute().parent.is_dir():
        raise FileNotFoundError(f"output={options.output}: there is no directory {Path(options.output).absolute().parent}")
    name = config.dtype or "float32" if options.model.dtype == "auto" else options.model.dtype
    dtype: torch.dtype = getattr(torch, name)
    longest, work = options.engine.max_model_len or config.longest, options.workload
    if work.prompt_tokens + work.output_tokens > longest:
        raise ValueError(
            f"workload.prompt_tokens={work.prompt_tokens} and output_tokens={work.output_tokens}: a sequence has at most {longest} tokens"
        )
    cluster = _cluster(options, dtype)
    found = Planner(config, dtype, cluster, options, ITEM_SIZES.get(stored or name, dtype.itemsize)).forecasts()
    _show_task(config, dtype, cluster, options)
    fitting = [forecast for forecast in found if forecast.fits]
    _show_meshes(fitting)
    _show_others([forecast for forecast in found if not forecast.fits])
    if fitting:
        _show_mesh(fitting[0], options)
    if options.output is not None:
        _write(Path(options.output), options, cluster, found)
    return 0


def _model(options: Options) -> tuple[ModelConfig, str | None]:
    """The model at model.path, and the type its weights are stored in if there are any."""
    path, explicit = options.model.path, options.model.config
    if path is None and explicit is None:
        raise ValueError("model.path is not given: name a checkpoint directory, or the config.json of a model without weights")
    if path is None:
        return read_configuration(Path(explicit or "").expanduser()), None
    place = Path(path).expanduser()
    if place.is_file() and place.suffix in CONFIGURATIONS and not is_checkpoint(place):
        return read_configuration(place), None
    try:
        locate(path, options.model.step)
    except (ValueError, FileNotFoundError):
        if not (place / "config.json").is_file():
            raise
        return read_configuration(Path(explicit).expanduser() if explicit else place), None
    checkpoint = open_checkpoint(path, options.model.dialect, options.model.step, explicit)
    config = checkpoint.config(explicit)
    checkpoint.match(config)
    stored = checkpoint.dtype(config)
    if options.model.dtype == "auto":
        options.model.dtype = stored
    return config, stored


def _cluster(options: Options, dtype: torch.dtype) -> Cluster:
    """The cluster that is described, or this machine."""
    if any(getattr(options.cluster, item.name) is not None for item in fields(ClusterOptions)):
        return Cluster.described(options.cluster)
    from dist_infer.engine.this_machine import measure

    return measure(dtype, options.engine.pack_weights, options.engine.native_kernels)


def _show_task(config: ModelConfig, dtype: torch.dtype, cluster: Cluster, options: Options) -> None:
    work, kind = options.workload, "GPU" if cluster.kind == "cuda" else "core"
    elements = f"{config.layers} layers, {config.heads} heads over {config.kv_heads} of {config.head_dim}"
    print(f"model     {config.family}: {elements}, {str(dtype).removeprefix('torch.')}")
    print(
        f"cluster   {cluster.name}: {cluster.nodes} x {cluster.devices} {kind}s, of each {_gib(cluster.memory)}, "
        f"{cluster.products.bandwidth / 1e9:,.1f} GB/s and {cluster.products.flops / 1e12:,.3g} TFLOP/s attained"
    )
    made = f"{work.output_tokens:,} output tokens" if work.output_tokens else "scored"
    print(f"workload  {work.sequences:,} sequences of {work.prompt_tokens:,} prompt tokens, {made}")


def _show_meshes(forecasts: list[Forecast]) -> None:
    """A line for each, best first."""
    if not forecasts:
        print("\nno mesh fits")
        return
    head = f"{'replicas':>8} {'fsdp':>5} {'tp':>4} {'memory':>9} {'KV tokens':>11} {'at once':>8}"
    print(f"\n{head} {'prefill/s':>10} {'decode/s':>9} {'step ms':>8} {'first s':>8} {'load s':>7} {'all s':>8}  why")
    for one in forecasts[:MOST_SHOWN]:
        axes = f"{one.shape.replicas:>8} {one.shape.fsdp:>5} {one.shape.tp:>4}"
        held = f"{_gib(one.footprint.total):>9} {one.kv_tokens:>11,} {one.running:>8,}"
        step = one.decode_step if one.decode else one.prefill_step
        speed = f"{one.prefill:>10,.0f} {one.decode:>9,.0f} {1e3 * step.total:>8,.1f} {one.first_token_s:>8.3g}"
        print(f"{axes} {held} {speed} {one.load_s:>7,.3g} {one.seconds:>8,.4g}  {one.why}")
    if len(forecasts) > MOST_SHOWN:
        print(f"... and {len(forecasts) - MOST_SHOWN} slower ones")


def _show_others(forecasts: list[Forecast]) -> None:
    """Those that do not fit."""
    if forecasts:
        print("\ndo not fit")
    for one in forecasts[:MOST_SHOWN]:
        print(f"{one.shape.replicas:>8} {one.shape.fsdp:>5} {one.shape.tp:>4} {_gib(one.footprint.missing):>9} too much: {one.why}")
    if len(forecasts) > MOST_SHOWN:
        print(f"... and {len(forecasts) - MOST_SHOWN} more")


def _show_mesh(best: Forecast, options: Options) -> None:
    """The best mesh, part by part."""
    print(f"\nbest      parallel.replicas={best.shape.replicas} parallel.fsdp={best.shape.fsdp} parallel.tp={best.shape.tp}")
    parts = {name: size for name, size in best.footprint.parts.items() if size}
    print(f"memory    {', '.join(f'{name} {_gib(size)}' for name, size in parts.items())}: {_gib(best.footprint.total)} of a rank")
    if best.footprint.kv is not None:
        print(f"KV cache  {best.kv_tokens:,} tokens in all, in blocks of {options.engine.block_size}")
    for name, step in (("prefill", best.prefill_step), ("decode", best.decode_step)):
        if step.total:
            times = {part: getattr(step, part) for part in ("products", "attention", "reductions", "gathers", "host")}
            told = ", ".join(f"{part} {1e3 * value:,.3g}" for part, value in times.items() if value)
            print(f"{name:<9} {1e3 * step.total:,.3g} ms a step: {told}")
    if best.fresh_s > best.load_s / 10:
        print(f"loading   {best.load_s:,.3g} s in memory at hand, up to {best.fresh_s:,.3g} s more where a hypervisor must give it first")
    for one in best.traffic:
        print(f"traffic   {one.count} x {one.kind} over {one.axis} of {in_units(one.bytes)} ({one.what})")
    each = sum(one.count * one.bytes for one in best.traffic)
    if each:
        print(f"          {sum(one.count for one in best.traffic)} collectives and {in_units(each)} a rank in a step")


def _write(output: Path, options: Options, cluster: Cluster, forecasts: list[Forecast]) -> None:
    """All figures as JSON."""
    figures: dict[str, Any] = {
        "model": options.model.path,
        "workload": vars(options.workload),
        "cluster": asdict(cluster),
        "meshes": [forecast.to_json() for forecast in forecasts],
    }
    partial = output.with_name(f"{output.name}.partial")
    partial.write_text(json.dumps(_finite(figures), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, output)


def _finite(value: Any) -> Any:
    """`value` with null for what is infinite: links that are not there."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and math.isinf(value) else value


def _gib(size: int) -> str:
    return f"{size / GIB:,.1f} GiB" if size >= GIB else f"{size / 2**20:,.0f} MiB"
