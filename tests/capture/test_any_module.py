"""Any torch module that calls torch's attention functions is read and edited like a model of transformers."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from attnlab_kernels import Emit
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from attnlab.capture import capture
from attnlab.capture.sdpa import read_sdpa
from attnlab.capture.torch_function import open_sessions
from attnlab.errors import AttnlabError, AttnlabWarning, UnsupportedModelError
from attnlab.interventions import Ablate, KnockOut, Scale, Temperature, TowardsIdentity

READ = Emit(lse=True, entropy=True, max_probability=True, key_sum=True)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_is_left_over():
    fast = torch.backends.mha.get_fastpath_enabled()
    yield
    assert open_sessions == []
    assert torch._C._len_torch_function_stack() == 0
    assert torch.backends.mha.get_fastpath_enabled() == fast


class Attend(nn.Module):
    """Torch's attention function, as a module."""

    def forward(self, *args, **options):
        return functional.scaled_dot_product_attention(*args, **options)


class Block(nn.Module):
    """A GPT block as people write it."""

    def __init__(self, width=16, heads=4, groups=2):
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, width // heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, (heads + 2 * groups) * self.size)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))

    def split(self, x):
        sizes = [n * self.size for n in (self.heads, self.groups, self.groups)]
        parts = self.qkv(self.norm(x)).split(sizes, -1)
        return [p.unflatten(-1, (-1, self.size)).transpose(1, 2) for p in parts]

    def forward(self, x):
        z = functional.scaled_dot_product_attention(*self.split(x), is_causal=True, enable_gqa=True, scale=0.7)
        x = x + self.out(z.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class GPT(nn.Module):
    def __init__(self, layers=3):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(16, 20)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


IDS = torch.arange(14).view(2, 7)


def check_statistics(call, pattern, reads=None):
    """The statistics of a call are those of a float64 pattern [B, H, Nq, Nk]; `reads` [B, Nq] count."""
    assert pattern.dtype == torch.double
    reads = torch.ones(pattern.shape[0], pattern.shape[2], dtype=torch.bool) if reads is None else reads
    rows = reads[:, None].expand(pattern.shape[:3])
    entropy = torch.special.entr(pattern).sum(-1)
    torch.testing.assert_close(call.emitted.entropy[rows].double(), entropy[rows], atol=2e-5, rtol=1e-5)
    largest = pattern.amax(-1)
    torch.testing.assert_close(call.emitted.max_probability[rows].double(), largest[rows], atol=1e-5, rtol=1e-5)
    key_sum = (pattern * rows[..., None]).sum(2)
    torch.testing.assert_close(call.emitted.key_sum.double(), key_sum, atol=2e-5, rtol=1e-5)


def softmax_pattern(q, k, visible=None, bias=None, scale=None):
    q, k = q.double(), k.double()
    k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3) if q.dim() > 3 else k
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores if bias is None else scores + bias.double()
    scores = scores if visible is None else scores.masked_fill(~visible, -torch.inf)
    return scores.softmax(-1).nan_to_num()


def weights_of(module, *args, **kwargs):
    """The float64 attention weights that every nn.MultiheadAttention of a module forms, by path."""
    exact = copy.deepcopy(module).double()
    seen, found = [], {}
    for name, part in exact.named_modules():
        if isinstance(part, nn.MultiheadAttention):
            part.register_forward_pre_hook(
                lambda m, a, k, name=name: seen.append((name, m, a, dict(k))), with_kwargs=True
            )

    def double(x):
        return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    exact.train()  # torch's fast path would pass the hooks by
    for part in exact.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        if isinstance(part, nn.MultiheadAttention):
            part.dropout = 0.0
    exact(*map(double, args), **{k: double(v) for k, v in kwargs.items()})
    for name, part, a, k in list(seen):
        k |= {"need_weights": True, "average_attn_weights": False, "is_causal": False}
        found[name] = part(*a, **k)[1].nan_to_num().detach()
    return found


