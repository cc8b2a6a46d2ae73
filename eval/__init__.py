"""What a model lost, measured on texts and tasks.

base         what a metric is: Result, Accumulator, Metric
metric       METRICS, the table of metrics
perplexity   fidelity        the metrics, one a file
windows      one forward pass over the windows of a text, for all metrics
runner       checkpoints and texts by name: opened, measured alone or beside their original
evaluate     the work of `ultralowbit eval`
schema       eval.json
zeroshot     scores          lm-eval's tasks, with chance levels and averages
tracks       ratios to the original by kind, as in BiBench
generation   continuing a prompt
"""
