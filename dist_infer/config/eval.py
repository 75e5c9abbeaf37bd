"""What is asked of a model: tasks of lm-evaluation-harness, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dist_infer.config.field import option


@dataclass
class EvalOptions:
    """Tasks and their settings; what is not given here is as the task says."""

    tasks: list[str] = option([], "tasks, groups and tags of lm-evaluation-harness; patterns such as mmlu_* are allowed")
    include_path: str | None = option(None, "directory with further task files")
    num_fewshot: int | None = option(None, "examples before each question; default: the task's", low=0)
    limit: float | None = option(None, "questions a task, or below 1 the part of them", above=0)
    chat_template: bool = option(False, "put each question into the model's chat template")
    system_instruction: str | None = option(None, "system message, or text before each question")
    fewshot_as_multiturn: bool = option(True, "with chat_template: each example is a turn of the conversation")
    gen_kwargs: dict[str, Any] = option({}, "over the tasks' own settings of generation, such as {max_gen_toks: 64}")
    bootstrap_iters: int = option(10_000, "samples for standard errors that have no formula", low=0)
    log_samples: bool = option(True, "write each question and answer to samples_TASK.jsonl")
    fewshot_seed: int = option(1234, "chooses the examples", low=0)
