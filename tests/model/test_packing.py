"""Packed weights multiply as plain ones do: by our kernel, and by oneDNN, whose operators are private and are watched here."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dist_infer.model.layers import Linear
from dist_infer.model.native import kernels
from dist_infer.model.packed import is_in, onednn_packs
from tests.engine.jobs import Mesh, request, run
from tests.engine.references import CHECKPOINTS, reference
from tests.ranks import Ranks

needs_operators = pytest.mark.skipif(not onednn_packs(torch.bfloat16), reason="no packed layout with this torch on this CPU")


def filled(inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> Linear:
    generator = torch.Generator().manual_seed(inputs + outputs)
    linear = Linear(inputs, outputs, bias).to(dtype)
    for parameter in linear.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / inputs**0.5)
    return linear


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 96), (72, 33), (250, 1), (51, 49), (256, 1001)])
@pytest.mark.parametrize("compiled", [True, False])
def test_packed_product(inputs: int, outputs: int, bias: bool, dtype: torch.dtype, compiled: bool) -> None:
    linear = filled(inputs, outputs, bias, dtype)
    linear.kernels = kernels(dtype) if compiled else None
    ours = linear.kernels is not None and linear.kernels.can_multiply
    weight, added = linear.weight.detach().clone(), None if linear.bias is None else linear.bias.detach()
    linear.pack(keep_weight=False)
    assert bool(linear.weight.numel()) != (ours or onednn_packs(dtype)), "the plain weight is kept beside the packed one"
    for rows in (0, 1, 2, 8, 13, 33, 130, 900):
        x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows)).to(dtype)
        exact = F.linear(x.double(), weight.double(), None if added is None else added.double())
        found = linear(x)
        assert found.dtype == dtype and found.shape == (rows, outputs)
        # Half a unit in the last place for each of the two roundings.
        torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("outputs", [32, 64, 160, 32 * 43])
@pytest.mark.parametrize("inputs", [2, 50, 64, 600])
def test_a_weight_is_packed_where_it_is(inputs: int, outputs: int, gated: bool) -> None:
    ours = kernels(torch.bfloat16)
    if ours is None or not ours.can_multiply:
        pytest.skip("no compiled products on this processor")
    weight = filled(inputs, outputs, False, torch.bfloat16).weight.detach()
    copied, x = ours.pack(weight, gated), torch.randn(5, inputs).bfloat16()
    assert not is_in(copied, weight)
    packed = ours.pack(weight, gated, in_place=True)
    assert is_in(packed, weight)
    assert packed(x, None).equal(copied(x, None))


def test_a_packed_weight_makes_room_for_another() -> None:
    linear = filled(64, 96, False, torch.bfloat16)
    linear.kernels = kernels(torch.bfloat16)
    if linear.kernels is None or not linear.kernels.can_multiply:
        pytest.skip("no compiled products on this processor")
    where = linear.weight.data_ptr()
    for scale in (1.0, 2.0):
        linear.weight.fill_(scale)
        linear.pack(keep_weight=False)
        assert linear(torch.ones(1, 64, dtype=torch.bfloat16)).tolist() == [[64 * scale] * 96]
        linear.unpack()
        assert linear.weight.shape == (96, 64) and linear.weight.data_ptr() == where, "no memory is asked for again"


@needs_operators
def test_tied_weight_stays() -> None:
    linear = filled(32, 40, False, torch.bfloat16)
    linear.pack(keep_weight=True)
    assert linear.weight.shape == (40, 32)


def test_float32_is_left_alone() -> None:
    linear = filled(32, 40, True, torch.float32)
    x = torch.ones(3, 32)
    before = linear(x)
    linear.pack(keep_weight=False)
    assert linear(x).equal(before) and linear.weight.shape == (40, 32)


@needs_operators
@pytest.mark.parametrize("mesh", [Mesh(), Mesh(tp=2)], ids=str)
@pytest.mark.parametrize("name", list(CHECKPOINTS))
def test_packed_model_is_as_near_as_the_plain_one(ranks: Ranks, name: str, mesh: Mesh) -> None:
    """Teacher-forced: the reference's own continuation is scored, so that one rounding does not change all that follows."""
    expected = reference(name)
    texts = [prompt + greedy for prompt, greedy in zip(expected.inputs, expected.greedy, strict=True)]
    requests = [request(text, index, score_from=1) for index, text in enumerate(texts)]

    def score(*overrides: str) -> torch.Tensor:
        results = run(ranks, expected.path, mesh, [requests], overrides).results[0]
        return torch.tensor([value for result in results if result.score for value in result.score.token_logprobs])

    exact, plain, packed = score(), score("model.dtype=bfloat16", "engine.pack_weights=false"), score("model.dtype=bfloat16")
    assert len(exact) == sum(map(len, texts)) - len(texts)
    assert (packed - exact).abs().mean() <= 1.5 * (plain - exact).abs().mean()
    assert (packed - plain).abs().mean() <= 2 * (plain - exact).abs().mean()


@pytest.mark.parametrize("rows", [1, 7, 40])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_logits_in_one_call_are_those_of_norm_and_product(rows: int, offset: float) -> None:
    ours = kernels(torch.bfloat16)
    if ours is None or not ours.can_multiply:
        pytest.skip("no compiled products on this processor")
    generator = torch.Generator().manual_seed(rows)
    x, delta = torch.randn(2, rows, 72, generator=generator).bfloat16()
    norm, packed = torch.randn(72, generator=generator).bfloat16(), ours.pack(filled(72, 333, False, torch.bfloat16).weight.detach())
    summed = x.clone()
    expected = packed(ours.add_rms_norm(summed, delta, norm, 1e-5, offset), None).float()
    assert packed.logits(x, delta, norm, 1e-5, offset).equal(expected)
    assert x.equal(summed)
