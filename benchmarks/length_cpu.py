"""A whole analysis at 131072 tokens on a CPU: two layers, four heads of width 32, random weights.

Run with `python benchmarks/length_cpu.py`; prints the time and the peak memory of the process. The matrices that this
analysis does not form would take 8 x 131072 x 131072 x 4 bytes = 512 GiB.
"""

from __future__ import annotations

import argparse
import math
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import attnlab
from attnlab.runs.memory import peak_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=arguments.tokens,
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 512, (arguments.tokens,)).tolist()
    start = time.perf_counter()
    run = attnlab.analyze(model, [ids], progress=False)
    seconds = time.perf_counter() - start
    peak = (peak_memory() or math.nan) / 2**30
    print(run.heads[run.heads["metric"] == "entropy"].to_string(index=False))
    print(
        f"\n{arguments.tokens} tokens, 2 layers, 4 heads, D 32, {', '.join(run.results)}: "
        f"{seconds:.0f} s, peak memory of the process {peak:.2f} GiB ({arguments.threads} threads)"
    )


if __name__ == "__main__":
    main()
