"""One file a data set: from its official layout to a list of samples."""
