"""With compiled products a sequence's numbers do not depend on chunks, on its neighbours or on cached prefixes, to the bit."""

from __future__ import annotations

import pytest
import torch

from dist_infer.engine.request import Request
from dist_infer.model.native import kernels
from tests.engine.jobs import Mesh, request, run
from tests.engine.references import reference
from tests.ranks import Ranks

compiled = kernels(torch.bfloat16)
pytestmark = pytest.mark.skipif(compiled is None or not compiled.can_multiply, reason="no compiled products on this processor")


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(tp=2)], ids=str)
@pytest.mark.parametrize("name", ["hf_llama", "hf_gemma3_text"])
def test_numbers_are_the_same_in_any_company(ranks: Ranks, name: str, mesh: Mesh) -> None:
    expected = reference(name)
    texts = [prompt + greedy for prompt, greedy in zip(expected.inputs, expected.greedy, strict=True)]
    requests = [request(text, index, score_from=1) for index, text in enumerate(texts)]

    def score(calls: list[list[Request]], *overrides: str) -> list[list[float]]:
        results = run(ranks, expected.path, mesh, calls, ("model.dtype=bfloat16", *overrides)).results
        found = {result.index: result.score.token_logprobs for call in results for result in call if result.score}
        return [found[index] for index in range(len(texts))]

    together = score([requests])
    assert score([[one] for one in requests]) == together, "alone"
    assert score([requests], "engine.max_batch_tokens=5", "engine.block_size=4") == together, "in chunks"
    assert score([requests[::-1], requests]) == together, "from the prefix cache"