def same_everywhere(module, *args, rows=None, grad=False, **kwargs):
    """Captures a module that is made of nn.MultiheadAttention; its output stays, its statistics are the dense ones."""
    with torch.set_grad_enabled(grad):
        own = module(*args, **kwargs)
        with capture(module, emit=READ) as session:
            read = module(*args, **kwargs)
    if own.isnan().any():  # torch's fused kernel does not add additive masks
        own = module(*args, **kwargs)
    keep = torch.ones(own.shape[:2], dtype=torch.bool) if rows is None else rows
    torch.testing.assert_close(read[keep], own[keep], atol=1e-5, rtol=1e-5)
    patterns = weights_of(module, *args, **kwargs)
    assert len(session.calls) == len(patterns)
    for call in session.calls:
        pattern = patterns[session.modules[call.kind, call.layer]]
        check_statistics(call, pattern, call.site.query_mask)
    return session


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("masked", ["no", "causal", "hint", "padding", "both", "float", "heads"])
def test_an_encoder_is_read_under_every_mask(batch_first, masked, grad):
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=batch_first)
    module = nn.TransformerEncoder(layer, 2, enable_nested_tensor=masked == "padding").eval()
    x = torch.randn(2, 6, 16)
    padding = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0]], dtype=torch.bool)
    causal = torch.ones(6, 6, dtype=torch.bool).triu(1)
    options = {
        "no": {},
        "causal": {"mask": causal},
        "hint": {"mask": nn.Transformer.generate_square_subsequent_mask(6), "is_causal": True},
        "padding": {"src_key_padding_mask": padding},
        "both": {"mask": causal, "src_key_padding_mask": padding},
        "float": {"mask": torch.randn(6, 6)},
        "heads": {"mask": (torch.rand(8, 6, 6) < 0.3) & ~torch.eye(6, dtype=torch.bool)},
    }[masked]
    rows = ~padding if masked in ("padding", "both") else None
    if not batch_first:
        x, rows = x.transpose(0, 1), None if rows is None else rows.T
    session = same_everywhere(module, x, rows=rows, grad=grad, **options)
    assert [(call.kind, call.layer) for call in session.calls] == [("self", 0), ("self", 1)]
    assert session.modules["self", 1] == "layers.1.self_attn"
    site = session.calls[0].site
    assert site.causal == (masked in ("causal", "hint", "both"))
    if masked in ("padding", "both"):
        assert torch.equal(site.key_mask, ~padding)
        assert torch.equal(site.query_mask, ~padding)
    else:
        assert site.key_mask is None


def test_an_encoder_layer_off_its_fused_kernel_is_read_without_a_switch_of_the_process():
    module = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad(), capture(module):
        assert torch.backends.mha.get_fastpath_enabled()
        module(x)
    assert [call.layer for call in same_everywhere(module, x).calls] == [0]


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_decoder_has_self_and_cross_attention_and_an_encoder_beside_it_its_own_kind(norm_first):
    decoder = nn.TransformerDecoder(
        nn.TransformerDecoderLayer(16, 4, 32, batch_first=True, norm_first=norm_first), 2
    ).eval()
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    padding = torch.tensor([[0, 0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0]], dtype=torch.bool)
    options = {"tgt_mask": causal, "tgt_is_causal": True, "memory_key_padding_mask": padding}
    session = same_everywhere(decoder, torch.randn(2, 5, 16), torch.randn(2, 7, 16), **options)
    assert [(call.kind, call.layer) for call in session.calls] == [("self", 0), ("cross", 0), ("self", 1), ("cross", 1)]
    cross = session.calls[1].site
    assert (cross.n_queries, cross.n_keys, cross.causal, cross.query_mask) == (5, 7, False, None)
    assert torch.equal(cross.key_mask, ~padding)
    both = nn.Transformer(16, 4, 1, 2, 32, batch_first=True).eval()
    session = same_everywhere(both, torch.randn(2, 7, 16), torch.randn(2, 5, 16), tgt_mask=causal)
    assert [call.kind for call in session.calls] == ["encoder", "self", "cross", "self", "cross"]
    assert session.modules["encoder", 0] == "encoder.layers.0.self_attn"


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("extra", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 12, "vdim": 20}])
def test_attention_weights_that_the_caller_asks_for_are_torchs_own(average, batched, extra):
    module = nn.MultiheadAttention(16, 4, batch_first=True, **extra).eval()
    lead = (2,) if batched else ()
    q = torch.randn(*lead, 5, 16)
    k, v = torch.randn(*lead, 6, extra.get("kdim", 16)), torch.randn(*lead, 6, extra.get("vdim", 16))
    options = {"average_attn_weights": average, "attn_mask": torch.rand(5, 6) < 0.2}
    own = module(q, k, v, **options)
    exact = copy.deepcopy(module).double()
    options64 = {**options, "average_attn_weights": False}
    pattern = exact(q.double(), k.double(), v.double(), **options64)[1].detach()
    with capture(module, emit=READ) as session:
        read = module(q, k, v, **options)
        alone, none = module(q, k, v, need_weights=False, attn_mask=options["attn_mask"])
    assert none is None
    assert all(torch.equal(a, b) for a, b in zip(read, own, strict=True))
    torch.testing.assert_close(alone, own[0], atol=1e-5, rtol=1e-5)
    for call in session.calls:
        assert (call.kind, call.layer) == ("cross", 0)
        check_statistics(call, pattern if batched else pattern[None])


