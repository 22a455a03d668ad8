"""Write `known-circuit`: a transformer whose weights are written down, with the truth about its heads beside them.

    python data/build_known_circuit.py --out data/models/known-circuit

Nothing is trained, so it takes seconds and gives the same bytes each time. `circuit_parts` says how the residual stream
is cut; here are the heads. The induction circuit is that of Elhage et al. 2021
(https://transformer-circuits.pub/2021/framework) and Olsson et al. 2022 (https://arxiv.org/abs/2209.11895): a head that
writes each token's predecessor down, and one that looks for where the present token is such a predecessor.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from circuit_parts import (
    ASK,
    CODE,
    CONFIG,
    IS_ASK,
    IS_NEEDLE,
    IS_START,
    NEEDLE,
    ONE,
    OUT,
    POSITION,
    PREVIOUS,
    PREVIOUS_IS_NEEDLE,
    SPECIAL,
    START,
    UNIQUE,
    UNREAD,
    HeadWeights,
    position_codes,
    position_products,
    rest,
    token_codes,
)
from shipped_tokenizers import wrapped
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from attnlab.capture.call import Head
from attnlab.models.circuit_truth import Circuit, Copies, Edge, Input, KnownHead, Role, Truth, write_truth
from attnlab.models.known_circuit import KnownCircuit
from attnlab.verify import write_figures

SEED = 0
SHARE, LESS = 0.92, 0.90
"""What the key that a head looks for gets, the start token having the rest; and in the near copies."""
OWN = 0.25
"""What the sink head leaves to the token itself, so that it is not the like of a head that rests."""
NOISE = 0.003
"""By which share the weights of a near copy differ; a score of 54 moves by about 0.2."""
SAME_PLACE = (9.0,) * 6
"""Strengths of the position code's periods for a head that looks for one place: every other scores at least 9 less."""
RECENT = (0.0, 0.0, 3.0, 8.0, 8.0, 8.0)
BROAD = (0.0, 0.0, 0.0, 0.0, 1.5, 1.0)
MATCH = 18.0
"""Score of the same token; another scores at most a quarter of it."""
COUNTED = 75.0
"""Score of what the duplicate counter wrote: a token's first occurrence has 8 more than its second."""


def at_offset(name: str, offset: int, share: float = SHARE) -> HeadWeights:
    """A head that looks `offset` tokens back."""
    head = HeadWeights(name).compare(POSITION, POSITION, position_products(offset, SAME_PLACE))
    return head.compare(ONE, IS_START, rest(sum(SAME_PLACE), share))


def induction(name: str, share: float) -> HeadWeights:
    """A head that looks for where the token before was the present one, and foretells what stands there."""
    head = HeadWeights(name).compare(CODE, PREVIOUS, MATCH).compare(ONE, IS_START, rest(MATCH, share))
    return head.move(CODE, OUT, 8.0)


def mixing() -> HeadWeights:
    """A head that weighs tokens by a random product of their codes."""
    generator = torch.Generator().manual_seed(SEED)
    turned, _ = torch.linalg.qr(torch.randn(16, 16, generator=generator, dtype=torch.float64))
    return HeadWeights("random mixing of contents").compare(CODE, CODE, 4.0 * turned).move(CODE, UNREAD)


def layers() -> list[list[HeadWeights]]:
    """All heads, by layer."""
    three_back = at_offset("three tokens back", 3).move(CODE, UNREAD)
    current = at_offset("current token", 0).move(CODE, UNREAD)
    recent = HeadWeights("recent tokens and the start token")
    recent.compare(POSITION, POSITION, position_products(0, RECENT)).compare(ONE, IS_START, sum(RECENT) + 1.35)
    counter = HeadWeights("duplicate counter").compare(CODE, CODE, MATCH)
    # Alone, a token's own place has three times the start token's weight, so the start token has 1 / (1 + 3 m).
    counter.compare(ONE, IS_START, rest(MATCH, 0.75)).move(IS_START, UNIQUE)
    duplicate = HeadWeights("first occurrence of the token").compare(CODE, CODE, MATCH).compare(ONE, UNIQUE, COUNTED)
    # The counter gives the start token itself all of its weight, 1, which this head's score for it has to allow for.
    duplicate.compare(ONE, IS_START, rest(MATCH + COUNTED / 4, SHARE) - COUNTED).move(CODE, UNREAD)
    retrieval = HeadWeights("needle, when asked").compare(IS_ASK, PREVIOUS_IS_NEEDLE, 16.0)
    retrieval.compare(ONE, IS_START, rest(16.0, SHARE)).move(CODE, OUT, 16.0)
    sink = at_offset("start token", 0, OWN).move(CODE, UNREAD)
    broad = HeadWeights("broad").compare(POSITION, POSITION, position_products(0, BROAD)).move(CODE, UNREAD)
    previous = at_offset("previous token", 1)
    previous.move(CODE, PREVIOUS, 1 / SHARE).move(IS_NEEDLE, PREVIOUS_IS_NEEDLE, 1 / SHARE)
    return [
        [
            previous, counter, sink, recent.move(CODE, UNREAD), three_back, three_back,
            at_offset("", 3, LESS).move(CODE, UNREAD).near_copy("three tokens back, nearly", NOISE, SEED), mixing(),
        ],
        [
            induction("induction", SHARE), induction("induction, with less weight", LESS), retrieval, duplicate,
            mixing(), broad, current,
            at_offset("", 0, LESS).move(CODE, UNREAD).near_copy("current token, nearly", NOISE, SEED + 1),
        ],
    ]  # fmt: skip


