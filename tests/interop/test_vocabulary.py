"""Fewer tokens: a model, its config and its tokenizer lose what a text does not need, and are otherwise the same."""

import importlib.util
import json

import pytest
import torch
from languages import TOKENS, saved, text, tokenizer
from torch.testing import assert_close

import taylorfx as tfx
from taylorfx.interop import huggingface
from taylorfx.interop.huggingface.vocabulary import renumbered, tokenizer_with

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

if importlib.util.find_spec("torchvision"):
    from _torchvision import library

    library()

WORDS = text()[5_000:5_600]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a Llama whose special tokens do not come first, and a smaller vocabulary of it beside."""
    home = tmp_path_factory.mktemp("vocabulary")
    saved(home / "llama", num_hidden_layers=1, tie_word_embeddings=True, eos_token_id=[2, TOKENS - 1])
    return home


@pytest.fixture(scope="module")
def loaded(home):
    """The Llama and its network."""
    return huggingface.from_pretrained(home / "llama", outputs="logits")


def test_a_folder_with_fewer_tokens_reads_and_scores_its_text_as_before(home, loaded):
    whole, params, spec = loaded
    used = huggingface.tokens_of(tokenizer(), WORDS)
    assert 260 <= len(used) < TOKENS - 5, "the bytes and what the text has"
    rows = huggingface.keep_tokens(whole, params, spec, used)
    numbers = rows.numbers
    assert numbers[TOKENS - 1] >= 0, "the config names it"
    huggingface.save_pretrained(home / "fewer", rows.params, rows.spec, like=whole, tokens=numbers)

    small = transformers.AutoModelForCausalLM.from_pretrained(str(home / "fewer")).eval()
    reader = transformers.AutoTokenizer.from_pretrained(str(home / "fewer"))
    old = torch.tensor([tokenizer()(WORDS)["input_ids"][:30]])
    new = torch.tensor([reader(WORDS)["input_ids"][:30]])
    assert torch.equal(new, numbers[old])
    assert reader.decode(new[0]) == tokenizer().decode(old[0])
    stay = torch.nonzero(numbers >= 0).flatten()
    with torch.no_grad():
        assert_close(small(new).logits, whole(old).logits[..., stay])
    assert small.config.vocab_size == len(stay) == int(numbers.max()) + 1
    eos = [int(numbers[2]), int(numbers[TOKENS - 1])]
    assert small.config.eos_token_id == small.generation_config.eos_token_id == eos
    assert small.lm_head.weight is small.model.embed_tokens.weight
    assert reader.eos_token_id == eos[0]
    assert reader.decode(reader("Zürich 東京")["input_ids"]) == "Zürich 東京", "of bytes, which all stay"
    assert small.generate(new[:, :5], max_new_tokens=3).max() < len(stay)


def test_special_tokens_that_are_gone_are_refused(home, loaded):
    whole, params, spec = loaded
    rows = tfx.interop.keep_rows(params, spec, range(1, 200))
    with pytest.raises(huggingface.ConfigError, match=r"pad_token_id 0, eos_token_id 299 left.*keep_tokens"):
        huggingface.save_pretrained(home / "never", rows.params, rows.spec, like=whole, tokens=rows.numbers)
    assert not (home / "never").exists()


def of_kind(kind):
    """A small tokenizer of a kind, learned from the text."""
    models, trainers = tokenizers.models, tokenizers.trainers
    special = {"special_tokens": ["[UNK]", "[CLS]", "[SEP]"]}
    model, trainer = {
        "WordLevel": lambda: (
            models.WordLevel(unk_token="[UNK]"),
            trainers.WordLevelTrainer(vocab_size=400, **special),
        ),
        "WordPiece": lambda: (
            models.WordPiece(unk_token="[UNK]"),
            trainers.WordPieceTrainer(vocab_size=400, **special),
        ),
        "BPE": lambda: (models.BPE(unk_token="[UNK]"), trainers.BpeTrainer(vocab_size=400, **special)),
        "Unigram": lambda: (models.Unigram(), trainers.UnigramTrainer(vocab_size=300, unk_token="[UNK]", **special)),
    }[kind]()
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.train_from_iterator(text()[:20_000].splitlines(), trainer)
    ends = [(name, made.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    made.post_processor = tokenizers.processors.TemplateProcessing(single="[CLS] $0 [SEP]", special_tokens=ends)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")


@pytest.mark.parametrize("kind", ["WordLevel", "WordPiece", "BPE", "Unigram"])
def test_a_tokenizer_with_fewer_tokens_reads_its_text_as_before(kind):
    whole = of_kind(kind)
    assert json.loads(whole.backend_tokenizer.to_str())["model"]["type"] == kind
    words = text()[:1_500]
    used = huggingface.tokens_of(whole, words.splitlines())
    numbers = torch.full((len(whole),), -1)
    numbers[used] = torch.arange(len(used))
    assert len(used) < len(whole)
    small = tokenizers.Tokenizer.from_str(
        json.dumps(tokenizer_with(json.loads(whole.backend_tokenizer.to_str()), numbers))
    )
    for line in words.splitlines():
        old, new = whole.backend_tokenizer.encode(line), small.encode(line)
        assert new.tokens == old.tokens
        assert new.ids == numbers[old.ids].tolist()


def test_byte_pairs_whose_parts_are_gone_are_refused_by_name():
    whole = of_kind("BPE")
    longest = max(whole.get_vocab(), key=len)
    numbers = torch.full((len(whole),), -1)
    numbers[[0, 1, 2, whole.get_vocab()[longest]]] = torch.arange(4)
    with pytest.raises(huggingface.ConfigError, match=f"{longest}' they are gone.*tokens_of"):
        tokenizer_with(json.loads(whole.backend_tokenizer.to_str()), numbers)


def test_a_token_that_is_added_to_every_text_has_to_stay():
    numbers = torch.arange(400) - 2  # those of [UNK] and [CLS] are negative
    with pytest.raises(huggingface.ConfigError, match="adds token 1 to texts"):
        tokenizer_with(json.loads(of_kind("WordLevel").backend_tokenizer.to_str()), numbers.clamp(min=-1))


def test_other_kinds_of_tokens_in_configs_have_their_new_numbers():
    numbers = torch.tensor([0, -1, 1, 2])
    given = {
        "text_config": {"bos_token_id": 3},
        "begin_suppress_tokens": [1, 2],
        "decoder_start_token_id": 2,
        "top_k": 1,
    }
    assert renumbered(given, numbers) == {
        "text_config": {"bos_token_id": 2}, "begin_suppress_tokens": [1], "decoder_start_token_id": 1, "top_k": 1,
    }  # fmt: skip
