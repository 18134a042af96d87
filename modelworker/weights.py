"""Fill tensors from a folder's safetensors files; every name and shape is checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from kvd_shared.model_folder import BadModelFolder, Progress, weight_files

STORED_DTYPES = ("F32", "BF16", "F16")
DERIVED = re.compile(r"\.rotary_emb\.inv_freq$")  # old checkpoints store what the config says


def load_into(
    targets: Mapping[str, torch.Tensor],
    folder: Path,
    *,
    twins: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> None:
    """Copy each named tensor of the folder into its target, cast to the target's dtype.

    The targets' shapes are what is expected. `twins` maps names that a file may hold besides to the
    target that they must equal. `progress` gets bytes done and bytes in all, as they are stored in
    the targets. Raises BadModelFolder when a file is missing or cut short, or when a tensor is
    missing, there twice, unexpected, or of another shape; the targets are then partly filled.
    """
    missing = set(targets)
    found_twins: dict[str, tuple[Path, torch.Tensor]] = {}
    total, done = sum(target.nbytes for target in targets.values()), 0
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in sorted(file.keys()):
                    if name in missing:
                        _check_stored(path, name, file.get_slice(name), targets[name])
                        targets[name].copy_(file.get_tensor(name))
                        missing.remove(name)
                        done += targets[name].nbytes
                        if progress:
                            progress(done, total)
                    elif twins and name in twins:
                        found_twins[name] = path, file.get_tensor(name)
                    elif name in targets:
                        raise BadModelFolder(f"{path}: {name} is in an earlier file already")
                    elif not DERIVED.search(name):
                        raise BadModelFolder(
                            f"{path}: unexpected tensor {name}: config.json describes a model "
                            "without it"
                        )
        except SafetensorError as e:
            raise BadModelFolder(
                f"{path}: not a whole safetensors file ({e}): is the download complete?"
            ) from e
    if missing:
        raise BadModelFolder(
            f"{folder}: the weight files lack {len(missing)} of {len(targets)} tensors, "
            f"the first is {min(missing)}"
        )
    for name, (path, tensor) in found_twins.items():
        twin = targets[(twins or {})[name]]
        if not torch.equal(tensor.to(twin), twin):
            raise BadModelFolder(
                f"{path}: {name} differs from {(twins or {})[name]}, but config.json ties them "
                "(tie_word_embeddings)"
            )


def _check_stored(path: Path, name: str, stored: Any, target: torch.Tensor) -> None:
    shape, dtype = list(stored.get_shape()), stored.get_dtype()
    if shape != list(target.shape):
        raise BadModelFolder(
            f"{path}: {name} has shape {shape}, config.json describes {list(target.shape)}"
        )
    if dtype not in STORED_DTYPES:
        raise BadModelFolder(
            f"{path}: {name} is stored as {dtype}: supported are {', '.join(STORED_DTYPES)}"
        )