def test_attention_weights_of_an_edited_pattern_are_the_edited_ones():
    module = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    expected = module(x, x, x, attn_mask=causal, average_attn_weights=False)[1].clone()
    expected[:, 1] = torch.eye(5)
    expected[:, 2] = expected[:, 2].pow(0.5) / expected[:, 2].pow(0.5).sum(-1, keepdim=True)
    edits = [TowardsIdentity("L0H1", 1.0), Temperature("L0H2", 2.0)]
    with capture(module, emit=READ, interventions=edits) as session:
        out, weights = module(x, x, x, attn_mask=causal, average_attn_weights=False)
        mean = module(x, x, x, attn_mask=causal)[1]
    torch.testing.assert_close(weights, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mean, expected.mean(1), atol=1e-5, rtol=1e-5)
    check_statistics(session.calls[0], expected.double())
    values = functional.linear(x, module.in_proj_weight[32:], module.in_proj_bias[32:])
    z = (expected @ values.unflatten(-1, (4, 4)).transpose(1, 2)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out, module.out_proj(z), atol=1e-5, rtol=1e-5)


def test_a_hand_written_gpt_is_read_layer_by_layer():
    model = GPT()
    own = model(IDS)
    with capture(model, emit=READ, qkv=True) as session:
        read = model(IDS)
        model(IDS[:, :3])
    torch.testing.assert_close(read, own, atol=1e-5, rtol=1e-5)
    assert [call.layer for call in session.calls] == [0, 1, 2, 0, 1, 2]
    assert [session.modules["self", n] for n in range(3)] == ["blocks.0", "blocks.1", "blocks.2"]
    exact = copy.deepcopy(model).double()
    x = exact.embed(IDS)
    visible = torch.ones(7, 7, dtype=torch.bool).tril()
    for call, block in zip(session.calls, exact.blocks, strict=False):
        q, k, v = block.split(x)
        pattern = softmax_pattern(q, k, visible, scale=0.7)
        check_statistics(call, pattern.detach())
        torch.testing.assert_close(call.z.double(), pattern @ v.repeat_interleave(2, 1), atol=1e-5, rtol=1e-5)
        assert (call.site.causal, call.site.query_offset, call.site.n_key_heads) == (True, 0, 2)
        x = block(x)


MASKS = {
    "nothing": lambda: (None, torch.ones(5, 7, dtype=torch.bool)),
    "causal bias, first": lambda: (causal_upper_left(5, 7), torch.ones(5, 7).tril().bool()),
    "causal bias, last": lambda: (causal_lower_right(5, 7), torch.ones(5, 7).tril(2).bool()),
    "rows and keys": lambda: ((m := torch.ones(5, 7).tril(2).bool()), m),
    "top-left": lambda: ((m := torch.ones(5, 7).tril().bool()), m),
    "keys": lambda: ((m := torch.tensor([[1, 1, 1, 1, 1, 0, 1]]).bool()), m),
    "rows": lambda: ((m := torch.tensor([[1], [1], [0], [1], [1]]).bool()), m.expand(5, 7)),
    "batch": lambda: ((m := torch.rand(2, 1, 5, 7) < 0.6), m),
    "heads": lambda: ((m := torch.rand(1, 4, 5, 7) < 0.6), m),
    "batch and keys": lambda: ((m := torch.rand(2, 1, 1, 7) < 0.6), m),
    "three": lambda: ((m := torch.rand(4, 5, 7) < 0.6), m),
    "one row with nothing": lambda: ((m := torch.ones(5, 7).tril(-1).bool()), m),
    "additive": lambda: ((m := torch.randn(2, 4, 5, 7)), m),
    "additive, keys": lambda: ((m := torch.randn(2, 1, 1, 7)), m),
    "additive, hides": lambda: ((m := torch.zeros(5, 7).masked_fill(torch.ones(5, 7).triu(3).bool(), -torch.inf)), m),
}


