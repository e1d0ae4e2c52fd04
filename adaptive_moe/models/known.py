"""Models by name: those of calibration/models.toml, by their Hugging Face ids too, and any other
whose config lies in the local Hugging Face cache. Nothing here reaches for the network.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaptive_moe.models.config import CONFIG_FILES, model_from_config
from adaptive_moe.models.model import FUSED, Model, ModelError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HUB = "https://huggingface.co/"


def known_models() -> dict[str, Model]:
    """Every model of calibration/models.toml, and NAME-fused where it has shared experts."""
    models: dict[str, Model] = {}
    for name, facts in _facts().items():
        models[name] = model = _model(name, facts)
        if model.shared_experts:
            models[name + FUSED] = model.fused()
    return models


def find_model(name: str, *, fuse_shared: bool = False) -> Model:
    """The model of that name or Hugging Face id, in any case.

    Args:
        name: such as `deepseek-v3`, `deepseek-v3-fused` or `deepseek-ai/DeepSeek-R1`.
        fuse_shared: sort its shared experts among the routed ones.

    Returns:
        The known model; for another id the one whose config the local Hugging Face cache holds.

    Raises:
        ModelError: it is neither, with all known names; or has no shared experts to fuse.
    """
    word = name.strip().lower()
    known = known_models()
    ids = {alias.lower(): known[name] for name, facts in _facts().items() for alias in _ids(facts)}
    found = known.get(word) or ids.get(word)
    if found is None:
        config = hub_config(name.strip())
        if config is None:
            raise ModelError(
                f"model {name!r} is not known: give one of {', '.join(known)}; or a Hugging Face "
                "id of one of them, or of a model in the local Hugging Face cache; or --config "
                "PATH to its config.json; or --experts, --topk and --hidden"
            )
        return model_from_config(config, fuse_shared=fuse_shared)
    return found.fused() if fuse_shared and not found.name.endswith(FUSED) else found


def hub_config(model_id: str, environ: Mapping[str, str] = os.environ) -> Path | None:
    """The config of that id in the local Hugging Face cache, or None. Never downloads."""
    if model_id.count("/") != 1:  # OWNER/NAME
        return None
    home = environ.get("HF_HOME") or os.path.expanduser(
        os.path.join(environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    )
    hub = Path(environ.get("HF_HUB_CACHE") or Path(home, "hub"))
    folder = hub / f"models--{model_id.replace('/', '--')}"
    try:
        revision = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        revision = "*"
    for snapshot in sorted((folder / "snapshots").glob(revision)):
        for file in CONFIG_FILES:
            if (snapshot / file).is_file():
                return snapshot / file
    return None


def _facts() -> dict[str, dict[str, Any]]:
    """models.toml: beside this module where installed, in calibration/ of a source tree."""
    installed = Path(__file__).with_name("models.toml")
    in_tree = Path(__file__).parents[2] / "calibration/models.toml"
    path = installed if installed.exists() else in_tree
    facts: dict[str, dict[str, Any]] = tomllib.loads(path.read_bytes().decode())
    return facts


def _model(name: str, facts: Mapping[str, Any]) -> Model:
    return Model(
        name,
        facts["num_experts"],
        facts["topk"],
        facts["hidden_size"],
        facts["source"],
        shared_experts=facts.get("fused_shared_experts", 0),
        moe_intermediate_size=facts["moe_intermediate_size"],
        attention=tuple(facts["attention"]),
    )


def _ids(facts: Mapping[str, Any]) -> list[str]:
    """Hugging Face ids of these numbers: the one they were read from, and its relatives."""
    owner, name = str(facts["source"]).removeprefix(HUB).split("/")[:2]
    return [f"{owner}/{name}", *facts.get("also", ())]
