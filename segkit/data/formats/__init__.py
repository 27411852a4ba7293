"""The formats of labels that ``dataset=folder`` reads: one file each, over one rasteriser of polygons."""
