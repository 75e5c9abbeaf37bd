"""The Python face: a model that generates, streams, scores and chats."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dist_infer.checkpoint.dialects import find_dialect
from dist_infer.config.options import Options, read_options
from dist_infer.config.sampling import SamplingParams
from dist_infer.engine.blueprint import Blueprint
from dist_infer.engine.engine import Delta
from dist_infer.engine.intake import Intake, Prompt
from dist_infer.engine.report import provenance
from dist_infer.engine.request import Request, Result
from dist_infer.engine.session import Session
from dist_infer.model.config import ModelConfig
from dist_infer.model.families import from_hf
from dist_infer.model.stored import Stored
from dist_infer.model.weights import describe

# What wrappers put into parameter names: torch.compile, activation checkpointing, DataParallel.
WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "module.")


class LLM:
    """A model on all its ranks.

    In a plain Python process or notebook this process is rank 0 and starts the other ranks itself.
    Under torchrun or srun every rank runs the same script and makes the same calls; the conductor
    (rank 0) gets the results, the others an empty list. Ranks leave when it is closed, or else let go of, or when Python ends.

    Args:
        path: Checkpoint directory, or a Hugging Face id in the local cache.
        tp: Ranks that cut heads, ffn and vocabulary.
        fsdp: Ranks that cut the parameters again, each with its part of the batch.
        replicas: Copies of the model that share the requests.
        overrides: Any further options, as on the command line: `["engine.block_size=32", "model.dtype=float32"]`.
        options: All options, instead of the above.
        say: Prints a line of progress; silent by default.

    Raises:
        ValueError, OSError: A mistake in the arguments, or the checkpoint is not as it should be.
        RankFailure: A rank failed.
    """

    def __init__(
        self,
        path: str | None = None,
        *,
        tp: int | None = None,
        fsdp: int | None = None,
        replicas: int | None = None,
        overrides: Sequence[str] = (),
        options: Options | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        if options is None:
            options = read_options(overrides)
            options.model.path = str(path) if path is not None else options.model.path
            parallel = options.parallel
            parallel.tp, parallel.fsdp, parallel.replicas = tp or parallel.tp, fsdp or parallel.fsdp, replicas or parallel.replicas
        self._start(Session(options, lambda: Blueprint.of(options), scripted=True, say=say))

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        config: ModelConfig | None = None,
        *,
        tokenizer: Any = None,
        tp: int | None = None,
        fsdp: int | None = None,
        replicas: int | None = None,
        overrides: Sequence[str] = (),
    ) -> LLM:
        """An LLM around the weights of a model in memory, such as one in FSDP2 training; every rank of the job calls this.

        The weights are copied as they are now; the model, its gradients and torch's random state are left alone.

        Args:
            model: The module, its parameters plain tensors or DTensors, named as any known dialect names them.
            config: Its architecture; default: `model.config`, a transformers configuration.
            tokenizer: A transformers tokenizer, for text.
            tp, fsdp, replicas: The mesh; it may differ from the one the model is trained on.
            overrides: Further options.

        Raises:
            ValueError: The parameters do not match the configuration.
        """
        options = read_options(overrides)
        options.parallel.tp, options.parallel.fsdp, options.parallel.replicas = tp, fsdp, replicas
        config = config or from_hf(model.config)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        kept = model.state_dict().keys()
        buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept and buffer.is_floating_point()}
        tensors = {_plain_name(name): tensor for name, tensor in (dict(model.named_parameters()) | buffers).items()}
        dialect = find_dialect(tensors.keys(), options.model.dialect, config)
        canonical: dict[str, Callable[[], Tensor]] = {}
        gather = _Gather()
        for weight in describe(config):
            for piece in weight.pieces:
                stored = dialect.map(piece.name, config)
                if stored.tensor in tensors:
                    canonical[piece.name] = _canonical(tensors[stored.tensor], stored, piece.shape[0], gather)
        if options.model.dtype == "auto":
            options.model.dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
        llm = cls.__new__(cls)
        llm._start(Session(options, lambda: Blueprint.around(options, config, tokenizer=tokenizer), scripted=True, weights=canonical))
        return llm

    def generate(self, prompts: Prompt | Sequence[Prompt], sampling: SamplingParams | None = None) -> list[Result]:
        """Continue every prompt: texts, lists of token ids, or chats (lists of messages); results in their order."""
        return self._run([self._intake.request(p, sampling, index=i) for i, p in enumerate(_several(prompts))] if self._intake else [])

    def stream(self, prompt: Prompt, sampling: SamplingParams | None = None) -> Iterator[Delta | Result]:
        """Continue one prompt, handing on each token as it is decided, and last the result.

        On ranks other than the conductor the iterator is empty, and must be run through all the same.
        """
        if self._intake is None:
            self._session.serve()
            return
        yield from self._session.stream(self._intake.request(prompt, sampling))

    def score(self, pairs: Sequence[tuple[str | Sequence[int], str | Sequence[int]]]) -> list[Result]:
        """How likely each continuation is after its context, both text or both token ids."""
        return self._run([self._intake.score(*pair, index=i) for i, pair in enumerate(pairs)] if self._intake else [])

    def chat(self, messages: Sequence[dict[str, Any]], sampling: SamplingParams | None = None) -> Result | None:
        """The answer to a chat; None on ranks other than the conductor."""
        results = self.generate([list(messages)], sampling)
        return results[0] if results else None

    def swap(self, path: str) -> None:
        """Go on with the weights of another checkpoint of the same architecture, such as a later step; every rank of a script calls this.

        Raises:
            ValueError, OSError: The checkpoint cannot be used. The present weights stay in use, unless damage was found when they were
                overwritten already: then another swap must come before anything is asked.
            RankFailure: A rank failed.
        """
        self._session.swap(str(path))

    def prefetch(self, path: str) -> None:
        """Read a checkpoint into the page cache, in the background, for a `swap` to come; every rank of a script calls this."""
        self._session.prefetch(str(path))

    @property
    def provenance(self) -> dict[str, Any]:
        """What makes the results: checkpoint, topology, options and versions."""
        return provenance(self._session)

    def close(self) -> None:
        """Free the ranks and their memory; every rank calls this."""
        self._end()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and self._end.detach() is not None:
            self._session.close(error)
        self.close()

    def _start(self, session: Session) -> None:
        self._session = session
        self._end = weakref.finalize(self, session.close)  # once; at the latest when nobody holds this any more
        atexit.register(self._end)  # or when the process ends, before its watchdog does
        self._intake = Intake(session.blueprint) if session.is_conductor else None

    def _run(self, requests: list[Request]) -> list[Result]:
        if self._intake is None:
            self._session.serve()
            return []
        found: list[Result] = []
        self._session.run(requests, lambda _, results: found.extend(results))
        return sorted(found, key=lambda result: result.index)


def _several(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """A list of prompts, of what may be a single one."""
    single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int | dict))
    return [prompts] if single else prompts  # type: ignore[list-item,return-value]


def _plain_name(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


class _Gather:
    """Gathers sharded parameters; the last one is kept, as experts are asked for one by one and lie in packs."""

    def __init__(self) -> None:
        self._last: tuple[Tensor | None, Tensor | None] = (None, None)

    def __call__(self, parameter: Tensor) -> Tensor:
        """The whole parameter; collective when it is sharded."""
        if not isinstance(parameter, DTensor):
            return parameter.detach()
        asked, whole = self._last
        if asked is not parameter or whole is None:
            self._last = (None, None)
            whole = parameter.full_tensor()
            self._last = (parameter, whole)
        return whole


def _canonical(parameter: Tensor, stored: Stored, rows: int, gather: _Gather) -> Callable[[], Tensor]:
    """Makes the whole canonical tensor of `rows` rows; collective when the parameter is sharded."""
    order = [row for part in stored.rows(0, rows) for row in range(part.stored, part.stored + part.step * part.length, part.step)]

    def make() -> Tensor:
        with torch.no_grad():
            tensor = gather(parameter)
            if stored.member is not None:
                tensor = tensor[stored.member]
            if stored.transposed:
                tensor = tensor.T
            return tensor if order == list(range(len(tensor))) else tensor[order]

    return make
