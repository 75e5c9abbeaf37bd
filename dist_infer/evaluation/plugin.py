"""`dist_infer` as a model of the lm_eval program and of `lm_eval.simple_evaluate`: importing this module registers it.

The harness has no way to find models of other packages, so its program is started as
`python -m dist_infer.evaluation.plugin --model dist_infer --model_args path=... --tasks ...`.
"""

from __future__ import annotations

import atexit
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model

from dist_infer.config.options import read_options
from dist_infer.distributed.launch import RankVariables
from dist_infer.engine.blueprint import Blueprint
from dist_infer.engine.intake import Intake
from dist_infer.engine.request import Request, Result
from dist_infer.engine.session import Session
from dist_infer.evaluation.harness import HarnessModel


@register_model("dist_infer")
class PluginModel(HarnessModel):
    """A model that starts its own ranks, and ends them with the process or `close`.

    Args:
        path: Checkpoint directory, or a Hugging Face id in the local cache.
        tp, fsdp, replicas: The mesh.
        device: cpu; anything else means a GPU where there is one, as the program always asks for cuda.
        batch_size, max_batch_size: Of no effect: the engine batches by itself.
        options: Any further options by dotted key, such as `model.dtype=float32`.

    Raises:
        ValueError, OSError: A mistake in the arguments, or the checkpoint is not as it should be.
    """

    def __init__(
        self,
        path: str,
        tp: int | None = None,
        fsdp: int | None = None,
        replicas: int | None = None,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        if RankVariables.read() is not None:
            raise ValueError("--model dist_infer starts its own ranks: leave torchrun or srun out and give tp=N, or use `dist-infer eval`")
        given = {"model.path": path, "parallel.tp": tp, "parallel.fsdp": fsdp, "parallel.replicas": replicas}
        given |= {"device": "cpu" if device == "cpu" else None, **options}
        merged = read_options([f"{key}={value}" for key, value in given.items() if value is not None])
        self._session = session = Session(merged, lambda: Blueprint.of(merged), scripted=True)
        atexit.register(self.close)
        checkpoint = session.blueprint.checkpoint
        assert session.engine is not None and checkpoint is not None
        super().__init__(Intake(session.blueprint), self._results, session.engine.max_model_len, checkpoint.identity)

    def close(self) -> None:
        """End the ranks and free their memory."""
        atexit.unregister(self.close)
        self._session.close()

    def _results(self, requests: list[Request]) -> list[Result]:
        found: list[Result] = []
        self._session.run(requests, lambda _, results: found.extend(results))
        return sorted(found, key=lambda result: result.index)


if __name__ == "__main__":
    cli_evaluate()
