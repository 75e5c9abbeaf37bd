"""Other weights for a running model: the answers are the new checkpoint's, and a checkpoint that does not fit changes nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from dist_infer import LLM, SamplingParams
from tests.engine.references import greedy, make_model
from tests.ranks import Ranks

PROMPTS = [[1, 2, 3], list(range(40)), [*range(40), 7], [99]]  # two share whole blocks
OPTIONS = ["device=cpu", "model.dtype=float32", "model.tokenizer=none", "engine.block_size=4", "engine.kv_cache_gib=0.001"]
LENGTH = 6


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three of one architecture."""
    root = tmp_path_factory.mktemp("swap")
    for seed in range(3):
        make_model(root / str(seed), seed=seed)
    return [root / str(seed) for seed in range(3)]


@pytest.fixture(scope="module")
def expected(checkpoints: list[Path]) -> list[list[list[int]]]:
    """Of each checkpoint the greedy tokens of each prompt, by transformers."""
    return [[greedy(path, prompt, LENGTH).tokens for prompt in PROMPTS] for path in checkpoints]


def ask(llm: LLM) -> list[list[int]]:
    """Greedy tokens of each prompt; empty on ranks other than the conductor."""
    return [result.outputs[0].token_ids for result in llm.generate(PROMPTS, SamplingParams(max_tokens=LENGTH))]


def swap_on_rank(paths: Sequence[str], axes: dict[str, Any], options: Sequence[str]) -> list[Any]:
    """What a script gets: answers of each checkpoint in turn, one that does not fit among them."""
    with LLM(paths[0], **axes, overrides=[*OPTIONS, *options]) as llm:
        said: list[Any] = [ask(llm)]
        for path in paths[1:]:
            llm.prefetch(path)
            try:
                llm.swap(path)
            except ValueError as error:
                said.append(str(error))
            said.append(ask(llm))
        said.append(llm.provenance["checkpoint"])
    return said


@pytest.mark.parametrize(
    "axes", [{"tp": 1}, {"tp": 2}, {"fsdp": 2}, {"replicas": 2}, {"tp": 2, "fsdp": 2}, {"tp": 2, "replicas": 2}], ids=str
)
def test_every_rank_of_a_script_swaps(
    ranks: Ranks, checkpoints: list[Path], expected: list[list[list[int]]], axes: dict[str, int], tmp_path: Path
) -> None:
    make_model(tmp_path, num_hidden_layers=3)
    paths = [str(checkpoints[0]), str(checkpoints[1]), str(tmp_path), str(checkpoints[2])]
    once = ["loader.read=once"] if "replicas" in axes else []
    answers = ranks(math.prod(axes.values())).run(swap_on_rank, paths, axes, once)
    problem = f"swap to {tmp_path}: layers is 3 there and 2 in the running model; load it as a new one"
    assert answers[0] == [expected[0], expected[1], problem, expected[1], expected[2], paths[3]]
    assert all(answer == [[], [], problem, [], [], paths[3]] for answer in answers[1:])


def test_ranks_that_serve_hear_of_it(checkpoints: list[Path], expected: list[list[list[int]]], tmp_path: Path) -> None:
    make_model(tmp_path, hidden_size=60)
    with LLM(str(checkpoints[0]), tp=2, replicas=2, overrides=OPTIONS) as llm:
        assert ask(llm) == expected[0]
        llm.swap(str(checkpoints[1]))
        assert ask(llm) == expected[1]
        with pytest.raises(ValueError, match="hidden_size is 60 there and 48 in the running model"):
            llm.swap(str(tmp_path))
        assert ask(llm) == expected[1]
        llm.swap(str(checkpoints[2]))
        assert ask(llm) == expected[2]


def test_packed_weights_are_packed_anew(checkpoints: list[Path]) -> None:
    options = [*OPTIONS, "model.dtype=bfloat16"]
    with LLM(str(checkpoints[1]), overrides=options) as fresh, LLM(str(checkpoints[0]), overrides=options) as llm:
        before = ask(llm)
        llm.swap(str(checkpoints[1]))
        assert ask(llm) == ask(fresh) != before


