"""A model's sort out of its config: Hugging Face's config.json in its many spellings, or Mistral's
params.json."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from adaptive_moe.models.model import Model, ModelError
from adaptive_moe.shape import DTYPES

# The spellings of one fact in public config files, most common first.
EXPERTS = (
    "num_experts",
    "n_routed_experts",
    "num_local_experts",
    "moe_num_experts",
    "moe_num_primary_experts",
)
TOPK = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "experts_per_token",
    "top_k_experts",
    "moe_num_active_primary_experts",
)
HIDDEN_SIZE_KEYS = ("hidden_size", "hidden_dim", "d_model", "n_embd", "dim")
INTERMEDIATE = (
    "moe_intermediate_size",
    "expert_ffn_hidden_size",
    "moe_ffn_hidden_size",
    "intermediate_size",
    "expert_hidden_dim",
    "ffn_hidden_size",
)
SHARED_WIDTH = "shared_expert_intermediate_size"
SHARED = ("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts")
# A config inside the config: of a whole language model, or (dbrx, Mistral) of its MoE alone.
NESTED = ("text_config", "llm_config", "language_config", "thinker_config")
MOE_PART = ("ffn_config", "moe")
# What a folder of weights holds: Hugging Face's file, or Mistral's own.
CONFIG_FILES = ("config.json", "params.json")
MOST_BYTES = 4 << 20


def model_from_config(path: Path, *, fuse_shared: bool = False) -> Model:
    """The shape in a Hugging Face config.json, in Mistral's params.json, or in a folder with one.

    Args:
        path: the file, or the folder of the weights.
        fuse_shared: count the config's shared experts among the sorted ones.

    Raises:
        ModelError: it has no shape, is no JSON object, or no shared experts that can be fused.
    """
    path = _config_file(path)
    config = _read(path)
    inner = next(_moe_levels(config), None)
    if inner is None:
        raise ModelError(
            f"config {path} describes no mixture of experts (none of {', '.join(EXPERTS)} is "
            "above 1): a dense model has nothing to sort"
        )
    model = Model(
        str(config.get("model_type") or path.parent.name or path.stem),
        _count(inner, EXPERTS, path),
        _count(inner, TOPK, path),
        _count(inner, HIDDEN_SIZE_KEYS, path),
        str(path),
        next((d for level in (config, inner) if (d := _dtype(level))), "bfloat16"),
        _shared_experts(inner),
        moe_intermediate_size=_present(inner, INTERMEDIATE) or 0,
        shared_width=_present(inner, (SHARED_WIDTH,)) or 0,
        quantisation=_quantisation(config) or _quantisation(inner),
    )
    return model.fused() if fuse_shared else model


def _config_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in CONFIG_FILES:
        if (path / name).is_file():
            return path / name
    raise ModelError(f"config {path} is a folder without {' or '.join(CONFIG_FILES)}")


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.exists() and not path.is_file():
            raise ModelError(f"config {path} is no file: give a config.json, or its folder")
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ModelError(
                f"config {path} has more than {MOST_BYTES} bytes: it is no config.json"
            )
        config = json.loads(content)
    except OSError as error:
        raise ModelError(f"config {path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"config {path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"config {path} holds {type(config).__name__}, not a JSON object")
    return config


def _moe_levels(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The levels of a config that say how many experts there are, outermost first."""
    if _present(config, EXPERTS) is not None:
        yield config
    for part in MOE_PART:
        if isinstance(nested := config.get(part), dict) and _present(nested, EXPERTS) is not None:
            yield {**config, **nested}  # the hidden size is said outside
    for key in NESTED:
        if isinstance(nested := config.get(key), dict):
            yield from _moe_levels(nested)


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


def _shared_experts(config: Mapping[str, Any]) -> int | None:
    """None where the config does not say."""
    count = _present(config, SHARED)
    if isinstance(count, int) and not isinstance(count, bool):
        return count
    if _present(config, (SHARED_WIDTH,)):
        return 1
    return 0 if any(key in config for key in SHARED) else None


def _quantisation(config: Mapping[str, Any]) -> str:
    """The name of the weights' quantisation, such as `quark`; empty for none."""
    found = config.get("quantization_config")
    return str(found.get("quant_method") or "") if isinstance(found, dict) else ""


def _dtype(config: Mapping[str, Any]) -> str | None:
    """The config's dtype where it is one that moe_buf can have."""
    dtype = str(config.get("torch_dtype") or config.get("dtype")).removeprefix("torch.")
    return dtype if dtype in DTYPES else None
