"""Instructions as tokens: what a prompt consists of, and where the numbers come from."""

import pytest

from policies.hub import NotFetchedError, local_path
from policies.pi0_weights import open_published
from policies.tokenizer import make_tokenizer
from policies.weights import WeightsError


def test_prompts_end_with_a_line_break_and_are_never_cut():
    tokenizer = make_tokenizer("hashed", 500, 5)
    ids, valid = tokenizer(["  wipe_it\nup ", "stop"], 2)
    words, _ = tokenizer("wipe it up", 3)
    assert ids[0].tolist() == words[2].tolist() and words.shape == (3, 5)
    assert ids[0, 0] == 2 and ids[0, 4] == 108 and ids[1].tolist()[3:] == [0, 0]
    assert valid.tolist() == [[True] * 5, [True] * 3 + [False] * 2]
    with pytest.raises(ValueError, match=r"has 6 tokens, at most 5 fit.*prompt_tokens"):
        tokenizer("a b c d", 1)
    with pytest.raises(ValueError, match="2 instructions for 3 observations"):
        tokenizer(["a", "b"], 3)


def test_a_tokenizer_s_files_are_read(tmp_path):
    """Begin, words and line break as the files number them; another model's ids are refused."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    table = {"<bos>": 2, "<pad>": 0, "<unk>": 1, "wipe": 7, "it": 9, "\n": 108, "far": 400}
    words = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    fast = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<bos>", unk_token="<unk>")
    fast.save_pretrained(tmp_path)
    ids, valid = make_tokenizer(str(tmp_path), 300, 6)("wipe it", 1)
    assert ids[0].tolist() == [2, 7, 9, 108, 0, 0] and int(valid.sum()) == 4
    with pytest.raises(ValueError, match=r"token 400 .* vocabulary of 300"):
        make_tokenizer(str(tmp_path), 300, 6)("far", 1)


def test_a_missing_tokenizer_says_what_to_give(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer in .*policy.tokenizer takes .*'hashed'"):
        make_tokenizer(str(tmp_path), 300, 6)


def test_what_cannot_be_fetched_is_said(monkeypatch, tmp_path):
    """Without a network and without what was fetched before; a folder needs neither."""
    import huggingface_hub

    def unreachable(name, allow_patterns):
        raise OSError(f"no route to {name} for {allow_patterns}.\nTry later.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    assert local_path(str(tmp_path), ["*"]) == tmp_path
    with pytest.raises(
        NotFetchedError, match=r"'some/name' is no file .* no route to some/name for \['a'\]$"
    ):
        local_path("some/name", ["a"])
    with pytest.raises(ValueError, match=r"no tokenizer in 'some/name': .*no route.*'hashed'"):
        make_tokenizer("some/name", 300, 6)
    with pytest.raises(
        WeightsError, match=r"policy.weights: 'some/name' is no file or folder here"
    ):
        open_published("some/name")
