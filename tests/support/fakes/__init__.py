"""Stand-ins for networks, servers, boards and libraries, and jobs as small as can be."""
