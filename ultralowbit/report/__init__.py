"""What a run cost and what was lost, for people and for programs.

run          a finished compression: report.json, report.md, the card
schema       what those JSON files hold
measure      the original and the packed model of a run, on the same texts
gates        limits, signs of a collapse, what to try
card         README.md as the hub reads it
tables       markdown      lines of numbers; other people's text in Markdown
runs         runs and measured models, read back
comparison   columns       figures       `compare`: what compares on one page, in tables and plots
plots        labels        style         the kinds of plots, where names stand in them, how they look
sweep        sweep_runs    sweep_tracks  `bench methods`: recipes on models and seeds
"""
