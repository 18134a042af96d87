"""A Hugging Face model folder as it lies on disk: its config, geometry, weight files and identity.

Torch-free, so that the daemon sizes a pool and the worker loads the model from the same reading.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import structlog

from kvd_shared.digest_cache import DigestCache
from kvd_shared.errors import KvdError
from kvd_shared.layout import DTYPE_BYTES, PoolLayout

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
ORIGIN_KEYS = ("_name_or_path", "transformers_version")  # where a folder came from, not what it is
READ_BYTES = 8 << 20

log = structlog.get_logger()

Progress = Callable[[int, int], None]  # bytes done, bytes in all


class BadModelFolder(KvdError):
    """A model folder that cannot be served: names the file, the key and what would do."""

    code = "BAD_MODEL_FOLDER"


@dataclass(frozen=True, slots=True)
class JsonMap:
    """A map in a JSON file. Look-ups are typed; what does not fit raises BadModelFolder."""

    where: str  # the file, and the key when it is a map inside
    values: dict[str, Any]

    def number(self, key: str, default: float | None = None) -> float:
        return float(self._typed(key, default, (int, float), "a number"))

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1."""
        value: int = self._typed(key, default, (int,), "a whole number")
        if value < 1:
            raise BadModelFolder(f"{self.where}: {key} = {value}: must be at least 1")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value: bool = self._typed(key, default, (bool,), "true or false")
        return value

    def submap(self, key: str) -> JsonMap:
        """The map under `key`; an empty one when it is absent or null."""
        value = self._typed(key, {}, (dict,), "a map")
        return JsonMap(f"{self.where}: {key}", value)

    def _typed(self, key: str, default: Any, types: tuple[type, ...], wanted: str) -> Any:
        value = self.values.get(key)
        if value is None:  # transformers writes null for "not set"
            value = default
        if value is None:
            raise BadModelFolder(f"{self.where}: {key} is missing: must be {wanted}")
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise BadModelFolder(f"{self.where}: {key} = {value!r}: must be {wanted}")
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFolder:
    """What a folder's config.json says about any decoder with plain attention."""

    path: Path
    architecture: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    context_length: int  # tokens
    vocab_size: int | None  # token ids are below it; None: the config does not say
    dtype: str  # named in the config; float32 when it names none
    config: JsonMap

    def layout(self, page_size: int, dtype: str | None = None) -> PoolLayout:
        """Geometry of this model's pages; K and V are stored in `dtype` or else the config's."""
        return PoolLayout(
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            page_size=page_size,
            dtype=dtype or self.dtype,
        )


def read_model_folder(path: Path) -> ModelFolder:
    """Read config.json. Raises BadModelFolder."""
    config = read_json(path / CONFIG)
    architectures = config.values.get("architectures")
    if not isinstance(architectures, list) or [type(a) for a in architectures] != [str]:
        raise BadModelFolder(
            f"{config.where}: architectures = {architectures!r}: must name one, "
            'as in ["LlamaForCausalLM"]'
        )
    if config.values.get("kv_lora_rank") is not None:
        raise BadModelFolder(
            f"{config.where}: kv_lora_rank is set: latent attention keeps no K and V heads; "
            "supported are models that keep K and V of every head"
        )
    dtype = config.values.get("dtype") or config.values.get("torch_dtype") or "float32"
    if dtype not in tuple(DTYPE_BYTES):  # a tuple, for it may be anything, hashable or not
        raise BadModelFolder(
            f"{config.where}: dtype = {dtype!r}: supported are {', '.join(DTYPE_BYTES)}"
        )
    num_heads = config.whole("num_attention_heads")
    known = config.values.get("vocab_size") is not None
    return ModelFolder(
        path=path,
        architecture=architectures[0],
        num_layers=config.whole("num_hidden_layers"),
        num_kv_heads=config.whole("num_key_value_heads", num_heads),
        head_dim=config.whole("head_dim", config.whole("hidden_size") // num_heads),
        context_length=config.whole("max_position_embeddings"),
        vocab_size=config.whole("vocab_size") if known else None,
        dtype=dtype,
        config=config,
    )


def read_json(path: Path) -> JsonMap:
    """A JSON file that holds a map. Raises BadModelFolder."""
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise BadModelFolder(f"{path}: no such file: is this a model folder?") from None
    except (OSError, ValueError) as e:
        raise BadModelFolder(f"{path}: cannot be read as JSON: {e}") from e
    if not isinstance(values, dict):
        raise BadModelFolder(f"{path}: holds {type(values).__name__}, must hold a JSON map")
    return JsonMap(str(path), values)


def weight_files(path: Path) -> list[Path]:
    """The folder's safetensors files in the order of their names. Raises BadModelFolder."""
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    if not (path / INDEX).is_file():
        raise BadModelFolder(f"{path}: has neither {SINGLE} nor {INDEX}")
    index = read_json(path / INDEX)
    names = index.submap("weight_map").values.values()
    if not names or not all(isinstance(name, str) and name == Path(name).name for name in names):
        raise BadModelFolder(f"{index.where}: weight_map must map tensors to files of the folder")
    files = [path / name for name in sorted(set(names))]
    for file in files:
        if not file.is_file():
            raise BadModelFolder(
                f"{file}: no such file, but {INDEX} names it: is the download complete?"
            )
    return files


def model_fingerprint(
    path: Path, progress: Progress | None = None, cache: DigestCache | None = None
) -> str:
    """32 hex digits of what the model computes: its config and the bytes of its weight files.

    Two folders are interchangeable when these are equal; the tokenizer does not count. Reads every
    weight file that `cache` does not know, calling `progress` after each piece; the log says which
    folder's files it knew. Raises BadModelFolder.
    """
    config = dict(read_json(path / CONFIG).values)
    for key in ORIGIN_KEYS:
        config.pop(key, None)
    canonical = json.dumps(config, sort_keys=True, separators=(",", ":"))
    files = weight_files(path)
    sizes = [file.stat().st_size for file in files]
    done, total = 0, sum(sizes)

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if progress:
            progress(done, total)

    # a digest of digests: no bytes can move from one file's end to the next one's start
    whole = hashlib.sha256(hashlib.sha256(canonical.encode()).digest())
    known_before = cache.num_hits if cache else 0
    for file, size in zip(files, sizes, strict=True):
        with file.open("rb", buffering=0) as stream:
            compute = partial(_sha256, stream, advance)
            start = done
            whole.update(cache.digest(stream.fileno(), compute) if cache else compute())
        if done < start + size:  # the cache knew it
            advance(start + size - done)
    if cache and cache.num_hits > known_before:
        log.info("digests.from_cache", model=str(path), files=cache.num_hits - known_before,
                 of=len(files), cache=str(cache.directory))  # fmt: skip
    return whole.hexdigest()[:32]


def _sha256(stream: FileIO, advance: Callable[[int], None]) -> bytes:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(READ_BYTES))
    while count := stream.readinto(buffer):
        digest.update(buffer[:count])
        advance(count)
    return digest.digest()