@pytest.mark.parametrize("form", MASKS)
def test_masks_of_every_form_mean_what_torch_makes_of_them(form):
    mask, meaning = MASKS[form]()
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 6)
    module = Attend()
    own = module(q, k, v, mask)
    with capture(module, emit=READ, qkv=True) as session:
        read = module(q, k, v, mask)
    torch.testing.assert_close(read, own, atol=1e-5, rtol=1e-5)
    call = session.calls[0]
    if meaning.dtype == torch.bool:
        pattern = softmax_pattern(q, k, meaning.expand(2, 4, 5, 7))
    else:
        pattern = softmax_pattern(q, k, bias=meaning)
    check_statistics(call, pattern, call.site.query_mask)
    assert torch.equal(call.z, read)


@pytest.mark.parametrize(
    ("shapes", "mask"),
    [
        (((5, 8), (7, 8), (7, 6)), (5, 7)),
        (((3, 5, 8), (3, 7, 8), (3, 7, 6)), (3, 5, 7)),
        (((3, 5, 8), (3, 7, 8), (3, 7, 6)), (5, 7)),
        (((2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 6)), (3, 1, 5, 7)),
        (((2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 6)), (1, 1, 4, 1, 7)),
        (((2, 4, 5, 8), (2, 1, 7, 8), (2, 1, 7, 6)), (2, 1, 5, 7)),
    ],
)
def test_leading_dimensions_are_the_batch(shapes, mask):
    q, k, v = (torch.randn(shape) for shape in shapes)
    bias = torch.randn(mask)
    module = Attend()
    own = module(q, k, v, bias)
    with capture(module, emit=READ) as session:
        read = module(q, k, v, bias)
    assert read.shape == own.shape
    torch.testing.assert_close(read, own, atol=1e-5, rtol=1e-5)
    scores = q.double() @ k.double().transpose(-1, -2) * q.shape[-1] ** -0.5 + bias.double()
    pattern = scores.softmax(-1)
    heads = pattern.shape[-3] if pattern.dim() > 3 else 1
    check_statistics(session.calls[0], pattern.reshape(-1, heads, 5, 7))


def test_grouped_heads_may_stand_in_the_first_of_three_dimensions():
    q, k, v = torch.randn(4, 5, 8), torch.randn(2, 7, 8), torch.randn(2, 7, 6)
    for mask in (None, torch.randn(5, 7), torch.rand(4, 5, 7) < 0.7):
        own = Attend()(q, k, v, mask, enable_gqa=True)
        with capture(Attend(), emit=READ) as session:
            read = session.module(query=q, key=k, value=v, attn_mask=mask, enable_gqa=True)
        torch.testing.assert_close(read, own, atol=1e-5, rtol=1e-5)
        call = session.calls[0]
        assert (call.site.batch, call.site.n_heads, call.site.n_key_heads) == (1, 4, 2)
        boolean = mask is not None and mask.dtype == torch.bool
        visible, bias = (mask, None) if boolean else (None, mask)
        check_statistics(call, softmax_pattern(q[None], k[None], visible, bias), call.site.query_mask)


