"""hatchling's hook: a wheel of kvd has the compiled core (see compile_core.py).

It needs a C compiler; KVD_CORE=interpreted builds a wheel of plain sources without one. An
editable installation is left alone: `make core` compiles in place.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

sys.path.insert(0, os.fspath(Path(__file__).resolve().parent))

from compile_core import RECORD, compile_core, is_up_to_date, remove


class CompileCore(BuildHookInterface):  # type: ignore[type-arg]  # it has no configuration
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel" or version == "editable":
            return
        if os.environ.get("KVD_CORE") == "interpreted":
            remove()
            return
        if not is_up_to_date():
            compile_core()
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
        build_data["artifacts"] += ["*.so", RECORD]
