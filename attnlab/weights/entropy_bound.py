"""The least entropy that the weights of a head allow, in the form of the paper that found it.

Zhai et al. (arXiv 2303.06296), Theorem 3.1: with inputs X, row i of the logits is at most sigma = scale |x_i|
||W_Q W_K^T||_2 ||X||_2 from its mean, and `attnlab.monitor.entropy_bound` turns sigma into nats. Here X is what
attention really received, less its mean over the keys (a constant adds the same to all logits of a row). A query bias b
is one more input that is always 1: x becomes (x, 1) and W_Q gets the row b. A key bias adds the same to all logits.
A learned sink is not in them; the share that it takes is the one that it took, as `row_bounds` has it.

Rotary embeddings turn queries and keys by their places, so that no one matrix is between them; then only
sigma = scale |(x_i, 1)| ||W_Q||_2 ||W_K||_2 ||(X, 1)||_F holds, both biases being rows of their weights.

These say what training does to the weights, and are far below the entropy at any length: spectral norms multiply.
`attnlab.monitor.logit_norms` is the closer one, from queries and keys.

Shapes: B sequences, H heads, N tokens, d width of the stream, D of a head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from attnlab_kernels import Emit
from jaxtyping import Float
from torch import Tensor, nn

from attnlab.attribution.inside import attention_paths, device_of, run
from attnlab.attribution.prompts import module_of
from attnlab.capture.call import Call
from attnlab.capture.session import capture
from attnlab.errors import UnsupportedModelError
from attnlab.lens.parts import lens_style
from attnlab.monitor.bound import row_bounds
from attnlab.weights.factored import Factored
from attnlab.weights.read import HeadWeights, read_weights

if TYPE_CHECKING:
    from attnlab.models import Model

_CLOSE = 2e-3
"""Largest relative difference of queries from what the weights make of the inputs, for float32."""


class WeightBound(NamedTuple):
    """Of one layer.

    Attributes:
        spectral_norm: [H] of W_Q W_K^T, with the query bias as a row; where `turned`, the product of both norms.
        sigma: [B, H, N] the largest norm of each row's logits, less their mean.
        bound: [B, H, N] least entropy in nats, float64; 0 for padding.
        turned: whether rotary embeddings stand between queries and keys.
    """

    spectral_norm: Tensor
    sigma: Float[Tensor, "B H N"]
    bound: Float[Tensor, "B H N"]
    turned: bool


@torch.no_grad()
def weight_bounds(
    model: Model | nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None
) -> tuple[WeightBound, ...]:
    """The least entropy of every row that the weights of each layer allow on these tokens.

    Args:
        model: a transformers model whose weights `read_weights` tells.
        input_ids: [B, N].
        attention_mask: [B, N], 0 for padding.

    Returns:
        One for each layer.

    Raises:
        AttnlabError: the model's weights cannot be read, or its logits are more than scale * q . k.

    Example:
        >>> import attnlab
        >>> model = attnlab.load_model("pydoc-4l")
        >>> bounds = weight_bounds(model, torch.tensor([[1, 5, 9, 7]]))
        >>> len(bounds), bounds[0].bound.shape
        (4, torch.Size([1, 6, 4]))
    """
    module: Any = module_of(model)
    if lens_style(module) is not None:
        raise UnsupportedModelError(
            "The inputs of TransformerLens' attention are not read here; give the model of transformers itself."
        )
    weights = read_weights(model)
    inputs: dict[int, Tensor] = {}
    calls: dict[int, Call] = {}

    def hook(number: int) -> Any:
        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs[number] = args[0] if args else kwargs["hidden_states"]

        return keep

    def keep_call(call: Call) -> None:
        calls[call.layer] = call

    handles = [
        module.get_submodule(path).register_forward_pre_hook(hook(number), with_kwargs=True)
        for number, path in attention_paths(module).items()
    ]
    try:
        with capture(module, emit=Emit(entropy=True, visible=True), qkv=True, on_call=keep_call):
            device = device_of(module)
            run(module, input_ids.to(device), None if attention_mask is None else attention_mask.to(device), {})
    finally:
        for handle in handles:
            handle.remove()
    return tuple(_of_layer(weights, number, inputs[number], calls[number]) for number in sorted(inputs))


def _of_layer(weights: HeadWeights, number: int, x: Tensor, call: Call) -> WeightBound:
    if call.site.biased:
        raise UnsupportedModelError(f"Layer {number} adds a bias to its logits, whose norm is not in its weights.")
    assert call.q is not None
    assert call.k is not None
    assert call.emitted.visible is not None
    qk = weights.qk(number)
    x = x.to(qk.left.dtype)
    groups = call.site.n_heads // call.site.n_key_heads
    query, query_turned = _with_bias(qk.left, x, call.q, number)
    key, key_turned = _with_bias(qk.right.mT, x, call.k.repeat_interleave(groups, 1), number)
    turned = query_turned or key_turned
    there = torch.ones_like(x[..., :1]) if call.site.key_mask is None else call.site.key_mask[..., None].to(x)
    one = torch.nn.functional.pad(x, (0, 1), value=1.0)
    if turned:
        spectral = torch.linalg.matrix_norm(query, 2) * torch.linalg.matrix_norm(key, 2)
        width = (one * there).flatten(1).norm(dim=1)
    else:
        spectral = Factored(query, qk.right).singular_values()[:, 0]
        mean = (x * there).sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp(min=1)
        width = torch.linalg.matrix_norm((x - mean) * there, 2)
    sigma = abs(call.scale) * one.norm(dim=-1)[:, None, :] * spectral[:, None] * width[:, None, None]
    visible = call.emitted.visible
    if call.site.query_mask is not None:
        visible = visible * call.site.query_mask[:, None, :]
    sink = call.emitted.learned_sink_mass
    if sink is not None and call.site.query_mask is not None:
        sink = sink * call.site.query_mask[:, None, :]
    return WeightBound(spectral, sigma, row_bounds(sigma, visible, sink), turned)


def _with_bias(weight: Tensor, x: Tensor, made: Tensor, number: int) -> tuple[Tensor, bool]:
    """[H, d + 1, D], the bias as the last row, and whether places turn what the weights give.

    Raises:
        UnsupportedModelError: queries or keys [B, H, N, D] are not what the weights give, turned or not.
    """
    straight = x[:, None] @ weight
    made = made.to(straight)
    bias = (made - straight)[0, :, :1]  # places turn by an angle of 0 at the first
    expected = straight + bias
    close = _CLOSE if torch.finfo(made.dtype).eps < 1e-4 else 5e-2
    size = expected.norm(dim=-1).amax().clamp(min=1e-30)
    if bool(((made.norm(dim=-1) - expected.norm(dim=-1)).abs() > close * size).any()):
        raise UnsupportedModelError(
            f"The queries or keys of layer {number} are more than a linear map of its input, so its weights give no "
            "bound; attnlab.monitor.logit_norms reads them as they are."
        )
    turned = bool(((made - expected).norm(dim=-1) > close * size).any())
    return torch.cat([weight, bias], 1), turned
