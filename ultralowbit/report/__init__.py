"""What a compression cost, for people and for programs.

schema       what report.json holds, of a run, the demo and a comparison: written and read through one schema
run          compress, measure, and write report.json, report.md and the model card
measure      the original and the packed model of one run, measured
gates        limits, signs of a collapse, and what to try
card         README.md for the hub
tables       markdown        tables for terminals and Markdown; other people's text is escaped here
comparison   `ultralowbit compare`: finished runs side by side
runs         columns         what stands in it: runs read back, and the columns of their numbers
figures      plots  labels  style    its pictures: which, of what kinds, where names stand, how they look
sweep        sweep_runs  sweep_tracks    `ultralowbit bench methods`: the command, its runs, their ratios
templates/   the pages
"""
