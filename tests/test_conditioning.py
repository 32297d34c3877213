"""What a family makes of prompts, with encoders that only say who they are and what they read."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from minidit.conditioning import FAMILIES, SYSTEM_PROMPT

TEXTS: list[str] = []  # the number of a text is its place here


def number(text: str) -> int:
    if text not in TEXTS:
        TEXTS.append(text)
    return TEXTS.index(text) + 1


class Tokenizer:
    """Rows of a text's number; with a multiple to pad to, as long as the longest text and masked,
    as minidit.tokenizers."""

    def __init__(self, longest: int | None = None) -> None:
        self.model_max_length, self.calls = longest, []

    def __call__(self, texts, length, pad_to=None):
        self.calls.append((list(texts), length, pad_to))
        if pad_to is None:
            return torch.tensor([[number(text)] * length for text in texts])
        words = [min(len(text.split()), length) for text in texts]
        width = -(-max(words) // pad_to) * pad_to
        mask = (torch.arange(width) < torch.tensor(words)[:, None]).long()
        return torch.tensor([[number(text)] * width for text in texts]), mask


class Encoder:
    """Ids plus a thousand of its own, `width` times; a CLIP also has a pooled vector."""

    def __init__(self, mark: int, width: int, pooled: int = 0, window: int = 7) -> None:
        self.mark, self.width, self.pooled = 1000 * mark, width, pooled
        self.config = SimpleNamespace(max_position_embeddings=window)

    def __call__(self, ids, mask=None):
        self.mask = mask
        hidden = (ids + self.mark).float()[..., None].expand(*ids.shape, self.width)
        with_pooled = self.pooled and mask is None
        return (hidden, -hidden[:, 0, :1].expand(-1, self.pooled)) if with_pooled else hidden


def pipe(**config):
    """Two CLIPs of widths 2 and 3, a T5 of width 8, and a network."""
    config = {"joint_attention_dim": 8, "num_layers": 4, "axes_lens": (300, 9, 9)} | config
    return SimpleNamespace(
        transformer=SimpleNamespace(config=SimpleNamespace(**config)),
        text_encoder=Encoder(1, 2, pooled=2), tokenizer=Tokenizer(),
        text_encoder_2=Encoder(2, 3, pooled=3), tokenizer_2=Tokenizer(77),
        text_encoder_3=Encoder(3, 8), tokenizer_3=Tokenizer(40),
        run=lambda module, *inputs: module(*inputs),
    )  # fmt: skip


@pytest.mark.parametrize("second", [None, ["two", "deux"]])
@pytest.mark.parametrize("third", [None, ["three", "trois"]])
def test_sd3_puts_every_text_in_its_place(second, third):
    """CLIP-L's and CLIP-G's tokens side by side, zeros up to T5's width, and T5's tokens after
    them: each reads the first prompt unless it has one of its own."""
    them, prompts = pipe(), ["one", "un"]
    cond = FAMILIES["sd3"].encode(
        them, prompts, ["no", "non"], prompt_2=second, prompt_3=third, max_sequence_length=9
    )
    rows = [["no", "non", *(own or prompts)] for own in (prompts, second, third)]
    # the window of a CLIP is the shorter one of its network and its tokenizer
    assert them.tokenizer.calls == [(rows[0], 7, None)]
    assert them.tokenizer_2.calls == [(rows[1], 7, None)]
    assert them.tokenizer_3.calls == [(rows[2], 9, None)]
    for i, (left, right, t5) in enumerate(zip(*rows, strict=True)):
        clip = torch.tensor([1000.0 + number(left)] * 2 + [2000.0 + number(right)] * 3 + [0.0] * 3)
        assert cond["context"][i].equal(
            torch.cat((clip.expand(7, 8), torch.full((9, 8), 3000.0 + number(t5))))
        )
        pooled = [-1000.0 - number(left)] * 2 + [-2000.0 - number(right)] * 3
        assert cond["pooled"][i].tolist() == pooled


def test_a_clip_reads_no_more_than_its_tokenizer_says():
    them = pipe()
    them.tokenizer, them.tokenizer_2 = Tokenizer(5), Tokenizer(5)
    cond = FAMILIES["sd3"].encode(them, ["one"], [], max_sequence_length=9)
    assert {them.tokenizer.calls[0][1], them.tokenizer_2.calls[0][1]} == {5}
    assert cond["context"].shape == (1, 5 + 9, 8)


@pytest.mark.parametrize("absent", ["asked", "no encoder"])
@pytest.mark.parametrize(("length", "tokens"), [(9, 9), (256, 40)])
def test_sd3_without_t5_has_zeros_in_its_place(absent, length, tokens):
    them = pipe()
    if absent == "no encoder":
        them.text_encoder_3 = None
    cond = FAMILIES["sd3"].encode(
        them, ["one"], [], use_t5=absent == "no encoder", max_sequence_length=length
    )
    assert cond["context"].shape == (1, 7 + tokens, 8)
    assert not cond["context"][:, 7:].any() and cond["context"][:, :7].any()


def test_lumina_reads_prompts_in_lower_case_and_pads_negatives_to_their_length():
    them = pipe()
    cond = FAMILIES["lumina"].encode(them, ["  A Cat ", "nine " * 9], [" No DOGS "])
    first, second = them.tokenizer.calls
    assert first == (["a cat", ("nine " * 9).strip()], 256, 8)
    assert second == ([" No DOGS "], 16, 16)
    assert cond["context_mask"].sum(1).tolist() == [2, 2, 9]
    assert cond["context_mask"].shape == (3, 16) == cond["context"].shape[:2]
    wanted = [1000 + number(text) for text in (" No DOGS ", "a cat", ("nine " * 9).strip())]
    assert cond["context"][:, 0, 0].tolist() == wanted
    assert them.text_encoder.mask.equal(cond["context_mask"])


def test_flux_reads_clips_summary_and_t5s_tokens():
    for embeds, length in ((True, 512), (False, 256)):
        them = pipe(guidance_embeds=embeds)
        them.text_encoder_2, them.tokenizer_2 = Encoder(3, 8), Tokenizer(40)
        cond = FAMILIES["flux"].encode(them, ["one"], ["no"], prompt_2=["two"])
        assert them.tokenizer_2.calls == [(["no", "two"], length, None)]
        assert them.tokenizer.calls == [(["no", "one"], 7, None)]
        assert cond["pooled"][:, 0].tolist() == [-1000 - number("no"), -1000 - number("one")]
        assert cond["context"].shape == (2, length, 8)
        assert cond["context"][:, 0, 0].tolist() == [3000 + number("no"), 3000 + number("two")]
        FAMILIES["flux"].encode(them, ["one"], [], max_sequence_length=30)
        assert them.tokenizer_2.calls[-1] == (["one"], 30, None)
        how, told = FAMILIES["flux"].guide(them, 3.5)
        assert how.scale == 1 and told == ({"guidance": 3.5} if embeds else {})
        assert FAMILIES["flux"].guide(them, 3.5, true_guidance=2.0)[0].scale == 2


def test_lumina2_tells_prompts_but_not_negatives_what_to_do():
    them = pipe()
    cond = FAMILIES["lumina2"].encode(them, ["a cat"], ["no"])
    prompt = f"{SYSTEM_PROMPT} <Prompt Start> a cat"
    assert them.tokenizer.calls == [(["no", prompt], 256, 8)]
    assert cond["context"][:, 0, 0].tolist() == [1000 + number("no"), 1000 + number(prompt)]
    assert cond["context_mask"].sum(1).tolist() == [1, len(prompt.split())]
    FAMILIES["lumina2"].encode(them, ["b"], [], system_prompt="Draw.", max_sequence_length=20)
    assert them.tokenizer.calls[-1] == (["Draw. <Prompt Start> b"], 20, 8)


def test_guidance_of_every_family_by_default():
    them = pipe()
    sd3, none = FAMILIES["sd3"].guide(them, 4.0, skip_layers=[1, 2])
    assert (sd3.scale, sd3.skip_layers) == (4.0, (1, 2)) and none == {}
    assert (sd3.skip_guidance, sd3.skip_start, sd3.skip_stop) == (2.8, 0.01, 0.2)
    assert FAMILIES["sd3"].guide(them, 4.0, skip_layers=[0, 3])[0].skip_layers == (0, 3)
    with pytest.raises(ValueError, match=r"is 4, must be an integer within 0\.\.3"):
        FAMILIES["sd3"].guide(them, 4.0, skip_layers=[4])  # of 4 layers
    lumina, told = FAMILIES["lumina"].guide(them, 4.0)
    assert lumina.scale == 4 and told == {"scaling_watershed": 1.0, "proportional_attn": True}
    lumina2, none = FAMILIES["lumina2"].guide(them, 4.0)
    assert (lumina2.cfg_trunc_ratio, lumina2.cfg_normalization) == (1.0, True) and none == {}
