"""Predict what stage one takes, before it begins.

`plan` opens the inputs, either as a `dry_run` (the cache is compared with the recipe, and encodings are calibrated) or
for `upper_bounds` from shapes alone. A `probe` runs the loop of stage one over a few batches: `timing` makes seconds by
row of its clocks, `compression` extrapolates bytes. `costs` turns these into bytes, files, time and memory of the whole
cache. `candidate_taps` lists what else could be kept.
"""
