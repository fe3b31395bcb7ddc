"""Compiles kernels for sm_90 without a GPU and prints what each needs: one JSON object a line.

python compile_kernels.py attention|hopper|sampling|state
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"


def compile_kernel(name: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], **options: int) -> None:
    """Lower to a cubin and print what it needs; pointers, and strides of caches and logits, are multiples of 16."""
    names = [param.name for param in kernel.params]
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    multiples = {n for n in names if signature[n].startswith("*")} | {"stride", "block_rows"}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in multiples}
    source_type = GluonASTSource if kernel.is_gluon() else ASTSource
    source = source_type(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.asm["cubin"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        command = [str(PTXAS), "-v", "--gpu-name", "sm_90a", file.name, "-o", "/dev/null"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", log)))
    matrix = "wgmma" if "wgmma.mma" in compiled.asm["ptx"] else "mma" if "mma.sync" in compiled.asm["ptx"] else ""
    before_wait = compiled.asm["ptx"].partition("griddepcontrol.wait")[0]
    early = options.get("launch_pdl", 0) and re.search(r"ld\.global|cp\.async|griddepcontrol", before_wait)
    assert not early or early[0] == "griddepcontrol", f"{name} reads before it waits for its predecessor"
    registers = int(re.findall(r"Used (\d+) registers", log)[0])
    found = {"name": name, "registers": registers, "spilled": spilled, "matrix": matrix}
    found["serialized"] = "instructions are serialized" in log  # wgmma that ptxas does not leave asynchronous
    print(json.dumps(found | {"shared": compiled.metadata.shared}), flush=True)


def attention() -> None:
    """Qwen3-0.6B (16 query and 8 key/value heads of 128), Qwen3-8B (32 and 8), and head sizes 64, 80 and 256."""
    from kvik.kernels.triton.attention_decode import _decode
    from kvik.kernels.triton.attention_plan import _plan
    from kvik.kernels.triton.attention_prefill import _prefill
    from kvik.kernels.triton.attention_tile import attention_tiles

    ints = dict.fromkeys(["items", "counts", "query_starts", "seq_lens", "tables", "arrivals"], "*i32")
    scalars = {"table_stride": "i32", "block_rows": "i32", "scale": "fp32"}
    types = {"parts": "*fp32", "stats": "*fp32", **ints, **scalars}
    cases = [
        ("0.6B", 8, 2, 128, 0, 64, 1, False), ("0.6B exact", 8, 2, 128, 0, 64, 1, True),
        ("8B", 8, 4, 128, 0, 64, 1, False), ("8B exact", 8, 4, 128, 0, 64, 1, True),
        ("0.6B blocks of 1", 8, 2, 128, 0, 1, 1, False),
        ("8B blocks of 16", 8, 4, 128, 0, 16, 1, False), ("8B window", 8, 4, 128, 4096, 64, 1, False),
        ("8B speculating", 8, 4, 128, 0, 64, 8, False), ("64", 8, 7, 64, 0, 64, 1, False),
        ("80", 4, 3, 80, 0, 64, 1, False),
        ("256", 4, 2, 256, 0, 64, 1, False), ("256 exact", 4, 2, 256, 0, 64, 1, True),
        ("96 fp16", 8, 5, 96, 0, 64, 1, False), ("64 fp32", 8, 1, 64, 0, 64, 1, False),
    ]  # fmt: skip
    for name, kv_heads, group, dim, window, block, queries, exact in cases:
        dtype = name.split()[-1] if name.split()[-1] in ("fp16", "fp32") else "bf16"
        tiles = attention_tiles(dim, itemsize=4 if dtype == "fp32" else 2, deterministic=exact)
        types |= dict.fromkeys(["q", "out"], f"*{dtype}")

        def tiles_of(
            keys: int, tma: bool, cache: str = dtype, width: int = triton.next_power_of_2(dim)
        ) -> dict[str, str]:
            return dict.fromkeys(["k", "v"], f"tensordesc<{cache}[{keys}, {width}]>" if tma else f"*{cache}")

        both = {
            "WINDOW": window, "NUM_KV_HEADS": kv_heads, "GROUP": group, "HEAD_DIM": dim, "BLOCK_SIZE": block,
            "BLOCK_D": triton.next_power_of_2(dim), "BLOCK_N": tiles.block_n, "PDL": True,
        }  # fmt: skip
        chunks = {"CHUNK": tiles.chunk, "SHORT_LEN": tiles.short_len, "SHORT_CHUNK": tiles.short_chunk,
                  "UNIT": tiles.unit}  # fmt: skip
        rows = max(tiles.decode_rows, triton.next_power_of_2(group * queries))
        tma = dtype != "fp32" and block % tiles.decode_n == 0
        constants = both | {"BLOCK_N": tiles.decode_n, "MAX_QUERIES": queries, "BLOCK_M": rows, "TMA": tma,
                            "ACROSS": tiles.across} | chunks  # fmt: skip
        stages = {"num_warps": tiles.decode_warps, "num_stages": tiles.decode_stages, "launch_pdl": 1}
        compile_kernel(f"decode {name}", _decode, types | tiles_of(tiles.decode_n, tma), constants, **stages)
        tma = dtype != "fp32" and block % tiles.block_n == 0
        constants = both | {"CHUNK": tiles.chunk if exact else 0, "BLOCK_M": tiles.prefill_rows, "TMA": tma}
        stages = {"num_warps": tiles.prefill_warps, "num_stages": tiles.prefill_stages, "launch_pdl": 1}
        compile_kernel(f"prefill {name}", _prefill, types | tiles_of(tiles.block_n, tma), constants, **stages)
    types = {**types, "decode_items": "*i32", "prefill_items": "*i32", "num_seqs": "i32"}
    constants = {
        "MAX_QUERIES": 1,
        "CHUNK": 512,
        "SHORT_LEN": 2048,
        "SHORT_CHUNK": 128,
        "UNIT": 32,
        "TILE_QUERIES": 16,
        "SEQS": 256,
        "BLOCK": 64,
    }
    compile_kernel("plan", _plan, types, constants, num_warps=1)


def hopper() -> None:
    """The prefill kernel for Hopper: Qwen3-0.6B, Qwen3-8B, and the latter with a sliding window."""
    from triton.experimental.gluon import language as gl

    from kvik.kernels.triton.attention_hopper import _hopper_prefill

    ints = dict.fromkeys(["items", "counts", "query_starts", "tables", "next_work"], "*i32")
    scalars = {"table_stride": "i32", "block_rows": "i32", "scale": "fp32"}
    page = f"tensordesc<bf16[64, 64],{gl.NVMMASharedLayout.get_default_for([64, 64], gl.bfloat16)!r}>"
    for name, group, window in (("0.6B", 2, 0), ("8B", 4, 0), ("8B window", 4, 4096)):
        box = [128 // group, group, 64]
        queries = f"tensordesc<bf16{box},{gl.NVMMASharedLayout.get_default_for(box, gl.bfloat16)!r}>"
        types = {**ints, **scalars, "q": queries, "k": page, "v": page, "out": "*bf16"}
        constants = {"NUM_KV_HEADS": 8, "GROUP": group, "BLOCK_SIZE": 64, "WINDOW": window, "PDL": True}
        compile_kernel(f"hopper {name}", _hopper_prefill, types, constants, num_warps=4, launch_pdl=1)


def hopper_linear() -> None:
    """The projections for Hopper: every plan that is shipped, once, whole and with fewer tokens."""
    from triton.experimental.gluon import language as gl

    from kvik.kernels.triton.dispatch import CUTS, load_table
    from kvik.kernels.triton.linear_hopper import _linear_hopper, launch_options, token_widths

    def tiles(box: list[int]) -> str:
        return f"tensordesc<bf16{box},{gl.NVMMASharedLayout.get_default_for(box, gl.bfloat16)!r}>"

    seen = set()
    for key, plan in load_table("NVIDIA H200", Path("/absent")).measured.items():
        swiglu, kind = "swiglu" in key, (plan.block_n, plan.block_t, plan.split_k, plan.num_stages, "swiglu" in key)
        if plan.path != "hopper" or kind in seen:
            continue
        seen.add(kind)
        for width, rest in {token_widths(plan, eighths * plan.block_t // 8) for eighths in (*CUTS, 8)}:
            x, out = ([tiles([tokens, columns]) if tokens else None for tokens in (width, rest)]
                      for columns in (64, 32 if swiglu else 64))  # fmt: skip
            if plan.split_k > 1:
                out = ["*fp32", "*fp32"]
            names = dict(zip(("x", "rest", "out", "rest_out"), (*x, *out), strict=True))
            types = {name: kind for name, kind in names.items() if kind}
            types |= {"weight": tiles([4, 2, 8, 64] if swiglu else [64, 64]), "m": "i32", "n": "i32"}
            constants = {name: None for name, kind in names.items() if kind is None} | {
                "K": 4096, "GROUPS": plan.block_n // 64, "WIDTH": width, "REST": rest, "STAGES": plan.num_stages,
                "SPLIT_K": plan.split_k, "bias": None, "residual": None, "SWIGLU": swiglu, "PDL": True,
            }  # fmt: skip
            name = f"hopper linear {kind} {width} {rest}"
            compile_kernel(name, _linear_hopper, types, constants, launch_pdl=1, **launch_options(plan))


def sampling() -> None:
    """Vocabulary of Qwen3: 151936 entries, in 75 slices."""
    from kvik.kernels.triton import logit_edits, sampler, token_filters, token_logprobs
    from kvik.kernels.triton.sampling_table import SamplerTiles

    ints = ["rows", "edits", "num_tokens", "num_prompt", "token_ids", "counts", "allowed", "top_k", "min_tokens",
            "bias_ids", "stop_ids", "bad_words", "lows", "limits", "best_groups", "tokens", "slice_ids", "ranks",
            "top_ids"]  # fmt: skip
    floats = ["edited", "repetition", "presence", "frequency", "bias", "temperature", "log_min_p", "peaks", "best",
              "stats", "slice_logits", "logprobs", "top_logprobs"]  # fmt: skip
    scalars = dict.fromkeys(["vocab", "width", "words", "stride", "slices", "step"], "i32")
    types = {**dict.fromkeys(ints, "*i32"), **dict.fromkeys(floats, "*fp32"), **scalars, "logits": "*bf16"}
    types |= {"seed": "*i64", "top_p": "*fp64", "sums": "*fp64"}
    tiles = SamplerTiles()
    block, slices = {"BLOCK": tiles.slice}, {"SLICES": 128}
    compile_kernel("count", logit_edits._count, types, {"BLOCK": tiles.tokens}, num_warps=tiles.warps)
    compile_kernel("edit", logit_edits._edit, types, block, num_warps=tiles.warps)
    sizes = {"NUM_BIASES": 512, "NUM_STOPS": 32, "NUM_WORDS": 128, "WORD": 8}
    sizes |= {"BIASES": 512, "STOPS": 32, "WORDS": 128, "LETTERS": 8}
    compile_kernel("edit lists", logit_edits._edit_lists, types, sizes, num_warps=tiles.warps)
    compile_kernel("peaks", token_filters._peaks, types, block, num_warps=tiles.warps)
    for top_p in (False, True):
        search = {"TOP_P": top_p, "PART": tiles.part, **block, **slices}
        name = "top-p" if top_p else "top-k"
        compile_kernel(f"measure {name}", token_filters._measure, types, search, num_warps=tiles.warps)
        compile_kernel(
            f"settle {name}", token_filters._settle, types, {"TOP_P": top_p, **slices}, num_warps=tiles.warps
        )
        chosen = {"FILTERS": top_p, **slices}
        compile_kernel(f"draw {name}", sampler._draw, types, {**chosen, **block}, num_warps=tiles.draw_warps)
        compile_kernel(f"pick {name}", sampler._pick, types, chosen, num_warps=1)
    compile_kernel(
        "logprobs slice", token_logprobs._slice, types, {"TOP": 20, "WIDTH": 20, **block}, num_warps=tiles.warps
    )
    joined = {"TOP": 20, "WIDTH": 20, "BLOCK": 2048, **slices}
    compile_kernel("logprobs join", token_logprobs._join, types, joined, num_warps=tiles.warps)


def state() -> None:
    """Blocks of 64 tokens."""
    from kvik.kernels.triton import block_copy
    from kvik.kernels.triton import state as kernels

    ints = ["rows", "tokens", "token_ids", "num_tokens", "tables", "seq_lens", "out_tables", "pairs", "host", "turn"]
    longs = ["input_ids", "positions", "slots", "addresses"]
    scalars = dict.fromkeys(
        ["num_rows", "width", "max_blocks", "out_blocks", "dummy_slot", "words", "stride", "host_width"], "i32"
    )
    types = {**dict.fromkeys(ints, "*i32"), **dict.fromkeys(longs, "*i64"), **scalars}
    compile_kernel("inputs", kernels._inputs, types, {"BLOCK_SIZE": 64, "BLOCK": kernels.BLOCK}, num_warps=1)
    compile_kernel("append", kernels._append, types, {"BLOCK": kernels.BLOCK, "TURNS": 32}, num_warps=4)
    compile_kernel("copy blocks", block_copy._copy, types, {"BLOCK": block_copy.WORDS}, num_warps=4)


if __name__ == "__main__":
    groups = {
        "attention": attention, "hopper": hopper, "hopper_linear": hopper_linear, "sampling": sampling, "state": state,
    }  # fmt: skip
    groups[sys.argv[1]]()