def test_autocast_gives_the_type_that_it_gives_without():
    class Lowered(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Linear(8, 8)

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                k = self.project(x)
                return functional.scaled_dot_product_attention(x, k, k, torch.zeros(6, 6), scale=1.0)

    module, x = Lowered(), torch.randn(2, 4, 6, 8)
    with torch.no_grad():
        own = module(x)
        with capture(module, emit=READ, qkv=True) as session:
            read = module(x)
    assert own.dtype == read.dtype == session.calls[0].q.dtype == torch.bfloat16
    exact = softmax_pattern(x.bfloat16(), session.calls[0].k, scale=1.0) @ session.calls[0].v.double()
    assert (read - exact).abs().max() <= 1.5 * (own - exact).abs().max()
    double = Attend()
    with torch.autocast("cpu", dtype=torch.bfloat16), capture(double, emit=READ):
        assert double(*x.double().expand(3, 2, 4, 6, 8)).dtype == torch.double


def test_transforms_of_functions_and_forward_gradients_are_refused():
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True).eval()
    x, q = torch.randn(2, 5, 16), torch.randn(2, 4, 6, 8)
    attend, parameters = Attend(), dict(layer.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(layer, parameters, (x,)).square().mean()

    def forward_gradient():
        with forward_ad.dual_level():
            attend(forward_ad.make_dual(q, torch.ones_like(q)), q, q)

    attempts = [
        (layer, lambda: torch.func.grad(loss)(parameters)),
        (attend, lambda: torch.func.vmap(attend)(q, q, q)),
        (attend, forward_gradient),
    ]
    for module, attempt in attempts:
        with pytest.raises(UnsupportedModelError, match=r"torch.func \(vmap, grad, jvp"), capture(module, emit=READ):
            attempt()
    own = torch.func.grad(loss)(parameters)
    with capture(layer):  # nothing asked for is nothing computed
        read = torch.func.grad(loss)(parameters)
    assert all(torch.equal(read[name], own[name]) for name in own)


def test_causality_is_aligned_at_the_first_key():
    q, k, v = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8)
    module = Attend()
    own = module(q, k, v, is_causal=True)
    with capture(module, emit=READ) as session:
        torch.testing.assert_close(module(q, k, v, is_causal=True), own, atol=1e-5, rtol=1e-5)
    causal = torch.ones(5, 7).tril().bool()
    check_statistics(session.calls[0], softmax_pattern(q, k, causal))
    for mask in (torch.rand(5, 7) < 0.7, torch.randn(5, 7)):
        # Torch 2.15 takes one or the other, so here both are one mask.
        own = module(q, k, v, mask & causal if mask.dtype == torch.bool else mask.masked_fill(~causal, -torch.inf))
        with capture(module, emit=READ):
            torch.testing.assert_close(module(q, k, v, mask, is_causal=True), own, atol=1e-5, rtol=1e-5)


def test_closed_forms_are_told_from_the_entries_of_a_mask():
    q = torch.randn(2, 4, 6, 8)
    causal = torch.ones(6, 6).tril().bool()
    keys = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]).bool()
    assert read_sdpa(q, q, q, causal).mask is None
    both = (causal & keys[:, None])[:, None].expand(2, 4, 6, 6)
    found = read_sdpa(q, q, q, torch.zeros(2, 4, 6, 6).masked_fill(~both, -torch.inf))
    assert (found.causal, found.mask, found.bias) == (True, None, None)
    assert torch.equal(found.key_mask, keys)
    other = causal.clone()
    other[4, 0] = False
    assert torch.equal(read_sdpa(q, q, q, other).mask[0, 0], other)


def test_queries_that_outnumber_their_keys_are_cross_attention():
    module = Attend()
    with capture(module) as session:
        module(torch.randn(1, 2, 9, 8), *torch.randn(2, 1, 2, 4, 8))
        module(torch.randn(1, 2, 1, 8), *torch.randn(2, 1, 2, 4, 8))
    assert [call.kind for call in session.calls] == ["cross", "self"]


def test_interventions_change_what_the_module_computes():
    model = GPT().eval()
    edits = [Ablate("L0H1"), KnockOut("L1H2", [2], positions=[3, 4, 5, 6]), Scale("L2", 0.5)]
    with capture(model, interventions=edits, emit=READ) as session:
        read = model(IDS)
    x = model.embed(IDS)
    for layer, block in enumerate(model.blocks):
        q, k, v = block.split(x)
        visible = torch.ones(4, 7, 7, dtype=torch.bool).tril()
        if layer == 1:
            visible[2, 3:, 2] = False
        pattern = softmax_pattern(q, k, visible, scale=0.7)
        check_statistics(session.calls[layer], pattern.detach())
        z = pattern.float() @ v.repeat_interleave(2, 1)
        if layer == 0:
            z[:, 1] = 0
        z = z * 0.5 if layer == 2 else z
        x = x + block.out(z.transpose(1, 2).flatten(2))
        x = x + block.mlp(x)
    torch.testing.assert_close(read, model.head(x), atol=1e-5, rtol=1e-5)
    with pytest.raises(AttnlabError, match="layer 7"), capture(model, interventions=[Ablate("L7")]):
        model(IDS)
    with pytest.raises(AttnlabError, match="head"), capture(model, interventions=[Ablate("L1H9")]):
        model(IDS)


