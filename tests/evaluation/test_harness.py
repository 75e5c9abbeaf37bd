"""lm-evaluation-harness gets the same from the engine as from its own `hf` model on the exported checkpoint, request by request."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lm_eval.api.metrics
import pytest
from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM

from dist_infer.cli.main import MISTAKE, main
from dist_infer.config.eval import EvalOptions
from dist_infer.config.options import read_options
from dist_infer.engine.blueprint import Blueprint
from dist_infer.engine.intake import Intake
from dist_infer.engine.request import Output, Request, Result, Score
from dist_infer.engine.session import Session
from dist_infer.evaluation.harness import HarnessModel, evaluate
from dist_infer.evaluation.plugin import PluginModel
from dist_infer.evaluation.quiet import quiet
from dist_infer.evaluation.tasks import Tasks, check_tasks
from tests.ranks import Ranks

EXAMPLE = Path(__file__).parents[2] / "examples/quickstart"
STEP = EXAMPLE / "run/step_200"  # some of its answers are wrong
OWN = str(EXAMPLE / "tasks")
FLOAT32 = (f"model.path={STEP}", "model.dtype=float32", "device=cpu")

PAIRS = [
    ("What is 3 + 50?", " 3 + 50 = 53."),
    ("What is 3 + 50?", " 3 + 50 = 54."),
    ("What is 3 + 50?", " 3"),
    ("What is ", "3 + 50?"),
    ("", "What is 3 + 50?"),
    ("", "<s>What is"),
    ("  ", "What"),
    ("<s>Sort 3 1 2:", " 1 2 3."),
    ("What is 3 + 50?", "</s>"),
    ("long " * 100 + "What is 3 + 50?", " 3 + 50 = 53."),
    ("long " * 60, "long " * 40),
    ("a", "b" * 256),
]
TEXTS = ["What is 3 + 50? 3 + 50 = 53.", "<s>What", "the quick fox " * 40, "x" * 256, "x" * 257]
PROMPTS: list[tuple[str, dict[str, Any]]] = [
    ("What is 3 + 50?", {"until": ["\n"], "max_gen_toks": 24}),
    ("What is 3 + 51?", {"until": ["= 5", "4"], "max_gen_toks": 24, "do_sample": False, "temperature": 0.7}),
    ("What is the capital of Peru?", {"until": ["</s>"], "max_gen_toks": 24, "num_beams": 1}),
    ("What is the capital of Peru?", {"until": "Lima", "max_new_tokens": 6}),
    ("<s>Sort 4 2 3:", {"max_gen_toks": 20}),
    ("long " * 100 + "What is 3 + 50?", {"until": [" = "], "max_gen_toks": 40}),
    ("Tell me", {"until": [], "max_gen_toks": 3}),
]


def instances(kind: Any, arguments: list[Any], task: str = "task") -> list[Instance]:
    """What the harness would ask."""
    return [Instance(kind, {}, given, 0, metadata=(task, number, 1)) for number, given in enumerate(arguments)]


def ask(model: Any) -> tuple[list[tuple[float, bool]], list[float], list[str]]:
    """Answers of a model to all of the above."""
    return (
        model.loglikelihood(instances("loglikelihood", PAIRS)),
        model.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,) for text in TEXTS])),
        model.generate_until(instances("generate_until", PROMPTS)),
    )


def model_of(session: Session, tasks: Tasks | None = None) -> HarnessModel:
    """The harness's model of a session of this process."""

    def run(requests: list[Request]) -> list[Result]:
        found: list[Result] = []
        session.run(requests, lambda _, results: found.extend(results))
        return sorted(found, key=lambda result: result.index)

    assert session.engine is not None
    return HarnessModel(Intake(session.blueprint), run, session.engine.max_model_len, versions=tasks.versions if tasks else None)


def ask_on_rank(*overrides: str) -> Any:
    """`ask`, on one of several ranks; None on those that only serve."""
    options = read_options([*FLOAT32, *overrides])
    session = Session(options, lambda: Blueprint.of(options), scripted=True)
    answers = None
    if session.is_conductor:
        answers = ask(model_of(session))
    else:
        for _ in range(3):
            session.serve()
    session.close()
    return answers


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> HFLM:
    """The harness's own model of the same weights."""
    path = tmp_path_factory.mktemp("harness") / "exported"
    assert main(["export", f"model.path={STEP}", f"output={path}", "model.dtype=float32"]) == 0
    # Its cache of logits takes the wrong rows where two requests are the same tokens, cut at different places.
    model = HFLM(pretrained=str(path), dtype="float32", device="cpu", logits_cache=False)
    model.model.generation_config.max_new_tokens = None  # which transformers would put over a task's max_gen_toks
    return model


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    """The model on one rank."""
    options = read_options([*FLOAT32, "engine.block_size=4"])
    with_one = Session(options, lambda: Blueprint.of(options), scripted=True)
    yield with_one
    with_one.close()


