"""A GPT-2-sized forward with entropy and key sums of every head, beside the same forward through `sdpa` and `eager`.

Run with `python benchmarks/forward_cpu.py`; prints ratios of medians of interleaved repeats. Weights are random: the
time of a dense forward does not depend on them. The base model is timed (no logits): attention at its largest share.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
from collections.abc import Callable

import torch
from attnlab_kernels import Emit
from timing import medians, table, wall_seconds
from transformers import GPT2Config, GPT2Model

from attnlab.capture import capture
from attnlab.runs.memory import peak_memory


def gpt2(tokens: int, layers: int) -> GPT2Model:
    torch.manual_seed(0)
    config = GPT2Config(n_positions=tokens, n_layer=layers, vocab_size=1024)
    return GPT2Model(config).eval()


def plain(model: GPT2Model, ids: torch.Tensor) -> torch.Tensor:
    model.set_attn_implementation("sdpa")
    return model(input_ids=ids, use_cache=False).last_hidden_state


def captured(model: GPT2Model, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.set_attn_implementation("sdpa")
    with capture(model, emit=Emit(entropy=True, key_sum=True)) as session:
        hidden = model(input_ids=ids, use_cache=False).last_hidden_state
    entropies = [call.emitted.entropy for call in session.calls]
    return hidden, [entropy for entropy in entropies if entropy is not None]


def eager(model: GPT2Model, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.set_attn_implementation("eager")
    output = model(input_ids=ids, use_cache=False, output_attentions=True)
    entropies = []
    for pattern in output.attentions:
        entropies.append(torch.special.entr(pattern).sum(-1))
        pattern.sum(2)
    return output.last_hidden_state, entropies


VARIANTS: dict[str, Callable[[GPT2Model, torch.Tensor], object]] = {
    "sdpa": plain,
    "attnlab": captured,
    "eager": eager,
}


def check(layers: int) -> None:
    """Refuse to time a capture whose numbers are wrong, on a length that `eager` can do."""
    model, ids = gpt2(512, layers), torch.randint(0, 1024, (1, 512))
    reference, expected = eager(model, ids)
    hidden, entropies = captured(model, ids)
    torch.testing.assert_close(hidden, reference, atol=1e-4, rtol=1e-4)
    for got, want in zip(entropies, expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=tuple(VARIANTS), help="run one variant once and print its peak memory")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it warns of token ids that are not used here
    with torch.no_grad():
        model = gpt2(arguments.tokens, arguments.layers)
        ids = torch.randint(0, 1024, (1, arguments.tokens))
        if arguments.only:
            before = peak_memory() or 0
            VARIANTS[arguments.only](model, ids)
            print(((peak_memory() or 0) - before) // 2**20)
            return
        check(arguments.layers)
        times: dict[str, list[float]] = {name: [] for name in VARIANTS}
        for repeat in range(arguments.repeats + 1):
            for name, run in VARIANTS.items():
                if name == "eager" and repeat > 1:  # the slow peer: one warm-up, one timed run
                    continue
                taken = wall_seconds(lambda run=run: run(model, ids))
                if repeat:
                    times[name].append(taken)
    middle = medians(times)
    print(
        f"\nGPT-2 layout, {arguments.layers} layers, {arguments.tokens} tokens, float32, {arguments.threads} threads, "
    )
    print(f"torch {torch.__version__}; medians of {arguments.repeats} interleaved runs (eager: 1)\n")
    rows = []
    for name, seconds in middle.items():
        command = [sys.executable, __file__, "--only", name]
        command += ["--tokens", str(arguments.tokens), "--layers", str(arguments.layers)]
        memory = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
        rows.append((name, f"{seconds:.2f}", f"{seconds / middle['sdpa']:.2f}", memory))
    print(*table(("forward", "seconds", "ratio to sdpa", "memory above the model, MB"), rows), sep="\n")


if __name__ == "__main__":
    main()
