"""The bundled demo model and its draft: files, sizes, tokenizer, and that the weights really speak English."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
DEMO, DRAFT = (ROOT / "src" / "kvik" / "assets" / name for name in ("demo", "demo-draft"))
BOTH = pytest.mark.parametrize("folder", [DEMO, DRAFT], ids=lambda folder: folder.name)

# From documents that were never trained on: Aesop tr. Jones (1912), Baum (1901), Grimm tr. Hunt (1884), Jacobs (1894).
HELD_OUT = [
    "A Man of middle age, whose hair was turning grey, had two Sweethearts, an old woman and a young one. The elder of "
    "the two didn't like having a lover who looked so much younger than herself; so, whenever he came to see her, she "
    "used to pull the dark hairs out of his head to make him look old.",
    "They had always lived upon the banks of this same river, so that every curve and sweep of its waters",
    "There was once a poor woodcutter who toiled from early morning till late night. When at last he had laid by some "
    'money he said to his boy, "You are my only child, I will spend the money which I have earned with the sweat of my '
    'brow on your education."',
    "There was once a little farmer and his wife living near Coolgarrow. They had three children, and my story "
    "happened while the youngest was a baby.",
]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def load(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers reads the demo model independently of Kvik")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def demo() -> Any:
    return load(DEMO)


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_demo", ROOT / "tools" / "train_demo.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_demo"] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def test_sizes_stay_under_budget() -> None:
    assert 11_000_000 < (DEMO / "model.safetensors").stat().st_size < 12_000_000
    assert (DRAFT / "model.safetensors").stat().st_size < 1_600_000
    assert (DEMO / "loss.png").stat().st_size < 60_000
    assert sum(f.stat().st_size for folder in (DEMO, DRAFT) for f in folder.iterdir()) < 15_000_000


@BOTH
def test_config_agrees_with_weights_and_tokenizer(folder: Path) -> None:
    config, generation = read_json(folder / "config.json"), read_json(folder / "generation_config.json")
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["tie_word_embeddings"] is True
    assert config["torch_dtype"] == "bfloat16"
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    assert tokenizer.token_to_id("<|endoftext|>") == config["eos_token_id"] == generation["eos_token_id"]
    assert read_json(folder / "tokenizer_config.json")["model_max_length"] == config["max_position_embeddings"]
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        assert len(weights.keys()) == 11 * config["num_hidden_layers"] + 2
        embedding = weights.get_tensor("model.embed_tokens.weight")
    assert embedding.dtype == torch.bfloat16
    assert tuple(embedding.shape) == (config["vocab_size"], config["hidden_size"])


def test_draft_has_the_same_tokenizer() -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (DEMO / name).read_bytes() == (DRAFT / name).read_bytes()


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        'Once upon a time, there was a king.\n\n"Who\'s there?" said he.  \n \n\t!',
        "naïve Ántonia – “quoted” … 12,345.67",
        "日本語のテキスト、한국어, العربية, עברית",
        "🦊👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u200b\u202e \x00\x7f\r\n",
        *HELD_OUT,
    ],
)
def test_tokenizer_round_trips_any_text(text: str) -> None:
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert 0 not in ids  # nothing is added, neither in front nor behind


def test_chat_template_writes_paragraphs() -> None:
    transformers = pytest.importorskip("transformers", reason="renders the chat template")
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO)
    messages = [
        {"role": "system", "content": "Old tales"},
        {"role": "user", "content": " Tell me about the king\n"},
        {"role": "assistant", "content": "He was old."},
    ]
    text = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert text == "<|endoftext|>Old tales\n\nTell me about the king\n\n"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == text + "He was old."
    with pytest.raises(Exception, match="unknown role"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


@torch.no_grad()
def bits_per_character(model: Any) -> float:
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    nats = 0.0
    for text in HELD_OUT:
        ids = torch.tensor([[0, *tokenizer.encode(text).ids]])
        logits = model(ids).logits[0, :-1]  # [length, vocab]
        nats += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
    return nats / math.log(2) / sum(map(len, HELD_OUT))


def test_held_out_sentences_are_predicted(demo: Any) -> None:
    ours, drafts = bits_per_character(demo), bits_per_character(load(DRAFT))
    assert ours < 1.45
    assert ours < drafts < 1.75


def test_greedy_text_is_english_and_moves_on(demo: Any) -> None:
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    ids = torch.tensor([tokenizer.encode("The old woman opened the door, and").ids])
    out = demo.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
    text = tokenizer.decode(out[0, ids.shape[1] :].tolist())
    words = [word.strip(".,;:!?'\"-") for word in text.split()]
    assert text.isascii()
    assert len(words) > 15
    assert len(set(words)) > len(words) // 2
    assert {"the", "and", "a", "to", "she", "he", "was"} & set(words)


@BOTH
@torch.no_grad()
def test_transformers_and_the_training_code_agree(folder: Path, tool: ModuleType) -> None:
    ids = torch.randint(0, 6144, (2, 96), generator=torch.Generator().manual_seed(0))
    ours = tool.load_model(folder, torch.device("cpu"), torch.float32)(ids)
    torch.testing.assert_close(ours, load(folder)(ids).logits, atol=1e-4, rtol=1e-4)
