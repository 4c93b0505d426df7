"""Training from others' checkpoints: settings, the processor that comes with them, whole runs, words of BPE tokens."""

import json

import numpy as np
import pytest
import torch
import transformers
import yaml
from PIL import Image
from tokenizers import ByteLevelBPETokenizer, Tokenizer, processors
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForPreTraining,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
)

import syncmask
from syncmask import SyncMaskImageProcessor, SyncMaskProcessor
from syncmask.hub_cards.check import check
from syncmask.hub_cards.staging import stage
from syncmask.processing.processing_syncmask import split_words
from syncmask.processing.tokenizer import train_tokenizer
from syncmask.retrieval.encoder import Encoder
from syncmask.training.arguments import ModelArguments
from syncmask.training.finetune import main as finetune
from syncmask.training.parsing import load_arguments
from syncmask.training.pretrain import main as pretrain

LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
# Model type -> class that it is saved as, beside the sizes that it needs of its own.
VISION = {
    "vit": ("ViTForImageClassification", {}),
    "deit": ("DeiTModel", {}),
    "clip": ("CLIPModel", {}),
    "siglip": ("SiglipModel", {}),
    "siglip2": ("Siglip2Model", {}),
    "dinov2": ("Dinov2Model", {"patch_size": 16}),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", {"patch_size": 16}),
}
TEXT = {
    "bert": ("BertForMaskedLM", {}),
    "roberta": ("RobertaForMaskedLM", {}),
    "distilbert": ("DistilBertForMaskedLM", {"hidden_dim": 48}),
    "modernbert": ("ModernBertForMaskedLM", {}),
}
RUN = [
    *("--corpus", "garments", "--num_items", "40", "--image_size", "32", "--max_steps", "3", "--log_every", "1"),
    *("--per_device_batch_size", "16", "--warmup_steps", "1", "--num_threads", "1", "--run_name", "run"),
]
SMALL = [*RUN, "--gate_every", "1", "--gate_max_steps", "1", "--mask_ramp_steps", "1", "--teacher_momentum", "0.9"]
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


@pytest.fixture(scope="session")
def bpe(garments):
    """The function that gives a byte-level tokenizer of the small corpus: RoBERTa's, or ModernBERT's form of it."""

    def make(kind, texts=garments["text"]):
        trained = ByteLevelBPETokenizer()
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        trained.train_from_iterator(texts, vocab_size=500, special_tokens=special, show_progress=False)
        model = json.loads(trained.to_str())["model"]
        if kind == "roberta":
            return RobertaTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
        backend = Tokenizer.from_str(trained.to_str())
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[(token, model["vocab"][token]) for token in ("<s>", "</s>")]
        )
        named = dict(zip(("cls_token", "pad_token", "sep_token", "unk_token", "mask_token"), special))
        return PreTrainedTokenizerFast(tokenizer_object=backend, **named)

    return make


@pytest.fixture
def save(tmp_path, garments, bpe):
    """The function that writes a tiny random checkpoint with its tokenizer or image processor, and gives its folder."""

    def make(kind):
        folder = tmp_path / f"{kind}-source"
        name, own = {**VISION, **TEXT}[kind]
        if kind in TEXT:
            tokenizer = train_tokenizer(garments["text"]) if kind in ("bert", "distilbert") else bpe(kind)
            ids = {f"{one}_token_id": getattr(tokenizer, f"{one}_token_id") for one in ("pad", "cls", "sep")}
            ids |= {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
            sizes = {**LAYERS, "vocab_size": len(tokenizer), "max_position_embeddings": 130, **ids, **own}
            companion = tokenizer
        else:
            photos = {**LAYERS, "image_size": 64, "patch_size": 8, "num_patches": 64, **own}
            words = {**LAYERS, "vocab_size": 9, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
            towers = {"vision_config": photos, "text_config": words}
            sizes = towers if kind in ("clip", "siglip", "siglip2") else photos
            companion = CLIPImageProcessor(image_mean=MEAN, image_std=STD)
        torch.manual_seed(0)
        getattr(transformers, name)(AutoConfig.for_model(kind, **sizes)).save_pretrained(folder)
        companion.save_pretrained(folder)
        return str(folder)

    return make


def starts(save, vision, text):
    return ["--vision", save(vision), "--text", save(text)]


# ------------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"vision": "a"}, "vision and text go together: text is missing"),
        ({"text": "a"}, "vision and text go together: vision is missing"),
        ({"split_layer": 2}, "split_layer is 2, but no text says what is split"),
        ({"vision": "a", "text": "b", "preset": "tiny"}, "vision and preset are both set.*set preset to none"),
        ({"vision": "a", "text": "b", "init_from": "c"}, "vision and init_from are both set.*set init_from to none"),
        ({"vision": "a", "text": "b", "split_layer": 0}, "split_layer is 0, but must be at least 1"),
    ],
)
def test_a_model_has_one_start(settings, said):
    with pytest.raises(ValueError, match=said):
        ModelArguments(**settings)


