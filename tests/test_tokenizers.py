"""The three tokenizers against transformers' ids, and what they promise for any text and file."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import unicodedata
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from minidit import load_component
from minidit.tokenizers import (
    CHARACTERS,
    CLIPTokenizer,
    SentencePieceTokenizer,
    Special,
    join,
    words,
)
from weights.tokenizers import read_tokenizer

GOLDENS = Path(__file__).parent / "goldens"
CASES = ("tok_clip_pad_bang", "tok_t5_tiny", "tok_gemma_tiny")
TOKENIZERS = {case: read_tokenizer(GOLDENS / case / "tokenizer") for case in CASES}
CLIP, T5, GEMMA = TOKENIZERS.values()
SNIPPETS = [
    "a photo of a Cat", "<|endoftext|>", "<|startoftext|>", "</s>", "<pad>", "<extra_id_0>",
    "<bos>", "don't", "ΣΑΣ", "½²Ⅷ", "!", "</w>", "\x00\x1c\x85", "\n\n", "   ", "猫", "🧑🏿‍🚀", "é",
    "\ud800", "\udfff",
]  # fmt: skip
TEXTS = st.lists(st.one_of(st.sampled_from(SNIPPETS), st.text(max_size=8)), max_size=6).map("".join)
each_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=list(CASES))


def ids_of(tokenizer, prompts, max_length: int) -> torch.Tensor:
    """Ids alone, of any of the three."""
    out = tokenizer(prompts, max_length)
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("case", CASES)
def test_matches_transformers(case: str) -> None:
    texts = json.loads((GOLDENS / case / "inputs.json").read_text())["strings"]
    rows = json.loads((GOLDENS / case / "expected.json").read_text())
    assert [row["i"] for row in rows] == list(range(len(texts)))
    for text, row in zip(texts, rows, strict=True):
        allowed = [row["ids"]] if row["grade"] == "must" else list(row["variants"].values())
        assert TOKENIZERS[case].encode(text) in allowed, text


@pytest.mark.parametrize("case", CASES)
def test_batches_match_the_official_pipelines(case: str) -> None:
    inputs = json.loads((GOLDENS / case / "inputs.json").read_text())
    expected = load_file(GOLDENS / case / "expected.safetensors")
    tokenizer, prompts = load_component(GOLDENS / case, "tokenizer"), inputs["pipeline_prompts"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for call, options in inputs["pipeline_calls"].items():
            length = options["max_length"]
            if case == "tok_gemma_tiny":
                ids, mask = tokenizer(prompts, length, options.get("pad_to_multiple_of", length))
                assert torch.equal(mask, expected[f"{call}/attention_mask"])
            else:
                ids = tokenizer(prompts, length)
            assert torch.equal(ids, expected[f"{call}/input_ids"]), call


def test_words_are_split_as_by_the_official_pattern() -> None:
    text = "it's 12½ o'clock, y'all'LL_see x²Ⅷ!'s\x1c\u2028\u00a0a\u0301"
    assert list(words(text)) == [
        "it", "'s", "1", "2", "½", "o", "'", "clock", ",", "y", "'", "all", "'", "LL", "_",
        "see", "x", "²", "Ⅷ", "!'", "s", "\x1c", "a", "\u0301",
    ]  # fmt: skip


@given(st.text())
def test_words_lose_white_space_alone(text: str) -> None:
    parts = list(words(text))
    assert "".join(parts) == "".join(c for c in text if not c.isspace() or c in "\x1c\x1d\x1e\x1f")
    for part in parts:
        kinds = {unicodedata.category(c)[0] for c in part}
        if part not in ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d"):
            assert kinds == {"L"} or (kinds == {"N"} and len(part) == 1) or not kinds & set("LN")


def test_pairs_are_joined_from_left_to_right() -> None:
    assert join(list("aaabaa"), ("a", "a")) == ["aa", "a", "b", "aa"]
    assert join(list("abcab"), ("a", "b")) == ["ab", "c", "ab"]


def test_the_longest_special_token_wins() -> None:
    special = Special({"<x": 1, "<x>": 2})
    assert special.encode("a<x><x", lambda part: [len(part)]) == [1, 2, 1]
    assert Special({}).encode("<x>", lambda part: [len(part)]) == [3]
    spelled = special.decode([7, 8, 2, 1, 9], lambda run: "".join(map(str, run)))
    assert spelled == "78 <x> <x 9"


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_clip_pieces_spell_the_clean_text(text: str) -> None:
    ids = CLIP.encode(text)
    clean = unicodedata.normalize("NFC", text).replace("Σ", "σ").lower()
    assert CLIP.decode(ids[1:-1]).replace(" ", "") == "".join(words(clean))


def test_clip_lower_cases_sigma_letter_by_letter() -> None:
    assert CLIP.encode("ΟΔΟΣ") == CLIP.encode("οδοσ") != CLIP.encode("οδος")


def test_clip_special_tokens() -> None:
    start, end = CLIP.bos_id, CLIP.eos_id
    assert CLIP.encode("<|endoftext|>") == [start, end, end]
    assert CLIP.encode("<|startoftext|>") == [start, start, end]
    assert CLIP.encode("<|STARTOFTEXT|>") == [start, start, end], "found after lower-casing"
    assert CLIP.encode("<|ENDOFTEXT|>").count(end) == 1, "found as written only"
    assert CLIP.encode("hi!!") == [*CLIP.encode("hi")[:-1], 0, 0, end], "'!' is the pad token"


def test_clip_with_another_pad_token_keeps_exclamation_marks(tmp_path: Path) -> None:
    folder = copy(tmp_path, "tok_clip_pad_bang")
    for file in folder.glob("*.json"):
        if file.name != "vocab.json":
            file.unlink()
    tokenizer = read_tokenizer(folder)
    assert tokenizer.model_max_length is None
    assert tokenizer.encode("!")[1:-1] == [tokenizer.vocab["!</w>"]]
    assert tokenizer("", 4).tolist() == [[tokenizer.bos_id, *[tokenizer.eos_id] * 3]]


def test_clip_gives_unknown_bytes_the_unknown_token(tmp_path: Path) -> None:
    folder = copy(tmp_path, "tok_clip_pad_bang")
    vocab = json.loads((folder / "vocab.json").read_text())
    del vocab["~</w>"]
    (folder / "vocab.json").write_text(json.dumps(vocab))
    tokenizer = read_tokenizer(folder)
    assert tokenizer.encode("~")[1:-1] == [tokenizer.unk_id]


@pytest.mark.parametrize("extra", [0, 3])
def test_t5_sentinels_are_appended_in_reverse(tmp_path: Path, extra: int) -> None:
    folder = copy(tmp_path, "tok_t5_tiny")
    (folder / "tokenizer_config.json").write_text(json.dumps({"extra_ids": extra}))
    (folder / "special_tokens_map.json").unlink()
    ids = read_tokenizer(folder).encode("<extra_id_0><extra_id_2>")
    assert ids == [562, 560, 1] if extra else 560 > max(ids)
    (folder / "tokenizer_config.json").write_text("{}")  # a hundred
    assert read_tokenizer(folder).encode("<extra_id_0><extra_id_99>") == [659, 560, 1]


def test_gemma_options(tmp_path: Path) -> None:
    folder = copy(tmp_path, "tok_gemma_tiny")
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_eos_token": True}))
    tokenizer = read_tokenizer(folder)
    assert tokenizer.padding_side == "left", "the default of the official class"
    assert tokenizer.encode("cat") == [*GEMMA.encode("cat"), 1]
    ids, mask = tokenizer(["cat", "a photo of a cat"], pad_to=5)
    assert ids.shape[1] % 5 == 0 and ids[0, 0] == 0 and ids[0, -1] == 1
    assert mask.sum(dim=1).tolist() == [
        len(tokenizer.encode("cat")), len(tokenizer.encode("a photo of a cat"))
    ]  # fmt: skip
    with pytest.warns(UserWarning):
        assert tokenizer("a photo of a cat", 4)[0][0].tolist()[-4:] == [
            *GEMMA.encode("a photo of a cat")[:3], 1
        ]  # fmt: skip


@each_tokenizer
@given(text=TEXTS)
def test_any_text_has_ids(tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert all(type(id) is int and id >= 0 for id in ids)
    assert isinstance(tokenizer.decode(ids), str)


@each_tokenizer
def test_halves_of_a_character_are_joined_and_lone_ones_are_replacement_characters(tokenizer):
    assert tokenizer.encode("a \ud83e\uddd1") == tokenizer.encode("a 🧑")
    for half in ("\ud83e", "\uddd1"):
        assert tokenizer.encode(f"a {half}b") == tokenizer.encode("a \ufffdb")


@each_tokenizer
@given(texts=st.lists(TEXTS, min_size=1, max_size=4), length=st.integers(2, 12))
def test_batches_are_singles_cut_and_padded(tokenizer, texts: list[str], length: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ids = ids_of(tokenizer, texts, length)
        singles = [ids_of(tokenizer, text, length)[0].tolist() for text in texts]
    assert ids.dtype == torch.int64 and len(ids) == len(texts)
    for row, single, text in zip(ids.tolist(), singles, texts, strict=True):
        want = tokenizer.encode(text)
        if len(want) > length:
            want = want[:length] if tokenizer is GEMMA else [*want[: length - 1], want[-1]]
        assert row == want + [tokenizer.pad_id] * (len(row) - len(want))
        assert single == row[: len(single)]
        assert set(row[len(single) :]) <= {tokenizer.pad_id}


@each_tokenizer
def test_what_is_cut_off_is_quoted(tokenizer) -> None:
    with pytest.warns(UserWarning, match="window 8.*many more words.* is cut off") as caught:
        ids_of(tokenizer, "zq zq zq zq zq zq zq zq and many more words!", 8)
    assert len(caught) == 1 and caught[0].filename == __file__.replace(".pyc", ".py")
    assert not {"</s>", "<|endoftext|>"} & {*re.split("[' ]", str(caught[0].message))}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids_of(tokenizer, "zq", len(tokenizer.encode("zq")))  # fits exactly


@each_tokenizer
@pytest.mark.parametrize(
    ("prompts", "length", "message"),
    [
        (None, 8, "prompts are None"),
        ([], 8, r"prompts are \[\], must be a string or a list of at least one"),
        (b"cat", 8, "prompts are b'cat'"),
        (["cat", 3], 8, "a prompt is 3, must be a string"),
        ("cat", 1, "max_length is 1, must be an integer within 2.."),
        ("cat", 2**20 + 1, f"must be an integer within 2..{2**20}"),
        ("cat", True, "max_length is True"),
        ("cat", 8.0, r"max_length is 8\.0"),
    ],
)
def test_bad_calls_are_named(tokenizer, prompts, length, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer(prompts, length)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="pad_to is 0"):
        GEMMA("cat", pad_to=0)
    with pytest.raises(ValueError, match="id 99999 is not"):
        CLIP.decode([99999])
    with pytest.raises(ValueError, match="a prompt is None"):
        T5.encode(None)
    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a": 2, "b": 3, "ab": 4}
    for pair in (["a", "b"], ("a", "b", ""), ("a", 3), "ab"):
        with pytest.raises(ValueError, match="merges has .*, must be a pair of strings"):
            CLIPTokenizer(vocab, [pair])
    with pytest.raises(ValueError, match="model_max_length is 0, must be an integer of at least 1"):
        CLIPTokenizer(vocab, [], model_max_length=0)
    for tokenizer in (CLIP, T5):
        for ids in (3, "3", [3, 4.0], [True]):
            with pytest.raises(ValueError, match="must be a list of integers"):
                tokenizer.decode(ids)


def test_words_are_remembered_up_to_a_limit() -> None:
    tokenizer = CLIPTokenizer({"<|startoftext|>": 0, "<|endoftext|>": 1}, [])
    tokenizer._words = {str(i): [] for i in range(2**16 - 1)}
    tokenizer.encode("cat")
    assert len(tokenizer._words) == 2**16
    assert tokenizer.encode("dog") == [0, 1, 1, 1, 1] and [*tokenizer._words] == ["dog"]


def test_bytes_are_written_as_in_gpt_2() -> None:
    assert CHARACTERS[ord("A")] == "A" and CHARACTERS[ord(" ")] == "Ġ"
    assert (CHARACTERS[0], CHARACTERS[173], CHARACTERS[255]) == ("Ā", "Ń", "ÿ")
    assert len(set(CHARACTERS)) == 256


def test_special_tokens_are_spelled_out_whatever_is_in_them() -> None:
    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}
    tokenizer = CLIPTokenizer(vocab, [], special={"<my fox — one>": 3})
    assert tokenizer.encode("a<my fox — one>") == [0, 2, 3, 1]
    assert tokenizer.decode([2, 3, 2]) == "a <my fox — one> a"


def copy(tmp_path: Path, case: str) -> Path:
    """A tokenizer folder to spoil."""
    return Path(shutil.copytree(GOLDENS / case / "tokenizer", tmp_path / "tokenizer"))


MAIN_FILE = {
    "tok_clip_pad_bang": "vocab.json",
    "tok_t5_tiny": "spiece.model",
    "tok_gemma_tiny": "tokenizer.model",
}


@pytest.mark.parametrize("case", CASES)
def test_missing_files_are_named(tmp_path: Path, case: str) -> None:
    with pytest.raises(FileNotFoundError, match="no tokenizer folder .*nowhere"):
        read_tokenizer(tmp_path / "nowhere")
    folder = copy(tmp_path, case)
    (folder / MAIN_FILE[case]).unlink()
    with pytest.raises(FileNotFoundError, match=MAIN_FILE[case]):
        read_tokenizer(folder)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("content", ["empty", "cut", "noise", "other"])
def test_garbage_files_are_named(tmp_path: Path, case: str, content: str) -> None:
    folder = copy(tmp_path, case)
    names = [MAIN_FILE[case], "tokenizer_config.json"]
    if case == "tok_clip_pad_bang":
        names.append("merges.txt")
    for name in names:
        good = (folder / name).read_bytes()
        bad = {
            "empty": b"",
            "cut": good[: len(good) // 2],
            "noise": bytes(range(255, 0, -3)),
            "other": b"[1, 2]",
        }[content]
        (folder / name).write_bytes(bad)
        with pytest.raises(ValueError, match="merge" if name == "merges.txt" else name):
            read_tokenizer(folder)
        (folder / name).write_bytes(good)
    read_tokenizer(folder)


@pytest.mark.parametrize(
    ("case", "name", "content", "message"),
    [
        ("tok_clip_pad_bang", "merges.txt", "#version: 0.2\na b\nabc", "line 3 is 'abc'"),
        ("tok_clip_pad_bang", "merges.txt", "a b c", "line 1 is 'a b c'"),
        ("tok_clip_pad_bang", "merges.txt", "zzz q", "no 'zzz' for the merge"),
        ("tok_clip_pad_bang", "vocab.json", '{"a": "b"}', "id of 'a' is 'b'"),
        ("tok_clip_pad_bang", "vocab.json", '{"a": -1}', "id of 'a' is -1"),
        ("tok_clip_pad_bang", "vocab.json", '{"a": 2147483648}', "id of 'a' is 2147483648"),
        ("tok_clip_pad_bang", "vocab.json", '{"a": 2147483647}', "no special token"),
        ("tok_clip_pad_bang", "vocab.json", '{"a": 1, "b": 1}', "2 pieces share 1 ids"),
        ("tok_clip_pad_bang", "tokenizer_config.json", '{"pad_token": "?!"}', "token '\\?!'"),
        ("tok_clip_pad_bang", "tokenizer_config.json", '{"pad_token": 3}', "pad_token is 3"),
        ("tok_t5_tiny", "tokenizer_config.json", '{"eos_token": "<no>"}', "eos_token '<no>'"),
        ("tok_t5_tiny", "tokenizer_config.json", '{"extra_ids": -1}', "extra_ids is -1"),
        ("tok_t5_tiny", "tokenizer_config.json", '{"extra_ids": 10000}', "extra_ids is 10000"),
        ("tok_t5_tiny", "tokenizer_config.json", '{"added_tokens_decoder": [1]}', "added_tokens"),
        *[
            ("tok_t5_tiny", "tokenizer_config.json", text, "must map ids to tokens")
            for text in (
                '{"added_tokens_decoder": {"-1": {"content": "a"}}}',
                '{"added_tokens_decoder": {"2147483648": {"content": "a"}}}',
                '{"added_tokens_decoder": {"5": {"content": ""}}}',
                '{"added_tokens_decoder": {"5": {"content": 3}}}',
            )
        ],
        ("tok_gemma_tiny", "tokenizer_config.json", '{"padding_side": "top"}', "is 'top'"),
    ],
)
def test_files_that_make_no_sense(
    tmp_path: Path, case: str, name: str, content: str, message: str
) -> None:
    folder = copy(tmp_path, case)
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_tokenizer(folder)


def test_a_tokenizer_built_by_hand_pads_on_the_right() -> None:
    special = {"<pad>": 0, "</s>": 1}
    plain = SentencePieceTokenizer(T5.model, special, end="</s>")
    left = SentencePieceTokenizer(T5.model, special, end="</s>", padding_side="left")
    row = plain.encode("a cat")
    assert plain("a cat", len(row) + 2).tolist() == [[*row, 0, 0]]
    assert left("a cat", len(row) + 2).tolist() == [[0, 0, *row]]
    bare = SentencePieceTokenizer(T5.model, special, pad_to=4)  # no token starts or ends a row
    for text, tokens in (("", 0), ("a cat", len(row) - 1)):
        ids, mask = bare(text)
        assert ids.shape == mask.shape == (1, max(4, -(-tokens // 4) * 4))
        assert mask.tolist() == [[1] * tokens + [0] * (ids.shape[1] - tokens)]
    for pad in (None, "<blank>", 0):
        with pytest.raises(ValueError, match="special has no token"):
            SentencePieceTokenizer(T5.model, special, pad=pad)


def test_limits_of_the_files() -> None:
    assert T5("cat").shape == (1, 256)
    assert [t.model_max_length for t in (CLIP, T5, GEMMA)] == [77, 512, None]


@each_tokenizer
def test_tokenizers_can_be_sent_to_another_process(tokenizer) -> None:
    assert pickle.loads(pickle.dumps(tokenizer)).encode("a cat!") == tokenizer.encode("a cat!")
