"""Tables and pictures from results; nothing here knows a tensor."""
