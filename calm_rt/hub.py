"""Repositories of the Hugging Face hub, fetched only where somebody asks for it."""

import re
from pathlib import Path
from types import ModuleType

from calm_rt.documents import PathLike
from calm_rt.ops.check import check

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
TOKENIZER_MODEL, TOKENIZER_JSON = "tokenizer.model", "tokenizer.json"
BESIDE_TOKENIZERS = ("tokenizer_config.json", "special_tokens_map.json")
TOKENIZERS = (TOKENIZER_MODEL, TOKENIZER_JSON, *BESIDE_TOKENIZERS)


def local_folder(path: PathLike, hub: bool, *, tokenizer: bool = False) -> Path:
    """A folder as it is; with `hub`, where there is none, a repository's files on this machine.

    path: of a folder, or "owner/name".
    hub: whether `huggingface_hub` may look there; it keeps what it fetched.
    tokenizer: fetch the tokenizer alone, not the model with it.
    raises: FileNotFoundError that says how where path can only be a repository and hub is False;
        ValueError without `huggingface_hub` or where it cannot get the files.
    """
    folder, name = Path(path), str(path)
    if folder.exists() or not (hub or REPOSITORY.fullmatch(name)):
        return folder
    if not hub:
        raise FileNotFoundError(
            f"{name}: no such folder; hub=True (--hub) takes it for a repository of the Hugging "
            "Face hub"
        )
    check(REPOSITORY.fullmatch(name) is not None, "path", "a folder or owner/name", name)
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError(f"hub: fetching {name} needs: pip install huggingface_hub") from None
    try:
        wanted = list(TOKENIZERS)
        if not tokenizer:
            wanted += ["config.json", *_weights(huggingface_hub, name)]
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # of the network, the hub, the disk
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"hub: cannot fetch {name} ({reason})") from error


def _weights(hub: ModuleType, name: str) -> list[str]:
    """Which files to ask for: safetensors or pickles, either holds all; offline what is there."""
    kinds = ["model*.safetensors*", "pytorch_model*"]
    if hub.constants.HF_HUB_OFFLINE:
        return kinds
    safe = any(file.startswith("model.safetensors") for file in hub.list_repo_files(name))
    return kinds[:1] if safe else kinds[1:]
