"""One start: the shapes that an engine's first forward shows are measured, and serve from then on.

A warm-up, once per start:

    block_sizes  at which token counts does a layer come with which block_size?
    wanted       so which tables are wanted, each for which counts?
    checked      what a store had is compared with the baseline before it serves
    warm_up      these in turn with store/: tables for the hook, and lines for the log

A process:

    process      the one hook it has: install(), warm_up(), counts(), uninstall()
    plugin       what the plugins are made of; vllm and sglang are those there are
"""
