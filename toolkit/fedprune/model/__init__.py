"""The whole model and a submodel of it: channel groups, selections, widths."""