@pytest.mark.parametrize("name", ["written", "encoder"])
def test_gradients_are_the_modules_own_and_reach_through_statistics(name):
    if name == "written":
        module, given, weight = GPT(), IDS, "blocks.0.qkv.weight"
    else:
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        module, given = nn.TransformerEncoder(layer, 2), torch.randn(2, 5, 16)
        weight = "layers.0.self_attn.in_proj_weight"
    parameter = module.get_parameter(weight)
    out = module(given)
    direction = torch.randn_like(out)
    (own,) = torch.autograd.grad((out * direction).sum(), parameter)
    with capture(module, emit=READ) as session:
        (read,) = torch.autograd.grad((module(given) * direction).sum(), parameter, retain_graph=True)
        (through,) = torch.autograd.grad(session.calls[1].emitted.entropy.mean(), parameter)
    assert torch.allclose(read, own, atol=1e-5 * float(own.abs().max()))
    assert through.abs().max() > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_forward_that_checkpointing_repeats_is_edited_again_and_not_recorded_again(reentrant):
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(GPT):
        def forward(self, ids):
            x = self.embed(ids)
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return self.head(x)

    model = GPT()
    other = Checkpointed()
    other.load_state_dict(model.state_dict())
    gradients = []
    for module in (model, other):
        with capture(module, emit=READ, interventions=[Ablate("L0H1"), TowardsIdentity("L1", 0.5)]) as session:
            module(IDS).square().mean().backward()
        gradients.append(module.get_parameter("blocks.0.qkv.weight").grad)
        assert [call.layer for call in session.calls] == [0, 1, 2]
    assert torch.allclose(*gradients, atol=1e-5 * float(gradients[0].abs().max()))


def test_attention_that_checkpointing_repeats_out_of_sight_is_refused_if_the_capture_computed_it():
    from torch.utils.checkpoint import checkpoint

    class Inside(nn.Module):
        def forward(self, x):
            return checkpoint(functional.scaled_dot_product_attention, x, x, x, use_reentrant=False)

    class Shared(nn.Sequential):
        def forward(self, x):
            for block in self:
                x = checkpoint(block, x, use_reentrant=False)
            return x

    block = Block()
    given = torch.randn(1, 2, 4, 8, requires_grad=True), torch.randn(1, 4, 16, requires_grad=True)
    for module, x in zip((Inside(), Shared(block, block)), given, strict=True):
        for options in ({"interventions": [Ablate("L0H1")]}, {"emit": READ}):
            with pytest.raises(AttnlabError, match="Gradient checkpointing"), capture(module, **options):
                module(x).sum().backward()
            with pytest.raises(AttnlabError, match="Gradient checkpointing"), capture(module, **options):
                torch.autograd.grad(module(x).sum(), x)
        with capture(module) as session:
            module(x).sum().backward()
        assert len(session.calls) == len(session.modules)


def test_a_compiled_module_is_read_and_edited():
    model = GPT(2)
    compiled = torch.compile(model, backend="eager")
    own = compiled(IDS)
    with capture(model, interventions=[Ablate("L0H1")], emit=READ) as plain:
        expected = model(IDS)
    with capture(compiled, interventions=[Ablate("L0H1")], emit=READ) as session:
        read = compiled(IDS)
    torch.testing.assert_close(read, expected, atol=1e-5, rtol=1e-5)
    assert [call.layer for call in session.calls] == [0, 1]
    for a, b in zip(session.calls, plain.calls, strict=True):
        torch.testing.assert_close(a.emitted.entropy, b.emitted.entropy, atol=1e-5, rtol=1e-5)
    assert torch.equal(compiled(IDS), own)


