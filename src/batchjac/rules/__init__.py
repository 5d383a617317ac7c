"""Rules for graph nodes; importing this package registers them all."""
from batchjac.rules import linear as linear, pointwise as pointwise