def test_the_packaged_config_takes_two_names():
    arguments = load_arguments(["--config", "from_pretrained", "--vision", "a", "--text", "b", "--split_layer", "3"])
    assert (arguments.model.vision, arguments.model.text, arguments.model.split_layer) == ("a", "b", 3)
    assert arguments.model.preset is None
    base = ["--config", "base", "--vision", "a", "--text", "b"]  # names a preset of its own
    with pytest.raises(SystemExit):
        load_arguments(base)
    assert load_arguments([*base, "--preset", "none"]).model.vision == "a"


@pytest.mark.parametrize(
    "words, said",
    [
        (["--tokenizer", "other"], "tokenizer is 'other', but text .* brings its own"),
        (["--max_text_length", "140"], "max_text_length is 140, but text .* has positions for 130"),
        (["--image_size", "36"], "vision and text: patch_size=8 does not divide image_size=36"),
        (["--split_layer", "2"], "vision and text: split_layer=2 leaves"),
        (["--model_overrides", '{"initial_temperature": 9.0}'], "initial_temperature=9.0 is not between"),
    ],
)
def test_settings_that_do_not_fit_the_checkpoints_end_a_run(words, said, save, tmp_path):
    with pytest.raises(SystemExit, match=said):
        pretrain([*SMALL, "--output_dir", str(tmp_path), *starts(save, "vit", "bert"), *words])


def test_a_text_checkpoint_without_tokenizer_ends_a_run(save, tmp_path):
    words = starts(save, "vit", "roberta")
    for path in (tmp_path / "roberta-source").glob("*token*"):
        path.unlink()
    with pytest.raises(SystemExit, match="roberta-source' has no tokenizer that can be read"):
        pretrain([*SMALL, "--output_dir", str(tmp_path), *words])


# ----------------------------------------------------------------------------------------------------------------- runs


def assert_a_run_that_loads(folder, vision, text):
    final = folder / "run" / "final"
    processor, model = AutoProcessor.from_pretrained(final), AutoModelForPreTraining.from_pretrained(final).eval()
    assert model.config.mask_token_id == processor.tokenizer.mask_token_id
    assert processor.tokenizer.get_vocab() == AutoTokenizer.from_pretrained(folder / f"{text}-source").get_vocab()
    assert [list(getattr(processor.image_processor, name)) for name in ("image_mean", "image_std")] == [MEAN, STD]
    assert processor.image_processor.size["height"] == model.config.vision_config.image_size == 32
    kinds = {"clip": "clip_vision_model", "siglip": "siglip_vision_model", "siglip2": "siglip_vision_model"}
    assert model.config.vision_config.model_type == kinds.get(vision, vision)
    assert model.config.text_config.model_type == text
    steps = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [[line[name] for name in ("itc", "itm", "mlm", "mim")] for line in steps if line["split"] == "train"]
    assert len(losses) == 3 and np.isfinite(losses).all()
    photo = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    inputs = processor(images=[photo], text=["a red shirt"])
    base = AutoModel.from_pretrained(final).eval()
    with torch.no_grad():
        once, again = base(**inputs), model.syncmask(**inputs)
    assert torch.equal(once.fused, again.fused) and torch.equal(once.image_feats, again.image_feats)
    encoder = Encoder.from_pretrained(final, device="cpu")
    torch.testing.assert_close(encoder.encode_image([Image.fromarray(photo)]), once.image_feats)
    return model


def test_a_run_from_two_checkpoints(save, tmp_path, caplog):
    """The families whose conversion differs most: no [CLS], and byte-level words."""
    caplog.set_level("INFO", "syncmask.training.build")
    pretrain([*SMALL, "--output_dir", str(tmp_path), *starts(save, "siglip", "roberta"), "--no-evaluate"])
    assert_a_run_that_loads(tmp_path, "siglip", "roberta")
    said = caplog.text
    assert "dropped: " in said and "vision: logit_scale" in said and "syncmask.text_projection (2)" in said
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"]
    assert kept["vision"].endswith("siglip-source") and kept["preset"] is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "vision, text", [*((vision, "bert") for vision in VISION), *(("clip", text) for text in TEXT if text != "bert")]
)
def test_every_family_runs(vision, text, save, tmp_path):
    """From corpus to a folder for the Hub: every vision family with BERT, every other text family with CLIP."""
    words = ["--mask_strategy", "evidence" if vision == "clip" else "attention"]
    pretrain([*SMALL, "--output_dir", str(tmp_path), *starts(save, vision, text), *words])
    assert_a_run_that_loads(tmp_path, vision, text)
    run = tmp_path / "run"
    assert list((run / "results").glob("*.json"))
    assert check(tmp_path / "staged", run / "final", stage(run, tmp_path / "staged", "me/mine")) < 1e-4


