"""A user's mistake gives one line on stderr and exit status 2, before a weight is read, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dist_infer.checkpoint import checkpoint as checkpoint_module
from dist_infer.cli.main import MISTAKE, main

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "examples/quickstart/run")
FIXTURES = ROOT / "tests/data/fixtures"
BAD = FIXTURES / "bad"
PROMPT = 'prompts=["What is 1 + 1?"]'


def bad(name: str) -> list[str]:
    """Arguments that name a damaged checkpoint written by KempnerForge."""
    return [
        f"model.path={BAD / name / 'checkpoints/step_3'}",
        f"model.config={BAD / name / 'config.toml'}",
        f"model.tokenizer={QUICKSTART}",
    ]


MISTAKES = {
    "no such path": (["model.path=/no/such/run"], "/no/such/run: no such path"),
    "not a checkpoint": ([f"model.path={ROOT / 'launch'}"], "a directory that is no checkpoint"),
    "no path": ([], "model.path is not given"),
    "no .metadata": ([f"model.path={BAD / 'c_no_metadata/checkpoints/step_3'}"], ".metadata"),
    "truncated": (bad("a_truncated_distcp"), "__1_0.distcp: has 334,040 bytes but"),
    "missing file": (bad("b_missing_distcp"), "__1_0.distcp: missing"),
    "hostile pickle": (bad("d_pickle_exec"), "asks for posix.system"),
    "vocabulary": (bad("i_vocab_mismatch"), "misshapen weight model.token_embedding.embedding.weight is 512x64"),
    "header": ([f"model.path={BAD / 'g_safetensors_header_too_long'}"], "model.safetensors: says its header has"),
    "missing shard": ([f"model.path={BAD / 'h_index_missing_shard'}"], "model-00002-of-00004.safetensors: missing"),
    "no tokenizer": ([f"model.path={FIXTURES / 'hf_llama'}"], "no tokenizer beside"),
    "unknown key": ([f"model.path={QUICKSTART}", "paralel.tp=2"], "did you mean parallel.tp?"),
    "unknown short key": ([f"model.path={QUICKSTART}", "tp=2"], "did you mean parallel.tp?"),
    "wrong type": ([f"model.path={QUICKSTART}", "parallel.tp=two"], "parallel.tp: Value 'two'"),
    "out of range": ([f"model.path={QUICKSTART}", "sampling.top_p=1.5"], "sampling.top_p=1.5: must be at most 1"),
    "not finite": ([f"model.path={QUICKSTART}", "sampling.temperature=nan"], "sampling.temperature=nan: must be a finite number"),
    "token id": ([f"model.path={QUICKSTART}", "sampling.stop_token_ids=[999]"], "token id 999"),
    "too many tp": ([f"model.path={QUICKSTART}", "parallel.tp=8"], "tp can be at most 4"),
    "kv memory": ([f"model.path={QUICKSTART}", "engine.kv_cache_gib=0.00001"], "the KV cache"),
    "too long": ([f"model.path={QUICKSTART}", "engine.max_model_len=4096"], "the model takes at most 256 tokens"),
    "dialect": ([f"model.path={QUICKSTART}", "model.dialect=torchtitan"], "no known model in this checkpoint"),
    "dialect value": ([f"model.path={QUICKSTART}", "model.dialect=fairseq"], "must be one of auto, huggingface"),
    "device": ([f"model.path={QUICKSTART}", "device=cuda"], "torch finds no CUDA device"),
    "config file": ([f"model.path={QUICKSTART}", "--config", "none.yaml"], "--config none.yaml"),
    "flag": ([f"model.path={QUICKSTART}", "--tp=2"], "there is no such flag"),
    "no equals sign": ([f"model.path={QUICKSTART}", "parallel.tp"], "an option is key=value"),
    "model.config": ([f"model.path={QUICKSTART}", "model.config=none.json"], "model.config=none.json: no such file"),
}


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if a weight is read."""

    def refuse(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(checkpoint_module, "read_all", refuse)


@pytest.mark.parametrize("name", MISTAKES)
def test_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = MISTAKES[name]
    if name == "device" and __import__("torch").cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert main(["generate", PROMPT, *arguments]) == MISTAKE
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("dist-infer: error: ") and said.err.count("\n") == 1, said.err
    assert message in said.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate"], "nothing to do"),
        (["generate", PROMPT, "input=x.jsonl"], "give prompts or input, not both"),
        (["generate", PROMPT, "output=x.jsonl"], "output=FILE goes with input=FILE"),
        (["generate", "input=none.jsonl", "output=x.jsonl"], "input=none.jsonl: no such file"),
        (["generate", f"input={__file__}", "output=no/such/x.jsonl"], "there is no directory"),
        (["generate", f"input={__file__}", f"output={__file__}"], "the file is there and complete"),
        (["score"], "give input=FILE.jsonl"),
        (["chat", PROMPT], "chat reads the terminal"),
        (["inspect", "model.path=/no/such/run"], "no such path"),
        (["speak"], "'speak' is no command"),
    ],
)
def test_one_line_of_commands(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = [] if arguments[0] in ("inspect", "speak") else [f"model.path={QUICKSTART}"]
    assert main([*arguments, *path]) == MISTAKE
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and message in said.err
    assert not Path("x.jsonl").exists() and not Path("x.jsonl.partial").exists()


def test_remote_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(FIXTURES / "hf_llama", tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.MineConfig"}}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    (tmp_path / "model/configuration_mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert main(["generate", PROMPT, f"model.path={tmp_path / 'model'}"]) == MISTAKE
    assert "mine" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_weights_missing_and_extra(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((FIXTURES / "hf_llama/config.json").read_text())
    for layers, message in ((3, "extra weight model.layers.3."), (5, "missing weight model.layers.4.")):
        (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
        assert main(["generate", PROMPT, f"model.path={FIXTURES / 'hf_llama'}", f"model.config={tmp_path / 'config.json'}"]) == MISTAKE
        assert message in capsys.readouterr().err


def test_help_needs_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys; from dist_infer.cli.main import main; main(['generate', '--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "parallel.tp" in done.stdout and "sampling.min_p" in done.stdout
