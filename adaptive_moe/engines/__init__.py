"""Between an engine and AITER: each call of AITER's sort is answered by who was measured for it.

A call, from AITER's fused_moe on:

    seam      puts our function in the place of AITER's, and takes it out again
    wrapper   that function: a key, a look-up, a byte; what each call costs is here
    key       what tells the calls of one table from others
    entries   what is looked up, as made from a table
    rare      calls that have no entry yet, or fail: noted and run as they came
    seen      a call that was noted, and how to make it again
    counters  what became of the calls
    hook      all of these together, with the tables that serve

A warm-up, once per start:

    choosers  at which token counts does a layer come with which block_size?
    coverage  so which tables are wanted, each for which counts?
    checked   what a store had is compared with the baseline before it serves
    warm_up   these in turn with store/: tables for the hook, and lines for the log

A process:

    process   the one hook it has: install(), warm_up(), counts(), uninstall()
    plugin    what the plugins are made of; vllm and sglang are those there are
"""
