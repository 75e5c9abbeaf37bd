"""Incremental text and stop rules, with tokenizers of the two common kinds made on the spot."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dist_infer.config.sampling import SamplingParams
from dist_infer.sampling.stop import Detokenizer, StopRule

TEXT = "Grüße, 世界! 🙂👩‍👩‍👧 The cat sat. \n\n  two  spaces\tand a tab. "


@pytest.fixture(scope="module")
def byte_level() -> PreTrainedTokenizerFast:
    """A token for each byte, as GPT-2 writes them, and a few words."""
    vocab = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    for word in ("Ġt", "he"):
        merges.append((word[:-1], word[-1]))
        vocab[word] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@pytest.fixture(scope="module")
def sentencepiece() -> PreTrainedTokenizerFast:
    """Words with a leading ▁ and bytes for the rest, as Llama 2 has them."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "▁The", "▁cat", "▁sat", ".", "▁two", "s", "!", "▁▁"]
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in pieces[:3]])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def run(rule: StopRule, tokens: list[int]) -> tuple[list[str], str | None, int]:
    shown = []
    for used, token in enumerate(tokens, 1):
        verdict = rule.push(token)
        shown.append(verdict.text)
        if verdict.finish_reason:
            return shown, verdict.finish_reason, used
    return shown, None, len(tokens)


def rule_for(tokenizer: PreTrainedTokenizerFast | None, eos_ids: tuple[int, ...] = (), model_len: int = 10_000, **params: Any) -> StopRule:
    detokenizer = Detokenizer(tokenizer) if tokenizer is not None else None
    return StopRule(SamplingParams(**params), prompt_len=4, model_len=model_len, eos_ids=eos_ids, detokenizer=detokenizer)


def test_characters_appear_when_they_are_whole(byte_level: PreTrainedTokenizerFast) -> None:
    detokenizer = Detokenizer(byte_level)
    shown = [detokenizer.push(token) for token in ids_of(byte_level, TEXT)]
    assert "".join(shown) + detokenizer.flush() == TEXT
    assert not any("\ufffd" in piece for piece in shown)
    assert "🙂" in shown
    assert len(shown) > len(TEXT)


def test_spaces_between_words_survive(sentencepiece: PreTrainedTokenizerFast) -> None:
    vocab = sentencepiece.get_vocab()
    prompt, output = [vocab["▁The"], vocab["▁cat"]], [vocab[t] for t in ("▁sat", ".", "▁▁", "▁two", "s", "!")]
    detokenizer = Detokenizer(sentencepiece, prompt)
    assert "".join(map(detokenizer.push, output)) + detokenizer.flush() == " sat.   twos!"
    fresh = Detokenizer(sentencepiece)
    assert "".join(map(fresh.push, output)) + fresh.flush() == "sat.   twos!"


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_streamed_text_is_the_text_of_all_tokens(kind: str, request: pytest.FixtureRequest) -> None:
    rng = random.Random(kind)
    tokenizer: PreTrainedTokenizerFast = request.getfixturevalue(kind)
    if kind == "byte_level":
        words = [ids_of(tokenizer, text) for text in ("é", "世", "🙂", " the", "x", "\n ")]
    else:
        words = [[3 + byte for byte in text.encode()] for text in "é世🙂"] + [[token] for token in range(259, 268)]
    words.append([tokenizer.eos_token_id])
    for _ in range(50):
        prompt, output = ([token for _ in range(count) for token in rng.choice(words)] for count in (5, 30))
        detokenizer = Detokenizer(tokenizer, prompt)
        streamed = "".join(map(detokenizer.push, output)) + detokenizer.flush()
        whole, before = (tokenizer.decode(tokens, skip_special_tokens=True) for tokens in ([*prompt, *output], prompt))
        assert before + streamed == whole


def test_broken_bytes_and_runs_of_special_tokens_do_not_pile_up(byte_level: PreTrainedTokenizerFast) -> None:
    lengths = []

    class Watched:
        def decode(self, token_ids: list[int], **options: bool) -> str:
            lengths.append(len(token_ids))
            return byte_level.decode(token_ids, **options)

    detokenizer = Detokenizer(Watched())
    broken = ids_of(byte_level, "世")[0]
    text = "".join(map(detokenizer.push, [broken] * 200 + [byte_level.eos_token_id] * 200 + ids_of(byte_level, "ok"))) + detokenizer.flush()
    assert text == "\ufffd" * 200 + "ok"
    assert max(lengths) < 50


def test_special_tokens_show_when_asked(byte_level: PreTrainedTokenizerFast) -> None:
    tokens = [*ids_of(byte_level, "a"), byte_level.eos_token_id]
    assert "".join(map(Detokenizer(byte_level).push, tokens)) == "a"
    assert "".join(map(Detokenizer(byte_level, skip_special_tokens=False).push, tokens)) == "a<eos>"


