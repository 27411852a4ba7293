"""Data: readers of the official layouts, label tables, transforms, loading, label counts."""

from segkit.data.labels import LabelTable, load_table
from segkit.data.samples import Item, Sample, SampleSet, open_dataset

__all__ = ["Item", "LabelTable", "Sample", "SampleSet", "load_table", "open_dataset"]
