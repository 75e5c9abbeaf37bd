"""Reports: numbers as in the files, everything escaped, what is missing said."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dist_infer.cli.main import main
from dist_infer.evaluation.report import build_report
from dist_infer.evaluation.report.chart import curves, rows
from dist_infer.evaluation.report.collect import collect
from dist_infer.evaluation.report.compare import difference
from dist_infer.evaluation.report.entry import Measure, lines_of
from dist_infer.evaluation.report.overview import Overview
from dist_infer.evaluation.report.page import page
from dist_infer.evaluation.report.report import read
from dist_infer.evaluation.report.samples import MOST_BYTES, MOST_QUESTIONS

HOSTILE = '</script><script>alert(1)</script><img src=x onerror=alert(2)>"\u2028{{ 7 * 7 }}'
ACC = Measure("sums", "acc", "none")


def mean_and_error(values: list[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    return mean, (sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values)) ** 0.5


def write_results(directory: Path, rights: list[float], step: int | None, grid: dict[str, Any] | None = None, **about: Any) -> None:
    """One evaluation of the task `sums`, with its samples."""
    directory.mkdir(parents=True, exist_ok=True)
    mean, error = mean_and_error(rights)
    numbers = {"alias": "sums", "acc,none": mean, "acc_stderr,none": error, "ppl,none": 30.5, "ppl_stderr,none": "N/A"}
    checkpoint = f"/runs/a/step_{step}" if step is not None else f"/models/{directory.name}"
    made_by = {"checkpoint": checkpoint, "identity": f"id-{step}", "topology": {"tp": 2}, "options": {"model.dtype": "float32"}}
    results = {
        "results": {"sums": numbers},
        "versions": {"sums": 1.0},
        "n-shot": {"sums": 0},
        "higher_is_better": {"sums": {"acc": True, "ppl": False}},
        "n-samples": {"sums": {"original": 9000, "effective": len(rights)}},
        "dist_infer": {"checkpoint": checkpoint, "step": step, "label": directory.name, "grid": grid or {}, "provenance": made_by, **about},
    }
    (directory / "results.json").write_text(json.dumps(results))
    lines = []
    for number, right in enumerate(rights):
        sample = {"doc_id": number, "target": "1", "filter": "none", "metrics": ["acc"], "acc": right, "doc_hash": f"d{number}"}
        sample |= {"arguments": [[f"{number} + 1 =", " 7"], [f"{number} + 1 =", f" {number + 1}"]]}
        sample |= {"resps": [[["-2.5", "False"]], [["-1.25" if right else "-9.5", "True"]]]}
        lines.append(json.dumps(sample) + "\n")
    (directory / "samples_sums.jsonl").write_text("".join(lines))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A sweep of four checkpoints, each with more questions right."""
    for step, right in ((50, 2), (100, 5), (200, 9), (400, 12)):
        write_results(tmp_path / "night" / f"step_{step}", [1.0] * right + [0.0] * (20 - right), step)
    return tmp_path / "night"


