"""Token ids, special tokens and errors, against transformers where it has a say."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizer_builders import BUILDERS, CORPUS, TEXTS, byte_fallback, byte_level, unigram, write_folder
from tokenizers import processors

from kvik.errors import ModelLoadError, RequestError
from kvik.models.hub import resolve_model
from kvik.text.tokenizer import Tokenizer, load_tokenizer

LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CHATML = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
WITH_SPECIALS = ["<s>hello</s> world", "hello<s> there", "</s>", "[INST] hi [/INST] yes </s><s>[INST] more [/INST]"]


def auto_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def assert_same_as_transformers(folder: Path, texts: list[str]) -> None:
    ours, theirs = Tokenizer.from_folder(folder), auto_tokenizer(folder)
    for text in texts:
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False), text
        expected = theirs.encode(text)
        if ours.bos_token_id is not None and expected[:2] == [ours.bos_token_id] * 2:
            expected = expected[1:]
        assert ours.encode(text) == expected, text
        for skip in (True, False):
            assert ours.decode(expected, skip) == theirs.decode(expected, skip_special_tokens=skip)
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.pad_token_id == theirs.pad_token_id
    specials = {token_id for token_id, token in theirs.added_tokens_decoder.items() if token.special}
    assert ours.special_token_ids == specials
    assert ours.special_tokens == theirs.special_tokens_map
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_plain_folder_is_as_in_transformers(tmp_path: Path, name: str) -> None:
    backend = BUILDERS[name]()
    specials = {0: "unk_token", 1: "bos_token"} if name == "byte_fallback" else {}
    settings = {key: backend.id_to_token(token_id) for token_id, key in specials.items()}
    folder = write_folder(tmp_path, backend, settings={"tokenizer_class": "PreTrainedTokenizerFast", **settings})
    assert_same_as_transformers(folder, TEXTS)


@pytest.mark.parametrize("model_type", ["llama", "mistral", None])
@pytest.mark.parametrize("legacy", [True, False, None])
@pytest.mark.parametrize("prefix_space", [True, False, None])
def test_llama_classes(tmp_path: Path, model_type: str | None, legacy: bool | None, prefix_space: bool | None) -> None:
    settings = {**LLAMA, "legacy": legacy, "add_prefix_space": prefix_space, "add_bos_token": True}
    settings = {key: value for key, value in settings.items() if value is not None}
    config = {"model_type": model_type} if model_type else None
    assert_same_as_transformers(
        write_folder(tmp_path, byte_fallback(), settings=settings, config=config), TEXTS + WITH_SPECIALS
    )


@pytest.mark.parametrize("name", ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", None])
@pytest.mark.parametrize("model_type", ["llama", None])
def test_class_defaults(tmp_path: Path, name: str | None, model_type: str | None) -> None:
    settings = {"tokenizer_class": name} if name else {}
    config = {"model_type": model_type} if model_type else None
    assert_same_as_transformers(write_folder(tmp_path, byte_fallback(), settings=settings, config=config), TEXTS)


def test_class_defaults_that_are_not_in_the_vocabulary_are_not_added(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, byte_level(), settings={"tokenizer_class": "LlamaTokenizerFast"})
    assert Tokenizer.from_folder(folder).special_tokens == {}


@pytest.mark.parametrize("flags", [{}, {"add_bos_token": True}, {"add_bos_token": False}, {"add_eos_token": True}])
@pytest.mark.parametrize("processor", [True, False])
def test_bos_flags(tmp_path: Path, flags: dict[str, bool], processor: bool) -> None:
    backend = byte_level()
    if processor:
        backend.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", backend.token_to_id("<|endoftext|>"))]
        )
    settings = {**CHATML, "bos_token": "<|endoftext|>", **flags}
    assert_same_as_transformers(
        write_folder(tmp_path, backend, settings=settings), ["Hello world", "", "<|endoftext|>hi"]
    )


def test_tokens_only_in_the_configuration_are_added(tmp_path: Path) -> None:
    backend = byte_level()
    new = backend.get_vocab_size()
    settings = {
        **CHATML,
        "bos_token": {"__type": "AddedToken", "content": "<|new|>", "lstrip": False, "normalized": False},
        "image_token": "<|image|>",
        "additional_special_tokens": ["<|im_start|>", "<think>"],
        "added_tokens_decoder": {
            str(new): {"content": "<|new|>", "special": True},
            str(new + 1): {"content": "<tool>"},
        },
    }
    folder = write_folder(tmp_path, backend, settings=settings)
    assert_same_as_transformers(folder, [*TEXTS, "<|new|>a<tool><|image|> b<|im_start|><think>"])
    assert Tokenizer.from_folder(folder).bos_token_id == new


def test_special_tokens_map_is_read(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, byte_level(), settings={"tokenizer_class": "PreTrainedTokenizerFast"})
    entries = {"eos_token": {"content": "<|im_end|>"}, "bos_token": "<|endoftext|>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(entries))
    assert Tokenizer.from_folder(folder).special_tokens == {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>"}
    assert_same_as_transformers(folder, TEXTS)


def test_never_two_bos() -> None:
    tokenizer = Tokenizer(byte_fallback(), special_tokens={"bos_token": "<s>", "eos_token": "</s>"})
    assert tokenizer.encode("hello")[0] == 1
    assert tokenizer.encode("<s>hello") == tokenizer.encode("hello")
    assert tokenizer.encode("<s>").count(1) == 1
    assert tokenizer.encode("hello<s>").count(1) == 2
    assert tokenizer.encode("hello", add_special_tokens=False)[0] != 1


@pytest.mark.parametrize(
    ("config", "generation_config", "eos", "expected"),
    [
        ({"eos_token_id": 7}, {"eos_token_id": [8, 9]}, "<|im_end|>", {2, 7, 8, 9}),
        ({"eos_token_id": [7, 2]}, {}, "<|im_end|>", {2, 7}),
        ({"eos_token_id": None}, None, "<|im_end|>", {2}),
        ({}, {"eos_token_id": 0}, None, {0}),
        (None, None, None, set()),
    ],
)
def test_eos_is_a_union(
    tmp_path: Path, config: Any, generation_config: Any, eos: str | None, expected: set[int]
) -> None:
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos}
    folder = write_folder(tmp_path, byte_level(), settings=settings, config=config, generation_config=generation_config)
    assert set(Tokenizer.from_folder(folder).eos_token_ids) == expected


def test_another_tokenizer_than_the_models_own(tmp_path: Path) -> None:
    """It needs no config.json, and texts end where the model says, too."""
    model = write_folder(
        tmp_path / "model", byte_level(), config={"eos_token_id": 7}, generation_config={"eos_token_id": 9}
    )
    alone = write_folder(tmp_path / "alone", byte_level(), settings={"eos_token": "<|im_end|>"})
    assert not (alone / "config.json").exists()
    assert load_tokenizer(model, str(alone)).eos_token_ids == (2, 7, 9)


def test_a_named_token_is_special_whatever_tokenizer_json_says(tmp_path: Path) -> None:
    backend = byte_level()
    backend.add_tokens([tokenizers.AddedToken("<eos>", special=False, lstrip=True)])
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    folder = write_folder(tmp_path, backend, settings=settings)
    ours, theirs = Tokenizer.from_folder(folder), auto_tokenizer(folder)
    (eos,) = ours.eos_token_ids
    ids = [*ours.encode("hi"), eos]
    assert eos == theirs.eos_token_id and ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == "hi"
    assert ours.encode("hi  <eos>") == theirs.encode("hi  <eos>")
    assert eos in ours.byte_table(ours.vocab_size).special_ids


def test_bad_word_ids() -> None:
    tokenizer = Tokenizer(byte_level())
    words = tokenizer.bad_word_ids(["world", "dog"])
    for text in ("world", " world", "dog", " dog"):
        assert tuple(tokenizer.encode(text)) in words
    assert len(set(words)) == len(words)
    metaspace = Tokenizer(byte_fallback())
    spelled = {metaspace.decode(ids, skip_special_tokens=False) for ids in metaspace.bad_word_ids(["world"])}
    assert spelled == {"world", " world"}
    bare = tuple(metaspace.encode("\nworld", add_special_tokens=False)[2:])
    assert bare in metaspace.bad_word_ids(["world"])


@pytest.mark.parametrize("text", ["bad \ud800 text", "\udfff", 3, None, b"bytes"])
def test_text_that_is_no_text(text: Any) -> None:
    tokenizer = Tokenizer(byte_level())
    with pytest.raises(RequestError, match=r"surrogate|must be a string"):
        tokenizer.encode(text)


def test_ids_outside_the_vocabulary_are_silent() -> None:
    tokenizer = Tokenizer(byte_level())
    assert tokenizer.vocab_size == 423
    assert tokenizer.id_to_token(423) is None
    assert tokenizer.decode([423, *tokenizer.encode("hi"), 9999]) == "hi"


def break_file(name: str, text: str) -> Any:
    def change(folder: Path) -> None:
        (folder / name).write_text(text, encoding="utf-8")

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer.json"),
        (break_file("tokenizer.json", "{"), "tokenizer.json"),
        (break_file("tokenizer.json", '{"model": {}}'), "tokenizer.json"),
        (break_file("tokenizer_config.json", "{'a'"), "not valid JSON"),
        (break_file("tokenizer_config.json", "[]"), "not an object"),
        (break_file("generation_config.json", '{"eos_token_id": "x"}'), "eos_token_id"),
        (
            break_file("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "y"}}}'),
            "added_tokens_decoder",
        ),
        (break_file("tokenizer_config.json", '{"chat_template": 3}'), "chat_template"),
    ],
)
def test_broken_folders(tmp_path: Path, change: Any, message: str) -> None:
    folder = write_folder(tmp_path, unigram())
    change(folder)
    with pytest.raises(ModelLoadError, match=message):
        Tokenizer.from_folder(folder)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="there is no folder"):
        Tokenizer.from_folder(tmp_path / "nowhere")


def sentencepiece_folder(folder: Path) -> Path:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=400,
        byte_fallback=True, character_coverage=0.98, add_dummy_prefix=True, minloglevel=2,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    settings = {**LLAMA, "add_bos_token": True, "add_eos_token": False, "legacy": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 2}))
    return folder


def test_slow_sentencepiece(tmp_path: Path) -> None:
    folder = sentencepiece_folder(tmp_path)
    assert_same_as_transformers(folder, TEXTS)
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (1, (2,))
    ids = tokenizer.encode("Hello world")
    assert ids[0] == 1
    assert tokenizer.decode(ids) == "Hello world"


def test_slow_without_transformers_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelLoadError, match=r"pip install 'kvik\[transformers\]'"):
        Tokenizer.from_folder(tmp_path)


def test_broken_sentencepiece_model(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelLoadError, match=r"tokenizer\.model"):
        Tokenizer.from_folder(tmp_path)


def test_fast_tokenizers_need_neither_torch_nor_transformers(tmp_path: Path) -> None:
    import subprocess

    folder = write_folder(tmp_path, byte_level())
    code = (
        "import sys, pathlib; import kvik.text.output_processor, kvik.text.chat;"
        "from kvik.text.tokenizer import Tokenizer; t = Tokenizer.from_folder(pathlib.Path(sys.argv[1]));"
        "assert t.decode(t.encode('hi')) == 'hi'; assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    source = Path(__file__).parents[2] / "src"
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, env={"PYTHONPATH": str(source)}, timeout=60)


def test_other_threads_run_while_a_long_text_is_tokenised() -> None:
    tokenizer, done = load_tokenizer(resolve_model("demo")), threading.Event()
    text = " ".join(f"the old king {i}" for i in range(60_000))

    def work() -> None:
        tokenizer.encode(text)
        done.set()

    threading.Thread(target=work).start()
    begin = last = time.perf_counter()
    worst = 0.0
    while not done.is_set():
        time.sleep(0.001)
        now = time.perf_counter()
        worst, last = max(worst, now - last), now
    assert worst < (last - begin) / 2
    assert tokenizer.encode(text) == tokenizer.backend.encode(text).ids
