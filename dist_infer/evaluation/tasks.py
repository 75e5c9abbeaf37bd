"""Tasks of lm-evaluation-harness: found by name, and loaded with their datasets."""

from __future__ import annotations

import difflib
import fnmatch
import logging
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from lm_eval.tasks import TaskManager

from dist_infer.config.eval import EvalOptions
from dist_infer.evaluation.quiet import quiet

BRING = "a dataset comes from the hub or, offline (HF_HUB_OFFLINE=1), from the cache below HF_HOME, filled where there is a network; "
BRING += "or give eval.include_path with tasks that read local files"


@dataclass
class Tasks:
    """Loaded tasks, with their datasets; they serve for any number of evaluations.

    Attributes:
        chosen: What was asked for: tasks and groups.
        tasks: All tasks by name, those in groups included.
        manager: Knows where each task came from.
    """

    chosen: list[Any]
    tasks: dict[str, Any]
    manager: TaskManager

    def __post_init__(self) -> None:
        self._own = {name: (task.config.num_fewshot, deepcopy(task.config.generation_kwargs)) for name, task in self.tasks.items()}

    def restore(self) -> None:
        """Make the tasks as they were loaded: the harness writes the options of an evaluation into them."""
        for name, (shots, generation) in self._own.items():
            config = self.tasks[name].config
            config.num_fewshot, config.generation_kwargs = shots, deepcopy(generation)

    @property
    def versions(self) -> dict[str, str]:
        """Version of each task by its name."""
        return {name: str(task.VERSION) for name, task in self.tasks.items()}


def check_tasks(options: EvalOptions) -> Tasks:
    """Find the tasks and load their datasets, which needs no model.

    Raises:
        ValueError: No task is named, there is none of such a name, or its dataset is not there; the message says what would help.
    """
    if not options.tasks:
        raise ValueError("eval.tasks is not given: name tasks, groups or tags of lm-evaluation-harness, such as eval.tasks=[arc_easy,mmlu]")
    if options.include_path is not None and not Path(options.include_path).is_dir():
        raise FileNotFoundError(f"eval.include_path={options.include_path}: no such directory; name one that holds task files (.yaml)")
    datasets.disable_progress_bars()
    manager, names = _find(options)
    chosen: list[Any] = []
    tasks: dict[str, Any] = {}
    for name in names:
        with quiet(logging.ERROR):  # its warnings are for authors of tasks
            loaded = _load(manager, name)
        group = loaded["groups"].get(name)
        chosen += [group] if group is not None else list(loaded["tasks"].values())
        tasks |= loaded["tasks"]
    return Tasks(chosen, tasks, manager)


def _find(options: EvalOptions) -> tuple[TaskManager, list[str]]:
    """Where tasks are described, and the names that the options stand for."""
    if options.include_path is not None:  # to look through the harness's own tasks takes seconds
        manager = TaskManager(include_path=options.include_path, include_defaults=False)
        if all(_matching(manager, name) for name in options.tasks):
            return manager, _names(manager, options.tasks)
    manager = TaskManager(include_path=options.include_path)
    return manager, _names(manager, options.tasks)


def _names(manager: TaskManager, wanted: Sequence[str]) -> list[str]:
    names: list[str] = []
    for name in wanted:
        matching = _matching(manager, name)
        if not matching:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else "`lm_eval ls tasks` lists them; give eval.include_path for your own"
            raise ValueError(f"eval.tasks: there is no task, group or tag {name!r}; {hint}")
        names += [match for match in matching if match not in names]
    return names


def _matching(manager: TaskManager, name: str) -> list[str]:
    return [name] if name in manager.all_tasks or Path(name).is_file() else fnmatch.filter(manager.all_tasks, name)


def _load(manager: TaskManager, name: str) -> Any:
    """A task, or the tasks of a group or tag, with their datasets."""
    try:
        return manager.load([name])
    except ImportError as error:
        raise ValueError(f"eval.tasks: task {name} needs a package that is not installed: {error}") from None
    except Exception as error:  # tasks run code of their own, and datasets raise what they like
        entry = manager.task_index.get(name)
        dataset = ((entry.cfg if entry is not None else None) or {}).get("dataset_path")
        what = f"task {name}: its dataset {dataset} cannot be loaded" if dataset else f"task {name} or its dataset cannot be loaded"
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ValueError(f"eval.tasks: {what} ({reason}); {BRING}") from None