def test_towers_from_checkpoints_stay_when_frozen(save, tmp_path):
    words = starts(save, "dinov2", "distilbert")
    pretrain([*SMALL, "--output_dir", str(tmp_path), *words, "--freeze_towers", "--no-evaluate"])
    model = assert_a_run_that_loads(tmp_path, "dinov2", "distilbert")
    source = AutoModel.from_pretrained(tmp_path / "distilbert-source").state_dict()
    for name, value in model.syncmask.text_model.state_dict().items():
        assert torch.equal(value, source[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "task, corpus", [("retrieval", "garments"), ("composed", "garment-variants"), ("classification", "garments")]
)
def test_heads_are_trained_on_checkpoints_too(task, corpus, save, tmp_path):
    words = [*RUN, "--output_dir", str(tmp_path), *starts(save, "siglip2", "bert"), "--corpus", corpus]
    finetune(["--task", task, *words, "--no-evaluate"])
    final = tmp_path / "run" / "final"
    config = yaml.safe_load((final / "config.json").read_text())
    assert config["vision_config"]["model_type"] == "siglip_vision_model"
    model = getattr(syncmask, config["architectures"][0]).from_pretrained(final)
    assert model.config.text_config.num_hidden_layers == 1


def test_photos_are_standardised_as_the_checkpoints_are(save, tmp_path, caplog):
    from syncmask.training.build import standardisation

    assert standardisation(None) == {}
    assert standardisation(save("vit")) == {"image_mean": MEAN, "image_std": STD}
    (tmp_path / "bare").mkdir()
    assert standardisation(str(tmp_path / "bare")) == {}
    assert "does not say how its photos are standardised" in caplog.text


# ----------------------------------------------------------------------------------------------------- byte-level words

TRICKY = [
    "A V-neck, (cotton); \u201cCaf\u00e9\u201d blouse -- 100% silk!",
    "  it's   a t-shirt/top \u2122 with 2.5cm \u00abbord\u00bb...",
    "...",
    "",
    "e\u0301le\u0301gant, robe\u0301. \u2014 $30",
    "\u7ea2\u8272 \u886c\u886b, dress",
    "'don't'\tstop\n(now)",
]


@pytest.mark.parametrize("kind", ["roberta", "modernbert"])
def test_words_of_byte_level_tokens(kind, bpe):
    """Each word is made of the tokens that overlap it and no other; spaces and outer punctuation are of none."""
    processor = SyncMaskProcessor(SyncMaskImageProcessor(size=24), bpe(kind, TRICKY))
    tokenizer = processor.tokenizer
    batch = processor(text=TRICKY, return_word_ids=True)
    assert batch["input_ids"][:, 0].tolist() == [tokenizer.cls_token_id] * len(TRICKY)
    assert "token_type_ids" not in batch
    for text, ids, words in zip(TRICKY, batch["input_ids"].tolist(), batch["word_ids"].tolist()):
        spans, seen = split_words(text), {}
        for token, word in zip(ids, words):
            seen.setdefault(word, []).append(token)
        assert sorted(set(seen) - {-1}) == list(range(len(spans)))
        for place, (start, end) in enumerate(spans):
            # A contraction's token holds the quotation mark before a word, as in 'don't'.
            assert tokenizer.decode(seen[place]).strip().lstrip("'") == text[start:end]
        rest = [token for token in seen[-1] if token not in tokenizer.all_special_ids]
        assert not any(letter.isalnum() for letter in tokenizer.decode(rest))


@pytest.mark.parametrize("kind", ["roberta", "modernbert"])
def test_truncated_words_of_byte_level_tokens_are_absent(kind, bpe):
    processor = SyncMaskProcessor(SyncMaskImageProcessor(size=24), bpe(kind, TRICKY))
    whole = processor(text=TRICKY[:1], return_word_ids=True)["word_ids"][0].tolist()
    cut = processor(text=TRICKY[:1], return_word_ids=True, max_length=8)["word_ids"][0].tolist()
    assert cut == [*whole[:7], -1]
