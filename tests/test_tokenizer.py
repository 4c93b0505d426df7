"""The tokenizer that is trained on a corpus's own texts."""

import os
import random
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from syncmask.processing.tokenizer import SPECIAL_TOKENS, train_tokenizer


def made_up_texts(count=400):
    """Many words of equal frequency: ties are where trainers differ from run to run."""
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz\u00e9\u00f8-"
    words = ["".join(rng.choices(letters, k=rng.randint(3, 9))) for _ in range(300)]
    return [" ".join(rng.choices(words, k=8)) + "." for _ in range(count)]


TRAIN = """
import sys
sys.path.insert(0, sys.argv[1])
from test_tokenizer import made_up_texts
from syncmask.processing.tokenizer import train_tokenizer
train_tokenizer(made_up_texts(), vocab_size=500).save_pretrained(sys.argv[2])
"""


def test_same_bytes_in_another_process_and_order(tmp_path):
    folder = tmp_path / "there"
    command = [sys.executable, "-c", TRAIN, os.path.dirname(__file__), str(folder)]
    done = subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": "7"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [{path.name: path.read_bytes() for path in folder.iterdir()}]
    texts = made_up_texts()
    train_tokenizer(texts[::-1] + texts[:50], vocab_size=500).save_pretrained(tmp_path / "here")
    found.append({path.name: path.read_bytes() for path in (tmp_path / "here").iterdir()})
    assert found[0] == found[1]
    assert set(found[0]) == {"tokenizer.json", "tokenizer_config.json"}


def test_special_tokens_and_size():
    tokenizer = train_tokenizer(made_up_texts(), vocab_size=300)
    assert tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS) == [0, 1, 2, 3, 4]
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id) == (0, 4)
    assert len(tokenizer) == 300
    assert sorted(tokenizer.get_vocab().values()) == list(range(300))
    assert set(tokenizer.get_added_vocab()) == set(SPECIAL_TOKENS)


def test_frequent_words_are_whole_and_lower_case():
    tokenizer = train_tokenizer(["A Red V-Neck shirt.", "red shirts, red skirt", "the red v-neck skirt"])
    assert tokenizer.tokenize("RED v-neck") == ["red", "v", "-", "neck"]
    assert "[UNK]" not in tokenizer.tokenize("kirts")


def test_reload_gives_the_same_ids(tmp_path):
    texts = made_up_texts()
    tokenizer = train_tokenizer(texts, vocab_size=400, max_length=6)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is type(tokenizer) and again.model_max_length == 6
    for one in (texts[0], "\u00c9t\u00e9 \u4e2d [MASK] \U0001f600", ""):
        assert again(one).input_ids == tokenizer(one).input_ids
    assert len(again(texts[0], truncation=True).input_ids) == 6


def test_longest_text_from_the_99th_percentile():
    short = [f"w{number}" for number in range(10, 99)]
    assert train_tokenizer(["red " * 10 + word for word in short]).model_max_length <= 16
    lengths = [" ".join(["red"] * n) for n in range(1, 101)]
    assert (
        train_tokenizer(lengths).model_max_length == 102
    )  # 100 words and [CLS], [SEP]; the 99th percentile rounded up
    assert train_tokenizer(["red " * n for n in range(200, 300)]).model_max_length == 128


def test_errors():
    with pytest.raises(ValueError, match="no text"):
        train_tokenizer(["", "  "])
    with pytest.raises(ValueError, match="vocab_size is 6"):
        train_tokenizer(["a red shirt"], vocab_size=6)
