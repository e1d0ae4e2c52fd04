"""The engines that the command line knows: how each finds our plugin, and AITER."""

from collections.abc import Mapping
from dataclasses import dataclass

PLUGIN = "adaptive_moe"


@dataclass(frozen=True)
class Engine:
    """group is where it looks for plugins, allow the variable that names those to load, where it is
    set; aiter the one that switches AITER on, off those that switch its MoE off again."""

    name: str
    group: str
    allow: str
    aiter: str
    off: tuple[str, ...] = ()

    def loads_us(self, environ: Mapping[str, str]) -> bool:
        allowed = environ.get(self.allow)
        # vLLM takes an empty list at its word, SGLang as no list.
        if allowed is None or (not allowed and self.name == "sglang"):
            return True
        return PLUGIN in (name.strip() for name in allowed.split(","))

    def sorts_with_aiter(self, environ: Mapping[str, str]) -> str | None:
        """Why not, or None."""
        if environ.get(self.aiter, "").strip().lower() not in ON:
            return f"it sorts with AITER only under {self.aiter}=1, which is not set"
        for name in self.off:
            if name in environ and environ[name].strip().lower() not in ON:
                return f"{name}={environ[name]!r} switches AITER's MoE off: unset it"
        return None


ON = ("1", "true")
ENGINES = (
    Engine(
        "vllm",
        "vllm.general_plugins",
        "VLLM_PLUGINS",
        "VLLM_ROCM_USE_AITER",
        ("VLLM_ROCM_USE_AITER_MOE",),
    ),
    Engine("sglang", "sglang.srt.plugins", "SGLANG_PLUGINS", "SGLANG_USE_AITER"),
)
