"""lm-evaluation-harness on a running model: its requests become the engine's."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jinja2
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from dist_infer.config.eval import EvalOptions
from dist_infer.config.sampling import SamplingParams
from dist_infer.engine.blueprint import Blueprint
from dist_infer.engine.intake import Intake
from dist_infer.engine.request import Request, Result
from dist_infer.evaluation.generation import Generation
from dist_infer.evaluation.quiet import quiet
from dist_infer.evaluation.tasks import Tasks

Run = Callable[[list[Request]], list[Result]]

_log = logging.getLogger(__name__)


class RequestFailed(RuntimeError):
    """A request of an evaluation failed, so that there is no number."""


class HarnessModel(TemplateLM):
    """A model for lm-evaluation-harness that scores and generates through the engine.

    Texts are tokenized, cut and joined as the harness's own `hf` model does, so that scores are the same request by request.

    Args:
        intake: Of the model, which must have a tokenizer.
        run: Runs requests; results in their order.
        max_length: Longest sequence of the engine, in tokens.
        identity: The checkpoint's; part of every request's key.
        versions: Version of each task by its name; part of the key of its requests.

    Raises:
        ValueError: The model has no tokenizer.
    """

    def __init__(self, intake: Intake, run: Run, max_length: int, identity: str = "", versions: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.blueprint = intake.blueprint
        self.tokenizer: Any = self.blueprint.need_tokenizer("an evaluation")
        self.max_length = max_length
        self.identity, self.versions = identity, dict(versions or {})
        self._run = run
        self._scoring = SamplingParams().resolved()  # nothing is sampled, so no option may change the key

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token an empty context stands for."""
        bos = self.tokenizer.bos_token_id
        token = bos if bos is not None else self.tokenizer.eos_token_id
        if token is None:
            raise ValueError("the tokenizer has neither a beginning nor an end token, which an empty context stands for: add one to it")
        return token

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name, as the harness writes it into results."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text; by default with special tokens, unless it begins with one."""
        return self._encode([string], add_special_tokens)[0]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the text the model knows it by; a template that takes no system message gets none."""
        ways = {"tokenize": False, "add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        try:
            return self.tokenizer.apply_chat_template(chat_history, **ways)
        except jinja2.TemplateError:
            _log.warning("the chat template refuses the conversation; it is applied again without the system message")
            rest = [message for message in chat_history if message["role"] != "system"]
            return self.tokenizer.apply_chat_template(rest, **ways)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes of a model into results."""
        dtype = str(self.blueprint.dtype)
        return {"model_num_parameters": self.blueprint.parameters, "model_dtype": dtype, "model_revision": "", "model_sha": self.identity}

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """How likely each continuation is after its context, and whether greedy decoding would produce it."""
        pairs = self._pairs([instance.arguments for instance in requests])
        asked = [self._score(instance, *pair) for instance, pair in zip(requests, pairs, strict=True)]
        self._warn_of_cuts(len(context) + len(continuation) > self.max_length + 1 for context, continuation in pairs)
        return [(score.logprob, score.is_greedy) for score in map(_score_of, self._answers(asked))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """How likely each whole text is, in windows as long as the model takes."""
        asked: list[Request] = []
        owners: list[int] = []
        texts = self._encode([instance.arguments[0] for instance in requests])
        for owner, (instance, tokens) in enumerate(zip(requests, texts, strict=True)):
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, max_seq_len=self.max_length, context_len=1)
            for number, window in enumerate(windows):
                asked.append(self._score(instance, *make_disjoint_window(window), part=f"/{number}"))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, result in zip(owners, self._answers(asked), strict=True):
            totals[owner] += _score_of(result).logprob
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, up to the first of its stop sequences."""
        contexts = self._encode([instance.arguments[0] for instance in requests])
        settings: dict[str, Generation] = {}
        asked: list[Request] = []
        made_by: list[Generation] = []
        repeats: Counter[int] = Counter()
        for instance, tokens in zip(requests, contexts, strict=True):
            given = json.dumps(instance.arguments[1], sort_keys=True, default=str)
            if given not in settings:
                settings[given] = Generation.of(str(instance.task_name), instance.arguments[1], self.blueprint, self.max_length)
            generation = settings[given]
            made_by.append(generation)
            asked.append(self._continue(instance, tokens, generation, repeats[id(instance)]))
            repeats[id(instance)] += 1
        longest = (self.max_length - generation.max_tokens for generation in made_by)
        self._warn_of_cuts(len(tokens) > most for tokens, most in zip(contexts, longest, strict=True))
        # Decoded apart from the prompt, as the harness does: what a leading space becomes is up to the tokenizer.
        texts = (self.tokenizer.decode(result.outputs[0].token_ids, skip_special_tokens=True) for result in self._answers(asked))
        return [generation.cut(text) for generation, text in zip(made_by, texts, strict=True)]

    def _loglikelihood_tokens(self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any) -> list[tuple[float, bool]]:
        """Not called: `loglikelihood`, which the harness calls, still knows whose requests they are."""
        raise NotImplementedError

    def _encode(self, texts: Sequence[str], special: bool | None = None) -> list[list[int]]:
        """Token ids of texts; each different one is tokenized once. `special` as in `tok_encode`."""
        first = self.tokenizer.decode([self.prefix_token_id])
        known: dict[str, list[int]] = {}
        for wanted in (True, False):
            part = [t for t in dict.fromkeys(texts) if wanted == (special if special is not None else not (first and t.startswith(first)))]
            if part:
                tokens = self.tokenizer(part, add_special_tokens=wanted, return_attention_mask=False)["input_ids"]
                known |= zip(part, tokens, strict=True)
        return [known[text] for text in texts]

    def _pairs(self, texts: Iterable[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """Token ids of contexts and continuations.

        A continuation is what tokenizing both together adds; spaces at a context's end go to it. After an empty context the first
        token is that every text begins with, unless the continuation brings it.
        """
        split = [(context.rstrip(), context + continuation) for context, continuation in texts]
        before = iter(self._encode([context for context, _ in split if context]))
        both = iter(self._encode([whole for context, whole in split if context]))
        alone = iter(self._encode([whole for context, whole in split if not context], special=False))
        pairs = []
        for context, _ in split:
            if context:
                head = next(before)
                pairs.append((head, next(both)[len(head) :]))
            else:
                tokens = next(alone)
                brought = tokens[:1] == [self.prefix_token_id]
                pairs.append((tokens[:1], tokens[1:]) if brought else ([self.prefix_token_id], tokens))
        return pairs

    def _score(self, instance: Instance, context: list[int], continuation: list[int], part: str = "") -> Request:
        """The request for the score of a continuation; a context that is too long loses its beginning."""
        if not continuation:
            raise ValueError(f"{_name(instance)}: the continuation is empty: no token is left to score")
        if len(continuation) > self.max_length:
            raise ValueError(
                f"{_name(instance)}: the continuation has {len(continuation)} tokens, and the longest sequence is {self.max_length}"
            )
        tokens = (context + continuation)[-(self.max_length + 1) :]  # the last token is only scored, not read
        return self._keyed(instance, Request(_name(instance) + part, tokens, self._scoring, score_from=len(tokens) - len(continuation)))

    def _continue(self, instance: Instance, tokens: list[int], generation: Generation, repeat: int) -> Request:
        """The request for the continuation of a prompt; one that leaves too little room loses its beginning."""
        if not tokens:
            raise ValueError(f"{_name(instance)}: the prompt is empty")
        tokens, params, seed = tokens[-(self.max_length - generation.max_tokens) :], generation.params, 0
        if params.temperature:
            seed = self._seed(instance, tokens, repeat)
            params = replace(params, seed=seed)
        return self._keyed(instance, Request(_name(instance), tokens, params, seed))

    def _seed(self, instance: Instance, tokens: list[int], repeat: int) -> int:
        """A seed made of the run's and of what is asked, so that neither order nor world size matters."""
        what = [self.blueprint.options.sampling.seed, instance.task_name, tokens, repeat]
        return int.from_bytes(hashlib.blake2b(json.dumps(what).encode(), digest_size=8).digest(), "little") >> 1

    def _keyed(self, instance: Instance, request: Request) -> Request:
        task = instance.task_name or ""
        request.key = request.key_for(self.identity, f"{task}@{self.versions.get(task, '')}")
        return request

    def _answers(self, asked: list[Request]) -> list[Result]:
        """Results of requests, in their order; what is asked twice runs once.

        Raises:
            RequestFailed: A request failed; the message names task and document.
        """
        different = list({request.key: request for request in reversed(asked)}.values())[::-1]
        for index, request in enumerate(different):
            request.index = index
        results = {request.key: result for request, result in zip(different, self._run(different), strict=True)}
        for request in asked:
            if results[request.key].error is not None:
                raise RequestFailed(f"{request.id}: {results[request.key].error}")
        return [results[request.key] for request in asked]

    def _warn_of_cuts(self, cut: Iterable[bool]) -> None:
        flags = list(cut)
        if any(flags):
            _log.warning(
                "%d of %d requests are longer than the model's %d tokens: their contexts are cut from the left",
                sum(flags),
                len(flags),
                self.max_length,
            )


