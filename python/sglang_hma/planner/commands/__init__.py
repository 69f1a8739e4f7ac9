"""The subcommands of `python -m sglang_hma.planner`, a module each."""
