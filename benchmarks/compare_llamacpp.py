"""Kvik against llama.cpp on the same cores, the same random weights' shapes and the same prompts, in alternating runs.

    python benchmarks/compare_llamacpp.py --llama-python PEER/bin/python --folder FOLDER --pairs 5 --json FILE

PEER is an environment with `llama-cpp-python` (built natively) and `gguf`; FOLDER keeps the GGUF files. `pairs.py` says
how runs are paired.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pairs import OUTPUT, PROMPT, SHAPES, THREADS, Worker, add_arguments, alternate, model_folder, write_line

PAIRS = Path(__file__).with_name("pairs.py")
FORMATS = {
    "bf16": ("BF16", None),
    "int8": ("Q8_0", "int8"),
    "int4": ("Q4_0", "int4"),
    "int4-file": ("Q4_0-file", "int4"),  # as llama-quantize writes Q4_0: the head is Q6_K, because it loses most
}
CONTEXT = 8 * (PROMPT + OUTPUT + 64)


def make_gguf(shape: str, kind: str, path: Path) -> None:
    """Write a GGUF file with random weights of `shape` in the type `kind`. Needs the package gguf."""
    import gguf
    import numpy as np

    config = SHAPES[shape]
    arch, hidden, inner = config["model_type"], config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    rng, qtype = np.random.default_rng(0), gguf.GGMLQuantizationType[kind]

    def matrix(name: str, rows: int, columns: int) -> None:
        values = (rng.random((rows, columns), dtype=np.float32) - 0.5) * (12 / columns) ** 0.5
        writer.add_tensor(name, gguf.quants.quantize(values, qtype), raw_dtype=qtype)

    def vector(name: str, size: int, value: float) -> None:
        writer.add_tensor(name, np.full(size, value, dtype=np.float32))

    matrix("token_embd.weight", config["vocab_size"], hidden)
    vector("output_norm.weight", hidden, 1.0)
    for i in range(config["num_hidden_layers"]):
        vector(f"blk.{i}.attn_norm.weight", hidden, 1.0)
        vector(f"blk.{i}.ffn_norm.weight", hidden, 1.0)
        for name, rows in (("q", heads * head_dim), ("k", kv_heads * head_dim), ("v", kv_heads * head_dim)):
            matrix(f"blk.{i}.attn_{name}.weight", rows, hidden)
            if arch == "qwen2":
                vector(f"blk.{i}.attn_{name}.bias", rows, 0.0)
            elif name != "v":
                vector(f"blk.{i}.attn_{name}_norm.weight", head_dim, 1.0)
        matrix(f"blk.{i}.attn_output.weight", hidden, heads * head_dim)
        matrix(f"blk.{i}.ffn_gate.weight", inner, hidden)
        matrix(f"blk.{i}.ffn_up.weight", inner, hidden)
        matrix(f"blk.{i}.ffn_down.weight", hidden, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize_gguf(shape: str, path: Path) -> None:
    """Let llama.cpp itself write the Q4_0 file that its users have, from the file in bf16."""
    import llama_cpp as lib

    whole = path.with_name("BF16.gguf")
    if not whole.exists():
        make_gguf(shape, "BF16", whole)
    params = lib.llama_model_quantize_default_params()
    params.ftype, params.nthread = lib.LLAMA_FTYPE_MOSTLY_Q4_0, THREADS
    if lib.llama_model_quantize(str(whole).encode(), str(path).encode(), params) != 0:
        raise RuntimeError(f"llama.cpp could not quantize {whole}")


def llama_worker(path: Path) -> None:
    """Read user counts from stdin, answer each with {"prefill": seconds, "decode": seconds}."""
    import ctypes

    import llama_cpp as lib

    lib.llama_backend_init()
    silent = lib.llama_log_callback(lambda *_: None)
    lib.llama_log_set(silent, ctypes.c_void_p(0))
    model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
    options = lib.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch, options.n_seq_max = CONTEXT, 8 * PROMPT, 512, 8
    options.n_threads = options.n_threads_batch = THREADS
    context = lib.llama_init_from_model(model, options)
    batch = lib.llama_batch_init(8 * PROMPT, 0, 1)

    def decode(items: list[tuple[int, int, int, bool]]) -> None:
        batch.n_tokens = len(items)
        for i, (token, position, sequence, logits) in enumerate(items):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, logits
        if lib.llama_decode(context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        lib.llama_get_logits_ith(context, len(items) - 1)

    print("ready", flush=True)
    for line in sys.stdin:
        users = int(line)
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        begin = time.perf_counter()
        decode([(3 + (7 * p + u) % 9000, p, u, p == PROMPT - 1) for u in range(users) for p in range(PROMPT)])
        filled = time.perf_counter()
        for step in range(OUTPUT - 1):
            decode([(3 + (11 * step + u) % 9000, PROMPT + step, u, True) for u in range(users)])
        end = time.perf_counter()
        print(json.dumps({"prefill": filled - begin, "decode": end - filled}), flush=True)


def compare(shape: str, fmt: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Alternate both engines and return the records of each number of users."""
    kind, quantization = FORMATS[fmt]
    folder = model_folder(shape, args.folder)
    gguf_file = folder / f"{kind}.gguf"
    if not gguf_file.exists():
        subprocess.run([args.llama_python, __file__, "--make", shape, kind, str(gguf_file)], check=True)
    kvik = Worker([sys.executable, str(PAIRS), str(folder), quantization or ""])
    llama = Worker([args.llama_python, __file__, "--llama", str(gguf_file)])
    records = alternate(kvik, llama, "llamacpp", args, shape=shape, format=fmt)
    kvik.close()
    llama.close()
    return records


def main() -> None:
    """Parse the command line; the hidden first words start workers."""
    if sys.argv[1:2] == ["--make"]:
        shape, kind, path = sys.argv[2], sys.argv[3], Path(sys.argv[4])
        return quantize_gguf(shape, path) if kind == "Q4_0-file" else make_gguf(shape, kind, path)
    if sys.argv[1:2] == ["--llama"]:
        return llama_worker(Path(sys.argv[2]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-python", required=True, help="interpreter of the environment with llama-cpp-python")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    add_arguments(parser)
    args = parser.parse_args()
    records = [record for shape in args.shapes for fmt in args.formats for record in compare(shape, fmt, args)]
    return write_line(args.json, "compare_llamacpp", records=records)


if __name__ == "__main__":
    main()
