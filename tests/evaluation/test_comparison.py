"""The benchmarks' comparison: sides are still while it is not their turn, and its numbers are what they are called."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from benchmarks.figures import Figure, Ratio, figures, steepest
from benchmarks.side import Side, SideFailed
from benchmarks.workloads import decode_rate, step_ms

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CHILD = f"""
import os, subprocess, sys
sys.path.insert(0, {str(BENCHMARKS)!r})
from serving import serve

def make():
    sleeper = subprocess.Popen(["sleep", "600"])
    def fail():
        print("it is broken", file=sys.stderr)
        os._exit(3)
    return {{"pids": lambda: {{"pids": [os.getpid(), sleeper.pid]}}, "double": lambda value: {{"value": 2 * value}}, "fail": fail}}

serve(make)
"""


@pytest.fixture
def side(tmp_path: Path):
    """A side that starts a process of its own."""
    made = Side([sys.executable, "-c", CHILD], {}, tmp_path / "log", {"do": "double", "value": 1})
    yield made
    made.close()


def state(pid: int) -> str:
    """Of a process, as the kernel writes it; "gone" without one."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "gone"


def becomes(pids: list[int], states: str) -> bool:
    """Whether all processes come to one of `states` within seconds."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if all(state(pid) in states.split() for pid in pids):
            return True
        time.sleep(0.01)
    return False


def test_side_is_stopped_between_its_turns_with_all_it_started(side: Side) -> None:
    """A stopped process takes no time from others, and goes on when it is asked."""
    pids = side.ask(do="pids")["pids"]
    assert side.first_token_s > 0
    assert becomes(pids, "T")
    assert side.ask(do="double", value=21) == {"value": 42}
    assert becomes(pids, "T")
    side.close()
    assert becomes(pids, "gone Z")  # whoever adopts orphans may be slow to bury them


def test_side_that_ends_says_why(side: Side) -> None:
    """The last line of its log is the reason."""
    with pytest.raises(SideFailed, match=r"^it is broken$"):
        side.ask(do="fail")


def test_only_steps_of_the_whole_batch_count() -> None:
    """Prefill, the step in which some sequence is not there yet, and the tail are left out."""
    answer = {"times": [1.0, 1.5, 1.6, 1.8, 1.9], "counts": [1, 4, 7, 10, 11], "first": 1.5}
    assert step_ms(answer, 3) == pytest.approx(150)
    assert decode_rate(answer, 3) == pytest.approx(6 / 0.3)


def test_ratios_are_of_rounds() -> None:
    """The median of ratios is not the ratio of medians; what was measured once stands beside every round."""
    assert Ratio.of([1, 8, 9], [1, 2, 10]) == Ratio(1.0, 0.9, 4.0)
    assert Ratio.of([2, 4, 6], [2]) == Ratio(2.0, 1.0, 3.0)


def test_steepest_rise_is_found_on_any_curve() -> None:
    """From 16 to 17 sequences a step may take 17/16 of the time."""
    curves = {"curve of batches": {"1": [10.0], "17": [21.25], "16": [10.0]}, "curve of contexts": {"128": [1.0], "256": [2.0]}, "mix": {}}
    rise = steepest(curves)
    assert rise is not None and rise.median == pytest.approx(2.0)
    assert steepest({"mix": {"ours": [1.0]}}) is None


def test_figures_are_judged_against_what_is_asked() -> None:
    """More is asked of rates, less of times; what was not measured is not judged."""
    measured = {
        "decode 1": {"ours tp=1": [60.0, 66.0], "vLLM tp=1": [50.0, 50.0]},
        "start-up": {"ours tp=1": [4.0, 6.0], "vLLM tp=1": [20.0]},
        "limit": {"ours tp=1": [50.0], "GEMV, ours": [40.0], "GEMV, oneDNN": [30.0]},
        "choices": {"ours tp=1": [10.0], "hf": [70.0]},
    }
    judged = {figure.name: figure for figure in figures(measured, int(0.6e9), [1, 8, 32], ["prefill 1x2048"])}

    def found(name: str) -> tuple[float, bool | None]:
        figure: Figure = judged[name]
        assert figure.reached is not None
        return figure.reached.median, figure.met

    assert found("vLLM tp=1, decode, batch 1") == (pytest.approx(1.26), True)
    assert found("vLLM tp=1, process start to first token") == (pytest.approx(0.25), False)
    assert found("bandwidth limit, decode, batch 1") == (pytest.approx(50 / (40 / 0.6)), False)
    assert found("lm_eval hf, shared-prefix choices") == (pytest.approx(7.0), True)
    assert judged["vLLM tp=2, decode, batch 32"].met is None


@pytest.mark.parametrize(("again", "met"), [([10.0, 10.0], False), ([10.6, 10.6], True), ([9.4, 9.4], True)])
def test_idle_features_are_judged_beside_two_processes_that_do_the_same(again: list[float], met: bool) -> None:
    idle = {"ours tp=1": [10.4, 10.4], "ours, features off": [10.0, 10.0], "ours, features off again": again}
    judged = {figure.name: figure for figure in figures({"idle": idle}, 1, [1, 8, 32], [])}
    assert judged["features on and not used over off"].met is met
