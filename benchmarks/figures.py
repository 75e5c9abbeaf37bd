"""The figures a run is judged by: what is asked, what was reached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

Measured = Mapping[str, Mapping[str, list[float]]]  # by workload and label: a value for each round

TOLERANCE = 1.25  # of a curve: a step may take this much longer than what it computes has grown
IDLE = 1.02  # what features that are not used may cost, where noise is no larger


@dataclass(frozen=True)
class Ratio:
    """Rounds of one label over rounds of another: median, least and most."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: list[float], others: list[float]) -> Ratio:
        """Round by round; one list may be shorter, and is then gone through again."""
        rounds = max(len(values), len(others))
        ratios = [values[number % len(values)] / others[number % len(others)] for number in range(rounds)]
        return cls(median(ratios), min(ratios), max(ratios))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f} to {self.most:.2f})"


@dataclass(frozen=True)
class Figure:
    """One line of the judgement.

    Attributes:
        name: What is compared.
        asked: The bound.
        at_least: Whether it is a lower bound.
        reached: None where it was not measured.
    """

    name: str
    asked: float
    at_least: bool
    reached: Ratio | None

    @property
    def met(self) -> bool | None:
        """Whether it was reached; None where it was not measured."""
        if self.reached is None:
            return None
        return self.reached.median >= self.asked if self.at_least else self.reached.median <= self.asked


def figures(measured: Measured, parameter_bytes: int, decoded: list[int], prefills: list[str]) -> list[Figure]:
    """Every figure that is asked for, in order.

    Args:
        measured: What the workloads gave.
        parameter_bytes: Of the weights a step reads.
        decoded: The batch sizes of decoding, smallest first.
        prefills: Names of the workloads that read prompts.
    """
    judged = []
    for tp, asked in ((1, (1.15, 1.3, 1.3)), (2, (1.1, 1.3, 1.3))):
        judged += [
            _of(measured, f"vLLM tp={tp}, decode, batch {batch}", f"decode {batch}", f"ours tp={tp}", f"vLLM tp={tp}", bound)
            for batch, bound in zip(decoded, asked, strict=True)
        ]
    judged.append(_of(measured, "vLLM tp=1, offline mix", "mix", "ours tp=1", "vLLM tp=1", 1.3))
    judged += [_of(measured, f"vLLM tp=1, {name}", name, "ours tp=1", "vLLM tp=1", 1.0) for name in prefills]
    judged.append(_of(measured, "vLLM tp=1, process start to first token", "start-up", "ours tp=1", "vLLM tp=1", 0.2, at_least=False))
    largest = f"decode {decoded[-1]}"
    judged.append(_of(measured, f"transformers, decode, batch {decoded[-1]}", largest, "ours tp=1", "transformers", 4.0))
    judged.append(Figure("bandwidth limit, decode, batch 1", 0.85, True, _of_limit(measured.get("limit", {}), parameter_bytes)))
    judged.append(_of(measured, "lm_eval hf, shared-prefix choices", "choices", "ours tp=1", "hf", 6.0, inverse=True))
    judged += [
        _of(measured, f"tp=2 over tp=1, decode, batch {batch}", f"decode {batch}", "ours tp=2", "ours tp=1", 0.95) for batch in decoded
    ]
    judged.append(_of(measured, "fsdp=2 over replicas=2, scoring", "scoring", "ours fsdp=2", "ours replicas=2", 0.7))
    judged.append(_of(measured, "top-p 0.95 over greedy, time of a step", "sampled", "top-p 0.95", "greedy", 1.1, at_least=False))
    off = "ours, features off"
    twins = _of(measured, "twins", "idle", f"{off} again", off, IDLE).reached
    unseen = IDLE if twins is None else max(IDLE, twins.median, 1 / twins.median)  # two processes that do the same differ by as much
    judged.append(_of(measured, "features on and not used over off", "idle", "ours tp=1", off, unseen, at_least=False))
    judged.append(Figure("steepest rise of the curve over proportion", TOLERANCE, False, steepest(measured)))
    return judged


def steepest(measured: Measured) -> Ratio | None:
    """How much the time of a step grows between two neighbours of a curve, over how much what it computes grows: least, and most of all."""
    rises = []
    for name, curve in measured.items():
        if name.startswith("curve"):
            points = sorted((int(place), median(values)) for place, values in curve.items())
            rises += [after / before / (larger / size) for (size, before), (larger, after) in pairwise(points)]
    return Ratio(max(rises), min(rises), max(rises)) if rises else None


def _of(
    measured: Measured, name: str, workload: str, label: str, other: str, asked: float, at_least: bool = True, inverse: bool = False
) -> Figure:
    """The ratio of two labels of a workload; `inverse` where less is faster and faster is asked for."""
    values, others = (measured.get(workload, {}).get(key) for key in (label, other))
    if inverse:
        values, others = others, values
    return Figure(name, asked, at_least, Ratio.of(values, others) if values and others else None)


def _of_limit(limit: Mapping[str, list[float]], parameter_bytes: int) -> Ratio | None:
    """Decode rate over the rate at which products with one row read all weights; the fastest kind of product counts."""
    ways = [values for label, values in limit.items() if label.startswith("GEMV")]
    rates = next((values for label, values in limit.items() if label.startswith("ours")), None)
    if not ways or not rates:
        return None
    most = [max(round_) for round_ in zip(*ways, strict=True)]
    return Ratio.of(rates, [1e9 * bandwidth / parameter_bytes for bandwidth in most])