class Page(HTMLParser):
    """What a browser would see of a page: elements, its table, its embedded data."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[list[dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.data: Any = None
        self._inside: list[str] = []
        self._data_next = False
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag == "tr":
            self.cells.append([])
        if tag == "td" and "data-value" in attributes:
            self.cells[-1].append(attributes)
        self._inside.append(tag)
        self._data_next = attributes.get("type") == "application/json"

    def handle_endtag(self, tag: str) -> None:
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._data_next:
            self.data, self._data_next = json.loads(data), False
        elif not self._inside or self._inside[-1] not in ("script", "style"):
            self.texts.append(data)

    def tags(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == name]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def report_of(*directories: Path) -> Page:
    """The page of a report, without the pictures, which take longest."""
    out = directories[0].parent / "report.html"
    overview, sheets = read(list(directories))
    out.write_text(page(overview, sheets, "Evaluation"), encoding="utf-8")
    return Page(out)


def test_numbers_are_those_of_the_files(run: Path) -> None:
    report = build_report([run], run / "report.html")
    written = {path.parent.name: json.loads(path.read_text())["results"]["sums"] for path in run.rglob("results.json")}
    seen = Page(report.page)
    values = [(row[0]["data-value"], float(row[1]["data-value"] or "nan")) for row in seen.cells if row]
    assert values == [(str(step), written[f"step_{step}"]["acc,none"]) for step in (50, 100, 200, 400)]
    assert "0.6000" in seen.text and "± 0.1124" in seen.text
    with open(report.summary, newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["metric"] == "acc"]
    for line in lines:
        assert float(line["value"]) == written[line["label"]]["acc,none"]
        assert float(line["stderr"]) == written[line["label"]]["acc_stderr,none"]
    assert "step_400  0.6000 ± 0.1124*" in report.table


def test_structure_of_the_page(run: Path) -> None:
    seen = report_of(run)
    assert seen.tags("html")[0]["lang"] == "en" and len(seen.tags("h1")) == 1 and seen.tags("title") and seen.tags("main")
    assert {section["aria-labelledby"] for section in seen.tags("section")} == {"curves", "results", "samples", "provenance"}
    assert all("scope" in heading for heading in seen.tags("th"))
    assert len([line for line in seen.tags("polyline")]) == 2  # acc, and ppl further down
    assert len([dot for dot in seen.tags("g") if dot.get("class") == "dot"]) == 8
    identifiers = [attributes["id"] for _, attributes in seen.elements if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    assert "id-400" in seen.text and "topology.tp" in seen.text


def test_page_needs_nothing_else(run: Path) -> None:
    seen = report_of(run)
    for tag, attributes in seen.elements:
        assert "src" not in attributes and tag not in ("link", "iframe", "object", "base", "img"), (tag, attributes)
        assert (attributes.get("href") or "#").startswith("#")
    policy = next(meta["content"] for meta in seen.tags("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'")


def test_hostile_text_stays_text(run: Path) -> None:
    clean = report_of(run)
    directory = run / "step_800"
    write_results(directory, [1.0, 0.0], 800, {"sampling.stop": HOSTILE}, label=HOSTILE, checkpoint=HOSTILE)
    results = json.loads((directory / "results.json").read_text())
    results["results"][HOSTILE] = {"alias": HOSTILE, f"{HOSTILE},{HOSTILE}": 0.5}
    results["dist_infer"]["provenance"][HOSTILE] = HOSTILE
    (directory / "results.json").write_text(json.dumps(results))
    sample = {"doc_id": HOSTILE, "target": HOSTILE, "filter": "none", "acc": 1.0, "arguments": [[HOSTILE, {}]], "resps": [[HOSTILE]]}
    (directory / "samples_sums.jsonl").write_text(json.dumps(sample) + "\n")
    (run / "status.json").write_text(json.dumps({"outcome": "failed", "error": HOSTILE, "rank": 1, "host": HOSTILE}))
    report = build_report([run], run / "report.html")
    seen = Page(report.page)
    assert len(seen.tags("script")) == len(clean.tags("script")) and not seen.tags("img")
    assert not [name for _, attributes in seen.elements for name in attributes if name.startswith("on")]
    assert seen.text.count("alert(1)") > 5 and "{{ 7 * 7 }}" in seen.text
    question = seen.data["sheets"][0]["questions"][-1]
    assert question["prompt"] == question["target"] == HOSTILE
    assert all(path.parent == report.page.parent / "plots" for path in report.plots)


def test_samples_of_each_kind(run: Path) -> None:
    directory = run / "step_400"
    results = json.loads((directory / "results.json").read_text())
    results["results"] |= {"words": {"match,strict": 0.5, "match,loose": 1.0}, "text": {"ppl,none": 9.0}}
    (directory / "results.json").write_text(json.dumps(results))
    generated = {
        "doc_id": 7,
        "target": "9",
        "arguments": {"gen_args_0": {"arg_0": "4 + 5 =", "arg_1": {"until": ["\n"]}}},
        "resps": [[" 9 or so"]],
    }
    strict = generated | {"filter": "strict", "filtered_resps": [" 9 or so"], "match": 0.0}
    loose = generated | {"filter": "loose", "filtered_resps": ["9"], "match": 1.0}
    (directory / "samples_words.jsonl").write_text(json.dumps(strict) + "\n" + json.dumps(loose) + "\n")
    rolling = {"doc_id": 0, "target": "a b", "arguments": [["a b"]], "resps": [["-3.25"]], "filter": "none", "ppl": [-3.25, 2]}
    (directory / "samples_text.jsonl").write_text(json.dumps(rolling) + "\n")
    output = {"id": "s1", "outputs": [{"text": "once"}, {"text": "twice"}]}
    (directory / "outputs_stories.jsonl").write_text(json.dumps(output) + "\n")
    sheets = {sheet["name"]: sheet for sheet in report_of(run).data["sheets"]}
    assert list(sheets) == ["sums", "words (strict)", "words (loose)", "text", "texts of stories"]
    choice = sheets["sums"]["questions"][3]
    assert choice == {"id": "3", "prompt": "3 + 1 =", "choices": [" 7", " 4"], "answer": 1, "target": "4"}
    assert sheets["sums"]["answers"]["3"][3] == {
        "question": 3,
        "value": 1.0,
        "right": True,
        "logprobs": [-2.5, -1.25],
        "greedy": [False, True],
    }
    (answer,) = sheets["words (loose)"]["answers"]["3"]
    assert answer == {"question": 0, "value": 1.0, "right": True, "texts": [" 9 or so"], "filtered": ["9"]}
    assert sheets["words (strict)"]["answers"]["3"][0]["right"] is False
    (answer,) = sheets["text"]["answers"]["3"]
    assert answer["logprobs"] == [-3.25] and answer["right"] is None and "choices" not in sheets["text"]["questions"][0]
    assert sheets["texts of stories"]["answers"]["3"][0]["texts"] == ["once", "twice"]


def test_thousands_of_samples_fit(tmp_path: Path) -> None:
    for step in (1, 2):
        write_results(tmp_path / "run" / f"step_{step}", [1.0, 0.0] * 2500, step)
    seen = report_of(tmp_path / "run")
    (sheet,) = seen.data["sheets"]
    assert sheet["total"] == 5000 and len(sheet["questions"]) == MOST_QUESTIONS
    assert all(len(answers) == MOST_QUESTIONS for answers in sheet["answers"].values())
    assert (tmp_path / "report.html").stat().st_size < 300_000


def test_long_texts_are_cut_to_fit(tmp_path: Path) -> None:
    for step in range(1, 31):
        directory = tmp_path / "run" / f"step_{step}"
        write_results(directory, [1.0] * MOST_QUESTIONS, step)
        sample = {"target": "x", "acc": 1.0, "arguments": [["q" * 50_000, {}]], "resps": [["a" * 50_000]]}
        lines = [json.dumps(sample | {"doc_id": number}) + "\n" for number in range(MOST_QUESTIONS // 4)]
        (directory / "samples_sums.jsonl").write_text("".join(lines))
    seen = report_of(tmp_path / "run")
    assert 10 <= len(seen.data["sheets"][0]["questions"]) <= MOST_QUESTIONS // 4
    assert "42,000" not in seen.text and "46,000 characters" in seen.data["sheets"][0]["questions"][0]["prompt"]
    assert (tmp_path / "report.html").stat().st_size < MOST_BYTES + (1 << 20)


def test_what_is_missing_is_said(run: Path) -> None:
    (run / "step_100" / "results.json").write_text('{"results": ')
    (run / "step_800").mkdir()
    (run / "step_800" / "samples_sums.jsonl").write_text("")
    results = json.loads((run / "step_200" / "results.json").read_text())
    results["results"] = {"other": {"acc,none": float("nan")}}
    (run / "step_200" / "results.json").write_text(json.dumps(results))
    (run / "status.json").write_text(json.dumps({"outcome": "failed", "error": "rank 3 was killed", "rank": 3, "host": "node2"}))
    text = report_of(run).text
    assert "step_100/results.json: cannot be read" in text
    assert "step_800: samples without results" in text
    assert "sums is missing for step_200" in text and "not a finite number: other acc" in text
    assert "ended as 'failed', rank 3 on node2: rank 3 was killed" in text


def test_a_failure_before_the_last_result_is_past(run: Path) -> None:
    write_results(run / "step_800", [1.0] * 20, 800, finished="2026-01-02T00:00:00+00:00")
    status = {"outcome": "stopped", "rank": 0, "host": "a"}
    (run / "status.json").write_text(json.dumps(status | {"time": "2026-01-01T00:00:00+00:00"}))
    assert collect([run])[1] == []
    (run / "status.json").write_text(json.dumps(status | {"time": "2026-01-03T00:00:00+00:00"}))
    assert len(collect([run])[1]) == 1


def test_unlike_tasks_are_said(run: Path) -> None:
    path = run / "step_200" / "results.json"
    results = json.loads(path.read_text())
    path.write_text(json.dumps(results | {"versions": {"sums": 2.0}}))
    assert [problem for problem in collect([run])[1] if "version is 1.0 here and 2.0 there" in problem]


def test_of_two_results_of_the_same_the_later_counts(run: Path) -> None:
    write_results(run / "again" / "step_400", [1.0] * 20, 400, finished="2026-02-01T00:00:00+00:00")
    entries, problems = collect([run])
    assert [entry.values[ACC].value for entry in entries if entry.step == 400] == [1.0]
    assert len(problems) == 1 and "left out" in problems[0]


def test_runs_are_compared_on_the_same_questions(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    for step, right in ((50, 2), (100, 17), (200, 9)):
        write_results(other / f"step_{step}", [1.0] * right + [0.0] * (20 - right), step)
    overview = Overview.of(*collect([run, other]))
    assert [line.name for line in overview.lines] == ["night", "other"]
    assert [comparison.after.step for comparison in overview.comparisons] == [50, 100, 200]
    same, better, _ = [comparison.differences[ACC] for comparison in overview.comparisons]
    assert same.value == 0 and not same.significant
    gains = [0.0] * 5 + [1.0] * 12 + [0.0] * 3
    assert better.test == "paired" and better.significant
    assert (better.value, better.stderr) == pytest.approx(mean_and_error(gains))
    seen = report_of(run, other)
    assert "1 of 3 exceed 1.96 standard errors" in seen.text and "3 are paired" in seen.text
    assert len([cell for cell in seen.tags("td") if "good" in (cell.get("class") or "")]) == 1


def test_without_samples_the_joint_standard_error_decides(run: Path, tmp_path: Path) -> None:
    write_results(tmp_path / "other" / "step_50", [1.0] * 6 + [0.0] * 14, 50)
    (tmp_path / "other" / "step_50" / "samples_sums.jsonl").unlink()
    entries, _ = collect([run, tmp_path / "other"])
    found = difference(entries[0], entries[-1], ACC)
    errors = [entry.values[ACC].stderr or 0 for entry in (entries[0], entries[-1])]
    assert found.test == "unpaired" and found.value == pytest.approx(0.2)
    assert found.stderr == pytest.approx((errors[0] ** 2 + errors[1] ** 2) ** 0.5) and not found.significant


def test_lines_are_named_by_what_differs(tmp_path: Path) -> None:
    for step in (1, 2):
        for seed in (1, 2):
            write_results(tmp_path / "run" / f"step_{step},sampling.seed={seed}", [1.0, 0.0], step, {"sampling.seed": seed})
    lines = lines_of(collect([tmp_path / "run"])[0])
    assert [line.name for line in lines] == ["sampling.seed=1", "sampling.seed=2"]
    assert [[entry.step for entry in line.entries] for line in lines] == [[1, 2], [1, 2]]


def test_marks_lie_where_the_values_say(run: Path) -> None:
    entries, _ = collect([run])
    chart = curves(ACC, lines_of(entries))
    assert chart is not None
    (trace,) = chart.traces
    assert [dot.text for dot in trace.dots][-1] == "step 400: 0.6000 ± 0.1124"
    (bottom, low), *_, (top, high) = [(y, float(text)) for y, text in chart.y_ticks]
    for dot, entry in zip(trace.dots, entries, strict=True):
        assert dot.y == pytest.approx(bottom + (top - bottom) * (entry.values[ACC].value - low) / (high - low), abs=0.2)
    steps = [dot.x for dot in trace.dots]
    assert (steps[2] - steps[0]) / (steps[3] - steps[0]) == pytest.approx(150 / 350, abs=0.01)


def test_checkpoints_without_a_step_get_rows(tmp_path: Path) -> None:
    write_results(tmp_path / "run" / "small", [1.0, 0.0], None)
    write_results(tmp_path / "run" / "large", [1.0, 1.0, 0.0], None)
    lines = lines_of(collect([tmp_path / "run"])[0])
    chart = rows(ACC, lines, stepped=False)
    assert curves(ACC, lines) is None and chart is not None
    assert [trace.dots[0].name for trace in chart.traces] == ["models/large", "models/small"]
    assert not report_of(tmp_path / "run").tags("polyline")


def test_parts_of_a_scored_group_stand_back(run: Path) -> None:
    path = run / "step_400" / "results.json"
    results = json.loads(path.read_text())
    results["groups"] = {"all": {"acc,none": 0.6}}
    path.write_text(json.dumps(results | {"group_subtasks": {"all": ["sums"]}}))
    overview = Overview.of(*collect([run]))
    assert [measure.task for measure in overview.main] == ["all"] and ACC in overview.measures


def test_pictures_are_written(run: Path) -> None:
    report = build_report([run], run / "report.html")
    assert [path.name for path in report.plots] == ["sums_acc.png", "sums_ppl.png"]
    for path in report.plots:
        assert path.read_bytes().startswith(b"\x89PNG") and path.parent == run / "plots"
    left = [path.name for path in run.rglob(".*")] + [path.name for path in run.rglob("*.partial")]
    assert left == []


def test_without_matplotlib_there_is_a_page(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report = build_report([run], run / "report.html")
    assert report.plots == [] and "matplotlib is not installed" in Page(report.page).text


def test_results_of_lm_eval_itself_are_read(tmp_path: Path) -> None:
    directory = tmp_path / "theirs" / "exported__step_200"
    write_results(directory, [1.0, 0.0, 1.0], 200)
    results = json.loads((directory / "results.json").read_text())
    del results["dist_infer"]
    results |= {
        "config": {"model": "hf", "model_args": {"pretrained": "exported/step_200"}},
        "date": 1795265968.2,
        "lm_eval_version": "0.4.13",
    }
    (directory / "results_2026-11-21T13-00-18.422095.json").write_text(json.dumps(results))
    (directory / "results.json").unlink()
    (directory / "samples_sums.jsonl").rename(directory / "samples_sums_2026-11-21T13-00-18.422095.jsonl")
    (entry,), problems = collect([tmp_path / "theirs"])
    assert (entry.label, entry.step, entry.checkpoint, problems) == ("step_200", 200, "exported/step_200", [])
    assert len(report_of(tmp_path / "theirs").data["sheets"][0]["questions"]) == 3


def test_command(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", "night"]) == 0
    shown = capsys.readouterr()
    assert "step_400  0.6000 ± 0.1124*" in shown.out and "night/report.html" in shown.out and (run / "report.html").is_file()
    write_results(tmp_path / "other" / "step_50,sampling.seed=1", [1.0, 0.0], 50)
    assert main(["report", "night", "other/step_50,sampling.seed=1"]) == 0
    assert Page(tmp_path / "comparison" / "report.html").data["entries"][-1] == "step_50,sampling.seed=1 / step_50,sampling.seed=1"
    assert main(["report", "night", f"output={tmp_path / 'here.html'}"]) == 0 and (tmp_path / "here.html").is_file()
    capsys.readouterr()
    assert main(["report", "--help"]) == 0 and "DIR..." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "no directory is given"),
        (["nowhere"], "nowhere: there is no such directory"),
        (["empty"], "empty: no results in it"),
        (["night", "output=page.txt"], "name an HTML file"),
        (["night", "output=no/page.html"], "there is no directory"),
        (["night", "sampling.sead=1"], "did you mean sampling.seed"),
    ],
)
def test_mistakes_take_one_line(
    run: Path, tmp_path: Path, words: list[str], reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert main(["report", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line and not (run / "report.html").exists()


def test_starts_without_torch() -> None:
    code = "import sys, dist_infer.cli.report; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
