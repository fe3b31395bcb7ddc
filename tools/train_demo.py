"""Make Kvik's bundled demo model: a small Qwen3-shaped story-teller, trained from nothing on public-domain fiction.

Five subcommands, in the order they are used; `--help` on each lists its options:

    prepare   corpus -> byte-level BPE tokenizer, training and held-out token arrays, facts about them
    train     token arrays -> a run folder (config.json, bf16 model.safetensors, loss.csv), optionally with a teacher
    evaluate  held-out perplexity and bits per character; with --draft, how often the draft would be accepted
    sample    print continuations of a prompt
    export    run folder -> a Hugging Face folder (tokenizer, chat template, generation defaults, loss curve)

It needs torch, tokenizers, safetensors and numpy (and matplotlib for the curve). The corpus is UTF-8 text, plain or
.xz, in which every document ends with a line `<|endoftext|>`. The exact commands behind the shipped weights are in
`src/kvik/assets/demo/README.md`.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import hashlib
import json
import lzma
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

EOS = "<|endoftext|>"
EOS_ID = 0
# Every HELD_OUT_EVERY-th document, counted from HELD_OUT_FIRST, is never trained on. The corpus lists works in order,
# so a fixed stride takes its share from each of them: 64 of 4,311 documents, 1.5 %.
HELD_OUT_EVERY, HELD_OUT_FIRST = 67, 33
# Words with their leading space, single digits, punctuation runs, line breaks as a unit of their own (so that a
# paragraph break is one token), other spaces. A closing quote never glues to the word before it.
SPLIT = r"'(?:s|t|re|ve|m|ll|d)(?!\p{L})| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"
# A story-teller, not a chat model: every message is a paragraph. A message without a full stop reads as a title,
# because that is how titles look in the corpus, and the reply is the story under it.
CHAT_TEMPLATE = (
    "{{ eos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message['role'] + ': use system, user or assistant') }}{% endif %}"
    "{{ message['content'] | trim }}"
    "{% if not loop.last or add_generation_prompt %}{{ '\\n\\n' }}{% endif %}"
    "{% endfor %}"
)


# ---- prepare: text to tokens ----


def read_documents(corpus: Path) -> tuple[list[str], str]:
    """The corpus split at its separators, and the SHA-256 of the unpacked text."""
    data = corpus.read_bytes()
    data = lzma.decompress(data) if corpus.suffix == ".xz" else data
    documents = data.decode("utf-8").split(f"\n{EOS}\n")
    return [d for d in documents if d], hashlib.sha256(data).hexdigest()


def split_held_out(documents: list[str]) -> tuple[list[str], list[str]]:
    """(training, held-out) documents; see HELD_OUT_EVERY."""
    held_out = [d for i, d in enumerate(documents) if i % HELD_OUT_EVERY == HELD_OUT_FIRST]
    train = [d for i, d in enumerate(documents) if i % HELD_OUT_EVERY != HELD_OUT_FIRST]
    return train, held_out


def train_tokenizer(documents: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE: no normaliser and all 256 bytes in the alphabet, so any text survives a round trip."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str]) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """All documents in one array, each followed by EOS_ID. Returns [num_tokens] uint16."""
    pieces: list[int] = []
    for start in range(0, len(documents), 256):
        for encoding in tokenizer.encode_batch(documents[start : start + 256]):
            pieces.extend(encoding.ids)
            pieces.append(EOS_ID)
    return np.asarray(pieces, dtype=np.uint16)


def prepare(args: argparse.Namespace) -> None:
    documents, sha256 = read_documents(args.corpus)
    train, held_out = split_held_out(documents)
    tokenizer = Tokenizer.from_file(str(args.tokenizer)) if args.tokenizer else train_tokenizer(train, args.vocab_size)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(args.out / "tokenizer.json"))
    train_ids, held_out_ids = encode(tokenizer, train), encode(tokenizer, held_out)
    np.save(args.out / "train.npy", train_ids)
    np.save(args.out / "held_out.npy", held_out_ids)
    facts = {
        "corpus_sha256": sha256,
        "vocab_size": tokenizer.get_vocab_size(),
        "documents": {"train": len(train), "held_out": len(held_out)},
        "characters": {"train": sum(map(len, train)), "held_out": sum(map(len, held_out))},
        "tokens": {"train": len(train_ids), "held_out": len(held_out_ids)},
    }
    (args.out / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts))


@dataclass(frozen=True, slots=True)
class Data:
    """What `prepare` wrote. `documents` are views into one array, each with its closing EOS_ID."""

    documents: list[np.ndarray[Any, np.dtype[np.uint16]]]
    held_out: Tensor  # [1 + num_tokens] int64: EOS_ID, then the held-out documents
    held_out_characters: int
    vocab_size: int
    num_train_tokens: int


def load_data(folder: Path) -> Data:
    train = np.load(folder / "train.npy")
    held_out = np.load(folder / "held_out.npy").astype(np.int64)
    facts = json.loads((folder / "facts.json").read_text())
    return Data(
        documents=np.split(train, np.flatnonzero(train == EOS_ID)[:-1] + 1),
        held_out=torch.from_numpy(np.concatenate([[EOS_ID], held_out])),
        held_out_characters=facts["characters"]["held_out"],
        vocab_size=facts["vocab_size"],
        num_train_tokens=len(train),
    )


# ---- the model: Qwen3, with Hugging Face's parameter names ----


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers that fix a Qwen3 decoder with tied embeddings."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6

    @property
    def fixed_parameters(self) -> int:
        """Everything but the feed-forward matrices."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_attention_heads + self.num_key_value_heads)
        norms = 2 * self.hidden_size + 2 * self.head_dim
        return self.hidden_size * (self.vocab_size + 1) + self.num_hidden_layers * (attention + norms)

    @property
    def num_parameters(self) -> int:
        return self.fixed_parameters + 3 * self.num_hidden_layers * self.hidden_size * self.intermediate_size

    def filled(self, max_bytes: int) -> Shape:
        """The same shape with the widest feed-forward (a multiple of 16) whose bf16 file stays under `max_bytes`."""
        header = 130 * (11 * self.num_hidden_layers + 2)  # generous: the JSON header takes about 110 bytes a tensor
        room = (max_bytes - header) // 2 - self.fixed_parameters
        width = room // (3 * self.num_hidden_layers * self.hidden_size) // 16 * 16
        if width < 16:
            raise SystemExit(f"no room for a feed-forward layer: {self.fixed_parameters * 2} of {max_bytes} bytes used")
        return dataclasses.replace(self, intermediate_size=width)

    def to_hf(self) -> dict[str, Any]:
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            **dataclasses.asdict(self),
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "initializer_range": 0.02,
            "bos_token_id": None,
            "eos_token_id": EOS_ID,
            "pad_token_id": EOS_ID,
            "torch_dtype": "bfloat16",
        }

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Shape:
        return cls(**{field.name: config[field.name] for field in dataclasses.fields(cls)})


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