@pytest.fixture(scope="module")
def expected(hf: HFLM) -> Any:
    """What `hf` answers."""
    return ask(hf)


def check(answers: Any, expected: Any) -> None:
    """Compare what `ask` returned."""
    for (ours, greedy), (theirs, also_greedy) in zip(answers[0], expected[0], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4, rel=1e-6) and greedy == also_greedy
    assert answers[1] == pytest.approx(expected[1], abs=1e-4, rel=1e-6)
    assert answers[2] == expected[2]


def test_answers(session: Session, expected: Any, caplog: pytest.LogCaptureFixture) -> None:
    check(ask(model_of(session)), expected)
    assert [line for line in caplog.messages if "cut from the left" in line] == [
        "3 of 12 requests are longer than the model's 256 tokens: their contexts are cut from the left",
        "1 of 7 requests are longer than the model's 256 tokens: their contexts are cut from the left",
    ]
    assert session.engine is not None and session.engine.statistics.cached_tokens > 0  # questions share their context


@pytest.mark.parametrize("mesh", ["parallel.tp=2", "parallel.replicas=2"])
def test_answers_of_two_ranks(ranks: Ranks, mesh: str, expected: Any) -> None:
    check(ranks(2).run(ask_on_rank, mesh)[0], expected)


@pytest.mark.parametrize(
    "options",
    [
        EvalOptions(limit=12),
        EvalOptions(limit=6, num_fewshot=3, system_instruction="Answer:", gen_kwargs={"max_gen_toks": 16}),
        EvalOptions(limit=6, num_fewshot=2, chat_template=True),
        EvalOptions(limit=6, num_fewshot=2, chat_template=True, fewshot_as_multiturn=False, system_instruction="Be right."),
    ],
    ids=["plain", "fewshot", "chat", "chat-one-turn"],
)
def test_evaluations(session: Session, hf: HFLM, options: EvalOptions) -> None:
    options.tasks, options.include_path, options.bootstrap_iters = ["quickstart"], OWN, 0
    tasks = check_tasks(options)
    ours = evaluate(options, model_of(session, tasks), tasks)
    with quiet():
        theirs: Any = simple_evaluate(
            hf,
            tasks=tasks.chosen,
            task_manager=tasks.manager,
            limit=options.limit,
            num_fewshot=options.num_fewshot,
            apply_chat_template=options.chat_template,
            fewshot_as_multiturn=options.fewshot_as_multiturn,
            system_instruction=options.system_instruction,
            gen_kwargs=options.gen_kwargs or None,
            bootstrap_iters=0,
        )
    assert ours["results"] == theirs["results"] and set(ours["samples"]) == {"quickstart_choices", "quickstart_answers"}
    for task, samples in theirs["samples"].items():
        for mine, other in zip(ours["samples"][task], samples, strict=True):
            assert mine["arguments"] == other["arguments"]
            if task == "quickstart_answers":
                assert mine["resps"] == other["resps"]
            else:
                for [(score, greedy)], [(wanted, also)] in zip(mine["resps"], other["resps"], strict=True):
                    assert score == pytest.approx(wanted, abs=1e-4) and greedy == also


def test_an_evaluation_leaves_nothing_in_the_tasks(session: Session) -> None:
    base = {"tasks": ["quickstart"], "include_path": OWN, "limit": 2, "bootstrap_iters": 0}
    several = [EvalOptions(**base, num_fewshot=0), EvalOptions(**base, num_fewshot=2, gen_kwargs={"max_gen_toks": 3}), EvalOptions(**base)]
    shared = check_tasks(several[0])
    for options in several:
        own = check_tasks(options)
        again, alone = (evaluate(options, model_of(session), tasks) for tasks in (shared, own))
        assert again["samples"] == alone["samples"] and again["configs"] == alone["configs"]
    assert again["n-shot"] == {"quickstart_answers": 0, "quickstart_choices": 0}


