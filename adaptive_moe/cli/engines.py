"""The engines that the command line knows: how each finds our plugin, and AITER."""

from collections.abc import Mapping
from dataclasses import dataclass

PLUGIN = "adaptive_moe"


@dataclass(frozen=True)
class Engine:
    """group is where it looks for plugins, allow the variable that names those to load, where it is
    set; aiter the one that switches AITER on."""

    name: str
    group: str
    allow: str
    aiter: str

    def loads_us(self, environ: Mapping[str, str]) -> bool:
        allowed = environ.get(self.allow)
        # vLLM takes an empty list at its word, SGLang as no list.
        if allowed is None or (not allowed and self.name == "sglang"):
            return True
        return PLUGIN in (name.strip() for name in allowed.split(","))


ENGINES = (
    Engine("vllm", "vllm.general_plugins", "VLLM_PLUGINS", "VLLM_ROCM_USE_AITER"),
    Engine("sglang", "sglang.srt.plugins", "SGLANG_PLUGINS", "SGLANG_USE_AITER"),
)
