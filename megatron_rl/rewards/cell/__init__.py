"""What runs inside the sandbox: `rewards.sandbox` starts one of its modules in an interpreter of its own. Standard library alone.

A role is a module with `main(channels)`: `function` answers calls to the response's function, `checks` runs the prompt's tests
against it from a sandbox of its own, `stdio` runs the response's program once per input.

Invariant: nothing here is trusted by who reads what it says. A response shares a process with `function` and may make it say
anything; it could have returned that anyway.
"""
