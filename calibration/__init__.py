"""Benches of this package itself, run from a checkout: `python -m calibration.NAME`.

    step        what a choice is worth in a serving step: the judge
    sorts       every sort that can run here, side by side
    noise       identical candidates, and the same calibration repeated
    decision    the decision on simulated clocks of known truth
    hook        what the hook adds to a call
    startup     what an engine's start pays
    bench_amd   all of it on an AMD GPU, in one file to send back
    bench_triton_kernels, check_triton_contract, compile_triton_amd   our Triton sort
    wave64      our Triton sort executed as the AMD code that it compiles to

Each gives one JSON object with machine, date and versions, printed or written to --out.
docs/benchmarks.md has the figures.
"""
