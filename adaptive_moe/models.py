"""Where a SortingShape comes from: a known model, a Hugging Face config.json, or numbers."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptive_moe.shape import DTYPES, SortingShape

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Engines may append shared experts to the routed ones, so that one sort serves both.
FUSED = "-fused"

# The spellings of one fact in public config.json files, most common first.
EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
TOPK = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_k",
    "experts_per_token",
    "top_k_experts",
)
HIDDEN = ("hidden_size", "d_model", "n_embd", "dim")
SHARED = ("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts")
NESTED = ("text_config", "llm_config", "language_config", "thinker_config")


class ModelError(ValueError):
    """The model or config gives no sorting shape; the text says why and what would work."""


@dataclass(frozen=True)
class Model:
    """One public model; `source` is where its numbers were read."""

    name: str
    num_experts: int
    topk: int
    model_dim: int
    source: str

    def shape(self, block_size: int = 32, dtype: str = "bfloat16") -> SortingShape:
        return SortingShape(self.num_experts, self.topk, self.model_dim, dtype, block_size)


def known_models() -> dict[str, Model]:
    """Every model of calibration/models.toml, and its variant with shared experts fused."""
    models: dict[str, Model] = {}
    for name, facts in tomllib.loads(_models_file().read_text(encoding="utf-8")).items():
        experts, topk, dim = facts["num_experts"], facts["topk"], facts["hidden_size"]
        source = facts["source"]
        models[name] = Model(name, experts, topk, dim, source)
        if shared := facts.get("fused_shared_experts"):
            fused = name + FUSED
            models[fused] = Model(fused, experts + shared, topk + shared, dim, source)
    return models


def find_model(name: str) -> Model:
    """The model of that name in any case; ModelError listing all names otherwise."""
    models = known_models()
    if name.lower() not in models:
        raise ModelError(
            f"model {name!r} is not known: give one of {', '.join(models)}; or --config PATH to "
            "its config.json; or --experts, --topk and --hidden"
        )
    return models[name.lower()]


def model_from_config(path: Path, *, fuse_shared: bool = False) -> Model:
    """The shape in a Hugging Face config.json; ModelError where it has none or is no JSON object.

    fuse_shared counts the config's shared experts among the sorted ones.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"config {path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"config {path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"config {path} holds {type(config).__name__}, not a JSON object")
    inner = _moe_level(config)
    if inner is None:
        raise ModelError(
            f"config {path} describes no mixture of experts (none of {', '.join(EXPERTS)} is "
            "above 1): a dense model has nothing to sort"
        )
    experts = _count(inner, EXPERTS, path)
    topk, hidden = _count(inner, TOPK, path), _count(inner, HIDDEN, path)
    if fuse_shared:
        shared = _shared_experts(inner)
        experts, topk = experts + shared, topk + shared
    name = str(config.get("model_type", path.stem)) + (FUSED if fuse_shared else "")
    return Model(name, experts, topk, hidden, str(path))


def config_dtype(path: Path) -> str:
    """The config's dtype where it is one that moe_buf can have, else bfloat16."""
    config = json.loads(path.read_text(encoding="utf-8"))
    dtype = str(config.get("torch_dtype") or config.get("dtype") or "").removeprefix("torch.")
    return dtype if dtype in DTYPES else "bfloat16"


def _moe_level(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    if _present(config, EXPERTS) is not None:
        return config
    for key in NESTED:
        nested = config.get(key)
        if isinstance(nested, dict) and (found := _moe_level(nested)) is not None:
            return found
    return None


def _present(config: Mapping[str, Any], spellings: tuple[str, ...]) -> Any:
    """The first spelling with a value; 0 or 1 experts is how dense configs say there are none."""
    least = 2 if spellings is EXPERTS else 1
    for key in spellings:
        value = config.get(key)
        # Some configs give one value a layer; a sort's shape is the largest of them.
        if isinstance(value, list) and value and all(isinstance(v, int) for v in value):
            value = max(value)
        if value is not None and not (isinstance(value, int) and value < least):
            return value
    return None


def _count(config: Mapping[str, Any], spellings: tuple[str, ...], path: Path) -> int:
    value = _present(config, spellings)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ModelError(
            f"config {path}: {' or '.join(spellings)} is {value!r}, not a positive integer"
        )
    return value


def _shared_experts(config: Mapping[str, Any]) -> int:
    count = _present(config, SHARED)
    if isinstance(count, int) and not isinstance(count, bool):
        return count
    return 1 if config.get("shared_expert_intermediate_size") else 0


def _models_file() -> Path:
    """Beside this module where installed, in calibration/ of a source tree."""
    installed = Path(__file__).with_name("models.toml")
    return (
        installed if installed.exists() else Path(__file__).parents[1] / "calibration/models.toml"
    )
