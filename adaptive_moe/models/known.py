"""Models by name: those of calibration/models.toml, by their Hugging Face ids too, and any other
whose config lies in the local Hugging Face cache. Nothing here reaches for the network.
"""

import os
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from adaptive_moe.models.config import CONFIG_FILES, model_from_config
from adaptive_moe.models.model import FUSED, Model, ModelError

HUB = "https://huggingface.co/"


def known_models() -> dict[str, Model]:
    """Every model of calibration/models.toml, and NAME-fused where it has shared experts."""
    return dict(_models(_facts()))


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


@cache
def title_of(num_experts: int, topk: int, model_dim: int) -> str:
    """What people call the models with such a sort, such as `DeepSeek-V3`; empty where none is
    known. Never raises: a log line must not depend on it."""
    try:
        facts = _facts()
        models = [(_title(facts[name.removesuffix(FUSED)], name), m) for name, m in _models(facts)]
    except Exception:
        return ""
    shape = (num_experts, topk, model_dim)
    same = [title for title, m in models if (m.num_experts, m.topk, m.model_dim) == shape]
    return " or ".join(same)


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
    facts: dict[str, dict[str, Any]] = _toml(path.read_bytes().decode())
    return facts


def _toml(text: str) -> Any:
    for name in ("tomllib", "tomli"):  # the first since Python 3.11
        try:
            return import_module(name).loads(text)
        except ModuleNotFoundError:
            continue
    raise ModelError(
        "models by name need the package tomli on Python 3.10: pip install tomli; or give "
        "--config PATH, or --experts, --topk and --hidden"
    )


def _models(all_facts: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, Model]]:
    for name, facts in all_facts.items():
        model = _model(name, facts)
        yield name, model
        if model.shared_experts:
            yield name + FUSED, model.fused()


def _title(facts: Mapping[str, Any], name: str) -> str:
    """The model's own name, out of the address its numbers were read at."""
    title = str(facts["source"]).removeprefix(HUB).split("/")[1]
    return f"{title} with its shared experts" if name.endswith(FUSED) else title


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