def edges() -> tuple[Edge, ...]:
    """Every edge that the weights make; the tests find the same in their products."""
    found = []
    for layer, heads in enumerate(layers()):
        for number, head in enumerate(heads):
            name = f"L{layer}H{number}"
            inputs: list[tuple[Input, torch.Tensor]] = [("q", head.q), ("k", head.k), ("v", head.v)]
            for what, weight in inputs:
                senders = {
                    "tokens": bool(weight[:, : POSITION.start].any()), "positions": bool(weight[:, POSITION].any()),
                    "L0H0": bool(weight[:, PREVIOUS.start : UNIQUE].any()), "L0H1": bool(weight[:, UNIQUE].any()),
                }  # fmt: skip
                found += [Edge(sender, name, what) for sender, reads in senders.items() if reads]
            if bool(head.o[OUT].any()):
                found.append(Edge(name, "logits", "logits"))
    return tuple(found)


def truth() -> Truth:
    """What each head is, which circuits there are, and which heads are alike."""
    streaming: dict[Head, tuple[Role, ...]] = {
        Head(0, n): ("streaming",) for n in (4, 5, 6)
    } | {Head(1, n): ("streaming",) for n in (6, 7)}  # fmt: skip
    roles: dict[Head, tuple[Role, ...]] = streaming | {
        Head(0, 0): ("previous_token", "streaming"),
        Head(0, 2): ("sink", "streaming"),
        Head(0, 3): ("sink", "streaming"),
        Head(1, 0): ("induction", "sink"),
        Head(1, 1): ("induction", "sink"),
        Head(1, 2): ("retrieval", "sink"),
        Head(1, 3): ("duplicate_token",),
    }
    heads = tuple(
        KnownHead(Head(layer, number), head.name, roles.get(Head(layer, number), ()))
        for layer, of_layer in enumerate(layers())
        for number, head in enumerate(of_layer)
    )
    every = edges()

    def circuit(task: str, *members: Head, redundant: tuple[tuple[Head, ...], ...] = ()) -> Circuit:
        names = {"tokens", "positions", "logits", *map(str, members)}
        inside = tuple(edge for edge in every if edge.sender in names and edge.receiver in names)
        return Circuit(task, members, inside, redundant)

    return Truth(
        heads,
        every,
        circuits=(
            circuit("induction", Head(0, 0), Head(1, 0), Head(1, 1), redundant=((Head(1, 0), Head(1, 1)),)),
            circuit("retrieval", Head(0, 0), Head(1, 2)),
        ),
        copies=(
            Copies((Head(0, 4), Head(0, 5)), exact=True),
            Copies((Head(0, 4), Head(0, 5), Head(0, 6)), exact=False),
            Copies((Head(0, 7), Head(1, 4)), exact=True),
            Copies((Head(1, 0), Head(1, 1)), exact=False),
            Copies((Head(1, 6), Head(1, 7)), exact=False),
        ),
    )


@torch.no_grad()
def build() -> KnownCircuit:
    """The model, in float32."""
    model = KnownCircuit(CONFIG)
    for weight in model.parameters():
        weight.zero_()
    codes = token_codes()
    model.tokens.weight[:, CODE] = codes.float()
    model.tokens.weight[:, ONE] = 1
    for token, flag in ((START, IS_START), (NEEDLE, IS_NEEDLE), (ASK, IS_ASK)):
        model.tokens.weight[token, flag] = 1
    model.positions.weight.copy_(position_codes())
    model.place.weight[POSITION] = torch.eye(CONFIG.position_size)
    model.unembed.weight[:, OUT] = codes.float()
    for layer, heads in zip(model.attentions, layers(), strict=True):
        for part in ("q", "k", "v"):
            getattr(layer, part).weight.copy_(torch.cat([getattr(head, part) for head in heads]))
        layer.o.weight.copy_(torch.cat([head.o for head in heads], 1))
    return model.eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, after the start token; `<needle>` and `<ask>` are written out."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    of_byte = _byte_letters()
    assert sorted(letters) == sorted(of_byte)
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *of_byte])}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    more = [SPECIAL[NEEDLE], SPECIAL[ASK]]
    return wrapped(made, CONFIG.max_position_embeddings, additional_special_tokens=more)


def _byte_letters() -> list[str]:
    """The letter that byte-level tokenizers write for each byte: itself where it can be seen, else one from 256 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in seen else chr(next(others)) for byte in range(256)]


def main() -> None:
    """Write the model's folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the model's folder, such as data/models/known-circuit")
    out = parser.parse_args().out
    build().save(out)
    tokenizer().save_pretrained(out)
    write_truth(out, truth())
    write_figures("known-circuit", out)
    print(f"Written to {out}")


if __name__ == "__main__":
    main()