def test_perplexity(session: Session, hf: HFLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a local file, with a standard error, for which no process is forked and nothing printed on standard output."""
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"{text} {i}"}) + "\n" for i, text in enumerate(TEXTS * 2)))
    (tmp_path / "task.yaml").write_text(
        f"task: texts\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/texts.jsonl}}, cache_dir: {tmp_path}/cache}}\n"
        "test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list:\n  - {metric: word_perplexity}\n  - {metric: bits_per_byte}\nmetadata: {version: 3}\n"
    )
    options = EvalOptions(tasks=["tex*"], include_path=str(tmp_path), bootstrap_iters=20)
    tasks = check_tasks(options)
    assert tasks.versions == {"texts": "3"}
    monkeypatch.setattr("multiprocessing.Pool", None)
    ours = evaluate(options, model_of(session, tasks), tasks)["results"]["texts"]
    with quiet():
        theirs: Any = simple_evaluate(hf, tasks=tasks.chosen, task_manager=tasks.manager, bootstrap_iters=20)
    numbers = {name: value for name, value in theirs["results"]["texts"].items() if isinstance(value, float)}
    assert len(numbers) >= 2 and {name: ours[name] for name in numbers} == pytest.approx(numbers, rel=1e-5)


def test_standard_errors_fork_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("multiprocessing.Pool", None)
    with quiet():
        assert lm_eval.api.metrics.bootstrap_stderr(max, [1.0, 2.0, 3.0], iters=10) > 0
    said = capsys.readouterr()
    assert said.out == "" and "it/s" not in said.err


def test_plugin(hf: HFLM) -> None:
    tasks = check_tasks(EvalOptions(tasks=["quickstart_answers"], include_path=OWN))
    arguments = {"tasks": tasks.chosen, "task_manager": tasks.manager, "limit": 5, "bootstrap_iters": 0}
    with quiet():
        ours: Any = simple_evaluate("dist_infer", model_args=f"path={STEP},model.dtype=float32", device="cuda:0", **arguments)
        theirs: Any = simple_evaluate(hf, **arguments)
    assert ours["results"] == theirs["results"] and ours["config"]["model_num_parameters"] == 791680
    with pytest.raises(ValueError, match=r"did you mean model\.dtype"):
        PluginModel(str(STEP), **{"model.dtyp": "float32"})


def test_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", *FLOAT32, "eval.tasks=[quickstart]", f"eval.include_path={OWN}", "eval.limit=8", f"output={tmp_path / 'a/out'}"]
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert "quickstart_choices" in said.out and "exact_match" in said.out and "it/s" not in said.err
    results = json.loads((tmp_path / "a/out/results.json").read_text())
    assert results["results"]["quickstart_choices"]["acc,none"] > 0.5 and "samples" not in results
    assert results["n-samples"]["quickstart_answers"]["effective"] == 8 and results["versions"]["quickstart_answers"] == 1.0
    about = results["dist_infer"]
    assert (
        about["checkpoint"] == str(STEP)
        and about["step"] == 200
        and about["provenance"]["identity"]
        and about["provenance"]["versions"]["lm_eval"]
    )
    assert results["config"]["model_sha"] == about["provenance"]["identity"]
    samples = [json.loads(line) for line in (tmp_path / "a/out/samples_quickstart_choices.jsonl").read_text().splitlines()]
    assert [sample["doc_id"] for sample in samples] == list(range(8)) and "gen_args_3" in samples[0]["arguments"]
    assert sorted(path.name for path in (tmp_path / "a/out").iterdir() if path.suffix in (".json", ".jsonl")) == [
        "results.json", "samples_quickstart_answers.jsonl", "samples_quickstart_choices.jsonl",
    ]  # fmt: skip
    assert main(arguments) == MISTAKE
    assert "it holds a results.json already" in capsys.readouterr().err
    (tmp_path / "a/out/results.json").rename(tmp_path / "first.json")
    assert main(arguments) == 0  # as after a cut: all is in the journal
    assert "40/40 requests (100%) | 40 from the journal" in capsys.readouterr().err
    assert json.loads((tmp_path / "a/out/results.json").read_text())["results"] == results["results"]


class Recorder:
    """Answers every request at once, and remembers them."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def __call__(self, requests: list[Request]) -> list[Result]:
        self.requests += requests
        return [Result(r.id, r.index, [Output("", r.token_ids[-1:], "stop")], Score(-1.0, True, [-1.0]), key=r.key) for r in requests]


def recorded(*overrides: str, identity: str = "id", version: str = "1", reverse: bool = False, times: int = 1) -> dict[str, Request]:
    """The requests that make up two tasks' questions, by key."""
    recorder = Recorder()
    model = HarnessModel(Intake(Blueprint.of(read_options([*FLOAT32, *overrides]))), recorder, 256, identity, {"task": version})
    order = -1 if reverse else 1
    model.loglikelihood(instances("loglikelihood", PAIRS[::order]))
    sampled = ("What is 3 + 50?", {"max_gen_toks": 4, "temperature": 0.8})
    asked = instances("generate_until", [*PROMPTS, sampled][::order])
    model.generate_until([instance for instance in asked for _ in range(times)])
    assert len({request.key for request in recorder.requests}) == len(recorder.requests)
    return {request.key: request for request in recorder.requests}


def test_keys_and_seeds_depend_on_what_is_asked_alone() -> None:
    first, again = recorded(), recorded(reverse=True)
    assert first.keys() == again.keys() and len(first) == len(PAIRS) + len(PROMPTS) + 1
    assert {key: request.seed for key, request in first.items()} == {key: request.seed for key, request in again.items()}
    assert not first.keys() & recorded(identity="other").keys() and not first.keys() & recorded(version="2").keys()
    # A seed changes what is sampled, and nothing else.
    seeded = recorded("sampling.seed=5")
    changed = [first[key] for key in first.keys() - seeded.keys()]
    assert [request.params.temperature for request in changed] == [0.8]
    # What is repeated runs once where it is greedy, and with seeds of its own where it is sampled.
    thrice = recorded(times=3)
    assert first.keys() < thrice.keys() and len(thrice) == len(first) + 2
    # What the user says of sampling goes over what a task says.
    warm = [request for request in recorded("sampling.temperature=0.5").values() if request.score_from is None]
    assert {request.params.temperature for request in warm} == {0.5}


def test_stop_sequences_that_are_special_tokens_stop_by_id() -> None:
    recorder = Recorder()
    model = HarnessModel(Intake(Blueprint.of(read_options(FLOAT32))), recorder, 256)
    model.generate_until(instances("generate_until", [("What", {"until": ["<pad>", "\n"], "max_gen_toks": 4})]))
    params = recorder.requests[0].params
    assert params.stop == ["<pad>", "\n", "</s>"] and params.stop_token_ids == [2, 1]  # they give no text


def test_a_failed_request_is_named(session: Session) -> None:
    def fail(requests: list[Request]) -> list[Result]:
        return [Result(request.id, request.index, error="no finite logits", key=request.key) for request in requests]

    model = HarnessModel(Intake(session.blueprint), fail, 256)
    with pytest.raises(RuntimeError, match="task/0/0: no finite logits"):
        model.loglikelihood(instances("loglikelihood", PAIRS[:1]))
    with pytest.raises(ValueError, match=r"task/0/0: the continuation has 257 tokens, and the longest sequence is 256"):
        model.loglikelihood(instances("loglikelihood", [("a", "b" * 257)]))
    with pytest.raises(ValueError, match="task/0/0: the continuation is empty"):
        model.loglikelihood(instances("loglikelihood", [("a", "")]))


MISTAKES = {
    "no task": ([], "eval.tasks is not given"),
    "no such task": (["eval.tasks=[quickstart_anwers]"], "did you mean quickstart_answers"),
    "include_path": (["eval.tasks=[quickstart]", "eval.include_path=no/such"], "eval.include_path=no/such: no such directory"),
    "room": (["eval.tasks=[quickstart]", "eval.gen_kwargs={max_gen_toks: 256}"], "leaves no room for a prompt"),
    "setting": (["eval.tasks=[quickstart]", "eval.gen_kwargs={num_beams: 4}"], "num_beams=4 is not supported"),
    "value": (["eval.tasks=[quickstart]", "eval.gen_kwargs={top_p: 7}"], "task quickstart_answers: sampling.top_p=7: must be"),
    "outputs": (["eval.tasks=[quickstart]", "sampling.n=2"], "sampling.n=2"),
    "tokenizer": (["eval.tasks=[quickstart]", "model.tokenizer=none"], "an evaluation needs one"),
    "output": (["eval.tasks=[quickstart]", f"output={__file__}"], "is no directory"),
    "prompts": (["eval.tasks=[quickstart]", "prompts=[a]"], "belong to generate"),
    "limit": (["eval.tasks=[quickstart]", "eval.limit=0"], "eval.limit=0"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = MISTAKES[name]
    assert main(["eval", *FLOAT32, f"eval.include_path={OWN}", *arguments]) == MISTAKE
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and message in said.err, said.err


def test_a_dataset_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(
        f"task: lost\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/none.jsonl}}}}\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_text: '{{text}}'\ndoc_to_target: '{{text}}'\n"
    )
    with pytest.raises(ValueError, match=r"task lost: its dataset json cannot be loaded \(FileNotFoundError: .*none.jsonl.*HF_HOME"):
        check_tasks(EvalOptions(tasks=["lost"], include_path=str(tmp_path)))


def test_without_the_harness(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["eval", *FLOAT32, "eval.tasks=[quickstart]"]) == MISTAKE
    assert "pip install 'dist_infer[eval]'" in capsys.readouterr().err