def fused_linear(x: Tensor, *layers: nn.Linear) -> Tensor:
    """The layers' outputs side by side from one product, in x's precision (the parameters stay fp32)."""
    return F.linear(x, torch.cat([layer.weight for layer in layers]).to(x.dtype))


def rotary_table(length: int, shape: Shape, device: torch.device) -> Tensor:
    """cos and sin of every position's angles. Returns [2, length, head_dim / 2] fp32."""
    steps = torch.arange(0, shape.head_dim, 2, device=device, dtype=torch.float32) / shape.head_dim
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * shape.rope_theta**-steps
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotary position embedding of x [batch, heads, length, head_dim]; pairs are (i, i + head_dim / 2)."""
    cos, sin = table[0], table[1]
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = shape.num_attention_heads, shape.num_key_value_heads
        self.head_dim = shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, self.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, self.num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, self.num_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, shape.hidden_size, bias=False)
        self.q_norm = RMSNorm(self.head_dim, shape.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, shape.rms_norm_eps)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qkv = fused_linear(x, self.q_proj, self.k_proj, self.v_proj).view(batch, length, -1, self.head_dim)
        heads = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        q, k, v = torch.split(qkv.transpose(1, 2), heads, dim=1)  # each [batch, its heads, length, head_dim]
        q, k = rotate(self.q_norm(q), table), rotate(self.k_norm(k), table)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # as q
        return fused_linear(out.transpose(1, 2).flatten(2), self.o_proj)


class FeedForward(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = fused_linear(x, self.gate_proj, self.up_proj).chunk(2, dim=-1)  # [batch, length, intermediate] each
        return fused_linear(F.silu(gate) * up, self.down_proj)


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = FeedForward(shape)

    def forward(self, x: Tensor, table: Tensor, dropout: float) -> Tensor:
        x = x + F.dropout(self.self_attn(self.input_layernorm(x), table), dropout, self.training)
        return x + F.dropout(self.mlp(self.post_attention_layernorm(x)), dropout, self.training)


class StoryModel(nn.Module):
    """A Qwen3 decoder. Parameters are fp32; `dtype` is the precision of activations and products."""

    def __init__(self, shape: Shape, dtype: torch.dtype, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape, self.dtype, self.dropout = shape, dtype, dropout
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.initialise()

    def initialise(self) -> None:
        """Layers start as the identity: what they add to the residual stream is zero."""
        for name, weight in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(weight)
            elif weight.ndim == 2:
                nn.init.normal_(weight, std=0.02 if "embed" in name else 0.5 * weight.shape[1] ** -0.5)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [batch, length] -> logits [batch, length, vocab] in `dtype`."""
        table = rotary_table(ids.shape[1], self.shape, ids.device)
        x = F.dropout(self.embed_tokens(ids).to(self.dtype), self.dropout, self.training)  # [batch, length, hidden]
        for layer in self.layers:
            x = layer(x, table, self.dropout)
        return F.linear(self.norm(x), self.embed_tokens.weight.to(self.dtype))


