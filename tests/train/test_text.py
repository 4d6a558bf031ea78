"""Text to tokens: a prompt's tokens, no invented space, BOS once, special tokens in a text; and back to text."""

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from _support import tiny
from fastrlhf import evals
from fastrlhf.errors import UserError
from fastrlhf.train import data
from fastrlhf.train.stages import sft
from fastrlhf.train.text import TextEncoder, check_same_ends, sequence_prefix

BOS, EOS = 1, 2
ROWS = [
    {"prompt": "hello:", "completion": " ab lo"},  # as one text it has the same tokens
    {"prompt": "hello:", "completion": "ab"},  # alone the completion has a space in front
    {"prompt": "hel", "completion": "o"},  # the joined text has the token "lo"
    {"prompt": "", "completion": "ab"},
    {"prompt": "ab", "completion": ""},
]


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A SentencePiece-style tokenizer that puts BOS and a space in front of a text."""
    letters = ["▁", *"abcdehlo:</>s.\n"]
    merges = [("a", "b"), ("▁", "ab"), ("l", "o"), ("h", "e"), ("▁", "he")]
    words = ["<unk>", "<s>", "</s>", *letters, *("".join(m) for m in merges)]
    core = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges, unk_token="<unk>"))
    if kind == "normalizer":  # Llama 2
        core.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        core.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind)
        core.decoder = decoders.Metaspace(prepend_scheme=kind)
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize("kind", ["first", "always", "normalizer"])
def test_a_completion_decodes_to_its_text_after_its_prompt(kind):
    found = tokenizer(kind)
    text = TextEncoder(found)
    for row, example in zip(ROWS, data.encode_examples(ROWS, text, 64, "rows"), strict=True):
        prompt = found(row["prompt"], add_special_tokens=False)["input_ids"]
        assert example.tokens[: example.start].tolist() == [BOS, *prompt]
        (sampled_from,) = data.encode_prompts([row], text, 64, 1, "prompts")
        assert sampled_from == [BOS, *prompt]  # the sampler's prompt is the training's
        response = example.tokens[example.start :]
        assert response[-1] == EOS
        whole = found.decode(example.tokens, skip_special_tokens=True)
        assert whole == row["prompt"] + row["completion"]
        assert text.decode([sampled_from], [response], [True]) == [row["completion"]]
        assert text.decode([sampled_from], [response[:-1]], [False]) == [row["completion"]]
    assert any("rows: 1 of 5 rows have other tokens here than as one text" in n for n in text.notes)
    assert text.notes[0] == (
        "sequences begin with '<s>' (id 1), as in the tokenizer's own encoding"
    )


def test_bos_is_added_once():
    text = TextEncoder(tokenizer("first"), parse_special_tokens=True)
    (written,), (plain,) = text.prompts(["<s>ab"], "x"), text.prompts(["ab"], "x")
    assert written.count(BOS) == plain.count(BOS) == 1 and written[0] == plain[0] == BOS
    (window, *_) = data.text_windows(["ab " * 9], text, 4, "text")
    assert window.tokens.tolist().count(BOS) == 1 and window.tokens[0] == BOS
    windows = data.text_windows(["<s>" + "ab " * 9] * 2, text, 4, "text")
    assert all(w.tokens[0] == BOS != w.tokens[1] and len(w.tokens) == 4 for w in windows)
    ((prompt, completion),) = text.pairs([""], ["<s>ab"], "x")
    assert prompt == [BOS] and BOS not in completion


def test_a_prefix_of_an_ordinary_token_is_no_bos():
    found = letters("ab", processors.TemplateProcessing(single="a $A", special_tokens=[("a", 2)]))
    assert TextEncoder(found).prompts(["ab", "b"], "x") == [[2, 2, 3], [2, 3]]


def letters(alphabet: str, post_processor) -> PreTrainedTokenizerFast:
    """A BPE without UNK: it drops all characters but those of the alphabet."""
    words = ["<s>", "</s>", *alphabet]
    core = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, []))
    core.post_processor = post_processor
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def test_bos_is_found_without_the_letter_a():
    template = {"single": "<s> $A </s>", "special_tokens": [("<s>", 0), ("</s>", 1)]}
    found = letters("ACDE", processors.TemplateProcessing(**template))
    assert sequence_prefix(found) == [0]
    assert TextEncoder(found).prompts(["ACD"], "x") == [[0, 2, 3, 4]]
    nothing = letters("", processors.TemplateProcessing(**template))
    assert sequence_prefix(nothing) == [0]
    core = Tokenizer(models.WordLevel({"<u>": 0, "<e>": 1, "word": 2}, unk_token="<u>"))
    core.post_processor = processors.TemplateProcessing(
        single="<u> $A", special_tokens=[("<u>", 0)]
    )
    unknown = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<u>", eos_token="<e>")
    assert sequence_prefix(unknown) == [0]  # "a" is that token too


@pytest.mark.parametrize("parse", [False, True])
def test_special_tokens_in_a_text(parse):
    text = TextEncoder(tokenizer("always"), parse_special_tokens=parse)
    rows = [{"prompt": "a</s>", "completion": "b</s>"}, {"prompt": "a<", "completion": "/s>"}]
    first, second = (e.tokens.tolist() for e in data.encode_examples(rows, text, 64, "rows"))
    assert first.count(EOS) == (3 if parse else 1) and second.count(EOS) == 1
    (prompt,) = data.encode_prompts(rows[:1], text, 64, 1, "prompts")
    texts = text.decode([prompt], [first[len(prompt) :]], [True])  # no space after a special token
    assert texts == ["b" if parse else "b</s>"]
    (window, *_) = data.text_windows(["a</s>b" * 9], text, 9, "text")
    assert (EOS in prompt) == (EOS in window.tokens) == parse
    said = "rows: 3 special tokens in 2 of 2 rows ('</s>') are read as text; with parse_special"
    assert any(said in note for note in text.notes) is not parse
    assert text.tokenizer("a</s>", add_special_tokens=False)["input_ids"][-1] == EOS  # unchanged


def test_a_special_token_that_cannot_be_text_is_refused():
    core = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, "a": 2}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>")
    text = TextEncoder(words)
    with pytest.raises(UserError, match="x, row 2: this tokenizer cannot encode '<eos>' as text"):
        text.prompts(["a", "a <eos> a"], "x")
    (example,) = data.encode_examples([{"prompt": "b", "completion": "a"}], text, 64, "x")
    assert example.tokens.tolist() == [0, 2, 1]  # "ba" is one UNK
    assert text.notes == [
        "x: 1 of 1 completions do not decode to exactly their text (the tokenizer changes characters or spaces)"
    ]


def test_a_special_token_that_a_normalizer_makes_is_refused():
    vocabulary = {"<s>": 0, "</s>": 1, "[UNK]": 2, "hello": 3}
    for normalizer, written in ((normalizers.Lowercase(), "</S>"), (normalizers.NFKC(), "＜/s＞")):
        core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        core.pre_tokenizer, core.normalizer = pre_tokenizers.WhitespaceSplit(), normalizer
        found = PreTrainedTokenizerFast(
            tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="[UNK]"
        )
        message = "x, row 2: this tokenizer cannot encode '</s>', which its normalizer makes from"
        with pytest.raises(UserError, match=message):
            TextEncoder(found).documents(["hello what", f"hello {written}"], "x")
        parsed = TextEncoder(found, parse_special_tokens=True)
        assert parsed.documents([f"hello {written}"], "x") == [[3, 1]]


def test_a_byte_level_tokenizer_keeps_the_tokens_of_the_joined_text():
    vocabulary = ("a", "b", "Ġ", "Ġa", "ab", "1", "2", "3", "23", "<e>")
    ids = {token: i for i, token in enumerate(vocabulary)}
    core = Tokenizer(models.BPE(ids, [("Ġ", "a"), ("a", "b"), ("2", "3")]))
    threes = pre_tokenizers.Split(Regex(r"\d{1,3}"), "isolated")  # Llama 3 splits numbers so
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [threes, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    text = TextEncoder(PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<e>"))
    rows = [
        {"prompt": "a", "completion": " a"},
        {"prompt": "1", "completion": "2323"},  # 123|23, and alone 232|3
        {"prompt": "a", "completion": "b"},  # the joined text is the token "ab"
    ]
    found = [e.tokens.tolist() for e in data.encode_examples(rows, text, 64, "x")]
    assert found == [[0, 3, 9], [5, 8, 8, 9], [0, 1, 9]]
    assert text.notes == [
        "x: 1 of 3 rows have other tokens here than as one text; each prompt has the tokens of the prompt alone, "
        "and each completion decodes to its text"
    ]


def test_a_tokenizer_in_python():
    text = TextEncoder(ByT5Tokenizer())
    ((prompt, completion),) = text.pairs(["hé</s>"], ["b c"], "x")
    assert (len(prompt), len(completion)) == (7, 3)
    assert text.decode([prompt], [[*completion, text.eos]], [True]) == ["b c"]
    parsed = TextEncoder(ByT5Tokenizer(), parse_special_tokens=True)
    assert parsed.prompts(["hé</s>"], "x") == [[*prompt[:3], parsed.eos]]


def test_stages_and_eval_say_what_they_read_as_text(capsys, tmp_path):
    cfg = tiny.sft_config("x", out=str(tmp_path / "sft"), epochs=0.1, log_every=100)
    sft.main(cfg)
    assert "special tokens" not in capsys.readouterr().out
    cfg.parse_special_tokens, cfg.out = False, str(tmp_path / "other")
    sft.main(cfg)
    said = "60 special tokens in 60 of 60 rows ('<say>') are read as text"
    assert f"sft: demonstrations {cfg.demonstrations!r}: {said}" in capsys.readouterr().out
    prompts = str(tiny.folder() / "prompts.jsonl")
    evals.main(
        evals.EvalConfig(model=cfg.out, prompts=prompts, limit=2, max_new_tokens=2, device="cpu")
    )
    assert "eval: prompts" in (found := capsys.readouterr().out)
    assert "2 special tokens in 2 of 2 rows ('<say>')" in found


def test_a_reward_model_that_begins_sequences_otherwise_is_refused():
    other = tokenizer("first")
    other.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    with pytest.raises(UserError, match=r"with the ids \[1\] and 2 in one and with \[\] and 2 in"):
        check_same_ends(TextEncoder(tokenizer("first")), other, "x")
