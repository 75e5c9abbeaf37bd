"""`dist-infer export`: write a model anew, where transformers and other programs read it."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from dist_infer.checkpoint.checkpoint import open_checkpoint
from dist_infer.checkpoint.export import Export
from dist_infer.cli.arguments import parse
from dist_infer.cli.ranks import say
from dist_infer.cli.units import in_units
from dist_infer.config.options import Options
from dist_infer.distributed.launch import RankVariables
from dist_infer.distributed.mesh import choose_mesh
from dist_infer.distributed.world import World
from dist_infer.engine.meeting import USER_ERRORS


def run(arguments: Sequence[str]) -> int:
    """Run the command on all ranks; `parallel.*` says how many a process that was started alone starts."""
    options = parse(arguments)
    export: Export | None = None
    size, command = None, None
    if RankVariables.read() is None:  # alone: say what is wrong before a rank is started
        export = _check(options)
        size = choose_mesh(options.parallel, None, 1)[0].size
        command = [sys.executable, "-m", "dist_infer", "export", *arguments]
    world = World.join(options.parallel, "cpu", size, command)
    error: str | None = None
    try:
        export = export or _check(options)
    except USER_ERRORS as mistake:
        error = str(mistake)
    with world:
        wrong = next((text for text in world.exchange("checks", error) if text is not None), None)
        if wrong is None:
            assert export is not None
            _write(export, options, world)
    if wrong is not None:
        raise ValueError(wrong)
    return 0


def _check(options: Options) -> Export:
    """All that can be known before anything is read or written."""
    if options.model.path is None:
        raise ValueError("model.path is not given: name a checkpoint directory, such as model.path=runs/step_50000")
    if options.output is None:
        raise ValueError("output is not given: name a directory to be made, such as output=exported")
    output = Path(options.output).absolute()
    if output.exists() or output.is_symlink():
        raise ValueError(f"output={options.output}: it is there already; name a directory to be made")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"output={options.output}: there is no directory {output.parent}")
    if not os.access(output.parent, os.W_OK):
        raise PermissionError(f"output={options.output}: the directory {output.parent} cannot be written to")
    model = options.model
    checkpoint = open_checkpoint(model.path or "", model.dialect, model.step, model.config)
    config = checkpoint.config(model.config)
    checkpoint.match(config)
    export = Export.of(checkpoint, config, model.dtype, model.config)
    free = shutil.disk_usage(output.parent).free
    if free < export.bytes:
        raise ValueError(f"output={options.output}: {export.bytes:,} bytes are to be written and the disk has {free:,} free")
    return export


def _write(export: Export, options: Options, world: World) -> None:
    """Write into a directory of another name, which gets its own when all is there."""
    output = Path(options.output or "").absolute()
    made = tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent) if world.rank == 0 else None
    try:
        place = Path(world.exchange("place", made)[0])
        write = export.write_safetensors if options.format == "safetensors" else export.write_dcp
        hidden = not (world.rank == 0 and sys.stderr.isatty())
        with tqdm(total=export.bytes // world.size, desc="exporting", unit="B", unit_scale=True, disable=hidden, leave=False) as bar:
            write(place, world.rank, world.size, options.loader, bar.update)
        world.exchange("written", None)
        if world.rank == 0:
            export.write_rest(place)
            _open_up(place)
            place.rename(output)
            say(f"{output}: {len(export.tensors)} tensors, {in_units(export.bytes)}, as {options.format}")
        world.exchange("renamed", None)
    except BaseException:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
        raise


def _open_up(directory: Path) -> None:
    """Give `directory` and its files, made for this user alone, the modes that new ones have."""
    mask = os.umask(0)
    os.umask(mask)
    directory.chmod(0o777 & ~mask)
    for file in directory.iterdir():
        file.chmod(0o666 & ~mask)
