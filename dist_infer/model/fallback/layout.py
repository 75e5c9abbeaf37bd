"""Where the parameters of transformers' module lie in a checkpoint that transformers wrote.

transformers keeps some parameters in another form than it stores them (experts one by one on disk, as a pack in memory). Its
own conversion says how, and is run on row numbers in place of weights: what comes out tells which stored rows fill which
rows of a parameter.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from dist_infer.model.fallback.cuts import Cuts
from dist_infer.model.fallback.module import build, matrix_shape
from dist_infer.model.stored import Stored
from dist_infer.model.weights import Piece, Weight


class Run(NamedTuple):
    """`length` rows of a parameter from `row` on, which are the rows of a canonical tensor from `first` on."""

    row: int
    length: int
    name: str
    shape: tuple[int, ...]
    first: int


@dataclass(frozen=True)
class Layout:
    """The weights of one model as they are stored.

    Attributes:
        model: The module, on the meta device.
        runs: What fills each parameter, in row order.
        packed: Canonical tensors that are stored in packs, such as experts.
        held: Where the module itself keeps canonical tensors, and a trainer that saves the module as it is.
        embedding: Stored name of the token embedding.
        head: Stored name of the head; what it would be when the embedding serves for it.
    """

    model: PreTrainedModel
    runs: dict[str, list[Run]]
    packed: dict[str, Stored]
    held: dict[str, Stored]
    embedding: str
    head: str

    def stored(self, name: str) -> Stored:
        """Where the canonical tensor `name` is stored; what every model has goes by its usual name too."""
        usual = {"model.embed_tokens.weight": self.embedding, "lm_head.weight": self.head}
        return self.packed.get(name) or Stored(usual.get(name, name))

    def weights(self, tp: int, rank: int) -> Iterator[Weight]:
        """What tp rank `rank` of `tp` holds.

        Raises:
            ValueError: The model cannot be cut into `tp`.
        """
        cuts = Cuts.of(self.model, tp, rank)
        for name, parameter in self.model.named_parameters():
            shape = matrix_shape(parameter.shape)
            rest = () if len(shape) < 2 else (cuts.local_columns(name, shape),)
            pieces: list[Piece] = []
            row = 0
            for start, stop in cuts.local_rows(name, shape):
                pieces += _pieces(self.runs[name], start, stop, row, rest)
                row += stop - start
            yield Weight(f"model.{name}", (row, *(last - first for first, last in rest)), tuple(pieces))


def layout_of(settings: dict[str, Any]) -> Layout:
    """The layout of the model whose transformers configuration is `settings`; remembered.

    Raises:
        ValueError: It is stored in a form that we cannot read in place.
    """
    return _layout(json.dumps(settings, sort_keys=True))


@lru_cache(maxsize=4)
def _layout(key: str) -> Layout:
    model = build(json.loads(key), torch.float32)
    runs: dict[str, list[Run]] = {}
    packed: dict[str, Stored] = {}
    parts: dict[str, dict[str, torch.Size]] = defaultdict(dict)
    for name, parameter in model.named_parameters():
        if not parameter.ndim:
            raise ValueError(f"{name} is a single number")
        layer = re.match(r".*?\.\d+\.", name)  # a layer at a time: row numbers of a large model are many
        parts[layer[0] if layer else ""][name] = parameter.shape
    for shapes in parts.values():
        _follow(model, shapes, runs, packed)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    assert inputs is not None and outputs is not None
    embedding = runs[names[id(inputs.weight)]][0].name
    if outputs.weight is inputs.weight:
        head = f"{next(name for name, module in model.named_modules() if module is outputs)}.weight"
    else:
        head = runs[names[id(outputs.weight)]][0].name
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    held = {run.name: _held(name, shapes[name], run) for name, found in runs.items() for run in found if run.length == run.shape[0]}
    return Layout(model, runs, packed, held, embedding, head)


def _held(name: str, shape: tuple[int, ...], run: Run) -> Stored:
    """Where a canonical tensor lies that is one run of the parameter `name`."""
    if len(shape) < 3:
        return Stored(name, shape, offset=run.row)
    member, offset = divmod(run.row, shape[-2])
    return Stored(name, shape, offset=offset, member=member)


def _follow(model: PreTrainedModel, shapes: dict[str, torch.Size], runs: dict[str, list[Run]], packed: dict[str, Stored]) -> None:
    """Add to `runs` and `packed` what the parameters of `shapes` are stored as."""
    numbers: dict[str, Tensor] = {}
    names, starts, count = list(shapes), [], 0
    for name, shape in shapes.items():
        rows = matrix_shape(shape)[0]
        numbers[name] = torch.arange(count, count + rows).view(shape if len(shape) < 2 else (*shape[:-1], 1))
        starts.append(count)
        count += rows
    for name in names:
        runs[name] = []
    for stored, rows in revert_weight_conversion(model, numbers).items():
        columns = {shapes[names[bisect_right(starts, number) - 1]][1:][-1:] for number in (int(rows.min()), int(rows.max()))}
        if len(columns) > 1 or (rows.ndim > 1 and rows.shape[-1] != 1):
            raise ValueError(f"{stored} is stored in another order than it is used in")
        _runs_of(stored, rows, columns.pop(), names, starts, runs, packed)
    for name, found in runs.items():
        if name in shapes:
            found.sort()
            if [run.row for run in found] != [0, *(run.row + run.length for run in found[:-1])] or (
                sum(run.length for run in found) != matrix_shape(shapes[name])[0]
            ):
                raise ValueError(f"{name} is stored in another form than it is used in")


def _runs_of(
    stored: str,
    rows: Tensor,
    columns: tuple[int, ...],
    names: list[str],
    starts: list[int],
    runs: dict[str, list[Run]],
    packed: dict[str, Stored],
) -> None:
    """Cut the row numbers of one stored tensor into runs of consecutive ones, of one parameter and one member of a pack each."""
    whole = (*rows.shape[:-1], *columns) if columns else tuple(rows.shape)
    height = rows.shape[-2] if rows.ndim > 2 else rows.numel()
    flat = rows.reshape(-1)
    breaks = (flat[1:] - flat[:-1] != 1).nonzero()[:, 0] + 1
    borders = torch.isin(flat, torch.tensor(starts)).nonzero()[:, 0]  # where another parameter begins
    order = sorted({0, *breaks.tolist(), *borders.tolist(), *range(0, len(flat), height), len(flat)})
    for begin, end in pairwise(order):
        number = int(flat[begin])
        owner = bisect_right(starts, number) - 1
        name, first, shape = stored, begin, (flat.numel(), *columns)
        if rows.ndim > 2:
            member, first = divmod(begin, height)
            name, shape = f"{stored}[{member}]", (height, *columns)
            packed[name] = Stored(stored, whole, member=member)
        runs[names[owner]].append(Run(number - starts[owner], end - begin, name, shape, first))


def _pieces(runs: list[Run], start: int, stop: int, row: int, rest: tuple[tuple[int, int], ...]) -> Iterator[Piece]:
    """The pieces that bring rows `start` to `stop` of a parameter to row `row` on of the local buffer."""
    index = bisect_right(runs, start, key=lambda run: run.row) - 1
    while start < stop:
        run = runs[index]
        end = min(stop, run.row + run.length)
        first = run.first + start - run.row
        yield Piece(run.name, run.shape, ((first, first + end - start), *rest), row)
        row += end - start
        start, index = end, index + 1
