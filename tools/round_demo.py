"""Train the demo model for its quantised formats: rounding is in the loop, so that it costs few predictions.

    round_demo.py --model FOLDER --data DATA --out OUT --seconds 240

goes on from the weights in FOLDER, with `train_demo.py prepare`'s DATA, and writes OUT/model.safetensors (bf16, the
same names and shapes), OUT/last/ (the end of the run, should an earlier checkpoint have been the best) and
OUT/log.json. Two things are different from plain training.

Weights: after every step they are what both formats can say. A row's scale is a power of two and its largest value
127 or -127 times it, a group of 32 inputs has as its scale a whole multiple of that, and a value is a 4-bit number
times it. bf16 holds such weights exactly, and rounding them to int8 gives them back; int4 does, but for values near
127. The gradient goes straight through.

Activations: every batch is computed twice, plain and with int8 activations, one scale a token, as the int8 kernels have
them; those of down and of the output head are two rows of int8 (mode "fine"). The loss is

    share KL(before || plain) + (1 - share) cross-entropy + a KL(plain || int8) + b hinge + c range

where the hinge asks both to put plain's likeliest token ahead by a small margin, and the range is the square of
max |x| / rms(x) over the inputs of all projections, to which the error of rounding is proportional.

Every 66th training document is set aside to choose the checkpoint; held-out text is used for the last report alone.
How the shipped weights were made is in `src/kvik/assets/demo/README.md`.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import train_demo
from torch import Tensor
from train_demo import Layer, StoryModel

from kvik.quantization import reference

GROUP = 32
VALIDATION_EVERY = 66
WINDOW = 512  # as in receipts
PARTS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


# ---- weights ----


@torch.no_grad()
def on_grid(weight: Tensor, grouped: bool) -> tuple[Tensor, Tensor]:
    """`weight` [out, in] as (whole numbers in [-127, 127], their scale [out, 1]); `grouped`: such as int4 has, too."""
    exponent = (weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127).log2()
    low, high = exponent.floor().exp2(), exponent.ceil().exp2()
    below, above = whole_units(weight / low, grouped), whole_units(weight / high, grouped)
    error_below = (weight - below * low).square().sum(1, keepdim=True)
    error_above = (weight - above * high).square().sum(1, keepdim=True)
    lower = error_below < error_above
    return torch.where(lower, below, above), torch.where(lower, low, high)


def whole_units(units: Tensor, grouped: bool) -> Tensor:
    """Rounded, the largest of each row to 127 or -127: from that, rounding to int8 finds the scale again."""
    largest = units.abs().argmax(1, keepdim=True)
    units = units.scatter(1, largest, 127 * units.gather(1, largest).sign()).clamp(-127, 127)
    if not grouped:
        return units.round()
    units = units.view(len(units), -1, GROUP)
    high, low = units.amax(-1, keepdim=True), units.amin(-1, keepdim=True)
    size = torch.maximum(high, -low)
    # The largest value becomes 8 or 7 steps: from those, rounding to int4 finds the step again.
    step = (size / 8).round().clamp(1, 16)
    step = torch.where(size < 6.5 * step, step - 1, step).clamp_min(1)
    step = torch.where(high >= -low, -step, step)
    return ((units / step).round().clamp(-8, 7) * step).clamp(-127, 127).flatten(1)


@dataclasses.dataclass(frozen=True, slots=True)
class Weight:
    """A projection [out, in]: the weights themselves, and the same as whole numbers times `scale` [out, 1]."""

    plain: Tensor
    units: Tensor
    scale: Tensor

    @classmethod
    def trained(cls, weight: Tensor, grouped: bool, dtype: torch.dtype) -> Weight:
        """Put on the grid, with the gradient going straight to `weight`."""
        rounded, scale = on_grid(weight, grouped)
        units = weight / scale
        units = units + (rounded - units).detach()
        return cls((units * scale).to(dtype), units.to(dtype), scale)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.plain, self.units, self.scale


def projection(layer: Layer, names: tuple[str, ...]) -> Tensor:
    """The named projections of a layer as one matrix."""
    modules = dict(layer.self_attn.named_children()) | dict(layer.mlp.named_children())
    return torch.cat([modules[name].get_parameter("weight") for name in names])


def each_weight(model: StoryModel, make: Callable[[Tensor, bool], Weight]) -> list[list[Weight]]:
    """`make(weight, grouped)` of the projections of every layer, and in a last list of the embedding."""
    layers = [[make(projection(layer, names), True) for names in PARTS] for layer in layers_of(model)]
    return [*layers, [make(model.embed_tokens.weight, False)]]


def layers_of(model: StoryModel) -> list[Layer]:
    return [layer for layer in model.layers if isinstance(layer, Layer)]


@torch.no_grad()
def snapped(model: StoryModel) -> StoryModel:
    """A copy of `model` with all weights on the grid, rounded to bf16."""
    made = copy.deepcopy(model)
    for name, weight in made.named_parameters():
        if weight.ndim == 2:
            units, scale = on_grid(weight, "embed" not in name)
            weight.copy_(units * scale)
        weight.copy_(weight.bfloat16())
    return made.eval()


# ---- the model, with rounding ----


def linear(x: Tensor, weight: tuple[Tensor, Tensor, Tensor], mode: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x times `weight` in `mode`, plain, int8, fine or int4, in `dtype`; and the range (see above), 0 but with int8."""
    plain, units, scale = weight
    nothing = x.new_zeros(())
    if mode == "plain":
        return F.linear(x.to(plain.dtype), plain).to(dtype), nothing
    wide = x.float()
    if mode == "int4":
        groups = wide.reshape(*wide.shape[:-1], -1, GROUP)
        steps = groups.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
        return F.linear(((groups / steps).round() * steps).flatten(-2), plain).to(dtype), nothing
    most = wide.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    step = most / 127  # differentiable: the error is step times a constant
    exact = wide / step
    whole = exact + (exact.round() - exact).detach()
    spread = (most.square() / wide.square().mean(-1, keepdim=True).clamp_min(1e-30)).mean()
    sums = F.linear(whole.to(units.dtype), units)
    if mode == "fine":
        rest = ((exact - exact.round()).detach() * 254).round()
        sums = sums + F.linear(rest.to(units.dtype), units) / 254
    return (sums * (step * scale.view(-1))).to(dtype), spread


