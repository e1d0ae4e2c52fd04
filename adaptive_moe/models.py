"""Where a SortingShape comes from: a known model, a Hugging Face id or config, or numbers.

Nothing here reaches for the network: an id is one of calibration/models.toml, or a model whose
config.json lies in the local Hugging Face cache.
"""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adaptive_moe.shape import DTYPES, SortingShape

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Engines may append shared experts to the routed ones, so that one sort serves both.
FUSED = "-fused"
HUB = "https://huggingface.co/"

# The spellings of one fact in public config files, most common first.
EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
TOPK = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "experts_per_token",
    "top_k_experts",
)
HIDDEN = ("hidden_size", "d_model", "n_embd", "dim")
SHARED = ("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts")
# A config inside the config: of a whole language model, or (dbrx, Mistral) of its MoE alone.
NESTED = ("text_config", "llm_config", "language_config", "thinker_config")
MOE_PART = ("ffn_config", "moe")
# What a folder of weights holds: Hugging Face's file, or Mistral's own.
CONFIG_FILES = ("config.json", "params.json")


class ModelError(ValueError):
    """The model or config gives no sorting shape; the text says why and what would work."""


@dataclass(frozen=True)
class Model:
    """One public model's sort; `source` is where its numbers were read, dtype that of moe_buf.

    For a model-like step (`bench step`), and 0 or empty where that is not known:
    moe_intermediate_size  columns of one expert's hidden activations
    attention  width of the query, key and value projections together, and of what is projected back
    """

    name: str
    num_experts: int
    topk: int
    model_dim: int
    source: str
    dtype: str = "bfloat16"
    shared_experts: int = 0
    moe_intermediate_size: int = 0
    attention: tuple[int, ...] = ()

    def shape(self, block_size: int = 32, dtype: str | None = None) -> SortingShape:
        return SortingShape(
            self.num_experts, self.topk, self.model_dim, dtype or self.dtype, block_size
        )

    def fused(self) -> "Model":
        """With the shared experts sorted among the routed ones, each token going to all of them.
        ModelError where the model has none."""
        if not self.shared_experts:
            raise ModelError(
                f"{self.name} ({self.source}) names no shared experts, so there is nothing to "
                "fuse: leave --fuse-shared out"
            )
        return replace(
            self,
            name=self.name + FUSED,
            num_experts=self.num_experts + self.shared_experts,
            topk=self.topk + self.shared_experts,
            shared_experts=0,
        )


def known_models() -> dict[str, Model]:
    """Every model of calibration/models.toml by name, and NAME-fused where it has shared experts."""
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
    if word.endswith(FUSED) and word in known:
        return known[word]
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
    return found.fused() if fuse_shared else found


def hub_config(model_id: str, environ: Mapping[str, str] = os.environ) -> Path | None:
    """The config of that id in the local Hugging Face cache, or None. Never downloads."""
    owner, slash, name = model_id.partition("/")
    if not slash or "/" in name or ".." in model_id:
        return None
    home = environ.get("HF_HOME") or os.path.expanduser(
        os.path.join(environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    )
    hub = Path(environ.get("HF_HUB_CACHE") or Path(home, "hub"))
    folder = hub / f"models--{owner}--{name}"
    try:
        revision = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        revision = "*"
    for snapshot in sorted((folder / "snapshots").glob(revision)):
        for file in CONFIG_FILES:
            if (snapshot / file).is_file():
                return snapshot / file
    return None


def model_from_config(path: Path, *, fuse_shared: bool = False) -> Model:
    """The shape in a Hugging Face config.json, in Mistral's params.json, or in a folder with one.

    Args:
        path: the file, or the folder of the weights.
        fuse_shared: count the config's shared experts among the sorted ones.

    Raises:
        ModelError: it has no shape, is no JSON object, or has no shared experts to fuse.
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
        _count(inner, HIDDEN, path),
        str(path),
        next((d for level in (config, inner) if (d := _dtype(level))), "bfloat16"),
        _shared_experts(inner),
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
        config = json.loads(path.read_text(encoding="utf-8"))
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


def _shared_experts(config: Mapping[str, Any]) -> int:
    count = _present(config, SHARED)
    if isinstance(count, int) and not isinstance(count, bool):
        return count
    return 1 if config.get("shared_expert_intermediate_size") else 0


def _dtype(config: Mapping[str, Any]) -> str | None:
    """The config's dtype where it is one that moe_buf can have."""
    dtype = str(config.get("torch_dtype") or config.get("dtype") or "").removeprefix("torch.")
    return dtype if dtype in DTYPES else None


def _facts() -> dict[str, dict[str, Any]]:
    """models.toml: beside this module where installed, in calibration/ of a source tree."""
    installed = Path(__file__).with_name("models.toml")
    in_tree = Path(__file__).parents[1] / "calibration/models.toml"
    path = installed if installed.exists() else in_tree
    facts: dict[str, dict[str, Any]] = tomllib.loads(path.read_text(encoding="utf-8"))
    return facts


def _model(name: str, facts: Mapping[str, Any]) -> Model:
    return Model(
        name,
        facts["num_experts"],
        facts["topk"],
        facts["hidden_size"],
        facts["source"],
        shared_experts=facts.get("fused_shared_experts", 0),
        moe_intermediate_size=facts.get("moe_intermediate_size", 0),
        attention=tuple(facts.get("attention", ())),
    )


def _ids(facts: Mapping[str, Any]) -> list[str]:
    """Hugging Face ids of these numbers: the one they were read from, and its relatives."""
    owner, name = str(facts["source"]).removeprefix(HUB).split("/")[:2]
    return [f"{owner}/{name}", *facts.get("also", ())]
