"""SAEs on disk, in sae-lens' format: a folder with `cfg.json` and `sae_weights.safetensors`. sae-lens is not needed.

Read are the architectures `standard`, `topk` and `jumprelu` (what BatchTopK becomes) as sae-lens 6 writes them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from attnlab.errors import AttnlabError
from attnlab.models.shipped import shipped_models, shipped_path
from attnlab.sae.attention_sae import AttentionSAE

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
FOLDER = "saes"
"""Where a shipped model's folder keeps its SAEs, each in a folder of its own."""
_WEIGHTS = {"standard": (), "topk": (), "jumprelu": ("threshold",)}
_ALWAYS = ("W_enc", "b_enc", "W_dec", "b_dec")
_HOOK = re.compile(r"(?:^|\.)(\d+)\..*hook_z$")


def shipped_saes() -> list[str]:
    """Names of the SAEs that come with attnlab, such as `tasks/layer-3`.

    Example:
        >>> all(name.count("/") == 1 for name in shipped_saes())
        True
    """
    return [f"{model}/{folder.name}" for model in shipped_models() for folder in saes_of(shipped_path(model))]


def saes_of(model: Path) -> list[Path]:
    """The folders of the SAEs in a model's folder, by name; empty where it has none."""
    return sorted(path.parent for path in (model / FOLDER).glob(f"*/{CONFIG}"))


def load_sae(
    source: str | Path,
    *,
    n_heads: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> AttentionSAE:
    """Load an SAE of attention outputs.

    Args:
        source: a folder that sae-lens wrote, or the name of an SAE that comes with attnlab (`shipped_saes`).
        n_heads: of its layer; by default what the file says, which those of other makers do not.
        device: where its weights are to be.
        dtype: what it computes in, whatever its weights are stored in.

    Raises:
        AttnlabError: there is no such SAE, its files are damaged, or it is not one of attention outputs that is read.

    Example:
        >>> load_sae("tasks/layer-99")
        Traceback (most recent call last):
        ...
        attnlab.errors.AttnlabError: 'tasks/layer-99' is no folder with cfg.json and no SAE that comes with attnlab; ...
    """
    if not dtype.is_floating_point:
        raise AttnlabError(f"dtype is {dtype}; expected a floating-point one, such as torch.float32.")
    folder = _folder(source)
    config, weights = _config(folder), _weights(folder)
    metadata = config["metadata"]
    architecture, where = config.get("architecture"), f"The SAE in {folder}"
    if architecture not in tuple(_WEIGHTS):  # the file may hold what no key can be
        raise AttnlabError(f"{where} is of architecture {architecture!r}; read are {', '.join(_WEIGHTS)}.")
    if (norm := config.get("normalize_activations", "none")) != "none":
        raise AttnlabError(f"{where} normalises its input ({norm}); read are those with normalize_activations 'none'.")
    hook = metadata.get("hook_name")
    match = _HOOK.search(hook) if isinstance(hook, str) else None
    if hook is not None and match is None:
        raise AttnlabError(f"{where} reads {hook}; expected one of attention outputs, blocks.N.attn.hook_z.")
    if metadata.get("hook_head_index") is not None:
        raise AttnlabError(f"{where} reads head {metadata['hook_head_index']} alone; expected all heads concatenated.")
    if set(weights) != {*_ALWAYS, *_WEIGHTS[architecture]}:
        raise AttnlabError(
            f"{where} has the weights {', '.join(sorted(weights))}; "
            f"{architecture} has {', '.join((*_ALWAYS, *_WEIGHTS[architecture]))}."
        )
    if config.get("rescale_acts_by_decoder_norm"):
        # Its features are then those of a decoder with rows of norm 1.
        norms = weights["W_dec"].norm(dim=1)
        rows = torch.where(norms > 0, norms, 1)[:, None]
        weights["W_enc"], weights["b_enc"] = weights["W_enc"] * norms, weights["b_enc"] * norms
        weights["W_dec"] = weights["W_dec"] / rows
    return AttentionSAE(
        architecture,
        k=config.get("k") if architecture == "topk" else None,
        centred=bool(config.get("apply_b_dec_to_input", True)),
        n_heads=metadata.get("n_heads") if n_heads is None else n_heads,
        layer=None if match is None else int(match[1]),
        **weights,
    ).to(device, dtype)


def _folder(source: str | Path) -> Path:
    if (Path(source) / CONFIG).is_file():
        return Path(source)
    if str(source) in (known := shipped_saes()):
        model, _, name = str(source).partition("/")
        return shipped_path(model) / FOLDER / name
    raise AttnlabError(
        f"{str(source)!r} is no folder with {CONFIG} and no SAE that comes with attnlab; there are: "
        f"{', '.join(known) or 'none'}."
    )


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AttnlabError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(config, dict) or not isinstance(config.get("metadata"), dict):
        raise AttnlabError(
            f"{path} has no metadata, so sae-lens before version 6 wrote it; load it with sae-lens and save it again."
        )
    return config


def _weights(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise AttnlabError(f"{path} cannot be read as safetensors: {error}.") from error
    for name, weight in stored.items():
        if not weight.is_floating_point() or not bool(weight.isfinite().all()):
            raise AttnlabError(f"{name} in {path} holds something else than finite floating-point numbers.")
    return {name: weight.to(torch.promote_types(weight.dtype, torch.float32)) for name, weight in stored.items()}
