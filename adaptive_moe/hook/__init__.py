"""One call of AITER's sort: it is answered by the candidate that was measured for it.

A call, from AITER's fused_moe on:

    wrapper         the function in the place of AITER's: compares the call with the latest one,
                    finds the byte for its token count, and calls AITER or another sort: what a call
                    costs
    entries         what the wrapper looks up, made from a table
    slow_path       calls that have no entry yet, or fail: noted, and run as they came
    calls           reads the key and the rest off a call's arguments
    counters        what became of the calls
    wrapped_module  puts the wrapper into AITER's module, and takes it out again
    hook            all of these together, with the tables that serve
"""