def scores(hidden: Tensor, weight: tuple[Tensor, Tensor, Tensor], mode: str) -> tuple[Tensor, Tensor]:
    """Logits in fp32: those of bf16 are too coarse to tell near ties apart. And the range."""
    plain, units, scale = weight
    return linear(hidden, (plain.float(), units.float(), scale), "fine" if mode == "int8" else mode, torch.float32)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def block(
    x: Tensor, weights: list[tuple[Tensor, Tensor, Tensor]], norms: list[Tensor], table: Tensor, eps: float, mode: str
) -> tuple[Tensor, Tensor]:
    """A layer: x [batch, length, hidden] -> the same, and the sum of the ranges."""
    head_dim, dtype = norms[1].numel(), weights[0][0].dtype
    kv_heads = (weights[0][0].shape[0] - weights[1][0].shape[1]) // (2 * head_dim)
    qkv, range_qkv = linear(norm(x, norms[0], eps), weights[0], mode, dtype)
    heads = qkv.view(*qkv.shape[:-1], -1, head_dim).transpose(1, 2)
    q, k, v = torch.split(heads, [heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    q, k = train_demo.rotate(norm(q, norms[1], eps), table), train_demo.rotate(norm(k, norms[2], eps), table)
    if mode != "plain":  # queries and the cache; all else is fp32 in the kernels
        q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    out, range_o = linear(out.transpose(1, 2).flatten(2), weights[1], mode, dtype)
    x = x + out.to(x.dtype)
    wide, range_in = linear(norm(x, norms[3], eps), weights[2], mode, dtype)
    gate, up = wide.chunk(2, dim=-1)
    out, range_down = linear(F.silu(gate) * up, weights[3], "fine" if mode == "int8" else mode, dtype)
    return x + out.to(x.dtype), range_qkv + range_o + range_in + range_down


def hidden_states(
    model: StoryModel, weights: list[list[Weight]], ids: Tensor, mode: str, run: Any = block
) -> tuple[Tensor, Tensor]:
    """Of ids [batch, length], before the output head but after its norm: [batch * length, hidden]; and the ranges."""
    eps = model.shape.rms_norm_eps
    table = train_demo.rotary_table(ids.shape[1], model.shape, ids.device)
    x = F.embedding(ids, weights[-1][0].plain).float()
    ranges = torch.zeros((), device=ids.device)
    for layer, parts in zip(layers_of(model), weights[:-1], strict=True):
        attention = layer.self_attn
        modules = (layer.input_layernorm, attention.q_norm, attention.k_norm, layer.post_attention_layernorm)
        x, spread = run(x, [p.tensors() for p in parts], [m.weight for m in modules], table, eps, mode)
        ranges = ranges + spread
    return norm(x, model.norm.weight, eps).flatten(0, 1), ranges


# ---- measuring, as receipts do ----


def stored(fmt: str, device: torch.device) -> Callable[[Tensor, bool], Weight]:
    """Weights as `kvik quantize --calibration none` makes them; the output head is int8 in every format."""

    def make(weight: Tensor, grouped: bool) -> Weight:
        name = fmt if grouped else "int8"
        q, scales = reference.quantize(weight.detach().cpu(), "int4g32" if name == "int4" else name)
        plain = reference.dequantize(q, scales, "int4g32" if name == "int4" else name)
        return Weight(plain.to(device), q.float().to(device), scales.view(len(q), -1)[:, :1].to(device))

    return make


@torch.no_grad()
def measure(model: StoryModel, windows: Tensor) -> dict[str, float]:
    """Nats per token of `model` in fp32, and how int8 and int4 compare with it."""
    device = windows.device
    torch.set_float32_matmul_precision("highest")
    kinds: dict[str, Any] = {"plain": lambda weight, _: Weight(weight, weight, weight)}
    kinds |= {fmt: stored(fmt, device) for fmt in ("int8", "int4")}
    weights = {fmt: each_weight(model, make) for fmt, make in kinds.items()}
    sums: dict[str, float] = dict.fromkeys(["nats", *(f"{fmt}_{what}" for fmt in kinds for what in ("kl", "top1"))], 0)
    ranges = 0.0
    for ids in torch.split(windows, 16):
        logits = {}
        for fmt, parts in weights.items():
            hidden, spread = hidden_states(model, parts, ids, fmt)
            head = scores(hidden, parts[-1][0].tensors(), "plain" if fmt == "plain" else "int8")[0]
            logits[fmt] = head.log_softmax(-1)
            ranges += spread.item() * len(ids)
        plain = logits["plain"]
        targets = ids[:, 1:].flatten()
        sums["nats"] += F.nll_loss(plain.view(*ids.shape, -1)[:, :-1].flatten(0, 1), targets).item() * len(ids)
        for fmt in ("int8", "int4"):
            kl = (plain.exp() * (plain - logits[fmt])).sum(-1).mean()
            sums[f"{fmt}_kl"] += kl.item() * len(ids)
            same = (plain.argmax(-1) == logits[fmt].argmax(-1)).float().mean()
            sums[f"{fmt}_top1"] += same.item() * len(ids)
    sums["range"] = ranges / (4 * len(model.layers))
    return {name: round(total / len(windows), 6) for name, total in sums.items() if not name.startswith("plain")}


def windows_of(tokens: Any, device: torch.device, count: int | None = None) -> Tensor:
    """Tokens in windows [count, WINDOW], spread over all of them."""
    ids = torch.from_numpy(tokens.astype(np.int64))
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    stride = 1 if count is None else max(1, len(windows) // count)
    return windows[::stride][:count].to(device)


# ---- training ----


def margin(logits: Tensor, top: Tensor) -> Tensor:
    """How far `top` [n] is ahead of all others in logits [n, vocab]; negative if it is not. Returns [n]."""
    others = torch.arange(logits.shape[1], device=logits.device) != top[:, None]
    best = logits.masked_fill(~others, -torch.inf).amax(-1)
    return logits.gather(1, top[:, None]).squeeze(1) - best


def terms(
    hidden: tuple[Tensor, Tensor, Tensor],
    heads: tuple[Tensor, tuple[Tensor, Tensor, Tensor]],
    targets: Tensor,
    ahead: float,
) -> Tensor:
    """[KL(before || plain), cross-entropy, KL(plain || int8), hinge, range of the head, share of flips].

    `hidden`: of the model before, plain and int8. `heads`: of the model before, and the trained one.
    """
    before = F.linear(hidden[0].float(), heads[0].float()).log_softmax(-1)
    plain, _ = scores(hidden[1], heads[1], "plain")
    rounded, spread = scores(hidden[2], heads[1], "int8")
    log_plain, log_rounded = plain.log_softmax(-1), rounded.log_softmax(-1)
    top = plain.detach().argmax(-1)
    gap, gap_rounded = margin(plain, top), margin(rounded, top)
    hinge = F.relu(ahead - gap).mean() + F.relu(ahead - gap_rounded).mean()
    kl_before = (before.exp() * (before - log_plain)).sum(-1).mean()
    kl_rounded = (log_plain.exp() * (log_plain - log_rounded)).sum(-1).mean()
    flips = (gap_rounded < 0).float().mean()
    return torch.stack([kl_before, F.nll_loss(log_plain, targets), kl_rounded, hinge, spread, flips])


class Trainer:
    """Steps until `seconds` after `start`, with a look at the validation windows now and then."""

    def __init__(self, args: argparse.Namespace, start: float) -> None:
        self.args, self.start = args, start
        self.device = torch.device(args.device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        data = train_demo.load_data(args.data)
        kept = [d for i, d in enumerate(data.documents) if i % VALIDATION_EVERY]
        self.data = dataclasses.replace(data, documents=kept, num_train_tokens=sum(map(len, kept)))
        held = np.concatenate([d for i, d in enumerate(data.documents) if i % VALIDATION_EVERY == 0])
        self.validation = windows_of(held, self.device, args.validation_windows)
        self.before = train_demo.load_model(args.model, self.device, self.dtype)
        self.model = copy.deepcopy(self.before).train()
        self.log: dict[str, Any] = {"arguments": {k: str(v) for k, v in vars(args).items()}, "curve": []}
        use_gpu = self.device.type == "cuda"
        self.block = torch.compile(block, dynamic=False, disable=not use_gpu)
        self.terms = torch.compile(terms, dynamic=False, disable=not use_gpu)
        # The model before is not put on the grid.
        with torch.no_grad():
            self.weights_before = each_weight(
                self.before, lambda w, _: Weight(w.to(self.dtype), w.to(self.dtype), w.new_ones(len(w), 1))
            )

    def loss(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """(the loss, its terms and the mean range) of a batch [batch, length + 1]."""
        args, ids = self.args, batch[:, :-1]
        weights = each_weight(self.model, lambda w, grouped: Weight.trained(w, grouped, self.dtype))
        with torch.no_grad():
            before, _ = hidden_states(self.before, self.weights_before, ids, "plain", self.block)
        plain, _ = hidden_states(self.model, weights, ids, "plain", self.block)
        rounded, ranges = hidden_states(self.model, weights, ids, "int8", self.block)
        heads = (self.weights_before[-1][0].plain, weights[-1][0].tensors())
        parts = self.terms((before, plain, rounded), heads, batch[:, 1:].flatten(), args.ahead)
        spread = (ranges + parts[4]) / (4 * len(self.model.layers) + 1)
        factors = torch.tensor([args.share, 1 - args.share, args.kl, args.hinge, 0, 0], device=self.device)
        return (parts * factors).sum() + args.range * spread, torch.cat([parts.detach(), spread.detach()[None]])

    def run(self) -> None:
        args = self.args
        muon, adam = train_demo.make_optimizers(self.model, args)
        stream = train_demo.batches(self.data, args.context, args.batch_tokens, self.device, args.seed)
        self.note(0, torch.zeros(7), 1, self.before)
        sums, counted, step = torch.zeros(7, device=self.device), 0, 0
        warm, progress, looks = None, 0.0, 1
        while progress < 1:
            if self.device.type == "cuda":  # TF32 for the logits: exact, for the factors are bf16
                torch.set_float32_matmul_precision("high")
            loss, parts = self.loss(next(stream))
            torch.autograd.backward(loss)
            lr = train_demo.learning_rate(progress, args.learning_rate)
            muon.step(lr, args.weight_decay)
            for group in adam.param_groups:
                group["lr"] = lr
            adam.step()
            adam.zero_grad(set_to_none=True)
            sums += parts
            step, counted = step + 1, counted + 1
            if step % 10 == 0 and self.device.type == "cuda":
                torch.cuda.synchronize()  # or the clock would be ahead of the work
            if step == 3:
                warm = self.seconds()  # compilation is over
            if warm is not None:
                progress = max(progress, (self.seconds() - warm) / max(args.seconds - warm, 1e-3))
            if progress >= looks / args.evaluations or progress >= 1:
                self.note(step, sums / counted, counted, snapped(self.model))
                looks, counted = looks + 1, 0
                sums.zero_()

    def seconds(self) -> float:
        return time.monotonic() - self.start

    def note(self, step: int, parts: Tensor, counted: int, model: StoryModel) -> None:
        """Measure `model`, keep it if it is the best so far, and write the log."""
        names = ["kl_before", "cross_entropy", "kl_int8", "hinge", "head_range", "flips", "range"]
        train = {k: round(v, 6) for k, v in zip(names, parts.tolist(), strict=True)}
        entry: dict[str, Any] = {"step": step, "seconds": round(self.seconds(), 1), "steps_averaged": counted}
        entry |= {"train": train, "validation": measure(model, self.validation)}
        curve = self.log["curve"]
        curve.append(entry)
        print(json.dumps(entry), flush=True)
        if step:
            train_demo.save_model(model, self.args.out / "last")
            allowed = curve[0]["validation"]["nats"] + self.args.max_loss
            candidates = [e for e in curve[1:] if e["validation"]["nats"] <= allowed] or curve[1:]
            if max(candidates, key=lambda e: e["validation"]["int8_top1"]) is entry:
                train_demo.save_model(model, self.args.out)
                self.log["chosen_step"] = step
        self.write_log()

    def write_log(self) -> None:
        (self.args.out / "log.json").write_text(json.dumps(self.log, indent=1) + "\n")

    def report(self) -> None:
        """Both models on the held-out documents, read from their files."""
        windows = windows_of(self.data.held_out[1:].numpy(), self.device, self.args.held_out_windows)
        self.log["held_out"] = {}
        for name, folder in (("before", self.args.model), ("after", self.args.out)):
            model = train_demo.load_model(folder, self.device, torch.float32)
            self.log["held_out"][name] = measure(model, windows)
            print(name, json.dumps(self.log["held_out"][name]), f"{self.seconds():.1f} s", flush=True)
            self.write_log()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model to go on from")
    parser.add_argument("--data", type=Path, required=True, help="folder that `train_demo.py prepare` wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, required=True, help="end of training, counted from the start")
    parser.add_argument("--batch-tokens", type=int, default=32768)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--share", type=float, default=0.9, help="of the model before in the loss, against the text")
    parser.add_argument("--kl", type=float, default=30.0, help="weight of KL(plain || int8)")
    parser.add_argument("--hinge", type=float, default=1.0, help="weight of the hinge")
    parser.add_argument("--ahead", type=float, default=0.1, help="margin that the hinge asks for, in nats")
    parser.add_argument("--range", type=float, default=1.5e-3, help="weight of the mean range")
    parser.add_argument("--max-loss", type=float, default=0.02, help="nats that a chosen checkpoint may lose")
    parser.add_argument("--evaluations", type=int, default=8)
    parser.add_argument("--validation-windows", type=int, default=128)
    parser.add_argument("--held-out-windows", type=int, help="at most so many for the last report (default: all)")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    start, args = time.monotonic(), parse_arguments()
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(args, start)
    trainer.run()
    trainer.report()


if __name__ == "__main__":
    main()
