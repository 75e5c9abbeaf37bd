"""Result files of an evaluation, laid out as lm-evaluation-harness lays out its own, with what made them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lm_eval.utils import handle_non_serializable, hash_string, make_table, sanitize_list

from dist_infer.evaluation.whole_file import write_whole

RESULTS = "results.json"


def write_results(directory: Path, results: dict[str, Any], about: dict[str, Any]) -> None:
    """Write `results.json` and, where there are samples, `samples_TASK.jsonl`; the first comes last, so that it says all is there.

    Args:
        directory: Made if it is not there.
        results: From the harness; left as it is.
        about: Becomes the object `dist_infer` of `results.json`: checkpoint, provenance and the like.

    Raises:
        OSError: The files cannot be written; none is half there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    samples = results.get("samples") or {}
    hashes = {}
    for task, rows in samples.items():
        hashes[task] = hash_string("".join(row["doc_hash"] + row["prompt_hash"] + row["target_hash"] for row in rows))
        write_whole(directory / f"samples_{task}.jsonl", (_json(_sample(row)) + "\n" for row in rows))
    rest = {key: value for key, value in results.items() if key != "samples"} | {"task_hashes": hashes, "dist_infer": about}
    write_whole(directory / RESULTS, [_json(rest, indent=2)])


def table(results: dict[str, Any]) -> str:
    """What people look at first: each metric of each task, and of groups where there are any."""
    shown = make_table(results)
    return f"{shown}\n{make_table(results, 'groups')}" if results.get("groups") else shown


def _sample(row: dict[str, Any]) -> dict[str, Any]:
    """A question and what came of it, as the harness's own files have it."""
    arguments = {f"gen_args_{i}": {f"arg_{j}": value for j, value in enumerate(group)} for i, group in enumerate(row["arguments"])}
    texts = {name: sanitize_list(row[name]) for name in ("resps", "filtered_resps")}
    return row | texts | {"arguments": arguments, "target": str(row["target"])}


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent, default=handle_non_serializable, ensure_ascii=False)
