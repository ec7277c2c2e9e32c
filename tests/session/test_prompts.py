"""Prompts into batches, with the real SmolLM2 tokenizer where there is one, and with none."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch

from flexkernel.errors import PromptError
from flexkernel.session.prompts import batch, texts, token_strings


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


# Ids, without a tokenizer


@pytest.mark.parametrize(
    "ids",
    [
        [5, 6, 7],
        (5, 6, 7),
        [[5, 6, 7]],
        torch.tensor([5, 6, 7]),
        torch.tensor([[5, 6, 7]], dtype=torch.int16),
        np.array([5, 6, 7], dtype=np.uint8),
        [np.int64(5), 6, torch.tensor(7)],
        [torch.tensor([5, 6, 7])],
        {"input_ids": torch.tensor([[0, 5, 6, 7]]), "attention_mask": torch.tensor([[0, 1, 1, 1]])},
    ],
    ids=lambda ids: type(ids).__name__,
)
def test_every_way_to_write_ids_gives_the_same_batch(ids):
    made = batch(ids)
    assert made.ids == [[5, 6, 7]] and made.mask == [[1, 1, 1]] and made.positions == [[0, 1, 2]]
    assert made.tokens == [["5", "6", "7"]] and made.pad_id == 0
    assert all(type(i) is int for i in made.ids[0])


def test_shorter_rows_are_padded_on_the_left_and_masked():
    made = batch([[5, 6, 7], [8], [9, 10]], pad_id=3)
    assert made.ids == [[5, 6, 7], [3, 3, 8], [3, 9, 10]]
    assert made.mask == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]
    assert made.positions == [[0, 1, 2], [0, 0, 0], [0, 0, 1]]
    assert made.tokens[1] == ["", "", "8"]


def test_a_tokenizers_right_padding_becomes_left_padding():
    made = batch({"input_ids": [[5, 6, 7], [8, 0, 0]], "attention_mask": [[1, 1, 1], [1, 0, 0]]})
    assert made.ids == [[5, 6, 7], [0, 0, 8]] and made.mask == [[1, 1, 1], [0, 0, 1]]


def test_a_batch_is_plain_data_and_a_prompt_itself():
    made = batch([[5, 6, 7], [8]], pad_id=2)
    assert batch(made) == made
    assert set(dataclasses.asdict(made)) == {"ids", "mask", "positions", "tokens", "pad_id"}
    with pytest.raises(PromptError, match="outside the vocabulary"):
        batch(made, vocab_size=7)


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        ("", "the prompt is empty"),
        ([], "the prompt is empty"),
        ([[]], "the prompt is empty: it has no tokens"),
        ([[1], []], "the prompt is empty in row 1"),
        (["a", ""], r"the prompt is empty \(prompt 1 of 2\)"),
        (torch.zeros(0, 4, dtype=torch.long), "the prompt is empty"),
        (torch.zeros(2, 0, dtype=torch.long), "the prompt is empty in row 0"),
        ([1, 2, 256], "token id 256 at position 2 is outside the vocabulary, 0 to 255"),
        ([[1], [2, -1]], "token id -1 at position 1 in row 1 is outside the vocabulary"),
        ([1, 2**70], f"token id {2**70} at position 1 is outside"),
        ([1, 2.0], "position 1 has float: 2.0"),
        ([[1], [2, None]], "position 1 of row 1 has NoneType"),
        ([1, True], "position 1 has bool"),
        ([np.True_], "token ids are integers"),
        ([torch.tensor(1.5)], "token ids are integers"),
        ([1, "a"], "position 1 has str: 'a'"),
        ([[1], 2], "row 1 is int: 2"),
        ([[[1]]], "position 0 of row 0 has list"),
        (["a", [1]], r"found list \(prompt 1 of 2\)"),
        (torch.tensor([1.0]), "found Tensor of float32"),
        (torch.tensor([True]), "found Tensor of bool"),
        (np.array([1.0]), "found ndarray of float64"),
        (torch.tensor(5), r"found shape \(\)"),
        (torch.ones(1, 1, 1, dtype=torch.long), r"found shape \(1, 1, 1\)"),
        (None, "found NoneType"),
        (7, "found int: 7"),
        (b"text", "found bytes"),
        ({"text": 1}, "found dict"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, "rows of 2 and attention_mask of 1"),
        ("hello", "the model's folder has no tokenizer"),
        (["hello"], "the model's folder has no tokenizer"),
        ([{"role": "user", "content": "hi"}], "the model's folder has no tokenizer"),
        (list(range(17)), "has 17 tokens and the model 16 positions: leave out at least 1"),
    ],
    ids=str,
)
def test_what_the_model_cannot_take_is_said_in_a_sentence(prompts, says):
    with pytest.raises(PromptError, match=says):
        batch(prompts, vocab_size=256, max_positions=16)


def test_chat_of_token_ids_is_refused():
    with pytest.raises(PromptError, match="found token ids: leave chat out"):
        batch([1, 2], chat=True)


def test_exactly_as_long_as_the_model_is_fine():
    assert len(batch(list(range(16)), vocab_size=16, max_positions=16).ids[0]) == 16


def test_text_of_ids_needs_a_tokenizer():
    with pytest.raises(PromptError, match="no tokenizer"):
        texts(batch([1]), None)


# Text, with the real tokenizer


def test_text_becomes_ids_and_text_again(tokenizer):
    made = batch("The capital of France is", tokenizer)
    assert made.ids == [tokenizer("The capital of France is")["input_ids"]]
    assert made.tokens == [["The", " capital", " of", " France", " is"]]
    assert texts(made, tokenizer) == ["The capital of France is"]


def test_rows_of_text_are_padded_with_the_tokenizers_pad_and_come_back(tokenizer):
    prompts = ["One", "Two words and more", "日本 🦊 naïve\x00\n\n  end"]
    made = batch(prompts, tokenizer, vocab_size=49152)
    assert made.pad_id == tokenizer.pad_token_id and made.ids[0][0] == tokenizer.pad_token_id
    assert texts(made, tokenizer) == prompts
    assert [sum(m) for m in made.mask] == [len(tokenizer(p)["input_ids"]) for p in prompts]
    assert all(m[-1] == 1 for m in made.mask)


def test_a_split_character_shows_as_a_replacement(tokenizer):
    tokens = batch("a 🦊", tokenizer).tokens[0]
    assert tokens[0] == "a" and len(tokens) > 2 and "\ufffd" in tokens[-1]


def test_an_id_without_text_shows_as_its_number(tokenizer):
    assert token_strings([60000, 504, 2**62], tokenizer) == ["<60000>", "The", f"<{2**62}>"]


def test_a_sentencepiece_space_is_kept():
    class Pieces:
        def decode(self, ids, **_):
            return {1: "The", 2: "re"}[ids[0]]

        def convert_ids_to_tokens(self, token):
            return {1: "▁The", 2: "re"}[token]

    assert token_strings([1, 2], Pieces()) == [" The", "re"]


def test_chat_wraps_text_as_one_user_message(tokenizer):
    made = batch("What is the capital of Italy?", tokenizer, chat=True)
    messages = [{"role": "user", "content": "What is the capital of Italy?"}]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert made.ids == [expected] == batch(messages, tokenizer).ids
    assert texts(made, tokenizer, skip_special=False)[0].endswith("<|im_start|>assistant\n")
    assert batch([messages, messages], tokenizer).ids == [expected] * 2


def test_an_empty_system_message_is_a_message(tokenizer):
    talk = [{"role": "system", "content": ""}, {"role": "user", "content": "hi"}]
    assert "named SmolLM" not in texts(batch(talk, tokenizer), tokenizer)[0]


def test_a_conversation_that_ends_with_the_assistant_asks_for_no_other_turn(tokenizer):
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    assert not texts(batch(talk, tokenizer), tokenizer, skip_special=False)[0].endswith(
        "assistant\n"
    )


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        ("\ud800 hi", "half a character"),
        ([{"role": "user", "content": "\udfff"}], r"\(message 0\) has half a character"),
        ([{"role": "user"}], "message 0 is {'role': 'user'}"),
        ([{"role": "user", "content": "hi"}, {"content": "x"}], "message 1 is"),
        ([{"role": "user", "content": 3}], "chat template refuses these messages"),
    ],
    ids=ascii,
)
def test_text_that_is_none_is_refused(prompts, says, tokenizer):
    with pytest.raises(PromptError, match=says):
        batch(prompts, tokenizer)


def test_chat_without_a_template_is_refused(tokenizer):
    class Plain:
        chat_template = None

    with pytest.raises(PromptError, match="no chat template"):
        batch("hi", Plain(), chat=True)


def test_a_prompt_longer_than_the_model_is_refused_with_both_numbers(tokenizer):
    with pytest.raises(
        PromptError, match="prompt in row 1 has 9001 tokens and the model 8192 positions"
    ):
        batch(["short", "the" + " the" * 9000], tokenizer, max_positions=8192)


def test_prompts_import_neither_torch_nor_transformers():
    heavy = ("torch", "transformers", "numpy")
    code = (
        f"import sys, flexkernel.session.prompts; print([m for m in {heavy} if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "[]\n"
    )