def test_dropout_is_refused():
    module = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1)
    for needed in (True, False):
        with pytest.raises(AttnlabError, match="dropout"), capture(module, emit=READ):
            module.self_attn(*torch.randn(3, 5, 2, 16), need_weights=needed)
    with pytest.raises(AttnlabError, match="dropout"), capture(module, emit=READ):
        module(torch.randn(5, 2, 16))


class OwnAttention(nn.Module):
    """Attention written out, out of reach."""

    def forward(self, x):
        return (x @ x.transpose(-1, -2)).softmax(-1) @ x


def test_a_module_whose_attention_is_not_seen_fails_loudly():
    own = nn.Sequential(OwnAttention(), nn.Linear(16, 16))
    with pytest.raises(UnsupportedModelError, match=r"Sequential ran without calling.*OwnAttention"), capture(own):
        own(torch.randn(2, 5, 16))
    with pytest.raises(UnsupportedModelError, match="Linear"), capture(nn.Linear(2, 2)) as session:
        session.module(torch.zeros(2))
    with capture(nn.Linear(2, 2)) as session:
        pass
    some = nn.Sequential(OwnAttention(), nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)).eval()
    with pytest.warns(AttnlabWarning, match="OwnAttention"), capture(some) as session:
        some(torch.randn(2, 5, 16))
    assert len(session.calls) == 1


def test_kernels_out_of_reach_are_refused_by_name():
    from torch.nn.attention.flex_attention import flex_attention

    class Flex(nn.Module):
        def forward(self, x):
            return flex_attention(x, x, x)

    model = nn.Sequential(Flex())
    # Torch compiles flex attention where it is called, and wraps what is raised meanwhile into an error of its own.
    with pytest.raises(RuntimeError, match=r"Flex \(0\) calls flex_attention"), capture(model):
        model(torch.randn(1, 2, 16, 16))
    layer = nn.MultiheadAttention(16, 4, batch_first=True)

    class Fused(nn.Module):
        def forward(self, x):
            projections = (layer.in_proj_weight, layer.in_proj_bias, layer.out_proj.weight, layer.out_proj.bias)
            return torch._native_multi_head_attention(x, x, x, 16, 4, *projections)

    with torch.no_grad(), pytest.raises(UnsupportedModelError, match="_native_multi_head"), capture(Fused()) as session:
        session.module(torch.randn(1, 5, 16))
    with pytest.raises(UnsupportedModelError, match="scripted"), capture(torch.jit.script(nn.Sequential(nn.ReLU()))):
        pass


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_the_module_is_restored_after_an_error(error):
    module = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2).eval()
    x = torch.randn(2, 5, 16)

    def stop(call):
        raise error

    with torch.no_grad():
        own = module(x)
        with pytest.raises(error), capture(module, emit=READ, on_call=stop):
            module(x)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
        assert torch._C._len_torch_function_stack() == 0
        assert torch.equal(module(x), own)
        seen = []

        def once(call):
            seen.append(call.layer)
            if len(seen) == 1:
                raise error

        with capture(module, emit=READ, on_call=once) as session:
            with pytest.raises(error):
                module(x)
            module(x)
        assert seen == [0, 0, 1]
        assert session.modules["self", 1] == "layers.1.self_attn"


def test_captures_nest_share_their_interventions_and_end_in_any_order():
    model = GPT()
    first, second = Ablate("L0H1"), KnockOut("L0H2", [0], positions=range(1, 7))
    with capture(model, interventions=[first, second]):
        expected = model(IDS)
    outer, inner = capture(model, emit=READ, interventions=[first]), capture(model.blocks, emit=READ)
    whole = outer.__enter__()
    part = inner.__enter__()
    with capture(model, interventions=[second]):
        found = model(IDS)
    outer.__exit__(None, None, None)
    model(IDS)
    inner.__exit__(None, None, None)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (len(whole.calls), len(part.calls)) == (3, 6)
    assert part.modules["self", 2] == "2"
    for session in (whole, part):
        torch.testing.assert_close(session.calls[0].emitted.key_sum[:, 2, 0], torch.ones(2))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_other_modes_of_torch_stay_in_place_and_in_order():
    from torch.overrides import TorchFunctionMode

    class Count(TorchFunctionMode):
        seen = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.seen += func is functional.scaled_dot_product_attention
            return func(*args, **(kwargs or {}))

    model = GPT(1)
    below, above = Count(), Count()
    with below:
        opened = capture(model, interventions=[Ablate("L0")], emit=READ)
        session = opened.__enter__()
        with above:
            assert model(IDS).shape == (2, 7, 20)
            opened.__exit__(None, None, None)
            model(IDS)
            assert torch._C._len_torch_function_stack() == 2
        assert torch._C._len_torch_function_stack() == 1
    assert len(session.calls) == 1
    assert (below.seen, above.seen) == (1, 2)