def save_model(model: StoryModel, folder: Path) -> None:
    """Write config.json and the weights, rounded to bf16, under Hugging Face's names."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {f"model.{k}": v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(model.shape.to_hf(), indent=2) + "\n")


def load_model(folder: Path, device: torch.device, dtype: torch.dtype) -> StoryModel:
    model = StoryModel(Shape.from_hf(json.loads((folder / "config.json").read_text())), dtype)
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({k.removeprefix("model."): v.float() for k, v in weights.items()})
    return model.to(device).eval()


# ---- train ----


@torch.compile(dynamic=False, disable=not torch.cuda.is_available())  # type: ignore[untyped-decorator, unused-ignore]
def orthogonalise(g: Tensor) -> Tensor:
    """Each matrix of g [n, rows, columns] with its singular values brought near 1: five Newton-Schulz steps in bf16.

    Coefficients and method: Keller Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024).
    """
    x = g.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    result: Tensor = x.mT if tall else x
    return result


class Muon:
    """Momentum whose step is orthogonalised; matrices of one shape are stepped together as one batch.

    The step is scaled by 0.2 sqrt(max(rows, columns)), which gives it AdamW's usual size (Moonlight, 2025), so both
    optimizers share one learning rate and one decoupled weight decay.
    """

    def __init__(self, parameters: list[nn.Parameter], momentum: float = 0.95) -> None:
        self.momentum = momentum
        self.groups: dict[torch.Size, list[Tensor]] = {}
        for parameter in parameters:
            self.groups.setdefault(parameter.shape, []).append(parameter)
        self.buffers = {size: torch.zeros_like(torch.stack(group)) for size, group in self.groups.items()}

    @torch.no_grad()
    def step(self, lr: float, weight_decay: float) -> None:
        for size, group in self.groups.items():
            grads = torch.stack([p.grad for p in group if p.grad is not None])  # [n, rows, columns]
            buffer = self.buffers[size].lerp_(grads, 1 - self.momentum)
            step = orthogonalise(grads.lerp(buffer, self.momentum)).float()
            scale = 0.2 * max(size) ** 0.5
            torch._foreach_mul_(group, 1 - lr * weight_decay)
            torch._foreach_add_(group, list(step.unbind()), alpha=-lr * scale)
            for parameter in group:
                parameter.grad = None


def batches(data: Data, context: int, batch_tokens: int, device: torch.device, seed: int) -> Iterator[Tensor]:
    """Endless training batches [batch, context + 1] int64.

    Each epoch shuffles the documents, joins them, cuts the stream into windows at a random phase and shuffles those.
    """
    rng = np.random.default_rng(seed)
    size = max(1, batch_tokens // context)
    while True:
        order = rng.permutation(len(data.documents))
        joined = np.concatenate([data.documents[i] for i in order]).astype(np.int64)
        stream = torch.from_numpy(joined[rng.integers(context) :]).to(device)  # [num_tokens]
        windows = stream.unfold(0, context + 1, context)  # [num_windows, context + 1], a view
        picks = torch.from_numpy(rng.permutation(len(windows))).to(device)
        for start in range(0, len(picks) - size + 1, size):
            yield windows[picks[start : start + size]]


def loss_function(model: StoryModel, teacher: StoryModel | None, teacher_share: float) -> Callable[[Tensor], Tensor]:
    """Loss of a batch [batch, length + 1]: cross-entropy, mixed with KL(teacher || model) if there is a teacher."""

    def loss(batch: Tensor, teacher_logits: Tensor | None) -> Tensor:
        logits = model(batch[:, :-1]).flatten(0, 1).float()  # [batch * length, vocab]
        entropy = F.cross_entropy(logits, batch[:, 1:].flatten())
        if teacher_logits is None:
            return entropy
        target = F.log_softmax(teacher_logits.flatten(0, 1).float(), dim=-1)
        kl = (target.exp() * (target - F.log_softmax(logits, dim=-1))).sum(-1).mean()
        return teacher_share * kl + (1 - teacher_share) * entropy

    use_gpu = torch.cuda.is_available()
    compiled = torch.compile(loss, dynamic=False, disable=not use_gpu)
    ask = torch.compile(teacher, dynamic=False, disable=not use_gpu) if teacher is not None else None

    def run(batch: Tensor) -> Tensor:
        with torch.no_grad():
            teacher_logits = ask(batch[:, :-1]) if ask is not None else None
        result: Tensor = compiled(batch, teacher_logits)
        return result

    return run


@torch.no_grad()
def held_out_nll(model: StoryModel, data: Data, context: int) -> float:
    """Nats per held-out token. Every token is predicted once, from up to `context` tokens of its window."""
    device = model.norm.weight.device
    tokens = data.held_out.to(device)
    padded = F.pad(tokens, (0, (1 - len(tokens)) % context), value=-1)  # 1 + a whole number of windows
    windows = padded.unfold(0, context + 1, context)  # [num_windows, context + 1]
    training, total = model.training, 0.0
    model.eval()
    for chunk in torch.split(windows, max(1, 32768 // context)):
        logits = model(chunk[:, :-1].clamp(min=0)).flatten(0, 1).float()
        total += F.cross_entropy(logits, chunk[:, 1:].flatten(), ignore_index=-1, reduction="sum").item()
    model.train(training)
    return total / (len(tokens) - 1)


def bits_per_character(nll: float, data: Data) -> float:
    return nll * (len(data.held_out) - 1) / math.log(2) / data.held_out_characters


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up over the first 2 % of the run, then linear decay to zero; progress is in [0, 1]."""
    return peak * min(progress / 0.02, (1 - progress) / 0.98)


