"""The graph that everything here works on: nodes, operators, shapes, and which values live when. Knows no model and
no board."""
