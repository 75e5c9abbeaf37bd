"""What is seen of a sweep while it runs: one line, and a file of figures."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

from dist_infer.distributed.logs import console
from dist_infer.engine.request import Result

REDRAW_S = 0.2  # on a terminal
LINE_S, LINE_PART, LEAST_S = 30.0, 0.05, 5.0  # into a file: a line at least so often; or when so much was done, but no oftener than this
RATE_S = 30.0  # tokens/s is of the last so many seconds
METRICS_S = 5.0


class Progress:
    """Requests done and to do, tokens/s, time left, replicas and checkpoint, on rank 0's console and in `metrics.jsonl`.

    On a terminal it is one line, drawn again in place; elsewhere a plain line now and then. It has no thread: what it is told moves it.
    Lines of others are printed with `tqdm.write(line, file=console())`, so that they do not run into it.
    """

    def __init__(
        self, total: int = 0, directory: Path | None = None, replicas: int = 1, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Begin with `total` requests.

        Args:
            total: Requests known of so far.
            directory: Where `metrics.jsonl` is appended to; None for no file.
            replicas: Replicas that share the requests; all of them are alive while the run is, for it ends with the first that is not.
            clock: Seconds that go on.

        Raises:
            OSError: The file cannot be written.
        """
        self._total, self._done, self._found, self._failed, self._tokens = total, 0, 0, 0, 0
        self._expected, self._line = 0, ""
        self._replicas, self._clock, self._checkpoint = replicas, clock, ""
        self._metrics = open(directory / "metrics.jsonl", "ab", buffering=0) if directory is not None else None  # noqa: SIM115
        now = clock()
        self._began = self._drawn = self._written = now
        self._drawn_done = 0
        self._samples: deque[tuple[float, int]] = deque([(now, 0)])
        self._bar = tqdm(total=0, bar_format="{desc}", file=console(), leave=False) if console().isatty() else None

    def checkpoint(self, label: str) -> None:
        """Requests are of checkpoint `label` from now on."""
        self._checkpoint = label
        self._show(force=self._bar is not None)

    def add(self, count: int) -> None:
        """There are `count` more requests than was known, some of which were expected."""
        self._total += count
        self._expected = max(0, self._expected - count)

    def expect(self, count: int) -> None:
        """About `count` requests are to come that are not known yet."""
        self._expected = count

    def found(self, count: int) -> None:
        """The results of `count` requests are there from an earlier run."""
        self._done += count
        self._found += count
        self._show()

    def take(self, results: Sequence[Result]) -> None:
        """These have finished."""
        for result in results:
            self._failed += result.error is not None
            if result.usage is not None:
                self._tokens += result.usage.completion_tokens or result.usage.prompt_tokens
        self._done += len(results)
        self._show()

    def close(self) -> None:
        """The last line and the last figures."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._show(force=True)
        self._write()
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None

    def __enter__(self) -> Progress:
        """Itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Close."""
        self.close()

    def __str__(self) -> str:
        """The line."""
        total = self._total + self._expected
        share = f" ({self._done / total:.0%})" if total else ""
        parts = [f"{self._done:,}/{'about ' * bool(self._expected)}{total:,} requests{share}"]
        if self._checkpoint:
            parts.insert(0, self._checkpoint)
        if self._found:
            parts.append(f"{self._found:,} from the journal")
        if self._failed:
            parts.append(f"{self._failed:,} failed")
        parts.append(f"{self._rate():,.0f} tokens/s")
        left = self._seconds_left()
        if left is not None:
            parts.append(f"{in_time(left)} left" if left else f"took {in_time(self._clock() - self._began)}")
        parts.append(f"{self._replicas} replica{'s' * (self._replicas != 1)}")
        return " | ".join(parts)

    def _show(self, force: bool = False) -> None:
        """Draw the line, and write figures, if it is time to."""
        now = self._clock()
        if now - self._samples[-1][0] >= 1.0:
            self._samples.append((now, self._tokens))
            while len(self._samples) > 2 and now - self._samples[1][0] > RATE_S:
                self._samples.popleft()
        since, done = now - self._drawn, self._done - self._drawn_done
        due = since >= (REDRAW_S if self._bar is not None else LINE_S)
        due = due or (self._bar is None and since >= LEAST_S and done >= LINE_PART * max(1, self._total + self._expected))
        if force or due:
            self._drawn, self._drawn_done = now, self._done
            if self._bar is not None:
                columns = os.get_terminal_size(console().fileno()).columns or 80
                self._bar.set_description_str(f"dist-infer: {self}"[: columns - 1])
            elif str(self) != self._line:
                self._line = str(self)
                print(f"dist-infer: {self._line}", file=console(), flush=True)
        if now - self._written >= METRICS_S:
            self._write()

    def _write(self) -> None:
        """A line of figures. A disk that is full ends the figures; what matters more will say so itself."""
        self._written = self._clock()
        if self._metrics is None:
            return
        figures = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "requests": self._done,
            "total": self._total + self._expected,
            "found": self._found,
            "failed": self._failed,
            "tokens": self._tokens,
            "tokens_per_s": round(self._rate(), 1),
            "replicas": self._replicas,
            "checkpoint": self._checkpoint,
            "rss": resident_bytes(),
        }
        try:
            self._metrics.write(json.dumps(figures).encode() + b"\n")
        except OSError:
            self._metrics.close()
            self._metrics = None

    def _rate(self) -> float:
        """Tokens a second, lately; of the whole run when all is done."""
        then, tokens = self._samples[0] if self._done < self._total else (self._began, 0)
        return (self._tokens - tokens) / max(self._clock() - then, 1e-3)

    def _seconds_left(self) -> float | None:
        """At the speed so far; None while there is none."""
        ran = self._done - self._found
        left = self._total + self._expected - self._done
        return left * (self._clock() - self._began) / ran if ran and left >= 0 else None


def in_time(seconds: float) -> str:
    """Seconds as people read them: 7 s, 3 min, 2 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def resident_bytes() -> int:
    """Memory this process holds; 0 where the kernel does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