def test_what_others_compute_meanwhile_is_not_read():
    model, other = GPT(1), GPT(1)
    with capture(model) as session:
        other(IDS)
        functional.scaled_dot_product_attention(*torch.randn(3, 1, 2, 4, 8))
        model(IDS)
    assert len(session.calls) == 1


def test_forwards_in_threads_go_to_the_captures_of_their_thread_or_else_to_all():
    model = GPT(2)
    lengths = {}
    failed = []

    def run(work):
        try:
            work()
        except BaseException as error:
            failed.append(error)

    def study(n):
        with capture(model, emit=READ, interventions=[Ablate("L0")] if n == 5 else []) as session:
            for _ in range(5):
                model(IDS[:, :n])
        lengths[n] = {(call.site.n_queries, call.layer) for call in session.calls}

    threads = [threading.Thread(target=run, args=(lambda n=n: study(n),)) for n in (3, 4, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert lengths == {n: {(n, 0), (n, 1)} for n in (3, 4, 5)}
    with capture(model, emit=READ) as session:
        thread = threading.Thread(target=run, args=(lambda: model(IDS),))
        thread.start()
        thread.join(60)
    assert [call.layer for call in session.calls] == [0, 1]
    assert failed == []


def test_a_part_that_stands_at_several_places_is_a_layer_at_each():
    class Wrapped(nn.Module):
        def __init__(self, attend):
            super().__init__()
            self.attend = attend

        def forward(self, x):
            return self.attend(x, x, x)

    attend, x = Attend(), torch.randn(1, 2, 4, 8)
    with capture(nn.Sequential(Wrapped(attend), Wrapped(attend))) as session:
        session.module(x)
        session.module(x)
    assert [call.layer for call in session.calls] == [0, 1, 0, 1]
    assert session.modules == {("self", 0): "0.attend", ("self", 1): "1.attend"}
    block = Block()
    shared = nn.Sequential(block, block, block)
    with capture(shared) as session:
        shared(torch.randn(1, 4, 16))
        shared(torch.randn(1, 4, 16))
    assert [call.layer for call in session.calls] == [0, 1, 2, 0, 1, 2]


def test_a_module_that_calls_several_times_has_a_layer_for_each():
    class Twice(nn.Module):
        def forward(self, x, memory):
            x = functional.scaled_dot_product_attention(x, x, x)
            return functional.scaled_dot_product_attention(x, memory, memory)

    with capture(Twice(), emit=READ) as session:
        for _ in range(2):
            session.module(torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8))
    assert [call.layer for call in session.calls] == [0, 1, 0, 1]
    assert session.modules == {("self", 0): "", ("self", 1): ""}


def test_a_copy_that_is_made_inside_a_capture_reads_nothing():
    model = GPT(1)
    with capture(model) as session:
        other = copy.deepcopy(model)
        model(IDS)
        assert torch.equal(other(IDS), model(IDS))
    assert len(session.calls) == 2
    assert torch.equal(other(IDS), model(IDS))


def test_nothing_asked_for_leaves_the_output_bit_for_bit():
    model = nn.Transformer(16, 4, 1, 1, 32, dropout=0.0)
    given = torch.randn(2, 5, 2, 16)
    own = model(*given)
    for emit in (Emit(), lambda site: None):
        with capture(model, emit=emit):
            assert torch.equal(model(*given), own)


def test_nested_tensors_are_refused():
    module = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    x = torch.nested.nested_tensor([torch.randn(3, 16), torch.randn(4, 16)])
    with torch.no_grad(), pytest.raises((AssertionError, UnsupportedModelError), match=r"[Nn]ested"), capture(module):
        module(x, x, x, need_weights=False)
