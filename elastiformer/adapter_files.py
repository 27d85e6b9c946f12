"""The files of an adapter: checked by their hashes, and brought from the Hub and to it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from elastiformer.errors import AdapterError

_NAMES = ["*.json", "*.safetensors", "README.md"]  # on the Hub


def read_json(path: Path) -> dict[str, Any]:
    """The object that a file holds."""
    try:
        value = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AdapterError(f"{path}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{path}: an object is expected; got {type(value).__name__}")
    return value


def read_file(folder: Path, name: str, digest: str) -> bytes:
    """A file that adapter.json lists with its SHA-256."""
    path = folder / name
    if ".." in Path(name).parts or Path(name).is_absolute():
        raise AdapterError(f"{folder / 'adapter.json'}: names a file outside its folder: {name}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read: {error}") from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise AdapterError(f"{path}: cut short or altered: its hash is not the one in adapter.json")
    return content


def parse_tensors(path: Path, content: bytes | None) -> dict[str, Tensor]:
    """The tensors in the content of a file; None: adapter.json does not list it."""
    if content is None:
        raise AdapterError(f"{path}: adapter.json does not list it")
    try:
        return load_tensors(content)
    except SafetensorError as error:
        raise AdapterError(f"{path}: not a safetensors file: {error}") from error


def from_hub(repository: str) -> Path:
    """The folder that a Hub repository was copied to."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=_NAMES))
    except Exception as error:  # the Hub client raises many kinds; all mean the same here
        raise AdapterError(
            f"adapter {repository!r}: no such folder, and not to be had from the Hub ({error})"
        ) from error


def to_hub(folder: Path, repository: str) -> None:
    """Upload a folder as a model repository."""
    from huggingface_hub import HfApi

    hub = HfApi()
    hub.create_repo(repository, exist_ok=True)
    hub.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=_NAMES)
