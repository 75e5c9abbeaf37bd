"""How ranks leave that a script never sent away: when it ends, by an error at that, and when it lets go of the model."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from typing import Any

import pytest

from dist_infer import LLM
from tests.engine.references import reference

# Says which threads and processes of ours are there, last of all when Python is about to end.
SCRIPT = """
import atexit, os, sys, threading
from dist_infer import LLM

def say_what_is_left():
    threads = [thread.name for thread in threading.enumerate() if "heart" in thread.name or "watchdog" in thread.name]
    with open(f"/proc/self/task/{os.getpid()}/children") as children:
        print(len(threads), len(children.read().split()))

if __name__ == "__main__":
    atexit.register(say_what_is_left)
    llm = LLM(sys.argv[1], tp=2, overrides=["device=cpu"])
    print(len(llm.generate([[5, 6, 7]])[0].outputs))
    say_what_is_left()
    if sys.argv[2] == "keep":
        raise RuntimeError("of the script's own")
    del llm
    say_what_is_left()
"""


def test_ranks_leave_with_the_script_that_started_them() -> None:
    processes = {
        way: subprocess.Popen(
            [sys.executable, "-c", SCRIPT, reference("kempnerforge").path, way], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for way in ("keep", "let go")
    }
    said = {way: process.communicate(timeout=300) for way, process in processes.items()}
    printed = {way: out.splitlines() for way, (out, _) in said.items()}
    assert printed == {"keep": ["1", "3 1", "0 0"], "let go": ["1", "3 1", "0 0", "0 0"]}, said
    assert {way: process.returncode for way, process in processes.items()} == {"keep": 1, "let go": 0}
    assert said["keep"][1].endswith("RuntimeError: of the script's own\n")
    assert not any("dist-infer:" in err for _, err in said.values()), said


def test_a_closed_model_has_given_its_memory_back() -> None:
    with LLM(reference("kempnerforge").path, overrides=["device=cpu"]) as llm:
        assert len(llm.generate([[5, 6, 7]])) == 1
        runner = llm._session.runner
        held = [weakref.ref(part) for part in (runner.cache, runner.decoder, *runner.decoder.parameters())]
        del runner
    gc.collect()
    assert [part() for part in held] == [None] * len(held)
    assert llm.provenance["topology"]["tp"] == 1
    for ask in (lambda: llm.generate([[5]]), lambda: llm.score([([5], [6])]), lambda: list(llm.stream([5])), lambda: llm.swap("elsewhere")):
        with pytest.raises(RuntimeError, match="the model is closed"):
            ask()
    llm.close()
    llm._session.close()


def test_a_stream_does_not_outlive_its_model() -> None:
    for asked in (False, True):
        llm = LLM(reference("kempnerforge").path, overrides=["device=cpu", "engine.overlap=true"])
        stream = llm.stream([5, 6, 7])
        assert next(stream)
        llm.close()
        if asked:
            with pytest.raises(RuntimeError, match="the model is closed"):
                next(stream)
        stream.close()  # type: ignore[attr-defined]


def test_what_is_interrupted_is_forgotten() -> None:
    with LLM(reference("kempnerforge").path, overrides=["device=cpu", "engine.overlap=true"]) as llm:
        expected = llm.generate([[5, 6, 7], [8]])
        runner, steps = llm._session.runner, 0
        forward = runner._forward

        def interrupted(*args: Any) -> None:
            nonlocal steps
            steps += 1
            forward(*args)
            if steps == 4:
                raise KeyboardInterrupt

        runner._forward = interrupted
        with pytest.raises(KeyboardInterrupt):
            llm.generate([[9, 10], [11], [12, 13, 14]])
        again = llm.generate([[5, 6, 7], [8]])
    assert [result.outputs[0].token_ids for result in again] == [result.outputs[0].token_ids for result in expected]