def make_optimizers(model: StoryModel, args: argparse.Namespace) -> tuple[Muon, torch.optim.AdamW]:
    """Muon for the layers' matrices; AdamW for the embedding and, without decay, the norms."""
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim == 1]
    embedding = {"params": [model.embed_tokens.weight], "weight_decay": args.weight_decay}
    adam = torch.optim.AdamW(
        [embedding, {"params": norms, "weight_decay": 0.0}],
        lr=args.learning_rate,
        betas=(0.9, 0.95),
        eps=1e-10,
        fused=torch.cuda.is_available(),
    )
    return Muon(matrices), adam


class Log:
    """loss.csv, and the same on the screen: one line per evaluation."""

    def __init__(self, path: Path, data: Data, batch_tokens: int, context: int) -> None:
        self.data, self.batch_tokens, self.context = data, batch_tokens, context
        self.start, self.last_step = time.monotonic(), 0
        self.file = path.open("w", newline="")
        self.writer = csv.writer(self.file, lineterminator="\n")
        self.writer.writerow(["step", "epoch", "train_loss", "held_out_nats_per_token", "held_out_bits_per_character"])

    def write(self, step: int, losses: Tensor, model: StoryModel) -> None:
        """`losses` is the sum of the steps' losses since the last call; it is set to zero."""
        if step == self.last_step:
            return
        train_loss = losses.item() / (step - self.last_step)
        self.last_step = step
        losses.zero_()
        nll = held_out_nll(model, self.data, self.context)
        bpc, epoch = bits_per_character(nll, self.data), step * self.batch_tokens / self.data.num_train_tokens
        self.writer.writerow([step, f"{epoch:.2f}", f"{train_loss:.4f}", f"{nll:.4f}", f"{bpc:.4f}"])
        self.file.flush()
        seconds = time.monotonic() - self.start
        rate = step * self.batch_tokens / seconds / 1e6
        print(
            f"step {step} epoch {epoch:.2f} train {train_loss:.4f} held-out {nll:.4f} bpc {bpc:.4f}"
            f" | {seconds:.0f} s, {rate:.2f} M tokens/s",
            flush=True,
        )


