"""Figures: pure functions from rows to an SVG that carries its rows, for reports and notebooks (extra `report`).

A figure inherits the text colour of its page, so that it is read on light and on dark. A new figure is a function in a
file of its own; import it here.
"""

from logitcache.report.figures.base import Figure as Figure
from logitcache.report.figures.curves import curves as curves
from logitcache.report.figures.embedding import embedding as embedding
from logitcache.report.figures.heat_map import heat_map as heat_map
from logitcache.report.figures.intervals import intervals as intervals
from logitcache.report.figures.pareto import pareto as pareto
from logitcache.report.figures.per_class import MOST_CLASSES as MOST_CLASSES
from logitcache.report.figures.per_class import per_class as per_class
from logitcache.report.figures.picture import picture as picture
from logitcache.report.figures.reliability import reliability as reliability