@pytest.mark.parametrize(
    ("stop", "text", "expected"),
    [
        (["END"], "abc EN END def", "abc EN "),
        (["🙂"], "a👩🙂b", "a👩"),
        (["\n\n"], "line\nline\n\nmore", "line\nline"),
        (["aab"], "xaaab", "xa"),
        (["abcd", "bc"], "abcd", "a"),
        (["bcx", "bcy", "d"], "abcz bcbcyd", "abcz bc"),
        (["t"], "the", ""),
    ],
)
def test_stop_strings_cut_the_text_wherever_tokens_end(
    byte_level: PreTrainedTokenizerFast, stop: list[str], text: str, expected: str
) -> None:
    rule = rule_for(byte_level, stop=stop)
    shown, reason, _ = run(rule, ids_of(byte_level, text))
    assert reason == "stop"
    assert "".join(shown) == rule.text == expected


def test_a_stop_string_within_one_token_is_found(byte_level: PreTrainedTokenizerFast) -> None:
    rule = rule_for(byte_level, stop=["t"])
    tokens = [*ids_of(byte_level, "a"), byte_level.get_vocab()["Ġt"]]
    assert run(rule, tokens) == (["a", " "], "stop", 2)
    assert run(rule_for(byte_level, stop=["a t", " "]), tokens) == (["", "a"], "stop", 2)  # the one completed first


def test_what_may_begin_a_stop_string_waits_and_is_shown_when_it_does_not(byte_level: PreTrainedTokenizerFast) -> None:
    rule = rule_for(byte_level, stop=["END"], max_tokens=5)
    assert run(rule, ids_of(byte_level, "aENeENDxx"))[:2] == (["a", "", "", "ENe", "E"], "length")
    assert rule.text == "aENeE"


def test_no_stop_counts_before_min_tokens(byte_level: PreTrainedTokenizerFast) -> None:
    rule = rule_for(byte_level, stop=["b"], min_tokens=3)
    shown, reason, used = run(rule, ids_of(byte_level, "abbbb"))
    assert ("".join(shown), reason, used) == ("abb", "stop", 4)
    rule = rule_for(byte_level, stop=["ab", "abc"], min_tokens=2)
    shown, reason, used = run(rule, ids_of(byte_level, "abcd"))
    assert ("".join(shown), reason, used) == ("", "stop", 3)  # "ab" came too early, "abc" did not
    rule = rule_for(byte_level, stop=["ab", "abc"], min_tokens=2)
    shown, reason, _ = run(rule, ids_of(byte_level, "abde"))
    assert ("".join(shown), reason) == ("abde", None)


def test_end_and_stop_tokens_give_no_text(byte_level: PreTrainedTokenizerFast) -> None:
    tokens = ids_of(byte_level, "abc")
    eos = byte_level.eos_token_id
    assert run(rule_for(byte_level, eos_ids=(eos,)), [*tokens, eos, *tokens]) == (["a", "b", "c", ""], "stop", 4)
    assert run(rule_for(byte_level, stop_token_ids=[tokens[2]]), tokens) == (["a", "b", ""], "stop", 3)
    ignoring = rule_for(byte_level, eos_ids=(eos,), ignore_eos=True, max_tokens=5)
    assert run(ignoring, [eos, *tokens, tokens[0]])[1:] == ("length", 5)


def test_an_end_token_releases_what_was_held(byte_level: PreTrainedTokenizerFast) -> None:
    eos = byte_level.eos_token_id
    rule = rule_for(byte_level, eos_ids=(eos,), stop=["END"])
    run(rule, [*ids_of(byte_level, "aEN"), eos])
    assert rule.text == "aEN"


def test_lengths_end_the_output() -> None:
    assert run(rule_for(None, max_tokens=3), [5] * 9) == ([""] * 3, "length", 3)
    assert run(rule_for(None, model_len=6), [5] * 9) == ([""] * 2, "length", 2)
    assert run(rule_for(None, eos_ids=(5,), max_tokens=3), [1, 2, 5])[1] == "stop"


def test_a_character_cut_off_by_the_length_is_shown_as_broken(byte_level: PreTrainedTokenizerFast) -> None:
    rule = rule_for(byte_level, max_tokens=3)
    run(rule, ids_of(byte_level, "a🙂"))
    assert rule.text == "a\ufffd"


def test_mistakes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sampling\.stop=\['x'\]: there is no tokenizer"):
        rule_for(None, stop=["x"])
    with pytest.raises(ValueError, match="prompt of 4 tokens: the longest sequence is 4 tokens; give at most 3"):
        rule_for(None, model_len=4)
