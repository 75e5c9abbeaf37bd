"""How ranks leave that a script never sent away: when it ends, by an error at that, and when it lets go of the model."""

from __future__ import annotations

import subprocess
import sys

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