def requested_shape(args: argparse.Namespace, vocab_size: int) -> Shape:
    shape = Shape(
        vocab_size=vocab_size,
        hidden_size=args.hidden,
        intermediate_size=0,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
        max_position_embeddings=args.context,
    )
    return shape.filled(args.max_bytes)


def run_steps(model: StoryModel, data: Data, args: argparse.Namespace, log: Log) -> None:
    """Steps until `epochs` are done or `max_minutes` are over; the schedule follows whichever is nearer its end."""
    device = model.norm.weight.device
    teacher = load_model(args.teacher, device, model.dtype) if args.teacher else None
    loss_of = loss_function(model, teacher, args.teacher_share)
    muon, adam = make_optimizers(model, args)
    total = int(args.epochs * data.num_train_tokens / args.batch_tokens)
    every = max(1, total // args.evaluations)
    stream = batches(data, args.context, args.batch_tokens, device, args.seed)
    losses = torch.zeros((), device=device)  # summed since the last evaluation
    step, started = 0, math.inf
    while (progress := max(step / total, (time.monotonic() - started) / (60 * args.max_minutes))) < 1:
        loss = loss_of(next(stream))
        torch.autograd.backward(loss)
        losses += loss.detach()
        lr = learning_rate(progress, args.learning_rate)
        muon.step(lr, args.weight_decay)
        for group in adam.param_groups:
            group["lr"] = lr
        adam.step()
        adam.zero_grad(set_to_none=True)
        step += 1
        if step == 10:
            started = time.monotonic()  # compilation is over
        if step % every == 0:
            log.write(step, losses, model)
            save_model(model, args.out)
    log.write(step, losses, model)
    save_model(model, args.out)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    data, device = load_data(args.data), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if args.batch_tokens > data.num_train_tokens // 2:
        raise SystemExit(f"too little text: {data.num_train_tokens} tokens for batches of {args.batch_tokens}")
    shape = requested_shape(args, data.vocab_size)
    model = StoryModel(shape, dtype, args.dropout).to(device).train()
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"{shape.num_parameters} parameters, {shape}", flush=True)
    run_steps(model, data, args, Log(args.out / "loss.csv", data, args.batch_tokens, args.context))
    nll = held_out_nll(load_model(args.out, device, dtype), data, shape.max_position_embeddings)
    size = (args.out / "model.safetensors").stat().st_size
    bpc = bits_per_character(nll, data)
    print(f"FINAL {args.out.name}: {size} bytes, held-out {nll:.4f} nats/token, bpc {bpc:.4f}")