def test_content_hash_follows(checkpoints: list[Path]) -> None:
    with LLM(str(checkpoints[0]), overrides=[*OPTIONS, "loader.verify=full"]) as llm:
        first = llm.provenance["content_hash"]
        llm.swap(str(checkpoints[1]))
        assert first and llm.provenance["content_hash"] not in (None, first)


def test_a_request_is_running(checkpoints: list[Path], expected: list[list[list[int]]]) -> None:
    with LLM(str(checkpoints[0]), overrides=OPTIONS) as llm:
        stream = llm.stream(PROMPTS[0], SamplingParams(max_tokens=LENGTH))
        next(stream)
        with pytest.raises(ValueError, match="a request is still running"):
            llm.swap(str(checkpoints[1]))
        stream.close()  # type: ignore[attr-defined]
        llm.swap(str(checkpoints[1]))
        assert ask(llm) == expected[1]


def test_prefetch_keeps_its_error_for_the_swap(checkpoints: list[Path], expected: list[list[list[int]]]) -> None:
    with LLM(str(checkpoints[0]), overrides=OPTIONS) as llm:
        llm.prefetch("no/such/place/at all")
        assert ask(llm) == expected[0]
        with pytest.raises(ValueError, match="no/such/place/at all: no such path"):
            llm.swap("no/such/place/at all")
        llm.prefetch(str(checkpoints[1]))
        ahead = llm._session.resident._ahead
        assert ahead is not None
        ahead.wait()
        assert ahead.bytes_read == sum(tensor.nbytes for tensor in load_file(checkpoints[1] / "model.safetensors").values())
        llm.swap(str(checkpoints[1]))
        assert ask(llm) == expected[1]


def damaged(path: Path, target: Path) -> str:
    """A copy whose last weight is not finite: that shows when the others have been overwritten."""
    target.mkdir()
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"][-1] = math.nan
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_text((path / "config.json").read_text())
    return str(target)


def test_without_weights_nothing_is_answered_until_others_come(
    checkpoints: list[Path], expected: list[list[list[int]]], tmp_path: Path
) -> None:
    with LLM(str(checkpoints[0]), tp=2, overrides=OPTIONS) as llm:
        assert ask(llm) == expected[0]
        with pytest.raises(ValueError, match=r"model\.norm\.weight\[47\] is nan"):
            llm.swap(damaged(checkpoints[1], tmp_path / "damaged"))
        with pytest.raises(RuntimeError, match=r"the weights were lost when .* could not be loaded"):
            ask(llm)
        llm.swap(str(checkpoints[1]))
        assert ask(llm) == expected[1]


def fail_on_rank(path: str, broken: str, axes: dict[str, int]) -> list[Any]:
    """How a rank of a script hears of a swap that failed in the middle, and what it answers when the first weights are back."""
    with LLM(path, **axes, overrides=OPTIONS) as llm:  # type: ignore[arg-type]
        try:
            llm.swap(broken)
            heard = "nothing"
        except ValueError as error:
            heard = str(error)
        llm.swap(path)
        return [heard, ask(llm)]


@pytest.mark.parametrize("axes", [{"replicas": 2}, {"fsdp": 2}], ids=str)
def test_all_ranks_hear_of_a_swap_that_fails_in_the_middle(
    ranks: Ranks, checkpoints: list[Path], expected: list[list[list[int]]], tmp_path: Path, axes: dict[str, int]
) -> None:
    heard = ranks(2).run(fail_on_rank, str(checkpoints[0]), damaged(checkpoints[1], tmp_path / "damaged"), axes)
    assert all("model.norm.weight[47] is nan" in text for text, _ in heard)
    assert [answer for _, answer in heard] == [expected[0], []]


def test_the_configuration_counts_not_the_shapes_alone(checkpoints: list[Path], tmp_path: Path) -> None:
    config = json.loads((checkpoints[1] / "config.json").read_text())
    config["rms_norm_eps"] = 0.5
    (tmp_path / "model.safetensors").write_bytes((checkpoints[1] / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with LLM(str(checkpoints[0]), overrides=OPTIONS) as llm, pytest.raises(ValueError, match=r"norm_eps is 0\.5 there"):
        llm.swap(str(tmp_path))
