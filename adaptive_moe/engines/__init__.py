"""Who calls the sort: the seam in AITER, and the plugins that reach it from vLLM and SGLang."""