# ---- evaluate, sample, export ----


@torch.no_grad()
def agreement(model: StoryModel, draft: StoryModel, data: Data, context: int) -> tuple[float, float]:
    """On held-out text: the share of positions with the same most likely token, and the mean of sum(min(p, q)).

    The second is the chance that speculative sampling at temperature 1 accepts one drafted token.
    """
    tokens = data.held_out.to(model.norm.weight.device)
    windows = tokens.unfold(0, context, context)  # [num_windows, context]
    same, overlap = 0.0, 0.0
    for chunk in torch.split(windows, max(1, 16384 // context)):
        p, q = model(chunk).float().softmax(-1), draft(chunk).float().softmax(-1)  # [batch, context, vocab]
        same += (p.argmax(-1) == q.argmax(-1)).sum().item()
        overlap += torch.minimum(p, q).sum().item()
    return same / windows.numel(), overlap / windows.numel()


def evaluate(args: argparse.Namespace) -> None:
    device, data = torch.device("cuda" if torch.cuda.is_available() else "cpu"), load_data(args.data)
    model = load_model(args.model, device, torch.float32)
    context = model.shape.max_position_embeddings
    nll = held_out_nll(model, data, context)
    print(f"nats/token {nll:.4f}, perplexity {math.exp(nll):.3f}, bits/character {bits_per_character(nll, data):.4f}")
    if args.draft:
        same, overlap = agreement(model, load_model(args.draft, device, torch.float32), data, context)
        print(f"draft: same greedy token {same:.3f}, acceptance at temperature 1 {overlap:.3f}")


def choose(logits: Tensor, seen: Tensor, args: argparse.Namespace, generator: torch.Generator) -> Tensor:
    """One token id from logits [vocab]: repetition penalty, temperature, nucleus; temperature 0 is greedy."""
    penalised = torch.where(logits > 0, logits / args.repetition_penalty, logits * args.repetition_penalty)
    logits = logits.index_copy(0, seen, penalised[seen])
    if args.temperature == 0:
        return logits.argmax()
    probabilities, order = (logits / args.temperature).softmax(-1).sort(descending=True)
    probabilities[probabilities.cumsum(0) - probabilities >= args.top_p] = 0
    chosen: Tensor = order[torch.multinomial(probabilities, 1, generator=generator)[0]]
    return chosen


@torch.no_grad()
def continue_text(model: StoryModel, tokenizer: Tokenizer, prompt: str, args: argparse.Namespace, seed: int) -> str:
    """Plain recomputation at every step: this tool is no engine."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor(tokenizer.encode(prompt).ids)  # [length]
    length = len(ids)
    for _ in range(args.max_tokens):
        logits = model(ids[None, -model.shape.max_position_embeddings :])[0, -1]
        token = choose(logits, ids, args, generator)
        if token == EOS_ID:
            break
        ids = torch.cat([ids, token[None]])
    text: str = tokenizer.decode(ids[length:].tolist())
    return text


def sample(args: argparse.Namespace) -> None:
    model = load_model(args.model, torch.device("cpu"), torch.float32)
    tokenizer = Tokenizer.from_file(str(args.tokenizer or args.model / "tokenizer.json"))
    for prompt in args.prompt:
        for seed in range(args.seed, args.seed + args.count):
            text = continue_text(model, tokenizer, prompt.replace("\\n", "\n"), args, seed)
            print(f"=== {prompt!r} seed {seed}\n{text}\n", flush=True)


def draw_curve(source: Path, target: Path) -> None:
    """loss.csv as a small picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with source.open() as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    figure = Figure(figsize=(6, 3.4), dpi=90, layout="tight")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    epochs = [row["epoch"] for row in rows]
    axes.plot(epochs, [row["held_out_bits_per_character"] for row in rows], linewidth=1.5)
    axes.set(xlabel="epoch", ylabel="held-out bits per character")
    low = rows[-1]["held_out_bits_per_character"]
    axes.set_ylim(low - 0.02, low + 0.5)
    axes.grid(alpha=0.3)
    figure.savefig(target)


def export(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    for source in (args.run / "model.safetensors", args.run / "config.json", args.run / "loss.csv", args.tokenizer):
        shutil.copyfile(source, args.out / source.name)
    config = json.loads((args.run / "config.json").read_text())
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": EOS,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
        "chat_template": CHAT_TEMPLATE,
    }
    generation_config = {
        "eos_token_id": EOS_ID,
        "pad_token_id": EOS_ID,
        "do_sample": True,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "repetition_penalty": args.repetition_penalty,
    }
    (args.out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    (args.out / "generation_config.json").write_text(json.dumps(generation_config, indent=2) + "\n")
    draw_curve(args.out / "loss.csv", args.out / "loss.png")


# ---- command line ----


def add_train_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, help="folder that `prepare` wrote")
    parser.add_argument("--out", type=Path, required=True, help="run folder to write")
    parser.add_argument("--max-bytes", type=int, default=12_000_000, help="size limit of the bf16 file")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--epochs", type=float, default=40.0)
    parser.add_argument("--max-minutes", type=float, default=1e9, help="end the schedule earlier, after this time")
    parser.add_argument("--batch-tokens", type=int, default=32768)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--weight-decay", type=float, default=0.2)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--teacher", type=Path, help="run folder of a model with the same tokenizer to learn from")
    parser.add_argument("--teacher-share", type=float, default=0.9, help="weight of the teacher's term in the loss")
    parser.add_argument("--evaluations", type=int, default=60, help="times to evaluate and save on the way")
    parser.add_argument("--seed", type=int, default=1)


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--repetition-penalty", type=float, default=1.0)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    command = commands.add_parser("prepare", help="corpus -> tokenizer and token arrays")
    command.add_argument("corpus", type=Path, help="prose.txt or prose.txt.xz")
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--vocab-size", type=int, default=6144)
    command.add_argument("--tokenizer", type=Path, help="use this tokenizer.json instead of training one")
    command.set_defaults(run_command=prepare)

    command = commands.add_parser("train", help="token arrays -> run folder")
    add_train_options(command)
    command.set_defaults(run_command=train)

    command = commands.add_parser("evaluate", help="held-out numbers")
    command.add_argument("--model", type=Path, required=True)
    command.add_argument("--data", type=Path, required=True)
    command.add_argument("--draft", type=Path)
    command.set_defaults(run_command=evaluate)

    command = commands.add_parser("sample", help="print continuations")
    command.add_argument("--model", type=Path, required=True)
    command.add_argument("--tokenizer", type=Path, help="default: tokenizer.json in the model folder")
    command.add_argument("--prompt", nargs="+", default=["Once upon a time"])
    command.add_argument("--max-tokens", type=int, default=200)
    command.add_argument("--count", type=int, default=1, help="samples per prompt, with seeds --seed, --seed + 1, ...")
    command.add_argument("--seed", type=int, default=1)
    add_sampling_options(command)
    command.set_defaults(run_command=sample)

    command = commands.add_parser("export", help="run folder -> Hugging Face folder")
    command.add_argument("--run", type=Path, required=True)
    command.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json")
    command.add_argument("--out", type=Path, required=True)
    add_sampling_options(command)
    command.set_defaults(run_command=export)
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse_arguments()
    arguments.run_command(arguments)
