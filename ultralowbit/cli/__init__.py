"""The `ultralowbit` command: a module for each group of commands, which imports what is heavy when it runs.

app       the command itself, its exit codes, interrupts, warnings
options   arguments and options that commands share
console   stdout and stderr: progress with the time left, user text made visible
render    tables and frames
errors    errors in one sentence
"""