def _name(instance: Instance) -> str:
    """A request's id: task, document and place in it."""
    return f"{instance.task_name}/{instance.doc_id}/{instance.idx}"


def _score_of(result: Result) -> Any:
    assert result.score is not None
    return result.score


def check_model(options: EvalOptions, blueprint: Blueprint, tasks: Tasks) -> None:
    """Refuse what cannot be evaluated, before a weight is read.

    Raises:
        ValueError: The model lacks a tokenizer or chat template, or cannot generate as a task wants it.
    """
    tokenizer = blueprint.need_tokenizer("an evaluation")
    if options.chat_template and tokenizer.chat_template is None:
        raise ValueError("eval.chat_template=true: the model's tokenizer has no chat template; leave it out, or give model.tokenizer")
    outputs = blueprint.options.sampling.n
    if outputs not in (None, 1):
        raise ValueError(f"sampling.n={outputs}: an evaluation takes one output for a request; a task says 'repeats' for more")
    for name, task in tasks.tasks.items():
        if task.OUTPUT_TYPE == "generate_until":
            given = (task.config.generation_kwargs or {}) | options.gen_kwargs
            Generation.of(name, given, blueprint, blueprint.max_model_len)


def evaluate(options: EvalOptions, model: HarnessModel, tasks: Tasks) -> dict[str, Any]:
    """Run `tasks` on `model`; the harness's own results, `samples` of each task among them.

    Raises:
        ValueError: A task cannot be run with these options, or on this model.
        RequestFailed: A request failed.
    """
    tasks.restore()
    check_model(options, model.blueprint, tasks)
    with quiet():
        results: Any = simple_evaluate(
            model,
            tasks=tasks.chosen,
            task_manager=tasks.manager,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            bootstrap_iters=options.bootstrap_iters,
            log_samples=options.log_samples,
            system_instruction=options.system_instruction,
            apply_chat_template=options.chat_template,
            fewshot_as_multiturn=options.fewshot_as_multiturn,
            gen_kwargs=options.gen_kwargs or None,
            fewshot_random_seed=options.fewshot_seed,
        )
    checkpoint = model.blueprint.checkpoint
    path = str(checkpoint.path) if checkpoint is not None else None
    results["config"] |= {"model": "dist_infer", "model_args": {"path": path}}
    return results
