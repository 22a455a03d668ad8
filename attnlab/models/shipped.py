"""The models that come with attnlab: folders under `data/models`, in Hugging Face's layout."""

from __future__ import annotations

from pathlib import Path

from attnlab.errors import AttnlabError


def shipped_models() -> list[str]:
    """Names of the models that come with attnlab.

    Example:
        >>> all(isinstance(name, str) for name in shipped_models())
        True
    """
    root = _root()
    if root is None:
        return []
    return sorted(folder.name for folder in root.iterdir() if (folder / "config.json").is_file())


def shipped_path(name: str) -> Path:
    """Folder of a shipped model.

    Raises:
        AttnlabError: there is no such model.
    """
    root = _root()
    if root is None or name not in shipped_models():
        known = ", ".join(shipped_models()) or "none"
        raise AttnlabError(f"No model named {name!r} comes with attnlab; there are: {known}.")
    return root / name


def _root() -> Path | None:
    package = Path(__file__).resolve().parent.parent
    # A wheel carries the data inside the package; an editable install reads it from the repository.
    for candidate in (package / "_data" / "models", package.parent / "data" / "models"):
        if candidate.is_dir():
            return candidate
    return None
