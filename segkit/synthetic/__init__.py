"""Scenes that are painted: the default data set, and stand-ins in official layouts."""
