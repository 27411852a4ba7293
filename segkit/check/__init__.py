"""Look at data and rehearse a run before it is started."""
